"""Prompts of our own writing: a seeded mix of questions, most of which ask for an answer in parts.

``prompts.toml`` holds them by family: each of a family's templates with each combination of what fills its slots gives
some thousand prompts, of which :func:`template_questions` draws.
"""

import random
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import product

from hf_apar.data.distillation.distill import Question

OPENINGS = (
    "Here are ...:\n\n1. **",
    "Here are some ...:\n\n1. **",
    "Here are a few ...:\n\n1. **",
    "Some of the ...:\n\n1. **",
    "There are several ...:\n\n1. **",
    "These are the ...:\n\n1. **",
    "Consider the following ...:\n\n1. **",
)
"""Beginnings of an answer that make a small model write a list whose items have a title and a detail."""


@dataclass(frozen=True)
class QuestionFamily:
    """Prompts of one kind.

    Attributes:
        in_parts: does an answer in parts fit them?
        templates: texts with as many ``{}`` as there are slots.
        slots: what may stand in each of these.
        openings: of their answers.
    """

    in_parts: bool
    templates: tuple[str, ...]
    slots: tuple[tuple[str, ...], ...]
    openings: tuple[str, ...] = OPENINGS

    def prompts(self) -> Iterator[str]:
        """Yield each template with each combination of what fills its slots."""
        return (template.format(*words) for template in self.templates for words in product(*self.slots))


def families() -> dict[str, QuestionFamily]:
    """Return the families of ``prompts.toml`` by name."""
    text = (files("hf_apar.data") / "prompts.toml").read_text(encoding="utf-8")
    return {
        name: QuestionFamily(
            family["in_parts"], tuple(family["templates"]), tuple(map(tuple, family["slots"])),
            tuple(family.get("openings", OPENINGS)),
        )
        for name, family in tomllib.loads(text).items()
    }  # fmt: skip


def template_questions(count: int, *, opened_share: float = 1.0, seed: int = 0) -> list[Question]:
    """Return ``count`` different questions, the same ones for the same ``seed``.

    Args:
        opened_share: the share of the questions that an answer in parts fits which get one of their openings; the rest
            is often answered in prose, which teaches not to fork there.

    Raises:
        ValueError: if more are asked for than the templates can give.

    >>> template_questions(2, seed=1) == template_questions(2, seed=1)
    True
    """
    pool = {prompt: family for family in families().values() for prompt in family.prompts()}
    if count > len(pool):
        raise ValueError(f"the templates give {len(pool)} different prompts, {count} were asked for")
    draw = random.Random(seed)
    return [
        Question(prompt, draw.choice(family.openings) if family.in_parts and draw.random() < opened_share else "")
        for prompt, family in draw.sample(list(pool.items()), count)
    ]


def open_lists(questions: Sequence[Question], share: float, *, seed: int = 0) -> list[Question]:
    """Return ``questions`` with one of :data:`OPENINGS` for about ``share`` of those that have no opening yet."""
    draw = random.Random(seed)
    return [
        question if question.opening or draw.random() >= share else replace(question, opening=draw.choice(OPENINGS))
        for question in questions
    ]
