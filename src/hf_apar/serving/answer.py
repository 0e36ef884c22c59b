"""One answer while some engine writes its threads as requests: who must run, and what reads so far."""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_apar.config import ResolvedConfig
from hf_apar.serving.reading import IncrementalText, MadeToken, Piece, Reader
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import Decodes, FinishReason, ParagraphTree, Thread


@dataclass(frozen=True)
class Limits:
    """Where an answer ends, whatever the model wants.

    Attributes:
        max_tokens: tokens of the answer, control tokens and EOS left out; ``None`` for no bound but ``max_length``.
        max_length: tokens of a path, its prompt included: the model's context.
        stop: strings that end the answer where they first occur in reading order.
        include_stop: keep that string in the text.
    """

    max_tokens: int | None
    max_length: int
    stop: Sequence[str] = ()
    include_stop: bool = False


class Answer:
    """One answer: its tree, the threads that an engine must run for it, and what reads so far.

    Whoever drives it asks for :meth:`to_start` and :meth:`to_cancel` after every change, tells with :meth:`write` what a
    request made, and reads the answer with :meth:`read`. A fork beyond ``max_threads`` happens, and its child waits.

    Args:
        prompt_ids: without control tokens.
        config: the settings of this answer; its ``max_threads`` is the most that :meth:`allow` grants.
        tokenizer: makes the text.

    Attributes:
        stop_reason: the stop string that cut the answer, or what the root's request gave.
        failure: why the answer was given up, ``None`` if it was not.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        config: ResolvedConfig,
        limits: Limits,
        tokenizer: Decodes,
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        self.config, self.limits = config, limits
        self.row = GrowingTree(
            prompt_ids, prompt_slots=0, max_threads=config.max_threads, fork_token_id=config.fork_token_id,
            child_token_id=config.child_token_id, joint=config.joint,
        )  # fmt: skip
        self.stop_reason: int | str | None = None
        self.failure: str | None = None
        decoder = IncrementalText(tokenizer, prompt_ids, skip_special_tokens)
        self._reader = Reader(self.tree, decoder, limits.stop, limits.include_stop)
        self._made: dict[int, list[MadeToken]] = {0: []}  # of each thread's ``tokens``
        self._end: MadeToken | None = None  # the root's EOS
        self._running: dict[int, Thread] = {}  # threads that the engine writes
        self._again: list[Thread] = []  # threads whose requests are to be made anew
        self._refused: set[int] = set()  # children that forked at once, until they have written another token
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
        if self.failure or isinstance(self.stop_reason, str):
            return "stop"
        return "length" if any(thread.finish_reason == "length" for thread in self.tree.threads) else "eos"

    def room(self, thread: Thread) -> int:
        """Return how many tokens a request for ``thread`` may make, forks included: two forks never stand side by side."""
        if self.must_not_fork(thread):
            return 1
        room = self.limits.max_length - len(thread.path_ids)
        return room if self.limits.max_tokens is None else min(room, 2 * (self.limits.max_tokens - self._written) + 1)

    def allow(self, max_threads: int) -> None:
        """Let so many threads write at once from now on, one at least; none that writes already has to wait."""
        self.row.allow(max(1, min(max_threads, self.config.max_threads)))

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

    def must_not_fork(self, thread: Thread) -> bool:
        """Has ``thread`` forked right after [Child], which is no place for it? Its next token must be another one."""
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

        A child that forks at once is asked again: that is the one ban that no engine's parameters can say.

        Args:
            made: [Fork] and EOS included.
            reason: set with the last tokens; with ``"eos"`` the last one is EOS and no part of the text.
        """
        if reason is not None:
            self._running.pop(thread.index, None)
        if thread.finish_reason is not None or self._refuses(thread, made):
            return
        if made and thread.index in self._refused:
            self._refused.remove(thread.index)
            full = len(thread.path_ids) + 1 >= self.limits.max_length
            reason = None if reason == "length" and not full else reason  # the request was for one token
        for one in made[:-1] if reason == "eos" else made:
            if self._written == self.limits.max_tokens:
                break
            self._append(thread, one)
        else:
            if reason is not None:
                self._end_thread(thread, made, reason, stop_reason)
        if self._written == self.limits.max_tokens:
            self.row.end_all("length")
        self._read_on()

    def give_up(self, reason: str) -> None:
        """End the answer as it is: the engine gave up one of its requests, or whoever asked has gone."""
        self.failure = reason
        self.row.end_all("stop")
        self._read_on()

    def read(self) -> Piece:
        """Return what became readable since the last call, cut at the first stop string."""
        return self._reader.piece()

    def _refuses(self, thread: Thread, made: Sequence[MadeToken]) -> bool:
        at_once = thread.path_ids[-1] == self.config.child_token_id
        if not (at_once and made and made[0].token == self.config.fork_token_id):
            return False
        self._refused.add(thread.index)
        self._again.append(thread)
        return True

    def _append(self, thread: Thread, one: MadeToken) -> None:
        self.row.append(thread, one.token)
        self._note(thread, one)
        if one.token == self.config.fork_token_id:
            if len(thread.path_ids) + 1 >= self.limits.max_length:
                self.row.end(self.tree.threads[-1], "length")  # after [Child] no token would have room
        else:
            self._made.setdefault(thread.index, []).append(one)
            self._written += 1

    def _end_thread(
        self, thread: Thread, made: Sequence[MadeToken], reason: FinishReason, stop_reason: int | str | None
    ) -> None:
        if reason == "eos" and made:
            thread.eos_token_id = made[-1].token
            self._note(thread, made[-1])
        if thread.parent is None:
            self.stop_reason = stop_reason
            self._end = made[-1] if reason == "eos" and made else None
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
        if self._reader.stop_string is not None:
            self.stop_reason = self._reader.stop_string
            self.row.end_all("stop")
        elif self._reader.closed and self.finish_reason == "eos" and self._end is not None:
            self._reader.tokens.append(self._end)
