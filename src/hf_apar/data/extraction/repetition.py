"""How much a text repeats itself: a small model's answers do, and what is learnt from such answers is to loop."""

import re

from hf_apar.data.extraction.text_tree import TextThread

_WORD = re.compile(r"\w[\w']*")
_MARKER = re.compile(r"^\s*(?:(?:[-*+]|#+)\s+)?(?:\*\*|__)?(?:\d{1,3}[.)]\s+)?")
_SAME = 0.8  # of a text's runs of three words that stand in another: it says the same


def repeated_share(text: str, length: int = 5) -> float:
    """Return the share of runs of ``length`` words in ``text`` that occur before in it; 0 for a shorter text.

    >>> repeated_share("one two three. One two three. One two", length=3)
    0.5
    """
    words = _words(text)
    runs = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def repeats_a_title(tree: TextThread) -> bool:
    """Do two threads of ``tree`` fork after the same words, the markers of items aside?

    >>> detail = TextThread(("It helps.",))
    >>> repeats_a_title(TextThread(("1. **Rest**:", detail, "2. **Rest**:", detail)))
    True
    >>> repeats_a_title(TextThread(("- **Day 1**:", detail, "- **Day 2**:", detail)))
    False
    """
    if any(repeats_a_title(child) for child in tree.children):
        return True
    before_forks = [
        tuple(_words(_MARKER.sub("", piece.rstrip().rsplit("\n", 1)[-1])))
        for piece, following in zip(tree.pieces, tree.pieces[1:], strict=False)
        if isinstance(piece, str) and isinstance(following, TextThread)
    ]
    return len(set(before_forks)) < len(before_forks)


def repeats(text: str, other: str) -> bool:
    """Does ``text`` add next to nothing to ``other``?

    >>> repeats("It saves water every day.", "It saves water every day, and money."), repeats("It is red.", "It is blue.")
    (True, False)
    """
    words, known = _words(text), _words(other)
    if len(words) < 3:
        return bool(words) and words == known
    runs = set(zip(words, words[1:], words[2:], strict=False))
    return len(runs & set(zip(known, known[1:], known[2:], strict=False))) >= _SAME * len(runs)


def repeats_a_sibling(tree: TextThread) -> bool:
    """Does a thread of ``tree`` say what one that forks from the same parent before it says?

    >>> detail = TextThread(("It helps.",))
    >>> repeats_a_sibling(TextThread(("1. **Rest**:", detail, "2. **Sleep**:", detail)))
    True
    """
    texts = [child.text for child in tree.children]
    return any(repeats(text, other) for number, text in enumerate(texts) for other in texts[:number]) or any(
        map(repeats_a_sibling, tree.children)
    )


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
