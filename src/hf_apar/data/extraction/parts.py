"""The parts of a Markdown answer that may fork: items with titles, sections under headings, paragraphs."""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Literal

from markdown_it.token import Token

from hf_apar.data.extraction.cues import CONCLUSION, count_words
from hf_apar.data.extraction.sentences import first_sentence_end

MIN_ITEMS = 3  # titled items that make a list worth forking, sections an article, and paragraphs an essay
MIN_PARAGRAPH_FORKS = 2
MAX_TITLE_WORDS = 12
MIN_DETAIL_WORDS = 5
MIN_REST_WORDS = 6

_COLON = r"(?::(?=\s)|：)"
_SPACE = r"[^\S\n]{0,3}"  # bounded, as titles are: no text takes quadratic time
_DASH = rf"(?:(?=[^\S\n]){_SPACE}[-–—](?=\s)|{_SPACE}——)"
_BOLD_TITLE = re.compile(rf"(\*\*|__)(?P<title>[^*_\n]{{1,200}}?)(?:[:：.。]\1|\1{_SPACE}[:：]|\1{_DASH}|\1(?={_SPACE}\n))")
_BOLD_START = re.compile(r"(\*\*|__)(?P<title>[^*_\n]{1,200}?)\1(?=\s)")
_BOLD_WORDS = re.compile(r"(\*\*|__)[^*_\n]{1,200}\1")
_PLAIN_TITLE = re.compile(rf"(?P<title>[^:：*_`\n]{{1,200}}?)(?:{_COLON}|{_DASH})")
_LINE_TITLE = re.compile(rf"(?P<title>[^\n`]{{0,200}}[^\s.!?;,。！？।؟،]){_SPACE}(?=\n)")  # detail on the lines below it
_TITLES = (_BOLD_TITLE, _PLAIN_TITLE, _LINE_TITLE)
_BOLD_LINE = re.compile(rf"(\*\*|__)(?P<title>[^*_\n]+)\1{_SPACE}[:：]?\s*\Z")
_BOLD_LINE_LEVEL = 7  # below the six of headings
_BLANK_LINES = re.compile(r"(?:[ \t]*(?:\r\n|\r|\n))+")

Span = tuple[int, int]
Kind = Literal["item", "section", "paragraph"]


@dataclass(frozen=True)
class Part:
    """A piece of an answer that may fork.

    Attributes:
        kind: what it is.
        title: what stays in the parent: a title, or a paragraph's first sentence.
        detail: what forks.
        span: where the detail stands in the answer.
        group: the list, the headings of one level or the paragraphs that it belongs to.
        index: its place among them, those without a detail counted too.
        following: the paragraph after a paragraph, else "".
    """

    kind: Kind
    title: str
    detail: str
    span: Span
    group: int
    index: int
    following: str = ""


def find_parts(answer: str, tokens: Sequence[Token]) -> list[Part]:
    """Return the parts of ``answer`` in reading order, each after those that it lies in."""
    source = _Source(answer, tokens)
    parts = [*source.sections(), *source.items()]
    if not parts and not any(token.type == "list_item_open" for token in tokens):
        parts = list(source.paragraphs())
    return sorted(parts, key=lambda part: (part.span[0], -part.span[1]))


def in_large_groups(parts: Sequence[Part]) -> list[Part]:
    """Leave out the groups with too few parts to be worth forking."""
    sizes: dict[int, int] = {}
    for part in parts:
        sizes[part.group] = sizes.get(part.group, 0) + 1
    least = {"item": MIN_ITEMS, "section": MIN_ITEMS, "paragraph": MIN_PARAGRAPH_FORKS}
    return [part for part in parts if sizes[part.group] >= least[part.kind]]


