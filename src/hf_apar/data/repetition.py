"""How much a text repeats itself: a small model's answers do, and what is learnt from such answers is to loop."""

import re

from hf_apar.data.text_tree import TextThread

_WORD = re.compile(r"\w[\w']*")


def repeated_share(text: str, length: int = 5) -> float:
    """Return the share of runs of ``length`` words in ``text`` that occur before in it; 0 for a shorter text.

    >>> repeated_share("one two three. One two three. One two", length=3)
    0.5
    """
    words = [word.lower() for word in _WORD.findall(text)]
    runs = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def repeats_a_title(tree: TextThread) -> bool:
    """Do two threads of ``tree`` fork after the same words, numbers aside?

    >>> detail = TextThread(("It helps.",))
    >>> repeats_a_title(TextThread(("1. **Rest**:", detail, "2. **Rest**:", detail)))
    True
    """
    if any(repeats_a_title(child) for child in tree.children):
        return True
    before_forks = [
        tuple(word.lower() for word in _WORD.findall(piece.rstrip().rsplit("\n", 1)[-1]) if not word.isdigit())
        for piece, following in zip(tree.pieces, tree.pieces[1:], strict=False)
        if isinstance(piece, str) and isinstance(following, TextThread)
    ]
    return len(set(before_forks)) < len(before_forks)
