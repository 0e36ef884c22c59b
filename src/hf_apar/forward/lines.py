"""Which cache slots each path sees, kept from step to step: a step changes a few of them, however long the paths are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_apar.forward.cache import capacity_for
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
    """What a line of the buffer shows: the first ``length`` slots of ``path``; ``index`` is its place there."""

    path: Sequence[int]
    index: int = -1
    length: int = 0


class PathLines:
    """Lines of the additive mask, one for each path: 0 where it sees, the lowest number of ``dtype`` elsewhere.

    A path is a list of slots that is known by its identity. It grows in place, and whoever cuts it calls :meth:`cut` first.
    A slot that was released and is another path's now shows in that path's line alone: a living path loses no slot, and a
    line is emptied before it serves another path. Lines stand in the order in which their paths were asked for last, so
    that the next step's mask is mostly the buffer itself.

    Args:
        windows: how many positions each kind of layer sees, ``None`` for all (:func:`hf_apar.forward.cache.layer_windows`).
    """

    def __init__(self, windows: Mapping[str, int | None], dtype: torch.dtype, device: torch.device) -> None:
        self.windows, self._hidden = windows, torch.finfo(dtype).min
        self._shown = torch.full((len(windows), 1, 1), self._hidden, dtype=dtype, device=device)  # (kinds, lines, slots)
        self._lines: dict[int, Line] = {}  # by the identity of the path; the last line of the buffer is nobody's, and empty

    def masks(self, queries: Sequence[Query], slots: int) -> dict[str, Tensor]:
        """Return for each kind of layer which of ``slots`` slots each query sees, additive (queries, slots).

        They hold until the next call.

        >>> path, lines = [0, 2, 1], PathLines({"sliding_attention": 2}, torch.float32, torch.device("cpu"))
        >>> queries = [Query(7, path, length=3), Query(8, path, length=3, drafted=[4])]
        >>> (lines.masks(queries, slots=5)["sliding_attention"] == 0).int().tolist()
        [[0, 1, 1, 0, 0], [0, 1, 0, 0, 1]]
        """
        bases: dict[int, Query] = {}  # of each path the query that sees least of it: its line shows that much
        for query in queries:
            key = id(query.path)
            if query.length and (key not in bases or query.length < bases[key].length):
                bases[key] = query
        self._line_up(bases, slots)
        self._move([(self._lines[key], base.length) for key, base in bases.items()])
        nothing = Line((), self._shown.shape[1] - 1)
        lines = [self._lines[id(query.path)] if query.length else nothing for query in queries]
        beyond = [
            (place, query, line.length, query.seen)
            for place, (query, line) in enumerate(zip(queries, lines, strict=True))
            if query.seen > line.length
        ]
        masks, places = self._shown, [line.index for line in lines]
        if not beyond and places == [*range(len(places))]:
            masks = masks[:, : len(places)]
        else:  # of all columns, since a compiled model is compiled again for a mask with other strides
            masks = masks.index_select(1, torch.tensor(places, device=masks.device))
            self._change(masks, beyond)
        return dict(zip(self.windows, masks[:, :, :slots], strict=True))  # (kinds, queries, slots)

    def cut(self, path: Sequence[int], length: int) -> None:
        """Forget what lies beyond the first ``length`` slots of ``path``, which is about to lose it."""
        line = self._lines.get(id(path))
        if line is not None and line.length > length:
            self._move([(line, length)])

    def _line_up(self, bases: Mapping[int, Query], slots: int) -> None:
        """Have the lines of ``bases`` first, in that order, empty ones for new paths, and columns for ``slots`` slots."""
        kinds, count, columns = self._shown.shape
        first = [line.index if (line := self._lines.get(key)) else -1 for key in bases]
        if first == [*range(len(first))] and slots < columns:
            return
        asked = {key: self._lines.pop(key, Line(base.path)) for key, base in bases.items()}
        if len(asked) + len(self._lines) >= count:  # the others have ended, or get a new line when they are asked for again
            self._lines = {}
        self._lines = {**asked, **self._lines}
        more = max(count, 1 << len(self._lines).bit_length())
        if more > count or slots >= columns:  # never full, as the cache's buffers are not
            grown = self._shown.new_full((kinds, more, max(columns, capacity_for(slots + 1))), self._hidden)
            grown[:, :count, :columns] = self._shown
            self._shown = grown
        order = [line.index % more for line in self._lines.values()]  # -1 is the last line
        order += [more - 1] * (more - len(order))
        self._shown = self._shown.index_select(1, torch.tensor(order, device=self._shown.device))
        for index, line in enumerate(self._lines.values()):
            line.index = index

    def _move(self, lines: Sequence[tuple[Line, int]]) -> None:
        """Let each line show the given number of its path's slots."""
        changes = [(one, length) for one, length in lines if one.length != length]
        self._change(
            self._shown,
            [(one.index, Query(0, one.path, max(one.length, length)), one.length, length) for one, length in changes],
        )
        for line, length in lines:
            line.length = length

    def _change(self, masks: Tensor, changes: Sequence[tuple[int, Query, int, int]]) -> None:
        """Let each line ``(index, query, old, new)`` of (kinds, lines, slots) show ``new`` of the query's slots."""
        kinds, lines, slots, shown = list[int](), list[int](), list[int](), list[int]()
        for kind, window in enumerate(self.windows.values()):
            for index, query, old, new in changes:
                for positions, shows in zip(view_change(old, new, window), (0, -1), strict=True):
                    count = len(positions)
                    if count:
                        kinds += [kind] * count
                        lines += [index] * count
                        slots += query.slots(positions)
                        shown += [shows] * count
        if slots:
            *places, values = torch.tensor([kinds, lines, slots, shown], device=masks.device)
            masks[tuple(places)] = values.to(masks.dtype) * -self._hidden  # lowest number = -highest number
