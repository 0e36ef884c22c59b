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
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.cache import new_tree_cache
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


def read_answers(path: Path) -> list[Answer]:
    """Read the answers that :func:`distill` wrote to ``path``, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:  # splitlines() would cut at U+2028 too
        return [Answer(**json.loads(line)) for line in file]


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
    """Answer ``questions`` by sampling, append what ends to ``path`` (JSON Lines), yield how many are done so far.

    A second call with the same questions goes on where the first one stopped: ``path`` + ``.done`` keeps the position.

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
    rows = _sample(
        model,
        inputs["input_ids"],
        inputs["attention_mask"],
        int(tokenizer.eos_token_id),
        max_new_tokens,
        temperature,
        straggler_share,
    )
    return [
        Answer(questions[row].prompt, questions[row].opening + str(tokenizer.decode(tokens, skip_special_tokens=True)))
        for row, tokens in sorted(rows.items())
    ]


@torch.no_grad()
def _sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    eos: int,
    max_new_tokens: int,
    temperature: float,
    straggler_share: float,
    top_k: int = 50,
) -> dict[int, list[int]]:
    """Return the tokens of the rows that end by themselves.

    ``generate`` would draw from the whole vocabulary and keep finished rows in the batch; on a CPU that is two thirds of
    the time. Here the draw is among the ``top_k`` best, and finished rows leave once they are a quarter of the batch.
    """
    cache, rows, finished = new_tree_cache(model.config), list(range(len(input_ids))), {}
    written: dict[int, list[int]] = {row: [] for row in rows}
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    while rows:
        cache.prepare(None, attention_mask.shape[1], input_ids.shape[1])
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        ).logits[:, -1].float()  # fmt: skip
        best = (logits / temperature).topk(top_k)
        input_ids = best.indices.gather(1, torch.multinomial(best.values.softmax(-1), 1))  # (rows, 1)
        for row, token in zip(rows, input_ids[:, 0].tolist(), strict=True):
            if token == eos and row not in finished:
                finished[row] = list(written[row])  # a copy: the row stays in the batch for a while
            written[row].append(token)
        running = [index for index, row in enumerate(rows) if row not in finished]
        if len(running) <= straggler_share * len(written) or len(written[rows[0]]) == max_new_tokens:
            break
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
        if len(running) <= 0.75 * len(rows):
            keep = torch.tensor(running, device=input_ids.device)
            cache.keep_rows(keep)
            input_ids, attention_mask, positions = input_ids[keep], attention_mask[keep], positions[keep]
            rows = [rows[index] for index in running]
    return finished
