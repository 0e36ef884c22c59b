"""An answer with a thread for each of its parts: what it takes, and why it or a part of it stays whole."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from hf_apar.data.extraction.cues import count_words
from hf_apar.data.extraction.markdown import Extraction, extraction
from hf_apar.data.extraction.rules import Rule
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.data.extraction.thinking import TAGS, thinking_end
from hf_apar.probing.answers import ProbeAnswer
from hf_apar.probing.timeline import Span, timeline

CUT_IN_THOUGHTS = Rule("thoughts", "it was cut before its thoughts ended")
"""No rule of the extraction: such an answer has not begun."""


@dataclass(frozen=True)
class Probed:
    """An answer, and what would become of it with a thread for each of its parts.

    Attributes:
        found: its tree, and why it stays whole or parts of it do.
        spans: its threads by steps.
        total: the length of its text.
        path: that of the longest path.
    """

    answer: ProbeAnswer
    found: Extraction
    spans: tuple[Span, ...]
    total: int
    path: int

    @property
    def forks(self) -> bool:
        """Does it come in parts?"""
        return self.found.tree.is_structured

    @property
    def steps(self) -> int:
        """Of its longest path, [Fork] and EOS included."""
        return max(span.end for span in self.spans)

    @property
    def sampled(self) -> int:
        """What its threads sample together, [Fork] and EOS included."""
        return sum(span.end - span.start for span in self.spans)

    def to_dict(self) -> dict[str, object]:
        """Return what can be counted."""
        refused = self.found.refused_by
        return {
            "key": self.answer.key, "ended": self.answer.ended, "threads": len(self.spans), "total": self.total,
            "path": self.path, "steps": self.steps, "why_whole": None if refused is None else refused.name,
        }  # fmt: skip


def probed(answer: ProbeAnswer, length: Callable[[str], int] = count_words) -> Probed:
    """Return what becomes of ``answer``, by the rules of :mod:`hf_apar.data.extraction`; ``length`` measures its pieces."""
    text, measure = answer.response, cache(length)
    unfinished = text.lstrip().startswith(tuple(opening for opening, _ in TAGS)) and not thinking_end(text)
    found = Extraction(TextThread((text,)), CUT_IN_THOUGHTS, ()) if unfinished else extraction(text)
    tree = found.tree
    total = sum(measure(piece) for thread in tree.walk() for piece in thread.pieces if isinstance(piece, str))
    return Probed(answer, found, tuple(timeline(tree, measure)), total, tree.critical_path(measure))
