"""Arms against each other, prompt by prompt: by how much a figure differs, and what that says."""

from collections.abc import Mapping, Sequence
from enum import StrEnum

from hf_apar.evaluation.figures import ALL, FEW, Figure, suites_of
from hf_apar.evaluation.metrics import METRICS, Ratio
from hf_apar.evaluation.rows import Row, by_conversation
from hf_apar.evaluation.statistics import Interval, difference


class Says(StrEnum):
    """What a difference says of the first arm."""

    better = "better"
    worse = "worse"
    more = "higher"  # of figures of which neither is better
    less = "lower"
    nothing = "no gain"
    few = "too few answers"


def pairs_of(arms: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return which arms are compared, by title: each with the first, one with drafts with the same without.

    >>> [*pairs_of(["plain", "apar", "apar+heads", "apar!short=0.1"])]
    ['apar against plain', 'apar+heads against plain', 'apar!short=0.1 against plain', 'apar+heads against apar']
    """
    first, *others = arms
    two = [(other, first) for other in others] + [(arm, without) for arm in arms if (without := _undrafted(arm)) in arms]
    return {pair_title(*pair): pair for pair in two if pair[0] != pair[1]}


def pair_title(one: str, other: str) -> str:
    return f"{one} against {other}"


def compare_figures(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> dict[str, dict[str, Figure]]:
    """Return by how much figures of arm a exceed those of b on the prompts that both answered, by suite and metric.

    A prompt counts where the answers of both arms do. Intervals are the bootstrap's over conversations, all of both arms'
    answers in one drawn together. ``n`` is how many prompts count. Quartiles have no difference.
    """
    others = {row.prompt.key: row for row in rows_b}
    pairs = [(row, others[row.prompt.key]) for row in rows_a if row.prompt.key in others]
    found: dict[str, dict[str, Figure]] = {}
    for name, metric in METRICS.items():
        figure = metric.figure
        if not isinstance(figure, Ratio):
            continue
        counting = [(a, b) for a, b in pairs if metric.counts(a) and metric.counts(b)]
        for suite in (ALL, *suites_of({"": rows_a})):
            of_suite = [pair for pair in counting if suite in (ALL, pair[0].prompt.suite)]
            if of_suite and (one := _difference(figure, of_suite)) is not None:
                found.setdefault(suite, {})[name] = one
    return found


def says(metric: str, found: Figure) -> Says:
    """Return what a difference says: by its interval alone, and nothing of fewer than 20 answers."""
    if found["n"] < FEW:
        return Says.few
    if found["low"] <= 0 <= found["high"]:
        return Says.nothing
    higher, better = found["low"] > 0, METRICS[metric].better
    if better is None:
        return Says.more if higher else Says.less
    return Says.better if higher == (better == "higher") else Says.worse


def sentence(metric: str, found: Figure) -> str:
    """Return that in words.

    >>> sentence("nll", Figure(low=0.05, value=0.1, high=0.2, n=40))
    'worse by 0.1 (0.05 to 0.2)'
    >>> sentence("nll", Figure(low=-0.05, value=0.1, high=0.2, n=40))
    'no gain: a difference of 0.1 (-0.05 to 0.2)'
    """
    what, interval = says(metric, found), Interval(found["low"], found["value"], found["high"])
    if what is Says.few:
        return f"too few answers to say: a difference of {interval}"
    if what is Says.nothing:
        return f"{'no difference' if METRICS[metric].better is None else what}: a difference of {interval}"
    size = interval if interval.value > 0 else Interval(-interval.high, -interval.value, -interval.low)
    return f"{what} by {size}"


def summary(found: Mapping[str, Figure]) -> list[str]:
    """Return a sentence for each thing that differences of one suite say, with the figures of which they say it."""
    lines = []
    for what in Says:
        named = [name for name, one in found.items() if says(name, one) is what]
        told = [f"`{name}` {sentence(name, found[name]).removeprefix(f'{what} ')}" for name in named]
        if named and what in (Says.nothing, Says.few):
            told = [f"`{name}`" for name in named]
        label = "no difference told" if what is Says.nothing else what
        lines += [f"{label[0].upper()}{label[1:]}: {', '.join(told)}."] if told else []
    return lines


def _undrafted(arm: str) -> str:
    head, *changes = arm.split("!")
    return "!".join((head.partition("+")[0], *changes))


def _difference(figure: Ratio, pairs: Sequence[tuple[Row, Row]]) -> Figure | None:
    first = [row for row, _ in pairs]
    one, other = (by_conversation(first, [figure.pair(pair[side]) for pair in pairs]) for side in (0, 1))
    between = difference(one, other)
    if between is None:
        return None
    return Figure(low=between.low, value=between.value, high=between.high, n=len(pairs))
