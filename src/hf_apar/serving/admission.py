"""When an answer and its forked threads may start, while many answers and other requests share one engine.

A fork is never refused: the model has skipped that text already. Its child waits, at most until a thread of its own answer
ends, so every answer goes on whatever a policy says. Where the KV cache is scarce whole answers wait, in order: few answers
with all their threads share more of the cache than many answers with one thread each.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hf_apar.errors import ConfigurationError
from hf_apar.serving.answer import Answer

_PAUSE = 0.1  # seconds until an engine is shared out anew for children that wait, though none of its answers changed
_ANSWER = 256  # tokens that an answer is taken to write until one has ended
_NEWEST = 0.1  # weight of the answer that has just ended in what answers usually hold


@dataclass(frozen=True)
class Load:
    """What an engine reports.

    Attributes:
        running: requests of the last step, threads among them.
        waiting: requests that wait for a place, threads among them.
        kv_usage: share of the KV cache that is in use, 0 to 1.
        max_running: the most requests of a step.
        kv_tokens: tokens that the KV cache has room for; 0 if that is unknown.
        block_tokens: tokens of a block of it.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    max_running: int = 256
    kv_tokens: int = 0
    block_tokens: int = 16


class AdmissionPolicy(Protocol):
    """Decides how many threads of each answer may write at once."""

    def allowances(self, wanted: Sequence[int], others: int, load: Load) -> list[int]:
        """Return how many threads each answer may run, at least 1.

        Args:
            wanted: threads of each answer that live or wait, the oldest answer first.
            others: requests that are no part of an answer: plain ones.
        """


@dataclass(frozen=True)
class Eager:
    """Every child starts at once."""

    def allowances(self, wanted: Sequence[int], others: int, load: Load) -> list[int]:
        return [max(1, count) for count in wanted]


@dataclass(frozen=True)
class FixedCap:
    """At most ``threads`` of each answer."""

    threads: int = 3

    def allowances(self, wanted: Sequence[int], others: int, load: Load) -> list[int]:
        return [self.threads for _ in wanted]


@dataclass(frozen=True)
class EqualShare:
    """Every request, plain or in threads, has an equal share of a step, and what it does not want goes to the others.

    Alone an answer runs all its threads; among 32 requests, half of which want one, the others get up to five.

    Attributes:
        width: requests of a step, threads among them, beyond which one more slows down the others by what it gains.
        full: above this share of KV in use no child starts: it would have to be taken back soon.

    >>> EqualShare(width=12).allowances([9, 1, 9, 3], 0, Load())
    [4, 1, 4, 3]
    """

    width: int = 128
    full: float = 0.9

    def allowances(self, wanted: Sequence[int], others: int, load: Load) -> list[int]:
        width = min(self.width, load.max_running) if load.kv_usage <= self.full else 0
        return _shared_out(wanted, width - others)


