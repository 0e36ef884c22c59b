"""A JSON array read item by item, so that a file of hundreds of megabytes is never in memory as a whole."""

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

from hf_apar.errors import DataError

CHUNK = 1 << 20  # bytes read at once; an item that is longer is read in chunks that double, so that it is parsed a few times
_MARGIN = 16  # letters: no escape, number or literal that breaks off is longer, long numbers aside
_SPACE = " \t\r\n\ufeff"  # a byte order mark among it


def array_items(file: BinaryIO, chunk: int = CHUNK) -> Iterator[object]:
    """Yield the items of the JSON array that ``file`` holds, a :class:`DataError` last where the rest cannot be read.

    Bytes that are no UTF-8 become lone surrogates, so that they spoil the item that they stand in and no other.
    """
    text = _Text(file, chunk)
    try:
        yield from _items(text)
    except RecursionError:
        yield DataError("the array holds a record that is nested too deeply; nothing after it can be read")
    except ValueError:
        yield DataError("the array breaks off, or is no JSON from here on; nothing after it can be read")
    else:
        if text.next_letter():
            yield DataError("more follows the array, which cannot be read; give one array, or one object a line")


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
        self.parse = json.JSONDecoder().raw_decode

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
        """Return the next value.

        Raises:
            ValueError: if there is none.
        """
        self.next_letter()
        while True:
            try:
                value, end = self.parse(self.text, self.place)
            except json.JSONDecodeError as error:
                if self.at_end or not self._may_go_on(error):
                    raise
            else:
                if end < len(self.text) - _MARGIN or self.at_end:  # a number may go on after what has been read
                    self.place = end
                    return value
            self.read()

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _MARGIN
