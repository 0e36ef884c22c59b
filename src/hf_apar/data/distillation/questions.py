"""Prompts of our own writing: a seeded mix of questions, most of which ask for an answer in parts.

``prompts.toml`` holds the English ones by family, ``prompts_de.toml`` the German ones, and so on: each of a family's
templates with each combination of what fills its slots gives some thousand prompts, and some hundred in languages other than
English, of which :func:`template_questions` draws.
"""

import random
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import product

from hf_apar.data.distillation.distill import Question
from hf_apar.data.distillation.languages import LANGUAGES, language_of
from hf_apar.data.settings import PromptChoice

OPENINGS = LANGUAGES["en"].openings


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


def families(language: str = "en") -> dict[str, QuestionFamily]:
    """Return the families of prompts in one of ``LANGUAGES``, by name."""
    file = "prompts.toml" if language == "en" else f"prompts_{language}.toml"
    text = (files("hf_apar.data") / file).read_text(encoding="utf-8")
    return {
        name: QuestionFamily(
            family["in_parts"], tuple(family["templates"]), tuple(map(tuple, family["slots"])),
            tuple(family.get("openings", LANGUAGES[language].openings)),
        )
        for name, family in tomllib.loads(text).items()
    }  # fmt: skip


def template_questions(
    count: int, *, opened_share: float = 1.0, seed: int = 0, languages: Iterable[str] = PromptChoice.languages
) -> list[Question]:
    """Return ``count`` different questions, the same ones for the same ``seed``.

    Args:
        languages: the questions are drawn from those of all these, by the letters of ``LANGUAGES``.
        opened_share: the share of the questions that an answer in parts fits which get one of their openings; the rest
            is often answered in prose, which teaches not to fork there.

    Raises:
        ValueError: if more are asked for than the templates can give.

    >>> template_questions(2, seed=1) == template_questions(2, seed=1)
    True
    """
    chosen = [family for language in languages for family in families(language).values()]
    pool = {prompt: family for family in chosen for prompt in family.prompts()}
    if count > len(pool):
        raise ValueError(f"the templates give {len(pool)} different prompts, {count} were asked for")
    draw = random.Random(seed)
    return [
        Question(prompt, draw.choice(family.openings) if family.in_parts and draw.random() < opened_share else "")
        for prompt, family in draw.sample(list(pool.items()), count)
    ]


def open_lists(questions: Sequence[Question], share: float, *, seed: int = 0) -> list[Question]:
    """Return ``questions`` with an opening for about ``share`` of those that have none yet.

    It is one of their language, or one of :data:`OPENINGS` where that is unknown.
    """
    draw = random.Random(seed)

    def opening(prompt: str) -> str:
        return draw.choice((language_of(prompt) or LANGUAGES["en"]).openings)

    return [
        question if question.opening or draw.random() >= share else replace(question, opening=opening(question.prompt))
        for question in questions
    ]
