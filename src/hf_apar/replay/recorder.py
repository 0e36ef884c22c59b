"""Notes down an answer while it is written: when each step was over, and how long each thread's path was then."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_apar.errors import ConfigurationError
from hf_apar.replay.pieces import answer_pieces
from hf_apar.replay.trace import Trace, TracedThread
from hf_apar.streaming import AparStreamer
from hf_apar.tree.threads import ParagraphTree, Thread


@dataclass
class _History:
    """When things happened to a thread.

    Attributes:
        born: the step that forked it.
        steps: in which step each place of its path was taken; what it inherited counts as taken when it was born.
        ended: the step in which it ended.
        accepted: places of its path that a draft had guessed.
    """

    born: int
    steps: list[int]
    ended: int | None = None
    accepted: list[int] = field(default_factory=list)


class Recorder(AparStreamer):
    """A streamer that records one answer, of ``generate`` with threads or without; its clock starts when it is made.

    Args:
        row: which answer of a batch.
        keep_scores: with ``output_scores``, leave the scores in the tree. Else each step's are dropped once their log
            probabilities are noted: a replay needs no more, and they are a vocabulary of numbers for each token.
    """

    def __init__(self, *, row: int = 0, keep_scores: bool = True) -> None:
        self.row, self.keep_scores = row, keep_scores
        self.times: list[float] = []
        self._tree: ParagraphTree | None = None
        self._histories: list[_History] = []
        self._known: list[int] = []  # accepted guesses of each thread, as far as they are noted
        self._plain = self._complete = False
        self._start = time.perf_counter()

    def end_step(self, trees: Sequence[ParagraphTree]) -> None:
        if self._histories and all(one.ended is not None for one in self._histories):
            return  # other answers of the batch go on
        self._tick()
        self._tree = trees[self.row]
        step = len(self.times) - 1
        for thread in self._tree.threads:
            if thread.index == len(self._histories):
                length = _inherited(self._tree, thread)
                self._histories.append(_History(step if thread.index else -1, [step] * length))
                self._known.append(0)
            self._note(thread, step)

    def _note(self, thread: Thread, step: int) -> None:
        history = self._histories[thread.index]
        first = max(len(history.steps), thread.start)  # the place of what it sampled first in this step
        history.steps += [step] * (len(thread.path_ids) - len(history.steps))
        kept = thread.accepted - self._known[thread.index]
        self._known[thread.index] = thread.accepted
        history.accepted += range(first, min(first + kept, len(thread.path_ids)))
        if thread.finish_reason is not None and history.ended is None:
            history.ended = step
        if not self.keep_scores:
            thread.scores = None

    def put(self, value: Tensor) -> None:
        """Take the prompt of a plain answer first, then what was written in each step: (1,) or (1, tokens)."""
        ids = value.flatten().tolist()
        if not self._plain:
            self._plain = True
            self._tree = ParagraphTree([Thread(0, None, 0, 1, list(ids), start=len(ids))])
            self._histories = [_History(-1, [0] * len(ids))]
            return
        self._tick()
        assert self._tree is not None
        self._tree.threads[0].path_ids += ids
        self._histories[0].steps += [len(self.times) - 1] * len(ids)

    def end(self) -> None:
        self._complete = True

    def _tick(self) -> None:
        self.times.append(round(time.perf_counter() - self._start, 6))

    def trace(self, tokenizer: PreTrainedTokenizerBase, *, question: str = "") -> Trace:
        """Return what was recorded, also of an answer that something broke off.

        Args:
            tokenizer: that of the model.
            question: for the head of a page.

        Raises:
            ConfigurationError: if there is nothing: no step was made.
        """
        if self._tree is None or not self.times:
            raise ConfigurationError("nothing was recorded; pass the recorder to generate as streamer, and ask afterwards")
        if self._plain:
            self._finish_plain(tokenizer)
        return _traced(self._tree, self._histories, tokenizer, tuple(self.times), question, timed=True)

    def _finish_plain(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make a thread of the tokens: special ones are no text, and the last of them is its EOS."""
        assert self._tree is not None
        (root,) = self._tree.threads
        special = set(tokenizer.all_special_ids)
        root.tokens = [token for token in root.path_ids[root.start :] if token not in special]
        if self._complete:
            root.finish_reason = "eos" if root.path_ids[-1] in special else "length"
            self._histories[0].ended = len(self.times) - 1


def trace_of_tree(tree: ParagraphTree, tokenizer: PreTrainedTokenizerBase, *, question: str = "") -> Trace:
    """Return how ``tree`` may have been written, for one that nobody recorded: a token a step, and nobody waits.

    Its times are the numbers of the steps.
    """
    histories, last = list[_History](), 0
    for thread in tree.threads:
        length = _inherited(tree, thread)
        born = step = -1 if thread.parent is None else histories[thread.parent].steps[length - 1]
        steps, given = [born] * length, {*range(thread.start), *thread.injected}
        for place in range(length, len(thread.path_ids)):
            step = max(step + (place not in given), 0)
            steps.append(step)
        step = max(step + (thread.eos_token_id is not None), 0)
        histories.append(_History(born, steps, None if thread.finish_reason is None else step))
        last = max(last, step)
    times = tuple(map(float, range(1, last + 2)))
    return _traced(tree, histories, tokenizer, times, question, timed=False)


def _inherited(tree: ParagraphTree, thread: Thread) -> int:
    """Return how many places of its path ``thread`` had before it was fed or wrote anything."""
    if thread.parent is None:
        return thread.start
    pairs = list(zip(thread.path_ids[: thread.start], tree.threads[thread.parent].path_ids, strict=False))
    return next((place for place, (own, other) in enumerate(pairs) if own != other), len(pairs))


def _traced(
    tree: ParagraphTree,
    histories: Sequence[_History],
    tokenizer: PreTrainedTokenizerBase,
    times: tuple[float, ...],
    question: str,
    *,
    timed: bool,
) -> Trace:
    texts = answer_pieces(tree, tokenizer)
    threads = [_traced_thread(tree, one, histories[one.index], texts[one.index]) for one in tree.threads]
    return Trace(tuple(threads), times, question, timed, tree.stopped_by)


def _traced_thread(tree: ParagraphTree, thread: Thread, history: _History, texts: Sequence[str]) -> TracedThread:
    inherited, places = _inherited(tree, thread), _places(thread)
    given = {*range(thread.start), *thread.injected}
    sampled = [place for place in range(len(thread.path_ids)) if place not in given]
    known = None if thread.logprobs is None else dict(zip(sampled, thread.logprobs, strict=False))
    return TracedThread(
        thread.parent, thread.fork_position, inherited, history.born, history.ended, thread.finish_reason,
        steps=tuple(history.steps[inherited:]),
        places=tuple(places),
        texts=tuple(texts),
        logprobs=None if known is None else tuple(map(known.get, places)),
        accepted=tuple(index for index, place in enumerate(places) if place in history.accepted),
    )  # fmt: skip


def _places(thread: Thread) -> list[int]:
    """Return where in the path each of a thread's tokens stands: between them are control tokens, which are none of them."""
    places, place = [], len(thread.path_ids)
    for token in reversed(thread.tokens):
        place -= 1
        while thread.path_ids[place] != token:
            place -= 1
        places.append(place)
    return places[::-1]
