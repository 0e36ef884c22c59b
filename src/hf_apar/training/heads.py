"""Medusa heads learn what the frozen model itself would write next, from its own answers, with the stock Trainer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed

from hf_apar.checkpoints.made_with import digest
from hf_apar.checkpoints.readiness import check_model
from hf_apar.checkpoints.writing import alone
from hf_apar.data.records.rejections import Rejections
from hf_apar.errors import ConfigurationError, ControlTokenError
from hf_apar.forward.devices import is_split
from hf_apar.generation_settings import end_as_taught
from hf_apar.speculation.medusa import MedusaHeads
from hf_apar.tokens import checkpoint_config
from hf_apar.training.mixture import Mixture, read_examples, training_mixture
from hf_apar.training.rows.collator import DataCollatorForApar, mask_mode, pack, padding_id
from hf_apar.training.rows.features import IGNORED, TreeFeatures, successors
from hf_apar.training.runs import last_checkpoint, train_on, training_arguments, write_metrics
from hf_apar.training.tuning import HeadsTuning, Selection

_EVERY_ANSWER = Selection(structured_share=1e-9, unforked_share=0.0, max_repetition=1.0)  # all of the others are drawn
DECAY = 0.8  # the weight of each guess against the one before it: later ones count only if earlier ones are right


def train_medusa(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Path,
    output: Path,
    tuning: HeadsTuning = HeadsTuning(),
    *,
    start: Path | None = None,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> dict[str, float]:
    """Train heads for ``model``, which stays as it is, and write them to ``output``; go on from a checkpoint found there.

    Args:
        model: a model that can fork.
        answers: as for :func:`hf_apar.training.fine_tuning.train`: best the model's own.
        start: folder of heads to go on from, such as those of the same model before it was tuned further; their sizes are
            kept then.
        chat_template_kwargs: as for :func:`~hf_apar.text.chat.encode_chat`.

    Returns:
        The metrics on held-out answers: ``eval_loss`` and ``eval_accepted``, guesses in a row that are the model's choice.
        They are held out of the heads' training; an adapter that was trained on the same file may have learnt from them.

    Raises:
        ConfigurationError: if ``start`` has no heads, or those of a model of another width; if another process trains heads
            into ``output``.
        ControlTokenError: if ``model`` has no control tokens.
        UnsupportedModelError: if ``model`` cannot fork, or no thread of it would end (:func:`~hf_apar.check_model`).
        DataError: if ``output`` has a checkpoint of a run on other answers or with other options.
    """
    control_ids = _ready(model, tokenizer, chat_template_kwargs)
    rejected = Rejections(answers, output / "rejected.jsonl")
    mixture = training_mixture(
        read_examples(answers, rejected), tokenizer, control_ids, _EVERY_ANSWER, max_length=tuning.max_length,
        seed=seed, rejected=rejected, chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip
    set_seed(seed)  # the Trainer's own comes after the first weights
    heads = _first_heads(model, mixture.train, start, tuning, (control_ids[0], int(tokenizer.eos_token_id)))
    checkpoints = output / "medusa_checkpoints"  # beside an adapter's own, if it is trained there too
    trainer = _trainer(HeadsLearn(heads, model, tuning.places), tokenizer, mixture, tuning, checkpoints, seed)
    own = ("length", "inner_size", "draft_vocabulary", "learning_rate", "max_length", "places")
    options = {name: getattr(tuning, name) for name in own} | {
        "start": start, "seed": seed, "dtype": model.dtype, "model": _name(model, control_ids)
    }  # fmt: skip
    checkpoints.mkdir(parents=True, exist_ok=True)
    with alone(checkpoints):
        train_on(trainer, last_checkpoint(checkpoints, mixture, options))
        heads.save(output)
        return write_metrics(trainer, output / "medusa_metrics.json")


def _ready(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, object] | None
) -> tuple[int, int]:
    """Check that ``model`` can fork, let it end as it was taught, and return the ids of its control tokens."""
    ids = checkpoint_config(model).control_ids
    if ids is None:
        raise ControlTokenError("the model has no control tokens; train it to fork first, see docs/training.md")
    check_model(model, tokenizer, token_rows=False, chat_template_kwargs=chat_template_kwargs)
    assert model.generation_config is not None
    end_as_taught(model.generation_config, tokenizer)
    return ids


def _first_heads(
    model: PreTrainedModel,
    rows: Sequence[TreeFeatures],
    start: Path | None,
    tuning: HeadsTuning,
    needed: Sequence[int],
) -> MedusaHeads:
    """Return heads that have learnt nothing yet, or those in the folder ``start``."""
    hidden_size = int(model.config.get_text_config(decoder=True).hidden_size)
    if start is None:
        ids = most_frequent(rows, tuning.draft_vocabulary, needed)
        return MedusaHeads(hidden_size, tuning.inner_size, ids, tuning.length)
    heads = MedusaHeads.load(start)
    heads.length = tuning.length
    if heads.hidden_size != hidden_size:
        raise ConfigurationError(
            f"the heads in {start} are for states of {heads.hidden_size} numbers, the model's have {hidden_size}; "
            "give heads of the same model, or none to start anew"
        )
    return heads


def _trainer(
    learner: "HeadsLearn",
    tokenizer: PreTrainedTokenizerBase,
    mixture: Mixture,
    tuning: HeadsTuning,
    folder: Path,
    seed: int,
) -> Trainer:
    (model,) = learner.teacher
    mode = mask_mode(model.config._attn_implementation, backward=False)
    trees = DataCollatorForApar(padding_id(tokenizer), tuning.max_length, model.dtype, mode=mode)
    arguments = training_arguments(folder, tuning, seed, per_device_train_batch_size=1, per_device_eval_batch_size=1)
    if not is_split(model) and not getattr(model, "is_quantized", False):
        model.to(arguments.device)
    return Trainer(
        model=learner,
        args=arguments,
        train_dataset=[row.to_dict() for row in pack(mixture.train, tuning.max_length)],
        eval_dataset=[row.to_dict() for row in pack(mixture.held_out, tuning.max_length)],
        data_collator=Collator(trees),
        compute_metrics=_accepted,
    )


def _name(model: PreTrainedModel, control_ids: tuple[int, int]) -> str:
    """Tell ``model`` from the same one tuned otherwise, by its row of [Fork]."""
    row = cast(Tensor, model.get_output_embeddings().weight)[control_ids[0]].detach().float().cpu()
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

    def __call__(self, features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        batch = self.trees(features)
        del batch["labels"]
        length = batch["input_ids"].shape[1]
        rows = [successors(row["visible_until"], row["children"]) for row in features]
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
            ).last_hidden_state.to(input_ids.device)  # (batch, length, hidden); its layers may lie on several devices
            embedded = model.get_input_embeddings()(input_ids).to(input_ids.device)
            rows = cast(Tensor, model.get_output_embeddings().weight).to(input_ids.device)
            choices = None if self.training else functional.linear(hidden, rows).argmax(-1)
        batch, length = input_ids.shape
        offset = torch.arange(batch, device=input_ids.device)[:, None] * length
        flat = torch.where(successors >= 0, successors + offset, -1).flatten()  # (batch * length,)
        start = ((shift_labels.flatten() != IGNORED) & (flat >= 0)).nonzero()[:, 0]  # a guess follows these
        if self.training:
            start = start[torch.randperm(len(start), device=start.device)[: self.places]]
        guessable = rows[self.heads.draft_ids].detach()  # (draft, hidden)
        loss, right = self._guess(hidden.flatten(0, 1), embedded.flatten(0, 1), guessable, flat, start, choices)
        return {"loss": loss, "logits": right.view(batch, length)}

    def _guess(
        self, hidden: Tensor, embedded: Tensor, weight: Tensor, following: Tensor, start: Tensor, choices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of guesses in a row after each place of ``start``, and of each place how many are right.

        ``hidden`` and ``embedded`` are (places, hidden), ``weight`` is (draft, hidden), ``following`` is the place after
        each, -1 for none.
        """
        place, state = start, hidden[start].float()
        loss, total = state.new_zeros(()), 0.0
        right = torch.zeros(len(following), device=hidden.device)
        alive = torch.ones(len(start), dtype=torch.bool, device=hidden.device)
        for step in range(self.heads.length):
            going = following[place] >= 0
            start, place, state, alive = start[going], following[place[going]], state[going], alive[going]
            if not len(place):
                break
            with torch.autocast(hidden.device.type, torch.bfloat16, enabled=weight.dtype == torch.bfloat16):
                state = self.heads(state, embedded[place].float())
                guesses = functional.linear(state, weight.to(state.dtype)).float()
                wanted = functional.linear(hidden[place], weight).float().softmax(-1)
            loss = loss + DECAY**step * functional.cross_entropy(guesses, wanted)
            total += DECAY**step
            if choices is not None:
                alive = alive & (self.heads.draft_ids[guesses.argmax(-1)] == choices.flatten()[place])
                right[start] += alive
        return loss / max(total, 1e-9), right
