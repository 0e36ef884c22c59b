"""A Markdown answer as a tree of threads, or why it stays in one piece (paper, section 3.2 and appendix A).

Lists whose items read "title: detail" fork after each title; else paragraphs fork after their first sentence. Code,
tables, formulas, HTML and links keep an answer whole.
"""

import io
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate

from markdown_it import MarkdownIt
from markdown_it.token import Token

from hf_apar.data.sentences import first_sentence_end
from hf_apar.data.text_tree import TextThread

MIN_ITEMS = 3  # titled items that make a list worth forking, and paragraphs that make an essay worth it
MIN_PARAGRAPH_FORKS = 2
MAX_TITLE_WORDS = 12
MIN_DETAIL_WORDS = 5
MIN_REST_WORDS = 6
MAX_DEPTH = 3

_REFUSED = {
    "fence": "code", "code_block": "code", "html_block": "HTML", "html_inline": "HTML", "table_open": "a table",
    "link_open": "a link", "image": "a link",
}  # fmt: skip
# a pair of dollar signs as pandoc reads it, so that prices are no formula; "=" hardly occurs in prose
_FORMULA = re.compile(r"\$\$|\\[(\[]|\\begin\{|=|(?<!\\)\$(?=\S)[^$\n]*?(?<=\S)\$(?!\d)")
_BARE_LINK = re.compile(r"https?://|www\.", re.IGNORECASE)
_BOLD_TITLE = re.compile(r"(\*\*|__)(?P<title>[^*_\n]+?)(?::\1|\1[ \t]*:|\1[ \t]+[-–—](?=\s))")
_PLAIN_TITLE = re.compile(r"(?P<title>[^:*_`\n]+?)(?::|[ \t]+[-–—])(?=\s)")
_BLANK_LINES = re.compile(r"(?:[ \t]*(?:\r\n|\r|\n))+")

Span = tuple[int, int]


def extract(answer: str, *, max_depth: int = MAX_DEPTH) -> TextThread:
    """Return the paragraph tree of ``answer``; one thread of one piece where it should not fork.

    The tree's text is ``answer``, byte for byte. A detail keeps the space before it and loses the line ends after it;
    those belong to its parent.

    Args:
        answer: Markdown, as a chat model writes it.
        max_depth: the deepest thread that may be made; the root has depth 1.

    >>> extract("- Oak: it grows very slowly indeed\\n- Ash: b c d e f\\n- Elm: g h i j k").pieces[:3]
    ('- Oak:', TextThread(pieces=(' it grows very slowly indeed',)), '\\n- Ash:')
    """
    tokens = _parse(answer)
    spans = [] if _content_reason(answer, tokens) else _detail_spans(answer, tokens)
    return _build(answer, (0, len(answer)), spans, max_depth)


def refusal(answer: str) -> str | None:
    """Return why :func:`extract` leaves ``answer`` in one piece; ``None`` if it forks.

    >>> refusal("See [this](https://example.org).")
    'it holds a link'
    """
    tokens = _parse(answer)
    if reason := _content_reason(answer, tokens):
        return f"it holds {reason}"
    return None if _detail_spans(answer, tokens) else "it has neither a list with titles nor paragraphs to split"


def _parse(answer: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(answer)


def _content_reason(answer: str, tokens: Sequence[Token]) -> str | None:
    """Name the first content that cannot be split safely."""
    for token in (inner for outer in tokens for inner in (outer, *(outer.children or ()))):
        if token.type in _REFUSED:
            return _REFUSED[token.type]
        if token.type == "code_inline" and "\n" in token.content:
            return "code"
    if _FORMULA.search(answer):
        return "a formula"
    return "a link" if _BARE_LINK.search(answer) else None


def _detail_spans(answer: str, tokens: Sequence[Token]) -> list[Span]:
    offsets = _line_offsets(answer)
    if any(token.type == "list_item_open" for token in tokens):
        return sorted(_list_spans(answer, tokens, offsets))
    return _paragraph_spans(answer, tokens, offsets)


def _line_offsets(answer: str) -> list[int]:
    """Where each line starts, by the parser's own line ends, and where the last one ends."""
    return [0, *accumulate(len(line) for line in io.StringIO(answer, newline=""))]


def _list_spans(answer: str, tokens: Sequence[Token], offsets: Sequence[int]) -> Iterator[Span]:
    """Yield the details of every list that has enough titled items, nested lists included."""
    open_lists: list[list[Span]] = []
    started: set[int] = set()  # lines that an item begins: a list within it on the same line is none of ours
    for token in tokens:
        if token.type in ("bullet_list_open", "ordered_list_open"):
            open_lists.append([])
        elif token.type in ("bullet_list_close", "ordered_list_close"):
            details = open_lists.pop()
            if len(details) >= MIN_ITEMS:
                yield from details
        elif token.type == "list_item_open" and token.map and token.map[0] not in started:
            started.add(token.map[0])
            span = _item_detail(answer, token, (offsets[token.map[0]], offsets[token.map[1]]))
            if span is not None:
                open_lists[-1].append(span)


def _item_detail(answer: str, item: Token, span: Span) -> Span | None:
    marker = re.compile(r"[ \t]*" + re.escape(item.info + item.markup) + r"[ \t]+").match(answer, *span)
    if marker is None:
        return None
    title = _BOLD_TITLE.match(answer, marker.end(), span[1]) or _PLAIN_TITLE.match(answer, marker.end(), span[1])
    if title is None or not 1 <= len(title["title"].split()) <= MAX_TITLE_WORDS:
        return None
    return _trimmed(answer, (title.end(), span[1]), MIN_DETAIL_WORDS)


def _paragraph_spans(answer: str, tokens: Sequence[Token], offsets: Sequence[int]) -> list[Span]:
    paragraphs = [token.map for token in tokens if token.type == "paragraph_open" and token.level == 0 and token.map]
    if len(paragraphs) < MIN_ITEMS:
        return []
    details = [_paragraph_rest(answer, (offsets[start], offsets[end])) for start, end in paragraphs]
    found = [span for span in details if span is not None]
    return found if len(found) >= MIN_PARAGRAPH_FORKS else []


def _paragraph_rest(answer: str, span: Span) -> Span | None:
    end = first_sentence_end(answer[slice(*span)])
    return None if end is None else _trimmed(answer, (span[0] + end, span[1]), MIN_REST_WORDS)


def _trimmed(answer: str, span: Span, min_words: int) -> Span | None:
    """Leave line ends on either side to the parent; ``None`` if too little remains."""
    start, end = span
    if blank := _BLANK_LINES.match(answer, start, end):
        start = blank.end()
    detail = answer[start:end].rstrip()
    return (start, start + len(detail)) if len(detail.split()) >= min_words else None


def _build(answer: str, span: Span, spans: Sequence[Span], max_depth: int) -> TextThread:
    """Cut ``span`` of ``answer`` at the outermost of the nested ``spans``, and those at the ones within them."""
    pieces: list[str | TextThread] = []
    position, end = span
    for inner in spans if max_depth > 1 else ():
        if inner[0] < position or inner[1] > end:
            continue  # elsewhere, or within the detail just cut out
        within = [other for other in spans if inner[0] <= other[0] and other[1] <= inner[1] and other != inner]
        pieces += [answer[position : inner[0]], _build(answer, inner, within, max_depth - 1)]
        position = inner[1]
    pieces.append(answer[position:end])
    return TextThread(tuple(piece for piece in pieces if piece != ""))
