"""Which answers are trained on: those that fork well, whole ones beside them, and none that repeats itself."""

import re
from dataclasses import dataclass

from hf_apar.data.extraction.repetition import repeated_share, repeats_a_sibling, repeats_a_title
from hf_apar.data.extraction.sentences import first_sentence_end
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.data.extraction.thinking import thinking_end
from hf_apar.errors import DataError

_BOLD_ITEM = re.compile(r"^ {0,3}(?:[-*+]|\d{1,3}[.)])[ \t]+(?:\*\*|__)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which answers are trained on, and in which proportions.

    Attributes:
        structured_share: answers that fork, among all; of the others so many are drawn.
        unforked_share: of the structured ones that are trained on, so many come once more as they read without forks
            (:func:`~hf_apar.training.rows.features.unforked`): decoded plainly, with [Fork] banned, the model must know
            that a title's detail is followed by the next title and not by EOS.
        held_out: kept aside for the metrics.
        max_repetition: left out is what repeats more of its runs of five words, a title, or in one thread what a sibling
            says; at 1 repetition is no reason.
        max_forks: left out is what forks more often, which a model does not learn to end.
        min_ideal_ratio: left out is what forks and is less than so many times as long as its longest path, in characters,
            so that forking hardly pays.
        min_elaborated: left out is what forks where a smaller share of its threads has a second sentence: else the end is
            what is likeliest after the first.
        likeliest: of several answers to one prompt that are not left out, one is trained on: an answer that forks where
            there is one, and of these the one that the model finds likeliest a token before its tuning, so that it need
            learn few words that are not its own.

    Raises:
        DataError: if a share is out of its range.
    """

    structured_share: float = 0.67
    unforked_share: float = 0.15
    held_out: float = 0.05
    max_repetition: float = 0.1
    max_forks: int | None = None
    min_ideal_ratio: float = 1.0
    min_elaborated: float = 0.0
    likeliest: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.structured_share <= 1 or not 0 < self.held_out < 1 or not 0 <= self.unforked_share <= 1:
            raise DataError(
                f"structured_share is {self.structured_share}, held_out {self.held_out} and unforked_share "
                f"{self.unforked_share}; the first is above 0 and at most 1, the second between 0 and 1, the last one of "
                "these or between them"
            )

    def keeps(self, tree: TextThread) -> bool:
        """Is it an answer to learn from?"""
        if self._is_repetitive(tree):
            return False
        return self._pays(tree) if tree.is_structured else not _BOLD_ITEM.search(tree.text, thinking_end(tree.text))

    def _is_repetitive(self, tree: TextThread) -> bool:
        if self.max_repetition >= 1:
            return False
        answer = tree.text[thinking_end(tree.text) :]  # thoughts may say beforehand what the answer says
        return repeated_share(answer) > self.max_repetition or repeats_a_title(tree) or repeats_a_sibling(tree)

    def _pays(self, tree: TextThread) -> bool:
        """Does it fork so that it is worth it?"""
        if self.max_forks is not None and tree.fork_count > self.max_forks:
            return False
        if sum(map(_goes_on, tree.children)) < self.min_elaborated * len(tree.children):
            return False
        return len(tree.text) >= self.min_ideal_ratio * tree.critical_path(len)


DEFAULT_SELECTION = Selection()


def _goes_on(child: TextThread) -> bool:
    """Does it go on after its first sentence?"""
    text = child.text.strip()
    end = first_sentence_end(text)
    return end is not None and bool(text[end:].strip())
