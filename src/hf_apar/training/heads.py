"""Medusa heads learn what the frozen model itself would write next, from its own answers, with the stock Trainer."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_apar.checkpoints.made_with import digest
from hf_apar.checkpoints.readiness import check_model
from hf_apar.config import AparConfig
from hf_apar.data.records.rejections import Rejections
from hf_apar.errors import ConfigurationError, ControlTokenError
from hf_apar.forward.devices import is_split
from hf_apar.generation_settings import end_as_taught
from hf_apar.speculation.medusa import MedusaHeads, path_successors
from hf_apar.training.metrics import final_metrics
from hf_apar.training.mixture import mix, read_examples
from hf_apar.training.resuming import keep_to_settings
from hf_apar.training.rows.collator import DataCollatorForApar, pack
from hf_apar.training.rows.features import IGNORED, TreeFeatures
from hf_apar.training.selection import Selection

logger = logging.getLogger(__name__)

DECAY = 0.8  # the weight of each guess against the one before it: later ones count only if earlier ones are right


def train_medusa(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Path,
    output: Path,
    *,
    start: Path | None = None,
    length: int = 5,
    inner_size: int = 1024,
    draft_vocabulary: int = 8192,
    learning_rate: float = 1e-3,
    epochs: float = 2.0,
    max_steps: int = -1,
    max_length: int = 1024,
    places: int = 256,
    save_steps: int = 50,
    eval_steps: int = 250,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> dict[str, float]:
    """Train heads for ``model``, which stays as it is, and write them to ``output``; go on from a checkpoint found there.

    Args:
        model: a model that can fork.
        answers: as for :func:`hf_apar.training.recipe.train`: best the model's own.
        start: folder of heads to go on from, such as those of the same model before it was tuned further; ``inner_size``
            and ``draft_vocabulary`` are theirs then.
        length: guesses in a row.
        inner_size: of the cell's gated layer.
        draft_vocabulary: so many of the answers' most frequent tokens may be guessed.
        epochs: passes over the answers; ``max_steps``, if positive, takes their place.
        places: of a row of ``max_length`` tokens so many are guessed from, drawn anew each time: neighbours teach much the
            same.
        chat_template_kwargs: as for :func:`~hf_apar.text.chat.encode_chat`.

    Returns:
        The metrics on held-out answers: ``eval_loss`` and ``eval_accepted``, guesses in a row that are the model's choice.

    Raises:
        ConfigurationError: if ``start`` has no heads, or those of a model of another width.
        ControlTokenError: if ``model`` has no control tokens.
        UnsupportedModelError: if ``model`` cannot fork, or no thread of it would end (:func:`~hf_apar.check_model`).
        DataError: if ``output`` has a checkpoint of a run on other answers or with other options.
    """
    config = AparConfig.from_dict(getattr(model.generation_config, "apar_config", None) or {})
    if config.fork_token_id is None or config.child_token_id is None:
        raise ControlTokenError("the model has no control tokens; train it to fork first, see docs/training.md")
    check_model(model, tokenizer, token_rows=False, chat_template_kwargs=chat_template_kwargs)
    assert model.generation_config is not None
    end_as_taught(model.generation_config, tokenizer)
    rejected = Rejections(answers, output / "rejected.jsonl")
    mixture = mix(
        read_examples(answers, rejected), tokenizer, (config.fork_token_id, config.child_token_id),
        Selection(unforked_share=0.0, max_repetition=1.0), max_length=max_length, seed=seed,
        rejected=rejected, chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip
    options = {
        "start": start, "length": length, "inner_size": inner_size, "draft_vocabulary": draft_vocabulary,
        "learning_rate": learning_rate, "max_length": max_length, "places": places, "seed": seed, "dtype": model.dtype,
        "model": _name(model, config.fork_token_id),
    }  # fmt: skip
    hidden_size = int(model.config.get_text_config(decoder=True).hidden_size)
    if start is None:
        ids = most_frequent(mixture.train, draft_vocabulary, (config.fork_token_id, int(tokenizer.eos_token_id)))
        set_seed(seed)  # the Trainer's own comes after the first weights
        heads = MedusaHeads(hidden_size, inner_size, ids, length)
    else:
        heads = MedusaHeads.load(start)
        heads.length = length
        if heads.hidden_size != hidden_size:
            raise ConfigurationError(
                f"the heads in {start} are for states of {heads.hidden_size} numbers, the model's have {hidden_size}; "
                "give heads of the same model, or none to start anew"
            )
    checkpoints = output / "medusa_checkpoints"  # beside an adapter's own, if it is trained there too
    arguments = TrainingArguments(
        output_dir=str(checkpoints), per_device_train_batch_size=1, per_device_eval_batch_size=1, num_train_epochs=epochs,
        max_steps=max_steps, learning_rate=learning_rate, lr_scheduler_type="cosine", warmup_steps=0.03, weight_decay=0.0,
        save_steps=save_steps, save_total_limit=2, eval_strategy="steps", eval_steps=eval_steps, logging_steps=5,
        remove_unused_columns=False, label_names=["shift_labels"], report_to="none", seed=seed,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    trainer = Trainer(
        model=HeadsLearn(heads, model, places),
        args=arguments,
        train_dataset=[row.to_dict() for row in pack(mixture.train, max_length)],
        eval_dataset=[row.to_dict() for row in pack(mixture.held_out, max_length)],
        data_collator=Collator(DataCollatorForApar(int(padding), max_length, model.dtype), config.child_token_id),
        compute_metrics=_accepted,
    )
    if not is_split(model) and not getattr(model, "is_quantized", False):
        model.to(arguments.device)  # type: ignore[arg-type]  # the decorator of `to` hides its signature
    checkpoint = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    keep_to_settings(options, mixture, checkpoints, checkpoint)
    logger.info("training %s", f"goes on from {checkpoint}" if checkpoint else "starts")
    trainer.train(resume_from_checkpoint=checkpoint)
    heads.save(output)
    metrics = final_metrics(trainer)
    report = {"final": metrics, "steps": trainer.state.log_history}
    (output / "medusa_metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return metrics


def _name(model: PreTrainedModel, fork_id: int) -> str:
    """Tell ``model`` from the same one tuned otherwise, by its row of [Fork]."""
    row = cast(Tensor, model.get_output_embeddings().weight)[fork_id].detach().float().cpu()
    return f"{model.name_or_path} {digest(row.numpy().tobytes())[:8]}"


def _accepted(found: EvalPrediction) -> dict[str, float]:
    counts, labels = torch.as_tensor(found.predictions), torch.as_tensor(found.label_ids)
    return {"accepted": float(counts.clamp(min=0).sum() / max(int((labels != IGNORED).sum()), 1))}


def most_frequent(features: Sequence[TreeFeatures], count: int, needed: Sequence[int]) -> Tensor:
    """Return the ``count`` tokens that the answers hold most often, ``needed`` among them, sorted."""
    counts = Counter(token for row in features for token in row.shift_labels if token != IGNORED)
    best = [token for token, _ in counts.most_common(count) if token not in needed]
    return torch.tensor(sorted([*needed, *best[: count - len(needed)]]))


@dataclass(frozen=True)
class Collator:
    """Adds ``successors`` (batch, length): where each token's thread goes on, -1 at its end."""

    trees: DataCollatorForApar
    child_id: int

    def __call__(self, features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        batch = self.trees(features)
        del batch["labels"]
        length = batch["input_ids"].shape[1]
        rows = [path_successors(row["input_ids"], row["visible_until"], self.child_id) for row in features]
        batch["successors"] = torch.tensor([row + [-1] * (length - len(row)) for row in rows])
        return batch


class HeadsLearn(nn.Module):
    """The heads as the Trainer's model; the model that they learn from is no part of it, so checkpoints stay small."""

    def __init__(self, heads: MedusaHeads, model: PreTrainedModel, places: int) -> None:
        super().__init__()
        self.heads, self.places = heads, places
        self.teacher = (model.eval(),)  # in a tuple, so that its parameters are not ours

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, successors: Tensor, shift_labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the loss, and for each token ``logits`` (batch, length), the guesses in a row that are right."""
        (model,) = self.teacher
        with torch.no_grad():
            hidden = model.get_decoder()(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            ).last_hidden_state  # (batch, length, hidden)
            weight = cast(Tensor, model.get_output_embeddings().weight)[self.heads.draft_ids]  # (draft, hidden)
            embedded = model.get_input_embeddings()(input_ids)
            choices = None if self.training else functional.linear(hidden, model.get_output_embeddings().weight).argmax(-1)
        batch, length = input_ids.shape
        offset = torch.arange(batch, device=input_ids.device)[:, None] * length
        flat = torch.where(successors >= 0, successors + offset, -1).flatten()  # (batch * length,)
        hidden, embedded = hidden.flatten(0, 1), embedded.flatten(0, 1)
        start = ((shift_labels.flatten() != IGNORED) & (flat >= 0)).nonzero()[:, 0]  # a guess follows these
        if self.training:
            start = start[torch.randperm(len(start), device=start.device)[: self.places]]
        place, state = start, hidden[start].float()
        loss, total = state.new_zeros(()), 0.0
        right = torch.zeros(batch * length, device=input_ids.device)
        alive = torch.ones(len(start), dtype=torch.bool, device=input_ids.device)
        for step in range(self.heads.length):
            going = flat[place] >= 0
            start, place, state, alive = start[going], flat[place[going]], state[going], alive[going]
            if not len(place):
                break
            with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
                state = self.heads(state, embedded[place].float())
                guesses = functional.linear(state, weight.to(state.dtype)).float()
                wanted = functional.linear(hidden[place], weight).float().softmax(-1)
            loss = loss + DECAY**step * functional.cross_entropy(guesses, wanted)
            total += DECAY**step
            if choices is not None:
                alive = alive & (self.heads.draft_ids[guesses.argmax(-1)] == choices.flatten()[place])
                right[start] += alive
        return {"loss": loss / max(total, 1e-9), "logits": right.view(batch, length)}
