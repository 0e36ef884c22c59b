"""Answers in parts, evened out: each detail goes on until it is long enough, and a list gets a closing sentence.

The longest path of an answer is its introduction, its titles and one detail, so details are what threads save, and a
closing sentence is written while the last detail is. A small model's own lists hold details of one sentence, and end where
chance wills. Here the same model goes on with its details, a line's end and EOS being banned, and stops after a set length:
where a detail ends is then something that can be learnt. The thread of a later detail begins later, by the steps of the
titles between, so that details which end together are shorter the later they come.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_apar.data.distillation.batches import TextAnswer, in_batches
from hf_apar.data.distillation.distill import with_template
from hf_apar.data.distillation.languages import language_of
from hf_apar.data.distillation.samplers import Continuation, Task, TextSampler
from hf_apar.data.extraction.markdown import extract
from hf_apar.data.extraction.sentences import sentence_ends
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.data.settings import Elaboration, Sampling
from hf_apar.errors import DataError
from hf_apar.text.chat import encode_chat
from hf_apar.text.encoding import encode_answer, encode_text

MORE_TOKENS = 40  # beyond the least length at most, so that a sentence can end
CLOSING_TOKENS = 32  # one that lists all titles again is longer, and left out
_MARKUP = re.compile(r"\*\*|(?<!\w)(?:\d{1,2}\.|[-*•])\s")  # a title, or the marker of an item


def elaborate(
    sample: TextSampler,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[TextAnswer],
    path: Path,
    *,
    min_detail_tokens: int = Elaboration.min_detail_tokens,
    closing: bool = True,
    batch_size: int = Sampling.batch_size,
    made_with: str = "",
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> Iterator[int]:
    """Even out ``answers``, append them to ``path`` (JSON Lines) in their order, yield how many are done so far.

    A detail ends with the first sentence that brings it to ``min_detail_tokens``; one stays shorter where the model comes to
    no end of a sentence in time, or begins another item. What does not fork stays as it is, and so do details of several
    lines, and answers that would not have the same parts afterwards. A second call with the same answers goes on where the
    first one stopped (:func:`~hf_apar.data.distillation.batches.in_batches`).

    Args:
        sample: goes on with texts; best the model that wrote ``answers``.
        min_detail_tokens: the least length of a detail; most have half a sentence more.
        closing: let a list be followed by a sentence that closes the answer, where nothing follows it yet and the answer
            is in one of :data:`~hf_apar.data.distillation.languages.LANGUAGES`.
        batch_size: answers at once, and texts that are gone on with at once.
        made_with: what ``sample`` is, in words that tell it from another: a second call is refused where they differ.
        chat_template_kwargs: as for :func:`~hf_apar.text.chat.encode_chat`; other ones are other settings.
    """
    measure = _Measure(tokenizer, min_detail_tokens, chat_template_kwargs)
    said = with_template(made_with, chat_template_kwargs)

    def longer(batch: Sequence[TextAnswer]) -> list[TextAnswer]:
        jobs = [_Job.of(answer, measure, closing) for answer in batch]
        tasks = [task for job in jobs for task in job.tasks]
        starts = range(0, len(tasks), batch_size)
        written = (one for start in starts for one in sample(tasks[start : start + batch_size]))
        return [job.result(measure, [next(written) for _ in job.tasks]) for job in jobs]

    return in_batches(answers, path, batch_size, (min_detail_tokens, closing, said), longer)


@dataclass(frozen=True)
class _Measure:
    tokenizer: PreTrainedTokenizerBase
    least: int
    chat_template_kwargs: Mapping[str, object] | None

    def prompt(self, question: str) -> list[int]:
        chat = [{"role": "user", "content": question}]
        return encode_chat(self.tokenizer, chat, chat_template_kwargs=self.chat_template_kwargs)

    def begun(self, prompt: list[int], text: str) -> list[int]:
        """Return ``prompt`` and an answer that begins with ``text``."""
        return [*prompt, *encode_answer(self.tokenizer, prompt, text)]

    def missing(self, text: str) -> int:
        """Return how many tokens a detail of this ``text`` lacks, at most 0 for none."""
        return self.least - len(encode_text(self.tokenizer, text))

    def cut(self, detail: str, more: str) -> str:
        """Return ``detail``, gone on with as ``more``, up to the first sentence end that makes it long enough.

        ``more`` may break off anywhere, and does where it goes on to the next item in the same line: where no sentence of it
        is complete, ``detail`` alone is left.
        """
        text = (detail + _MARKUP.split(more, maxsplit=1)[0]).rstrip()
        ends = sentence_ends(f"{text} And")  # a sentence ends where another one follows
        long_enough = next((end for end in ends if self.missing(text[:end]) <= 0), None)
        if long_enough is not None:
            return text[:long_enough]
        complete = [end for end in ends if end > len(detail)]
        return text[: complete[-1]] if complete else detail


@dataclass(frozen=True)
class _Job:
    """An answer, its tree, and what is to be sampled for it: a task for each of ``short``, then one if it is closed.

    The closing sentence begins with ``closing``, "" for none.
    """

    answer: TextAnswer
    tree: TextThread
    short: tuple[int, ...] = ()
    closing: str = ""
    tasks: tuple[Task, ...] = ()

    @classmethod
    def of(cls, answer: TextAnswer, measure: _Measure, close: bool) -> "_Job":
        tree = extract(answer.response)
        if not tree.is_structured:
            return cls(answer, tree)
        try:
            prompt = measure.prompt(answer.prompt)
        except DataError:  # the chat template refuses it; the answer stays as it is
            return cls(answer, tree)
        short, tasks = [], []
        for place, piece in enumerate(tree.pieces):
            missing = measure.missing(_text(piece)) if _is_line(piece) else 0
            if missing > 0:
                before = "".join(map(_text, tree.pieces[: place + 1]))
                short.append(place)
                tasks.append(Task(measure.begun(prompt, before), missing + MORE_TOKENS, sentence_after=missing))
        language = language_of(answer.response) if close and isinstance(tree.pieces[-1], TextThread) else None
        closing = random.Random(answer.prompt).choice(language.closings) if language else ""
        if closing:
            tasks.append(Task(measure.begun(prompt, f"{answer.response}\n\n{closing}"), CLOSING_TOKENS, stop="\n"))
        return cls(answer, tree, tuple(short), closing, tuple(tasks))

    def result(self, measure: _Measure, written: Sequence[Continuation]) -> TextAnswer:
        more = dict(zip(self.short, (one.text for one in written), strict=False))
        pieces = list(map(_text, self.tree.pieces))
        for place, piece in enumerate(self.tree.pieces):
            if _is_line(piece):
                pieces[place] = measure.cut(pieces[place], more.get(place, ""))
        details = [text for text, piece in zip(pieces, self.tree.pieces, strict=True) if isinstance(piece, TextThread)]
        sentence = closing_sentence(self.closing, written[-1]) if self.closing else ""
        response = "".join(pieces)
        for text in (f"{response}\n\n{sentence}" if sentence else response, response):
            if [child.text for child in extract(text).children] == details:
                return replace(self.answer, response=text)
        return self.answer


def closing_sentence(start: str, written: Continuation) -> str:
    """Return the first sentence of a paragraph that begins with ``start``, "" where none is complete.

    >>> closing_sentence("In short,", Continuation(" you rest well. And more", False))
    'In short, you rest well.'
    >>> closing_sentence("In short,", Continuation(" you rest", False))
    ''
    """
    text = start + _MARKUP.split(written.text, maxsplit=1)[0].rstrip()
    return text[: next(iter(sentence_ends(f"{text} And")), 0)]


def _is_line(piece: str | TextThread) -> bool:
    """Is it a detail of one line?"""
    return isinstance(piece, TextThread) and "\n" not in piece.text.strip()


def _text(piece: str | TextThread) -> str:
    return piece if isinstance(piece, str) else piece.text
