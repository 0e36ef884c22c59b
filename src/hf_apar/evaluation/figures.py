"""The figures of an evaluation by arm and suite, as JSON can hold them, and what takes meaning from them."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

from hf_apar.evaluation.metrics import METRICS, measured
from hf_apar.evaluation.rows import Row

Rows = Mapping[str, Sequence[Row]]
"""By arm."""


class Figure(TypedDict):
    """A figure, its 95 % interval, and how many answers counted for it."""

    low: float
    value: float
    high: float
    n: int


Figures = Mapping[str, Mapping[str, Mapping[str, Figure]]]
"""By arm, by suite or ``all``, by metric."""
WORTHLESS = "the figures of this arm are no result"
FEW = 20  # answers below which the bootstrap's interval is too narrow
ALL = "all"


def figures(rows: Rows) -> dict[str, dict[str, dict[str, Figure]]]:
    """Return all figures that mean something, of all suites together and of each that occurs."""
    found: dict[str, dict[str, dict[str, Figure]]] = {}
    for arm, some in rows.items():
        groups = {ALL: [*some], **{suite: of_suite(some, suite) for suite in suites_of(rows)}}
        found[arm] = {suite: _figures(group) for suite, group in groups.items() if group}
    return found


def warnings(rows: Rows) -> list[str]:
    """Return a sentence for each thing that takes meaning from figures."""
    found, few = list[str](), dict[str, list[str]]()
    for arm, some in rows.items():
        if cut := sum(not row.answered.ended for row in some):
            worthless = f"; {WORTHLESS}: allow more tokens" if cut >= len(some) / 2 else ""
            found.append(
                f"{arm}: {cut} of {len(some)} answers were cut by the limit; their length and wall clock are the limit's, "
                f"and each counts one token a step{worthless}."
            )
        counts = {suite: len(of_suite(some, suite)) for suite in suites_of({arm: some})}
        if small := [f"{suite} ({count})" for suite, count in counts.items() if count < FEW]:
            few.setdefault(", ".join(small), []).append(arm)
    for small_ones, arms in few.items():
        found.append(f"{', '.join(arms)}: fewer than {FEW} answers in {small_ones}; the intervals there are too narrow.")
    return found


def of_suite(rows: Sequence[Row], suite: str) -> list[Row]:
    """Return the rows of one suite, or of ``all``."""
    return [row for row in rows if suite in (ALL, row.prompt.suite)]


def suites_of(rows: Rows) -> list[str]:
    """Return the suites that occur."""
    return list(dict.fromkeys(row.prompt.suite for some in rows.values() for row in some))


def _figures(rows: Sequence[Row]) -> dict[str, Figure]:
    return {
        name: Figure(low=one.low, value=one.value, high=one.high, n=len(METRICS[name].counted(rows)))
        for name, one in measured(rows).items()
    }
