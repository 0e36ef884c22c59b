"""What a thread has written so far, for logits processors that change what it may write next."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.generation_settings import eos_token_ids, padding_token
from hf_apar.tokens import find_control_tokens

_CLAUSES = (".", "!", "?", ":", ";", ",", "…", "。", "！", "？", "：", "；", "，", "、")
_LEAST = 1e4  # logits that no model has, and half precision holds
_WORDS = ("Ġ", "▁", "Ċ", " ", "\n")  # how byte-level and sentencepiece vocabularies spell the space before a word


@dataclass(frozen=True)
class Signs:
    """The tokens by which a path is read.

    Attributes:
        fork, child: the control tokens.
        ends: end a thread, the preferred one first.
        pad: fills prompts up on the left.
        clauses: a sentence or a clause ends with them.
        words: a word begins with them.
        lines: hold a line break.
        digits: numbers, after which a full stop or a comma ends nothing.
    """

    fork: int
    child: int
    ends: tuple[int, ...]
    pad: int
    clauses: frozenset[int] = frozenset()
    words: frozenset[int] = frozenset()
    lines: frozenset[int] = frozenset()
    digits: frozenset[int] = frozenset()

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Return those of a checkpoint.

        Raises:
            ControlTokenError: if it has no control tokens.
        """
        fork, child = find_control_tokens(model, tokenizer)
        ends, pad = eos_token_ids(model.generation_config), padding_token(model.generation_config)
        special = {fork, child, *ends, *tokenizer.all_special_ids}
        pieces = {token: piece for piece, token in tokenizer.get_vocab().items() if token not in special}
        texts = {token: cast(str, tokenizer.decode([token])) for token in pieces}
        return cls(
            fork, child, tuple(ends), pad,
            clauses=frozenset(token for token, text in texts.items() if text.rstrip().endswith(_CLAUSES)),
            words=frozenset(token for token, piece in pieces.items() if piece.startswith(_WORDS)),
            lines=frozenset(token for token, text in texts.items() if "\n" in text),
            digits=frozenset(token for token, text in texts.items() if text.strip().isdecimal()),
        )  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A path before its next token: the prompt without padding, and what follows it, control tokens included."""

    prompt: tuple[int, ...]
    new: tuple[int, ...]
    signs: Signs

    @cached_property
    def start(self) -> int:
        """Where in ``new`` the thread's own tokens begin: after the last [Child]."""
        return max((place for place, token in enumerate(self.new, start=1) if token == self.signs.child), default=0)

    @property
    def is_root(self) -> bool:
        return self.start == 0

    @property
    def own(self) -> tuple[int, ...]:
        """What the thread itself has written."""
        return self.new[self.start :]

    @property
    def ends_clause(self) -> bool:
        """Has the thread just ended a sentence or clause?"""
        own, signs = self.own, self.signs
        return bool(own) and own[-1] in signs.clauses and not (len(own) > 1 and own[-2] in signs.digits)

    @property
    def path(self) -> tuple[int, ...]:
        return self.prompt + self.new

    @property
    def given(self) -> tuple[int, ...]:
        """The path with which the thread began: no other thread has it."""
        return self.prompt + self.new[: self.start]


class PathProcessor(LogitsProcessor, ABC):
    """Changes scores by what each path holds, and by nothing else: so batch, schedule and drafts make no difference.

    Args:
        prompt_length: that of the padded prompts, ``input_ids.shape[1]`` of the call of ``generate``.
    """

    def __init__(self, signs: Signs, prompt_length: int) -> None:
        self.signs, self.prompt_length = signs, prompt_length

    @abstractmethod
    def edit(self, written: Written, scores: Tensor) -> None:
        """Change ``scores`` (vocabulary,) of the token after ``written``, in place."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, ids in enumerate(input_ids.tolist()):
            padding = next((place for place, token in enumerate(ids) if token != self.signs.pad), 0)
            prompt, new = ids[padding : self.prompt_length], ids[self.prompt_length :]
            self.edit(Written(tuple(prompt), tuple(new), self.signs), scores[row])
        return scores


def force(scores: Tensor, token: int) -> None:
    """Let nothing but ``token`` follow, unless it is banned here."""
    if scores[token] > -torch.inf:
        scores.fill_(-torch.inf)
        scores[token] = 0.0


def withhold(scores: Tensor, tokens: Sequence[int]) -> None:
    """Let none of ``tokens`` follow."""
    scores[list(tokens)] = -torch.inf


def discourage(scores: Tensor, tokens: Sequence[int]) -> None:
    """Let any other token that may follow go before ``tokens``; :func:`force` still gets them, where nothing bans them."""
    scores[list(tokens)] = scores[list(tokens)].clamp(max=-_LEAST)
