"""What answers the prompts of self-distillation: transformers, which runs any model, or vLLM, which is faster."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, RepetitionPenaltyLogitsProcessor

from hf_apar.data.settings import Sampling
from hf_apar.forward.cache import new_tree_cache
from hf_apar.generation_settings import eos_token_ids
from hf_apar.text.encoding import decode_text, token_texts

LEAD_TOKENS = 48
"""The most tokens of an answer's first words, which are sampled before a list is opened."""
SENTENCE_ENDS = (". ", "! ", "? ", "。", "！", "？")


@dataclass(frozen=True)
class Task:
    """A prompt of token ids to go on with, until EOS, the text ``stop`` unless that is "", or ``max_new_tokens``.

    With ``sentence_after`` it is gone on with in its line, with neither EOS nor a line's end, until a sentence ends after
    more tokens than these, so far as :data:`SENTENCE_ENDS` tell; there is no other stop then.
    """

    prompt: list[int]
    max_new_tokens: int
    stop: str = ""
    sentence_after: int = 0

    def __post_init__(self) -> None:
        assert not (self.stop and self.sentence_after)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end it."""
        return SENTENCE_ENDS if self.sentence_after else (self.stop,) if self.stop else ()


@dataclass(frozen=True)
class Continuation:
    """What a model wrote for a task, without EOS or the stop; ``ended`` is false where the length limit cut it off.

    The text reads on after the prompt's: it begins with a space where an answer that is decoded alone may have none
    (:func:`hf_apar.text.encoding.answer_text`).
    Where a sentence's end was asked for, its mark is the last of ``text``.
    """

    text: str
    ended: bool


class TextSampler(Protocol):
    """Lets a model go on with prompts; :class:`TransformersSampler` is one."""

    def __call__(self, tasks: Sequence[Task]) -> list[Continuation]: ...


@dataclass(frozen=True)
class TransformersSampler:
    """Samples among the ``top_k`` best with any model that transformers runs.

    ``generate`` would draw from the whole vocabulary and keep finished rows in the batch; on a CPU that is two thirds of
    the time. Here finished rows leave once they are a quarter of the batch.

    Attributes:
        temperature: of sampling; at 0 the likeliest token is taken.
        repetition_penalty: as that of ``generate``; small models loop without one.
        straggler_share: the batch ends when at most this share of its rows still writes; those rows count as cut off.
            For drafts of an answer's beginning, shorter than :data:`LEAD_TOKENS`, and for sentences every row is waited for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    temperature: float = Sampling.temperature
    top_k: int = 50
    repetition_penalty: float = Sampling.repetition_penalty
    straggler_share: float = 0.1

    def __call__(self, tasks: Sequence[Task]) -> list[Continuation]:
        """Go on with the prompt of each of ``tasks``."""
        return _sample(self, tasks) if tasks else []


@dataclass(frozen=True)
class VllmSampler:
    """Samples with vLLM, which takes new prompts as others end: about five times the tokens a second, on a CPU too.

    Attributes:
        llm: a ``vllm.LLM`` of the model whose ``tokenizer`` made the prompts; its seed is that of the answers.
        temperature: of sampling; at 0 the likeliest token is taken.
        repetition_penalty: as that of ``generate``.
    """

    llm: Any
    tokenizer: PreTrainedTokenizerBase
    temperature: float = Sampling.temperature
    top_k: int = 50
    repetition_penalty: float = Sampling.repetition_penalty

    def __call__(self, tasks: Sequence[Task]) -> list[Continuation]:
        """Go on with the prompt of each of ``tasks``."""
        from vllm import SamplingParams

        options = [
            SamplingParams(
                temperature=self.temperature, top_k=self.top_k, repetition_penalty=self.repetition_penalty,
                max_tokens=task.max_new_tokens, stop=list(task.stops),
                **(self._in_line(task) if task.sentence_after else {}),
            )
            for task in tasks
        ]  # fmt: skip
        out = self.llm.generate([{"prompt_token_ids": task.prompt} for task in tasks], options, use_tqdm=False)
        ended = [answer.outputs[0].finish_reason == "stop" for answer in out]
        texts = [answer.outputs[0].text for answer in out]
        return [
            Continuation(text.rstrip(" ") if end and task.sentence_after else text, end)
            for task, text, end in zip(tasks, texts, ended, strict=True)
        ]

    def _in_line(self, task: Task) -> dict[str, object]:
        return {
            "min_tokens": task.sentence_after,
            "include_stop_str_in_output": True,
            "logit_bias": dict.fromkeys(line_ends(self.tokenizer), -100.0),
        }


@cache
def line_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that no line goes on after: those with a line's end in them, and special ones such as EOS."""
    special = set(tokenizer.all_special_ids)
    return [token for token, piece in enumerate(token_texts(tokenizer)) if "\n" in piece or token in special]


