"""From the flat plan of a step to the tensors of its forward pass, and from its logits back to the plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor

from hf_apar.forward.attention import Packing, tree_step
from hf_apar.forward.cache import TreeCache, power_of_two
from hf_apar.forward.masks import additive, slots_mask


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
    """The tensors of one forward pass.

    ``input_ids`` and ``position_ids`` are (batch, width), or (1, queries) where ``packing`` is given; ``targets``, rows and
    slots, both (queries,), say where each token goes in the cache, ``None`` for the last slots below ``high_water``.
    ``attention_mask`` is ``None`` where every query sees all slots below ``high_water``, (batch, slots) for one query a row,
    the additive (batch, 1, width, slots) otherwise, or a ``dict`` of these by kind of layer.
    """

    input_ids: LongTensor
    position_ids: LongTensor
    targets: tuple[LongTensor, LongTensor] | None
    attention_mask: Tensor | dict[str, Tensor] | None
    high_water: int
    packing: Packing | None
    places: tuple[LongTensor, LongTensor]

    def run(self, model: Callable[..., Any], cache: TreeCache) -> Tensor:
        """Run ``model`` over the step; return its logits, of the shape of ``input_ids`` and the vocabulary."""
        cache.prepare(self.targets, self.high_water, self.input_ids.shape[1])
        with tree_step(self.packing):
            logits: Tensor = model(
                input_ids=self.input_ids,
                position_ids=self.position_ids,
                attention_mask=self.attention_mask,
                use_cache=True,
                return_dict=True,
                **{cache.argument: cache},
            ).logits
        return logits

    def in_plan_order(self, values: Tensor) -> Tensor:
        """Return what the model gave for each query of the plan, row by row, (queries, ...), without padding."""
        return values[0] if self.packing is not None else values[self.places]


def lay_out(
    plan: Sequence[Sequence[Query]],
    scratch: Sequence[int],
    windows: Mapping[str, int | None],
    *,
    dtype: torch.dtype,
    device: torch.device,
    high_water: int = 0,
    pack: bool = False,
    buckets: bool = False,
) -> StepInputs:
    """Lay out the queries of each row, side by side if ``pack``, else padded on the right to the widest row.

    A padding query is token 0, goes to the row's free slot ``scratch[row]`` and sees that slot alone: a query that sees
    nothing would give NaN.

    Args:
        windows: how many positions each kind of layer sees, ``None`` for all (:func:`hf_apar.forward.cache.layer_windows`).
        high_water: lower bound of the slots that attention reads.
        pack: rows of different widths stand in one row of tokens, which takes
            :func:`hf_apar.forward.attention.tree_attention`; rows of one width are never packed.
        buckets: round the width and ``high_water`` up to powers of two and mask densely, so that a compiled model meets
            few shapes.
    """
    width = max(len(queries) for queries in plan)
    width = 1 << (width - 1).bit_length() if buckets else width
    pack = pack and any(len(queries) < width for queries in plan)
    padded = [
        [*queries, *[Query(0, free, [free])] * (width - len(queries))] for queries, free in zip(plan, scratch, strict=True)
    ]
    fed = plan if pack else padded
    high_water = max([high_water, *(query.slot + 1 for queries in fed for query in queries)])
    high_water = power_of_two(high_water) if buckets else high_water
    plain = width == 1 and not pack and not buckets and list(windows.values()) == [None]
    full = all(len(query.sees) == high_water for queries in fed for query in queries)
    shape = (1, -1) if pack else (len(plan), width)
    slots = [query.slot for queries in fed for query in queries]
    appended = not pack and not buckets and slots == [*range(high_water - width, high_water)] * len(plan)
    rows = _tensor([row for row, queries in enumerate(fed) for _ in queries], device)
    places = [(row, column) for row, queries in enumerate(plan) for column in range(len(queries))]
    columns = _tensor([column for _, column in places], device)
    return StepInputs(
        input_ids=_tensor([query.token for queries in fed for query in queries], device).view(shape),  # type: ignore[arg-type]
        position_ids=_tensor([len(query.sees) - 1 for queries in fed for query in queries], device).view(shape),  # type: ignore[arg-type]
        targets=None if appended else (rows, _tensor(slots, device)),
        attention_mask=None if plain and full else _attention_mask(fed, windows, width, high_water, dtype, device, plain),
        high_water=high_water,
        packing=Packing(rows, columns, len(plan), width) if pack else None,
        places=(_tensor([row for row, _ in places], device), columns),
    )


def _attention_mask(
    fed: Sequence[Sequence[Query]],
    windows: Mapping[str, int | None],
    width: int,
    slots: int,
    dtype: torch.dtype,
    device: torch.device,
    plain: bool,
) -> Tensor | dict[str, Tensor]:
    masks = {}  # each (batch, width, slots)
    for kind, window in windows.items():
        seen = [[query.sees if window is None else query.sees[-window:] for query in queries] for queries in fed]
        masks[kind] = slots_mask(seen, width, slots)
    (first, *others) = masks.values()
    if plain:
        return first[:, 0].to(device)  # (batch, slots): what generate passes
    added = {kind: additive(mask[:, None].to(device), dtype) for kind, mask in masks.items()}
    return added if others else next(iter(added.values()))


def _tensor(values: Sequence[int], device: torch.device) -> LongTensor:
    return torch.tensor(values, dtype=torch.long, device=device)  # type: ignore[return-value]
