"""Files of JSON Lines that grow a line at a time: one that was torn when its writer was killed does not count."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a file but for a last one without its end; none if there is no file."""
    return _whole(path.read_bytes()).splitlines() if path.exists() else []


@contextmanager
def opened_for_more(path: Path) -> Iterator[TextIO]:
    """Open a file, or a new one, for :func:`write_line`; a torn last line is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(len(_whole(file.read())))
    with path.open("a", encoding="utf-8") as text:
        yield text


def write_line(file: TextIO, record: Mapping[str, object]) -> None:
    """Append a line, and give it to the system at once."""
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def _whole(lines: bytes) -> bytes:
    return lines[: lines.rfind(b"\n") + 1]
