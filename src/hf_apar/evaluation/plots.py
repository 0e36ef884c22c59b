"""Plots of an evaluation, a function each; a file each beside the report."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from hf_apar.errors import MissingPackageError

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingPackageError("plots need matplotlib; run pip install 'hf-apar[evaluate]'") from error

from hf_apar.evaluation.faults import FAULTS
from hf_apar.evaluation.figures import Rows
from hf_apar.evaluation.kv_held import kv_over_time
from hf_apar.evaluation.metrics import METRICS
from hf_apar.evaluation.statistics import Interval

SHOWN = 4  # answers whose cache is drawn
UNDER_FAULTS = (
    "tokens_per_step", "tokens", "ended", "looped", "empty_or_repeated", "right", "nll", "redundancy", "relevance",
)  # fmt: skip


def tokens_per_step(rows: Rows, axes: Axes) -> bool:
    """Draw tokens per step by category, a bar for each arm that writes in threads; return whether there is any."""
    bars: dict[str, dict[str, Interval]] = {}
    for arm, some in rows.items():
        threads = [row for row in some if row.tree is not None]
        for category in dict.fromkeys(row.prompt.category for row in threads):
            found = METRICS["tokens_per_step"].of([row for row in threads if row.prompt.category == category])
            if found is not None:
                bars.setdefault(arm, {})[category] = found
    axes.set_xlabel("tokens per step")
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    return _bars(bars, axes)


def seconds_per_token(rows: Rows, axes: Axes) -> bool:
    """Draw seconds per token, sums over sums, a bar for each arm; return whether there is any."""
    found = {arm: METRICS["seconds_per_token"].of(some) for arm, some in rows.items()}
    axes.set_xlabel("seconds per token")
    return _bars({"": {arm: one for arm, one in found.items() if one is not None}}, axes)


def kv_held(rows: Rows, axes: Axes) -> bool:
    """Draw the slots that the longest answers in threads hold over time; dashed, plain decoding of the same text."""
    some = next((arm for arm in rows.values() if any(row.forked for row in arm)), ())
    longest = sorted((row for row in some if row.forked), key=lambda row: -row.answered.tokens)[:SHOWN]
    for number, row in enumerate(longest):
        assert row.tree is not None
        held = [one.slots for one in kv_over_time(row.tree)]
        plain = range(held[0], max(row.answered.kv_if_sequential, held[0]) + 1)
        axes.step(range(1, len(held) + 1), held, where="post", color=f"C{number}", label=row.prompt.key)
        axes.plot(range(1, len(plain) + 1), plain, color=f"C{number}", linestyle="--", linewidth=0.8)
    axes.set(xlabel="step", ylabel="cache slots held")
    if longest:
        axes.legend()
    return bool(longest)


def attended(rows: Rows, axes: Axes) -> bool:
    """Draw, for each answer that forks, what its tokens attend to against plain decoding of the same text."""
    highest = 0
    for arm, some in rows.items():
        forked = [row.answered for row in some if row.forked]
        if forked:
            axes.scatter([one.attended_if_sequential for one in forked], [one.attended for one in forked], s=9, label=arm)
            highest = max(highest, *(one.attended_if_sequential for one in forked))
    axes.plot([0, highest], [0, highest], color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="slots attended to in sequence", ylabel="slots attended to in threads")
    if highest:
        axes.legend()
    return highest > 0


def under_faults(metric: str, rows: Rows, axes: Axes) -> bool:
    """Draw a metric over the probability of each fault, of arms such as ``apar!missed=0.1``; return whether there is any."""
    lines: dict[str, dict[float, Interval]] = {}
    for arm, some in rows.items():
        head, *changes = arm.split("!")
        kind, _, chance = changes[0].partition("=") if len(changes) == 1 else ("", "", "")
        if kind in FAULTS:
            at_chances = {0.0: rows.get(head, ()), float(chance): some}
            found = {p: METRICS[metric].of(there) for p, there in at_chances.items()}
            lines.setdefault(kind, {}).update({p: one for p, one in found.items() if one is not None})
    for kind, points in lines.items():
        chances = sorted(points)
        middle = [points[p] for p in chances]
        axes.errorbar(chances, [one.value for one in middle], yerr=_ends(middle), capsize=2, marker=".", label=kind)
    axes.set(xlabel="probability of the fault", ylabel=metric)
    if lines:
        axes.legend()
    return any(len(points) > 1 for points in lines.values())


PLOTS: Mapping[str, Callable[[Rows, Axes], bool]] = {
    "Tokens per step by category": tokens_per_step,
    "KV cache held over time": kv_held,
    "Attended tokens": attended,
    "Seconds per token": seconds_per_token,
    **{f"Under faults: {metric}": partial(under_faults, metric) for metric in UNDER_FAULTS},
}
"""By title."""


def draw(rows: Rows, folder: Path) -> dict[str, str]:
    """Write all plots that show something into ``folder``; return their files' names by title."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for title, plot in PLOTS.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        if plot(rows, axes):
            axes.set_title(title)
            made[title] = f"{re.sub('[^a-z_]+', '-', title.lower())}.png"
            figure.savefig(folder / made[title], dpi=100)
    return made


def _bars(bars: Mapping[str, Mapping[str, Interval]], axes: Axes) -> bool:
    """Draw a group of bars for each label, a bar for each series that has it, with intervals."""
    labels = list(dict.fromkeys(label for some in bars.values() for label in some))
    height = 0.8 / max(len(bars), 1)
    for number, (series, some) in enumerate(bars.items()):
        places = [labels.index(label) + number * height for label in some]
        _drawn(list(some.values()), places, height, series, axes)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(labels))], labels)
    axes.invert_yaxis()
    if len(bars) > 1:
        axes.legend()
    return bool(labels)


def _drawn(some: Sequence[Interval], places: Sequence[float], height: float, series: str, axes: Axes) -> None:
    axes.barh(places, [one.value for one in some], height=height, xerr=_ends(some), capsize=2, label=series)


def _ends(some: Sequence[Interval]) -> list[list[float]]:
    """Return how far the intervals reach, downwards and upwards."""
    return [[one.value - one.low for one in some], [one.high - one.value for one in some]]
