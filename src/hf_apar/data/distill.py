"""Self-distillation: the model answers prompts itself, so that fine-tuning teaches it where to fork and nothing else.

The answers are the training text (paper, section 3.2, with the model's own voice in place of a foreign corpus). An answer
that a length limit cut off would teach the model not to end and not to fork: it is left out.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from hf_apar.chat import encode_chat
from hf_apar.data.samplers import LEAD_TOKENS, Sampler, Task
from hf_apar.data.sentences import first_sentence_end
from hf_apar.errors import DataError
from hf_apar.text import answer_text, encode_answer

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

GAP = "..."  # in an opening: words of the model's own, up to a colon


@dataclass(frozen=True)
class Question:
    """A prompt, and how its answer must begin: ``opening`` with the model's own words where :data:`GAP` stands in it.

    A list that has been opened makes a small model write one: ``"Here are ...:\\n\\n1. **"``. An opening without a gap comes
    after a first sentence, which is the model's own.
    """

    prompt: str
    opening: str = ""


@dataclass(frozen=True)
class Answer:
    """A prompt of one user turn and the model's own, finished answer to it, its opening included."""

    prompt: str
    response: str


def read_answers(path: Path) -> list[Answer]:
    """Read the answers that :func:`distill` wrote to ``path``, none if there is no such file.

    Raises:
        DataError: if a line is no such answer.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:  # splitlines() would cut at U+2028 too
        return [_read_answer(path, number, line) for number, line in enumerate(file, start=1)]


def _read_answer(path: Path, number: int, line: str) -> Answer:
    try:
        return Answer(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(
            f'{path}, line {number}: wanted {{"prompt": "...", "response": "..."}} and nothing else, as `hf-apar distill` '
            f"writes it, got {line.strip()[:80]}"
        ) from error


def distill(
    sample: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    path: Path,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 384,
    max_whole_tokens: int | None = None,
    max_items: int | None = None,
    made_with: str = "",
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> Iterator[int]:
    """Let ``sample`` answer ``questions``, append what ends to ``path`` (JSON Lines), yield how many are done so far.

    A second call with the same questions goes on where the first one stopped (:func:`in_batches`).

    Args:
        batch_size: questions answered at once.
        max_new_tokens: longer answers are dropped.
        max_whole_tokens: the same for questions without an opening; by default no less.
        max_items: a numbered list that an opening begins ends after so many items, or after as many as the prompt or the
            answer's first words announce. The end of a list whose length is left to chance is never its likeliest
            continuation, so that a model tuned on such lists hardly ends one. Where more are announced, or fewer follow
            than announced, the answer is dropped.
        made_with: what ``sample`` is, in words that tell it from another: a second call is refused where they differ.
        chat_template_kwargs: as for :func:`~hf_apar.chat.encode_chat`; other ones are other settings.
    """
    limits = _Limits(max_new_tokens, max_whole_tokens or max_new_tokens, max_items)

    def answer(batch: Sequence[Question]) -> list[Answer]:
        chats = [[{"role": "user", "content": question.prompt}] for question in batch]
        prompts = [encode_chat(tokenizer, chat, chat_template_kwargs=chat_template_kwargs) for chat in chats]
        return _answer(sample, tokenizer, batch, prompts, limits)

    return in_batches(questions, path, batch_size, (limits, with_template(made_with, chat_template_kwargs)), answer)


def with_template(made_with: str, chat_template_kwargs: Mapping[str, object] | None) -> str:
    """Return ``made_with`` with the variables of the chat template, if there are any: with others answers are others.

    >>> with_template("model A", None), with_template("model A", {"enable_thinking": False})
    ('model A', "model A {'enable_thinking': False}")
    """
    return f"{made_with} {dict(chat_template_kwargs)}" if chat_template_kwargs else made_with


def in_batches(
    items: Sequence[Item],
    path: Path,
    batch_size: int,
    settings: object,
    answer: Callable[[Sequence[Item]], list[Answer]],
) -> Iterator[int]:
    """Append to ``path`` what ``answer`` makes of ``items``, a batch at a time; yield how many items are done so far.

    ``path`` + ``.done`` keeps that number and a digest of these items and the ``settings``, and a second call goes on from
    there. More items may have come after those that are done.

    Raises:
        DataError: if what is done was made of other items, or with other settings.
    """
    progress = path.with_name(path.name + ".done")
    written = progress.read_text() if progress.exists() else f"0 {_digest(items[:0], settings)}"
    done, _, digest = written.partition(" ")  # a file of an earlier release has no digest, and so none that fits
    if digest != _digest(items[: int(done)], settings):
        raise DataError(
            f"{path} was made of other records or with other settings (model, engine, number format, temperature, penalty, "
            f"seed, lengths); go on with those, or remove it and {progress.name} to begin anew"
        )
    path.touch()
    for start in range(int(done), len(items), batch_size):
        batch = items[start : start + batch_size]
        answers = answer(batch)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        end = start + len(batch)
        progress.write_text(f"{end} {_digest(items[:end], settings)}")
        logger.info("%d answers of %d", len(answers), len(batch))
        yield end


def _digest(items: Sequence[object], settings: object) -> str:
    return hashlib.sha256(repr((settings, *items)).encode("utf-8", "backslashreplace")).hexdigest()


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
        if self.items is None or _FIRST_ITEM not in question.opening:
            return ""
        return f"\n{(announced(question.prompt, lead) or self.items) + 1}."

    def allow(self, question: Question, lead: str) -> bool:
        return self.items is None or not question.opening or (announced(question.prompt, lead) or 0) <= self.items

    def keeps(self, question: Question, lead: str, response: str) -> bool:
        """Does the list have as many items as it announces?"""
        count = announced(question.prompt, lead) if self.stop(question, lead) else None
        return count is None or f"\n{count}." in response


_FIRST_ITEM = "\n1. "
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_COUNT = re.compile(rf"(?:\S+\s+){{0,4}}?(?P<count>{'|'.join(_NUMBERS)}|[2-9]|1\d|20)\b(?!\s*%)", re.IGNORECASE)


def announced(*texts: str) -> int | None:
    """Return the number among the first five words of the first of ``texts`` that has one; English words and digits.

    >>> announced("How do I rest?", "Here are five ways to rest"), announced("List 8 trees."), announced("In 1900, trees")
    (5, 8, None)
    """
    for text in texts:
        if match := _COUNT.match(text):
            word = match["count"].lower()
            return int(word) if word.isdigit() else 2 + _NUMBERS.index(word)
    return None


def _answer(
    sample: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[list[int]],
    limits: _Limits,
) -> list[Answer]:
    leads = _leads(sample, tokenizer, questions, prompts)
    begun = [
        (question, prompt, lead)
        for question, prompt, lead in zip(questions, prompts, leads, strict=True)
        if lead is not None and limits.allow(question, lead)
    ]
    rows = sample([limits.task(tokenizer, prompt, question, lead) for question, prompt, lead in begun])
    return [
        Answer(question.prompt, _whole(tokenizer, lead, written.text).rstrip())
        for (question, _, lead), written in zip(begun, rows, strict=True)
        if written.ended and limits.keeps(question, lead, lead + written.text)
    ]


def _with_text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], text: str) -> list[int]:
    return [*prompt, *encode_answer(tokenizer, prompt, text)]


def _whole(tokenizer: PreTrainedTokenizerBase, start: str, written: str) -> str:
    """Return an answer that begins with ``start`` and goes on with what was ``written`` after it."""
    return start + written if start else answer_text(tokenizer, written)


def _leads(
    sample: Sampler,
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
            leads[row] = filled(opening, line) if GAP in opening else opened_after(first_sentence(line), opening)
    return leads


def _before_gap(opening: str) -> str:
    return opening.partition(GAP)[0].rstrip() if GAP in opening else ""


def filled(opening: str, words: str) -> str | None:
    """Return ``opening`` with ``words`` up to their colon or line end in its gap; ``None`` if they have neither.

    >>> filled("Here are ...:\\n\\n1. **", " three ways to rest:\\n\\n1. Sleep")
    'Here are three ways to rest:\\n\\n1. **'
    >>> filled("Here are ...:\\n\\n1. **", " ways to rest. Sleep:") is None
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
