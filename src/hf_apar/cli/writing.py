"""A model that writes text to train on: which one, how it is loaded, what its texts depend on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hf_apar.cli.common import Dtype, load_untuned, on_device, one_process
from hf_apar.data.described import not_free
from hf_apar.data.settings import Engine, Loading, Sampling
from hf_apar.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_apar.data.distillation.samplers import TextSampler


_CONTEXT = 8192  # tokens of a prompt and its answer, with vLLM; a longer one wants memory that a small machine has not


@dataclass(frozen=True)
class TextWriter:
    """A model that writes, and how."""

    model: str | None
    sampling: Sampling
    loading: Loading
    dtype: Dtype
    seed: int
    chat_template_kwargs: dict[str, object] | None

    def __post_init__(self) -> None:
        if self.sampling.engine is not Engine.vllm:
            return
        if self.loading != Loading():
            raise ConfigurationError(
                "load_in_4bit, load_in_8bit, attn_implementation and device_map are for transformers, and vLLM loads the "
                "model whole; leave them out, or give the engine transformers"
            )
        one_process("the engine vllm", "start it without a launcher, or give the engine transformers")

    def settings(self) -> dict[str, object]:
        """Return what its texts depend on."""
        return {
            "model": self.model, **not_free(self.sampling), **not_free(self.loading), "seed": self.seed, "dtype": self.dtype,
            "chat_template_kwargs": self.chat_template_kwargs,
        }  # fmt: skip

    def __str__(self) -> str:
        from hf_apar.checkpoints.default_model import DEFAULT_BASE

        how = self.sampling
        name = self.model or DEFAULT_BASE
        bits = "" if self.loading.bits is None else f" {self.loading.bits} bits"
        return f"{name} {how.engine} {self.dtype} {how.temperature} {how.repetition_penalty} {self.seed}{bits}"

    @contextmanager
    def loaded(self) -> "Iterator[tuple[TextSampler, PreTrainedTokenizerBase]]":
        """Load what lets it write, and seed what it draws."""
        import torch

        from hf_apar.checkpoints.readiness import check_model
        from hf_apar.data.distillation.samplers import TransformersSampler, VllmSampler
        from hf_apar.prepacking import prepacked_if_possible

        model, tokenizer = load_untuned(self.model, self.dtype, self.loading)
        check_model(model, tokenizer, token_rows=False, chat_template_kwargs=self.chat_template_kwargs)
        names = ("temperature", "repetition_penalty")
        how: dict[str, Any] = {name: getattr(self.sampling, name) for name in names}
        torch.manual_seed(self.seed)
        if self.sampling.engine is Engine.transformers:
            with prepacked_if_possible(on_device(model)):
                yield TransformersSampler(model, tokenizer, **how), tokenizer
            return
        with TemporaryDirectory() as folder:  # vLLM reads no GGUF file, and no adapter with new tokens
            yield VllmSampler(self._engine(model, tokenizer, folder), tokenizer, **how), tokenizer

    def _engine(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: str) -> object:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # on few cores a second process only competes
        from vllm import LLM

        own = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return LLM(
            folder, dtype=self.dtype.value, max_num_seqs=min(self.sampling.batch_size, 128), block_size=32,
            max_model_len=min(own or _CONTEXT, _CONTEXT), seed=self.seed,
            gpu_memory_utilization=0.7,  # of the memory that is free for it: on CPUs the default leaves too little to others
        )  # fmt: skip
