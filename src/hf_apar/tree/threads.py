"""Threads and the paragraph tree that they write: plain Python (paper, section 3.1)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeGuard, get_args

from hf_apar.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["eos", "length", "stop"]  # EOS; a bound on tokens or time; a stop string or criterion

_TENSORS = ("scores", "logits")


class Decodes(Protocol):
    """What can turn token ids into text, as tokenizers do."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(eq=False)
class Thread:
    """One node sequence of a paragraph tree, written from left to right.

    Attributes:
        index: its place in the order of creation; the root is 0.
        parent: index of the thread that forked it, ``None`` for the root.
        fork_position: how many of its parent's ``tokens`` read before it.
        depth: 1 for the root.
        path_ids: all that its last token could see, itself included: prompt, inherited prefix, [Child], own tokens,
            with control tokens and without EOS and padding. The index in this list is the token's position.
        tokens: its own tokens, without control tokens and EOS.
        finish_reason: why it ended, ``None`` while it lives or waits.
        eos_token_id: the EOS that it sampled, ``None`` if it did not end itself.
        drafts: steps that fed a draft for it.
        proposed: draft tokens that were fed for it.
        accepted: those of them that it wrote.
        start: how many of ``path_ids`` it was given before it sampled.
        injected: places in ``path_ids`` of tokens that it was given later, at forks of its own.
        unread: places in ``path_ids`` of what the path does not read as text: the token that forked, for each thread on the
            way, and the control tokens with which the child began.
        logprobs: with ``output_scores``, the log probability of each of ``sampled_ids`` after all logits processors.
        scores: with ``output_scores``, the processed scores (vocabulary,) that each of ``sampled_ids`` was chosen from.
        logits: with ``output_logits``, the same before any processing.
    """

    index: int
    parent: int | None
    fork_position: int
    depth: int
    path_ids: list[int]
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    eos_token_id: int | None = None
    start: int = 0
    injected: list[int] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    drafts: int = 0
    proposed: int = 0
    accepted: int = 0
    logprobs: list[float] | None = None
    scores: "list[Tensor] | None" = None
    logits: "list[Tensor] | None" = None

    @property
    def sampled_ids(self) -> list[int]:
        """All that the thread sampled, [Fork] and EOS included, in order."""
        given = set(self.injected)
        sampled = [token for place, token in enumerate(self.path_ids[self.start :], self.start) if place not in given]
        return sampled + ([] if self.eos_token_id is None else [self.eos_token_id])


