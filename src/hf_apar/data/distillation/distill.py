"""Self-distillation: the model answers prompts itself, so that fine-tuning teaches it where to fork and nothing else.

The answers are the training text (paper, section 3.2, with the model's own voice in place of a foreign corpus). An answer
that a length limit cut off would teach the model not to end and not to fork: it is left out.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_apar.data.distillation.batches import Dropped, TextAnswer, in_batches
from hf_apar.data.distillation.languages import announced
from hf_apar.data.distillation.samplers import LEAD_TOKENS, Task, TextSampler
from hf_apar.data.extraction.sentences import first_sentence_end
from hf_apar.data.records.chats import read_chat
from hf_apar.data.records.files import check_goes_on, open_records, record_of
from hf_apar.data.records.rejections import UNUSABLE, Rejected, Rejections
from hf_apar.data.settings import AnswerLimits, Sampling
from hf_apar.errors import DataError
from hf_apar.text.chat import encode_chat
from hf_apar.text.encoding import answer_text, encode_answer

logger = logging.getLogger(__name__)

CUT_OFF = "cut off at the most new tokens or by the model's context, or by far the longest of its batch"
EMPTY = "nothing was written"
NO_LEAD = "no words were found for the opening"
TOO_FEW = "fewer items follow than are announced"
TOO_LONG = "more items follow than are announced"
TOO_MANY = "more items are announced than are allowed"
GAP = "..."  # in an opening: words of the model's own, up to a colon


@dataclass(frozen=True)
class Question:
    """A prompt, and how its answer must begin: ``opening`` with the model's own words where :data:`GAP` stands in it.

    A list that has been opened makes a small model write one: ``"Here are ...:\\n\\n1. **"``. An opening without a gap comes
    after a first sentence, which is the model's own.
    """

    prompt: str
    opening: str = ""


def read_answers(path: Path, rejected: Rejections | None = None) -> list[TextAnswer]:
    """Read the answers that :func:`distill` wrote to ``path``, or other records of one question and its answer.

    Returns:
        The answers, none if there is no such file.

    Args:
        rejected: takes the records that cannot be used; by default a warning tells of them.

    Raises:
        DataError: if there are records, and none can be used, or the file cannot be read to its end.
    """
    if not path.exists():
        return []
    aside = Rejections(path) if rejected is None else rejected
    answers = []
    for number, row in open_records(path).rows:
        check_goes_on(path, row)
        try:
            answers.append(_read_answer(record_of(row)))
        except UNUSABLE as error:
            aside.add([Rejected.by(error, number, row)])
    if aside and not answers:
        raise aside.nothing_left('{"prompt": "...", "response": "..."}, as `hf-apar distill` writes it')
    if aside and rejected is None:
        logger.warning("%s", aside)
    return answers


def _read_answer(record: object) -> TextAnswer:
    messages = read_chat(record).messages
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise DataError("the record is not one prompt and one response to it")
    return TextAnswer(messages[0]["content"], messages[1]["content"])


def distill(
    sample: TextSampler,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    path: Path,
    *,
    batch_size: int = Sampling.batch_size,
    max_new_tokens: int = AnswerLimits.max_new_tokens,
    max_whole_tokens: int | None = AnswerLimits.max_whole_tokens,
    max_items: int | None = AnswerLimits.max_items,
    made_with: str = "",
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> Iterator[int]:
    """Let ``sample`` answer ``questions``, append what ends to ``path`` (JSON Lines), yield how many are done so far.

    A second call with the same questions goes on where the first one stopped (:func:`in_batches`). How many answers were
    dropped, and why, is in ``path`` + ``.report.json`` (:class:`~hf_apar.data.distillation.batches.BatchReport`).

    Args:
        batch_size: questions answered at once.
        max_new_tokens: longer answers are dropped.
        max_whole_tokens: the same for questions without an opening; by default no less.
        max_items: a numbered list ends after so many items, or after as many as the prompt or the answer's first words
            announce. The end of a list whose length is left to chance is never its likeliest continuation, so that a model
            tuned on such lists hardly ends one. Where its own words announce more, or more or fewer follow than announced,
            the answer is dropped.
        made_with: what ``sample`` is, in words that tell it from another: a second call is refused where they differ.
        chat_template_kwargs: as for :func:`~hf_apar.text.chat.encode_chat`; other ones are other settings.
    """
    limits = _Limits(max_new_tokens, max_whole_tokens or max_new_tokens, max_items)

    def prompt(question: Question) -> list[int] | Dropped:
        chat = [{"role": "user", "content": question.prompt}]
        try:
            return encode_chat(tokenizer, chat, chat_template_kwargs=chat_template_kwargs)
        except DataError as error:  # of this prompt; the others are answered
            return Dropped(str(error))

    def answer(batch: Sequence[Question]) -> list[TextAnswer | Dropped]:
        prompts = list(map(prompt, batch))
        taken = [(question, ids) for question, ids in zip(batch, prompts, strict=True) if not isinstance(ids, Dropped)]
        made = iter(_answer(sample, tokenizer, [one for one, _ in taken], [ids for _, ids in taken], limits))
        return [ids if isinstance(ids, Dropped) else next(made) for ids in prompts]

    return in_batches(questions, path, batch_size, (limits, with_template(made_with, chat_template_kwargs)), answer)


def with_template(made_with: str, chat_template_kwargs: Mapping[str, object] | None) -> str:
    """Return ``made_with`` with the variables of the chat template, if there are any: with others answers are others.

    >>> with_template("model A", None), with_template("model A", {"enable_thinking": False})
    ('model A', "model A {'enable_thinking': False}")
    """
    return f"{made_with} {dict(chat_template_kwargs)}" if chat_template_kwargs else made_with


@dataclass(frozen=True)
class _Limits:
    new_tokens: int
    whole_tokens: int
    items: int | None

    def task(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], question: Question, lead: str) -> Task:
        limit = self.new_tokens if question.opening else self.whole_tokens
        return Task(_with_text(tokenizer, prompt, lead), limit, self.stop(question, lead))

    def stop(self, question: Question, lead: str) -> str:
        """Return the marker of the first item that is one too many."""
        if self.items is None or (question.opening and _FIRST_ITEM not in question.opening):
            return ""
        return f"\n{(announced(question.prompt, lead) or self.items) + 1}."

    def allow(self, question: Question, begins: str) -> bool:
        """May the answer go on? Not where its own words announce too many; as many as are asked for are never too many."""
        return self.items is None or announced(question.prompt) is not None or (announced(begins) or 0) <= self.items

    def judged(self, question: Question, lead: str, response: str, ended: bool) -> TextAnswer | Dropped:
        """Return the answer if it ended, and is a list of as many items as it announces where it announces any."""
        if not ended:
            return Dropped(CUT_OFF)
        if not response.strip():
            return Dropped(EMPTY)
        before, first, _ = f"\n{response}".partition(_FIRST_ITEM)
        begins = lead or before.strip()
        count = announced(question.prompt, begins) if first and self.stop(question, lead) else None
        if count is not None and not self.allow(question, begins):
            return Dropped(TOO_MANY)
        if count is not None and f"\n{count}." not in response:
            return Dropped(TOO_FEW)
        if count is not None and f"\n{count + 1}." in response:
            return Dropped(TOO_LONG)
        return TextAnswer(question.prompt, response.rstrip())


_FIRST_ITEM = "\n1. "


def _answer(
    sample: TextSampler,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[list[int]],
    limits: _Limits,
) -> list[TextAnswer | Dropped]:
    leads = _leads(sample, tokenizer, questions, prompts)
    begun: list[tuple[Question, list[int], str]] = []
    outcomes: list[TextAnswer | Dropped] = []
    for question, prompt, lead in zip(questions, prompts, leads, strict=True):
        if lead is None or not limits.allow(question, lead):
            outcomes.append(Dropped(NO_LEAD if lead is None else TOO_MANY))
        else:
            begun.append((question, prompt, lead))
    rows = sample([limits.task(tokenizer, prompt, question, lead) for question, prompt, lead in begun])
    return outcomes + [
        limits.judged(question, lead, _whole(tokenizer, lead, written.text), written.ended)
        for (question, _, lead), written in zip(begun, rows, strict=True)
    ]


def _with_text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], text: str) -> list[int]:
    return [*prompt, *encode_answer(tokenizer, prompt, text)]


def _whole(tokenizer: PreTrainedTokenizerBase, start: str, written: str) -> str:
    """Return an answer that begins with ``start`` and goes on with what was ``written`` after it."""
    return start + written if start else answer_text(tokenizer, written)


def _leads(
    sample: TextSampler,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[list[int]],
) -> list[str | None]:
    """Return how each answer must start, "" where that is free; ``None`` where the model found no words for a gap."""
    opened = [row for row, question in enumerate(questions) if question.opening]
    leads: list[str | None] = [""] * len(questions)
    if opened:
        starts = [_before_gap(questions[row].opening) for row in opened]
        tasks = [
            Task(_with_text(tokenizer, prompts[row], start), LEAD_TOKENS, "\n")
            for row, start in zip(opened, starts, strict=True)
        ]
        for row, start, written in zip(opened, starts, sample(tasks), strict=True):
            text, opening = written.text if start else answer_text(tokenizer, written.text), questions[row].opening
            line = text + ("\n" if written.ended else "")
            leads[row] = with_lead(opening, line) if GAP in opening else opened_after(first_sentence(line), opening)
    return leads


def _before_gap(opening: str) -> str:
    return opening.partition(GAP)[0].rstrip() if GAP in opening else ""


def with_lead(opening: str, words: str) -> str | None:
    """Return ``opening`` with ``words`` up to their colon or line end in its gap; ``None`` if they have neither.

    >>> with_lead("Here are ...:\\n\\n1. **", " three ways to rest:\\n\\n1. Sleep")
    'Here are three ways to rest:\\n\\n1. **'
    >>> with_lead("Here are ...:\\n\\n1. **", " ways to rest. Sleep:") is None
    True
    """
    start, _, rest = opening.partition(GAP)
    own = re.match(r"\s*([^:\n.!?]+)[:\n]", words)
    return None if own is None else start + own[1].rstrip() + rest


def first_sentence(text: str) -> str:
    """Return the sentence that ``text`` starts with, "" where none is complete or it starts with markup.

    >>> first_sentence("Trees help. They give shade."), first_sentence("Trees help:\\n\\n1. They"), first_sentence("1. **A")
    ('Trees help.', 'Trees help:', '')
    """
    line = text.split("\n", 1)[0]
    if not line[:1].isalpha():
        return ""
    end = first_sentence_end(line)
    return line[:end] if end is not None else line.rstrip() if line.rstrip().endswith((".", "!", "?", ":")) else ""


def opened_after(sentence: str, opening: str) -> str:
    """Return ``sentence`` and ``opening``, whose own words are left out if the sentence announces a list already.

    >>> opened_after("Trees help:", "Here is how:\\n\\n1. **")
    'Trees help:\\n\\n1. **'
    """
    if not sentence:
        return opening
    if sentence.endswith(":") and "\n\n" in opening:
        return sentence + opening[opening.index("\n\n") :]
    return f"{sentence} {opening}"
