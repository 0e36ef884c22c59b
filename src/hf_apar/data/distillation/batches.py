"""Answers that are made and written batch by batch: a call goes on where the last one stopped, and drops are counted."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from hf_apar.checkpoints.writing import alone, write_whole
from hf_apar.errors import DataError
from hf_apar.processes import process_count, process_number

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
_STRIDE = 1_000_003  # between the seeds of two items: far more than between the seeds that people choose


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
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))

    @classmethod
    def from_dict(cls, counts: dict[str, Any]) -> "BatchReport":
        """Return the report that :meth:`to_dict` made ``counts`` of."""
        return cls(counts["asked"], counts["answers"], Counter(counts["dropped"]))

    def to_dict(self) -> dict[str, object]:
        """Return the counts, the most frequent reasons first."""
        return {"asked": self.asked, "answers": self.answers, "dropped": dict(self.dropped.most_common())}

    def add(self, asked: int, kept: int, dropped: Iterable[Dropped]) -> None:
        """Count a batch."""
        self.asked += asked
        self.answers += kept
        self.dropped.update(one.reason for one in dropped)

    def joined(self, other: "BatchReport") -> "BatchReport":
        """Return the counts of both."""
        return BatchReport(self.asked + other.asked, self.answers + other.answers, self.dropped + other.dropped)

    def write(self, answers: Path) -> None:
        """Write it beside ``answers``, as their name and ``.report.json``."""
        write_whole(_file(answers), json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")


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

    A second call goes on from there, also after one that was killed: ``path`` + ``.done`` says how many items are done, how
    long the file was then, and the digest of these items and the ``settings``; what stands after that length is cut off.
    More items may have come after those that are done. ``path`` + ``.report.json`` counts what was dropped. Torch is seeded
    for each batch, from the seed that it had and the batch's place: what is drawn does not tell where a call stopped.

    Each of several processes (``torchrun``, ``accelerate launch``) makes a run of whole batches, in a file of its own beside
    ``path``; the last one to end joins them there. Each goes on where it stopped if as many are started again. What is
    yielded is how many would be done if the others were as far.

    Raises:
        ConfigurationError: if another process writes to ``path``.
        DataError: if what is done was made of other items, or with other settings.
    """
    count = process_count()
    if count == 1:
        yield from _make(items, 0, path, batch_size, settings, answer)
        return
    progress = _checked(items, path, settings)
    done = progress.done
    if done == len(items):
        return
    if process_number() == 0:
        progress.write(path)  # what stands after this length when the parts are joined is of no use
    batches = -(-(len(items) - done) // batch_size)
    starts = [done + batches * number // count * batch_size for number in range(count)]
    parts = [
        (path.with_name(f"{path.name}.{number + 1}-of-{count}"), items[start:end])
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(items)], strict=True))
    ]
    (own, share), start = parts[process_number()], starts[process_number()]
    for made in _make(share, start, own, batch_size, settings, answer):
        yield min(done + made * count, len(items))
    _join(parts, items, path, settings)


def begin_anew(path: Path) -> None:
    """Forget what is done in ``path``, where nothing came of it."""
    for file in (_progress_file(path), _file(path)):
        file.unlink(missing_ok=True)


def _join(parts: Sequence[tuple[Path, Sequence[object]]], items: Sequence[object], path: Path, settings: object) -> None:
    """Add ``parts`` to ``path`` where all of them are done; whoever comes second finds them gone."""
    with alone(path.parent):
        if not all(part.exists() for part, _ in parts):
            return
        progress = [_Progress.of(part, settings) for part, _ in parts]
        if any(one.digest != _digest(share, settings) for one, (_, share) in zip(progress, parts, strict=True)):
            return
        before = _Progress.of(path, settings)
        whole = path.with_name(f"{path.name}.part")
        begun = path.read_bytes()[: before.length] if path.exists() else b""
        whole.write_bytes(begun + b"".join(part.read_bytes() for part, _ in parts))
        whole.replace(path)
        report = before.report
        for one in progress:
            report = report.joined(one.report)
        report.write(path)
        _Progress(len(items), path.stat().st_size, _digest(items, settings), report).write(path)
        for part, _ in parts:
            for file in (part, _progress_file(part), _file(part)):
                file.unlink(missing_ok=True)


def _make(
    items: Sequence[Item],
    first: int,
    path: Path,
    batch_size: int,
    settings: object,
    answer: Callable[[Sequence[Item]], Sequence[TextAnswer | Dropped]],
) -> Iterator[int]:
    """Do it in one process; ``first`` is the number of the first of ``items`` among all."""
    with alone(path):
        seed, progress = torch.initial_seed(), _checked(items, path, settings)
        report = progress.report
        progress.write(path)
        report.write(path)  # a call that was killed may have come no further than its progress
        os.truncate(path, progress.length)
        for start in range(progress.done, len(items), batch_size):
            batch = items[start : start + batch_size]
            torch.manual_seed((seed + _STRIDE * (first + start)) % 2**63)
            outcomes = answer(batch)
            answers = [one for one in outcomes if isinstance(one, TextAnswer)]
            with path.open("a", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
            report.add(len(batch), len(answers), (one for one in outcomes if isinstance(one, Dropped)))
            end = start + len(batch)
            _Progress(end, path.stat().st_size, _digest(items[:end], settings), report).write(path)
            report.write(path)
            logger.info("%d answers of %d", len(answers), len(batch))
            yield end


def _checked(items: Sequence[object], path: Path, settings: object) -> "_Progress":
    """Return what of ``items`` is done in ``path``, unless it was made of others."""
    progress = _Progress.of(path, settings)
    if progress.digest != _digest(items[: progress.done], settings) or progress.length > _size(path):
        raise DataError(
            f"{path} was made of other records or with other settings (model, engine, number format, temperature, penalty, "
            f"seed, lengths); go on with those, or remove it and {_progress_file(path).name} to begin anew"
        )
    return progress


@dataclass(frozen=True)
class _Progress:
    """How many items are done, the length of the file in bytes then, what it was made of, and what came of it."""

    done: int
    length: int
    digest: str
    report: BatchReport

    @classmethod
    def of(cls, path: Path, settings: object) -> "_Progress":
        """Read what stands beside ``path``; one without a digest that fits where nobody knows how it was made."""
        file = _progress_file(path)
        if not file.exists():
            return cls(0, _size(path), _digest([], settings), BatchReport())
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return cls(found["done"], found["length"], found["digest"], BatchReport.from_dict(found["report"]))
        except (ValueError, TypeError, KeyError):  # of an earlier release
            return cls(0, 0, "", BatchReport())

    def write(self, path: Path) -> None:
        record = vars(self) | {"report": self.report.to_dict()}
        write_whole(_progress_file(path), json.dumps(record, ensure_ascii=False))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _progress_file(answers: Path) -> Path:
    return answers.with_name(answers.name + ".done")


def _digest(items: Sequence[object], settings: object) -> str:
    return hashlib.sha256(repr((settings, *items)).encode("utf-8", "backslashreplace")).hexdigest()
