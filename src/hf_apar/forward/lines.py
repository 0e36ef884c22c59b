"""Which cache slots each path sees, kept from step to step: a step changes a few booleans, however long the paths are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_apar.forward.cache import power_of_two
from hf_apar.forward.masks import view_change


class Query(NamedTuple):
    """One token that a forward pass feeds.

    Attributes:
        token: its id.
        path: the slots of its thread's path, by position: the list itself and no copy, since it is known again by that.
        length: how many of ``path`` it sees.
        drafted: the slots that it sees beyond those; the last slot that it sees is its own, where its keys and values go.
        wanted: are its logits wanted?
    """

    token: int
    path: Sequence[int]
    length: int
    drafted: Sequence[int] = ()
    wanted: bool = True

    @property
    def seen(self) -> int:
        """The number of slots that it sees where no window hides any; its position is one less."""
        return self.length + len(self.drafted)

    @property
    def slot(self) -> int:
        """Its own slot."""
        return self.drafted[-1] if self.drafted else self.path[self.length - 1]

    def slots(self, positions: range) -> list[int]:
        """Return the slots at ``positions``.

        >>> Query(9, path=[0, 1, 4, 7], length=3, drafted=[2, 5]).slots(range(2, 5))
        [4, 2, 5]
        """
        first, last = positions.start - self.length, positions.stop - self.length
        return [*self.path[positions.start : min(positions.stop, self.length)], *self.drafted[max(first, 0) : max(last, 0)]]


@dataclass
class Line:
    """The line ``index`` of the buffer, which shows the first ``length`` slots of ``path``."""

    path: Sequence[int]
    index: int
    length: int = 0


class PathLines:
    """Lines of booleans, one for each path, that grow with it.

    A path is a list of slots that is known by its identity. It grows in place, and whoever cuts it calls :meth:`cut` first.
    A slot that was released and is another path's now shows in that path's line alone: a living path loses no slot, and a
    line is emptied before it serves another path.

    Args:
        windows: how many positions each kind of layer sees, ``None`` for all (:func:`hf_apar.forward.cache.layer_windows`).
    """

    def __init__(self, windows: Mapping[str, int | None], device: torch.device) -> None:
        self.windows = windows
        self._seen = torch.zeros(len(windows), 1, 1, dtype=torch.bool, device=device)  # (kinds, lines, slots)
        self._lines: dict[int, Line] = {}  # by the identity of the path, which its line keeps alive
        self._free: list[int] = []  # lines that are nobody's; the first one always is, and shows nothing

    def masks(self, queries: Sequence[Query], slots: int) -> dict[str, Tensor]:
        """Return for each kind of layer which of ``slots`` slots each query sees, booleans (queries, slots).

        >>> path, lines = [0, 2, 1], PathLines({"sliding_attention": 2}, torch.device("cpu"))
        >>> queries = [Query(7, path, length=3), Query(8, path, length=3, drafted=[4])]
        >>> lines.masks(queries, slots=5)["sliding_attention"].int().tolist()
        [[0, 1, 1, 0, 0], [0, 1, 0, 0, 1]]
        """
        bases: dict[int, Query] = {}  # of each path the query that sees least of it: its line shows that much
        for query in queries:
            key = id(query.path)
            if query.length and (key not in bases or query.length < bases[key].length):
                bases[key] = query
        self._make_room(bases, slots)
        self._move([(self._lines[key], base.length) for key, base in bases.items()])
        lines = [self._lines[id(query.path)] if query.length else _NOTHING for query in queries]
        chosen = torch.tensor([line.index for line in lines], device=self._seen.device)
        masks = self._seen[:, chosen, :slots]  # (kinds, queries, slots)
        beyond = enumerate(zip(queries, lines, strict=True))
        self._change(masks, [(place, query, line.length, query.seen) for place, (query, line) in beyond])
        return dict(zip(self.windows, masks, strict=True))

    def cut(self, path: Sequence[int], length: int) -> None:
        """Forget what lies beyond the first ``length`` slots of ``path``, which is about to lose it."""
        line = self._lines.get(id(path))
        if line is not None and line.length > length:
            self._move([(line, length)])

    def _make_room(self, bases: Mapping[int, Query], slots: int) -> None:
        """Have an empty line for each path that has none, and columns for ``slots`` slots."""
        new = [key for key in bases if key not in self._lines]
        if len(new) > len(self._free):  # other paths have ended, or get a new line when they are fed again
            self._free += [self._lines.pop(key).index for key in self._lines.keys() - bases.keys()]
        kinds, lines, columns = self._seen.shape
        missing = len(new) - len(self._free)
        if missing > 0 or slots > columns:
            more = lines if missing <= 0 else 1 << (lines + missing - 1).bit_length()
            grown = self._seen.new_zeros(kinds, more, max(columns, power_of_two(slots)))
            grown[:, :lines, :columns] = self._seen
            self._seen = grown
            self._free += range(lines, more)
        for key in new:
            line = self._lines[key] = Line(bases[key].path, self._free.pop())
            self._seen[:, line.index] = False

    def _move(self, lines: Sequence[tuple[Line, int]]) -> None:
        """Let each line show the given number of its path's slots."""
        self._change(
            self._seen,
            [(line.index, Query(0, line.path, max(line.length, length)), line.length, length) for line, length in lines],
        )
        for line, length in lines:
            line.length = length

    def _change(self, seen: Tensor, changes: Sequence[tuple[int, Query, int, int]]) -> None:
        """Let each line ``(index, query, old, new)`` of ``seen`` (kinds, lines, slots) show ``new`` of the query's slots."""
        kinds, lines, slots, shown = list[int](), list[int](), list[int](), list[int]()
        for kind, window in enumerate(self.windows.values()):
            for index, query, old, new in changes:
                if old == new:
                    continue
                for positions, shows in zip(view_change(old, new, window), (1, 0), strict=True):
                    count = len(positions)
                    if count:
                        kinds += [kind] * count
                        lines += [index] * count
                        slots += query.slots(positions)
                        shown += [shows] * count
        if slots:
            *places, values = torch.tensor([kinds, lines, slots, shown], device=seen.device)
            seen[tuple(places)] = values.bool()


_NOTHING = Line((), 0)
