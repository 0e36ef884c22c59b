"""Where the first sentence of a paragraph ends, found so that a doubtful full stop ends nothing."""

import re

_ABBREVIATIONS = """
    mr mrs ms dr prof st mt jr sr rev gen sen rep gov capt sgt col lt hon messrs
    vs etc al cf ca approx nos vol vols fig figs eq sec ch pp ed eds est dept inc ltd co corp bros assn univ
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun ave blvd rd min max avg incl misc
""".split()
_STOP = re.compile(r"""[.!?]+["'”’)\]*_]*(?=\s)""")
_NEXT = re.compile(r"""\s+["'“‘(\[*_]*(\w)""")
_WORD = re.compile(r"(\S+)\Z")


def first_sentence_end(text: str) -> int | None:
    """Return the offset just after the first sentence of ``text``; ``None`` if no second one follows.

    A full stop after an abbreviation, an initial or within a number ends nothing, nor does one that a small letter
    or a digit follows.

    >>> text = "Dr. A. Smith of the U.S. Navy paid 3.5 dollars, e.g. for tea. Then he left."
    >>> text[: first_sentence_end(text)]
    'Dr. A. Smith of the U.S. Navy paid 3.5 dollars, e.g. for tea.'
    """
    for stop in _STOP.finditer(text):
        following = _NEXT.match(text, stop.end())
        if following is None or not _can_start(following[1]):
            continue
        if stop[0].startswith(".") and _is_abbreviated(text[: stop.start()]):
            continue
        return stop.end()
    return None


def _can_start(letter: str) -> bool:
    return letter.isalpha() and not letter.islower()


def _is_abbreviated(before: str) -> bool:
    match = _WORD.search(before)
    if match is None:
        return True  # nothing but a full stop: an ellipsis or a stray mark
    word = match[1].strip("\"'“”‘’([*_)]")
    return len(word) <= 1 or "." in word or word.lower() in _ABBREVIATIONS or word.isdigit()
