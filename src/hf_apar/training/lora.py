"""LoRA on all linear layers, and the rows of [Fork] and [Child] at a learning rate of their own."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_apar.data.features import IGNORED

_ROWS = "trainable_tokens"  # PEFT's name for the parameters of `trainable_token_indices`


def add_lora(model: PreTrainedModel, control_ids: Sequence[int], *, rank: int = 32) -> PeftModel:
    """Wrap ``model`` for training: LoRA of ``rank`` and a scale of 2, and the embedding rows of ``control_ids``.

    The rows count for the output layer too where it is tied to the embeddings.
    """
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=2 * rank, target_modules="all-linear",
        trainable_token_indices=sorted(control_ids),
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def load_lora(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Wrap ``model`` for training with the adapter in ``folder`` as its first weights, in float32."""
    wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def parameter_groups(model: torch.nn.Module, learning_rate: float, token_rate: float) -> list[dict[str, object]]:
    """Return the optimizer's groups: the adapter at ``learning_rate``, the token rows at ``token_rate`` times that.

    At the adapter's own rate new rows never reach the top of the softmax, and the model never forks.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in named if _ROWS not in name], "lr": learning_rate},
        {"params": [parameter for name, parameter in named if _ROWS in name], "lr": learning_rate * token_rate},
    ]


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
    """The stock Trainer with the groups of :func:`parameter_groups`; its checkpoints hold the adapter alone.

    Its loss leaves [Fork] out of the choice where a batch says so (``fork_banned``): how a text goes on without forks is
    learnt there, and nothing about where to fork.
    """

    def __init__(self, *args: object, token_rate: float, fork_id: int, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.token_rate = token_rate
        self.fork_id = fork_id

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, object]:
        banned = inputs.pop("fork_banned", None)

        def forward(**batch: Tensor) -> dict[str, Tensor]:
            outputs: dict[str, Tensor] = model(**batch)
            if banned is not None:
                items = batch.get("num_items_in_batch", (batch["shift_labels"] != IGNORED).sum())
                more = fork_left_out(outputs["logits"], banned, self.fork_id) / items
                outputs["loss"] = outputs["loss"] + more / outputs["loss"].numel()  # one for each of a process's GPUs
            return outputs

        # in the model's place, so that what the Trainer does to its loss, on several devices say, is done to all of it
        result: Tensor | tuple[Tensor, object] = super().compute_loss(
            cast(torch.nn.Module, forward), inputs, return_outputs, num_items_in_batch
        )
        return result

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained = self.model if model is None else model
            assert trained is not None
            groups = parameter_groups(trained, self.args.learning_rate, self.token_rate)
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, object] | None = None) -> None:
        # PEFT would look for the base on the Hub to learn whether its vocabulary grew, and then save all embeddings
        folder = output_dir or self.args.output_dir
        assert isinstance(self.model, PeftModel) and folder is not None
        self.model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
