"""A JSON array read item by item, so that a file of hundreds of megabytes is never in memory as a whole."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from hf_apar.errors import DataError

CHUNK = 1 << 20  # bytes read at once; an item that is longer is read in chunks that double, so that it is parsed a few times
_MARGIN = 16  # letters: no escape, number or literal that breaks off is longer, long numbers aside
_SPACE = " \t\r\n\ufeff"  # a byte order mark among it
_LONGEST = 16 * CHUNK  # letters: so far the end of an item that is no JSON is looked for
_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["{}\[\]]', re.DOTALL)  # a string whole, or a mark


class UnreadError(DataError):
    """The rest of a file cannot be read, however many records it holds."""


def array_items(file: BinaryIO, chunk: int = CHUNK) -> Iterator[object]:
    """Yield the items of the JSON array that ``file`` holds, an :class:`UnreadError` last where the rest cannot be read.

    Bytes that are no UTF-8 become lone surrogates, so that they spoil the item that they stand in and no other. An object
    or array that is no JSON, or is nested too deeply, comes as its bytes.
    """
    text = _Text(file, chunk)
    try:
        yield from _items(text)
    except ValueError:
        yield UnreadError(
            f"the array breaks off, or is no JSON here: nothing from byte {text.byte} on has been read; mend it there"
        )
    else:
        if text.next_letter():
            yield UnreadError(
                f"more follows the array, and is not read from byte {text.byte} on; give one array, or one object a line"
            )


def _items(text: "_Text") -> Iterator[object]:
    text.skip("[")
    if text.next_letter() == "]":
        text.skip("]")
        return
    while True:
        yield text.value()
        if text.next_letter() == "]":
            text.skip("]")
            return
        text.skip(",")


class _Text:
    """The letters of a file that have not been parsed yet, and where the next value begins among them."""

    def __init__(self, file: BinaryIO, chunk: int) -> None:
        self.file, self.chunk = file, chunk
        self.text, self.place, self.at_end = "", 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.parse = json.JSONDecoder(strict=False).raw_decode  # tabs and line breaks may stand in strings

    @property
    def byte(self) -> int:
        """How many bytes of the file stand before the place."""
        unread = len(self.text[self.place :].encode("utf-8", "surrogateescape"))
        return self.file.tell() - len(self.decoder.getstate()[0]) - unread

    def read(self) -> None:
        """Read on: as much again as there is, so that the work is linear in a value's length."""
        data = self.file.read(max(self.chunk, len(self.text) - self.place))
        self.at_end = not data
        self.text, self.place = self.text[self.place :] + self.decoder.decode(data, final=self.at_end), 0

    def next_letter(self) -> str:
        """Return the next letter that is no white space, "" at the end."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in _SPACE:
                self.place += 1
            if self.place < len(self.text):
                return self.text[self.place]
            if self.at_end:
                return ""
            self.read()

    def skip(self, letter: str) -> None:
        """Go past ``letter``.

        Raises:
            ValueError: if another one comes next.
        """
        if self.next_letter() != letter:
            raise ValueError(f"wanted {letter!r}")
        self.place += 1

    def value(self) -> object:
        """Return the next value, or the bytes of one that is no JSON.

        Raises:
            ValueError: if it has no end.
        """
        self.next_letter()
        while True:
            try:
                value, end = self.parse(self.text, self.place)
            except (ValueError, RecursionError) as error:
                if self.at_end or not self._may_go_on(error):
                    return self._unparsed()
            else:
                if end < len(self.text) - _MARGIN or self.at_end:  # a number may go on after what has been read
                    self.place = end
                    return value
            self.read()

    def _may_go_on(self, error: Exception) -> bool:
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _MARGIN

    def _unparsed(self) -> bytes:
        """Go past an object or array that is no JSON, and return its bytes.

        Raises:
            ValueError: if its end is not found.
        """
        while (end := _end(self.text, self.place)) is None:
            if self.at_end or len(self.text) - self.place > _LONGEST:
                raise ValueError("no end")
            self.read()
        found, self.place = self.text[self.place : end], end
        return found.encode("utf-8", "surrogateescape")


def _end(text: str, start: int) -> int | None:
    """Return where the object or array ends that begins at ``start``, ``None`` if not in ``text``: its brackets tell.

    >>> _end('{"a": "}", [1 2}, {}', 0)
    16

    Raises:
        ValueError: if none begins there, or what is around it ends first.
    """
    if text[start : start + 1] not in ("{", "["):
        raise ValueError("neither object nor array")
    opened: list[str] = []
    braces = 0  # among them
    for found in _BRACKET.finditer(text, start):
        mark = found[0]
        if mark in "{[":
            opened.append(mark)
            braces += mark == "{"
        elif mark == '"':  # a string that is not complete yet
            return None
        elif mark in "}]":
            begun = "{" if mark == "}" else "["
            if (begun == "{" and not braces) or (begun == "[" and len(opened) == braces):
                raise ValueError("what is around it ends")
            while (last := opened.pop()) != begun:  # what was left open within ends too
                braces -= last == "{"
            braces -= last == "{"
            if not opened:
                return found.end()
    return None
