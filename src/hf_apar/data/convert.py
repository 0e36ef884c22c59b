"""A file of chats to a file of trees: ``hf-apar extract`` without the command line."""

import json
import multiprocessing
import os
import pickle
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter

from hf_apar.checkpoints.writing import alone, write_whole
from hf_apar.data.extraction.cues import count_words
from hf_apar.data.extraction.markdown import Extraction, extraction
from hf_apar.data.extraction.rules import Rule, rules_without
from hf_apar.data.records.chats import Chat, Message, is_answer, read_chat, without_tree
from hf_apar.data.records.files import Row, open_records, record_of
from hf_apar.data.records.json_array import UnreadError
from hf_apar.data.records.rejections import UNUSABLE, Rejected, Rejections
from hf_apar.data.settings import TreeLimits
from hf_apar.errors import DataError

CHUNK = 128  # records that a process takes at once
WANTED = (
    "chats with `messages` or `conversations`, or `prompt` and `response`, as JSON Lines, one JSON array, Parquet or a "
    "folder of `datasets`"
)


@dataclass
class ExtractionReport:
    """What became of a file; the counts of two parts of it add up.

    Attributes:
        records, answers: that were read; a record may be rejected, or hold several answers.
        rejected: why records were written aside, and how many.
        unread: of these so many stand for the rest of a file that could not be read.
        repaired: what was done to chats whose turns were in no order that every template takes, and to how many.
        structured: answers that fork.
        threads: of all answers, roots included.
        words, path_words: of all answers, and of the longest paths of their trees.
        refused: the rules that kept answers whole, and how many.
        kept: the rules that kept a part unforked, and how many parts.
        seconds: from the first record to the last.
    """

    records: int = 0
    answers: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    unread: int = 0
    repaired: Counter[str] = field(default_factory=Counter)
    structured: int = 0
    threads: int = 0
    words: int = 0
    path_words: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def __add__(self, other: "ExtractionReport") -> "ExtractionReport":
        return ExtractionReport(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def to_dict(self) -> dict[str, object]:
        """Return the counts, the most frequent reasons first, and the ratios of them."""
        counts = {
            name: dict(value.most_common()) if isinstance(value, Counter) else value for name, value in vars(self).items()
        }
        ratios = {
            "structured_share": self.structured / max(1, self.answers),
            "threads_per_answer": self.threads / max(1, self.answers),
            "ideal_ratio": self.words / max(1, self.path_words),
            "answers_per_second": self.answers / max(1e-9, self.seconds),
        }
        return counts | {name: round(ratio, 4) for name, ratio in ratios.items()}


@dataclass(frozen=True)
class _Chunk:
    lines: list[str]
    aside: list[Rejected]
    report: ExtractionReport


def extract_file(
    source: Path,
    output: Path,
    *,
    workers: int = TreeLimits.workers,
    max_depth: int = TreeLimits.max_depth,
    max_forks: int = TreeLimits.max_forks,
    without: Iterable[str] = (),
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> ExtractionReport:
    """Read chats from ``source`` and write them to ``output`` with the tree of each answer.

    ``output`` is JSON Lines, or Parquet if it is called so: ``messages``, and in those of the assistant ``tree``, the
    nested lists of :meth:`~hf_apar.data.extraction.text_tree.TextThread.to_json` (in Parquet as text). Records that
    cannot be used go to ``output`` + ``.rejected.jsonl`` with their line and the reason; the report to ``output`` +
    ``.report.json``.

    Args:
        source: as for :func:`~hf_apar.data.records.files.open_records`; the forms of a record are those of
            :func:`~hf_apar.data.records.chats.read_chat`.
        workers: processes; the file does not depend on them.
        max_depth: as in :func:`~hf_apar.data.extraction.markdown.extract`.
        max_forks: as there.
        without: names of rules that are switched off.
        on_progress: called with the number of rows done and that of all, ``None`` where that is not known.

    Raises:
        ConfigurationError: if there is no rule of a name.
        ConfigurationError: if another process writes to ``output``.
        DataError: if ``source`` is ``output``, or a folder that is no dataset, or none of its records can be used;
            ``output`` is not written then.
    """
    if source.resolve() == output.resolve():
        raise DataError(f"{output} is the file that is read; name another one to write to")
    job = _Job(max_depth, max_forks, tuple(without))
    rules_without(job.without)  # before anything is written
    records, started, report = open_records(source), perf_counter(), ExtractionReport()
    with _lines_to(output) as write:
        rejections = Rejections(source, output.with_name(output.name + ".rejected.jsonl"))
        for chunk in _chunks(records.rows, job, workers):
            write(chunk.lines)
            rejections.add(chunk.aside)
            report += chunk.report
            on_progress(report.records, records.total)
        report.seconds, report.rejected = perf_counter() - started, rejections.reasons
        on_progress(report.records, report.records)  # empty lines are no records
        text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n"
        write_whole(output.with_name(output.name + ".report.json"), text)
        if not report.answers:
            raise rejections.nothing_left(WANTED)
    return report


@dataclass(frozen=True)
class _Job:
    """What a worker does with rows; it is sent to other processes."""

    max_depth: int
    max_forks: int
    without: tuple[str, ...]

    def __call__(self, rows: list[Row]) -> _Chunk:
        lines: list[str] = []
        aside: list[Rejected] = []
        report, rules = ExtractionReport(records=len(rows)), rules_without(self.without)
        for number, row in rows:
            try:
                chat = read_chat(record_of(row))
                found = {
                    index: self._extract(message, rules) for index, message in enumerate(chat.messages) if is_answer(message)
                }
                line = _written(chat, found)
            except UNUSABLE as error:
                aside.append(Rejected.by(error, number, row))
                report.unread += isinstance(error, UnreadError)
                continue
            for extracted in found.values():
                _count(report, extracted)
            report.repaired.update(chat.repairs)
            lines.append(line)
        return _Chunk(lines, aside, report)

    def _extract(self, message: Message, rules: tuple[Rule, ...]) -> Extraction:
        return extraction(message["content"], max_depth=self.max_depth, max_forks=self.max_forks, rules=rules)


def _written(chat: Chat, found: dict[int, Extraction]) -> str:
    """Return the line that a chat is written as; an assistant's message without a tree is context alone."""
    messages: list[dict[str, object]] = []
    for index, message in enumerate(chat.messages):
        messages.append(dict(without_tree(message)))
        if message["role"] == "assistant":
            messages[-1]["tree"] = found[index].tree.to_json() if index in found else None
    record = {"messages": messages} | ({"tools": chat.tools} if chat.tools else {})
    try:
        return json.dumps(record, ensure_ascii=False)
    except TypeError:
        raise DataError("a tool or a call of one holds what is no JSON") from None


def _count(report: ExtractionReport, found: Extraction) -> None:
    tree = found.tree
    report.answers += 1
    report.structured += tree.is_structured
    report.threads += 1 + tree.fork_count
    report.words += sum(count_words(piece) for thread in tree.walk() for piece in thread.pieces if isinstance(piece, str))
    report.path_words += tree.critical_path(count_words)
    report.kept.update(rule.name for rule in found.kept_by)
    if found.refused_by is not None:
        report.refused[found.refused_by.name] += 1


def _chunks(rows: Iterator[Row], job: _Job, workers: int) -> Iterator[_Chunk]:
    """Yield what ``job`` makes of ``rows``, in their order; few of them wait in memory."""
    batches = iter(lambda: list(islice(rows, CHUNK)), [])
    if workers <= 1:
        yield from map(job, batches)
        return
    with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
        running: deque[Future[_Chunk]] = deque()
        for batch in batches:
            running.append(pool.submit(_unpacked, job, _packed(batch)))
            if len(running) > 3 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _end_with_parent() -> None:
    """End this process once the one that started it was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _packed(rows: list[Row]) -> bytes:
    """Return ``rows`` for another process; pickle nests deeper than JSON, so that text goes where it cannot."""
    try:
        return pickle.dumps(rows)
    except RecursionError:
        return pickle.dumps([(number, _as_line(row)) for number, row in rows])


def _as_line(row: object) -> object:
    try:
        return row if isinstance(row, bytes | Exception) else json.dumps(row, default=str).encode()
    except RecursionError:
        return DataError("it is nested too deeply")


def _unpacked(job: _Job, rows: bytes) -> _Chunk:
    return job(pickle.loads(rows))  # noqa: S301 - the parent process wrote it


@contextmanager
def _lines_to(path: Path) -> Iterator[Callable[[list[str]], None]]:
    """Write lines to ``path``, which appears once it is complete."""
    part = path.with_name(path.name + ".part")
    with alone(part):
        try:
            if path.suffix == ".parquet":
                with _parquet_lines_to(part) as write:
                    yield write
            else:
                with part.open("w", encoding="utf-8", newline="\n") as file:
                    yield lambda lines: file.writelines(line + "\n" for line in lines)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


_COLUMNS = ("role", "content", "name", "tool_calls", "tool_call_id", "tree")


@contextmanager
def _parquet_lines_to(path: Path) -> Iterator[Callable[[list[str]], None]]:
    import pyarrow as arrow
    from pyarrow.parquet import ParquetWriter

    message = arrow.struct([(name, arrow.string()) for name in _COLUMNS])
    schema = arrow.schema([("messages", arrow.list_(message)), ("tools", arrow.string())])

    def write(lines: list[str]) -> None:
        records = [json.loads(line) for line in lines]
        for fields in (fields for record in records for fields in (record, *record["messages"])):
            for name in ("tree", "tool_calls", "tools"):
                if fields.get(name) is not None:
                    fields[name] = json.dumps(fields[name], ensure_ascii=False)
        file.write_table(arrow.Table.from_pylist(records, schema=schema))

    with ParquetWriter(path, schema) as file:
        yield write
