"""Records that cannot be used: set aside with their number and the reason, counted, and told at the end."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hf_apar.errors import DataError

UNUSABLE = (DataError, RecursionError)
"""What is raised where a record cannot be used: the latter by what is nested too deeply for JSON or for a tree."""


@dataclass(frozen=True)
class Rejected:
    """A record's number (its line, in JSON Lines), why it cannot be used, and what it says."""

    number: int
    reason: str
    record: object

    @classmethod
    def by(cls, error: Exception, number: int, record: object) -> "Rejected":
        """Return the record of that number as rejected by ``error``, one of :data:`UNUSABLE`."""
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        return cls(number, reason, None if isinstance(record, Exception) else record)

    def to_json(self) -> str:
        """Return it as a line of JSON."""
        record = self.record
        if isinstance(record, bytes):
            record = record.decode("utf-8", "replace").rstrip("\r\n")
        written = {"line": self.number, "reason": self.reason, "record": record}
        try:
            return json.dumps(written, ensure_ascii=False, default=str)
        except RecursionError:
            return json.dumps(written | {"record": None}, ensure_ascii=False)


class Rejections:
    """What was set aside of one source.

    Attributes:
        source: what the records were read from, as it is to be named.
        path: where they are written, JSON Lines; ``None`` for nowhere. There is no such file where there are none.
        reasons: why, and how many.
    """

    def __init__(self, source: Path | str, path: Path | None = None) -> None:
        self.source, self.path = source, path
        self.reasons: Counter[str] = Counter()
        self._first: dict[str, int] = {}
        if path is not None:
            path.unlink(missing_ok=True)  # what an earlier run wrote is of no use

    def add(self, rejected: Iterable[Rejected]) -> None:
        """Count ``rejected`` and write them down."""
        items = list(rejected)
        for item in items:
            self.reasons[item.reason] += 1
            self._first.setdefault(item.reason, item.number)
        if self.path is not None and items:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.writelines(item.to_json() + "\n" for item in items)

    def __bool__(self) -> bool:
        return bool(self.reasons)

    def __str__(self) -> str:
        """Say how many were set aside, why, and where they are."""
        total = self.reasons.total()
        most = [
            f"{count} because {reason} (first: record {self._first[reason]})"
            for reason, count in self.reasons.most_common(5)
        ]
        others = total - sum(count for _, count in self.reasons.most_common(5))
        reasons = "; ".join([*most, f"{others} for other reasons"] if others else most)
        return f"{self.source}: {total} record{'s' * (total != 1)} set aside: {reasons}{self._where}"

    def nothing_left(self, wanted: str) -> DataError:
        """Return the error that says that none of the records can be used, and most often why."""
        if not self.reasons:
            return DataError(f"{self.source} holds no records; wanted {wanted}")
        ((reason, count),) = self.reasons.most_common(1)
        return DataError(
            f"no record of {self.source} can be used: of {self.reasons.total()}, {count} because {reason} (first: record "
            f"{self._first[reason]}); wanted {wanted}{self._where}"
        )

    @property
    def _where(self) -> str:
        return f"; they are in {self.path}" if self.path is not None else ""
