"""Self-distillation: the model answers prompts itself, so that fine-tuning teaches it where to fork and nothing else.

The answers are the training text (paper, section 3.2, with the model's own voice in place of a foreign corpus). An answer
that a length limit cut off would teach the model not to end and not to fork: it is left out.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, RepetitionPenaltyLogitsProcessor

from hf_apar.cache import new_tree_cache
from hf_apar.chat import encode_chat
from hf_apar.checks import eos_token_ids
from hf_apar.data.sentences import first_sentence_end

logger = logging.getLogger(__name__)

LEAD_TOKENS = 48


@dataclass(frozen=True)
class Question:
    """A prompt, and words that the answer must go on with after its first sentence, which is the model's own.

    A list that has been opened makes a small model write one: ``"Here are some key points:\\n\\n1. **"``.
    """

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


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt, without EOS; ``ended`` is false where the length limit cut it off."""

    tokens: list[int]
    ended: bool


class Sampler(Protocol):
    """Goes on with prompts of token ids, each with at most ``max_new_tokens``; :class:`TransformersSampler` is one."""

    def __call__(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[Written]: ...


def distill(
    sample: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    path: Path,
    *,
    batch_size: int = 64,
    max_new_tokens: int = 384,
) -> Iterator[int]:
    """Let ``sample`` answer ``questions``, append what ends to ``path`` (JSON Lines), yield how many are done so far.

    A second call with the same questions goes on where the first one stopped: ``path`` + ``.done`` keeps the position.

    Args:
        batch_size: questions answered at once.
        max_new_tokens: longer answers are dropped.
    """
    progress = path.with_name(path.name + ".done")
    done = int(progress.read_text()) if progress.exists() else 0
    for start in range(done, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        answers = _answer(sample, tokenizer, batch, max_new_tokens)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        progress.write_text(str(start + len(batch)))
        logger.info("%d of %d answers finished", len(answers), len(batch))
        yield start + len(batch)


def _answer(
    sample: Sampler, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], max_new_tokens: int
) -> list[Answer]:
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": question.prompt}]) for question in questions]
    leads = _leads(sample, tokenizer, questions, prompts)
    started = [
        [*prompt, *tokenizer.encode(lead, add_special_tokens=False)] for prompt, lead in zip(prompts, leads, strict=True)
    ]
    rows = sample(started, max_new_tokens)
    return [
        Answer(questions[row].prompt, leads[row] + str(tokenizer.decode(written.tokens, skip_special_tokens=True)))
        for row, written in enumerate(rows)
        if written.ended
    ]


def _leads(
    sample: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[list[int]],
) -> list[str]:
    """Return how each answer must start: with nothing, or with a sentence of its own and the question's opening."""
    opened = [row for row, question in enumerate(questions) if question.opening]
    leads = [""] * len(questions)
    if opened:
        for row, start in zip(opened, sample([prompts[row] for row in opened], LEAD_TOKENS), strict=True):
            text = str(tokenizer.decode(start.tokens, skip_special_tokens=True))
            leads[row] = opened_after(first_sentence(text), questions[row].opening)
    return leads


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


@dataclass(frozen=True)
class TransformersSampler:
    """Samples among the ``top_k`` best with any model that transformers runs.

    ``generate`` would draw from the whole vocabulary and keep finished rows in the batch; on a CPU that is two thirds of
    the time. Here finished rows leave once they are a quarter of the batch.

    Attributes:
        repetition_penalty: as that of ``generate``; small models loop without one.
        straggler_share: the batch ends when at most this share of its rows still writes; those rows count as cut off.
            For drafts of an answer's beginning, shorter than :data:`LEAD_TOKENS`, every row is waited for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    temperature: float = 0.6
    top_k: int = 50
    repetition_penalty: float = 1.0
    straggler_share: float = 0.1

    def __call__(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[Written]:
        """Go on with each of ``prompts``."""
        share = self.straggler_share if max_new_tokens > LEAD_TOKENS else 0.0
        return _sample(self, prompts, max_new_tokens, share)


@dataclass(frozen=True)
class VllmSampler:
    """Samples with vLLM, which takes new prompts as others end: about five times the tokens a second, on a CPU too.

    Attributes:
        llm: a ``vllm.LLM`` of the model whose tokenizer made the prompts; its seed is that of the answers.
        repetition_penalty: as that of ``generate``.
    """

    llm: Any
    temperature: float = 0.6
    top_k: int = 50
    repetition_penalty: float = 1.0

    def __call__(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[Written]:
        """Go on with each of ``prompts``."""
        from vllm import SamplingParams

        options = SamplingParams(
            temperature=self.temperature, top_k=self.top_k, repetition_penalty=self.repetition_penalty,
            max_tokens=max_new_tokens, detokenize=False,
        )  # fmt: skip
        out = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], options, use_tqdm=False)
        return [_without_end(answer.outputs[0]) for answer in out]


def _without_end(output: Any) -> Written:
    ended = output.finish_reason == "stop"  # the last token is EOS then
    return Written(list(output.token_ids[:-1] if ended else output.token_ids), ended)


@torch.no_grad()
def _sample(
    sampler: TransformersSampler, prompts: Sequence[list[int]], max_new_tokens: int, straggler_share: float
) -> list[Written]:
    model, tokenizer = sampler.model, sampler.tokenizer
    penalise = RepetitionPenaltyLogitsProcessor(sampler.repetition_penalty)
    width = max(map(len, prompts))
    input_ids = torch.tensor([prompt[:1] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]).to(model.device)
    assert model.generation_config is not None
    eos = {*eos_token_ids(model.generation_config), tokenizer.eos_token_id}
    cache, rows, ended = new_tree_cache(model.config), list(range(len(prompts))), set()
    written: list[list[int]] = [[] for _ in prompts]
    positions, seen = (attention_mask.cumsum(1) - 1).clamp(min=0), input_ids  # (rows, tokens so far): what is penalised
    for _ in range(max_new_tokens):
        cache.prepare(None, attention_mask.shape[1], input_ids.shape[1])
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        ).logits[:, -1].float()  # fmt: skip
        best = (penalise(seen, logits) / sampler.temperature).topk(sampler.top_k)
        input_ids = best.indices.gather(1, torch.multinomial(best.values.softmax(-1), 1))  # (rows, 1)
        seen = torch.cat([seen, input_ids], dim=1)
        for row, token in zip(rows, input_ids[:, 0].tolist(), strict=True):
            if token in eos:
                ended.add(row)
            elif row not in ended:  # a row that has ended stays in the batch for a while
                written[row].append(token)
        running = [index for index, row in enumerate(rows) if row not in ended]
        if len(running) <= straggler_share * len(written):
            break
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
        if len(running) <= 0.75 * len(rows):
            keep = torch.tensor(running, device=input_ids.device)
            cache.keep_rows(keep)
            input_ids, attention_mask, positions, seen = (
                tensor[keep] for tensor in (input_ids, attention_mask, positions, seen)
            )
            rows = [rows[index] for index in running]
    return [Written(tokens, row in ended) for row, tokens in enumerate(written)]
