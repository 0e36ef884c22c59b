"""What reads of an answer while its threads are still written: text and tokens in order, up to the first stop string."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

from transformers import PreTrainedTokenizerFast

from hf_apar.tree.threads import Decodes, ParagraphTree, ReadingCursor, Thread, joined

_CONTEXT = 6  # tokens before a text that may change how it reads: a space that is dropped, a character of several tokens
_WINDOW = 24  # tokens after which those that cannot change any more are let go
_PLAIN_DECODES = ("transformers.tokenization_utils_base", "vllm.tokenizers.hf")  # each calls the backend's
_BYTES = 3  # of a character that lacks its last one
_LONGEST = 64  # of them at most
_BROKEN = "\ufffd"


class IncrementalText:
    """Turns tokens into text as they come, so that the pieces together are the text of all tokens.

    A piece is held back while its last character may be incomplete. The text follows the prompt's: where a tokenizer drops
    the first space of what it decodes, it is here, as in the text of vLLM's own answers. (``DecodeStream`` of
    ``tokenizers`` serves Rust's tokenizers alone, and never gives a last character that stays incomplete.)

    Args:
        prompt_ids: what the text follows.
        skip_special_tokens: leave special tokens out, as ``decode`` does.
    """

    def __init__(self, tokenizer: Decodes, prompt_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._decode = partial(_decoding(tokenizer), skip_special_tokens=skip_special_tokens)
        self._ids = list(prompt_ids[-_WINDOW:])
        self._known = self._decode(self._ids)  # what of their text was returned or precedes it
        self._shorten()

    def step(self, *tokens: int) -> str:
        """Return the text that ``tokens`` complete, often that of these alone."""
        self._ids.extend(tokens)
        text = self._decode(self._ids)
        held = len(text) - len(text.rstrip(_BROKEN))
        if not held or len(text) <= len(self._known):
            return self._new_of(text)
        if len(self._ids) <= _LONGEST:
            return ""
        return self._new_of(text, min(held, _BYTES))  # no character is so long: what precedes the last ones is none

    def flush(self) -> str:
        """Return what is held back, complete or not."""
        return self._new_of(self._decode(self._ids))

    def _new_of(self, text: str, held: int = 0) -> str:
        """Return what is new in ``text``, without the ``held`` characters at its end."""
        new = text[len(self._known) : len(text) - held]
        self._known = text[: len(text) - held]
        if len(self._ids) >= _WINDOW:
            self._shorten(held)
        return new

    def _shorten(self, held: int = 0) -> None:
        """Keep a few tokens, of whole letters: a decoder of bytes makes nothing of a row of them that begins within one."""
        for size in () if held else range(_CONTEXT, 2 * _CONTEXT):
            text = self._decode(self._ids[-size:])
            if text and _BROKEN not in text:
                self._ids, self._known = self._ids[-size:], text
                return
        if len(self._ids) > _LONGEST:  # nothing but broken letters
            self._ids = self._ids[-2 * _CONTEXT :]
            text = self._decode(self._ids)
            self._known = text[: len(text) - held]


def _decoding(tokenizer: Decodes) -> Callable[..., str]:
    """Return the tokenizer's ``decode``, or what is at the heart of it where nothing else is done: half of its time."""
    plain = getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode
    definer = next((one for one in type(tokenizer).__mro__ if "decode" in vars(one)), object)
    if plain and definer.__module__ in _PLAIN_DECODES and not tokenizer.clean_up_tokenization_spaces:  # type: ignore[attr-defined]
        return tokenizer.backend_tokenizer.decode  # type: ignore[attr-defined, no-any-return]
    return tokenizer.decode


@dataclass(frozen=True)
class MadeToken:
    """A token of an answer: its log probability, if wanted, and whatever else the engine that made it told about it."""

    token: int
    logprob: float | None = None
    note: Any = None


@dataclass
class Piece:
    """What of an answer became readable: its text, and its tokens."""

    text: str = ""
    tokens: list[MadeToken] = field(default_factory=list)