@cache
def _with_marks(tokenizer: PreTrainedTokenizerBase, marks: frozenset[str]) -> frozenset[int]:
    """Return the tokens that hold one of ``marks``, or a part of a letter, which may be one."""
    pieces = enumerate(token_texts(tokenizer))
    return frozenset(token for token, piece in pieces if not (marks | {"\ufffd"}).isdisjoint(piece))


@torch.no_grad()
def _sample(sampler: TransformersSampler, tasks: Sequence[Task]) -> list[Continuation]:
    model, tokenizer = sampler.model, sampler.tokenizer
    penalise = RepetitionPenaltyLogitsProcessor(sampler.repetition_penalty)
    width = max(len(task.prompt) for task in tasks)
    gaps = [width - len(task.prompt) for task in tasks]
    input_ids = torch.tensor([task.prompt[:1] * gap + task.prompt for task, gap in zip(tasks, gaps, strict=True)])
    attention_mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps])
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    assert model.generation_config is not None
    eos = {*eos_token_ids(model.generation_config), tokenizer.eos_token_id} - {None}
    rows = [_Row(tokenizer, task, eos) for task in tasks]
    cache, running = new_tree_cache(model), rows
    positions, seen = (attention_mask.cumsum(1) - 1).clamp(min=0), input_ids  # (rows, tokens so far): what is penalised
    longest = max(task.max_new_tokens for task in tasks)
    hurried = longest > LEAD_TOKENS and not any(task.sentence_after for task in tasks)
    patience = sampler.straggler_share * len(rows) if hurried else 0
    for _ in range(longest):
        cache.prepare(None, attention_mask.shape[1], input_ids.shape[1])
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=True,
            logits_to_keep=1, **{cache.argument: cache},
        ).logits[:, -1].float()  # fmt: skip
        logits = penalise(seen, logits)
        in_line = [index for index, row in enumerate(running) if row.task.sentence_after]
        if in_line:
            logits[torch.tensor(in_line)[:, None], torch.tensor([*line_ends(tokenizer), *eos])] = -torch.inf
        best = logits.topk(sampler.top_k if sampler.temperature else 1)
        odds = (best.values / (sampler.temperature or 1.0)).softmax(-1)
        input_ids = best.indices.gather(1, torch.multinomial(odds, 1))  # (rows, 1)
        seen = torch.cat([seen, input_ids], dim=1)
        for row, token in zip(running, input_ids[:, 0].tolist(), strict=True):
            row.append(token)
        going = [index for index, row in enumerate(running) if not row.done]
        if len(going) <= patience:
            break
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(running), 1)], dim=1)
        positions = positions[:, -1:] + 1
        if len(going) <= 0.75 * len(running):
            keep = torch.tensor(going, device=input_ids.device)
            cache.keep_rows(keep)
            input_ids, attention_mask, positions, seen = (
                tensor[keep] for tensor in (input_ids, attention_mask, positions, seen)
            )
            running = [running[index] for index in going]
    return [row.written for row in rows]


@dataclass
class _Row:
    """What one task's row has written so far."""

    tokenizer: PreTrainedTokenizerBase
    task: Task
    eos: set[int]
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    read: int = 0  # letters that hold no stop that counts

    @property
    def done(self) -> bool:
        return self.ended or len(self.tokens) == self.task.max_new_tokens

    def append(self, token: int) -> None:
        if self.done:
            return  # a row that is done stays in the batch for a while
        self.ended = token in self.eos
        if not self.ended:
            self.tokens.append(token)
            marks = frozenset((stop.rstrip() or stop)[-1] for stop in self.task.stops)  # a space may be the next token
            if _with_marks(self.tokenizer, marks).isdisjoint(self.tokens[-2:]):
                return  # to decode every row at every step would take longer than the step on a GPU
            text = self._text(self.tokens)  # of all: a decoder of bytes makes nothing of some that begin within a letter
            stopped = any(text.find(stop, max(self.read - len(stop) + 1, 0)) >= 0 for stop in self.task.stops)  # just now
            self.read = max(self.read, len(text.rstrip("\ufffd")))  # a letter may take several tokens
            self.ended = stopped and len(self.tokens) > self.task.sentence_after

    @property
    def written(self) -> Continuation:
        text = self._text(self.tokens)
        if self.task.sentence_after and self.ended:
            text = text[: max(text.rfind(end) + len(end.rstrip(" ")) for end in self.task.stops if end in text)]
        elif self.task.stop:
            text = text.partition(self.task.stop)[0]
        return Continuation(text, self.ended)

    def _text(self, tokens: list[int]) -> str:
        return decode_text(self.tokenizer, tokens)
