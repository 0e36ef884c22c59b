"""Text threads: the paragraph tree of an answer before it is tokenised (paper, section 3.2)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, Union

from hf_apar.errors import DataError

JsonPieces: TypeAlias = list[Union[str, "JsonPieces"]]  # of a thread: text, or the pieces of a thread that forks there


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

    def critical_path(self, length: Callable[[str], int], start: int = 0) -> int:
        """Return the length of the longest path, forked threads being written beside their parent.

        >>> TextThread(("ab", TextThread(("cdef",)), "gh")).critical_path(len)
        6
        """
        position = end = start
        for piece in self.pieces:
            if isinstance(piece, str):
                position += length(piece)
            else:
                end = max(end, piece.critical_path(length, position))
        return max(position, end)

    def to_json(self) -> JsonPieces:
        """Return the thread as nested lists, for a JSON file.

        >>> TextThread(("1. Bread:", TextThread((" it rises slowly.",)))).to_json()
        ['1. Bread:', [' it rises slowly.']]
        """
        return [piece if isinstance(piece, str) else piece.to_json() for piece in self.pieces]

    @classmethod
    def from_json(cls, pieces: object) -> "TextThread":
        """Undo :meth:`to_json`.

        Raises:
            DataError: if ``pieces`` are not strings and lists of them.
        """
        if not isinstance(pieces, list) or not all(isinstance(piece, str | list) for piece in pieces):
            raise DataError(f"a tree is a list of strings and of such lists, got {str(pieces)[:80]}")
        return cls(tuple(piece if isinstance(piece, str) else cls.from_json(piece) for piece in pieces))
