"""What is measured of answers once they are made, a line of JSON each: it takes minutes, and goes on where it stopped."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from hf_apar.errors import DataError
from hf_apar.evaluation.answers import Key
from hf_apar.evaluation.lines import opened_for_more, whole_lines, write_line
from hf_apar.evaluation.rows import Row

Numbers = Mapping[str, float]


class Measure(Protocol):
    """What :func:`measure_all` asks for numbers."""

    @property
    def name(self) -> str:
        """What is measured, and with which model: numbers of another name are not taken for these."""

    def __call__(self, rows: Sequence[Row]) -> Iterator[tuple[int, Numbers]]:
        """Yield the place of each row and its numbers by name, in any order; none where they mean nothing."""


def measure_all(
    measures: Sequence[Measure],
    rows: Mapping[str, Sequence[Row]],
    path: Path,
    *,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[Key, dict[str, float]]:
    """Return the numbers of all rows, as :func:`~hf_apar.evaluation.rows.rows_by_arm` takes them.

    Numbers that ``path`` has of the same answer to the same prompt are not measured again.

    Args:
        rows: by arm.
        path: a file of numbers, which grows by each as it is measured.
        progress: told after each how many there are, of how many, and about how many seconds the others take.

    Raises:
        DataError: if ``path`` holds something else.
    """
    flat = {(row.prompt.key, arm): row for arm, some in rows.items() for row in some}
    kept = _kept(path)
    with opened_for_more(path) as file:
        for measure in measures:
            missing = {digest: row for row in flat.values() if (digest := _digest(measure, row)) not in kept}
            digests, start = list(missing), time.perf_counter()
            for count, (place, numbers) in enumerate(measure([*missing.values()]), start=1):
                kept[digests[place]] = numbers
                write_line(file, {"of": digests[place], "numbers": numbers})
                if progress is not None:
                    took = time.perf_counter() - start
                    progress(count, len(digests), took / count * (len(digests) - count))
    return {
        key: {name: value for measure in measures for name, value in kept[_digest(measure, row)].items()}
        for key, row in flat.items()
    }


def _kept(path: Path) -> dict[str, Numbers]:
    try:
        return {record["of"]: record["numbers"] for record in map(json.loads, whole_lines(path))}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is no file of numbers ({error}); remove it, or give another") from error


def _digest(measure: Measure, row: Row) -> str:
    """Return what stands for all that a measure may look at: an answer and its parts, whichever arm wrote them."""
    parts = [[[part.title, part.text] for part in details] for details in row.siblings]
    read = [measure.name, row.prompt.messages, row.prompt.language, row.answered.text, parts]
    return sha256(json.dumps(read).encode()).hexdigest()
