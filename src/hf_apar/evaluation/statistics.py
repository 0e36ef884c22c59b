"""Figures with intervals: by the bootstrap over prompts, and Wilson's for shares of independent trials."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

    What is drawn again, with replacement, are items: a row of ``values`` must hold all that was measured of one prompt,
    since what was measured of the same prompt is not independent. A draw for which the statistic is not defined (``nan``)
    is left out. With fewer than about 20 items the interval is too narrow.

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


def ratio(parts: Sequence[float], wholes: Sequence[float], *, n: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Return ``sum(parts) / sum(wholes)`` with the interval of :func:`bootstrap`, a part drawn together with its whole.

    Much faster than that with :func:`ratio_of_sums`; with wholes of 1 it is the mean.
    """
    pairs = np.column_stack((parts, wholes)).astype(np.float64)  # (items, 2)
    value, chances = _counted(pairs, ratio_of_sums), np.full(len(pairs), 1 / len(pairs))
    times = np.random.default_rng(seed).multinomial(len(pairs), chances, size=n)  # (draws, items): how often each is drawn
    drawn = times @ pairs  # (draws, 2)
    draws = np.divide(drawn[:, 0], drawn[:, 1], out=np.full(n, np.nan), where=drawn[:, 1] != 0)
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(min(float(low), value), value, max(float(high), value))  # but for rounding


def wilson(count: int, total: int, *, level: float = 0.95) -> Interval:
    """Return ``count / total`` with Wilson's score interval (1927), for a share of independent trials.

    Unlike the bootstrap's it holds up at shares of 0 and 1, where all draws are alike.

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
