"""The forward passes of one decoding run: the prompts, then step after step along the trees, over one cache."""

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from torch import Tensor
from transformers import PreTrainedModel

from hf_apar.forward.attention import tree_attention_for
from hf_apar.forward.cache import TreeCache
from hf_apar.forward.layout import StepInputs, StepLayout
from hf_apar.forward.lines import Query
from hf_apar.forward.prompts import Prompts
from hf_apar.tree.growth import GrowingTree


class Passes:
    """Runs ``model`` over the prompts and the steps of a batch; entered, the model attends along trees."""

    def __init__(self, model: PreTrainedModel, prompts: Prompts) -> None:
        self.model, self.prompts = model, prompts
        self.device = prompts.device(model)
        self.cache, self.layout = TreeCache(), StepLayout.of(model, self.device)
        self._inputs: StepInputs | None = None
        self._pack = False  # may rows be packed? known once entered
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._pack = self._stack.enter_context(tree_attention_for(self.model))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def prefill(self, chunk_size: int | None = None) -> Tensor:
        """Feed the prompts in chunks of ``chunk_size``; return the logits of their last tokens, (batch, vocabulary)."""
        return self.prompts.prefill(self.model, self.cache, chunk_size)

    def step(self, rows: Sequence[GrowingTree], queries: Sequence[Sequence[Query]]) -> Tensor:
        """Feed the queries of each row; return the logits of those that want them, row by row, (queries, vocabulary)."""
        self._inputs = self.layout.lay_out(
            queries,
            [row.free_slot for row in rows],
            high_water=max(row.pool.high_water for row in rows),
            pack=self._pack,
        )
        return self.in_order(self._inputs.run(self.model, self.cache))

    def in_order(self, values: Tensor) -> Tensor:
        """Pick out of (batch, width, ...) what the last pass gave for each query that wants it: (queries, ...)."""
        if self._inputs is None:
            return values[:, -1]  # the prompts' last tokens
        return self._inputs.in_plan_order(values)
