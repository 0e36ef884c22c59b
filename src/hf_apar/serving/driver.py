"""Answers in threads on any engine: what the engine made goes in, what it shall start and cancel comes out.

An engine moves tokens and knows nothing of trees. To bring another one, write a class with the methods of
:class:`ThreadEngine`; ``docs/engines.md`` has one of thirty lines.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from hf_apar.protocol import ForkProtocol
from hf_apar.serving.admission import Admission, AdmissionPolicy, Eager, Load
from hf_apar.serving.answer import Answer
from hf_apar.serving.reading import MadeToken
from hf_apar.tree.threads import FinishReason, Thread

_SEEDS = 2**31  # so many of them are drawn from
_ANY = -1  # as a last token: none of those that the protocol has rules for


@dataclass(frozen=True, eq=False)
class ThreadRequest:
    """A thread as a request of an engine: write on after ``prompt_ids``, by these rules.

    Attributes:
        number: its own among all requests of a driver.
        answer: what the thread is part of.
        thread: who writes; its seed, say, may depend on ``thread.index``.
        prompt_ids: all that the thread can see.
        banned: runs of tokens that must not be made: the last token of a run never follows the others, where they are the
            latest that the request itself has made.
        bias: what is added to the logits of some tokens.
        max_tokens: at most so many are wanted; then the request may end, with the reason ``"length"``.
        options: what was said with the answer, as it was given to :meth:`Driver.add`.
    """

    number: int
    answer: Answer
    thread: Thread
    prompt_ids: tuple[int, ...]
    banned: tuple[tuple[int, ...], ...]
    bias: Mapping[int, float]
    max_tokens: int
    options: Any = None

    @property
    def opens_answer(self) -> bool:
        """Is it the answer's first one, which goes on from the prompt alone?"""
        return len(self.prompt_ids) == self.answer.row.prompt_length

    def seed(self, given: int, number: int = 0) -> int:
        """Return what to draw by where an answer, the ``number``-th to its prompt, was given a seed.

        Made of what the thread sees: siblings must not draw the same, and their order depends on the load.
        """
        seed = given + 1009 * number + (0 if self.opens_answer else hash(self.prompt_ids) % _SEEDS)
        return (seed + 2**63) % 2**64 - 2**63  # 64 bits, as engines keep it

    def banned_after(self, made: Sequence[int]) -> list[int]:
        """Return the tokens that must not come next, for engines that choose by themselves."""
        return [run[-1] for run in self.banned if tuple(made[len(made) - len(run) + 1 :]) == run[:-1]]


@dataclass(frozen=True)
class Made:
    """What a request made since the last report.

    Attributes:
        tokens: those that fork and end the thread included; the driver cancels a request that the protocol ends by a token.
        reason: set if the request has ended by itself: ``"eos"`` if the last token is its end, by the engine's own rules.
        stop_reason: whatever the engine tells about that beside.
        failure: why the engine gave the request up; the whole answer ends.
    """

    request: ThreadRequest
    tokens: Sequence[MadeToken] = field(default_factory=tuple)
    reason: FinishReason | None = None
    stop_reason: int | str | None = None
    failure: str | None = None


class ThreadEngine(Protocol):
    """What writes tokens, and reports them by :meth:`Driver.made`, or by a step that :meth:`Driver.run` calls."""

    def start(self, request: ThreadRequest) -> None:
        """Take on a request, and return at once."""

    def cancel(self, request: ThreadRequest) -> None:
        """Drop a request that has not ended; what it makes yet is not wanted."""

    def load(self) -> Load:
        """Tell how busy the engine is."""


class Driver:
    """Starts and cancels the requests of all answers that an engine writes; plain bookkeeping, in one thread of Python.

    Args:
        policy: decides when children start; by default at once.
    """

    def __init__(self, engine: ThreadEngine, policy: AdmissionPolicy | None = None) -> None:
        self.engine = engine
        self.admission = Admission(policy or Eager())
        self._options: dict[Answer, Any] = {}  # of the answers that are not finished
        self._requests: dict[tuple[Answer, int], ThreadRequest] = {}  # that run, by answer and thread
        self._numbers = count()

    def __len__(self) -> int:
        """The answers that are not finished."""
        return len(self._options)

    @property
    def threads(self) -> int:
        """The threads that write now, of all answers."""
        return len(self._requests)

    def add(self, answer: Answer, options: Any = None) -> None:
        """Take on an answer; its root starts as soon as there is room.

        Args:
            options: what the engine shall know about it; each :class:`ThreadRequest` carries it.
        """
        self._options[answer] = options
        self.admission.add(answer)
        self._share()

    def remove(self, answer: Answer) -> None:
        """Let an answer go, finished or not; what still runs for it is cancelled."""
        if answer not in self._options:
            return
        if not answer.finished:
            answer.give_up("abort")
        self._settle(answer)
        del self._options[answer]
        self.admission.remove(answer)
        self._share()

    def made(self, made: Made) -> None:
        """Take over what a request made; of one that was cancelled, nothing."""
        answer, thread = made.request.answer, made.request.thread
        if self._requests.get((answer, thread.index)) is not made.request:
            return
        if made.reason is not None or made.failure is not None:
            del self._requests[answer, thread.index]
        answer.write(thread, made.tokens, reason=made.reason, stop_reason=made.stop_reason)
        if made.failure is not None:
            answer.give_up(made.failure)
        if answer.finished:
            self.remove(answer)
            return
        if self.admission.changed(answer):
            self._share()
        self._settle(answer)  # a thread may have forked and ended at once

    def run(self, step: Callable[[], Iterable[Made]]) -> None:
        """Call ``step`` of an engine, which returns what some requests have made, until every answer is finished."""
        while self._options:
            for made in step():
                self.made(made)

    def _share(self) -> None:
        load = self.engine.load()
        others = max(0, load.running + load.waiting - self.threads)
        for answer in self.admission.share(load, others):
            self._settle(answer)

    def _settle(self, answer: Answer) -> None:
        for thread in answer.to_cancel():
            if (request := self._requests.pop((answer, thread.index), None)) is not None:  # else the engine gave it up
                self.engine.cancel(request)
        for thread in answer.to_start():
            request = self._requests[answer, thread.index] = self._request(answer, thread)
            self.engine.start(request)

    def _request(self, answer: Answer, thread: Thread) -> ThreadRequest:
        banned = _refused_runs(answer, thread) if answer.refused(thread) else _banned_runs(answer.protocol, thread)
        bias = {token: bias for token, bias in answer.protocol.bias.items() if (token,) not in banned}
        return ThreadRequest(
            next(self._numbers), answer, thread, tuple(thread.path_ids), banned, bias, answer.room(thread),
            self._options[answer],
        )  # fmt: skip


def _banned_runs(protocol: ForkProtocol, thread: Thread) -> tuple[tuple[int, ...], ...]:
    """Return what ``protocol`` bans wherever it stands, and after control tokens; what else it bans the answer refuses."""
    always = protocol.banned(thread, _ANY)
    pairs = [(last, token) for last in sorted(protocol.control_ids - {*always}) for token in protocol.banned(thread, last)]
    return (*((token,) for token in always), *(pair for pair in pairs if pair[1] not in always))


def _refused_runs(answer: Answer, thread: Thread) -> tuple[tuple[int, ...], ...]:
    return tuple((token,) for token in answer.protocol.banned(thread, thread.path_ids[-1]))
