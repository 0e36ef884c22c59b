"""Figures of answers: what each is, what it says, and how it is computed of the rows of one arm, in one place.

To add one, write a line of :data:`METRICS`; what must be measured apart from the answer goes into
:attr:`~hf_apar.evaluation.rows.Row.extras`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_apar.data.extraction.markdown import extract
from hf_apar.data.extraction.repetition import repeated_share
from hf_apar.evaluation.rows import Row, by_conversation
from hf_apar.evaluation.statistics import Interval, quantile, ratio, wilson

LOOP = 0.3  # of its runs of five words that an answer repeats
EARLY = 128  # tokens within which an answer is expected to fork, if it does

Holds = Callable[[Row], bool]
Number = Callable[[Row], float]


def _any(row: Row) -> bool:
    return True


@dataclass(frozen=True)
class Ratio:
    """The sum of parts over that of wholes: over the whole set, so long answers weigh more; the mean where a whole is 1."""

    part: Number
    whole: Number = lambda row: 1

    def pair(self, row: Row) -> tuple[float, float]:
        return self.part(row), self.whole(row)

    def of(self, rows: Sequence[Row]) -> Interval | None:
        parts, wholes = by_conversation(rows, [self.pair(row) for row in rows]).T
        return ratio(parts, wholes) if wholes.any() else None


@dataclass(frozen=True)
class Share(Ratio):
    """The share of rows for which something holds, 0 or 1 each; there are as many trials as conversations."""

    def of(self, rows: Sequence[Row]) -> Interval | None:
        trials = len({row.conversation for row in rows})
        return wilson(sum(map(bool, map(self.part, rows))) * trials / len(rows), trials)


@dataclass(frozen=True)
class Quantile:
    """The number that a ``share`` of the rows stay below."""

    value: Number
    share: float

    def of(self, rows: Sequence[Row]) -> Interval | None:
        return quantile(list(map(self.value, rows)), self.share)


@dataclass(frozen=True)
class Metric:
    """A figure.

    Attributes:
        says: what it is, and of which answers.
        better: which way; ``None`` where neither is.
        figure: how it is computed of rows that count, one at least; ``None`` where it is not defined.
        counts: does a row?
    """

    says: str
    better: Literal["higher", "lower"] | None
    figure: Ratio | Quantile
    counts: Holds = _any

    def counted(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows that count."""
        return [row for row in rows if self.counts(row)]

    def of(self, rows: Sequence[Row]) -> Interval | None:
        """Return the figure of the rows that count; ``None`` where nothing does."""
        counted = self.counted(rows)
        return self.figure.of(counted) if counted else None


def _cost(part: str, whole: str) -> Ratio:
    """Return a ratio of two numbers of :class:`~hf_apar.evaluation.answers.Answered`."""
    return Ratio(lambda row: getattr(row.answered, part), lambda row: getattr(row.answered, whole))


def _expects(expected: str) -> Holds:
    return lambda row: row.tree is not None and row.prompt.expected == expected


def _forked(row: Row) -> bool:
    return row.forked


def _looped(row: Row) -> bool:
    return repeated_share(row.answered.text) > LOOP


def _nested(row: Row) -> bool:
    return row.tree is not None and any(thread.depth > 2 for thread in row.tree.threads)


def _timed(row: Row) -> bool:
    return row.answered.seconds is not None


def _seconds(row: Row) -> float:
    assert row.answered.seconds is not None
    return row.answered.seconds


def _extra(name: str, better: Literal["higher", "lower"] | None, says: str, counts: Holds = _any) -> Metric:
    return Metric(says, better, Ratio(lambda row: row.extras[name]), lambda row: name in row.extras and counts(row))


_SECONDS_PER_TOKEN = Ratio(_seconds, lambda row: row.answered.tokens)

