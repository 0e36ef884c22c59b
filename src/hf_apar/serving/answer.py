"""One answer while some engine writes its threads as requests: who must run, and what reads so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_apar.config import MAX_THREADS
from hf_apar.protocol import ControlTokens
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import Decodes, FinishReason, ParagraphTree, ReadingCursor, Thread, joined

_CONTEXT = 6  # tokens before a text that may change how it reads: a space that is dropped, a character of several tokens
_WINDOW = 24  # tokens that are decoded at once at most, while every character ends with its token
_BROKEN = "\ufffd"


class IncrementalText:
    """Turns tokens into text as they come, so that the pieces together are the text of all tokens.

    A piece is held back while its last character may be incomplete. The text follows the prompt's: where a tokenizer drops
    the first space of what it decodes, it is here, as in the text of vLLM's own answers.

    Args:
        prompt_ids: what the text follows.
        skip_special_tokens: leave special tokens out, as ``decode`` does.
    """

    def __init__(self, tokenizer: Decodes, prompt_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids = list(prompt_ids[-_WINDOW:])
        self._known = self._decode(self._ids)  # what of their text was returned or precedes it
        self._shorten()

    def step(self, token: int) -> str:
        """Return the text that ``token`` completes, often that of ``token`` alone."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(_BROKEN) and len(text) > len(self._known):
            return ""
        return self._take(text)

    def flush(self) -> str:
        """Return what is held back, complete or not."""
        return self._take(self._decode(self._ids))

    def _take(self, text: str) -> str:
        new = text[len(self._known) :]
        self._known = text
        if len(self._ids) >= _WINDOW:
            self._shorten()
        return new

    def _shorten(self) -> None:
        """Keep a few tokens, of whole letters: a decoder of bytes makes nothing of a row of them that begins within one."""
        for size in range(_CONTEXT, 2 * _CONTEXT):
            text = self._decode(self._ids[-size:])
            if text and _BROKEN not in text:
                self._ids, self._known = self._ids[-size:], text
                return

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


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


@dataclass(frozen=True)
class MadeToken:
    """A token that a request made: its log probability, if wanted, and whatever else the engine told about it."""

    token: int
    logprob: float | None = None
    note: Any = None


@dataclass
class Piece:
    """What of an answer became readable: its text, and its tokens."""

    text: str = ""
    tokens: list[MadeToken] = field(default_factory=list)


