"""How many tokens may still be sampled: by all threads of a row together, or by each branch for itself."""

from collections.abc import Sequence

from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import Thread


class RowBudget:
    """``tokens`` for all threads of a row together; the last ones go to threads in reading order."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens

    def spend(self, row: GrowingTree, thread: Thread) -> None:
        """Let ``thread`` of ``row`` have written one more token."""
        self.left -= 1

    def bound(self, row: GrowingTree, lengths: Sequence[int]) -> list[int]:
        """Return the ``lengths`` of drafts for the live threads of ``row``, cut to what may still be written.

        Each of these threads writes one token for sure; what is left goes to drafts in reading order.
        """
        spare, bounded = max(0, self.left - len(lengths)), list[int]()
        for length in lengths:
            bounded.append(min(length, spare))
            spare -= bounded[-1]
        return bounded

    def settle(self, row: GrowingTree) -> None:
        """End the threads that have no token left for a step in which each live one samples."""
        if self.left <= 0:
            row.end_all("length")
            return
        while len(live := row.live) > self.left:
            row.end(live[-1], "length")


class BranchBudget(RowBudget):
    """``tokens`` for each branch, whatever others write, or up to a ``length`` that counts prompt and branch."""

    def __init__(self, tokens: int, length: int | None = None) -> None:
        super().__init__(1 << 62)
        self.tokens, self.length = tokens, length

    def spend(self, row: GrowingTree, thread: Thread) -> None:
        if thread.finish_reason is None and self._left(row, thread) <= 0:
            row.end(thread, "length")

    def bound(self, row: GrowingTree, lengths: Sequence[int]) -> list[int]:
        """Return the ``lengths`` of drafts, each cut to what its branch may write beyond the token that it does write."""
        return [
            min(length, max(0, self._left(row, thread) - 1)) for thread, length in zip(row.live, lengths, strict=True)
        ]

    def _left(self, row: GrowingTree, thread: Thread) -> int:
        if self.length is None:
            return self.tokens - (len(thread.path_ids) - thread.start)
        return self.length - len(row.slots(thread))

    def settle(self, row: GrowingTree) -> None:
        """Nothing: a branch ends as soon as it has no token left."""
