"""Lets arms answer prompts, one answer at a time, and keeps each."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from hf_apar.evaluation.answers import Answered, Key, opened_for_more, read_answers, write_answer
from hf_apar.evaluation.suites import Prompt

WARM = 8  # tokens of a first answer that nobody keeps: it pays for what later ones find ready


class Answers(Protocol):
    """What :func:`answer_all` needs of an arm."""

    @property
    def name(self) -> str: ...

    def answer(self, prompt: Prompt, max_new_tokens: int) -> Answered: ...


def answer_all(
    arms: Sequence[Answers],
    prompts: Sequence[Prompt],
    path: Path,
    *,
    max_new_tokens: int = 512,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[Key, Answered]:
    """Return the answers of all arms to all prompts; those that ``path`` has already are not made again.

    The arms answer a prompt one after the other, in an order that turns from prompt to prompt: so a machine that grows slow
    or busy meanwhile is slow for all of them.

    Args:
        path: a file of answers, which grows by each as it is made.
        progress: told after each answer how many there are, of how many, and how many seconds the others will take.
    """
    found = read_answers(path)
    wanted = [(arm, prompt) for prompt, row in _in_turn(prompts, arms) for arm in row]
    missing = [(arm, prompt) for arm, prompt in wanted if (prompt.key, arm.name) not in found]
    warm: set[str] = set()
    took = 0.0
    with opened_for_more(path) as file:
        for count, (arm, prompt) in enumerate(missing, start=1):
            if arm.name not in warm:
                warm.add(arm.name)
                arm.answer(prompt, WARM)
            start = time.perf_counter()
            one = found[prompt.key, arm.name] = arm.answer(prompt, max_new_tokens)
            write_answer(file, one)
            took += time.perf_counter() - start
            if progress is not None:
                progress(len(wanted) - len(missing) + count, len(wanted), took / count * (len(missing) - count))
    return {key: found[key] for arm, prompt in wanted if (key := (prompt.key, arm.name)) in found}


def _in_turn(prompts: Sequence[Prompt], arms: Sequence[Answers]) -> list[tuple[Prompt, list[Answers]]]:
    return [(prompt, [*arms[place % len(arms) :], *arms[: place % len(arms)]]) for place, prompt in enumerate(prompts)]