class ParagraphTree:
    """The threads of one answer, and the order in which they read.

    Attributes:
        threads: in the order of creation.
        stopped_by: index of the thread whose stop string or criterion cut the answer: what reads after that thread's last
            token is no part of the answer, though its threads still hold it; ``None`` for an answer that was not cut.
        joint: what :meth:`text` puts between two segments neither of which has a space there; no token of the answer.
        tokenizer: with it the tree shows its text in a notebook; ``generate(..., tokenizer=tokenizer)`` sets it.

    >>> tree = ParagraphTree([Thread(0, None, 0, 1, [], tokens=[1, 2, 3]), Thread(1, 0, 2, 2, [], tokens=[7, 8])])
    >>> list(tree.reading_order())
    [(0, [1, 2]), (1, [7, 8]), (0, [3])]
    """

    def __init__(self, threads: Sequence[Thread], stopped_by: int | None = None, joint: str = "") -> None:
        self.threads = list(threads)
        self.stopped_by = stopped_by
        self.joint = joint
        self.tokenizer: Decodes | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(threads={len(self.threads)}, tokens={sum(len(t.tokens) for t in self.threads)})"

    def _repr_html_(self) -> str:
        from hf_apar.tree.display import tree_html

        return tree_html(self, self.tokenizer)

    def children(self, thread: Thread) -> list[Thread]:
        """Return the threads that ``thread`` forked, in reading order."""
        return [other for other in self.threads if other.parent == thread.index]

    def segments(self) -> Iterator[tuple[Thread, list[int], bool]]:
        """Yield ``(thread, tokens, is it the thread's last segment?)`` depth first up to the cut, empty segments too."""
        for thread, tokens, is_last in self._all_segments():
            yield thread, tokens, is_last
            if is_last and thread.index == self.stopped_by:
                return

    def _all_segments(self) -> Iterator[tuple[Thread, list[int], bool]]:
        forks: dict[int, list[Thread]] = {}
        for thread in self.threads[1:]:
            assert thread.parent is not None
            forks.setdefault(thread.parent, []).append(thread)

        waiting = {parent: iter(children) for parent, children in forks.items()}
        stack = [(self.threads[0], 0)]  # threads that the place lies in, and how much of each was read
        while stack:
            thread, start = stack[-1]
            child = next(waiting.get(thread.index, iter(())), None)
            if child is None:
                stack.pop()
                yield thread, thread.tokens[start:], True
            else:
                stack[-1] = (thread, child.fork_position)
                stack.append((child, 0))
                yield thread, thread.tokens[start : child.fork_position], False

    def reading_order(self) -> Iterator[tuple[int, list[int]]]:
        """Yield ``(thread index, tokens)`` depth first: node, its detail, its next sibling."""
        return ((thread.index, tokens) for thread, tokens, _ in self.segments() if tokens)

    @property
    def token_ids(self) -> list[int]:
        """The answer's tokens in reading order, control tokens and EOS left out."""
        return [token for _, tokens in self.reading_order() for token in tokens]

    @property
    def closing_ids(self) -> list[int]:
        """The EOS with which the answer reads last, where every thread ended itself; else nothing."""
        ended = all(thread.finish_reason == "eos" for thread in self.threads)
        return [eos] if ended and (eos := self.threads[0].eos_token_id) is not None else []

    def text(self, tokenizer: Decodes, joint: str | None = None) -> str:
        """Return the answer's text: the plain concatenation in reading order.

        Args:
            joint: in place of the tree's own.
        """
        joint = self.joint if joint is None else joint
        return segments_text((tokens for _, tokens in self.reading_order()), tokenizer, joint)

    def to_dict(self) -> dict[str, object]:
        """Return plain lists and numbers that JSON can hold, all but ``scores`` and ``logits``; see :meth:`from_dict`."""
        kept = [{name: value for name, value in vars(one).items() if name not in _TENSORS} for one in self.threads]
        return {"threads": kept, "stopped_by": self.stopped_by} | ({"joint": self.joint} if self.joint else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Self:
        """Build the tree that :meth:`to_dict` wrote down.

        Raises:
            DataError: if it did not.
        """
        given = values.get("threads") if isinstance(values, Mapping) else None
        if not isinstance(given, list) or not given:
            raise DataError(f"a tree is a dict with threads, a list with one at least, got {str(values)[:80]}")
        threads: list[Thread] = []
        forked: dict[int, int] = {}  # where each thread forked last
        for one in given:
            threads.append(_read_thread(one, threads, forked))
        stopped_by, joint = values.get("stopped_by"), values.get("joint", "")
        if not (stopped_by is None or (_is_count(stopped_by) and stopped_by < len(threads))) or not isinstance(joint, str):
            raise DataError(f"a tree has stopped_by {str(stopped_by)[:40]} and joint {str(joint)[:40]!r}; the one is the "
                            f"index of one of its {len(threads)} threads or null, the other a text")  # fmt: skip
        return cls(threads, stopped_by, joint)


_COUNTS = ("index", "fork_position", "depth", "start", "drafts", "proposed", "accepted")
_IDS = ("path_ids", "tokens", "injected", "unread")


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_thread(values: object, earlier: Sequence[Thread], forked: dict[int, int]) -> Thread:
    """Return the thread that a dict tells of; ``earlier`` are those before it, of which each last ``forked`` where it says.

    Raises:
        DataError: if it is none that may follow them.
    """
    number = len(earlier)
    if not isinstance(values, Mapping) or not values.keys() <= {one.name for one in fields(Thread)} - {*_TENSORS}:
        raise DataError(f"thread {number} of a tree is {str(values)[:80]}; a dict of the fields of a Thread is wanted")
    try:
        thread = Thread(**values)
    except TypeError as error:  # one is missing
        raise DataError(f"thread {number} of a tree lacks a field: {error}") from error
    lists = [getattr(thread, name) for name in _IDS]
    logprobs = [] if thread.logprobs is None else thread.logprobs
    kinds = (
        all(_is_count(getattr(thread, name)) for name in _COUNTS)
        and all(isinstance(ids, list) and all(map(_is_count, ids)) for ids in lists)
        and (thread.eos_token_id is None or _is_count(thread.eos_token_id))
        and thread.finish_reason in (None, *get_args(FinishReason))
        and isinstance(logprobs, list) and all(isinstance(one, float | int) for one in logprobs)
    )  # fmt: skip
    if not kinds or thread.index != number or (thread.parent is None) != (number == 0):
        raise DataError(f"thread {number} of a tree has a field of another kind, or a wrong index or parent")
    if thread.parent is not None:
        if not _is_count(thread.parent) or thread.parent >= number:
            raise DataError(
                f"thread {number} of a tree has the parent {str(thread.parent)[:40]}, none of those before it"
            )
        if not forked.get(thread.parent, 0) <= thread.fork_position <= len(earlier[thread.parent].tokens):
            raise DataError(f"thread {number} of a tree forks at {thread.fork_position}, where its parent does not")
        forked[thread.parent] = thread.fork_position
    return thread


def segments_text(segments: Iterable[list[int]], tokenizer: Decodes, joint: str) -> str:
    """Return the text of segments in reading order, with ``joint`` between two neither of which has a space there."""
    if not joint:
        return tokenizer.decode([token for tokens in segments for token in tokens], skip_special_tokens=True)
    return "".join(segment_texts(segments, tokenizer, joint))


def segment_texts(segments: Iterable[list[int]], tokenizer: Decodes, joint: str) -> Iterator[str]:
    """Yield what each of the segments adds to their text."""
    ids, whole, text = list[int](), "", ""
    for tokens in segments:  # decoded from the start: a segment alone may lose its first space
        ids += tokens
        new = tokenizer.decode(ids, skip_special_tokens=True)[len(whole) :]
        whole += new
        piece = joined(text, new, joint)
        text += piece
        yield piece


def joined(text: str, new: str, joint: str) -> str:
    """Return ``new``, a segment that follows ``text``, with ``joint`` before it unless there is a space or nothing.

    >>> joined("1. Oak:", "it grows", "/"), joined("1. Oak:", " it grows", "/"), joined("", "1. Oak:", "/")
    ('/it grows', ' it grows', '1. Oak:')
    """
    apart = not text or not new or text[-1].isspace() or new[0].isspace()
    return new if apart else joint + new


class ReadingCursor:
    """Reads a tree that still grows, in reading order, each token once, up to the cut of an answer that was cut.

    >>> tree = ParagraphTree([Thread(0, None, 0, 1, [], tokens=[1, 2])])
    >>> cursor = ReadingCursor(tree)
    >>> [thread.tokens[place] for thread, place in cursor.advance()]
    [1, 2]
    >>> tree.threads.append(Thread(1, 0, 2, 2, [], tokens=[7]))
    >>> tree.threads[0].tokens.append(3)
    >>> [thread.tokens[place] for thread, place in cursor.advance()]
    [7]
    >>> tree.threads[1].finish_reason = "eos"
    >>> [thread.tokens[place] for thread, place in cursor.advance()]
    [3]
    """

    def __init__(self, tree: ParagraphTree) -> None:
        self._tree = tree
        self._forks: dict[int, list[Thread]] = {}  # of each thread, those that were not read yet, in reading order
        self._known = 1
        self._stack = [(tree.threads[0], 0)]  # threads that the place lies in, and how much of each was read

    @property
    def at_end(self) -> bool:
        """Has everything been read, and nothing can follow?"""
        return not self._stack

    def advance(self) -> Iterator[tuple[Thread, int]]:
        """Yield ``(thread, place in its tokens)`` for what reads next, up to where the first unfinished thread goes on."""
        for thread in self._tree.threads[self._known :]:
            assert thread.parent is not None
            self._forks.setdefault(thread.parent, []).append(thread)
        self._known = len(self._tree.threads)
        while self._stack:
            thread, position = self._stack[-1]
            forks = self._forks.get(thread.index)
            if forks and forks[0].fork_position == position:
                self._stack.append((forks.pop(0), 0))
            elif position < len(thread.tokens):
                self._stack[-1] = (thread, position + 1)
                yield thread, position
            elif thread.finish_reason is None:
                return
            else:
                self._stack = [] if thread.index == self._tree.stopped_by else self._stack[:-1]
