"""A Markdown answer as a tree of threads, or why it stays in one piece (paper, section 3.2 and appendix A).

Items of lists and sections fork after their titles, paragraphs after their first sentence
(:mod:`hf_apar.data.extraction.parts`), unless a rule keeps them (:mod:`hf_apar.data.extraction.rules`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from markdown_it import MarkdownIt

from hf_apar.data.extraction.indentation import indented
from hf_apar.data.extraction.parts import Span, find_parts, in_large_groups
from hf_apar.data.extraction.rules import LONGEST_ANSWER, NO_STRUCTURE, RULES, TOO_LONG, Candidate, Rule
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.data.extraction.thinking import thinking_end
from hf_apar.data.settings import TreeLimits


def extract(
    answer: str,
    *,
    max_depth: int = TreeLimits.max_depth,
    max_forks: int = TreeLimits.max_forks,
    rules: Sequence[Rule] = RULES,
) -> TextThread:
    """Return the paragraph tree of ``answer``; one thread of one piece where it should not fork.

    The tree's text is ``answer``, byte for byte. A detail keeps the space before it and loses the line ends after it;
    those belong to its parent. What a reasoning model thinks first stays in the root, and only what follows is judged.

    Args:
        answer: Markdown, as a chat model writes it.
        max_depth: the deepest thread that may be made; the root has depth 1.
        max_forks: an answer that would fork more often stays whole (the rule ``forks``).
        rules: what keeps an answer or a part of it unforked; :func:`~hf_apar.data.extraction.rules.rules_without` leaves
            some out.

    >>> extract("- Oak: it grows very slowly indeed\\n- Ash: b c d e f\\n- Elm: g h i j k").pieces[:3]
    ('- Oak:', TextThread(pieces=(' it grows very slowly indeed',)), '\\n- Ash:')
    """
    return extraction(answer, max_depth=max_depth, max_forks=max_forks, rules=rules).tree


def refusal(answer: str, *, max_forks: int = TreeLimits.max_forks, rules: Sequence[Rule] = RULES) -> str | None:
    """Return why :func:`extract` leaves ``answer`` in one piece; ``None`` if it forks.

    >>> refusal("See [this](https://example.org).")
    'it holds a link'
    """
    refused_by = extraction(answer, max_forks=max_forks, rules=rules).refused_by
    return None if refused_by is None else refused_by.why


@dataclass(frozen=True)
class Extraction:
    """What came of an answer.

    Attributes:
        tree: its tree, of one piece where it does not fork.
        refused_by: the rule that left it in one piece, :data:`~hf_apar.data.extraction.rules.NO_STRUCTURE` for want
            of parts, :data:`~hf_apar.data.extraction.rules.TOO_LONG` for too many letters.
        kept_by: the rules that kept a part of it unforked, one for each part.
    """

    tree: TextThread
    refused_by: Rule | None
    kept_by: tuple[Rule, ...]


def extraction(
    answer: str,
    *,
    max_depth: int = TreeLimits.max_depth,
    max_forks: int = TreeLimits.max_forks,
    rules: Sequence[Rule] = RULES,
) -> Extraction:
    """Return what :func:`extract` and :func:`refusal` do, for the work of one of them."""
    if len(answer) > LONGEST_ANSWER:
        return Extraction(TextThread((answer,)), TOO_LONG, ())
    start = thinking_end(answer)
    thoughts, answer = answer[:start], answer[start:]
    tokens = _parser().parse(indented(answer))
    found = in_large_groups(find_parts(answer, tokens))
    keepers = [next((rule for rule in rules if rule.keeps(part)), None) for part in found]
    parts = in_large_groups([part for part, keeper in zip(found, keepers, strict=True) if keeper is None])
    kept_by = tuple(keeper for keeper in keepers if keeper is not None)
    candidate = Candidate(answer, tokens, parts, max_forks)
    refused_by = next((rule for rule in rules if rule.refuses(candidate)), None)
    if refused_by is None and not parts:
        refused_by = kept_by[-1] if kept_by else NO_STRUCTURE
    spans = [] if refused_by else [part.span for part in parts]
    tree = _build(answer, (0, len(answer)), spans, max_depth)
    return Extraction(_after(thoughts, tree), refused_by, kept_by)


def _after(text: str, tree: TextThread) -> TextThread:
    """Return ``tree`` with ``text`` before it."""
    if not text:
        return tree
    head = tree.pieces[0] if tree.pieces and isinstance(tree.pieces[0], str) else ""
    return TextThread((text + head, *tree.pieces[1 if head else 0 :]))


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark").enable("table")


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
