"""The model's last hidden states, the input of its output layer, as each forward pass makes them."""

import threading
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel


class LastHidden:
    """While entered, keeps in ``states`` what the last forward pass fed to the output layer, (batch, width, hidden).

    Args:
        active: without it nothing is kept and ``states`` is ``None``.
    """

    def __init__(self, model: PreTrainedModel, *, active: bool) -> None:
        self.model, self.active = model, active
        self.states: Tensor | None = None

    def __enter__(self) -> Self:
        if self.active:
            layer = self.model.get_output_embeddings()
            assert isinstance(layer, nn.Module)
            self.thread = threading.get_ident()
            self.handle = layer.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.active:
            self.handle.remove()

    def _keep(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if threading.get_ident() == self.thread:  # another thread of the process may use the model meanwhile
            self.states = inputs[0]
