"""From the flat plan of a step to the tensors of its forward pass; a packed layout would replace this module alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor

from hf_apar.masks import additive, slots_mask


@dataclass(frozen=True)
class Query:
    """One token that a forward pass feeds.

    Attributes:
        token: its id.
        slot: the cache slot that its keys and values go to.
        sees: the slots of its path by position, its own one last; so its position is ``len(sees) - 1``.
    """

    token: int
    slot: int
    sees: Sequence[int]


@dataclass(frozen=True)
class StepInputs:
    """The tensors of one forward pass: ``input_ids``, ``position_ids`` and ``slots`` are (batch, width).

    ``attention_mask`` is ``None`` where every query sees every slot below ``high_water``, (batch, slots) for one query a
    row, the additive (batch, 1, width, slots) otherwise, or a ``dict`` of these by kind of layer.
    """

    input_ids: LongTensor
    position_ids: LongTensor
    slots: LongTensor
    attention_mask: Tensor | dict[str, Tensor] | None
    high_water: int


def lay_out(
    rows: Sequence[Sequence[Query]],
    scratch: Sequence[int],
    windows: Mapping[str, int | None],
    *,
    dtype: torch.dtype,
    device: torch.device,
    high_water: int = 0,
) -> StepInputs:
    """Lay out the queries of each row, padded on the right to the widest row.

    A padding query is token 0, goes to the row's free slot ``scratch[row]`` and sees that slot alone: a query that sees
    nothing would give NaN.

    Args:
        windows: how many positions each kind of layer sees, ``None`` for all (:func:`hf_apar.cache.layer_windows`).
        high_water: lower bound of the slots that attention reads.
    """
    width = max(len(queries) for queries in rows)
    padded = [
        [*queries, *[Query(0, free, [free])] * (width - len(queries))] for queries, free in zip(rows, scratch, strict=True)
    ]
    high_water = max([high_water, *(query.slot + 1 for queries in padded for query in queries)])
    masks = {
        kind: slots_mask(
            [[q.sees if window is None else q.sees[-window:] for q in row] for row in padded], width, high_water
        )
        for kind, window in windows.items()
    }  # each (batch, width, slots)
    return StepInputs(
        input_ids=_tensor([[query.token for query in row] for row in padded], device),
        position_ids=_tensor([[len(query.sees) - 1 for query in row] for row in padded], device),
        slots=_tensor([[query.slot for query in row] for row in padded], device),
        attention_mask=_attention_mask(masks, windows, dtype, device),
        high_water=high_water,
    )


def _attention_mask(
    masks: Mapping[str, Tensor], windows: Mapping[str, int | None], dtype: torch.dtype, device: torch.device
) -> Tensor | dict[str, Tensor] | None:
    (first, *others) = masks.values()
    if not others and set(windows.values()) == {None} and first.shape[1] == 1:
        return None if bool(first.all()) else first[:, 0].to(device)  # (batch, slots): what generate passes
    dense = {kind: additive(mask[:, None].to(device), dtype) for kind, mask in masks.items()}  # type: ignore[arg-type]
    return dense if others else next(iter(dense.values()))


def _tensor(values: Sequence[Sequence[int]], device: torch.device) -> LongTensor:
    return torch.tensor(values, dtype=torch.long, device=device)  # type: ignore[return-value]