class Answer:
    """One answer: its tree, the threads that an engine must run for it, and what reads so far.

    The engine asks for :meth:`to_start` and :meth:`to_cancel` after every change, tells with :meth:`write` what a request
    made, and reads the answer with :meth:`read`. A fork beyond ``max_threads`` happens, and its child waits.

    Args:
        prompt_ids: without control tokens.
        protocol: decides who forks.
        tokenizer: makes the text.
        max_threads: the most that :meth:`allow` grants.

    Attributes:
        stop_reason: the stop string that cut the answer, or what the root's request gave.
        failure: why the engine gave the answer up, ``None`` if it did not.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        protocol: ControlTokens,
        limits: Limits,
        tokenizer: Decodes,
        *,
        max_threads: int = MAX_THREADS,
        skip_special_tokens: bool = True,
    ) -> None:
        self.protocol, self.limits, self.max_threads = protocol, limits, max_threads
        self.row = GrowingTree(
            prompt_ids, protocol, prompt_slots=0, max_threads=max_threads,
        )  # fmt: skip
        self.stop_reason: int | str | None = None
        self.failure: str | None = None
        self._tokens: dict[int, list[MadeToken]] = {0: []}  # of each thread's ``tokens``
        self._end: MadeToken | None = None  # the root's EOS
        self._decoder = IncrementalText(tokenizer, prompt_ids, skip_special_tokens)
        self._cursor = ReadingCursor(self.tree)
        self._read = self.tree.threads[0]  # the thread that was read last
        self._at_seam = False  # has nothing been read of the segment that began last?
        self._running: dict[int, Thread] = {}  # threads that the engine writes
        self._again: list[Thread] = []  # threads whose requests are to be made anew
        self._refused: set[int] = set()  # children that forked at once, until they have written another token
        self._written = 0
        self._text, self._sent = "", 0
        self._longest_stop = max((len(one) for one in limits.stop), default=0)
        self._closed = False

    @property
    def tree(self) -> ParagraphTree:
        """The paragraph tree as far as it is written; a stop string cuts the text, and leaves the threads as they are."""
        return self.row.tree

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

    @property
    def room(self) -> int | None:
        """How many tokens a thread may still make, forks included: two forks never stand side by side."""
        return None if self.limits.max_tokens is None else 2 * (self.limits.max_tokens - self._written) + 1

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

    def must_not_fork(self, thread: Thread) -> bool:
        """Has ``thread`` forked right after [Child], which is no place for it? Its next token must be another one."""
        return thread.index in self._refused

    def write(
        self,
        thread: Thread,
        written: Sequence[MadeToken],
        *,
        reason: FinishReason | None = None,
        stop_reason: int | str | None = None,
    ) -> None:
        """Take over what the request of ``thread`` made since the last call; of a cancelled one, nothing.

        A child that forks at once is asked again: that is the one ban that no engine's parameters can say.

        Args:
            written: [Fork] and EOS included.
            reason: set with the last tokens; with ``"eos"`` the last one is EOS and no part of the text.
        """
        if reason is not None:
            self._running.pop(thread.index, None)
        if thread.finish_reason is not None:
            return
        if written and thread.path_ids[-1] == self.protocol.child_token_id:
            if written[0].token == self.protocol.fork_token_id:
                self._refused.add(thread.index)
                self._again.append(thread)
                return
            if thread.index in self._refused:
                self._refused.remove(thread.index)
                full = len(thread.path_ids) + 1 >= self.limits.max_length
                reason = None if reason == "length" and not full else reason  # the request was for one token
        for one in written[:-1] if reason == "eos" else written:
            if self._written == self.limits.max_tokens:
                self.row.end_all("length")
                return
            self._append(thread, one)
        if reason is not None:
            if reason == "eos" and written:
                self._end_itself(thread, written[-1])
            if thread.parent is None:
                self.stop_reason = stop_reason
            self.row.end(thread, reason)
        if self._written == self.limits.max_tokens:
            self.row.end_all("length")

    def fail(self, reason: str) -> None:
        """End the answer as it is, since the engine gave up one of its requests."""
        self.failure = reason
        self.row.end_all("stop")

    def read(self) -> Piece:
        """Return what became readable since the last call, cut at the first stop string."""
        piece = Piece()
        if self._closed:
            return piece
        for thread, place in self._cursor.advance():
            piece.tokens.append(self._tokens[thread.index][place])
            if self._cut_after(self._in_place(thread, self._decoder.step(thread.tokens[place]))):
                self.tree.stopped_by = thread.index
                break
        else:
            if self._cursor.at_end:
                self._closed = True
                if not self._cut_after(self._decoder.flush()) and self.finish_reason == "eos" and self._end:
                    piece.tokens.append(self._end)
        held = 0 if self._closed else max(0, self._longest_stop - 1)
        end = max(self._sent, len(self._text) - held)
        piece.text, self._sent = self._text[self._sent : end], end
        return piece

    def _in_place(self, thread: Thread, new: str) -> str:
        """Return what was read of ``thread``, after what joins its segment to the one before."""
        self._at_seam |= thread is not self._read
        self._read = thread
        if new and self._at_seam:
            self._at_seam = False
            return joined(self._text, new, self.protocol.joint)
        return new

    def _append(self, thread: Thread, one: MadeToken) -> None:
        self.row.write(thread, one.token)
        self._note(thread, one)
        if one.token == self.protocol.fork_token_id:
            if len(thread.path_ids) + 1 >= self.limits.max_length:
                self.row.end(self.tree.threads[-1], "length")  # after [Child] no token would have room
        else:
            self._tokens.setdefault(thread.index, []).append(one)
            self._written += 1

    def _end_itself(self, thread: Thread, end: MadeToken) -> None:
        thread.eos_token_id = end.token
        self._note(thread, end)
        if thread.parent is None:
            self._end = end

    @staticmethod
    def _note(thread: Thread, one: MadeToken) -> None:
        if one.logprob is not None:
            if thread.logprobs is None:
                thread.logprobs = []
            thread.logprobs.append(one.logprob)

    def _cut_after(self, new: str) -> bool:
        """Add ``new`` to the text, or what of it precedes a stop string, which ends the answer; return whether one does."""
        known = len(self._text)
        self._text += new
        found = [
            (place + len(stop), number, place, stop)
            for number, stop in enumerate(self.limits.stop)
            if new and (place := self._text.find(stop, max(0, known - len(stop) + 1))) >= 0
        ]
        if not found:
            return False
        end, _, place, self.stop_reason = min(found)  # the one that is complete first
        self._text = self._text[: end if self.limits.include_stop else place]
        self._closed = True
        self.row.end_all("stop")
        return True
