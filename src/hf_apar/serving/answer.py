"""One answer while some engine writes its threads as requests: who must run, and what reads so far."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hf_apar.config import MAX_THREADS
from hf_apar.protocol import ForkProtocol
from hf_apar.serving.reading import IncrementalText, MadeToken, Piece, Reader
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import Decodes, FinishReason, ParagraphTree, Thread

_CUT: tuple[FinishReason, ...] = ("length", "stop")  # what an answer ends by if any thread of it does


@dataclass(frozen=True)
class Limits:
    """Where an answer ends, whatever the model wants.

    Attributes:
        max_tokens: tokens of the answer, control tokens and EOS left out; ``None`` for no bound but ``max_length``.
        max_length: tokens of a path, its prompt included: the model's context.
        stop: strings that end the answer where they first occur in reading order.
        include_stop: keep that string in the text.
        stop_tokens: tokens that end it in the same way, control tokens excepted; the text of one is part of the answer with
            ``include_stop`` alone.
    """

    max_tokens: int | None
    max_length: int
    stop: Sequence[str] = ()
    include_stop: bool = False
    stop_tokens: Collection[int] = ()


class Answer:
    """One answer: its tree, the threads that an engine must run for it, and what reads so far.

    Whoever drives it asks for :meth:`to_start` and :meth:`to_cancel` after every change, tells with :meth:`write` what a
    request made, and reads the answer with :meth:`read`. A fork beyond ``max_threads`` happens, and its child waits.

    Args:
        prompt_ids: without control tokens.
        protocol: decides who forks.
        tokenizer: makes the text.
        max_threads: the most that :meth:`allow` grants.

    Attributes:
        stop_reason: the stop string or token that cut the answer, what the request of a thread told that the engine cut, or
            what the root's request gave.
        failure: why the answer was given up, ``None`` if it was not.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        protocol: ForkProtocol,
        limits: Limits,
        tokenizer: Decodes,
        *,
        max_threads: int = MAX_THREADS,
        skip_special_tokens: bool = True,
    ) -> None:
        self.protocol, self.limits, self.max_threads = protocol, limits, max_threads
        self.row = GrowingTree(prompt_ids, protocol, prompt_slots=0, max_threads=max_threads)
        self.stop_reason: int | str | None = None
        self.failure: str | None = None
        decoder = IncrementalText(tokenizer, prompt_ids, skip_special_tokens)
        self._stop_tokens = frozenset(limits.stop_tokens) - protocol.control_ids
        self._reader = Reader(self.tree, decoder, limits.stop, limits.include_stop, self._stop_tokens)
        self._made: dict[tuple[int, int], MadeToken] = {}  # by thread and place in its ``tokens``, not the injected ones
        self._end: MadeToken | None = None  # the root's EOS
        self._running: dict[int, Thread] = {}  # threads that the engine writes
        self._again: list[Thread] = []  # threads whose requests are to be made anew
        self._refused: set[int] = set()  # threads whose latest token was banned, until they have written another one
        self._written = 0

    @property
    def tree(self) -> ParagraphTree:
        """The paragraph tree as far as it is written; a stop string cuts the text, and leaves the threads as they are."""
        return self.row.tree

    @property
    def text(self) -> str:
        """The text as far as it reads."""
        return self._reader.text

    @property
    def finished(self) -> bool:
        """Has everything been written, or cut?"""
        return not self.row.unfinished

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended: ``"length"`` if any thread was cut, ``None`` while it is written."""
        if not self.finished:
            return None
        if self.failure or self._reader.stopped_by is not None:
            return "stop"
        reasons = {thread.finish_reason for thread in self.tree.threads}
        return next((reason for reason in _CUT if reason in reasons), "eos")

    def room(self, thread: Thread) -> int:
        """Return how many tokens a request for ``thread`` is to make at most; if the thread has not ended it gets another.

        Twice as many as the answer may have yet, as two control tokens seldom stand side by side; one for a thread that was
        refused a token.
        """
        if self.refused(thread):
            return 1
        room = self.limits.max_length - len(thread.path_ids)
        return room if self.limits.max_tokens is None else min(room, 2 * (self.limits.max_tokens - self._written) + 1)

    def allow(self, max_threads: int) -> None:
        """Let so many threads write at once from now on, one at least; none that writes already has to wait."""
        self.row.allow(max(1, min(max_threads, self.max_threads)))

    def to_start(self) -> list[Thread]:
        """Return the threads that live and have no request yet; they count as running from now on."""
        found = [thread for thread in self.row.live if thread.index not in self._running]
        self._running |= {thread.index: thread for thread in found}
        return found

    def to_cancel(self) -> list[Thread]:
        """Return the threads whose requests run in vain; they count as cancelled from now on."""
        live = {thread.index for thread in self.row.live}
        gone = [thread for index, thread in self._running.items() if index not in live or thread in self._again]
        self._again.clear()
        for thread in gone:
            del self._running[thread.index]
        return gone

    def refused(self, thread: Thread) -> bool:
        """Was the token that ``thread`` made last banned where it stood? Its next one must be another."""
        return thread.index in self._refused

    def write(
        self,
        thread: Thread,
        made: Sequence[MadeToken],
        *,
        reason: FinishReason | None = None,
        stop_reason: int | str | None = None,
    ) -> None:
        """Take over what the request of ``thread`` made since the last call; of a cancelled one, nothing.

        A token that the protocol bans where it stands is dropped with all that follows it, and the thread asked again: few
        engines can be told every ban. So it is where a fork gives the thread tokens that its request knows nothing of.

        Args:
            made: tokens that fork or end the thread included.
            reason: set with the last tokens; with ``"eos"`` the last one is no part of the text.
        """
        if reason is not None:
            self._running.pop(thread.index, None)
        if thread.finish_reason is not None:
            return
        for place, one in enumerate(made):
            stops = one.token in self._stop_tokens
            if self.protocol.ends(thread, one.token) or (reason == "eos" and place == len(made) - 1 and not stops):
                self._end_thread(thread, "eos", stop_reason, one)
                break
            if self._written == self.limits.max_tokens or not self._append(thread, one, stops):
                break
        else:
            if reason is not None and not (reason == "length" and made):
                self._end_thread(thread, reason, stop_reason)
        if self._written == self.limits.max_tokens:
            self.row.end_all("length")
        self._read_on()

    def give_up(self, reason: str) -> None:
        """End the answer as it is: the engine gave up one of its requests, or whoever asked has gone."""
        self.failure = reason
        self.row.end_all("stop")
        self._read_on()

    @property
    def news(self) -> bool:
        """Has :meth:`read` anything to return, or the answer just ended?"""
        return bool(self._reader.tokens) or self.finished

    def read(self) -> Piece:
        """Return what became readable since the last call, cut at the first stop string."""
        return self._reader.piece()

    def _append(self, thread: Thread, one: MadeToken, stops: bool) -> bool:
        """Let ``thread`` write a token, which may stop the answer there; return whether what is made next follows it."""
        if one.token in self.protocol.banned(thread, thread.path_ids[-1]):
            self._refused.add(thread.index)
            self._again.append(thread)
            return False
        fork = None if stops else self.protocol.fork(thread, one.token)
        place, length = len(thread.tokens), len(thread.path_ids) + 1
        self.row.write(thread, one.token, stops=stops)
        self._note(thread, one)
        if one.token not in self.protocol.control_ids:
            self._made[thread.index, place] = one
            self._written += 1
        if stops:
            return False
        if fork is not None and length + len(fork.child) >= self.limits.max_length:
            self.row.end(self.tree.threads[-1], "length")  # after what it is fed no token would have room
        if len(thread.path_ids) >= self.limits.max_length:
            self.row.end(thread, "length")
        elif self.refused(thread) or (fork is not None and fork.parent):  # its request bans too much, or knows too little
            self._refused.discard(thread.index)
            self._again.append(thread)
            return False
        return thread.finish_reason is None

    def _end_thread(
        self, thread: Thread, reason: FinishReason, stop_reason: int | str | None, end: MadeToken | None = None
    ) -> None:
        if end is not None:
            thread.eos_token_id = end.token
            self._note(thread, end)
        if thread.parent is None:
            self._end = end
        if reason == "stop" or (thread.parent is None and self.stop_reason is None):
            self.stop_reason = stop_reason
        self.row.end(thread, reason)

    @staticmethod
    def _note(thread: Thread, one: MadeToken) -> None:
        if one.logprob is not None:
            if thread.logprobs is None:
                thread.logprobs = []
            thread.logprobs.append(one.logprob)

    def _read_on(self) -> None:
        """Read what can be read; a stop string ends the answer, and EOS reads last where every thread ended itself."""
        if self._reader.closed:
            return
        self._reader.advance(self._made)
        if self._reader.stopped_by is not None:
            self.stop_reason = self._reader.stopped_by
            self.row.end_all("stop")
        elif self._reader.closed and self.finish_reason == "eos" and self._end is not None:
            self._reader.tokens.append(self._end)
