"""Answers that are made and written batch by batch: a call goes on where the last one stopped, and drops are counted."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from hf_apar.errors import DataError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True)
class TextAnswer:
    """A prompt of one user turn and the model's own, finished answer to it, its opening included."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Dropped:
    """In place of an answer: why there is none to keep."""

    reason: str


@dataclass
class BatchReport:
    """Counts over all calls that wrote to a file of answers.

    Attributes:
        asked: prompts so far.
        answers: that were kept.
        dropped: why others were not, and how many.
    """

    asked: int = 0
    answers: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, answers: Path) -> "BatchReport":
        """Read the report beside ``answers``, an empty one if there is none."""
        file = _file(answers)
        if not file.exists():
            return cls()
        counts = json.loads(file.read_text(encoding="utf-8"))
        return cls(counts["asked"], counts["answers"], Counter(counts["dropped"]))

    def add(self, asked: int, kept: int, dropped: Iterable[Dropped]) -> None:
        """Count a batch."""
        self.asked += asked
        self.answers += kept
        self.dropped.update(one.reason for one in dropped)

    def write(self, answers: Path) -> None:
        """Write it beside ``answers``, as their name and ``.report.json``."""
        text = json.dumps(asdict(self) | {"dropped": dict(self.dropped.most_common())}, indent=1, ensure_ascii=False)
        _file(answers).write_text(text + "\n", encoding="utf-8")


def _file(answers: Path) -> Path:
    return answers.with_name(answers.name + ".report.json")


def in_batches(
    items: Sequence[Item],
    path: Path,
    batch_size: int,
    settings: object,
    answer: Callable[[Sequence[Item]], Sequence[TextAnswer | Dropped]],
) -> Iterator[int]:
    """Append to ``path`` what ``answer`` makes of ``items``, a batch at a time; yield how many items are done so far.

    ``path`` + ``.done`` keeps that number and a digest of these items and the ``settings``, and a second call goes on from
    there. More items may have come after those that are done. ``path`` + ``.report.json`` counts what was dropped.

    Raises:
        DataError: if what is done was made of other items, or with other settings.
    """
    progress = path.with_name(path.name + ".done")
    written = progress.read_text() if progress.exists() else f"0 {_digest(items[:0], settings)}"
    done, _, digest = written.partition(" ")  # a file of an earlier release has no digest, and so none that fits
    if digest != _digest(items[: int(done)], settings):
        raise DataError(
            f"{path} was made of other records or with other settings (model, engine, number format, temperature, penalty, "
            f"seed, lengths); go on with those, or remove it and {progress.name} to begin anew"
        )
    path.touch()
    report = BatchReport.of(path) if int(done) else BatchReport()
    for start in range(int(done), len(items), batch_size):
        batch = items[start : start + batch_size]
        outcomes = answer(batch)
        answers = [one for one in outcomes if isinstance(one, TextAnswer)]
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        report.add(len(batch), len(answers), (one for one in outcomes if isinstance(one, Dropped)))
        report.write(path)
        end = start + len(batch)
        progress.write_text(f"{end} {_digest(items[:end], settings)}")
        logger.info("%d answers of %d", len(answers), len(batch))
        yield end


def _digest(items: Sequence[object], settings: object) -> str:
    return hashlib.sha256(repr((settings, *items)).encode("utf-8", "backslashreplace")).hexdigest()
