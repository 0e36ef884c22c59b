"""A ``transformers`` cache that is written in place, by slot.

What depends on the cache interface of a transformers release stands here and nowhere else.
"""

from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from hf_apar.releases import cache_argument

SMALLEST = 256  # slots of a buffer


def power_of_two(slots: int) -> int:
    """Return the capacity for ``slots``: the smallest power of two that is enough, so that buffers have few shapes.

    >>> power_of_two(3), power_of_two(257)
    (256, 512)
    """
    return max(SMALLEST, 1 << (slots - 1).bit_length())


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer: buffers (batch, heads, capacity, head_dim), whose capacity is a power of two.

    Keys and values may differ in ``head_dim``. RoPE is applied before caching, so the order of slots is free.
    """

    is_sliding = False  # every layer keeps all slots; a sliding window is a mask of its own

    def __init__(self, cache: "TreeCache") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_zeros(*key_states.shape[:2], 0, key_states.shape[3])
        self.values = value_states.new_zeros(*value_states.shape[:2], 0, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self._written(self.keys, key_states), self._written(self.values, value_states)
        return self.keys[:, :, : self.cache.high_water], self.values[:, :, : self.cache.high_water]

    def _written(self, buffer: Tensor, states: Tensor) -> Tensor:
        capacity = buffer.shape[2]
        if self.cache.high_water > capacity:
            # zero-filled, since a masked NaN still poisons attention
            grown = buffer.new_zeros(*buffer.shape[:2], power_of_two(self.cache.high_water), buffer.shape[3])
            grown[:, :, :capacity] = buffer
            buffer = grown
        if self.cache.places is None:
            buffer[:, :, self.cache.high_water - states.shape[2] : self.cache.high_water] = states
            return buffer
        rows, slots = (index.to(states.device) for index in self.cache.places)
        buffer[rows, :, slots] = states.transpose(1, 2).flatten(0, 1)  # (queries, heads, dim)
        return buffer

    def keep_rows(self, rows: Tensor) -> None:
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[rows.to(self.keys.device)], self.values[rows.to(self.values.device)]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.high_water, 0

    def get_seq_length(self) -> int:
        return self.cache.past

    def get_max_length(self) -> int:
        return -1


class TreeCache(Cache):
    """The key-value cache of a batch of paragraph trees; the prefix that threads share stands in it once.

    Args:
        layers: the number of layers of the model.
        argument: the name under which the model's forward pass takes its cache.

    Attributes:
        places: rows and slots, both (queries,), that the next forward pass writes, row by row; ``None`` for the next slots
            of every row.
        high_water: attention reads the slots below it.
        past: the slots below it are older than the next forward pass; what the model takes for the sequence length.
    """

    def __init__(self, layers: int, argument: str) -> None:
        self.argument = argument
        self.places: tuple[LongTensor, LongTensor] | None = None
        self.high_water = self.past = 0
        self.tree_layers = [TreeLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self.tree_layers))

    def prepare(self, places: tuple[LongTensor, LongTensor] | None, high_water: int, width: int) -> None:
        """Say where the next forward pass of ``width`` tokens a row writes and how far it reads."""
        self.places, self.high_water, self.past = places, high_water, max(high_water - width, 0)

    def load(self, prefix: DynamicCache) -> None:
        """Copy the keys and values of ``prefix`` into the first slots of an empty cache."""
        length = prefix.get_seq_length()
        self.prepare(None, length, length)
        for layer, (keys, values) in zip(self.tree_layers, plain_layers(prefix), strict=True):
            layer.update(keys, values)

    def to_dynamic(self, slots: LongTensor, config: Any) -> DynamicCache:
        """Return the ``slots`` (batch, length) of each row as a cache of the kind that ``generate`` makes."""
        cache = DynamicCache(config=config.get_text_config(decoder=True))
        for index, layer in enumerate(self.tree_layers):
            assert layer.keys is not None and layer.values is not None
            cache.update(_at(layer.keys, slots), _at(layer.values, slots), index)
        return cache

    def keep_rows(self, rows: Tensor) -> None:
        """Keep the batch rows listed in ``rows`` (kept,), in that order."""
        for layer in self.tree_layers:
            layer.keep_rows(rows)

    @property
    def bytes(self) -> int:
        """The size of all buffers in bytes."""
        buffers = [buffer for layer in self.tree_layers for buffer in (layer.keys, layer.values) if buffer is not None]
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)


def _at(buffer: Tensor, slots: LongTensor) -> Tensor:
    """Return (batch, heads, length, dim) of ``buffer`` (batch, heads, capacity, dim), row by row at ``slots``."""
    rows = torch.arange(len(slots), device=buffer.device)[:, None]
    return buffer.transpose(1, 2)[rows, slots.to(buffer.device)].transpose(1, 2)


def plain_layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values of each layer of a filled cache of transformers."""
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr, misc]


def layer_windows(config: Any) -> dict[str, int | None]:
    """Return the window, in positions, of each kind of attention layer that a model's ``config`` names.

    ``None`` stands for a layer that sees all. The kinds are transformers' own ``layer_types``; a model that names none
    has one kind, with a window where ``sliding_window`` is set (Mistral, Starcoder2, Phi3).
    """
    sliding = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"]
    return {kind: sliding if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def new_tree_cache(model: PreTrainedModel) -> TreeCache:
    """Return an empty cache for ``model``."""
    layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    return TreeCache(layers, cache_argument(model))
