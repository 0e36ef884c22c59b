"""What is counted against a fork, and for an answer: forks that are none, variety of words."""

import re
from collections.abc import Sequence

from hf_apar.data.extraction.repetition import repeated_share, repeats
from hf_apar.tree.threads import Decodes, ParagraphTree

_WORD = re.compile(r"\w+")


def false_forks(tree: ParagraphTree, tokenizer: Decodes) -> int:
    """Return how many children are empty or repeat an earlier child of the same thread."""
    found = 0
    for parent in tree.threads:
        told: list[str] = []
        for child in tree.children(parent):
            text = tokenizer.decode(child.tokens, skip_special_tokens=True)
            found += not _WORD.search(text) or any(repeats(text, other) for other in told)
            told.append(text)
    return found


def distinct(texts: Sequence[str], length: int = 2) -> float:
    """Return the share of different runs of ``length`` words, each text by itself, on average (Li et al., 2016).

    >>> round(distinct(["a b a b", "c d e"]), 2)
    0.83
    """
    shares = [1 - repeated_share(text, length) for text in texts if len(_WORD.findall(text)) >= length]
    return sum(shares) / len(shares) if shares else 0.0
