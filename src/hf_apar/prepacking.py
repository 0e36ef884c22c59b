"""Weights laid out once for the narrow matrix products of a step on a CPU.

In float32 a linear layer is a product of MKL, which first copies the weight into the layout that its kernel reads: in every
call, and for the few rows of a step that takes longer than the product. MKL also takes a weight that was laid out before
(``cblas_sgemm_pack``), by two operators of PyTorch that compiled models with frozen weights are made of; here they are
called without compiling.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

ModelT = TypeVar("ModelT", bound=nn.Module)

ROWS = range(4, 49)
"""Rows of a product that gain: fewer are read straight from the weight, and for more a copy is soon paid for."""
TYPICAL = 8  # rows, by which MKL shares the work out to its threads; with others it computes the same, as the tests see

logger = logging.getLogger(__name__)


@contextmanager
def prepacked(model: ModelT) -> Iterator[ModelT]:
    """Decode faster on a CPU in float32: within the block ``model`` has the weights of its linear layers prepacked.

    A step of eight threads then takes hardly longer than one of a single thread. It serves products of 4 to 48 rows where no
    gradient is wanted, as in ``generate``, and needs a PyTorch with MKL; where it can do nothing it says so
    in the log, and the model decodes as ever. The copies are made in the first step that is wide, and the weights
    are in memory twice until the block ends. A weight that is changed or moved within the block is read as it is then; only
    a change through ``weight.data`` or a shared buffer, as where PEFT merges adapters, goes unseen: make it before.

    Example::

        with hf_apar.prepacked(model):
            model.generate(**inputs, apar=True)
    """
    layers = prepackable(model)
    if not layers and not is_prepacked(model):
        logger.warning(
            "%s decodes as ever: it has no linear layers to prepack, with float32 weights on a CPU in a PyTorch with MKL",
            type(model).__name__,
        )
    with ExitStack() as stack:
        for layer in layers:
            vars(layer)["forward"] = forward = _Prepacked(layer)  # of this object: others share its class
            stack.callback(forward.end)
        yield model


@contextmanager
def prepacked_if_possible(model: nn.Module) -> Iterator[None]:
    """Do as :func:`prepacked` does, where it is of use and the copies take no more than a quarter of the free memory."""
    layers = prepackable(model)
    if layers and 4 * sum(layer.weight.nbytes for layer in layers) <= _free_memory():
        with prepacked(model):
            yield
    else:
        yield


def is_prepacked(model: nn.Module) -> bool:
    """Is ``model`` within a block of :func:`prepacked`?"""
    return any(isinstance(vars(layer).get("forward"), _Prepacked) for layer in model.modules())


def prepackable(model: nn.Module) -> list[nn.Linear]:
    """Return the layers of ``model`` that :func:`prepacked` serves: ``nn.Linear`` itself, which nobody else has changed."""
    return [layer for layer in model.modules() if type(layer) is nn.Linear and _is_fit(layer)]


def _is_fit(layer: nn.Linear) -> bool:
    weight, bias = layer.weight, layer.bias
    return (
        has_mkl()
        and "forward" not in vars(layer)
        and type(weight) is nn.Parameter
        and not weight.is_inference()  # it does not count its changes
        and _can_be_packed(weight)
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == torch.float32))
    )


def _can_be_packed(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.is_cpu and weight.layout == torch.strided and weight.numel() > 0


def has_mkl() -> bool:
    """Has PyTorch the two operators?"""
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_reorder_linear_weight")


def _free_memory() -> int:
    """Return the bytes that no process and no file holds, of this container where it has a bound; 0 where nothing tells."""
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return 0
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        bound, used = ((Path("/sys/fs/cgroup") / name).read_text() for name in ("memory.max", "memory.current"))
        return min(free, int(bound) - int(used))
    except (OSError, ValueError):  # no such file, or "max"
        return free


class _Prepacked:
    """The forward pass of ``layer`` with a copy of its weight, which is made when it is first of use.

    It is called for each layer in each step, and the operator checks little: neither shapes nor what a tensor is.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.columns = layer.weight.shape[1]
        self.packed: Tensor | None = None
        self.packed_from = layer.weight.detach()  # keeps its memory: no other weight can come to lie there
        self.version = 0
        self.ended = False

    def __getstate__(self) -> dict[str, object]:
        """Copies of the model make packed weights of their own: these must not move in memory."""
        return {**vars(self), "packed": None}

    def __call__(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not (self._serves(input) and self._is_current()):
            return functional.linear(input, self.layer.weight, self.layer.bias)
        rows = input.numel() // self.columns
        output: Tensor = torch.ops.mkl._mkl_linear.default(input, self.packed, self.weight, self.bias, rows)
        return output

    def _serves(self, input: Tensor) -> bool:
        own = self.layer._parameters
        return (
            input.numel() // self.columns in ROWS
            and input.shape[-1] == self.columns
            and type(input) is Tensor
            and input.dtype is torch.float32
            and input.is_cpu
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and own.get("weight") is self.weight
            and own.get("bias") is self.bias
        )

    def _is_current(self) -> bool:
        """Is there a copy of the weight as it is now? One of a weight that was written to or moved since is made anew."""
        weight = self.weight
        if self.packed is None or weight._version != self.version or weight.data_ptr() != self.packed_from.data_ptr():
            if self.ended or not _can_be_packed(weight) or weight.shape[1] != self.columns:
                return False
            self.packed_from, self.version = weight.detach(), weight._version
            self.packed = torch.ops.mkl._mkl_reorder_linear_weight(self.packed_from, TYPICAL)
        return True

    def end(self) -> None:
        """Give the layer its own forward pass back, and the memory of the copy; who still holds this one packs no more."""
        self.packed, self.ended = None, True
        if vars(self.layer).get("forward") is self:
            del self.layer.forward
