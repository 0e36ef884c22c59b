"""Who sees whom, as pure functions of indices; True means "may attend"."""

import torch
from torch import Tensor


def visible_until_mask(visible_until: Tensor) -> Tensor:
    """Return booleans ``mask[b, i, j] = (j <= i < visible_until[b, j])`` of shape (batch, length, length).

    ``visible_until``, integers (batch, length), is what a row of trees in depth-first order needs to know: a token is seen
    from itself to the end of its thread's subtree.

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
    return torch.where(mask, 0.0, torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask.device))


def view_change(old: int, new: int, window: int | None) -> tuple[range, range]:
    """Return the positions that come into view and those that fall out of it when a path grows from ``old`` to ``new``.

    A path that is cut does the reverse.

    >>> view_change(3, 5, window=3), view_change(5, 3, window=3)
    ((range(3, 5), range(0, 2)), (range(0, 2), range(3, 5)))
    >>> view_change(3, 5, window=None)
    (range(3, 5), range(0, 0))
    """
    if new < old:
        fallen, come = view_change(new, old, window)
        return come, fallen
    before, after = (0, 0) if window is None else (max(old - window, 0), max(new - window, 0))
    return range(max(old, after), new), range(before, min(after, old))
