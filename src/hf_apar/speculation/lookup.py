"""Prompt lookup: what followed the same words before, in the prompt or in any thread, may follow them again.

Source: Saxena, prompt lookup decoding; ``generate(prompt_lookup_num_tokens=...)`` of transformers for one sequence. A
thread's drafts may come from threads that it does not see, since a draft is only a guess: nothing leaks.
"""

from collections.abc import Sequence

from hf_apar.errors import ConfigurationError
from hf_apar.protocol import ThreadView
from hf_apar.speculation.proposer import Draft, Proposer, RowView, Run


class PromptLookup(Proposer):
    """Proposes what followed the last occurrence of a thread's last tokens.

    Args:
        num_tokens: the longest draft.
        schedule: see :class:`~hf_apar.speculation.proposer.Proposer`.
        max_ngram: how many last tokens are looked up; fewer if those occur nowhere, for one guess alone.
    """

    schedule = "heuristic"

    def __init__(self, num_tokens: int, *, max_ngram: int = 2, schedule: str = schedule) -> None:
        if num_tokens < 1 or max_ngram < 1:
            raise ConfigurationError(f"num_tokens is {num_tokens} and max_ngram {max_ngram}; both must be 1 or more")
        self.longest, self.max_ngram, self.schedule = num_tokens, max_ngram, schedule
        self._indices: dict[int, NgramIndex] = {}

    def start(self, run: Run) -> None:
        self._indices = {}

    def propose(self, rows: Sequence[RowView], limits: Sequence[Sequence[int]]) -> Sequence[Sequence[Draft]]:
        return [self._of_row(number, row, lengths) for number, (row, lengths) in enumerate(zip(rows, limits, strict=True))]

    def _of_row(self, number: int, row: RowView, lengths: Sequence[int]) -> list[Draft]:
        index = self._indices.setdefault(number, NgramIndex(self.max_ngram))
        index.update(row.threads)
        return [Draft(index.following(one.path_ids, length)) for one, length in zip(row.live, lengths, strict=True)]


class NgramIndex:
    """Where each run of tokens was last followed by something, over the paths of all threads of a row.

    >>> index = NgramIndex(2)
    >>> from hf_apar.tree.threads import Thread
    >>> index.update([Thread(0, None, 0, 1, [5, 6, 7, 8])])
    >>> index.following([1, 5, 6], 2), index.following([9, 6], 2), index.following([8], 2)
    ([7, 8], [7], [])
    """

    def __init__(self, max_ngram: int) -> None:
        self.max_ngram = max_ngram
        self._found: dict[tuple[int, ...], tuple[Sequence[int], int]] = {}  # a run -> a path that holds it, and what is next
        self._read: dict[int, int] = {}  # thread -> how much of its path has been read

    def update(self, threads: Sequence[ThreadView]) -> None:
        """Read what the threads have written since the last call; a child's inherited path is its parent's business."""
        for thread in threads:
            path = thread.path_ids
            first = max(self._read.get(thread.index, 1), 1 if thread.parent is None else thread.start)
            for following in range(first, len(path)):
                for length in range(1, min(self.max_ngram, following) + 1):
                    self._found[tuple(path[following - length : following])] = (path, following)
            self._read[thread.index] = max(first, len(path))

    def following(self, path: Sequence[int], count: int) -> Sequence[int]:
        """Return up to ``count`` tokens that followed what ``path`` ends with, one if no run as long as can be occurred."""
        for length in range(min(self.max_ngram, len(path)), 0, -1):
            if (found := self._found.get(tuple(path[-length:]))) is not None:
                other, following = found
                return other[following : following + (count if length == self.max_ngram else min(count, 1))]
        return []
