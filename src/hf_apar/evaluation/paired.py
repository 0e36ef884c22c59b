"""Wall clock of two arms over the same prompts: sums with intervals, medians and quartiles."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_apar.evaluation.rows import Row, by_conversation
from hf_apar.evaluation.statistics import Interval, quotient, ratio

Pairs = Sequence[tuple[Row, Row]]


@dataclass(frozen=True)
class Paired:
    """One arm's wall clock over another's, on the same prompts; below 1 it is faster.

    Attributes:
        count: prompts.
        seconds: per answer: the sum of all over the other's sum.
        seconds_per_token: the same for sums over tokens; ``None`` where an arm wrote none.
        quartiles: of the single prompts' ratios of seconds: a quarter lies below the first, half below the second.
    """

    count: int
    seconds: Interval
    seconds_per_token: Interval | None
    quartiles: tuple[float, float, float]


def compare(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> dict[str, Paired]:
    """Compare arm a with arm b over the prompts that both answered on the clock.

    Returns:
        ``all``; ``forked`` and ``unforked``, by whether a's answer forks; ``suite NAME`` and ``category NAME`` for each.
        What has no prompt is left out.
    """
    others = {row.prompt.key: row for row in rows_b if row.answered.seconds}
    pairs = [(row, others[row.prompt.key]) for row in rows_a if row.answered.seconds and row.prompt.key in others]
    groups = {
        "all": pairs,
        "forked": [pair for pair in pairs if pair[0].forked],
        "unforked": [pair for pair in pairs if not pair[0].forked],
    }
    for pair in pairs:
        groups.setdefault(f"suite {pair[0].prompt.suite}", []).append(pair)
    for pair in pairs:
        groups.setdefault(f"category {pair[0].prompt.category}", []).append(pair)
    return {name: _compared(some) for name, some in groups.items() if some}


def _compared(pairs: Pairs) -> Paired:
    seconds = np.array([[row.answered.seconds for row in pair] for pair in pairs], dtype=np.float64)  # (prompts, 2)
    tokens = [[row.answered.tokens for row in pair] for pair in pairs]
    first, median, third = np.quantile(seconds[:, 0] / seconds[:, 1], [0.25, 0.5, 0.75])
    sums = by_conversation([row for row, _ in pairs], np.column_stack((seconds, tokens)))  # (conversations, 4)
    return Paired(
        len(pairs),
        ratio(sums[:, 0], sums[:, 1]),
        quotient(sums[:, [0, 2]], sums[:, [1, 3]]),
        (float(first), float(median), float(third)),
    )
