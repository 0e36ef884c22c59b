"""Figures with intervals: by the bootstrap over prompts, and Wilson's for shares of independent trials."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_apar.errors import DataError

Statistic = Callable[[NDArray[np.float64]], float]


@dataclass(frozen=True)
class Interval:
    """A figure, and the interval that holds what it estimates in a given share of experiments."""

    low: float
    value: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def bootstrap(values: ArrayLike, statistic: Statistic, *, n: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Return ``statistic(values)`` with its percentile bootstrap interval (Efron, 1979).

    What is drawn again, with replacement, are items: a row of ``values`` must hold all that was measured of one prompt or
    conversation, since what was measured of the same one is not independent. A draw for which the statistic is not
    defined (``nan``) is left out. With fewer than about 20 items the interval is too narrow.

    >>> str(bootstrap([1.0, 2.0, 3.0, 4.0], mean))
    '2.5 (1.5 to 3.5)'

    Args:
        values: (items,) or (items, columns).
        statistic: of an array like ``values``, with as many items.
        n: draws.
        level: share of experiments whose interval holds what the figure estimates.

    Raises:
        DataError: if there is no item, or the statistic of all of them is not defined.
    """
    array = np.asarray(values, dtype=np.float64)
    value, random = _counted(array, statistic), np.random.default_rng(seed)
    draws = [statistic(array[random.integers(len(array), size=len(array))]) for _ in range(n)]
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), value, float(high))


def _counted(array: NDArray[np.float64], statistic: Statistic) -> float:
    value = float(statistic(array)) if len(array) else np.nan
    if np.isnan(value):
        raise DataError(f"there is no figure with an interval of {len(array)} items: nothing in them can be counted")
    return value


def mean(values: NDArray[np.float64]) -> float:
    """Return the mean, a statistic for :func:`bootstrap`."""
    return float(values.mean())


def ratio_of_sums(values: NDArray[np.float64]) -> float:
    """Return the sum of the first column over that of the second, for :func:`bootstrap`; ``nan`` where the latter is 0.

    Tokens per step of a whole set is one: long answers weigh more than short ones, unlike in a mean of ratios.

    >>> ratio_of_sums(np.array([[30.0, 10.0], [10.0, 10.0]]))
    2.0
    """
    part, whole = values.sum(axis=0)
    return float(part / whole) if whole else np.nan


def ratio(parts: ArrayLike, wholes: ArrayLike, *, n: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Return ``sum(parts) / sum(wholes)`` with the interval of :func:`bootstrap`, a part drawn together with its whole.

    Much faster than that with :func:`ratio_of_sums`; with wholes of 1 it is the mean.
    """
    pairs = np.column_stack([np.asarray(one, dtype=np.float64) for one in (parts, wholes)])  # (items, 2)
    value = _counted(pairs, ratio_of_sums)
    return _between(_ratios(pairs, n, seed), value, level)


def difference(one: ArrayLike, other: ArrayLike, *, n: int = 2000, seed: int = 0, level: float = 0.95) -> Interval | None:
    """Return the :func:`ratio_of_sums` of ``one`` less that of ``other``, an item's pairs drawn together.

    ``None`` where one is not defined.

    >>> str(difference([[2, 1], [4, 1]], [[1, 1], [3, 1]]))
    '1 (1 to 1)'

    Args:
        one, other: (items, 2), of the same items; an item that does not count on a side is two zeros there.
    """
    both = [np.asarray(side, dtype=np.float64).reshape(-1, 2) for side in (one, other)]
    value = ratio_of_sums(both[0]) - ratio_of_sums(both[1])
    return None if np.isnan(value) else _between(_ratios(both[0], n, seed) - _ratios(both[1], n, seed), value, level)


def quotient(one: ArrayLike, other: ArrayLike, *, n: int = 2000, seed: int = 0, level: float = 0.95) -> Interval | None:
    """Return the :func:`ratio_of_sums` of ``one`` over that of ``other``, drawn and given as for :func:`difference`."""
    both = [np.asarray(side, dtype=np.float64).reshape(-1, 2) for side in (one, other)]
    below = ratio_of_sums(both[1])
    value = ratio_of_sums(both[0]) / below if below else np.nan
    if np.isnan(value):
        return None
    return _between(_divided(_ratios(both[0], n, seed), _ratios(both[1], n, seed)), value, level)


def quantile(values: Sequence[float], share: float, *, n: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Return the number that a ``share`` of ``values`` stay below, with the interval of :func:`bootstrap`, much faster."""
    array = np.asarray(values, dtype=np.float64)
    value = _counted(array, lambda some: float(np.quantile(some, share)))
    drawn = np.random.default_rng(seed).integers(len(array), size=(n, len(array)))
    return _between(np.quantile(array[drawn], share, axis=1), value, level)


def _ratios(pairs: NDArray[np.float64], n: int, seed: int) -> NDArray[np.float64]:
    drawn = _times(len(pairs), n, seed) @ pairs  # (draws, 2)
    return _divided(drawn[:, 0], drawn[:, 1])


def _divided(parts: NDArray[np.float64], wholes: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.divide(parts, wholes, out=np.full(len(parts), np.nan), where=wholes != 0)
    return found


@lru_cache(maxsize=4)
def _times(items: int, n: int, seed: int) -> NDArray[np.float64]:
    """Return how often each item is drawn in each draw (draws, items): kept, since many figures are of the same items."""
    return np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=n).astype(np.float64)


def _between(draws: NDArray[np.float64], value: float, level: float) -> Interval:
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(min(float(low), value), value, max(float(high), value))  # but for rounding


def wilson(count: float, total: int, *, level: float = 0.95) -> Interval:
    """Return ``count / total`` with Wilson's score interval (1927), for a share of independent trials.

    Where trials come in groups that are not independent, give the number of groups, and of them that share. Unlike the
    bootstrap's it holds up at shares of 0 and 1, where all draws are alike.

    >>> str(wilson(10, 10))
    '1 (0.722 to 1)'

    Raises:
        DataError: if there are no trials, or not 0 <= ``count`` <= ``total``.
    """
    if not 0 <= count <= total or not total:
        raise DataError(f"{count} of {total} is no share; give a count between 0 and a total of at least 1")
    z, share = NormalDist().inv_cdf((1 + level) / 2), count / total
    centre = share + z**2 / (2 * total)
    spread = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    low, high = ((centre + sign * spread) / (1 + z**2 / total) for sign in (-1, 1))
    return Interval(min(max(low, 0.0), share), share, max(min(high, 1.0), share))  # but for rounding
