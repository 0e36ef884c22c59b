"""What a judge's verdicts say of two arms, and what they are worth."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_apar.errors import DataError
from hf_apar.evaluation.figures import FEW
from hf_apar.evaluation.length_control import length_controlled
from hf_apar.evaluation.statistics import Interval, Statistic, bootstrap, mean, ratio_of_sums, wilson
from hf_apar.evaluation.verdicts import Pair, Preference, Verdict, VerdictKey, verdict_key

Verdicts = Mapping[VerdictKey, Verdict]

_KINDS = list(Preference)
_SCORES = {Preference.first: 1.0, Preference.tie: 0.5, Preference.second: 0.0}
_OTHER = {Preference.first: Preference.second, Preference.second: Preference.first, Preference.tie: Preference.tie}
Told = tuple[Preference | None, Preference | None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What one judge says of the arm whose answers stand first in the pairs.

    A figure is ``None`` where nothing counts for it. Intervals are of 95 %: Wilson's for shares of pairs, the bootstrap's
    over prompts for all else. A pair counts where the judge gave a verdict in both orders; where the two disagree, it is
    a tie.

    Attributes:
        judge: who was asked, in which way.
        pairs: of answers that there are.
        alike: pairs of two answers that are the same: ties without a question.
        judged: pairs with a verdict in both orders.
        not_given: verdicts that are missing, since the request failed or was not made.
        no_verdict: replies that held no verdict, or several.
        win, tie, loss: shares of the pairs that were judged or are alike; they sum to 1.
        win_rate: wins and half of the ties.
        length_controlled: the same at equal length (:func:`~hf_apar.evaluation.length_control.length_controlled`), of the
            pairs that were judged.
        longer: share of those pairs in which the arm's answer is the longer one, in letters.
        consistency: share of the pairs judged for which both orders had the same verdict, a tie included.
        beyond_chance: how far consistency goes beyond that of a judge who is blind to the answers and has this one's
            verdicts by place: 0 where not at all, 1 at most; ``None`` for a judge of ties alone.
        first_place: share of the verdicts for the answer that stood first, of all that are no tie: 0.5 without a bias, since
            each pair was shown in both orders.
    """

    judge: str
    pairs: int
    alike: int
    judged: int
    not_given: int
    no_verdict: int
    win: Interval | None
    tie: Interval | None
    loss: Interval | None
    win_rate: Interval | None
    length_controlled: Interval | None
    longer: Interval | None
    consistency: Interval | None
    beyond_chance: Interval | None
    first_place: Interval | None

    @property
    def warnings(self) -> list[str]:
        """Why no conclusion should be drawn, in sentences; none where nothing speaks against it."""
        asked = 2 * (self.pairs - self.alike)
        found = []
        if self.not_given:
            found.append(f"{self.not_given} of {asked} verdicts are missing: ask again.")
        if self.no_verdict > 0.05 * asked:
            found.append(f"{self.no_verdict} of {asked} replies hold no verdict: the figures are of the other pairs.")
        if 0 < self.judged < FEW:
            found.append(f"{self.judged} pairs were judged: too few to say.")
        if self.judged and (self.beyond_chance is None or self.beyond_chance.low <= 0):
            found.append(
                f"The judge says the same in both orders for {self.consistency} of the pairs, and one who is blind to the "
                "answers might as often: its verdicts mean nothing here."
            )
        if self.first_place is not None and 0.5 not in self.first_place:
            found.append(f"The judge is biased by the place: {self.first_place} of its verdicts are for the first one.")
        if self.win_rate is not None and self.length_controlled is None:
            found.append("One arm's answers are always the longer ones: what is due to length cannot be told.")
        return found


def preferences(judge: str, pairs: Sequence[Pair], verdicts: Verdicts) -> list[Preference | None]:
    """Return which answer of each pair is better: a tie where the orders disagree, ``None`` where one has no verdict."""
    return [Preference.tie if pair.first == pair.second else _of_both(*_told(judge, pair, verdicts)) for pair in pairs]