class _Source:
    """An answer, its tokens, and where its lines start."""

    def __init__(self, answer: str, tokens: Sequence[Token]) -> None:
        self.answer = answer
        self.tokens = tokens
        # by the parser's own line ends; the last offset is the end
        self.offsets = [0, *accumulate(len(line) for line in io.StringIO(answer, newline=""))]
        self.top = [
            self._lines(token.map) for token in tokens if token.type == "paragraph_open" and token.level == 0 and token.map
        ]
        last = self.top[-1] if self.top else (len(answer), len(answer))
        ends_it = not answer[last[1] :].strip() and CONCLUSION.match(answer, *last)
        self.end = last[0] if ends_it else len(answer)  # what concludes the answer stays in the root

    def _lines(self, lines: Sequence[int]) -> Span:
        return self.offsets[lines[0]], self.offsets[lines[1]]

    def items(self) -> Iterator[Part]:
        """Yield the items with title and detail of all lists, nested ones included."""
        for group, items in self._lists():
            all_bold = all(start and _BOLD_WORDS.match(self.answer, start, end) for start, end in items)
            forms = (*_TITLES, _BOLD_START) if all_bold else _TITLES  # else a bold word may be stressed, not a title
            for index, (start, end) in enumerate(items):
                title_end = start and self._title_end(start, end, forms)
                if start and title_end:
                    yield from self._part("item", (start, title_end, end), (group, index))

    def _lists(self) -> Iterator[tuple[int, list[tuple[int | None, int]]]]:
        """Yield each list: its number, and of its items where the text begins, if a marker stands before it, and ends."""
        open_lists: list[tuple[int, list[tuple[int | None, int]]]] = []
        started: set[int] = set()  # lines that an item begins: a list within it on the same line is none of ours
        for number, token in enumerate(self.tokens):
            if token.type in ("bullet_list_open", "ordered_list_open"):
                open_lists.append((number, []))
            elif token.type in ("bullet_list_close", "ordered_list_close"):
                yield open_lists.pop()
            elif token.type == "list_item_open" and token.map and token.map[0] not in started:
                started.add(token.map[0])
                start, end = self._lines(token.map)
                marker = _marker(token.info + token.markup).match(self.answer, start, end)
                open_lists[-1][1].append((marker and marker.end(), end))

    def _title_end(self, start: int, end: int, forms: Sequence[re.Pattern[str]]) -> int | None:
        """Where the title ends that stands at ``start``, if one does."""
        for form in forms:
            title = form.match(self.answer, start, end)
            if title is not None and 1 <= count_words(title["title"]) <= MAX_TITLE_WORDS:
                return title.end()
        return None

    def sections(self) -> Iterator[Part]:
        """Yield what stands under each heading, a bold line alone being one too."""
        headings = list(self._headings())
        ends = self._section_ends(headings)
        groups: dict[int, list[int]] = {}  # level: group, sections so far
        for place, (level, (start, body)) in enumerate(headings):
            groups = {other: group for other, group in groups.items() if other <= level}
            group = groups.setdefault(level, [-1 - place, -1])
            group[1] += 1
            yield from self._part("section", (start, body, ends[place]), group)

    def _section_ends(self, headings: Sequence[tuple[int, Span]]) -> list[int]:
        """Return where each section ends: at the next heading of its level or a higher one."""
        ends, following = [len(self.answer)] * len(headings), dict[int, int]()  # level: where the next one begins
        for place in reversed(range(len(headings))):
            level, (start, _) = headings[place]
            ends[place] = min((begins for other, begins in following.items() if other <= level), default=len(self.answer))
            following[level] = start
        return ends

    def _headings(self) -> Iterator[tuple[int, Span]]:
        for token in self.tokens:
            if token.level == 0 and token.map:
                span = self._lines(token.map)
                if token.type == "heading_open":
                    yield int(token.tag[1]), span
                elif token.type == "paragraph_open" and _BOLD_LINE.match(self.answer, *span):
                    yield _BOLD_LINE_LEVEL, span

    def paragraphs(self) -> Iterator[Part]:
        """Yield what follows the title or the first sentence of each paragraph."""
        if len(self.top) < MIN_ITEMS:
            return
        for index, ((start, end), after) in enumerate(pairwise([*self.top, (0, 0)])):
            title = _BOLD_TITLE.match(self.answer, start, end)
            sentence = first_sentence_end(self.answer[start:end])
            if title is not None or sentence is not None:
                title_end = title.end() if title is not None else start + (sentence or 0)
                yield from self._part("paragraph", (start, title_end, end), [0, index], self.answer[slice(*after)])

    def _part(self, kind: Kind, cuts: tuple[int, int, int], place: Sequence[int], following: str = "") -> Iterator[Part]:
        """Yield the part that starts, forks and ends at ``cuts`` unless too little would fork."""
        start, cut, end = cuts
        if start < self.end:
            end = min(end, self.end)
        span = _trimmed(self.answer, (cut, end))
        detail = self.answer[slice(*span)]
        if count_words(detail) >= (MIN_REST_WORDS if kind == "paragraph" else MIN_DETAIL_WORDS):
            yield Part(kind, self.answer[start:cut], detail, span, place[0], place[1], following)


@cache
def _marker(marker: str) -> re.Pattern[str]:
    return re.compile(r"[ \t]*" + re.escape(marker) + r"[ \t]+")


def _trimmed(answer: str, span: Span) -> Span:
    """Leave line ends on either side to the parent."""
    start, end = span
    if blank := _BLANK_LINES.match(answer, start, end):
        start = blank.end()
    return start, start + len(answer[start:end].rstrip())
