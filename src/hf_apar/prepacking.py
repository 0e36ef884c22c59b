"""Weights laid out once for the narrow matrix products of a step on a CPU.

In float32 a linear layer is a product of MKL, which first copies the weight into the layout that its kernel reads: in every
call, and for the few rows of a step that takes longer than the product. MKL also takes a weight that was laid out before
(``cblas_sgemm_pack``), by two operators of PyTorch that compiled models with frozen weights are made of; here they are
called without compiling.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_apar.errors import ConfigurationError

ModelT = TypeVar("ModelT", bound=nn.Module)

ROWS = range(3, 49)
"""Rows of a product that gain: fewer are read straight from the weight, and for more a copy is soon paid for."""
TYPICAL = 8  # rows, by which MKL chooses how its threads share the work; any number of them may come


@contextmanager
def prepacked(model: ModelT) -> Iterator[ModelT]:
    """Decode faster on a CPU in float32: within the block ``model`` has its linear layers' weights prepacked.

    A step of eight threads then takes hardly longer than one of a single thread. The copies are made in the first step that
    is wide, and the weights are in memory twice until the block ends. A weight that is changed or moved within the block is
    read as it is then; only a change through ``weight.data``, as PEFT merges adapters, goes unseen: make it before.

    Example::

        with hf_apar.prepacked(model):
            model.generate(**inputs, apar=True)

    Raises:
        ConfigurationError: if no linear layer of ``model`` has float32 weights on a CPU, or PyTorch has no MKL.
    """
    layers = prepackable(model)
    if not layers:
        raise ConfigurationError(
            f"{type(model).__name__} has no linear layers to prepack: their weights must be float32 on a CPU, and PyTorch "
            f"built with MKL ({'it is' if _has_mkl() else 'it is not'}); leave prepacked out"
        )
    with ExitStack() as stack:
        for layer in layers:
            vars(layer)["forward"] = _Prepacked(layer)  # of this object: its class, which others share, stays as it is
            stack.callback(delattr, layer, "forward")
        yield model


def prepackable(model: nn.Module) -> list[nn.Linear]:
    """Return the layers of ``model`` that :func:`prepacked` serves: ``nn.Linear`` itself, which nobody else has changed."""
    if not _has_mkl():
        return []
    return [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
    ]


def _has_mkl() -> bool:
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_reorder_linear_weight")


class _Prepacked:
    """The forward pass of ``layer`` with a copy of its weight, which is made when it is first of use."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.packed: Tensor | None = None
        self.state = (0, 0)

    def __call__(self, input: Tensor) -> Tensor:
        layer, rows = self.layer, input.numel() // self.layer.in_features
        if rows not in ROWS or not _may_serve(input):
            return functional.linear(input, layer.weight, layer.bias)
        output: Tensor = torch.ops.mkl._mkl_linear(input, self._current(), layer.weight, layer.bias, rows)
        return output

    def _current(self) -> Tensor:
        """Return the copy; one of a weight that was moved or written to since is made anew."""
        weight = self.layer.weight
        state = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        if self.packed is None or state != self.state:
            self.packed, self.state = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), TYPICAL), state
        return self.packed


def _may_serve(input: Tensor) -> bool:
    """The operators know float32 on a CPU alone, and neither gradients nor autocast."""
    return (
        input.dtype == torch.float32
        and input.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
