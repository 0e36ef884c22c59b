"""The rules by which an answer, or a part of it, stays unforked: named, so that they can be counted and switched off."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

from markdown_it.token import Token

from hf_apar.data.extraction.cues import ANAPHORA, CONCLUSION, LETTER, REFERENCE, SEQUENCE
from hf_apar.data.extraction.parts import Part
from hf_apar.errors import ConfigurationError


@dataclass(frozen=True)
class Candidate:
    """What the rules judge: an answer, its Markdown tokens, what would fork in it, and how much may."""

    answer: str
    tokens: Sequence[Token]
    parts: Sequence[Part]
    max_forks: int

    def has(self, *types: str) -> bool:
        """Is there a token of one of ``types``?"""
        return not self._types.isdisjoint(types)

    @cached_property
    def _types(self) -> set[str]:
        return {inner.type for outer in self.tokens for inner in (outer, *(outer.children or ()))}


def _never(_: object) -> bool:
    return False


@dataclass(frozen=True)
class Rule:
    """A named reason not to fork.

    Attributes:
        name: as it is switched by.
        why: as it is reported.
        refuses: must this answer stay in one piece?
        keeps: must this part stay in its parent, while others fork?
    """

    name: str
    why: str
    refuses: Callable[[Candidate], bool] = _never
    keeps: Callable[[Part], bool] = _never


# a pair of dollar signs as pandoc reads it, so that prices are no formula; "=" hardly occurs in prose
_FORMULA = re.compile(r"\$\$|\\[(\[]|\\begin\{|=|(?<!\\)\$(?=\S)[^$\n]*?(?<=\S)\$(?!\d)")
_BARE_LINK = re.compile(r"https?://|www\.", re.IGNORECASE)
_ARITHMETIC = re.compile(
    r"\d%? ?[+×÷*∙·] ?[$€£]?\d|\d [x/] [$€£]?\d|\d (?:plus|minus|times|(?:multiplied|divided) by) [$€£]?\d", re.IGNORECASE
)
_SPEECH = re.compile(
    r"^ {0,3}(?:\*\*|__)?(?P<speaker>[^\W\d][^\n:：*_]{0,30}?)(?:\*\*|__)?(?::(?=[^\S\n]+\S|\*\*)|：)", re.MULTILINE
)
_SPOKEN_PARAGRAPH = re.compile(r"[ \t]*(?:[—–]|[\"“«„「『][^\"”»“」』\n]*[.!?,…。！？][\"”»“」』])")
_VERSE_LINE = 60  # letters


def _links(candidate: Candidate) -> bool:
    return candidate.has("link_open", "image") or _BARE_LINK.search(candidate.answer) is not None


def _quotes_a_list(candidate: Candidate) -> bool:
    quotations = 0
    for token in candidate.tokens:
        if token.type in ("blockquote_open", "blockquote_close"):
            quotations += token.nesting
        elif token.type == "list_item_open" and quotations:
            return True
    return False


def _is_verse(candidate: Candidate) -> bool:
    """Are there stanzas, several short lines each, among paragraphs that would fork, or mostly stanzas?"""
    texts = [token.content.splitlines() for token in candidate.tokens if token.type == "inline" and token.level == 1]
    stanzas = [lines for lines in texts if len(lines) >= 3 and median(map(len, lines)) <= _VERSE_LINE]
    prose_forks = any(part.kind == "paragraph" for part in candidate.parts)
    return bool(stanzas) and (prose_forks or 2 * len(stanzas) >= len(texts))


def _is_letter(candidate: Candidate) -> bool:
    """Is somebody addressed, and would paragraphs fork?"""
    return any(part.kind == "paragraph" for part in candidate.parts) and LETTER.search(candidate.answer) is not None


def _is_dialogue(candidate: Candidate) -> bool:
    """Do two speakers take turns, or most paragraphs open with a quotation?"""
    speakers = [match["speaker"].strip().lower() for match in _SPEECH.finditer(candidate.answer)]
    turns = {speaker for speaker, count in Counter(speakers).items() if count > 1}
    paragraphs = [token.content for token in candidate.tokens if token.type == "inline" and token.level == 1]
    spoken = sum(_SPOKEN_PARAGRAPH.match(text) is not None for text in paragraphs)
    return (len(turns) > 1 and _alternate(speakers, turns)) or spoken >= max(3, len(paragraphs) / 2)


def _alternate(speakers: Sequence[str], turns: set[str]) -> bool:
    """Is it an exchange of a few, rather than the same subheadings in one section after another?"""
    return len(set(speakers)) <= len(turns) + 1


def _refer_to_each_other(candidate: Candidate) -> bool:
    return any(REFERENCE.search(part.detail) for part in candidate.parts)


def _go_on(candidate: Candidate) -> bool:
    return any(
        part.index > 0 and part.kind != "paragraph" and (SEQUENCE.match(part.title) or SEQUENCE.match(part.detail))
        for part in candidate.parts
    )


def _is_leant_on(part: Part) -> bool:
    return bool(ANAPHORA.match(part.following) or SEQUENCE.match(part.following))


RULES: tuple[Rule, ...] = (
    Rule("code", "it holds code", lambda candidate: candidate.has("fence", "code_block")),
    Rule("html", "it holds HTML", lambda candidate: candidate.has("html_block", "html_inline")),
    Rule("table", "it holds a table", lambda candidate: candidate.has("table_open")),
    Rule("formula", "it holds a formula", lambda candidate: _FORMULA.search(candidate.answer) is not None),
    Rule("link", "it holds a link", _links),
    Rule("quote", "it quotes a list", _quotes_a_list),
    Rule("calculation", "it calculates", lambda candidate: _ARITHMETIC.search(candidate.answer) is not None),
    Rule("poem", "it is in verse, or in lines of their own", _is_verse),
    Rule("letter", "it is a letter", _is_letter),
    Rule("dialogue", "it is a dialogue", _is_dialogue),
    Rule("reference", "its parts refer to each other", _refer_to_each_other),
    Rule("sequence", "its parts go on from each other", _go_on),
    Rule("forks", "it would fork too often", lambda candidate: len(candidate.parts) > candidate.max_forks),
    Rule(
        "introduction", "a first paragraph introduces", keeps=lambda part: part.kind == "paragraph" and part.index == 0
    ),
    Rule("conclusion", "it concludes", keeps=lambda part: CONCLUSION.match(part.title) is not None),
    Rule("leaning", "its paragraphs lean on each other", keeps=_is_leant_on),
)  # fmt: skip


# not a rule that can be switched: what is left when nothing forks
LONGEST_ANSWER = 1 << 20
"""Letters of an answer that may fork: more than a context holds, and a bound to the work that a text can make."""

TOO_LONG = Rule("length", f"it has more than {LONGEST_ANSWER:,} letters")
NO_STRUCTURE = Rule("structure", "it has neither a list with titles nor sections nor paragraphs to split")


def rules_without(names: Iterable[str]) -> tuple[Rule, ...]:
    """Return all rules but those called ``names``.

    >>> len(RULES) - len(rules_without(["poem", "link"]))
    2

    Raises:
        ConfigurationError: if there is no such rule.
    """
    known = {rule.name for rule in RULES}
    left_out = set(names)
    if unknown := left_out - known:
        raise ConfigurationError(
            f"there is no rule called {', '.join(sorted(unknown))}; the rules are {', '.join(sorted(known))}"
        )
    return tuple(rule for rule in RULES if rule.name not in left_out)
