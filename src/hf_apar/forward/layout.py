"""From the flat plan of a step to the tensors of its forward pass, and from its logits back to the plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_apar.forward.attention import Packing, tree_step
from hf_apar.forward.cache import Places, TreeCache, layer_windows
from hf_apar.forward.devices import is_split
from hf_apar.forward.lines import PathLines, Query
from hf_apar.releases import cache_argument, takes


@dataclass(frozen=True)
class StepInputs:
    """The tensors of one forward pass; all indices are integers.

    Attributes:
        input_ids: (batch, width), or (1, queries) where ``packing`` is given.
        position_ids: of the same shape.
        targets: where each token goes in the cache; ``None`` where each row appends one, sees all slots, and has no window.
        attention_mask: ``None`` there, (batch, slots) for one query a row without windows, the additive
            (batch, 1, width, slots) otherwise, or a ``dict`` of these by kind of layer.
        kept: the columns whose logits are wanted, ``None`` for all.
        places: row and column of each wanted query among what the model returns, ``None`` for all that it returns.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Places | None
    attention_mask: Tensor | dict[str, Tensor] | None
    high_water: int
    packing: Packing | None
    kept: Tensor | None
    places: Places | None

    def run(self, model: PreTrainedModel, cache: TreeCache) -> Tensor:
        """Run ``model`` over the step; return its logits, (batch, columns, vocabulary)."""
        cache.prepare(self.targets, self.high_water, self.input_ids.shape[1])
        with tree_step(self.packing):
            logits: Tensor = model(
                input_ids=self.input_ids,
                position_ids=self.position_ids,
                attention_mask=self.attention_mask,
                use_cache=True,
                return_dict=True,
                **{cache_argument(model): cache},
                **({} if self.kept is None else {"logits_to_keep": self.kept}),
            ).logits
        return logits

    def in_plan_order(self, values: Tensor) -> Tensor:
        """Return what the model gave for each wanted query of the plan, row by row, (queries, ...), without padding."""
        return values.flatten(0, 1) if self.places is None else values[self.places]


class StepLayout:
    """Lays out the steps of one run of ``model``; what each path sees is kept from step to step.

    Args:
        windows: how many positions each kind of layer sees, ``None`` for all (:func:`hf_apar.forward.cache.layer_windows`).
        keeps: does the model take ``logits_to_keep``?
    """

    def __init__(self, windows: Mapping[str, int | None], *, dtype: torch.dtype, device: torch.device, keeps: bool) -> None:
        self.device, self.keeps = device, keeps
        self.lines = PathLines(windows, dtype, device)
        self.plain = list(windows.values()) == [None]  # no window hides anything

    @classmethod
    def of(cls, model: PreTrainedModel, device: torch.device) -> "StepLayout":
        """Return the layout for ``model``, which takes its inputs on ``device``."""
        windows = layer_windows(model.config.get_text_config(decoder=True))
        # a tensor of indices would have to follow the last layer to its device
        keeps = takes(type(model).forward, "logits_to_keep") and not is_split(model)
        return cls(windows, dtype=model.dtype, device=device, keeps=keeps)

    def lay_out(
        self, plan: Sequence[Sequence[Query]], free_slots: Sequence[int], *, high_water: int = 0, pack: bool = False
    ) -> StepInputs:
        """Lay out the queries of each row, side by side if ``pack``, else padded on the right to the widest row.

        A padding query is token 0, goes to ``free_slots[row]`` and sees that slot alone: one that sees nothing gives NaN.

        Args:
            high_water: lower bound of the slots that attention reads.
            pack: rows of different widths stand in one row of tokens, which takes
                :func:`hf_apar.forward.attention.tree_attention`; rows of one width are never packed.
        """
        width = max(len(queries) for queries in plan)
        pack = pack and any(len(queries) < width for queries in plan)
        grid = [
            [*queries, *[Query(0, (), 0, () if pack else (free,), wanted=False)] * (width - len(queries))]
            for queries, free in zip(plan, free_slots, strict=True)
        ]  # (batch, width)
        fed = [
            (query, row, column)
            for row, queries in enumerate(plan if pack else grid)
            for column, query in enumerate(queries)
        ]
        slots = [query.slot for query, *_ in fed]
        high_water = max(high_water, max(slots) + 1)
        table = [
            [query.token for query, *_ in fed], [query.seen - 1 for query, *_ in fed], slots,
            [row for _, row, _ in fed], [column for *_, column in fed],
        ]  # fmt: skip
        input_ids, position_ids, targets, rows, columns = _apart(torch.tensor(table, device=self.device))
        shape = (1, len(fed)) if pack else (len(plan), width)
        alone = width == 1 and not pack and self.plain
        # as plain decoding does, or with places and a mask: each form more is compiled once more where forward passes are
        bare = alone and all(query.slot + 1 == query.seen == high_water for (query,) in grid)
        cells = [(0, place) if pack else (row, column) for place, (_, row, column) in enumerate(fed)]
        kept, places = self._wanted([cell for cell, (query, *_) in zip(cells, fed, strict=True) if query.wanted], *shape)
        return StepInputs(
            input_ids=input_ids.view(shape),
            position_ids=position_ids.view(shape),
            targets=None if bare else (rows, targets),
            attention_mask=None if bare else self._attention_mask(grid, high_water, alone=alone),
            high_water=high_water,
            packing=Packing(rows, columns, len(plan), width) if pack else None,
            kept=kept,
            places=places,
        )

    def _wanted(self, cells: Sequence[tuple[int, int]], rows: int, width: int) -> tuple[Tensor | None, Places | None]:
        """Return the columns whose logits are wanted, and where among these each wanted cell stands; ``None`` for all."""
        columns = sorted({column for _, column in cells}) if self.keeps else [*range(width)]
        index = {column: place for place, column in enumerate(columns)}
        kept = None if len(columns) == width else torch.tensor(columns, device=self.device)
        if len(cells) == rows * len(columns):
            return kept, None
        places = torch.tensor([(row, index[column]) for row, column in cells], device=self.device)
        return kept, (places[:, 0], places[:, 1])

    def _attention_mask(
        self, grid: Sequence[Sequence[Query]], slots: int, *, alone: bool
    ) -> Tensor | dict[str, Tensor]:
        masks = self.lines.masks([query for row in grid for query in row], slots)
        if alone:
            return next(iter(masks.values())) == 0  # (batch, slots): what generate passes
        shaped = {kind: mask.view(len(grid), 1, len(grid[0]), slots) for kind, mask in masks.items()}
        return shaped if len(shaped) > 1 else next(iter(shaped.values()))


def _apart(table: Tensor) -> Sequence[Tensor]:
    """Return copies of the lines of ``table``: a compiled forward pass is compiled for each place within a larger tensor."""
    lines: Sequence[Tensor] = torch.unbind_copy(table)  # type: ignore[func-returns-value, assignment]
    return lines
