"""Runs of a Trainer: one that goes on from a checkpoint goes on with what it began with, or not at all."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState, TrainingArguments

from hf_apar.checkpoints.made_with import differences, digest, note, noted
from hf_apar.checkpoints.writing import write_whole
from hf_apar.errors import DataError
from hf_apar.training.mixture import Mixture
from hf_apar.training.tuning import HeadsTuning, Tuning

logger = logging.getLogger(__name__)

MADE_WITH = "made_with.json"


def training_arguments(folder: Path, tuning: Tuning | HeadsTuning, seed: int, **more: Any) -> TrainingArguments:
    """Return what the Trainer is told by ``tuning``: a cosine, two checkpoints in ``folder``, rows as they are.

    A process trains on one device: copies of a model in one process (``DataParallel``) would make a step of more rows than
    was said, and tear trees' masks from their rows. ``accelerate launch`` starts a process for each GPU.
    """
    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {
        "output_dir": str(folder), "num_train_epochs": tuning.epochs, "max_steps": tuning.max_steps,
        "learning_rate": tuning.learning_rate, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "weight_decay": 0.0,
        "save_steps": tuning.save_steps, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": tuning.eval_steps,
        "logging_steps": 5, "remove_unused_columns": False, "label_names": ["shift_labels"], "report_to": "none",
        "seed": seed, "use_cpu": not on_gpu, "dataloader_pin_memory": on_gpu,
    }  # fmt: skip
    arguments = TrainingArguments(**options, **more)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def last_checkpoint(folder: Path, mixture: Mixture, options: Mapping[str, object]) -> str | None:
    """Return the checkpoint that a run in ``folder`` goes on from, and note there what the run is made with.

    Raises:
        DataError: if it was made with something else, or nobody knows with what.
    """
    checkpoint = _last_whole(folder)
    rows = json.dumps([[row.to_dict() for row in rows] for rows in (mixture.train, mixture.held_out)])
    settings, file = {**options, "mixture": digest(rows)}, folder / MADE_WITH
    other = differences(noted(file) or {}, settings) if checkpoint else {}
    if "mixture" in other:
        raise DataError(
            f"{checkpoint} comes from other answers, filters, shares or another seed; go on with those, or train into a "
            "folder of its own: what was trained on must not be held out"
        )
    if other:
        raise DataError(
            f"{checkpoint} was trained with {', '.join(other.values())}; go on with that, or train into a folder of its own"
        )
    note(file, settings)
    logger.info("training %s", f"goes on from {checkpoint}" if checkpoint else "starts")
    return checkpoint


def _last_whole(folder: Path) -> str | None:
    """Return the latest checkpoint that was written to its end: the Trainer writes its own state last."""
    whole = {
        int(one.name.removeprefix("checkpoint-")): str(one)
        for one in folder.glob("checkpoint-*")
        if one.name[11:].isdecimal() and noted(one / "trainer_state.json")
    }
    return whole[max(whole)] if whole else None


def train_on(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, on from ``checkpoint``; a run that had come to its end is loaded.

    The Trainer would add a step to one that ends within an epoch, and one more each time it is called.
    """
    if checkpoint is not None:
        args, state = trainer.args, TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        updates = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
        end = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
        if state.global_step >= end:
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=checkpoint)


def write_metrics(trainer: Trainer, file: Path) -> dict[str, float]:
    """Write the metrics of all steps to ``file``, by the first of several processes; return those of the last.

    Where the Trainer has just made these it is not asked again.
    """
    made = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    metrics = made[-1] if made and made[-1]["step"] == trainer.state.global_step else trainer.evaluate()
    if not trainer.is_world_process_zero():
        return metrics
    report = {"final": metrics, "steps": trainer.state.log_history}
    write_whole(file, json.dumps(report, indent=1) + "\n")
    return metrics
