"""Structure that is wrong on purpose: what an answer suffers where forks, ends and titles are not as the model wants them.

A fault is a logits processor, so that ``generate`` takes it as any other. Whether it strikes at a place follows from the
seed and the thread's path alone: it strikes again at the same places, in any batch, order or draft.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from hf_apar.errors import ConfigurationError
from hf_apar.evaluation.written import PathProcessor, Signs, Written, discourage, force, withhold

SHORTEST = 8  # a child that is ended too early has from one to so many tokens, and what its last word takes


class Fault(PathProcessor):
    """One kind of fault, one of :data:`FAULTS`.

    Args:
        p: how likely it strikes: each place where it may, or each thread where it is one of threads.
        bound: tokens of a thread from which on its end is withheld no longer.

    Raises:
        ConfigurationError: for another kind, or a ``p`` that is no probability.
    """

    def __init__(self, kind: str, p: float, seed: int, signs: Signs, prompt_length: int, bound: int = 256) -> None:
        if kind not in FAULTS:
            raise ConfigurationError(f"there is no fault {kind!r}; take one of {', '.join(FAULTS)}")
        if not 0 <= p <= 1:
            raise ConfigurationError(f"the fault {kind} has the probability {p}; give one from 0 to 1")
        super().__init__(signs, prompt_length)
        self.kind, self.p, self.seed, self.bound = kind, p, seed, bound

    def number(self, path: tuple[int, ...], what: str = "") -> float:
        """Return a number from 0 up to 1, without 1, that looks random and is always the same for the same path."""
        return random.Random(f"{self.seed} {self.kind} {what} {path}").random()

    def strikes(self, path: tuple[int, ...]) -> bool:
        return self.number(path) < self.p

    def edit(self, written: Written, scores: Tensor) -> None:
        FAULTS[self.kind].edit(self, written, scores)


def _missed(fault: Fault, written: Written, scores: Tensor) -> None:
    if fault.strikes(written.path):
        withhold(scores, [fault.signs.fork])


def _needless(fault: Fault, written: Written, scores: Tensor) -> None:
    if written.ends_clause and fault.strikes(written.path):
        force(scores, fault.signs.fork)


def _short(fault: Fault, written: Written, scores: Tensor) -> None:
    if written.is_root or not fault.strikes(written.given):
        return
    length = 1 + int(fault.number(written.given, "length") * SHORTEST)
    if len(written.own) >= length and (written.ends_clause or int(scores.argmax()) in fault.signs.words):
        force(scores, fault.signs.ends[0])


def _endless(fault: Fault, written: Written, scores: Tensor) -> None:
    if not written.is_root and len(written.own) < fault.bound and fault.strikes(written.given):
        discourage(scores, fault.signs.ends)


def _unending(fault: Fault, written: Written, scores: Tensor) -> None:
    if written.is_root and len(written.own) < fault.bound and fault.strikes(written.given):
        discourage(scores, fault.signs.ends)


def _repeated(fault: Fault, written: Written, scores: Tensor) -> None:
    own, signs = written.own, fault.signs
    forks = [place for place, token in enumerate(own) if token == signs.fork]
    if not forks:
        return
    item, since = last_item(own[: forks[-1]], signs), own[forks[-1] + 1 :]
    wanted = (*item, signs.fork)
    if not item or len(since) >= len(wanted) or since != wanted[: len(since)]:
        return
    again = len(forks) > 1 and item == last_item(own[: forks[-2]], signs)  # once is enough: the next one is the model's
    if not again and fault.strikes(written.path[: len(written.path) - len(since)]):
        force(scores, wanted[len(since)])


def last_item(own: tuple[int, ...], signs: Signs) -> tuple[int, ...]:
    """Return the title with which ``own`` ends: its last line, the break before it included, back to a fork at most.

    >>> last_item((5, 9, 6, 7), Signs(fork=1, child=2, ends=(0,), pad=0, lines=frozenset({9})))
    (9, 6, 7)
    """
    place = len(own)
    while place and own[place - 1] in signs.lines:
        place -= 1
    while place and own[place - 1] not in signs.lines and own[place - 1] != signs.fork:
        place -= 1
    return own[place - (place > 0 and own[place - 1] in signs.lines) :]


@dataclass(frozen=True)
class _Kind:
    says: str
    edit: Callable[[Fault, Written, Tensor], None]


FAULTS: Mapping[str, _Kind] = {
    "missed": _Kind("at any place, a fork is not allowed: what was to be a detail is written inline", _missed),
    "needless": _Kind("a fork at the end of a sentence or clause, whether it belongs there or not", _needless),
    "short": _Kind(f"a child ends at a border of words after at most {SHORTEST} tokens and what the word takes", _short),
    "endless": _Kind("a child does not end before its bound", _endless),
    "repeated": _Kind("the parent's next item has the title of the last one again", _repeated),
    "unending": _Kind("the root does not end before its bound", _unending),
}
"""By name: what goes wrong. ``short``, ``endless`` and ``unending`` strike threads, the others places."""
