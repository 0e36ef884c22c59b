"""Plots of an evaluation, a function each; a file each beside the report."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from hf_apar.errors import MissingPackageError

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingPackageError("plots need matplotlib; run pip install 'hf-apar[evaluate]'") from error

from hf_apar.evaluation.faults import FAULTS
from hf_apar.evaluation.figures import Rows
from hf_apar.evaluation.metrics import METRICS
from hf_apar.evaluation.statistics import Interval
from hf_apar.replay import trace_of_tree

SHOWN = 4  # answers whose cache is drawn
UNDER_FAULTS = (
    "tokens_per_step", "tokens", "ended", "looped", "empty_or_repeated", "nll", "redundancy", "relevance",
    "answers_question",
)  # fmt: skip
AGAINST_SPEED = ("nll", "answers_question", "distinct_4", "ended", "looped", "right")
COLUMNS = 3  # of plots with several panels
MOST_GROUPS = 24  # of bars, whose names can be read


def tokens_per_step(rows: Rows, axes: Axes) -> bool:
    """Draw tokens per step by category (by suite where those are many), a bar for each arm that writes in threads."""
    prompts = [row.prompt for some in rows.values() for row in some]
    by = "category" if len({prompt.category for prompt in prompts}) <= MOST_GROUPS else "suite"
    bars: dict[str, dict[str, Interval]] = {}
    for arm, some in rows.items():
        threads = [row for row in some if row.tree is not None]
        for group in dict.fromkeys(getattr(row.prompt, by) for row in threads):
            found = METRICS["tokens_per_step"].of([row for row in threads if getattr(row.prompt, by) == group])
            if found is not None:
                bars.setdefault(arm, {})[group] = found
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
    forked = [row for row in some if row.forked and row.tokenizer is not None]
    longest = sorted(forked, key=lambda row: -row.answered.tokens)[:SHOWN]
    for number, row in enumerate(longest):
        assert row.tree is not None
        trace = trace_of_tree(row.tree, cast(PreTrainedTokenizerBase, row.tokenizer))
        held = [trace.threads[0].inherited, *trace.held[:-1]]  # while each step runs, the prefill first
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


def against_speed(metric: str, rows: Rows, axes: Axes) -> bool:
    """Draw a metric over the seconds of an answer, a point for each arm; return whether there are two."""
    found = {arm: (METRICS["seconds"].of(some), METRICS[metric].of(some)) for arm, some in rows.items()}
    shown = 0
    for arm, (seconds, value) in found.items():
        if seconds is not None and value is not None:
            shown += 1
            axes.errorbar(
                [seconds.value], [value.value], xerr=_ends([seconds]), yerr=_ends([value]), capsize=2, marker=".",
                label=arm.partition("=")[0],
            )  # fmt: skip
    axes.set(xlabel="seconds of an answer", ylabel=metric)
    return shown > 1


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
    for number, (kind, points) in enumerate(lines.items()):
        chances = sorted(points)
        middle, places = [points[p] for p in chances], [p + 0.006 * number for p in chances]  # side by side
        axes.errorbar(places, [one.value for one in middle], yerr=_ends(middle), elinewidth=0.6, marker=".", label=kind)
    axes.set(xlabel="probability of the fault", ylabel=metric)
    return any(len(points) > 1 for points in lines.values())


Plot = Callable[[Rows, Axes], bool]
PLOTS: Mapping[str, Sequence[Plot]] = {
    "Tokens per step": [tokens_per_step],
    "KV cache held over time": [kv_held],
    "Attended tokens": [attended],
    "Seconds per token": [seconds_per_token],
    "Quality against speed": [partial(against_speed, metric) for metric in AGAINST_SPEED],
    "Under faults": [partial(under_faults, metric) for metric in UNDER_FAULTS],
}
"""The panels of each by its title; arms with changes stand in the last one alone."""


def draw(rows: Rows, folder: Path) -> dict[str, str]:
    """Write all plots that show something into ``folder``; return their files' names by title."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    unchanged = {arm: some for arm, some in rows.items() if "!" not in arm} or rows
    for title, panels in PLOTS.items():
        height = 4.5 if len(panels) == 1 else 2.6 * math.ceil(len(panels) / COLUMNS)
        figure = Figure(figsize=(7 if len(panels) == 1 else 10, height), layout="constrained")
        if _drew(panels, rows if title == "Under faults" else unchanged, figure):
            figure.suptitle(title)
            made[title] = f"{re.sub('[^a-z_]+', '-', title.lower())}.png"
            figure.savefig(folder / made[title], dpi=72)
    return made


def _drew(panels: Sequence[Plot], rows: Rows, figure: Figure) -> bool:
    """Draw the panels that show something, with one legend where there are several; return whether any does."""
    columns = min(len(panels), COLUMNS)
    free = list(figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flat)
    shown = []
    for plot in panels:
        if plot(rows, free[0]):
            shown.append(free.pop(0))
        else:
            free[0].clear()
    for axes in free:
        axes.remove()
    if len(shown) > 1:
        figure.legend(*shown[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return bool(shown)


def _bars(bars: Mapping[str, Mapping[str, Interval]], axes: Axes) -> bool:
    """Draw a group of bars for each label, a bar for each series that has it, with intervals."""
    labels = list(dict.fromkeys(label for some in bars.values() for label in some))
    height = 0.8 / max(len(bars), 1)
    for number, (series, some) in enumerate(bars.items()):
        places, values = [labels.index(label) + number * height for label in some], list(some.values())
        axes.barh(places, [one.value for one in values], height=height, xerr=_ends(values), capsize=2, label=series)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(labels))], labels)
    axes.invert_yaxis()
    if len(bars) > 1:
        axes.legend()
    return bool(labels)


def _ends(some: Sequence[Interval]) -> list[list[float]]:
    """Return how far the intervals reach, downwards and upwards."""
    return [[one.value - one.low for one in some], [one.high - one.value for one in some]]
