"""A report of an evaluation: figures for a file of JSON, tables in Markdown, a table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hf_apar.evaluation.metrics import METRICS, measured
from hf_apar.evaluation.paired import Paired
from hf_apar.evaluation.rows import Row
from hf_apar.evaluation.statistics import Interval

if TYPE_CHECKING:
    from rich.table import Table

Rows = Mapping[str, Sequence[Row]]
"""By arm."""

Figures = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
"""By arm, by suite or ``all``, by metric: the interval's low end, the figure, the high end; JSON can hold it."""

_INTRODUCTION = (
    "A figure stands before its 95 % interval; n is told where not all answers count. Shares lie between 0 and 1, ratios "
    "are of sums over the whole set; where a ratio's interval has no width, no answer differed, which others may."
)
FEW = 20  # answers below which the bootstrap's interval is too narrow
ALL = "all"


def figures(rows: Rows, suites: Sequence[str] | None = None) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return all figures that mean something, see :data:`Figures`.

    Args:
        suites: those to give apart from ``all``; ``None`` for each that occurs.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for arm, some in rows.items():
        groups = {ALL: [*some], **{suite: _of_suite(some, suite) for suite in _suites(rows, suites)}}
        found[arm] = {
            suite: {name: [one.low, one.value, one.high] for name, one in measured(group).items()}
            for suite, group in groups.items()
            if group
        }
    return found


def warnings(rows: Rows) -> list[str]:
    """Return a sentence for each thing that takes meaning from figures."""
    found = []
    if len({frozenset(row.prompt.key for row in some) for some in rows.values()}) > 1:
        found.append("The arms did not answer the same prompts: compare no figures across them, only pairs.")
    for arm, some in rows.items():
        if cut := sum(not row.answered.ended for row in some):
            found.append(
                f"{arm}: {cut} of {len(some)} answers were cut by the limit; their length and wall clock are the limit's, "
                "and each counts one token a step."
            )
        counts = {suite: len(_of_suite(some, suite)) for suite in _suites({arm: some}, None)}
        if small := [f"{suite} ({count})" for suite, count in counts.items() if count < FEW]:
            found.append(f"{arm}: fewer than {FEW} answers in {', '.join(small)}; the intervals there are too narrow.")
        if not some:
            found.append(f"{arm}: no answers.")
    return found


def markdown(
    rows: Rows,
    found: Figures,
    *,
    compared: Mapping[str, Mapping[str, Paired]] | None = None,
    plots: Mapping[str, str] | None = None,
) -> str:
    """Return the report as Markdown: the same for the same input.

    Args:
        found: of :func:`figures`.
        compared: what :func:`~hf_apar.evaluation.paired.compare` returned, by a title such as ``apar against plain``.
        plots: files of plots by their titles, as the report names them.
    """
    lines = ["# Evaluation", "", _INTRODUCTION, ""]
    if warned := warnings(rows):
        lines += ["## Read this first", "", *(f"- {one}" for one in warned), ""]
    for suite in dict.fromkeys(suite for by_suite in found.values() for suite in by_suite):
        lines += [f"## {'All suites' if suite == ALL else f'Suite {suite}'}", "", *_table(rows, found, suite), ""]
    for title, groups in (compared or {}).items():
        lines += [f"## Wall clock: {title}", "", *_comparison(groups), ""]
    for title, file in (plots or {}).items():
        lines += [f"## {title}", "", f"![{title}]({file})", ""]
    named = dict.fromkeys(name for by_suite in found.values() for some in by_suite.values() for name in some)
    lines += ["## What the figures are", "", *(f"- `{name}`: {METRICS[name].says}." for name in METRICS if name in named)]
    return "\n".join(lines) + "\n"


def table(found: Figures, suite: str = ALL) -> "Table":
    """Return a table of one suite for the terminal."""
    from rich.table import Table  # only the command line needs it

    arms = [arm for arm in found if suite in found[arm]]
    made = Table("figure", "should be", *arms, title=suite)
    for name in _named(found, suite):
        made.add_row(name, should_be(name), *(_cell(found[arm][suite], name) for arm in arms))
    return made


def should_be(name: str) -> str:
    """Return which way a metric is better, in a word."""
    return {"higher": "high", "lower": "low", None: "-"}[METRICS[name].better]


def _table(rows: Rows, found: Figures, suite: str) -> list[str]:
    arms = [arm for arm in found if suite in found[arm]]
    groups = {arm: _of_suite(rows.get(arm, ()), suite) for arm in arms}
    body = [["answers (n)", "-", *(str(len(group)) for group in groups.values())]]
    body += [
        [name, should_be(name), *(_cell(found[arm][suite], name) + _of(groups[arm], name) for arm in arms)]
        for name in _named(found, suite)
    ]
    return _lines(["figure", "should be", *arms], body)


def _of(group: Sequence[Row], name: str) -> str:
    """Return of how many answers a figure is where these are not all."""
    count = len(METRICS[name].counted(group))
    return f", n={count}{' (few)' if count < FEW else ''}" if 0 < count < len(group) else ""


def _comparison(groups: Mapping[str, Paired]) -> list[str]:
    """Return a table of ratios of seconds; below 1 the first arm is faster."""
    body = [
        [
            group,
            str(one.count) + (" (few)" if one.count < FEW else ""),
            str(one.seconds),
            "-" if one.seconds_per_token is None else str(one.seconds_per_token),
            " / ".join(f"{value:.3g}" for value in one.quartiles),
        ]
        for group, one in groups.items()
    ]
    names = ["answers", "n", "seconds, sum over sum", "seconds per token", "quartiles of single ratios"]
    return ["Ratios: below 1 the first arm is faster.", "", *_lines(names, body)]


def _lines(names: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    cells = [names, ["---"] * len(names), *body]
    return [f"| {' | '.join(line)} |" for line in cells]


def _cell(some: Mapping[str, Sequence[float]], name: str) -> str:
    return str(Interval(*some[name])) if name in some else "-"


def _named(found: Figures, suite: str) -> list[str]:
    return [name for name in METRICS if any(name in by_suite.get(suite, {}) for by_suite in found.values())]


def _of_suite(rows: Sequence[Row], suite: str) -> list[Row]:
    return [row for row in rows if suite in (ALL, row.prompt.suite)]


def _suites(rows: Rows, suites: Sequence[str] | None) -> list[str]:
    there = dict.fromkeys(row.prompt.suite for some in rows.values() for row in some)
    return [suite for suite in there if suites is None or suite in suites]
