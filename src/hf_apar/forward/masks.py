"""Who sees whom, as pure functions of index vectors; True means "may attend"."""

from collections.abc import Sequence

import torch
from torch import Tensor


def visible_until_mask(visible_until: Tensor) -> Tensor:
    """Return ``mask[b, i, j] = (j <= i < visible_until[b, j])`` of shape (batch, length, length).

    ``visible_until`` (batch, length) is what a row of trees in depth-first order needs to know: a token is seen from
    itself to the end of its thread's subtree.

    >>> visible_until_mask(torch.tensor([[4, 3, 3, 4]])).int().tolist()  # root, child, child, root
    [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]]
    """
    index = torch.arange(visible_until.shape[-1], device=visible_until.device)
    queries, keys = index[:, None], index[None, :]
    return (keys <= queries) & (queries < visible_until[:, None, :])


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where ``mask`` is true and ``dtype``'s lowest number elsewhere: the form that eager and sdpa agree on.

    >>> additive(torch.tensor([True, False]), torch.float16).tolist()
    [0.0, -65504.0]
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def slots_mask(rows: Sequence[Sequence[Sequence[int]]], width: int, slots: int) -> Tensor:
    """Return the mask (batch, ``width``, ``slots``) of queries that each list the cache slots they see.

    A row with fewer than ``width`` queries gets queries that see nothing.

    >>> slots_mask([[[0, 2], [0, 1]]], width=2, slots=3).int().tolist()
    [[[1, 0, 1], [1, 1, 0]]]
    """
    mask = torch.zeros(len(rows), width, slots, dtype=torch.bool)
    for row, queries in enumerate(rows):
        for column, seen in enumerate(queries):
            mask[row, column, torch.tensor(seen)] = True
    return mask
