"""How far two judges agree, beyond what they would by chance."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_apar.errors import DataError
from hf_apar.evaluation.preference import Comparison
from hf_apar.evaluation.statistics import Interval, bootstrap, wilson
from hf_apar.evaluation.verdicts import Preference

_KINDS = list(Preference)


@dataclass(frozen=True)
class Agreement:
    """What two judges say of the same pairs.

    Attributes:
        pairs: on which both have a verdict.
        table: how many of them have each verdict, the first judge's down, the second's across: first, second, tie.
        share: on which both say the same, with Wilson's interval.
        kappa: Cohen's, with a bootstrap interval; ``None`` where both always say one and the same.
    """

    pairs: int
    table: tuple[tuple[int, ...], ...]
    share: Interval
    kappa: Interval | None


@dataclass(frozen=True)
class Judged:
    """What each judge says of two arms, and how far the first two judges agree, where they judged the same pair."""

    comparisons: tuple[Comparison, ...]
    agreement: Agreement | None = None

    @property
    def warnings(self) -> list[str]:
        """Why no conclusion should be drawn of a judge's verdicts."""
        return [f"{one.judge}: {warning}" for one in self.comparisons for warning in one.warnings]


def agreement(one: Sequence[Preference | None], other: Sequence[Preference | None], *, seed: int = 0) -> Agreement:
    """Return how far two judges agree, by their :func:`~hf_apar.evaluation.preference.preferences` on the same pairs.

    Raises:
        DataError: if there is no pair on which both have a verdict.
    """
    both = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    if not both:
        raise DataError(f"of {len(one)} pairs both judges have a verdict on none; ask both about the same ones")
    codes = np.array([(_KINDS.index(a), _KINDS.index(b)) for a, b in both], dtype=np.float64)
    table = _table(codes)
    defined = not np.isnan(cohens_kappa(table))
    return Agreement(
        pairs=len(both),
        table=tuple(tuple(map(int, row)) for row in table),
        share=wilson(int(np.trace(table)), len(both)),
        kappa=bootstrap(codes, lambda some: cohens_kappa(_table(some)), seed=seed) if defined else None,
    )


def cohens_kappa(table: ArrayLike) -> float:
    """Return Cohen's kappa (1960) of a square table of counts; ``nan`` where both always say one and the same.

    >>> round(cohens_kappa([[20, 5], [10, 15]]), 3)
    0.4
    """
    shares = np.asarray(table, dtype=np.float64) / np.sum(table)
    by_chance = float(shares.sum(axis=0) @ shares.sum(axis=1))
    return float((np.trace(shares) - by_chance) / (1 - by_chance)) if by_chance < 1 else np.nan


def _table(codes: NDArray[np.float64]) -> NDArray[np.int64]:
    kinds = len(_KINDS)
    return np.bincount((codes @ [kinds, 1]).astype(np.int64), minlength=kinds**2).reshape(kinds, kinds)
