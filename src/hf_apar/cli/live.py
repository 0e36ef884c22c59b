"""A live view of an answer while its threads write it, for terminals (needs ``rich``)."""

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_apar.cli.picture import Picture
from hf_apar.streaming import AparStreamer
from hf_apar.text.encoding import answer_text, decode_text
from hf_apar.tree.threads import Decodes, joined, segments_text

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta", "bright_yellow")
CURSOR = "▌"
UNFINISHED_CHARACTER = "\ufffd"
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])  # all but tab and newline


@dataclass
class _Segment:
    """Tokens of one thread that stand next to each other in the answer; the text is decoded once per change."""

    tokens: list[int] = field(default_factory=list)
    decoded: int = 0
    text: str = ""

    def read(self, tokenizer: PreTrainedTokenizerBase) -> str:
        if self.decoded < len(self.tokens):
            self.text = decode_text(tokenizer, self.tokens)
            self.decoded = len(self.tokens)
        return self.text


@dataclass
class _Branch:
    """A thread as the view knows it: its segments, and between them the threads that it forked."""

    parts: "list[_Segment | _Branch]" = field(default_factory=lambda: [_Segment()])
    colour: str = COLOURS[0]
    live: bool = True

    @property
    def end(self) -> _Segment:
        """The segment that grows: a branch always ends in one."""
        assert isinstance(self.parts[-1], _Segment)
        return self.parts[-1]

    def fork(self, child: "_Branch") -> None:
        self.parts += [child, _Segment()]


class TreeView(AparStreamer):
    """The tree of one answer in reading order, built from what a streamer is told.

    Args:
        tokenizer: turns tokens into text.
        row: which answer of the batch is followed; the others are ignored.
        joint: of :attr:`AparConfig.joint <hf_apar.AparConfig>`: what stands between two segments without a space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, row: int = 0, joint: str = "") -> None:
        self.tokenizer, self.row, self.joint = tokenizer, row, joint
        self._branches: dict[int, _Branch] = {}

    def begin_thread(self, row: int, thread: int, parent: int | None) -> None:
        if row != self.row:
            return
        branch = _Branch(colour=COLOURS[len(self._branches) % len(COLOURS)])
        if parent is not None:
            self._branches[parent].fork(branch)
        self._branches[thread] = branch

    def put_token(self, row: int, thread: int, parent: int | None, token: int) -> None:
        if row == self.row:
            self._branches[thread].end.tokens.append(token)

    def end_thread(self, row: int, thread: int, finish_reason: str) -> None:
        if row == self.row:
            self._branches[thread].live = False

    def end(self) -> None:
        for branch in self._branches.values():
            branch.live = False

    def render(self) -> Text:
        """Return the answer so far: a live thread in its colour with a cursor where it grows, finished text plain.

        Control characters are left out: a model's text shall not command a terminal.
        """
        text = Text()
        if self._branches:
            self._append(text, next(iter(self._branches.values())))
        return text

    def token_ids(self) -> list[int]:
        """Return the tokens of the answer so far, in reading order."""
        return [token for tokens in self._segments() for token in tokens]

    def text(self) -> str:
        """Return the text of the answer so far, as :meth:`ParagraphTree.text <hf_apar.ParagraphTree.text>` does."""
        return segments_text(self._segments(), cast(Decodes, self.tokenizer), self.joint)

    def _segments(self) -> Iterator[list[int]]:
        return self._read(next(iter(self._branches.values()))) if self._branches else iter(())

    def _read(self, branch: _Branch) -> Iterator[list[int]]:
        for part in branch.parts:
            if isinstance(part, _Branch):
                yield from self._read(part)
            else:
                yield part.tokens

    def _append(self, text: Text, branch: _Branch) -> None:
        style = branch.colour if branch.live else ""
        for part in branch.parts:
            if isinstance(part, _Branch):
                self._append(text, part)
            else:
                words = part.read(self.tokenizer)
                words = words if text else answer_text(self.tokenizer, words)
                words = words.rstrip(UNFINISHED_CHARACTER) if branch.live else words
                words = joined(text.plain.rstrip(CURSOR), words, self.joint) if self.joint else words
                text.append(words.translate(_CONTROLS), style=style)
        if branch.live:
            text.append(CURSOR, style=f"{branch.colour} blink")


class LiveTree(TreeView):
    """Shows the answer on ``console`` while it grows, and the whole of it once it is finished or interrupted.

    While it grows, only the last lines that fit the terminal are shown; lines end between words. Where the output is no
    terminal, only the finished text is written, byte for byte; a terminal gets no control characters but tab and newline.

    Args:
        tokenizer: turns tokens into text.
        console: where to write; default the standard output.
        refresh_seconds: shortest time between two pictures: drawing must not slow the decoding down.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        console: Console | None = None,
        row: int = 0,
        joint: str = "",
        refresh_seconds: float = 0.1,
    ) -> None:
        super().__init__(tokenizer, row=row, joint=joint)
        self.console = console or standard_output()
        self.refresh_seconds = refresh_seconds
        self._picture = Picture(self.console) if self.console.is_terminal and not self.console.is_dumb_terminal else None
        self._drawn = 0.0
        self._left = False

    def put_token(self, row: int, thread: int, parent: int | None, token: int) -> None:
        super().put_token(row, thread, parent, token)
        if self._picture is None or time.monotonic() - self._drawn < self.refresh_seconds:
            return
        self._picture.draw(self.render())
        self._drawn = time.monotonic()

    def end(self) -> None:
        super().end()
        self._leave()

    def close(self) -> None:
        """Leave what was written on the console, if the answer did not end by itself; safe to call twice."""
        super().end()
        if self.token_ids():
            self._leave()

    def _leave(self) -> None:
        """Put the text in the place of the live picture, once."""
        if self._left:
            return
        self._left = True
        if self._picture is not None:
            self._picture.erase()
        text = self.text()
        if self.console.is_terminal:
            self.console.print(Text(text.translate(_CONTROLS)))
        else:
            self.console.file.write(f"{text}\n")  # as it is: rich drops control characters, such as a carriage return
            self.console.file.flush()


class LiveText:
    """A plain streamer, as ``TextStreamer``, that shows the answer as :class:`LiveTree` does: a tree of one thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, console: Console | None = None) -> None:
        self.view = LiveTree(tokenizer, console=console)
        self._prompt_passed = False

    def put(self, value: Tensor) -> None:
        """Take the prompt first, which is not shown, then each token: (1,) or (1, tokens)."""
        if not self._prompt_passed:
            self._prompt_passed = True
            self.view.begin_thread(self.view.row, 0, None)
            return
        for token in value.flatten().tolist():
            self.view.put_token(self.view.row, 0, None, token)

    def end(self) -> None:
        self.view.end()

    def text(self) -> str:
        """Return the text of the answer so far."""
        return self.view.text()

    def close(self) -> None:
        """Leave what was written on the console; safe to call twice."""
        self.view.close()


def standard_output() -> Console:
    """Return a console that is a terminal where it really is one: ``FORCE_COLOR`` must not put pictures into a file."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    console = Console(highlight=False, force_terminal=terminal)
    if not console.is_dumb_terminal:
        return console
    width, height = shutil.get_terminal_size()  # rich takes any dumb terminal for one of 80 columns
    return Console(highlight=False, force_terminal=terminal, width=width, height=height)
