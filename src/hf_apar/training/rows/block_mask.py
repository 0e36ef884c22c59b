"""The mask of rows of trees as a flex-attention block mask: blocks that no token of a block sees are not computed."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


def visible_until_function(visible_until: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return :func:`hf_apar.forward.masks.visible_until_mask` as flex attention asks for it: a function of four indices.

    >>> sees = visible_until_function(torch.tensor([[4, 3, 3, 4]]))
    >>> batch, head, query, key = torch.tensor([[0, 0], [0, 0], [2, 3], [1, 1]])
    >>> sees(batch, head, query, key).tolist()
    [True, False]
    """

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < visible_until[batch, key])

    return sees


class TreeBlockMask(BlockMask):
    """The ``attention_mask`` (batch, 1, length, length) that models with ``attn_implementation="flex_attention"`` take.

    A plain ``BlockMask`` moves to another device without the tensors that its function reads, and does not pickle: this
    one is built anew from ``visible_until`` (batch, length), as the Trainer moves it, or a worker process hands it over.
    """

    def __init__(self, visible_until: Tensor) -> None:
        batch, length = visible_until.shape
        made = create_block_mask(
            visible_until_function(visible_until), batch, None, length, length, device=visible_until.device
        )
        vars(self).update(vars(made))
        self.visible_until = visible_until

    def to(self, device: torch.device | str) -> "TreeBlockMask":
        return TreeBlockMask(self.visible_until.to(device))

    def __reduce__(self) -> tuple[type["TreeBlockMask"], tuple[Tensor]]:
        return TreeBlockMask, (self.visible_until,)

    def sum(self) -> Tensor:
        """Return the number of tokens, padding included: TRL's ``SFTTrainer`` logs the mask's sum as such."""
        return torch.tensor(self.visible_until.numel(), device=self.visible_until.device)
