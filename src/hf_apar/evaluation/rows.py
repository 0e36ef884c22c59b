"""Answers beside their prompts, read part by part: what figures are computed of."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_apar.data.extraction.markdown import extract
from hf_apar.data.extraction.repetition import repeats
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.evaluation.answers import Answered, Key, as_asked
from hf_apar.evaluation.suites import Prompt
from hf_apar.tree.threads import Decodes, ParagraphTree, Thread

_RUN = 3  # words that siblings share


@dataclass(frozen=True)
class Detail:
    """A part that stands under a title, with the parts below it; the title is the last line before it."""

    title: str
    text: str


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
    def conversation(self) -> str:
        """The key of the prompt that it began with: turns of one conversation are not independent."""
        return self.prompt.after or self.prompt.key

    @property
    def forks(self) -> int:
        """How many threads were forked."""
        return 0 if self.tree is None else len(self.tree.threads) - 1

    @property
    def forked(self) -> bool:
        """Was any?"""
        return self.forks > 0

    @property
    def first_fork(self) -> int:
        """How many tokens the root had written before its first fork, if there is one."""
        children = () if self.tree is None else self.tree.children(self.tree.threads[0])
        return min((child.fork_position for child in children), default=0)

    @cached_property
    def parts(self) -> TextThread:
        """The answer with its parts apart: as threads wrote them, of an answer in one thread as its Markdown has them."""
        if self.tree is None or self.tokenizer is None or not self.forked:
            return extract(self.answered.text)
        return _read(self.tree, self.tree.threads[0], self.tokenizer)

    @cached_property
    def items(self) -> int:
        """Parts at the first level: threads that the root forked, of an answer in one thread what its Markdown has."""
        forked = self.tree.children(self.tree.threads[0]) if self.tree is not None else ()
        return len(forked or self.parts.children)

    @cached_property
    def siblings(self) -> list[list[Detail]]:
        """The details of each thread of :attr:`parts`, the root's first."""
        return [
            [
                Detail(before.rstrip().rsplit("\n", 1)[-1] if isinstance(before, str) else "", piece.text)
                for before, piece in pairwise(("", *thread.pieces))
                if isinstance(piece, TextThread)
            ]
            for thread in self.parts.walk()
        ]

    @cached_property
    def sibling_runs(self) -> tuple[int, int]:
        """Of the runs of three words in details, how many an earlier sibling has too, and how many could be."""
        shared = total = 0
        for details in self.siblings:
            known = set[tuple[str, ...]]()
            for place, detail in enumerate(details):
                runs = _runs(detail.text)
                shared, total = shared + len(runs & known), total + len(runs) * (place > 0)
                known |= runs
        return shared, total

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

    @property
    def false_forks(self) -> int:
        """How many forked threads are empty or repeat an earlier one of their parent; tree and tokenizer must be there."""
        assert self.tree is not None and self.tokenizer is not None
        found = 0
        for parent in self.tree.threads:
            told: list[str] = []
            for child in self.tree.children(parent):
                text = self.tokenizer.decode(child.tokens, skip_special_tokens=True)
                found += not has_word(text) or any(repeats(text, other) for other in told)
                told.append(text)
        return found

    def _is_blank(self, tokens: list[int]) -> bool:
        return not tokens or (
            self.tokenizer is not None and not has_word(self.tokenizer.decode(tokens, skip_special_tokens=True))
        )


def by_conversation(rows: Sequence[Row], numbers: ArrayLike) -> NDArray[np.float64]:
    """Return the sums of ``numbers`` (rows, columns) over the turns of each conversation (conversations, columns)."""
    places = {key: place for place, key in enumerate(dict.fromkeys(row.conversation for row in rows))}
    array = np.asarray(numbers, dtype=np.float64).reshape(len(rows), -1)
    sums = np.zeros((len(places), array.shape[1]))
    np.add.at(sums, [places[row.conversation] for row in rows], array)
    return sums


def has_word(text: str) -> bool:
    """Is there anything to read?"""
    return bool(re.search(r"\w", text))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w[\w']*", text.lower())
    return {tuple(words[start : start + _RUN]) for start in range(len(words) - _RUN + 1)}


def _read(tree: ParagraphTree, thread: Thread, tokenizer: Decodes) -> TextThread:
    pieces: list[str | TextThread] = []
    start = 0
    for child in tree.children(thread):
        pieces.append(tokenizer.decode(thread.tokens[start : child.fork_position], skip_special_tokens=True))
        pieces.append(_read(tree, child, tokenizer))
        start = child.fork_position
    return TextThread((*pieces, tokenizer.decode(thread.tokens[start:], skip_special_tokens=True)))


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
