"""The records of a file or folder, one by one: JSON Lines, a JSON array, Parquet, or what ``datasets`` saved."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from hf_apar.data.records.json_array import UnreadError, array_items
from hf_apar.data.records.rejections import UNUSABLE, Rejected, Rejections
from hf_apar.errors import DataError

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
Row = tuple[int, object]  # its number, and a line of JSON or what it says


@dataclass(frozen=True)
class RecordFile:
    """A file or folder of records: about how many there are, ``None`` where only reading tells; each with its number."""

    total: int | None
    rows: Iterator[Row]


def open_records(path: Path) -> RecordFile:
    """Open JSON Lines, one JSON array, a Parquet file (``.parquet``), or a dataset that ``save_to_disk`` wrote.

    Rows are streamed, an array's too. A row of JSON Lines comes as bytes, and so does one of an array that is no JSON; what
    breaks an array off as an exception in place of a record: what cannot be read is for :func:`record_of` to say and the
    caller's to count.

    Raises:
        DataError: if the folder holds several splits, or no dataset, or the file is not what its name says.
    """
    if path.is_dir():
        return _open_dataset(path)
    if path.suffix == ".parquet":
        return _open_parquet(path)
    with path.open("rb") as file:
        if first_letter(file) == b"[":
            return RecordFile(None, _array(path))
        total = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    return RecordFile(total, _lines(path))


def record_of(row: object) -> object:
    """Return what a row of :attr:`RecordFile.rows` says.

    Raises:
        DataError: if it is no JSON.
        RecursionError: if it is nested too deeply.
    """
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, bytes):
        return row
    try:
        return json.loads(row, strict=False)
    except ValueError as error:
        raise DataError("the line or record is no JSON in UTF-8") from error


def check_goes_on(path: Path, row: object) -> None:
    """Raise :class:`DataError` if a row of ``path`` is where it cannot be read any further."""
    if isinstance(row, UnreadError):
        raise DataError(
            f"{path}: {row}; copy it again, or have hf-apar extract write what comes before, and go on with that"
        ) from row


def usable(path: Path, read: Callable[[object, int], Found], wanted: str, rejected: Rejections | None = None) -> list[Found]:
    """Return what ``read`` makes of each record in ``path`` and its number; what it cannot use is set aside.

    Args:
        path: as for :func:`open_records`.
        wanted: what a record should be, for the error.
        rejected: takes the records that cannot be used; by default a warning tells of them.

    Raises:
        DataError: if none can be used, or the file cannot be read to its end: nobody knows how much is missing.
    """
    aside, found = Rejections(path) if rejected is None else rejected, []
    for number, row in open_records(path).rows:
        check_goes_on(path, row)
        try:
            found.append(read(record_of(row), number))
        except UNUSABLE as error:
            aside.add([Rejected.by(error, number, row)])
    if not found:
        raise aside.nothing_left(wanted)
    if rejected is None and aside:
        logger.warning("%s", aside)
    return found


def first_letter(file: BinaryIO) -> bytes:
    """Return the first byte of ``file`` that is neither white space nor a byte order mark."""
    chunks = iter(lambda: file.read(1 << 10), b"")
    return next((start[:1] for chunk in chunks if (start := chunk.lstrip(b"\xef\xbb\xbf \t\r\n"))), b"")


def _array(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        yield from enumerate(array_items(file), start=1)


def _lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark


def _open_parquet(path: Path) -> RecordFile:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except ArrowInvalid as error:
        raise DataError(f"{path} is no Parquet file, or part of one") from error
    rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
    return RecordFile(file.metadata.num_rows, enumerate(rows, start=1))


def _open_dataset(path: Path) -> RecordFile:
    from datasets import Dataset, load_from_disk

    try:
        data = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is no dataset that save_to_disk wrote; give that, or a file of JSON Lines, a JSON array or Parquet"
        ) from error
    if not isinstance(data, Dataset):
        raise DataError(f"{path} holds the splits {', '.join(data)}; give the folder of one, {path / next(iter(data))}")
    return RecordFile(len(data), enumerate(data, start=1))