def compare_pairs(judge: str, pairs: Sequence[Pair], verdicts: Verdicts, *, seed: int = 0) -> Comparison:
    """Return what a judge says of ``pairs``.

    Args:
        judge: its :attr:`~hf_apar.evaluation.judge.JudgeServer.identity`.
        pairs: the answers of one arm first, those of the other second.
        verdicts: of :func:`~hf_apar.evaluation.judge.ask_judge`.
        seed: of the draws of the bootstrap.
    """
    asked = [pair for pair in pairs if pair.first != pair.second]
    given = [verdicts.get(verdict_key(shown, judge)) for pair in asked for shown in (pair, pair.swapped)]
    told = [_told(judge, pair, verdicts) for pair in asked]
    judged = [(one, other) for one, other in told if one and other]
    better = [(pair, found) for pair, found in zip(pairs, preferences(judge, pairs, verdicts), strict=True) if found]
    scores = np.array([_SCORES[found] for _, found in better])
    longer = np.array([len(pair.first) - len(pair.second) for pair, _ in better])
    differ = np.array([pair.first != pair.second for pair, _ in better], dtype=bool)

    def interval(values: ArrayLike, statistic: Statistic = mean) -> Interval | None:
        with suppress(DataError):
            return bootstrap(values, statistic, seed=seed)
        return None

    def share(of: NDArray[np.bool_]) -> Interval | None:
        return wilson(int(of.sum()), len(of)) if len(of) else None

    return Comparison(
        judge=judge,
        pairs=len(pairs),
        alike=len(pairs) - len(asked),
        judged=len(judged),
        not_given=given.count(None),
        no_verdict=sum(one is not None and one.preference is None for one in given),
        win=share(scores == 1),
        tie=share(scores == 0.5),
        loss=share(scores == 0),
        win_rate=interval(scores),
        length_controlled=interval(np.column_stack((scores, longer))[differ], length_controlled),
        longer=share(longer > 0),
        consistency=wilson(sum(one is _OTHER[other] for one, other in judged), len(judged)) if judged else None,
        beyond_chance=interval(np.array([[*_one_of(one), *_one_of(other)] for one, other in judged]), beyond_chance),
        first_place=interval([_places(two) for two in told], ratio_of_sums),
    )


def beyond_chance(values: NDArray[np.float64]) -> float:
    """Return how far a judge's consistency goes beyond chance, a statistic for the bootstrap; ``nan`` where all are ties.

    It is Scott's pi (1955) of both orders. A judge who is blind to the answers says by place what it says in either order.

    Args:
        values: (pairs, 6): whether the verdict on one order is for the first place, for the second, a tie; the same for the
            other order.
    """
    one, other = values[:, :3], values[:, [4, 3, 5]]  # by answer
    first, second, tie = (values[:, :3] + values[:, 3:]).mean(axis=0) / 2  # by place
    by_chance = 2 * first * second + tie**2
    return float(((one * other).sum(axis=1).mean() - by_chance) / (1 - by_chance)) if by_chance < 1 else np.nan


def _one_of(verdict: Preference) -> list[float]:
    return [float(verdict is kind) for kind in _KINDS]


def _told(judge: str, pair: Pair, verdicts: Verdicts) -> Told:
    """Return the verdicts on both orders, each by the place in which an answer was shown."""
    one, other = (verdicts.get(verdict_key(shown, judge)) for shown in (pair, pair.swapped))
    return one.preference if one else None, other.preference if other else None


def _of_both(one: Preference | None, other: Preference | None) -> Preference | None:
    if one is None or other is None:
        return None
    return one if one is _OTHER[other] else Preference.tie


def _places(told: Told) -> tuple[int, int]:
    """Return how many verdicts are for the first place, and for one place or the other."""
    first = told.count(Preference.first)
    return first, first + told.count(Preference.second)
