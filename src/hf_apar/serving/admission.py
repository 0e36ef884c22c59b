"""When an answer and its forked threads may start, while many answers and other requests share one engine.

A fork is never refused: the model has skipped that text already. Its child waits, at most until a thread of its own answer
ends, so every answer goes on whatever a policy says. Where the KV cache is scarce whole answers wait, in order: few answers
with all their threads share more of the cache than many answers with one thread each.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Protocol

from hf_apar.serving.answer import Answer
from hf_apar.tree.threads import Thread

_PAUSE = 0.1  # seconds at most until an engine is shared out anew, where its steps take longer
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
        step_seconds: the time of a step by its number of requests.
        kv_tokens: tokens that the KV cache has room for; 0 if that is unknown.
        block_tokens: tokens of a block of it.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    max_running: int = 256
    step_seconds: Callable[[int], float] = lambda width: 1.0
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

    threads: int = 4

    def allowances(self, wanted: Sequence[int], others: int, load: Load) -> list[int]:
        return [self.threads for _ in wanted]


@dataclass(frozen=True)
class ProportionalFair:
    """Starts a child while that speeds up its own answer by more than it slows down all requests together.

    With ``k`` of its threads running an answer advances ``k / t`` tokens a second, ``t`` being the time of a step, and a
    plain request ``1 / t``. The sum of the logarithms of these rates is made as large as it can be (proportional fairness,
    Kelly et al., 1998): one more thread adds ``log((k + 1) / k)`` and costs every request the logarithm of how much longer
    the step takes. An idle engine grants all; one that is busy with plain requests grants what they hardly feel.

    Attributes:
        full: above this share of KV in use no child starts.
    """

    full: float = 0.9

    def allowances(self, wanted: Sequence[int], others: int, load: Load) -> list[int]:
        granted = [1 for _ in wanted]
        width, requests = len(wanted) + others, len(wanted) + others
        if load.kv_usage > self.full:
            return granted
        heap = [(1, number) for number, count in enumerate(wanted) if count > 1]  # fewest threads first, then the oldest
        heapify(heap)
        while heap and width < load.max_running:
            threads, number = heappop(heap)
            gain = math.log((threads + 1) / threads)
            if gain <= requests * math.log(load.step_seconds(width + 1) / load.step_seconds(width)):
                break  # the others would gain no more than this one
            width, granted[number] = width + 1, threads + 1
            if threads + 1 < wanted[number]:
                heappush(heap, (threads + 1, number))
        return granted


@dataclass
class StepTimes:
    """The time of a step by its width, a line through what was measured, the older measurements counting less."""

    memory: float = 0.99
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # of 1, w, w², t, w·t

    def add(self, width: int, seconds: float) -> None:
        """Learn that a step of ``width`` requests took ``seconds``."""
        new = (1.0, width, width * width, seconds, width * seconds)
        self._sums = [self.memory * known + one for known, one in zip(self._sums, new, strict=True)]

    def __call__(self, width: int) -> float:
        """Return the seconds of a step of ``width``; until two widths were measured, as if width cost nothing.

        >>> times = StepTimes()
        >>> for width in (1, 2, 8, 1, 4):
        ...     times.add(width, 0.010 + 0.001 * width)
        >>> round(times(16), 6)
        0.026
        """
        count, widths, squares, seconds, products = self._sums
        spread = count * squares - widths * widths
        if spread <= 1e-6 * max(1.0, squares):
            return seconds / count if count else 1.0
        slope = max(0.0, (count * products - widths * seconds) / spread)
        base = max((seconds - slope * widths) / count, 0.05 * seconds / count)
        return base + slope * width


@dataclass(eq=False)
class Admitted:
    """An answer, and how its threads become requests of an engine."""

    answer: Answer
    start: Callable[[Thread], None]
    cancel: Callable[[Thread], None]
    _held: float = 0.0  # KV tokens, summed over the steps so far
    _steps: float = 0.0

    def measure(self, block_tokens: int) -> None:
        """Note what the answer holds now, each thread's last block as if it were full: once a step of each live thread."""
        row = self.answer.row
        share = 1.0 / max(1, len(row.live))
        self._held += share * (row.prompt_length + row.pool.held + block_tokens * len(row.live))
        self._steps += share

    @property
    def usually_held(self) -> float:
        """KV tokens that it has held on average; 0 before its first step."""
        return self._held / self._steps if self._steps else 0.0


