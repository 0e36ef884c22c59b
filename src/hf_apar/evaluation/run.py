"""Lets arms answer prompts, one answer at a time, and keeps each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Protocol

from hf_apar.evaluation.answers import Answered, Key, answers_in, as_asked
from hf_apar.evaluation.lines import opened_for_more, write_line
from hf_apar.evaluation.suites import Prompt

WARM = 8  # tokens of a first answer that nobody keeps: it pays for what later ones find ready
Told = Callable[[int, int, float | None], None]
"""Told how many answers there are, of how many, and how many seconds the others will take, if that is known."""


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
    progress: Told | None = None,
) -> dict[Key, Answered]:
    """Return the answers of all arms to all prompts; those that ``path`` has already are not made again.

    The arms answer a prompt one after the other, in an order that turns from prompt to prompt: so a machine that grows slow
    or busy meanwhile is slow for all of them. What goes on from another prompt's answer comes after it in ``prompts``.

    Args:
        path: a file of answers, which grows by each as it is made.
        progress: told before the first answer and after each.
    """
    found = answers_in(path)
    wanted = [(arm, prompt) for prompt, row in _in_turn(prompts, arms) for arm in row]
    missing = [(arm, prompt) for arm, prompt in wanted if (prompt.key, arm.name) not in found]
    tell = progress or (lambda done, total, left: None)
    tell(len(wanted) - len(missing), len(wanted), _seconds_left(missing, found))
    warm: set[str] = set()
    with opened_for_more(path) as file:
        for count, (arm, prompt) in enumerate(missing, start=1):
            chat = as_asked(prompt, arm.name, found)
            if arm.name not in warm:
                warm.add(arm.name)
                arm.answer(chat, WARM)
            one = found[prompt.key, arm.name] = arm.answer(chat, max_new_tokens)
            write_line(file, asdict(one))
            tell(len(wanted) - len(missing) + count, len(wanted), _seconds_left(missing[count:], found))
    return {key: found[key] for arm, prompt in wanted if (key := (prompt.key, arm.name)) in found}


def _in_turn(prompts: Sequence[Prompt], arms: Sequence[Answers]) -> list[tuple[Prompt, list[Answers]]]:
    return [(prompt, [*arms[place % len(arms) :], *arms[: place % len(arms)]]) for place, prompt in enumerate(prompts)]


def _seconds_left(missing: Sequence[tuple[Answers, Prompt]], found: Mapping[Key, Answered]) -> float | None:
    """Return what the missing answers take where each arm goes on as it did; a new arm, as all do on average."""
    took: dict[str, list[float]] = {}
    for (_, name), one in found.items():
        if one.seconds is not None:
            took.setdefault(name, []).append(one.seconds)
    if not took:
        return None if missing else 0.0
    means = {name: fmean(some) for name, some in took.items()}
    return sum(means.get(arm.name, fmean(means.values())) for arm, _ in missing)
