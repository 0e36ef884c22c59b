"""LoRA on all linear layers, and the rows of [Fork] and [Child] at a learning rate of their own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from hf_apar.checkpoints.adapters import settings_make_an_adapter
from hf_apar.errors import ConfigurationError
from hf_apar.training.rows.features import IGNORED

_ROWS = "trainable_tokens"  # PEFT's name for the parameters of `trainable_token_indices`


def token_indices(model: PreTrainedModel, control_ids: Sequence[int]) -> list[int] | dict[str, list[int]] | None:
    """Return the ``trainable_token_indices`` with which a ``LoraConfig`` of your own trains the rows of ``control_ids``.

    A list where the output layer is tied to the embeddings: one row counts for both. Else a row of each, by the names that
    the layers have in this family of models: a new token whose row of the output layer is not trained is never written.
    ``None`` where there are no ``control_ids``.

    Args:
        model: with the control tokens, before it is wrapped for PEFT.
        control_ids: of [Fork] and [Child].
    """
    if not control_ids:
        return None
    ids, embeddings, output = sorted(control_ids), model.get_input_embeddings(), model.get_output_embeddings()
    if output is None or (output.weight is embeddings.weight and model.config.tie_word_embeddings):  # PEFT asks the latter
        return ids
    names = {module: name for name, module in model.named_modules() if module in (embeddings, output)}
    return {names[embeddings]: ids, names[output]: ids}


def add_lora(model: PreTrainedModel, control_ids: Sequence[int], *, rank: int = 32) -> PeftModel:
    """Wrap ``model`` for training: LoRA of ``rank`` and a scale of 2, and the rows that :func:`token_indices` says."""
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=2 * rank, target_modules="all-linear",
        trainable_token_indices=token_indices(model, control_ids),
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    say_bias(wrapped)
    return wrapped


def load_lora(model: PreTrainedModel, folder: Path, control_ids: Sequence[int]) -> PeftModel:
    """Wrap ``model`` for training with the adapter in ``folder`` as its first weights, in float32.

    Raises:
        ConfigurationError: if the adapter trains other rows than those of ``control_ids`` in the layers of ``model``.
    """
    with settings_make_an_adapter(folder):
        trained = PeftConfig.from_pretrained(str(folder)).trainable_token_indices
    wanted = token_indices(model, control_ids)
    if trained != wanted:
        raise ConfigurationError(
            f"the adapter in {folder} trains the token rows {trained}, this base needs {wanted}: where layers are named, "
            "the output layer has rows of its own; train anew, without a start"
        )
    with settings_make_an_adapter(folder):
        wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    assert isinstance(wrapped, PeftModel)
    say_bias(wrapped)
    return wrapped


def say_bias(wrapped: PeftModel) -> None:
    """Let the output layer of a model wrapped by PEFT say that it has no bias, where it has none.

    PEFT's wrapper around a layer whose rows are trained gives no ``bias``, and TRL's ``SFTTrainer`` asks for it, since it
    computes the scores from the layer's weight by itself. After a ``peft_config`` call it on ``trainer.model``.
    """
    base = wrapped.get_base_model()
    assert isinstance(base, PreTrainedModel)
    output = base.get_output_embeddings()
    if output is not None and not hasattr(output, "bias"):
        output.bias = None  # what a layer without a bias has


def hasten_rows(optimizer: torch.optim.Optimizer, model: nn.Module, token_rate: float) -> None:
    """Put the token rows of ``model`` into groups of their own, at ``token_rate`` times the learning rate they have.

    All else of a group, its weight decay say, stays as it is. At the adapter's own rate new rows never reach the top of the
    softmax, and the model never forks.

    Raises:
        ConfigurationError: if ``optimizer`` does not hold the rows, so that it cannot do that.
    """
    rows = {parameter for name, parameter in model.named_parameters() if _ROWS in name and parameter.requires_grad}
    found = []
    for group in optimizer.param_groups:
        if own := [parameter for parameter in group["params"] if parameter in rows]:
            group["params"] = [parameter for parameter in group["params"] if parameter not in rows]
            found.append({**group, "params": own, "lr": group["lr"] * token_rate})
    if {parameter for group in found for parameter in group["params"]} != rows:
        raise ConfigurationError(
            f"{type(optimizer).__name__} takes no learning rate for the rows of [Fork] and [Child]; choose another optim, "
            "or token_rate=1"
        )
    for group in found:
        optimizer.add_param_group(group)


def fork_left_out(logits: Tensor, banned: Tensor, fork_id: int) -> Tensor:
    """Return what leaving ``fork_id`` out of the softmax at ``banned`` places adds to the sum of the cross-entropies.

    Args:
        logits: (batch, length, vocabulary).
        banned: booleans (batch, length), where the target is another token.

    >>> fork_left_out(torch.tensor([[[1.0, 1.0]]]).log(), torch.tensor([[True]]), fork_id=1)  # the other is certain
    tensor(-0.6931)
    """
    there = logits[banned].float()  # (places, vocabulary)
    others = there.index_fill(-1, torch.tensor(fork_id, device=logits.device), -torch.inf)
    return (others.logsumexp(-1) - there.logsumexp(-1)).sum()


class AdapterTrainer(Trainer):
    """The stock Trainer, with a learning rate of its own for the token rows; its checkpoints hold the adapter alone.

    Its loss leaves [Fork] out of the choice where a batch says so (``fork_banned``): how a text goes on without forks is
    learnt there, and nothing about where to fork. All that the Trainer takes has its effect (``optim``, ``weight_decay``,
    ``label_smoothing_factor``, ``compute_loss_func``), or is refused by name.

    Args:
        token_rate: the rows of [Fork] and [Child] learn that many times faster.
        fork_id: id of [Fork].

    Raises:
        ConfigurationError: if ``token_rate`` comes with an optimizer that is made already.
    """

    def __init__(self, *args: object, token_rate: float, fork_id: int, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.token_rate = token_rate
        self.fork_id = fork_id
        if self.optimizer is not None and token_rate != 1:
            raise ConfigurationError(
                f"token_rate is {token_rate}, and the optimizer is made already; give the rows their learning rate in it "
                "(hasten_rows) and pass token_rate=1, or leave optimizers out"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, object]:
        banned = inputs.pop("fork_banned", None)
        if banned is None:
            result: Tensor | tuple[Tensor, object] = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return result
        for name, given in (
            ("label_smoothing_factor", self.label_smoother),
            ("compute_loss_func", self.compute_loss_func),
        ):
            if given is not None:
                raise ConfigurationError(
                    f"{name} cannot be combined with rows that leave [Fork] out of the choice (fork_banned); leave it out, "
                    "or train without copies of structured answers: Selection(unforked_share=0)"
                )
        with _fork_left_out(model, banned, self.fork_id):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return result

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        made, optimizer = self.optimizer is not None, super().create_optimizer(*([] if model is None else [model]))
        trained = self.model if model is None else model
        if not made and self.token_rate != 1:
            assert trained is not None
            hasten_rows(optimizer, trained, self.token_rate)
        if self.is_fsdp_enabled:  # torch's sharded checkpoints lose what is set of a group without weights
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, object] | None = None) -> None:
        # PEFT would look for the base on the Hub to learn whether its vocabulary grew, and then save all embeddings
        folder = output_dir or self.args.output_dir
        assert isinstance(self.model, PeftModel) and folder is not None
        self.model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)


@contextmanager
def _fork_left_out(model: nn.Module, banned: Tensor, fork_id: int) -> Iterator[None]:
    """Let ``model``'s own loss leave [Fork] out where ``banned`` says so, before the Trainer does to it what it does."""

    def correct(_: nn.Module, __: object, batch: Mapping[str, Any], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        items = batch.get("num_items_in_batch", (batch["shift_labels"] != IGNORED).sum())
        more = fork_left_out(outputs["logits"], banned, fork_id) / items
        outputs["loss"] = outputs["loss"] + more / outputs["loss"].numel()  # one for each of a process's GPUs
        return outputs

    handle = model.register_forward_hook(correct, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
