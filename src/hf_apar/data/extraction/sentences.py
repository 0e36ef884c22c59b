"""Where the sentences of a paragraph end, found so that a doubtful full stop ends nothing."""

import re
from collections.abc import Iterator

from sentencex import segment

# All of them must see an end: each knows its own abbreviations, and the terminators of every script. Languages whose
# abbreviations are common English words ("it.", "in.", "app.": Italian, Dutch) are left out.
_LANGUAGES = ("en", "de", "fr", "es", "pt", "pl", "ru")
# what sentencex lets pass at the start of a text, before a capital letter, or with none of the languages above
_ABBREVIATIONS = """
    mr mrs ms dr prof st mt jr sr rev gen sen rep gov capt sgt col lt hon messrs sig dott dhr mme mlle
    vs etc al cf ca approx nos vol vols fig figs eq sec ch pp ed eds est dept inc ltd co corp bros assn univ
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun ave blvd rd min max avg incl misc
""".split()
_CLOSING = re.compile(r"""["'”’»›」』）)\]*_]*""")
_NEXT = re.compile(r"""\s*["'“‘„«‹「『（(\[*_¿¡]*(\w)""")
_WORD = re.compile(r"(\S+)\Z")
_LOOKED_AT = 200  # letters before an end: the work is linear in the text's length
_LONGEST = 2000  # letters of a first sentence: segmenting takes quadratic time where no space follows a full stop


def first_sentence_end(text: str) -> int | None:
    """Return the offset just after the first sentence of ``text``; ``None`` if no second one follows.

    A full stop after an abbreviation, an initial or within a number ends nothing, nor does one that a small letter
    or a digit follows.

    >>> text = "Dr. A. Smith of the U.S. Navy paid 3.5 dollars, e.g. for tea. Then he left."
    >>> text[: first_sentence_end(text)]
    'Dr. A. Smith of the U.S. Navy paid 3.5 dollars, e.g. for tea.'
    >>> first_sentence_end("茶は体によい。水もよい。")
    7
    """
    return next(_ends(text[:_LONGEST]), None)


def sentence_ends(text: str) -> list[int]:
    """Return the offsets just after all sentences of ``text`` that another one follows, as :func:`first_sentence_end`.

    >>> sentence_ends("It rains. Dr. Hill smiles! He is glad.")
    [9, 26]
    """
    return list(_ends(text))


def _ends(text: str) -> Iterator[int]:
    ends = _sentence_ends(text, _LANGUAGES[0])
    others = [set(_sentence_ends(text, language)) for language in _LANGUAGES[1:]] if ends else []
    for end in ends:
        following = _NEXT.match(text, end)
        if following is None or not _can_start(following[1]) or not all(end in seen for seen in others):
            continue
        sentence = text[max(0, end - _LOOKED_AT) : end].rstrip("\"'”’»›」』）)]*_")
        if sentence[-1:].isalnum() or (sentence.endswith(".") and _is_abbreviated(sentence.rstrip(".!?"))):
            continue
        yield end


def _sentence_ends(text: str, language: str) -> list[int]:
    """Where all sentences but the last one end, with the quotation and emphasis marks that close there."""
    ends, position = [], 0
    for sentence in segment(language, text)[:-1]:
        closing = _CLOSING.match(text, position + len(sentence.rstrip()))
        position += len(sentence)
        assert closing is not None  # it may be empty
        ends.append(closing.end())
    return ends


def _can_start(letter: str) -> bool:
    return letter.isalpha() and not letter.islower()


def _is_abbreviated(before: str) -> bool:
    match = _WORD.search(before)
    if match is None:
        return True  # nothing but a full stop: an ellipsis or a stray mark
    word = match[1].strip("\"'“”‘’([*_)]")
    return len(word) <= 1 or "." in word or word.lower() in _ABBREVIATIONS or word.isdigit()
