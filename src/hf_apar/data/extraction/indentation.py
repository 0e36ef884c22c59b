"""Lists as models write them: what belongs to an item is indented as Markdown asks, so that the parser finds it there.

Models write details below a title without blanks before them, or with three where a marker of two digits asks for four.
Markdown ends the list there, and the next item begins another one. Blanks are put in and nothing else: lines stay lines, so
that what the parser finds in them stands in the same lines of the answer. Where it is doubtful what belongs to an item,
its list stays as it is.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hf_apar.data.extraction.cues import CONCLUSION, count_words
from hf_apar.data.extraction.parts import MAX_TITLE_WORDS, MIN_ITEMS

_ITEM = re.compile(r"( {0,3})(?:([-*+])|(\d{1,3})([.)]))( {1,4})(\S.*)")
_ITEMS = re.compile(r"^ {0,3}(?:[-*+]|\d{1,3}[.)]) {1,4}\S", re.MULTILINE)
_ANY_ITEM = re.compile(r"\s*(?:[-*+]|\d{1,3}[.)])\s")
_BOLD_ALONE = re.compile(r"(\*\*|__)[^*_]{1,200}\1[:：]?\s*\Z")
_LINE_ALONE = re.compile(r"[^`]{0,200}[^\s.!?;,。！？।؟،`]\s*\Z")
_BOUNDARY = re.compile(r" {0,3}(?:#{1,6}\s|(?:[-*_] *){3,}\s*\Z|```|~~~)")


@dataclass(frozen=True)
class _Item:
    """The line that an item of a list begins with, and the column at which what belongs to it begins."""

    line: int
    kind: str  # the bullet, or what ends the number
    number: int | None
    indent: int
    column: int
    text: str

    @property
    def is_bold_title(self) -> bool:
        return _BOLD_ALONE.match(self.text) is not None and count_words(self.text) <= MAX_TITLE_WORDS

    @property
    def is_title(self) -> bool:
        """Does its detail stand on other lines? A bullet and a plain line may as well be all there is."""
        plain = self.number is not None and _LINE_ALONE.match(self.text) and count_words(self.text) <= MAX_TITLE_WORDS
        return self.is_bold_title or bool(plain)

    def is_beside(self, other: "_Item") -> bool:
        return self.kind == other.kind and abs(self.indent - other.indent) < 2

    def precedes(self, other: "_Item") -> bool:
        """Is ``other`` the next of the same list? Numbers go up, or are all 1 as converters from HTML write them."""
        counts = self.number is None or other.number == self.number + 1 or other.number == self.number == 1
        return self.kind == other.kind and self.indent == other.indent and counts


def indented(answer: str) -> str:
    """Return ``answer`` with blanks before the lines that belong to items, where Markdown wants them and they lack.

    >>> indented("1. **Oak**\\n\\nIt grows.\\n\\n2. **Ash**\\n\\nIt burns.\\n\\n3. **Elm**\\n\\nIt rots.").splitlines()[2::4]
    ['   It grows.', '   It burns.', '   It rots.']
    """
    if len(_ITEMS.findall(answer)) < MIN_ITEMS:
        return answer
    lines = list(io.StringIO(answer, newline=""))
    items = {item.line: item for item in map(_item, range(len(lines)), lines) if item is not None}
    done = -1
    for line, item in items.items():
        if line > done:
            run = _run(item, items, lines)
            done = max(done, run[-1].line)
            if len(run) >= MIN_ITEMS:
                _indent(run, items, lines)
    return "".join(lines)


def _item(number: int, line: str) -> _Item | None:
    match = _ITEM.match(line)
    if match is None:
        return None
    indent, bullet, count, end, _, text = match.groups()
    return _Item(number, bullet or end, int(count) if count else None, len(indent), match.end(5), text)


def _run(first: _Item, items: dict[int, _Item], lines: Sequence[str]) -> list[_Item]:
    """Return the items of the list that ``first`` begins."""
    run = [first]
    for line in range(first.line + 1, len(lines)):
        item = items.get(line)
        if _BOUNDARY.match(lines[line]):
            break
        if item is None or not run[-1].is_beside(item):
            continue
        if not run[-1].precedes(item) or _shift(run[-1], lines[run[-1].line + 1 : line]) is None:
            break
        run.append(item)
    return run


def _indent(run: Sequence[_Item], items: dict[int, _Item], lines: list[str]) -> None:
    """Put blanks before the lines of the items of ``run``."""
    gaps = [range(this.line + 1, following.line) for this, following in pairwise(run)]
    counts = {len(_blocks([lines[line] for line in gap])) for gap in gaps}
    last = run[-1]
    for item, gap in zip(run, [*gaps, _last_gap(last, counts, items, lines)], strict=True):
        shift = _shift(item, [lines[line] for line in gap]) or 0
        for line in gap if shift else ():
            lines[line] = " " * shift + lines[line] if lines[line].strip() else lines[line]


def _last_gap(last: _Item, counts: set[int], items: dict[int, _Item], lines: Sequence[str]) -> range:
    """Return the lines that belong to the last item: what is indented, else as many blocks as each other item has."""
    end = last.line + 1
    while end < len(lines) and not _BOUNDARY.match(lines[end]) and not (end in items and last.is_beside(items[end])):
        end += 1
    blocks = _blocks(lines[last.line + 1 : end])
    wanted = min(counts) if len(counts) == 1 or len(blocks) == 1 else 0
    clear = [_indent_of(lines[last.line + 1 + block.start]) > last.indent + 1 for block in blocks]
    kept = clear.index(False) if False in clear else len(clear)
    if not kept and len(blocks) >= wanted > 0 and not CONCLUSION.match(lines[last.line + 1 + blocks[wanted - 1].start]):
        kept = wanted
    return range(last.line + 1, last.line + 1 + blocks[kept - 1].stop) if kept else range(0)


def _blocks(lines: Sequence[str]) -> list[range]:
    """Return the lines of each paragraph, and of each list, of which blank lines may be a part."""
    blocks: list[range] = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        is_item = _ANY_ITEM.match(line) is not None
        goes_on = blocks and (number == blocks[-1].stop or (is_item and _ANY_ITEM.match(lines[blocks[-1].start])))
        blocks[-1:] = [range(blocks[-1].start, number + 1)] if goes_on else [*blocks[-1:], range(number, number + 1)]
    return blocks


def _shift(item: _Item, gap: Sequence[str]) -> int | None:
    """Return how many blanks the lines after ``item`` lack; ``None`` if it is doubtful that they belong to it."""
    anchors = [
        line
        for before, line in pairwise([item.text, *gap])
        if line.strip() and (not before.strip() or _ANY_ITEM.match(line))  # others go on from the line before
    ]
    if not anchors or any("\t" in line[: len(line) - len(line.lstrip())] for line in anchors):
        return 0
    least = min(map(_indent_of, anchors))
    lacking = max(item.column - least, 0)
    if least > item.indent or not lacking:
        return lacking
    prose = [line for line in anchors if not _ANY_ITEM.match(line)]
    belongs = item.is_title or (item.number is not None and not prose)
    leads_on = bool(prose) and prose[-1] is anchors[-1] and prose[-1].rstrip().endswith((":", "："))  # to the next item
    is_even = all(_indent_of(line) == least for line in prose) and least == item.indent
    return lacking if belongs and is_even and not leads_on else None


def _indent_of(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
