"""What a judge said of two answers to one prompt, and the file that keeps it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, TextIO

from hf_apar.errors import DataError


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


def read_verdicts(path: Path) -> dict[VerdictKey, Verdict]:
    """Return the verdicts of a file of JSON Lines, none where there is no file.

    A last line without its end, of a process that was killed, is left out.

    Raises:
        DataError: if another line is no verdict.
    """
    if not path.exists():
        return {}
    verdicts = {}
    for number, line in enumerate(_whole(path.read_bytes()).splitlines(), start=1):
        try:
            verdict = _verdict(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"line {number} of {path} is no verdict ({error!r}); name another file, or remove the line to ask again"
            ) from error
        verdicts[verdict.key] = verdict
    return verdicts


@contextmanager
def opened_for_more(path: Path) -> Iterator[TextIO]:
    """Open a file of verdicts for :func:`write_verdict`, without a last line that has no end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(len(_whole(file.read())))
    with path.open("a", encoding="utf-8") as text:
        yield text


def write_verdict(file: TextIO, verdict: Verdict) -> None:
    """Append a line, and give it to the system at once."""
    record = verdict.key._asdict() | {"preference": verdict.preference, "reply": verdict.reply}
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def _whole(lines: bytes) -> bytes:
    return lines[: lines.rfind(b"\n") + 1]


def _verdict(record: Mapping[str, str]) -> Verdict:
    key = VerdictKey(*(record[name] for name in VerdictKey._fields))
    told = record["preference"]
    return Verdict(key, None if told is None else Preference(told), record["reply"])
