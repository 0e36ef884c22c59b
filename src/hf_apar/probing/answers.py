"""The answers that are probed: of a model, of one behind a server, or those of chats that are there already."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hf_apar.data.distillation.batches import Dropped, TextAnswer, in_batches
from hf_apar.data.distillation.distill import with_template
from hf_apar.data.distillation.samplers import Task, TextSampler
from hf_apar.data.records.chats import is_answer, read_chat
from hf_apar.data.records.files import usable
from hf_apar.errors import DataError
from hf_apar.evaluation.suites import Prompt, drawn
from hf_apar.text.chat import encode_chat
from hf_apar.text.encoding import answer_text


@dataclass(frozen=True)
class ProbeAnswer(TextAnswer):
    """An answer to a prompt, whose last message ``prompt`` is; ``ended`` is false where the limit of tokens cut it."""

    key: str
    ended: bool = True


def ask_model(
    sample: TextSampler,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    path: Path,
    *,
    batch_size: int,
    max_new_tokens: int,
    made_with: str,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> Iterator[int]:
    """Let a model answer ``prompts``, append the answers to ``path`` batch by batch, yield how many are done so far.

    A second call goes on where the first one stopped (:func:`~hf_apar.data.distillation.batches.in_batches`). Prompts that
    the chat template refuses are left out, and counted in ``path`` + ``.report.json``.
    """

    def encoded(prompt: Prompt) -> list[int] | Dropped:
        try:
            return encode_chat(tokenizer, prompt.messages, chat_template_kwargs=chat_template_kwargs)
        except DataError as error:
            return Dropped(str(error))

    def answer(batch: Sequence[Prompt]) -> list[ProbeAnswer | Dropped]:
        rows = [encoded(prompt) for prompt in batch]
        written = iter(sample([Task(row, max_new_tokens) for row in rows if not isinstance(row, Dropped)]))
        outcomes: list[ProbeAnswer | Dropped] = []
        for prompt, row in zip(batch, rows, strict=True):
            if isinstance(row, Dropped):
                outcomes.append(row)
            else:
                one = next(written)
                outcomes.append(ProbeAnswer(prompt.text, answer_text(tokenizer, one.text), prompt.key, one.ended))
        return outcomes

    return in_batches(prompts, path, batch_size, (max_new_tokens, with_template(made_with, chat_template_kwargs)), answer)


def read_asked(path: Path) -> list[ProbeAnswer]:
    """Return the answers that :func:`ask_model` or :func:`~hf_apar.probing.served.ask_server` wrote to ``path``."""
    with path.open(encoding="utf-8") as file:
        return [ProbeAnswer(**json.loads(line)) for line in file]


def answers_of_chats(path: Path, *, sample: int | None = None, seed: int = 0) -> list[ProbeAnswer]:
    """Return the first answer of each chat in a file: one of a chat, as others of it are not independent.

    A warning tells of records that cannot be used.

    Args:
        path: as for :func:`~hf_apar.data.records.files.open_records`; records as for
            :func:`~hf_apar.data.records.chats.read_chat`.
        sample: draw at most so many, as for :func:`~hf_apar.evaluation.suites.drawn`.
        seed: of that draw.

    Raises:
        DataError: if none can be used.
    """

    def first(record: object, number: int) -> ProbeAnswer:
        messages = read_chat(record).messages
        place = next(place for place, message in enumerate(messages) if is_answer(message))
        return ProbeAnswer(messages[place - 1]["content"], messages[place]["content"], f"{path.stem}-{number}")

    found = usable(path, first, "chats with answers; a model answers prompts alone: name it with --model")
    return drawn(found, sample, seed)
