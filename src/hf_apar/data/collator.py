"""Packs of trees, and batches of packs with the dense mask that eager and sdpa attention take."""

import logging
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor

from hf_apar.data.features import IGNORED, TreeFeatures
from hf_apar.errors import DataError
from hf_apar.masks import additive, visible_until_mask

logger = logging.getLogger(__name__)

COLUMNS = ("input_ids", "position_ids", "visible_until", "shift_labels")


def pack(features: Sequence[TreeFeatures], max_length: int) -> list[TreeFeatures]:
    """Put trees side by side into rows of at most ``max_length`` tokens, each into the fullest row that has room for it.

    Trees in one row do not see each other. A longer tree is left out; how many were is logged.

    >>> tree = TreeFeatures([5, 6], [0, 1], [2, 2], [-100, 7])
    >>> pack([tree, tree], 4)[0].visible_until
    [2, 2, 4, 4]
    """
    rows: list[TreeFeatures] = []
    rooms: list[tuple[int, int]] = []  # (tokens that still fit, row), sorted
    fitting = [tree for tree in features if len(tree) <= max_length]
    if len(fitting) < len(features):
        logger.warning("%d of %d trees left out, longer than %d", len(features) - len(fitting), len(features), max_length)
    for tree in fitting:
        place = bisect_left(rooms, (len(tree), 0))
        if place == len(rooms):
            rooms.append((max_length, len(rows)))
            rows.append(TreeFeatures())
        room, row = rooms.pop(place)
        insort(rooms, (room - len(tree), row))
        _append(rows[row], tree)
    return rows


def _append(row: TreeFeatures, tree: TreeFeatures) -> None:
    offset = len(row)
    row.input_ids.extend(tree.input_ids)
    row.position_ids.extend(tree.position_ids)
    row.visible_until.extend(offset + until for until in tree.visible_until)
    row.shift_labels.extend(tree.shift_labels)


@dataclass(frozen=True)
class DataCollatorForApar:
    """Makes a batch of rows of trees (:meth:`TreeFeatures.to_dict`) for a causal LM and the stock ``Trainer``.

    The batch holds ``input_ids``, ``position_ids``, ``labels`` and ``shift_labels`` (batch, length), and an additive
    ``attention_mask`` (batch, 1, length, length). ``labels`` repeats ``shift_labels``: transformers asks for ``labels``
    to compute a loss at all and takes its targets from ``shift_labels``, and either way of counting them agrees, since
    the first token of a row, a prompt's, has no target.

    Attributes:
        pad_token_id: fills shorter rows; such a token sees itself alone.
        max_length: a longer row is an error; ``None`` for any length.
        dtype: of the mask: that of the attention's inputs.
    """

    pad_token_id: int
    max_length: int | None = None
    dtype: torch.dtype = torch.float32

    def __call__(self, features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Pad and stack ``features``.

        Raises:
            DataError: if a column is missing, lengths differ, or a row is longer than ``max_length``.
        """
        for row in features:
            self._check(row)
        length = max(len(row["input_ids"]) for row in features)
        shift_labels = _stack(features, "shift_labels", [IGNORED] * length)
        visible_until = _stack(features, "visible_until", range(1, length + 1))
        return {
            "input_ids": _stack(features, "input_ids", [self.pad_token_id] * length),
            "position_ids": _stack(features, "position_ids", [0] * length),
            "attention_mask": additive(visible_until_mask(visible_until), self.dtype).unsqueeze(1),  # (batch, 1, l, l)
            "labels": shift_labels.clone(),
            "shift_labels": shift_labels,
        }

    def _check(self, row: Mapping[str, Sequence[int]]) -> None:
        if missing := [name for name in COLUMNS if name not in row]:
            raise DataError(
                f"a row has no {', '.join(missing)}; make rows with TreeFeatures.to_dict and train with "
                "remove_unused_columns=False"
            )
        lengths = {name: len(row[name]) for name in COLUMNS}
        if len(set(lengths.values())) > 1:
            raise DataError(f"the columns of a row differ in length: {lengths}")
        if self.max_length is not None and lengths["input_ids"] > self.max_length:
            raise DataError(f"a row has {lengths['input_ids']} tokens, at most {self.max_length} fit; pack with that limit")


def _stack(features: Sequence[Mapping[str, Sequence[int]]], name: str, padding: Sequence[int]) -> LongTensor:
    """Stack one column as (batch, length), each row filled from its end on with that part of ``padding``."""
    rows = [[*row[name], *padding[len(row[name]) :]] for row in features]
    return torch.tensor(rows, dtype=torch.long)  # type: ignore[return-value]