class Reader:
    """Reads a tree that grows, each token once.

    Args:
        stop: strings at the first of which, in reading order, the text ends.
        include_stop: keep that string in the text.
        stop_tokens: tokens at the first of which it ends as well, with the text of that token if ``include_stop``.

    Attributes:
        text: what reads so far.
        stopped_by: the string or token that ended it.
        closed: can nothing follow?
        tokens: what reads so far and no :meth:`piece` has had.
    """

    def __init__(
        self,
        tree: ParagraphTree,
        decoder: IncrementalText,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        stop_tokens: Collection[int] = (),
    ) -> None:
        self.text, self.closed = "", False
        self.stopped_by: str | int | None = None
        self.tokens: list[MadeToken] = []
        self._tree, self._decoder = tree, decoder
        self._stop, self._include_stop, self._stop_tokens = stop, include_stop, stop_tokens
        self._cursor = ReadingCursor(tree)
        self._latest = tree.threads[0]  # the thread that was read last
        self._at_seam = False  # has nothing been read of the segment that began last?
        self._sent = 0  # characters of the text that a piece has had

    def advance(self, made: Mapping[tuple[int, int], MadeToken]) -> None:
        """Read on as far as one can; ``made`` tells more of tokens, by their thread and their place in it."""
        for thread, places in () if self.closed else self._batches():
            tokens = [thread.tokens[place] for place in places]
            known = [made.get((thread.index, place)) for place in places]
            self.tokens += [one or MadeToken(token) for one, token in zip(known, tokens, strict=True)]
            stops = tokens[-1] in self._stop_tokens
            self._at_seam |= bool(self._tree.joint) and _goes_on(self._tree, thread, places[0])
            if not stops or self._include_stop:
                self._add(self._after_seam(thread, self._decoder.step(*tokens)))
            if stops and not self.closed:
                self._add(self._decoder.flush())
                self.stopped_by, self.closed = self.stopped_by or tokens[-1], True
            if self.closed:
                self._tree.stopped_by = thread.index
                return
        if self._cursor.at_end and not self.closed:
            self._add(self._decoder.flush())
            self.closed = True

    def _batches(self) -> Iterator[tuple[Thread, Sequence[int]]]:
        """Yield what reads next, a run of one thread at a time: that decodes fast, but a stop wants each token."""
        if self._stop or self._stop_tokens or self._tree.joint:
            yield from ((thread, (place,)) for thread, place in self._cursor.advance())
        else:
            for thread, run in groupby(self._cursor.advance(), key=itemgetter(0)):
                yield thread, [place for _, place in run]

    def piece(self) -> Piece:
        """Return what reads since the last call; what may be the beginning of a stop string is held back."""
        held = 0 if self.closed else max((len(one) - 1 for one in self._stop), default=0)
        end = max(self._sent, len(self.text) - held)
        piece = Piece(self.text[self._sent : end], self.tokens)
        self._sent, self.tokens = end, []
        return piece

    def _after_seam(self, thread: Thread, new: str) -> str:
        """Return what was read of ``thread``, after what joins its segment to the one before."""
        self._at_seam |= thread is not self._latest
        self._latest = thread
        if new and self._at_seam:
            self._at_seam = False
            return joined(self.text, new, self._tree.joint)
        return new

    def _add(self, new: str) -> None:
        """Add ``new`` to the text, or what of it precedes a stop string, which closes it."""
        known = len(self.text)
        self.text += new
        found = [
            (place + len(stop), number, place, stop)
            for number, stop in enumerate(self._stop)
            if new and (place := self.text.find(stop, max(0, known - len(stop) + 1))) >= 0
        ]
        if found:
            end, _, place, self.stopped_by = min(found)  # the one that is complete first
            self.text = self.text[: end if self._include_stop else place]
            self.closed = True


def _goes_on(tree: ParagraphTree, thread: Thread, place: int) -> bool:
    """Does ``thread`` go on at ``place`` after a child, which may have written nothing?"""
    return any(child.fork_position == place for child in tree.children(thread))
