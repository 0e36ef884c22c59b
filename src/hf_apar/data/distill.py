"""Self-distillation: the model answers prompts itself, so that fine-tuning teaches it where to fork and nothing else.

The answers are the training text (paper, section 3.2, with the model's own voice in place of a foreign corpus). An answer
that a length limit cut off would teach the model not to end and not to fork: it is left out.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from hf_apar.chat import encode_chat

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A prompt, and the words that the answer must open with: an opened list makes a small model write one."""

    prompt: str
    opening: str = ""


@dataclass(frozen=True)
class Answer:
    """A prompt of one user turn and the model's own, finished answer to it, its opening included."""

    prompt: str
    response: str


class _StragglersLeft(StoppingCriteria):
    """Ends a batch once all but a ``share`` of its rows have ended: the last rows would cost as much as all others."""

    def __init__(self, eos_token_id: int, prompt_length: int, share: float) -> None:
        self.eos_token_id, self.prompt_length, self.share = eos_token_id, prompt_length, share

    def __call__(self, input_ids: LongTensor, scores: Tensor, **kwargs: object) -> Tensor:  # type: ignore[override]
        running = (input_ids[:, self.prompt_length :] != self.eos_token_id).all(dim=1)  # (batch,)
        return torch.full_like(running, fill_value=bool(running.float().mean() <= self.share))


def read_answers(path: Path) -> list[Answer]:
    """Read the answers that :func:`distill` wrote to ``path``, none if there is no such file."""
    if not path.exists():
        return []
    return [Answer(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    path: Path,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 384,
    temperature: float = 0.6,
    straggler_share: float = 0.25,
) -> Iterator[int]:
    """Answer ``questions`` by sampling, append finished answers to ``path`` (JSON Lines), yield the questions done so far.

    A second call with the same questions goes on where the first one stopped: the position is kept in ``path`` + ``.done``.

    Args:
        batch_size: questions answered at once.
        max_new_tokens: longer answers are dropped.
        straggler_share: a batch ends when at most this share of its rows still writes; those rows are dropped.
    """
    progress = path.with_name(path.name + ".done")
    done = int(progress.read_text()) if progress.exists() else 0
    for start in range(done, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        answers = _answer(model, tokenizer, batch, max_new_tokens, temperature, straggler_share)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        progress.write_text(str(start + len(batch)))
        logger.info("%d of %d answers finished", len(answers), len(batch))
        yield start + len(batch)


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
    temperature: float,
    straggler_share: float,
) -> list[Answer]:
    prompts = [
        encode_chat(tokenizer, [{"role": "user", "content": question.prompt}])
        + tokenizer.encode(question.opening, add_special_tokens=False)
        for question in questions
    ]
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    rows = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=50,
        stopping_criteria=StoppingCriteriaList([_StragglersLeft(eos, length, straggler_share)]),
    )[:, length:]
    return [
        Answer(question.prompt, question.opening + tokenizer.decode(row[: row.index(eos)], skip_special_tokens=True))
        for question, row in zip(questions, rows.tolist(), strict=True)
        if eos in row
    ]
