"""A ``DynamicCache`` that is written in place, by slot.

What depends on the cache interface of a transformers release stands here.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from hf_apar.errors import ConfigurationError

SMALLEST = 256  # slots of a buffer that grows

Places = tuple[Tensor, Tensor]
"""Rows and slots, both integers (queries,), that a forward pass writes, row by row."""


def capacity_for(slots: int) -> int:
    """Return the capacity for ``slots``: as few as 256, and hardly more than an eighth too many, so that it grows seldom.

    >>> capacity_for(3), capacity_for(257), capacity_for(4097), capacity_for(33_000)
    (256, 512, 4608, 36864)
    """
    step = max(SMALLEST, 1 << (slots - 1).bit_length() >> 4)
    return -(-slots // step) * step


class TreeLayer(DynamicLayer):
    """Keys and values of one layer: views (batch, heads, length, head_dim) of buffers that have room for more.

    Keys and values may differ in ``head_dim``. RoPE is applied before caching, so the order of slots is free. A sliding
    window is a mask of its own: the layer keeps all slots.

    Attributes:
        length: how many slots are held.
        by_slot: do they hold the threads of a tree, in no order that a sequence has?
    """

    def __init__(self) -> None:
        self.length = 0
        self.by_slot = False
        self._step: tuple[Places | None, int] | None = None  # where the next update writes, and how far it reads
        super().__init__()  # type: ignore[no-untyped-call]

    # Methods of transformers that rearrange a layer set these two: what they set is the buffer from then on.

    @property
    def keys(self) -> Tensor | None:
        return None if self._keys is None else self._keys[:, :, : self.length]

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._keys, self.length = states, 0 if states is None else states.shape[2]

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._values[:, :, : self.length]

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._values, self.length = states, 0 if states is None else states.shape[2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device  # read by offloading
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def prepare(self, places: Places | None, high_water: int, width: int) -> None:
        """Do what :meth:`TreeCache.prepare` says."""
        self.by_slot, self.length, self._step = True, max(high_water - width, 0), (places, high_water)
        if self._keys is not None and self._values is not None and high_water >= self._keys.shape[2]:
            # here, and before they are full: a compiled forward pass would be compiled for each capacity, and for full ones
            self._keys, self._values = _grown(self._keys, high_water + 1), _grown(self._values, high_water + 1)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._step is None:
            self._check_order("continued plainly")
            places, end = None, self.length + key_states.shape[2]
        else:
            (places, end), self._step = self._step, None
        assert self._keys is not None and self._values is not None
        self._keys = _written(self._keys, key_states, places, end)
        self._values = _written(self._values, value_states, places, end)
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        # by hand: transformers before 5.18 zeroes a layer here and keeps its length
        self.keys = self.values = self._step = None
        self.is_initialized = self.by_slot = False

    def crop(self, tokens_to_remove: int) -> None:
        self._check_order("cropped")
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes how many tokens to remove as a negative number, got {tokens_to_remove}")
        self.length = max(self.length + tokens_to_remove, 0)
        if self._keys is not None and self._values is not None:  # there is room now, so that the next update writes in place
            self._keys, self._values = _writable(self._keys), _writable(self._values)

    def put_in_order(self, slots: Tensor) -> None:
        """Do what :meth:`TreeCache.put_in_order` says."""
        assert self._keys is not None and self._values is not None
        self._keys, self._values = _at(self._keys, slots), _at(self._values, slots)
        self.by_slot, self.length = False, slots.shape[1]

    def _check_order(self, done: str) -> None:
        if self.by_slot:
            raise ConfigurationError(
                f"a cache that holds the threads of an answer, slot by slot, cannot be {done}; take the one that generate "
                "returns where nothing forked"
            )


class TreeCache(DynamicCache):
    """The key-value cache of a batch of paragraph trees; the prefix that threads share stands in it once.

    It stands wherever a ``DynamicCache`` does. A forward pass that :meth:`prepare` announced is a step of the decoding loop
    and writes by slot, in place, into buffers that :meth:`prepare` has grown; any other appends as a ``DynamicCache`` does,
    where there is room in place. So nothing can be trained through it.
    """

    def __init__(self) -> None:
        Cache.__init__(self, layer_class_to_replicate=TreeLayer)

    def prepare(self, places: Places | None, high_water: int, width: int) -> None:
        """Say what the next forward pass, of ``width`` tokens a row, writes: to slots of ``places``, and reads.

        Args:
            places: ``None`` for the last ``width`` slots below ``high_water`` of every row.
            high_water: attention reads the slots below it.
        """
        for layer in self.layers:
            assert isinstance(layer, TreeLayer)
            layer.prepare(places, high_water, width)

    def put_in_order(self, slots: Tensor) -> None:
        """Keep ``slots`` (batch, length) of each row, in that order: the cache of plain sequences, that may be cropped."""
        for layer in self.layers:
            assert isinstance(layer, TreeLayer)
            layer.put_in_order(slots)


def _grown(buffer: Tensor, slots: int) -> Tensor:
    """Return a buffer with room for ``slots`` that begins with ``buffer`` (batch, heads, capacity, dim)."""
    with torch.inference_mode(False):  # what inference mode makes can be written nowhere else
        # zero-filled, since a masked NaN still poisons attention
        grown = buffer.new_zeros(*buffer.shape[:2], capacity_for(slots), buffer.shape[3])
    grown[:, :, : buffer.shape[2]] = buffer
    return grown


def _written(buffer: Tensor, states: Tensor, places: Places | None, end: int) -> Tensor:
    """Write ``states`` (batch, heads, width, dim) into the slots below ``end``, or to ``places``; return the buffer."""
    start = end - states.shape[2]
    if places is not None:
        rows, slots = places[0].to(states.device), places[1].to(states.device)
        buffer[rows, :, slots] = states.transpose(1, 2).flatten(0, 1).to(buffer.dtype)  # (queries, heads, dim)
    elif end > buffer.shape[2]:  # of a prompt, or of plain decoding: what DynamicCache does
        return torch.cat([buffer[:, :, :start], states], dim=2)
    else:
        buffer[:, :, start:end] = states
    return buffer


def _at(buffer: Tensor, slots: Tensor) -> Tensor:
    """Return ``buffer`` (batch, heads, capacity, dim) with ``slots`` (batch, length) of each row first, in that order."""
    if bool((slots == torch.arange(slots.shape[1], device=slots.device)).all()):  # they stand first already
        return _writable(buffer)
    rows = torch.arange(len(slots), device=buffer.device)[:, None]
    return _writable(buffer.transpose(1, 2)[rows, slots.to(buffer.device)].transpose(1, 2))


def _writable(buffer: Tensor) -> Tensor:
    """Return ``buffer`` so that it can be written outside inference mode too; no compiled forward pass could ask."""
    with torch.inference_mode(False):
        return buffer.clone() if buffer.is_inference() else buffer


def layer_windows(config: Any) -> dict[str, int | None]:
    """Return the window, in positions, of each kind of attention layer that a model's ``config`` names.

    ``None`` stands for a layer that sees all. The kinds are transformers' own ``layer_types``; a model that names none
    has one kind, with a window where ``sliding_window`` is set (Mistral, Starcoder2, Phi3).
    """
    sliding = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"]
    return {kind: sliding if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}
