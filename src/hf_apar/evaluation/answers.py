"""What arms made of prompts: a line of JSON each, kept as it comes, so that an evaluation goes on where it stopped."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_apar.errors import DataError
from hf_apar.evaluation.lines import whole_lines
from hf_apar.evaluation.suites import Prompt

Key = tuple[str, str]
"""A prompt's key and an arm's name."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """An answer, and what it cost.

    Attributes:
        key: of the prompt.
        arm: its name.
        text: as it reads.
        ended: did every thread end by itself?
        seconds: from the prompt to the last token; ``None`` where no clock ran.
        tree: of an answer in threads, as :meth:`~hf_apar.ParagraphTree.to_dict` tells it.
        tokens, steps, critical_path, peak_threads, peak_kv, kv_if_sequential, attended, attended_if_sequential, drafts,
            proposed, accepted: as in :class:`~hf_apar.AparStats`.
    """

    key: str
    arm: str
    text: str
    ended: bool
    seconds: float | None = None
    tree: Mapping[str, Any] | None = None
    tokens: int = 0
    steps: int = 0
    critical_path: int = 0
    peak_threads: int = 1
    peak_kv: int = 0
    kv_if_sequential: int = 0
    attended: int = 0
    attended_if_sequential: int = 0
    drafts: int = 0
    proposed: int = 0
    accepted: int = 0

    @property
    def counted_steps(self) -> int:
        """The steps; an answer that does not end by itself counts as one token a step, so that loops earn nothing."""
        return self.steps if self.ended else max(self.tokens, self.steps)

    @property
    def counted_path(self) -> int:
        """The critical path, counted likewise."""
        return self.critical_path if self.ended else max(self.tokens, self.critical_path)


def answers_in(path: Path) -> dict[Key, Answered]:
    """Return the answers in a file, the latest of each prompt and arm; none if there is no file.

    A last line that was torn when its writer was killed is left out.

    Raises:
        DataError: for any other line that is no answer.
    """
    found: dict[Key, Answered] = {}
    known = {field.name for field in fields(Answered)}
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            one = Answered(**{name: value for name, value in json.loads(line).items() if name in known})
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}, line {number} is no answer ({error}); remove it") from error
        found[one.key, one.arm] = one
    return found


def as_asked(prompt: Prompt, arm: str, answers: Mapping[Key, Answered]) -> Prompt:
    """Return ``prompt`` as ``arm`` was asked: after its own answer to the prompt that it goes on from, if it goes on."""
    return prompt if prompt.after is None else prompt.going_on(answers[prompt.after, arm].text)
