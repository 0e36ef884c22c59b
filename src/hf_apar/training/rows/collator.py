"""Packs of trees, and batches of packs with the mask that the model's attention takes."""

import logging
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_apar.errors import ConfigurationError, DataError
from hf_apar.forward.masks import additive, visible_until_mask
from hf_apar.training.rows.block_mask import TreeBlockMask
from hf_apar.training.rows.features import IGNORED, TreeFeatures

logger = logging.getLogger(__name__)

COLUMNS = ("input_ids", "position_ids", "visible_until", "shift_labels")


_MASKS: dict[str | None, Literal["dense", "flex"]] = {
    None: "dense", "sdpa": "dense", "eager": "dense", "flex_attention": "flex",
}  # fmt: skip


def mask_mode(attention: str | None, *, backward: bool = True) -> Literal["dense", "flex"]:
    """Return the ``mode`` of :class:`DataCollatorForApar` for an implementation of attention, ``None`` for the usual one.

    Args:
        backward: is the model to be trained, or only read with?

    Raises:
        ConfigurationError: if it takes no tree for a mask, or cannot be trained on this machine.
    """
    if attention not in _MASKS:
        raise ConfigurationError(
            f"attn_implementation is {attention}, which takes no tree for a mask; give sdpa, eager or flex_attention, or "
            'train paths with a trainer of your own (DataCollatorForApar(mode="paths"))'
        )
    if backward and attention == "flex_attention" and not torch.cuda.is_available():
        raise ConfigurationError("PyTorch has no backward pass of flex_attention on a CPU; give sdpa or eager")
    return _MASKS[attention]


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
    row.fork_banned.extend(offset + place for place in tree.fork_banned)
    row.children.extend(offset + place for place in tree.children)


def path_rows(row: Mapping[str, Sequence[int]]) -> list[dict[str, list[int]]]:
    """Cut a row of trees into one row a path, from the root to a last token: plain sequences for plain causal attention.

    A token that several paths share has its target in the first of them alone, so that the targets are those of ``row``.
    This is how the paper's reference trains (section 3.2); packed rows compute a shared token once.

    >>> [path["input_ids"] for path in path_rows({
    ...     "input_ids": [5, 8, 9, 6, 7], "position_ids": [0, 1, 2, 3, 2], "visible_until": [5, 5, 4, 4, 5],
    ...     "shift_labels": [8, 7, 6, 2, 2]})]
    [[5, 8, 9, 6], [5, 8, 7]]
    """
    until = row["visible_until"]
    paths: list[dict[str, list[int]]] = []
    counted: set[int] = set()
    for last in (index for index, end in enumerate(until) if end == index + 1):  # no later token sees these
        seen = [index for index in range(last + 1) if until[index] > last]
        paths.append({name: [row[name][index] for index in seen] for name in ("input_ids", "position_ids")})
        paths[-1]["visible_until"] = [len(seen)] * len(seen)
        paths[-1]["shift_labels"] = [IGNORED if index in counted else row["shift_labels"][index] for index in seen]
        new, places = set(seen) - counted, row.get("fork_banned", ())
        paths[-1]["fork_banned"] = [bisect_left(seen, place) for place in places if place in new]
        counted.update(seen)
    return paths


