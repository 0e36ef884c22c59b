"""Attention for the steps of a tree: grouped heads without copies of the cache, and ragged batches without padding.

A model that uses sdpa or flex attention is switched to this function, under a name of its own, for the time of a decoding
run. Outside the loop's steps it is sdpa, so that a plain pass in another thread of the process meanwhile is what it was.
What depends on a transformers release's attention interface stands here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TREE_ATTENTION = "apar_sdpa"


@dataclass(frozen=True)
class Packing:
    """Where the queries of a ragged batch belong: query ``i`` of (1, queries) to ``rows[i]``, ``columns[i]``, integers."""

    rows: Tensor
    columns: Tensor
    batch: int
    width: int

    def to(self, device: torch.device) -> "Packing":
        """Return the same on ``device``, where a layer's weights are."""
        if self.rows.device == device:
            return self
        return replace(self, rows=self.rows.to(device), columns=self.columns.to(device))


@dataclass(frozen=True)
class Step:
    """One forward pass of the loop; ``masks`` keeps the masks repeated for the heads of a group, for all its layers."""

    packing: Packing | None
    masks: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def repeated(self, mask: Tensor, group: int) -> Tensor:
        """Return ``mask`` (batch, 1, width, slots) for the heads of a group, (batch, 1, group * width, slots)."""
        known = self.masks.get((id(mask), group))  # the mask is kept too: one that dies leaves its id to another
        if known is None:
            known = self.masks[id(mask), group] = (mask, mask.repeat(1, 1, group, 1))
        return known[1]


# set for the time of one forward pass, in the thread that runs it
_STEP: ContextVar[Step | None] = ContextVar("hf_apar_step", default=None)


@contextmanager
def tree_step(packing: Packing | None) -> Iterator[None]:
    """Let :func:`tree_attention` know that the forward pass within is a step of the loop."""
    token = _STEP.set(Step(packing))
    try:
        yield
    finally:
        _STEP.reset(token)


@dataclass
class _Switch:
    """A configuration that decoding runs have switched: what it said before, and how many runs there are."""

    before: str
    runs: int = 0


_SWITCHED: dict[int, _Switch] = {}  # by the configuration's id
_LOCK = Lock()


@contextmanager
def tree_attention_for(model: PreTrainedModel) -> Iterator[bool]:
    """Let ``model`` use :func:`tree_attention` meanwhile, if it uses sdpa; yield whether rows may be packed then.

    A model that the user compiled stays with plain sdpa: in a graph there is no looking up of the step. A model with flex
    attention runs on sdpa too, or on eager attention where it has no sdpa: each step has a mask of its
    own, for which flex attention compiles a kernel anew, and on CPUs a wrong one. Runs of several threads may overlap: the
    last one to end switches back.
    """
    config = model.config.get_text_config(decoder=True)
    with _LOCK:
        switch = _SWITCHED.setdefault(id(config), _Switch(config._attn_implementation))
        switch.runs += 1
        config._attn_implementation = meanwhile = _meanwhile(model, switch.before)
    try:
        yield meanwhile == TREE_ATTENTION
    finally:
        with _LOCK:
            switch.runs -= 1
            if not switch.runs:
                del _SWITCHED[id(config)]
                config._attn_implementation = switch.before


def _meanwhile(model: PreTrainedModel, implementation: str) -> str:
    """Return what ``model``, which uses ``implementation``, uses during a run."""
    if implementation == "flex_attention" and not model._supports_sdpa:
        return "eager"
    if implementation not in ("sdpa", "flex_attention") or not model._supports_attention_backend:
        return implementation
    if model._compiled_call_impl is not None or hasattr(model.forward, "_torchdynamo_orig_callable"):
        return "sdpa"
    AttentionInterface.register(TREE_ATTENTION, tree_attention)
    AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
    return TREE_ATTENTION


def tree_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend as sdpa does; ``query`` is (batch, heads, width, dim), or (1, heads, queries, dim) where the step is packed.

    ``key`` and ``value`` are (batch, groups, slots, dim), the result (batch, width, heads, dim) or (1, queries, heads, dim).
    """
    step = _STEP.get()
    if step is None:
        return _plain(module, query, key, value, attention_mask, **kwargs)
    packing = step.packing
    if packing is not None:
        packing = packing.to(query.device)
        padded = query.new_zeros(packing.batch, packing.width, *query.shape[1::2])  # (batch, width, heads, dim)
        padded[packing.rows, packing.columns] = query[0].transpose(0, 1)
        query = padded.transpose(1, 2)
    group = query.shape[1] // key.shape[1]
    special = any(kwargs.get(name) for name in ("dropout", "softcap")) or kwargs.get("position_bias") is not None
    if attention_mask is None or group == 1 or query.shape[2] == 1 or special:
        output, _ = _plain(module, query, key, value, attention_mask, **kwargs)
    else:
        output = _grouped(step, query, key, value, attention_mask, group, kwargs.get("scaling"))
    return (output if packing is None else output[packing.rows, packing.columns][None]), None


def _grouped(
    step: Step, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, group: int, scaling: float | None
) -> Tensor:
    """Attend with the heads that share keys as more queries of one head, so that no key is copied for them."""
    batch, heads, width, dim = query.shape
    repeated = step.repeated(mask, group)
    folded = query.reshape(batch, heads // group, group * width, dim)
    output = scaled_dot_product_attention(folded, key, value, attn_mask=repeated, scale=scaling)
    return output.reshape(batch, heads, width, value.shape[-1]).transpose(1, 2)


def _plain(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        # another thread's pass began with flex attention, before the run that switched the model
        from transformers.integrations.flex_attention import flex_attention_forward

        output, _ = flex_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output, None