class Admission:
    """All answers that an engine writes now or will write; starts their threads and cancels those that run in vain.

    An answer begins once the KV cache has room for it beside those that have begun, each counted with what answers lately
    held on average; the first one always begins. So the cache is full on average, as a server wants it; where all answers
    happen to be at their peak the engine preempts the youngest thread, and that costs a prefill of its path.

    Args:
        policy: decides who starts.
        load: tells how the engine is doing.
    """

    def __init__(self, policy: AdmissionPolicy, load: Callable[[], Load]) -> None:
        self.policy, self.load = policy, load
        self._share_next = 0.0  # when a step has passed since the engine was shared out
        self._families: dict[Admitted, tuple[int, int]] = {}  # and its threads that run and that wait, as they were last
        self._held_back: deque[Admitted] = deque()  # answers that have not begun
        self._block_tokens = Load.block_tokens
        self._usually_held = 0.0  # KV tokens, of the answers that have ended

    def __len__(self) -> int:
        return len(self._families) + len(self._held_back)

    @property
    def threads(self) -> int:
        """The threads that write now, of all answers."""
        return sum(running for running, _ in self._families.values())

    def add(self, family: Admitted) -> None:
        """Take on an answer, and start its root if there is room."""
        self._held_back.append(family)
        self._share()

    def remove(self, family: Admitted) -> None:
        """Let an answer go, finished or given up; what still runs for it is cancelled."""
        if family in self._held_back:
            self._held_back.remove(family)
        elif self._families.pop(family, None) is None:
            return
        elif family.usually_held:
            self._usually_held += (family.usually_held - self._usually_held) * (_NEWEST if self._usually_held else 1.0)
        family.answer.row.end_all("stop")
        self._settle(family)
        self._share()

    def changed(self, family: Admitted) -> None:
        """Something was written for ``family``: start and cancel what that asks for."""
        family.measure(self._block_tokens)
        if self._count(family) != self._families[family]:
            self._share()
        else:
            self._settle(family)  # a thread may have forked and ended at once

    def share(self) -> None:
        """Share out the engine anew if children wait, since its load has changed: once a step."""
        if time.monotonic() >= self._share_next and any(waiting for _, waiting in self._families.values()):
            self._share()

    def _share(self) -> None:
        load = self.load()
        self._begin(load)
        if not self._families:
            return
        self._share_next = time.monotonic() + min(_PAUSE, load.step_seconds(max(1, load.running)))
        counts = [self._count(family) for family in self._families]
        others = max(0, load.running + load.waiting - self.threads)
        allowed = self.policy.allowances([running + waiting for running, waiting in counts], others, load)
        for family, threads in zip(list(self._families), allowed, strict=True):
            family.answer.allow(threads)
            self._settle(family)
            if family in self._families:
                self._families[family] = self._count(family)

    def _begin(self, load: Load) -> None:
        """Let answers begin for which there is room, in the order in which they came."""
        self._block_tokens = load.block_tokens
        while self._held_back and self._has_room_for(self._held_back[0], load):
            self._families[self._held_back.popleft()] = (0, 0)

    def _has_room_for(self, family: Admitted, load: Load) -> bool:
        if not load.kv_tokens or not self._families:
            return True
        held = sum(max(other.usually_held, self._expected(other)) for other in self._families)
        return held + self._expected(family) <= load.kv_tokens

    def _expected(self, family: Admitted) -> float:
        """How many KV tokens an answer will hold on average: as many as others did, or a guess if none has ended."""
        limits, prompt = family.answer.limits, family.answer.row.prompt_length
        return self._usually_held or prompt + min(limits.max_tokens or _ANSWER, _ANSWER) / 2

    @staticmethod
    def _settle(family: Admitted) -> None:
        for thread in family.answer.to_cancel():
            family.cancel(thread)
        for thread in family.answer.to_start():
            family.start(thread)

    @staticmethod
    def _count(family: Admitted) -> tuple[int, int]:
        return len(family.answer.row.live), len(family.answer.row.waiting)