METRICS: Mapping[str, Metric] = {
    "forks_in_parts": Metric(
        "share of the prompts that ask for parts whose answer forks (recall)", "higher", Share(_forked), _expects("parts")
    ),
    "false_forks": Metric(
        "share of the prompts whose answer should be whole that forks", "lower", Share(_forked), _expects("whole")
    ),
    "forks_either": Metric("share that forks of the prompts that either suits", None, Share(_forked), _expects("either")),
    "forks": Metric("share of all answers that fork", None, Share(_forked), lambda row: row.tree is not None),
    "in_parts": Metric(
        "share of the prompts that ask for parts whose answer has titles with details, written in threads or not", "higher",
        Share(lambda row: extract(row.answered.text).is_structured), lambda row: row.prompt.expected == "parts",
    ),
    "late_forks": Metric(
        f"share of the answers that fork whose first fork comes after {EARLY} tokens or more", None,
        Share(lambda row: row.first_fork >= EARLY), _forked,
    ),
    "nested": Metric(
        "share of the answers that fork in which a detail forks again; none can at a max_depth of 2, the default model's",
        None, Share(_nested), _forked,
    ),
    "malformed": Metric(
        "share of the answers that fork with a detail that has no title", "lower", Share(lambda row: row.malformed), _forked
    ),
    "empty_or_repeated": Metric(
        "share of the forked threads that are empty or repeat a sibling", "lower",
        Ratio(lambda row: row.false_forks, lambda row: row.forks), lambda row: row.forked and row.tokenizer is not None,
    ),
    "items_right": Metric(
        "share of the prompts that name a number of parts whose answer has as many", "higher",
        Share(lambda row: row.items == row.prompt.items), lambda row: row.prompt.items is not None,
    ),
    "items_ratio": Metric(
        "parts written over parts asked for, where a number is named; 1 is best", None,
        Ratio(lambda row: row.items, lambda row: row.prompt.items or 0), lambda row: row.prompt.items is not None,
    ),
    "ended": Metric(
        "share of the answers all of whose threads end by themselves", "higher", Share(lambda row: row.answered.ended)
    ),
    "looped": Metric(
        f"share of the answers that repeat more than {LOOP} of their runs of five words", "lower",
        Share(_looped),
    ),
    "right": Metric(
        "share of the answers with a check that hold its pattern: it looks for a pattern, and nothing else", "higher",
        Share(lambda row: bool(row.prompt.is_right(row.answered.text))), lambda row: row.prompt.check is not None,
    ),
    "tokens_per_step": Metric(
        "tokens per step, as measured; what does not end counts one token a step; plain decoding has 1 at most", "higher",
        _cost("tokens", "counted_steps"),
    ),
    "tokens_per_step_forked": Metric(
        "the same of the answers that fork", "higher", _cost("tokens", "counted_steps"), _forked
    ),
    "total_over_critical_path": Metric(
        "total over critical path: tokens per step without drafts and with unbounded threads; cut answers likewise",
        "higher", _cost("tokens", "counted_path"),
    ),
    "steps": Metric("forward passes of an answer, on average", "lower", Ratio(lambda row: row.answered.steps)),
    "tokens": Metric("length of an answer in tokens, on average", None, Ratio(lambda row: row.answered.tokens)),
    "distinct_4": Metric(
        "share of different runs of four words, each answer by itself", "higher",
        Ratio(lambda row: 1 - repeated_share(row.answered.text, 4)),
        lambda row: len(re.findall(r"\w+", row.answered.text)) >= 4,
    ),
    "seconds": Metric("wall clock of an answer, on average", "lower", Ratio(_seconds), _timed),
    "seconds_forked": Metric(
        "the same of the answers that fork", "lower", Ratio(_seconds), lambda row: _timed(row) and row.forked
    ),
    "seconds_unforked": Metric(
        "the same of those that do not", "lower", Ratio(_seconds), lambda row: _timed(row) and not row.forked
    ),
    "seconds_first_quartile": Metric(
        "wall clock of an answer that a quarter of them stay below", "lower", Quantile(_seconds, 0.25), _timed
    ),
    "seconds_median": Metric(
        "wall clock of an answer that half of them stay below", "lower", Quantile(_seconds, 0.5), _timed
    ),
    "seconds_third_quartile": Metric(
        "wall clock of an answer that three quarters stay below", "lower", Quantile(_seconds, 0.75), _timed
    ),
    "seconds_per_token": Metric("wall clock of a token: sums over the whole set", "lower", _SECONDS_PER_TOKEN, _timed),
    "seconds_per_token_forked": Metric(
        "the same of the answers that fork", "lower", _SECONDS_PER_TOKEN, lambda row: _timed(row) and row.forked
    ),
    "seconds_per_token_unforked": Metric(
        "the same of those that do not", "lower", _SECONDS_PER_TOKEN, lambda row: _timed(row) and not row.forked
    ),
    "peak_kv": Metric(
        "peak of held cache slots over those of the same text in sequence", "lower", _cost("peak_kv", "kv_if_sequential")
    ),
    "attended": Metric(
        "slots that tokens attend to over those of the same text in sequence", "lower",
        _cost("attended", "attended_if_sequential"),
    ),
    "peak_slots": Metric(
        "cache slots of one layer that an answer holds at its peak, on average", "lower",
        Ratio(lambda row: row.answered.peak_kv), lambda row: row.answered.peak_kv > 0,
    ),
    "attended_per_token": Metric(
        "slots that a token attends to, over the whole set", "lower", _cost("attended", "tokens"),
        lambda row: row.answered.attended > 0,
    ),
    "peak_threads": Metric(
        "threads that live at once at the peak of an answer that forks, on average", None,
        Ratio(lambda row: row.answered.peak_threads), _forked,
    ),
    "accepted": Metric("share of the draft tokens that are kept", "higher", _cost("accepted", "proposed")),
    "nll": _extra(
        "nll", "lower",
        "nats that the base model gives a token as the answer reads, answers weighing alike, without those that loop: loops "
        "are likely", lambda row: not _looped(row),
    ),
    "sibling_overlap": Metric(
        "share of the runs of three words in details that an earlier sibling has too; plain answers by their Markdown",
        "lower", Ratio(lambda row: row.sibling_runs[0], lambda row: row.sibling_runs[1]),
        lambda row: row.sibling_runs[1] > 0,
    ),
    "redundancy": _extra("redundancy", "lower", "likeness of sibling details, by sentence embeddings"),
    "relevance": _extra("relevance", "higher", "likeness of a detail to its title, by sentence embeddings"),
    "answers_question": _extra(
        "answers_question", "higher", "likeness of an answer to its question, by sentence embeddings"
    ),
}  # fmt: skip
"""By name; shares are between 0 and 1. Shares have Wilson's interval, all others the bootstrap's over conversations."""


def measured(rows: Sequence[Row]) -> dict[str, Interval]:
    """Return :data:`METRICS` of the rows of one arm, those that mean something there."""
    found = {name: metric.of(rows) for name, metric in METRICS.items()}
    return {name: figure for name, figure in found.items() if figure is not None}
