"""The live view on terminals that are resized, have no colours, or know no commands; a class below plays the terminal."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from hf_apar.cli.live import CURSOR, LiveTree, coloured
from hf_apar.tree.threads import ParagraphTree, Thread

ABOVE = "what stood there before"
WORDS = "Oak trees live long.\n\n  - Birch trees grow fast, and 日本語 has letters of two columns.\n- whole: " + "x" * 150


class Letters:
    def encode(self, text, **options):
        return list(map(ord, text))

    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens))


class Terminal(io.StringIO):
    """Keeps rows of text as terminals do, and breaks them anew when it becomes narrower or wider."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows, self.row, self.cursor, self.colours = width, [""], 0, True, set()
        self.goes_on = [False]  # was this row broken because it was full?

    def write(self, text):
        for part in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|[^\x1b]", text):
            self.do(part)
        return len(text)

    def do(self, part):
        if part == "\x1b[1A":
            self.row -= 1
        elif part == "\x1b[2K":
            self.rows[self.row], self.goes_on[self.row] = "", False
        elif part in ("\x1b[?25l", "\x1b[?25h"):
            self.cursor = part.endswith("h")
        elif part.endswith("m") and len(part) > 1:
            self.colours.add(part)
        elif part == "\n":
            self.next_row()
        elif part != "\r":
            assert not part.startswith("\x1b"), part
            if cell_len(self.rows[self.row] + part) > self.width:
                self.goes_on[self.row] = True
                self.next_row()
            self.rows[self.row] += part

    def next_row(self):
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")
            self.goes_on.append(False)

    def resize(self, width):
        rows = list(zip(self.rows, self.goes_on, strict=True))[: self.row + 1]
        lines = "".join(row + "\n" * (not on) for row, on in rows)
        self.width, self.rows, self.row, self.goes_on = width, [""], 0, [False]
        self.write(lines.removesuffix("\n"))


class Writer:
    """Writes an answer in one thread, a letter a step, and shows each step to ``live``."""

    def __init__(self, live):
        self.live, self.tree = live, ParagraphTree([Thread(0, None, 0, 1, [])])

    def write(self, text):
        for letter in text:
            self.tree.threads[0].tokens.append(ord(letter))
            self.live.end_step([self.tree])


def words_of(rows):
    return "".join(rows).replace(" ", "").replace(CURSOR, "")


@pytest.mark.parametrize("widths", [(80,), (120, 40), (40, 120), (80, 23, 61), (30, 200, 31)])
def test_each_picture_takes_the_place_of_the_one_before_whatever_the_width_becomes(widths):
    """The oracle is what there is to show: what stood above stays, the text is there once, words end where rows end."""
    terminal = Terminal(widths[0])
    console = Console(file=terminal, force_terminal=True, width=widths[0], height=50, color_system=None)
    terminal.write(f"{ABOVE}\n")
    live = LiveTree(Letters(), console=console, refresh_seconds=0.0)
    writer = Writer(live)
    share = len(WORDS) // len(widths) + 1
    for number, width in enumerate(widths):
        terminal.resize(width)
        console.width = width
        writer.write(WORDS[number * share : (number + 1) * share])
        assert words_of(terminal.rows) == words_of([ABOVE, *WORDS[: (number + 1) * share].split("\n")])
        assert not terminal.cursor
    live.end()
    assert terminal.cursor and terminal.colours == set()
    after = terminal.rows[len(ABOVE) // widths[-1] + 1 :]
    assert words_of(after) == words_of(WORDS.split("\n"))
    whole = {word for line in WORDS.split("\n") for word in line.split()}
    torn = {word for row in after for word in row.split()} - whole
    assert all(set(word) == {"x"} for word in torn), "only what is wider than the terminal is broken"


def test_a_picture_is_no_higher_than_the_terminal():
    terminal = Terminal(10)
    console = Console(file=terminal, force_terminal=True, width=10, height=4, color_system=None)
    live = LiveTree(Letters(), console=console, refresh_seconds=0.0)
    Writer(live).write("1\n2\n3\n4\n5\n6")
    assert terminal.rows == ["4", "5", f"6{CURSOR}"]
    live.end()
    assert terminal.rows == ["1", "2", "3", "4", "5", "6", ""]


def test_without_colours_cursors_tell_where_threads_write(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal(40)
    live = LiveTree(Letters(), console=Console(file=terminal, force_terminal=True, width=40), refresh_seconds=0.0)
    root, child = Thread(0, None, 0, 1, [], tokens=[*b"ab"]), Thread(1, 0, 1, 2, [], tokens=[*b"xy"])
    tree = ParagraphTree([root, child])
    live.end_step([tree])
    assert terminal.rows == [f"axy{CURSOR}b{CURSOR}"] == [coloured(tree, Letters()).plain]
    assert not any(re.search(r"\b[349]\d\b", one) for one in terminal.colours)


def test_a_dumb_terminal_gets_the_finished_text_between_words_and_no_commands(monkeypatch):
    class Dumb(io.StringIO):
        def isatty(self):
            return True

    output = Dumb()
    monkeypatch.setattr("sys.stdout", output)
    for name, value in {"TERM": "dumb", "COLUMNS": "24", "LINES": "10"}.items():
        monkeypatch.setenv(name, value)
    live = LiveTree(Letters(), refresh_seconds=0.0)
    Writer(live).write("Oak trees live long.\n\n  - Birch trees grow fast")
    assert output.getvalue() == ""
    live.end()
    assert output.getvalue() == "Oak trees live long.\n\n  - Birch trees grow \nfast\n"
