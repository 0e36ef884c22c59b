"""Which answers are trained on: those that fork well, whole ones beside them, and none that repeats itself."""

import re

from hf_apar.data.extraction.repetition import repeated_share, repeats_a_sibling, repeats_a_title
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.data.extraction.thinking import thinking_end
from hf_apar.training.tuning import Selection

_BOLD_ITEM = re.compile(r"^ {0,3}(?:[-*+]|\d{1,3}[.)])[ \t]+(?:\*\*|__)", re.MULTILINE)


def is_selected(tree: TextThread, selection: Selection) -> bool:
    """Is it an answer to learn from?"""
    if _is_repetitive(tree, selection.max_repetition):
        return False
    if not tree.is_structured:
        return not _BOLD_ITEM.search(tree.text, thinking_end(tree.text))
    if selection.max_forks is not None and tree.fork_count > selection.max_forks:
        return False
    return len(tree.text) >= selection.min_balance * (1 + tree.fork_count) * tree.critical_path(len)


def _is_repetitive(tree: TextThread, most: float) -> bool:
    if most >= 1:
        return False
    answer = tree.text[thinking_end(tree.text) :]  # thoughts may say beforehand what the answer says
    return repeated_share(answer) > most or repeats_a_title(tree) or repeats_a_sibling(tree)
