"""Figures of a model's answers to prompts that no recipe trains on: what each is and what it says, in one place.

To add one, write a line of :data:`FIGURES`; where it needs to know more of an answer, a field of :class:`Judged`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_apar.data.extraction.markdown import extract


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What became of one prompt.

    Attributes:
        ended: every thread ended by itself.
        looped: the answer repeats more than 0.3 of its runs of five words.
        should_fork: ``None`` where either will do.
        false_forks: children that are empty or repeat a sibling; all of them where the answer should not fork.
        tokens, steps: sampled and made; an answer that does not end by itself counts as one token a step.
        plain: the answer of plain decoding, with the control tokens banned.
        plain_ended: it ended by itself.
    """

    prompt: str
    text: str
    should_fork: bool | None
    children: int
    ended: bool
    looped: bool
    false_forks: int
    tokens: int
    steps: int
    plain: str
    plain_ended: bool


@dataclass(frozen=True)
class Figure:
    """What a figure says, and how it is computed of the answers."""

    says: str
    value: Callable[[Sequence[Judged]], float]


def _share(holds: Callable[[Judged], bool], should_fork: bool | str | None = "any") -> Callable[[Sequence[Judged]], float]:
    """Return the share of the answers for which ``holds`` is true, of those that should fork, should not, or may."""

    def value(judged: Sequence[Judged]) -> float:
        asked = _asked(judged, should_fork)
        return sum(map(holds, asked)) / max(len(asked), 1)

    return value


def _tokens_per_step(should_fork: bool | str | None = "any") -> Callable[[Sequence[Judged]], float]:
    def value(judged: Sequence[Judged]) -> float:
        asked = _asked(judged, should_fork)
        return sum(one.tokens for one in asked) / max(sum(one.steps for one in asked), 1)

    return value


def _asked(judged: Sequence[Judged], should_fork: bool | str | None) -> list[Judged]:
    return [one for one in judged if should_fork == "any" or one.should_fork is should_fork]


def _false_forks(judged: Sequence[Judged]) -> float:
    return sum(one.false_forks for one in judged) / max(sum(one.children for one in judged), 1)


def _forked(one: Judged) -> bool:
    return one.children > 0


def _ended(one: Judged) -> bool:
    return one.ended


FIGURES = {
    "forked_in_parts": Figure(
        "share of the prompts that ask for parts whose answer forks; 1 is best", _share(_forked, True)
    ),
    "forked_whole": Figure("of the prompts that do not; 0 is best", _share(_forked, False)),
    "forked_either": Figure("of the prompts that either suits", _share(_forked, None)),
    "ended_in_parts": Figure(
        "share of the prompts that ask for parts whose answer ends by itself; 1 is best", _share(_ended, True)
    ),
    "ended_whole": Figure("of the prompts that do not; 1 is best", _share(_ended, False)),
    "ended_either": Figure("of the prompts that either suits; 1 is best", _share(_ended, None)),
    "looped": Figure("share of the answers that repeat themselves; 0 is best", _share(lambda one: one.looped)),
    # a model that learnt to fork and forgot what a title is followed by where it may not has a low one
    "plain_in_parts": Figure(
        "share of the prompts that ask for parts whose plain answer has titles with details",
        _share(lambda one: extract(one.plain).is_structured, True),
    ),
    "plain_ended": Figure("share of the plain answers that end by themselves", _share(lambda one: one.plain_ended)),
    "false_forks": Figure("share of the forks that are empty or repeat a sibling; 0 is best", _false_forks),
    "tokens_per_step": Figure("tokens per step, all prompts; plain decoding has 1", _tokens_per_step()),
    "tokens_per_step_in_parts": Figure("tokens per step, prompts that ask for parts", _tokens_per_step(True)),
    "tokens_per_step_either": Figure("tokens per step, prompts that either suits", _tokens_per_step(None)),
}
"""Of the answers alone, by name; shares are between 0 and 1."""
LIKELIHOODS = {
    "nll": "nats a token that the base gives the answers in threads; close to the next two is best",
    "nll_plain": "that it gives the plain answers",
    "nll_base": "that it gives its own",
}
"""What the figures of :func:`hf_apar.training.evaluation.likelihoods` say, for which the base must read the answers."""


def summary(judged: Sequence[Judged]) -> dict[str, float]:
    """Return :data:`FIGURES` of the answers of :func:`hf_apar.training.evaluation.evaluate`.

    >>> one = Judged(prompt="?", text="a b", should_fork=True, children=2, ended=True, looped=False, false_forks=1,
    ...              tokens=60, steps=20, plain="a b", plain_ended=True)
    >>> figures = summary([one])
    >>> figures["forked_in_parts"], figures["false_forks"], figures["tokens_per_step"], figures["plain_in_parts"]
    (1.0, 0.5, 3.0, 0.0)
    """
    return {name: figure.value(judged) for name, figure in FIGURES.items()}
