"""Lets arms answer prompts, one at a time on the clock or several at once without one, and keeps each answer."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answered]: ...


def answer_all(
    arms: Sequence[Answers],
    prompts: Sequence[Prompt],
    path: Path,
    *,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    progress: Told | None = None,
) -> dict[Key, Answered]:
    """Return the answers of all arms to all prompts; those that ``path`` has already are not made again.

    The arms answer a prompt one after the other, in an order that turns from prompt to prompt: so a machine that grows slow
    or busy meanwhile is slow for all of them. What goes on from another prompt's answer is asked after all that do not.

    Args:
        path: a file of answers, which grows by each as it is made.
        batch_size: prompts that an arm answers at once; above 1 no clock runs.
        progress: told before the first answer and after each batch.
    """
    found = answers_in(path)
    batches = [
        (arm, batch)
        for arm, some in _in_turn(_batches(prompts, batch_size), arms)
        if (batch := [prompt for prompt in some if (prompt.key, arm.name) not in found])
    ]
    total, took = len(prompts) * len(arms), _took(found)
    tell = progress or (lambda done, total, left: None)
    tell(total - sum(len(batch) for _, batch in batches), total, _seconds_left(batches, took))
    warm: set[str] = set()
    with opened_for_more(path) as file:
        for place, (arm, batch) in enumerate(batches, start=1):
            chats, start = [as_asked(prompt, arm.name, found) for prompt in batch], time.perf_counter()
            if batch_size > 1:
                made = arm.answers(chats, max_new_tokens)
            else:
                if arm.name not in warm:
                    warm.add(arm.name)
                    arm.answer(chats[0], WARM)
                made = [arm.answer(chats[0], max_new_tokens)]
            each = (time.perf_counter() - start) / len(made)
            for one in made:
                found[one.key, arm.name] = one
                took.setdefault(arm.name, []).append(one.seconds or each)
                write_line(file, asdict(one))
            left = batches[place:]
            tell(total - sum(len(batch) for _, batch in left), total, _seconds_left(left, took))
    return {(prompt.key, arm.name): found[prompt.key, arm.name] for prompt in prompts for arm in arms}


def _batches(prompts: Sequence[Prompt], size: int) -> list[Sequence[Prompt]]:
    """Return the prompts so many at once, those last that go on from the answers to others."""
    turns = [[one for one in prompts if one.after is None], [one for one in prompts if one.after is not None]]
    return [turn[start : start + size] for turn in turns for start in range(0, len(turn), size)]


def _in_turn(batches: Sequence[Sequence[Prompt]], arms: Sequence[Answers]) -> Iterator[tuple[Answers, Sequence[Prompt]]]:
    for place, batch in enumerate(batches):
        first = place % len(arms)
        yield from ((arm, batch) for arm in (*arms[first:], *arms[:first]))


def _took(found: Mapping[Key, Answered]) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {}
    for (_, name), one in found.items():
        if one.seconds is not None:
            took.setdefault(name, []).append(one.seconds)
    return took


def _seconds_left(missing: Sequence[tuple[Answers, Sequence[Prompt]]], took: Mapping[str, Sequence[float]]) -> float | None:
    """Return what the missing answers take where each arm goes on as it did; a new arm, as all do on average."""
    if not took:
        return None if missing else 0.0
    means = {name: fmean(some) for name, some in took.items()}
    return sum(len(batch) * means.get(arm.name, fmean(means.values())) for arm, batch in missing)
