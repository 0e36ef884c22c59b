"""When each thread of a tree would write: the steps of an answer that no model has forked yet."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hf_apar.data.extraction.text_tree import TextThread


@dataclass(frozen=True)
class Span:
    """A thread on the clock of its answer's steps.

    Attributes:
        depth: 0 for the root.
        title: the line of its parent that it forks after, "" for the root.
        text: its own, without that of the threads that it forks.
        start, end: steps before its first token, and up to the one that ends it; it writes a token in each between.
    """

    depth: int
    title: str
    text: str
    start: int
    end: int


def timeline(tree: TextThread, length: Callable[[str], int]) -> list[Span]:
    """Return the threads of ``tree`` in reading order with the steps that each takes, where none has to wait.

    A [Fork] takes its thread a step, and so does the EOS that ends each thread. The last end is the steps of the answer, and
    all that lie between starts and ends are the tokens that it samples.

    >>> tree = TextThread(("ab", TextThread(("cdef",)), "gh"))
    >>> [(one.start, one.end) for one in timeline(tree, len)]
    [(0, 6), (3, 8)]
    """
    return list(_spans(tree, length, "", 0, 0))


def _spans(thread: TextThread, length: Callable[[str], int], title: str, depth: int, start: int) -> Iterator[Span]:
    position, own, below = start, "", []
    for piece in thread.pieces:
        if isinstance(piece, str):
            position, own = position + length(piece), own + piece
        else:
            position += 1
            lines = own.split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            below += list(_spans(piece, length, last, depth + 1, position))
    yield Span(depth, title, own, start, position + 1)
    yield from below
