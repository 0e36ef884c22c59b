"""How many tokens may still be sampled: by all threads of a row together, or by each branch for itself."""

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
    """``tokens`` for each branch, whatever others write, or up to a ``length`` that counts prompt and branch."""

    def __init__(self, tokens: int, length: int | None = None) -> None:
        super().__init__(1 << 62)
        self.tokens, self.length = tokens, length

    def spend(self, row: GrowingTree, thread: Thread) -> None:
        if thread.finish_reason is not None:
            return
        written = len(thread.path_ids) - thread.start
        if written >= self.tokens if self.length is None else len(row.slots(thread)) >= self.length:
            row.end(thread, "length")

    def settle(self, row: GrowingTree) -> None:
        """Nothing: a branch ends as soon as it has no token left."""
