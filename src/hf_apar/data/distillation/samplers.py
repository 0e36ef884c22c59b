"""What answers the prompts of self-distillation: transformers, which runs any model, or vLLM, which is faster."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import compress
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_apar.data.settings import Sampling
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
    """Samples among the ``top_k`` best with ``generate``, with any model that transformers runs.

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

    A prompt that fills the engine's context is not gone on with; it counts as cut off.

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

        fits = [len(task.prompt) < self.llm.model_config.max_model_len for task in tasks]
        fitting = list(compress(tasks, fits))
        options = [
            SamplingParams(
                temperature=self.temperature, top_k=self.top_k, repetition_penalty=self.repetition_penalty,
                max_tokens=task.max_new_tokens, stop=list(task.stops),
                **(self._in_line(task) if task.sentence_after else {}),
            )
            for task in fitting
        ]  # fmt: skip
        out = self.llm.generate([{"prompt_token_ids": task.prompt} for task in fitting], options, use_tqdm=False)
        made = iter([answer.outputs[0] for answer in out])
        pairs = zip(tasks, fits, strict=True)
        return [self._written(task, next(made)) if fit else Continuation("", False) for task, fit in pairs]

    def _written(self, task: Task, made: Any) -> Continuation:
        ended = made.finish_reason == "stop"
        return Continuation(made.text.rstrip(" ") if ended and task.sentence_after else made.text, ended)

    def _in_line(self, task: Task) -> dict[str, object]:
        known = self.llm.model_config.get_vocab_size()  # a tokenizer may have more tokens than the model has rows
        return {
            "min_tokens": task.sentence_after,
            "include_stop_str_in_output": True,
            "logit_bias": {token: -100.0 for token in line_ends(self.tokenizer) if token < known},
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


def _sample(sampler: TransformersSampler, tasks: Sequence[Task]) -> list[Continuation]:
    model, tokenizer = sampler.model, sampler.tokenizer
    assert model.generation_config is not None
    eos = sorted({*eos_token_ids(model.generation_config), tokenizer.eos_token_id} - {None})
    rows = [_Row(tokenizer, task, set(eos)) for task in tasks]
    longest = max(task.max_new_tokens for task in tasks)
    hurried = longest > LEAD_TOKENS and not any(task.sentence_after for task in tasks)
    generate = cast(Callable[..., object], model.generate)  # the stubs take it for a module
    drawn = {"do_sample": True, "temperature": sampler.temperature, "top_k": sampler.top_k}
    with own_settings(model, GenerationConfig(eos_token_id=eos or None, pad_token_id=eos[0] if eos else 0)):
        generate(
            **_left_padded(tasks, model.device),
            max_new_tokens=longest,
            repetition_penalty=sampler.repetition_penalty,
            logits_processor=LogitsProcessorList([_StaysInLine(tasks, [*line_ends(tokenizer), *eos])]),
            stopping_criteria=StoppingCriteriaList([_Ends(rows, sampler.straggler_share * len(rows) if hurried else 0)]),
            **(drawn if sampler.temperature else {"do_sample": False}),
        )
    return [row.written for row in rows]


@contextmanager
def own_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Let ``settings`` alone be the defaults of ``model.generate``: those of the checkpoint are for who talks to it."""
    before, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = before


def _left_padded(tasks: Sequence[Task], device: torch.device) -> dict[str, Tensor]:
    """Return the prompts, filled with a token of their own on the left: the penalty sees no other there."""
    width = max(len(task.prompt) for task in tasks)
    gaps = [width - len(task.prompt) for task in tasks]
    ids = [task.prompt[:1] * gap + task.prompt for task, gap in zip(tasks, gaps, strict=True)]
    mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


class _StaysInLine(LogitsProcessor):
    """Bans what ends a line from the rows that must stay in theirs."""

    def __init__(self, tasks: Sequence[Task], ends: Sequence[int]) -> None:
        self.rows = torch.tensor([row for row, task in enumerate(tasks) if task.sentence_after], dtype=torch.long)
        self.ends = torch.tensor(sorted(set(ends)), dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``scores`` (rows, vocabulary) without the ends of lines."""
        kept = scores.clone()
        known = self.ends[self.ends < scores.shape[-1]]  # a tokenizer may have more tokens than the model has rows
        kept[self.rows[:, None], known] = -torch.inf
        return kept


class _Ends(StoppingCriteria):
    """Ends each row where its task ends, and all of them once at most ``patience`` still write."""

    def __init__(self, rows: Sequence["_Row"], patience: float) -> None:
        self.rows, self.patience = rows, patience

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Return which rows are done, (rows,)."""
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.append(token)
        done = [row.done for row in self.rows]
        few_left = len(done) - sum(done) <= self.patience
        return torch.tensor([True] * len(done) if few_left else done, device=input_ids.device)


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
            return  # a row that is done stays in the batch, and is filled
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
