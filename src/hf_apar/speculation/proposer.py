"""What the loop asks for drafts."""

from collections.abc import Sequence
from typing import Protocol

from hf_apar.growth import GrowingTree


class Proposer(Protocol):
    """Guesses what threads write next; a guess changes the number of steps and never the text."""

    def propose(self, rows: Sequence[GrowingTree]) -> Sequence[Sequence[Sequence[int]]]:
        """Return for each row a draft, possibly empty, for each of its live threads, in the order of ``row.live``."""


class NoDrafts:
    """The proposer of plain decoding."""

    def propose(self, rows: Sequence[GrowingTree]) -> Sequence[Sequence[Sequence[int]]]:
        return [[()] * len(row.live) for row in rows]
