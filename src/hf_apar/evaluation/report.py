"""A report of an evaluation: Markdown, and a table for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_apar.evaluation.agreement import Judged
from hf_apar.evaluation.differences import summary
from hf_apar.evaluation.figures import ALL, FEW, Figure, Figures
from hf_apar.evaluation.metrics import METRICS
from hf_apar.evaluation.paired import Paired
from hf_apar.evaluation.statistics import Interval

if TYPE_CHECKING:
    from rich.table import Table

_INTRODUCTION = (
    "A figure stands before its 95 % interval; n is told where not all answers count. Shares lie between 0 and 1, ratios "
    "are of sums over the whole set; where a ratio's interval has no width, no answer differed, which others may."
)
_PAIRED = "By the intervals of the differences over the prompts that both answered; one in forty is better by chance."
_UNJUDGED = (
    "No judge compared the answers: what stands here says how they were written and what they cost, and, but for what is "
    "checked by a pattern, not whether they are right or good."
)
_VERDICTS = (
    "win_rate", "length_controlled", "win", "tie", "loss", "longer", "consistency", "beyond_chance", "first_place",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an evaluation found.

    Attributes:
        made_with: settings, versions and the machine.
        arms: what each is.
        suites: how many prompts each has.
        warnings: what takes meaning from figures.
        compared: wall clocks by a title such as ``apar against plain``.
        differences: by how much figures of one arm exceed those of the other, by the same titles, by suite and metric.
        judged: what judges say, by the same titles.
        plots: files of plots by their titles; none where matplotlib is missing.
    """

    made_with: Mapping[str, object]
    arms: Mapping[str, str]
    suites: Mapping[str, int]
    warnings: Sequence[str]
    figures: Figures
    compared: Mapping[str, Mapping[str, Paired]] = field(default_factory=dict)
    differences: Mapping[str, Mapping[str, Mapping[str, Figure]]] = field(default_factory=dict)
    judged: Mapping[str, Judged] = field(default_factory=dict)
    plots: Mapping[str, str] = field(default_factory=dict)


def markdown(report: Report) -> str:
    """Return the report as Markdown: the same for the same input."""
    lines = ["# Evaluation", "", _INTRODUCTION, "", *_measured(report)]
    if report.warnings:
        lines += ["## Read this first", "", *(f"- {one}" for one in report.warnings), ""]
    for suite in dict.fromkeys(suite for by_suite in report.figures.values() for suite in by_suite):
        count = sum(report.suites.values()) if suite == ALL else report.suites[suite]
        title = "All suites" if suite == ALL else f"Suite {suite}"
        lines += [f"## {title} ({count} prompts)", "", *_table(report.figures, suite, count), ""]
    if report.differences:
        lines += ["## What differs", "", _PAIRED, ""]
    for title, by_suite in report.differences.items():
        lines += [f"### {title}", "", *(f"- {one}" for one in summary(by_suite.get(ALL, {}))), ""]
    for title, groups in report.compared.items():
        lines += [f"## Wall clock: {title}", "", *_comparison(groups), ""]
    lines += _judged(report.judged)
    for title, file in report.plots.items():
        lines += [f"## {title}", "", f"![{title}]({file})", ""]
    named = dict.fromkeys(name for by_suite in report.figures.values() for some in by_suite.values() for name in some)
    lines += ["## What the figures are", "", *(f"- `{name}`: {METRICS[name].says}." for name in METRICS if name in named)]
    return "\n".join(lines) + "\n"


def table(found: Figures, arms: Sequence[str], suite: str = ALL) -> "Table":
    """Return a table of one suite for the terminal."""
    from rich.table import Table  # only the command line needs it

    there = [arm for arm in arms if suite in found[arm]]
    made = Table("figure", "should be", *there, title=suite)
    for name in _named(found, suite):
        made.add_row(name, should_be(name), *(_cell(found[arm][suite].get(name)) for arm in there))
    return made


def should_be(name: str) -> str:
    """Return which way a metric is better, in a word."""
    return {"higher": "high", "lower": "low", None: "-"}[METRICS[name].better]


def _measured(report: Report) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in report.made_with.items() if value not in (None, {}))
    suites = ", ".join(f"{name} ({count})" for name, count in report.suites.items())
    arms = [f"- `{name}`: {says}." for name, says in report.arms.items()]
    return [f"Made with {settings}. Suites, with their prompts: {suites}. Arms:", "", *arms, ""]


def _table(found: Figures, suite: str, count: int) -> list[str]:
    arms = [arm for arm in found if suite in found[arm]]
    body = [
        [name, should_be(name), *(_cell(found[arm][suite].get(name), count) for arm in arms)]
        for name in _named(found, suite)
    ]
    return _lines(["figure", "should be", *arms], body)


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


def _judged(judged: Mapping[str, Judged]) -> list[str]:
    lines = ["## Which answers a judge prefers", ""]
    if not judged:
        return [*lines, _UNJUDGED, ""]
    for title, one in judged.items():
        body = [
            [found.judge, str(found.judged), str(found.alike), *(str(getattr(found, name) or "-") for name in _VERDICTS)]
            for found in one.comparisons
        ]
        lines += [f"### {title}", "", *_lines(["judge", "pairs judged", "alike: ties", *_VERDICTS], body), ""]
        lines += [f"- {warning}" for warning in one.warnings]
        if (both := one.agreement) is not None:
            lines += [f"- Two judges agree on {both.share} of {both.pairs} pairs; Cohen's kappa {both.kappa or '-'}."]
        lines += [""]
    return lines


def _lines(names: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    cells = [names, ["---"] * len(names), *body]
    return [f"| {' | '.join(line)} |" for line in cells]


def _cell(one: Figure | None, total: int | None = None) -> str:
    """Return a figure, and of how many answers it is where these are not ``total``."""
    if one is None:
        return "-"
    said = str(Interval(one["low"], one["value"], one["high"]))
    return said if total in (None, one["n"]) else f"{said}, n={one['n']}{' (few)' if one['n'] < FEW else ''}"


def _named(found: Figures, suite: str) -> list[str]:
    return [name for name in METRICS if any(name in by_suite.get(suite, {}) for by_suite in found.values())]
