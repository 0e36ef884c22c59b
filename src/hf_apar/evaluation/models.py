"""The models of an evaluation, each loaded once."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.checkpoints.default_model import DEFAULT_ADAPTER, DEFAULT_BASE, load_default_base, load_default_model
from hf_apar.checkpoints.heads import find_heads
from hf_apar.checkpoints.loading import AparModelForCausalLM, load_base, load_tokenizer
from hf_apar.checkpoints.sources import find_source
from hf_apar.errors import ConfigurationError
from hf_apar.evaluation.suites import Prompt
from hf_apar.evaluation.written import Signs
from hf_apar.generation_settings import padding_token
from hf_apar.prepacking import TYPICAL, prepackable, prepacked
from hf_apar.text.chat import encode_chat

_BEGINS = 64  # values of a weight that tell it from what it is after another training


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer.

    Attributes:
        name: where it came from.
        heads: the folder of the heads that lie with it, if any do.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: Path | None = None
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def signs(self) -> Signs:
        """The tokens by which what it writes is read; a second's work for a large vocabulary.

        Raises:
            ControlTokenError: if it has no control tokens.
        """
        return Signs.of(self.model, self.tokenizer)

    @cached_property
    def weights(self) -> str:
        """A digest of the beginning of each weight and of the generation config: of what was trained again it is another."""
        settings = self.model.generation_config.to_json_string() if self.model.generation_config else ""
        found = hashlib.sha256(settings.encode())
        for name, weight in self.model.state_dict().items():
            begins = b"" if weight.is_meta else weight.flatten()[:_BEGINS].float().cpu().numpy().tobytes()
            found.update(f"{name} {[*weight.shape]}".encode() + begins)
        return found.hexdigest()[:16]

    def encoded(self, prompt: Prompt) -> list[int]:
        """Return the chat of a prompt as token ids."""
        return encode_chat(self.tokenizer, [*prompt.messages], chat_template_kwargs=self.chat_template_kwargs)


@dataclass
class Models:
    """Loads what arms ask for.

    Attributes:
        checkpoint: the APAR checkpoint; ``None`` for the model that ships.
        base: the model before its tuning, on which the checkpoint is put where it is an adapter; ``None`` for the one that
            the checkpoint names.
        options: those of ``from_pretrained``, for all of them; a device map goes before ``device``.
        prepack: answer with prepacked weights, :func:`hf_apar.prepacked`.
    """

    checkpoint: str | None = None
    base: str | None = None
    dtype: torch.dtype | str = torch.bfloat16
    device: str = "cpu"
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    prepack: bool = False
    _loaded: dict[tuple[str, bool], Loaded] = field(default_factory=dict)
    _blocks: ExitStack = field(default_factory=ExitStack)  # as long as these models

    def apar(self, name: str = "") -> Loaded:
        """Return a checkpoint that forks: ``name``, or the one that is evaluated."""
        return self._once(name or self.checkpoint or "", True)

    def plain(self, name: str = "") -> Loaded:
        """Return a model that need not fork: ``name``, or the base of the checkpoint that is evaluated.

        Raises:
            ConfigurationError: if the checkpoint does not tell its base.
        """
        return self._once(name or self.base or self._named_base(), False)

    def exact_base(self) -> Loaded:
        """Return the base in float32, to measure with: in bfloat16 a token's likelihood is rounded to three digits."""
        exact = torch.float32
        return Models(self.checkpoint, self.base, exact, self.device, self.chat_template_kwargs, self.options).plain()

    def settings(self) -> dict[str, object]:
        """Return what answers depend on, as JSON can hold it."""
        return {
            "model": self.checkpoint or DEFAULT_ADAPTER.name,
            "base": self.base,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "chat_template_kwargs": dict(self.chat_template_kwargs),
            "prepack": self.prepack,
        }

    @property
    def penalty(self) -> float:
        """The repetition penalty that the checkpoint decodes with."""
        generation = self.apar().model.generation_config
        return float((generation and generation.repetition_penalty) or 1.0)

    def _once(self, name: str, forks: bool) -> Loaded:
        if (name, forks) not in self._loaded:
            self._loaded[name, forks] = self._load(name, forks)
        return self._loaded[name, forks]

    def _load(self, name: str, forks: bool) -> Loaded:
        if not forks:
            model, tokenizer = load_base(name, dtype=self.dtype, **self.options)
            if name == self.base:
                self._check_vocabulary(tokenizer)
        elif not name:
            model, tokenizer = load_default_model(dtype=self.dtype, **self.options)
        else:
            base = None if self.base is None or _recorded_base(name) is None else self.base
            if base is not None:
                self._check_vocabulary(load_tokenizer(base))
            model = AparModelForCausalLM.from_pretrained(name, base=base, dtype=self.dtype, **self.options)
            tokenizer = load_tokenizer(name, base=base)
        heads = find_heads(name or DEFAULT_ADAPTER) if forks else None
        if not hasattr(model, "hf_device_map"):
            cast(torch.nn.Module, model).to(self.device)
        model.eval()
        if self.prepack:
            if not prepackable(model):
                raise ConfigurationError(
                    f"{name or DEFAULT_ADAPTER.name} has no weights to prepack; take float32 on a CPU (--dtype float32 "
                    "--device cpu), a PyTorch with MKL, and weights that are not quantised"
                )
            self._blocks.enter_context(prepacked(model))
            with torch.no_grad():
                model(torch.zeros(1, TYPICAL, dtype=torch.long), use_cache=False)  # makes the copies before any clock runs
        return Loaded(name or DEFAULT_ADAPTER.name, model, tokenizer, heads and heads.parent, self.chat_template_kwargs)

    def _check_vocabulary(self, base: PreTrainedTokenizerBase) -> None:
        """Refuse a base whose vocabulary is not that of the checkpoint before the control tokens came."""
        if self.checkpoint is None:
            _, tuned = load_default_base()
        else:
            tuned = load_tokenizer(self.checkpoint, base=self.base if _recorded_base(self.checkpoint) is not None else None)
        if not base.get_vocab().items() <= tuned.get_vocab().items():
            raise ConfigurationError(
                f"the base {self.base} has another vocabulary than {self.checkpoint or DEFAULT_ADAPTER.name}; name the "
                "model that it was made from"
            )

    def _named_base(self) -> str:
        if self.checkpoint is None:
            return DEFAULT_BASE
        if (base := _recorded_base(self.checkpoint)) is None:
            raise ConfigurationError(f"{self.checkpoint} is no adapter and does not tell its base; give --base")
        return base


def _recorded_base(name: str) -> str | None:
    """Return what an adapter names as its base; ``None`` if it is none."""
    if (file := find_source(name).file("adapter_config.json")) is None:
        return None
    return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])


def padded(rows: Sequence[Sequence[int]], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return ``rows`` as a batch (rows, longest) for ``model``, padded on the left."""
    padding, device = padding_token(model.generation_config), model.device
    longest = max(map(len, rows))
    ids = [[padding] * (longest - len(row)) + [*row] for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