def _shared_out(wanted: Sequence[int], room: int) -> list[int]:
    """Share out ``room`` places, one at least to each, and to none more than it wants; the oldest get what is left over."""
    allowed = [1] * len(wanted)
    for rank, place in enumerate(sorted(range(len(wanted)), key=lambda one: (wanted[one], -one))):
        allowed[place] = max(1, min(wanted[place], room // (len(wanted) - rank)))
        room -= allowed[place]
    return allowed


def policy_named(text: str) -> AdmissionPolicy:
    """Return the policy that a setting names.

    Args:
        text: ``eager``; ``cap:N`` for at most N threads an answer; ``share:N`` for equal shares of steps of N requests.

    Raises:
        ConfigurationError: for any other text.

    >>> policy_named("cap:2"), policy_named("share:256")
    (FixedCap(threads=2), EqualShare(width=256, full=0.9))
    """
    kind, _, number = text.strip().lower().partition(":")
    if kind == "eager" and not number:
        return Eager()
    if kind in ("cap", "share") and number.isdecimal() and int(number) > 0:
        return FixedCap(int(number)) if kind == "cap" else EqualShare(int(number))
    raise ConfigurationError(f"the admission policy is {text!r}; give eager, cap:N or share:N, N a number of 1 or more")


@dataclass
class _Holding:
    """What an answer that has begun holds of the KV cache, on average over its steps, and how many threads it has."""

    threads: tuple[int, int]  # those that write and those that wait
    allowed: int = 0  # threads, when the engine was last shared out; 0 if the answer has changed since
    held: float = 0.0  # KV tokens, summed over the steps so far
    steps: float = 0.0

    @property
    def usually(self) -> float:
        return self.held / self.steps if self.steps else 0.0

    def measure(self, answer: Answer, live: int, block_tokens: int) -> None:
        """Note what ``answer`` holds now, the last block of each ``live`` thread as if it were full: once a step of each."""
        share = 1.0 / max(1, live)
        self.held += share * (answer.row.prompt_length + answer.row.pool.held + block_tokens * live)
        self.steps += share


class Admission:
    """Says which answers have begun and how many threads each may run; whoever starts threads asks it after each change.

    An answer begins once the KV cache has room for it beside those that have begun, each counted with what answers lately
    held on average; the first one always begins. So the cache is full on average, as a server wants it; where all answers
    happen to be at their peak the engine preempts the youngest thread, and that costs a prefill of its path.

    Args:
        policy: decides who starts; another one may be set at any time.
    """

    def __init__(self, policy: AdmissionPolicy) -> None:
        self.policy = policy
        self._begun: dict[Answer, _Holding] = {}
        self._held_back: deque[Answer] = deque()  # answers that have not begun
        self._block_tokens = Load.block_tokens
        self._usually_held = 0.0  # KV tokens beside the prompt, of the answers that have ended
        self._share_next = 0.0

    def __len__(self) -> int:
        return len(self._begun) + len(self._held_back)

    def add(self, answer: Answer) -> None:
        """Take on an answer; it begins when :meth:`share` finds room."""
        self._held_back.append(answer)

    def remove(self, answer: Answer) -> None:
        """Let an answer go, finished or given up."""
        if answer in self._held_back:
            self._held_back.remove(answer)
        elif (holding := self._begun.pop(answer, None)) and holding.usually and not answer.failure:
            held = holding.usually - answer.row.prompt_length
            self._usually_held += (held - self._usually_held) * (_NEWEST if self._usually_held else 1.0)

    def changed(self, answer: Answer) -> bool:
        """Note that something was written for ``answer``; return whether the engine is to be shared out anew.

        So it is when a thread came, began or ended, and now and then while any child waits, since the load changes.
        """
        holding, threads = self._begun[answer], _count(answer)
        holding.measure(answer, threads[0], self._block_tokens)
        if threads != holding.threads:
            holding.threads, holding.allowed = threads, 0
            return True
        return time.monotonic() >= self._share_next and any(one.threads[1] for one in self._begun.values())

    def share(self, load: Load, others: int) -> list[Answer]:
        """Share out the engine among the answers; return those that may have threads to start.

        Args:
            others: requests that the engine runs beside those of answers.
        """
        self._block_tokens = load.block_tokens
        while self._held_back and self._has_room_for(self._held_back[0], load):
            answer = self._held_back.popleft()
            self._begun[answer] = _Holding(_count(answer))
        allowed = self.policy.allowances([sum(holding.threads) for holding in self._begun.values()], others, load)
        changed = []
        for (answer, holding), threads in zip(self._begun.items(), allowed, strict=True):
            if threads != holding.allowed:
                answer.allow(threads)
                holding.threads, holding.allowed = _count(answer), threads
                changed.append(answer)
        self._share_next = time.monotonic() + _PAUSE
        return changed

    def _has_room_for(self, answer: Answer, load: Load) -> bool:
        if not load.kv_tokens or not self._begun:
            return True
        held = sum(max(holding.usually, self._expected(other)) for other, holding in self._begun.items())
        return held + self._expected(answer) <= load.kv_tokens

    def _expected(self, answer: Answer) -> float:
        """How many KV tokens an answer will hold on average: as many as others did, or a guess if none has ended."""
        beyond = self._usually_held or min(answer.limits.max_tokens or _ANSWER, _ANSWER) / 2
        return answer.row.prompt_length + beyond


def _count(answer: Answer) -> tuple[int, int]:
    """Return how many threads of ``answer`` write and how many wait."""
    return len(answer.row.live), len(answer.row.waiting)
