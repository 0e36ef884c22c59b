"""A live view of an answer while its threads write it, for terminals (needs ``rich``)."""

import shutil
import sys
import time
from collections.abc import Sequence
from typing import cast

from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_apar.cli.picture import Picture
from hf_apar.streaming import AparStreamer
from hf_apar.text.encoding import answer_text, decode_text
from hf_apar.tree.display import CURSOR
from hf_apar.tree.threads import Decodes, ParagraphTree, Thread, joined

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta", "bright_yellow")
UNFINISHED_CHARACTER = "\ufffd"
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])  # all but tab and newline


def coloured(tree: ParagraphTree, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Return the answer so far: a thread that lives or waits in its colour with a cursor where it grows, others plain.

    Control characters are left out: a model's text shall not command a terminal.
    """
    text = Text()
    for thread, tokens, is_last in tree.segments():
        colour = "" if thread.finish_reason else COLOURS[thread.index % len(COLOURS)]
        words = decode_text(tokenizer, tokens)
        words = words if text else answer_text(tokenizer, words)
        words = words.rstrip(UNFINISHED_CHARACTER) if colour else words
        words = joined(text.plain.rstrip(CURSOR), words, tree.joint) if tree.joint else words
        text.append(words.translate(_CONTROLS), style=colour)
        if colour and is_last:
            text.append(CURSOR, style=f"{colour} blink")
    return text


class LiveTree(AparStreamer):
    """Shows the answer on ``console`` while it grows, and the whole of it once it is finished or interrupted.

    While it grows, only the last lines that fit the terminal are shown; lines end between words. Where the output is no
    terminal, only the finished text is written, byte for byte; a terminal gets no control characters but tab and newline.
    Of a batch the first answer is followed.

    Args:
        tokenizer: turns tokens into text.
        console: where to write; default the standard output.
        refresh_seconds: shortest time between two pictures: drawing must not slow the decoding down.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, console: Console | None = None, refresh_seconds: float = 0.1
    ) -> None:
        self.tokenizer, self.refresh_seconds = tokenizer, refresh_seconds
        self.console = console or standard_output()
        self._tree: ParagraphTree | None = None
        self._picture = Picture(self.console) if self.console.is_terminal and not self.console.is_dumb_terminal else None
        self._drawn = 0.0
        self._left = False

    def text(self) -> str:
        """Return the text of the answer so far."""
        return "" if self._tree is None else self._tree.text(cast(Decodes, self.tokenizer))

    def end_step(self, trees: Sequence[ParagraphTree]) -> None:
        self._tree = trees[0]
        if self._picture is not None and time.monotonic() - self._drawn >= self.refresh_seconds:
            self._picture.draw(coloured(self._tree, self.tokenizer))
            self._drawn = time.monotonic()

    def end(self) -> None:
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

    def close(self) -> None:
        """Leave what was written on the console, if the answer did not end by itself; safe to call twice."""
        if self._tree is not None and self._tree.token_ids:
            self.end()


class LiveText(LiveTree):
    """The same for a plain answer, as transformers' streamers: a tree of one thread."""

    def put(self, value: Tensor) -> None:
        """Take the prompt first, which is not shown, then each token: (1,) or (1, tokens)."""
        if self._tree is None:
            self._tree = ParagraphTree([Thread(0, None, 0, 1, [])])
            return
        self._tree.threads[0].tokens += value.flatten().tolist()
        self.end_step([self._tree])


def standard_output() -> Console:
    """Return a console that is a terminal where it really is one: ``FORCE_COLOR`` must not put pictures into a file."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    console = Console(highlight=False, force_terminal=terminal)
    if not console.is_dumb_terminal:
        return console
    width, height = shutil.get_terminal_size()  # rich takes any dumb terminal for one of 80 columns
    return Console(highlight=False, force_terminal=terminal, width=width, height=height)
