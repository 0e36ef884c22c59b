"""How many tokens may still be sampled: by all threads of a row together, or by each branch for itself."""

from collections.abc import Callable

from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import Thread


class RowBudget:
    """``tokens`` for all threads of a row together; the last ones go to threads in reading order."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens

    def spend(self, row: GrowingTree, thread: Thread) -> None:
        """Let ``thread`` of ``row`` have written one more token."""
        self.left -= 1

    def settle(self, row: GrowingTree) -> None:
        """End the threads that have no token left for a step in which each live one samples."""
        if not self.left:
            row.end_all("length")
        while len(live := row.live) > self.left:
            row.end(live[-1], "length")


class BranchBudget(RowBudget):
    """``room(thread)`` says how many tokens a thread may still sample, whatever others do."""

    def __init__(self, room: Callable[[Thread], int]) -> None:
        super().__init__(1 << 62)
        self.room = room

    def spend(self, row: GrowingTree, thread: Thread) -> None:
        if thread.finish_reason is None and self.room(thread) < 1:
            row.end(thread, "length")

    def settle(self, row: GrowingTree) -> None:
        """Nothing: a branch ends as soon as it has no token left."""
