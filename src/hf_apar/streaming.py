"""Tokens as they are made: every thread's for an :class:`AparStreamer`, in reading order for a plain streamer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from hf_apar.tree.threads import FinishReason, ParagraphTree, ReadingCursor, Thread


class AparStreamer:
    """Gets every token as it is made; override what you need.

    A child's place in the answer is right after what its parent has written when :meth:`begin_thread` is called for it.
    """

    def begin_thread(self, row: int, thread: int, parent: int | None) -> None:
        """A thread has been forked, or is the root (``parent=None``)."""

    def put_token(self, row: int, thread: int, parent: int | None, token: int) -> None:
        """A thread wrote ``token``; control tokens and EOS are left out."""

    def end_thread(self, row: int, thread: int, finish_reason: FinishReason) -> None:
        """A thread has ended."""

    def end_step(self, trees: Sequence[ParagraphTree]) -> None:
        """A forward pass is over, and all that it gave has been told.

        Args:
            trees: of all rows, as they stand; they go on growing, and must not be changed.
        """

    def end(self) -> None:
        """The whole batch has ended."""


class Broadcast:
    """Tells streamers what is new in the trees since the last step.

    Args:
        streamer: an :class:`AparStreamer`, anything with ``put`` and ``end`` as transformers' streamers, several of them in
            a list, or ``None``; a plain streamer gets an EOS last where every thread ended itself.
    """

    def __init__(self, streamer: object | None) -> None:
        self.streamers = as_list(streamer)
        self._told: dict[tuple[int, int, int], int] = {}  # (streamer, row, thread) -> tokens told
        self._known: dict[tuple[int, int], int] = {}  # (streamer, row) -> threads told
        self._ended: set[tuple[int, int, int]] = set()
        self._cursor: ReadingCursor | None = None

    def update(self, trees: Sequence[ParagraphTree]) -> None:
        """Pass on what was written since the last call."""
        if not self.streamers:
            return
        new = self._newly_settled(trees[0])
        for number, streamer in enumerate(self.streamers):
            if isinstance(streamer, AparStreamer):
                for row, tree in enumerate(trees):
                    self._tell(streamer, number, row, tree)
                streamer.end_step(trees)
            else:
                for token in new:
                    streamer.put(torch.tensor([token]))  # on the CPU, as generate does

    def end(self) -> None:
        """Tell the streamers that the batch has ended."""
        for streamer in self.streamers:
            streamer.end()

    def _newly_settled(self, tree: ParagraphTree) -> list[int]:
        """Return what reads next since the last call, the answer's EOS last."""
        self._cursor = self._cursor or ReadingCursor(tree)
        if self._cursor.at_end:
            return []
        ids = [thread.tokens[place] for thread, place in self._cursor.advance()]
        return ids + tree.closing_ids if self._cursor.at_end else ids

    def _tell(self, streamer: AparStreamer, number: int, row: int, tree: ParagraphTree) -> None:
        forks: dict[int, list[Thread]] = {}  # by their parent
        for child in tree.threads[max(self._known.get((number, row), 0), 1) :]:
            assert child.parent is not None
            forks.setdefault(child.parent, []).append(child)
        self._known[number, row] = len(tree.threads)
        for thread in tree.threads:  # a fork is told after the parent's tokens before it
            key = (number, row, thread.index)
            if key in self._ended:
                continue
            if key not in self._told:
                self._told[key] = 0
                streamer.begin_thread(row, thread.index, thread.parent)
            for position in range(self._told[key], len(thread.tokens) + 1):
                for child in forks.get(thread.index, ()):
                    if child.fork_position == position:
                        self._told[number, row, child.index] = 0
                        streamer.begin_thread(row, child.index, thread.index)
                if position < len(thread.tokens):
                    streamer.put_token(row, thread.index, thread.parent, thread.tokens[position])
            self._told[key] = len(thread.tokens)
            if thread.finish_reason is not None:
                self._ended.add(key)
                streamer.end_thread(row, thread.index, thread.finish_reason)


class PromptRelay:
    """Hands the prompt that ``generate`` puts on to several plain streamers; what follows comes from :class:`Broadcast`."""

    def __init__(self, streamers: Sequence[Any]) -> None:
        self.streamers = streamers

    def put(self, value: Tensor) -> None:
        for streamer in self.streamers:
            streamer.put(value)

    def end(self) -> None:
        """The broadcast ends the streamers."""


@contextmanager
def ended_by_errors(streamer: object | None) -> Iterator[None]:
    """End the streamers if what runs within raises, whatever it is: nobody shall wait for the rest of a broken answer."""
    try:
        yield
    except BaseException:
        for one in as_list(streamer):
            with suppress(Exception):  # it may be the very one that raised
                one.end()
        raise


def as_list(streamer: object | None) -> list[Any]:
    """Return the streamers that a caller named: none, one, or a list of them."""
    if streamer is None:
        return []
    return list(streamer) if isinstance(streamer, list | tuple) else [streamer]
