"""A prompt beside what an arm made of it: what figures are computed of."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from hf_apar.data.extraction.markdown import extract
from hf_apar.evaluation.answers import Answered, Key, as_asked
from hf_apar.evaluation.suites import Prompt
from hf_apar.tree.threads import Decodes, ParagraphTree

_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class Row:
    """A prompt, and what an arm made of it.

    Attributes:
        tokenizer: the arm's, which reads single threads; without it nothing is said of them.
        extras: numbers that were measured of the answer apart, by name, such as ``nll``.
    """

    prompt: Prompt
    answered: Answered
    tokenizer: Decodes | None = None
    extras: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def tree(self) -> ParagraphTree | None:
        """The threads; ``None`` of an arm that has none."""
        return None if self.answered.tree is None else ParagraphTree.from_dict(self.answered.tree)

    @property
    def forks(self) -> int:
        """How many threads were forked."""
        return 0 if self.tree is None else len(self.tree.threads) - 1

    @property
    def forked(self) -> bool:
        """Was any?"""
        return self.forks > 0

    @cached_property
    def items(self) -> int:
        """Parts at the first level: threads that the root forked, of an answer in one thread what its Markdown has."""
        forked = self.tree.children(self.tree.threads[0]) if self.tree is not None else ()
        return len(forked or extract(self.answered.text).children)

    @property
    def malformed(self) -> bool:
        """Does a thread fork with no word written since its start or its last fork, so that a detail has no title?"""
        if self.tree is None:
            return False
        for parent in self.tree.threads:
            places = [0, *(child.fork_position for child in self.tree.children(parent))]
            if any(self._is_blank(parent.tokens[start:end]) for start, end in pairwise(places)):
                return True
        return False

    def _is_blank(self, tokens: list[int]) -> bool:
        return not tokens or (
            self.tokenizer is not None and not _WORD.search(self.tokenizer.decode(tokens, skip_special_tokens=True))
        )


def rows_by_arm(
    prompts: Sequence[Prompt],
    answers: Mapping[Key, Answered],
    tokenizers: Mapping[str, Decodes] | None = None,
    extras: Mapping[Key, Mapping[str, float]] | None = None,
) -> dict[str, list[Row]]:
    """Return the rows of each arm in the order of ``prompts``; what has no answer is left out.

    Args:
        answers: of :func:`~hf_apar.evaluation.run.answer_all`, or of several files of answers.
        tokenizers: the arms' by their names.
        extras: see :attr:`Row.extras`.
    """
    tokenizers, extras = tokenizers or {}, extras or {}
    return {
        arm: [
            Row(as_asked(prompt, arm, answers), answers[key], tokenizers.get(arm), extras.get(key, {}))
            for prompt in prompts
            if (key := (prompt.key, arm)) in answers
        ]
        for arm in dict.fromkeys(arm for _, arm in answers)
    }