@dataclass(frozen=True)
class DataCollatorForApar:
    """Makes a batch of rows of trees (:meth:`TreeFeatures.to_dict`) for a causal LM and the stock ``Trainer``.

    The batch holds ``input_ids``, ``position_ids``, ``labels`` and ``shift_labels`` (batch, length), and an
    ``attention_mask``. The target of a place stands there in ``shift_labels``, and at the next place in ``labels``, where
    whatever shifts its labels looks for it: label smoothing, a ``compute_loss_func``, losses of TRL. So that the last
    target of a row has a next place, the length is one more than the longest row's. The model's own loss asks for ``labels``
    and takes its targets from ``shift_labels``. For metrics, whose predictions are not shifted, set
    ``label_names=["shift_labels"]``.

    Where a row has ``fork_banned``, so has the batch, as booleans (batch, length): the loss of
    :class:`~hf_apar.training.lora.AdapterTrainer` leaves [Fork] out of the choice there. Other trainers would pass over it
    in silence, so such a row is an error unless ``fork_banned`` says that the trainer knows it.

    Attributes:
        pad_token_id: fills shorter rows; such a token sees itself alone.
        max_length: a longer row is an error; ``None`` for any length.
        dtype: of the dense mask: that of the attention's inputs.
        mode: ``"dense"``, an additive mask (batch, 1, length, length) for eager and sdpa attention; ``"flex"``, a
            :class:`~hf_apar.training.rows.block_mask.TreeBlockMask` for ``attn_implementation="flex_attention"``;
            ``"paths"``, the rows of :func:`path_rows`, more and shorter ones, and a plain mask (paths, length) of ones
            for tokens and zeros for padding: any attention takes it, flash attention too.
        pad_to_multiple_of: the batch's length is a multiple of it; ``None`` for any length.
        fork_banned: the trainer is an ``AdapterTrainer``.
    """

    pad_token_id: int
    max_length: int | None = None
    dtype: torch.dtype = torch.float32
    mode: Literal["dense", "flex", "paths"] = "dense"
    pad_to_multiple_of: int | None = None
    fork_banned: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("dense", "flex", "paths"):
            raise ConfigurationError(f"mode is {self.mode!r}; it must be 'dense', 'flex' or 'paths'")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ConfigurationError(f"pad_to_multiple_of is {self.pad_to_multiple_of}; it must be 1 or more")

    def __call__(self, features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Pad and stack ``features``.

        Raises:
            DataError: if a column is missing, lengths differ, a row is longer than ``max_length``, or has ``fork_banned``
                places without leave.
        """
        for row in features:
            self._check(row)
        rows = [path for row in features for path in path_rows(row)] if self.mode == "paths" else features
        lengths = [len(row["input_ids"]) for row in rows]
        multiple = self.pad_to_multiple_of or 1
        length = -(-(max(lengths) + 1) // multiple) * multiple
        shift_labels = _stack(rows, "shift_labels", [IGNORED] * length)
        banned = [(place, token) for place, row in enumerate(rows) for token in row.get("fork_banned", ())]
        return {
            "input_ids": _stack(rows, "input_ids", [self.pad_token_id] * length),
            "position_ids": _stack(rows, "position_ids", [0] * length),
            "attention_mask": self._mask(_stack(rows, "visible_until", range(1, length + 1)), torch.tensor(lengths)),
            "labels": shift_labels.roll(1, dims=1),  # the last place is padding and has no target
            "shift_labels": shift_labels,
            **({"fork_banned": _marked(shift_labels, banned)} if banned else {}),
        }

    def _mask(self, visible_until: Tensor, lengths: Tensor) -> Tensor:
        if self.mode == "dense":
            return additive(visible_until_mask(visible_until), self.dtype).unsqueeze(1)  # (batch, 1, length, length)
        if self.mode == "flex":
            return cast(Tensor, TreeBlockMask(visible_until))  # what models take in a mask's place
        return (torch.arange(visible_until.shape[1]) < lengths[:, None]).long()  # (paths, length)

    def _check(self, row: Mapping[str, Sequence[int]]) -> None:
        if missing := [name for name in COLUMNS if name not in row]:
            raise DataError(
                f"a row has no {', '.join(missing)}; make rows with TreeFeatures.to_dict and train with "
                "remove_unused_columns=False"
            )
        lengths = {name: len(row[name]) for name in COLUMNS}
        if len(set(lengths.values())) > 1:
            raise DataError(f"the columns of a row differ in length: {lengths}")
        targets = row["shift_labels"]
        if any(not 0 <= place < len(targets) or targets[place] == IGNORED for place in row.get("fork_banned", ())):
            raise DataError(f"fork_banned holds {row['fork_banned']}; each must be a place of the row that has a target")
        if row.get("fork_banned") and not self.fork_banned:
            raise DataError(
                "a row has fork_banned places, which AdapterTrainer alone honours; with it, pass "
                "DataCollatorForApar(fork_banned=True), with another trainer leave such rows out: "
                "Selection(unforked_share=0)"
            )
        if self.max_length is not None and lengths["input_ids"] > self.max_length:
            raise DataError(f"a row has {lengths['input_ids']} tokens, at most {self.max_length} fit; pack with that limit")


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return what shorter rows are filled with: EOS where the tokenizer has no token for it."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _marked(like: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    """Return booleans of the shape of ``like``, true at ``places``."""
    marks = torch.zeros_like(like, dtype=torch.bool)
    marks[tuple(zip(*places, strict=True))] = True
    return marks


def _stack(features: Sequence[Mapping[str, Sequence[int]]], name: str, padding: Sequence[int]) -> Tensor:
    """Stack one column as (batch, length), each row filled from its end on with that part of ``padding``."""
    rows = [[*row[name], *padding[len(row[name]) :]] for row in features]
    return torch.tensor(rows, dtype=torch.long)
