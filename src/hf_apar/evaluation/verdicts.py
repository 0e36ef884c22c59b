"""What a judge said of two answers to one prompt, and the file that keeps it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, TextIO

from hf_apar.checkpoints.made_with import digest
from hf_apar.errors import DataError
from hf_apar.evaluation.answers import Answered, Key
from hf_apar.evaluation.lines import whole_lines, write_line
from hf_apar.evaluation.suites import Prompt


class Preference(StrEnum):
    """Which of two answers is better."""

    first = "first"
    second = "second"
    tie = "tie"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, in the order in which a judge sees them."""

    prompt: str
    first: str
    second: str

    @property
    def swapped(self) -> "Pair":
        """The same in the other order."""
        return Pair(self.prompt, self.second, self.first)


def shown_prompt(prompt: Prompt) -> str:
    """Return what a judge is shown of a prompt: the message, or all of them where there are more."""
    if len(prompt.messages) == 1:
        return prompt.text
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt.messages)


def shown_answer(prompt: Prompt, arm: str, answers: Mapping[Key, Answered]) -> str:
    """Return what a judge is shown of an answer: with the one before it, where the prompt goes on from that."""
    text = answers[prompt.key, arm].text
    return text if prompt.after is None else f"[first answer]\n{answers[prompt.after, arm].text}\n\n[last answer]\n{text}"


class VerdictKey(NamedTuple):
    """What a verdict depends on: digests of the prompt and both answers in their order, and who was asked in which way."""

    prompt: str
    first: str
    second: str
    judge: str


@dataclass(frozen=True)
class Verdict:
    """A judge's reply, and the preference in it: ``None`` where it holds no verdict."""

    key: VerdictKey
    preference: Preference | None
    reply: str


def verdict_key(pair: Pair, judge: str) -> VerdictKey:
    """Return what the verdict on ``pair`` in this order is kept under, of a judge of that identity."""
    return VerdictKey(digest(pair.prompt), digest(pair.first), digest(pair.second), judge)


def read_verdicts(path: Path) -> dict[VerdictKey, Verdict]:
    """Return the verdicts of a file of JSON Lines, none where there is no file.

    A last line without its end, of a process that was killed, is left out.

    Raises:
        DataError: if another line is no verdict.
    """
    verdicts = {}
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            verdict = _verdict(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"line {number} of {path} is no verdict ({error!r}); name another file, or remove the line to ask again"
            ) from error
        verdicts[verdict.key] = verdict
    return verdicts


def write_verdict(file: TextIO, verdict: Verdict) -> None:
    """Append a verdict to a file that :func:`~hf_apar.evaluation.lines.opened_for_more` gave."""
    write_line(file, {**verdict.key._asdict(), "preference": verdict.preference, "reply": verdict.reply})


def _verdict(record: Mapping[str, str]) -> Verdict:
    key = VerdictKey(*(record[name] for name in VerdictKey._fields))
    told = record["preference"]
    return Verdict(key, None if told is None else Preference(told), record["reply"])
