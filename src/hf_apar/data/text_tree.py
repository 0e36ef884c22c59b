"""Text threads: the paragraph tree of an answer before it is tokenised (paper, section 3.2)."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class TextThread:
    """A thread's own text in pieces; where another thread stands between them, this one forks.

    The text of a tree is the plain concatenation of its pieces in reading order.

    >>> answer = TextThread(("1. Bread:", TextThread((" it rises slowly.",)), "\\n2. Tea"))
    >>> answer.text
    '1. Bread: it rises slowly.\\n2. Tea'
    >>> answer.fork_count, answer.depth
    (1, 2)
    """

    pieces: tuple["str | TextThread", ...]

    @property
    def text(self) -> str:
        """The whole text of this thread and of those below it."""
        return "".join(piece if isinstance(piece, str) else piece.text for piece in self.pieces)

    @property
    def children(self) -> tuple["TextThread", ...]:
        """The threads that this one forks, in order."""
        return tuple(piece for piece in self.pieces if isinstance(piece, TextThread))

    @property
    def fork_count(self) -> int:
        """How often this thread and those below it fork."""
        return sum(1 + child.fork_count for child in self.children)

    @property
    def is_structured(self) -> bool:
        """Does this thread fork at all?"""
        return bool(self.children)

    @property
    def depth(self) -> int:
        """The levels of the tree; 1 where nothing forks, as ``AparConfig.max_depth`` counts."""
        return 1 + max((child.depth for child in self.children), default=0)

    def walk(self) -> Iterator["TextThread"]:
        """Yield this thread and those below it, in reading order."""
        yield self
        for child in self.children:
            yield from child.walk()
