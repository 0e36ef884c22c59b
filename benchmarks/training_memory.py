"""What `training_memory` calculates beside the bytes of all tensors that live at the peak of a training step, counted on a CPU."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_apar.checkpoints.loading import load_base
from hf_apar.training.lora import add_lora
from hf_apar.training.memory import ModelShape, training_memory
from hf_apar.training.rows.collator import DataCollatorForApar
from hf_apar.training.tuning import Tuning


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that live, each storage once, from ``held`` on and what operations make."""

    def __init__(self, *held: torch.Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = WeakIdKeyDictionary()
        for tensor in held:
            self.count(tensor)

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen[storage] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.release, size)

    def release(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor):
                self.count(one)
        return made


def measured_peak(base: PreTrainedModel, tuning: Tuning, *, bf16: bool) -> int:
    """Return the bytes of tensors at the peak of a second step, the first of which has made Adam's averages."""
    torch.manual_seed(0)
    ids = (base.vocab_size - 2, base.vocab_size - 1)
    model = add_lora(base, ids, rank=tuning.rank)
    if tuning.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    length = tuning.max_length
    tokens = torch.randint(0, base.vocab_size, (length,)).tolist()
    row = {"input_ids": tokens, "position_ids": [*range(length)], "visible_until": [length] * length, "shift_labels": tokens}
    batch = DataCollatorForApar(0)([row] * tuning.batch_size)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
    with LiveBytes(*model.parameters(), *model.buffers(), *batch.values()) as counted:
        for step in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            model.zero_grad(set_to_none=step > 0)  # at the second peak there are gradients, as where they are accumulated
            del loss
    return counted.peak


def untied_model() -> PreTrainedModel:
    """A random model of 46 million weights in the shape of Llama 3: an output layer of its own, one key head of four."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=16384, hidden_size=512, intermediate_size=1792, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=2048,
    ))  # fmt: skip


def main() -> None:
    for name, make in (("random, untied, 46M", untied_model), ("default base, 135M", lambda: load_base()[0])):
        for bf16 in (False, True):
            for checkpointing in (False, True):
                tuning = Tuning(max_length=256, gradient_checkpointing=checkpointing)
                model = make()
                shape = ModelShape.of(model.config)
                said = training_memory(shape, tuning, bf16=bf16)
                peak = measured_peak(model, tuning, bf16=bf16)
                parts = ", ".join(f"{part} {value / 1e6:.0f}" for part, value in vars(said).items())
                print(f"{name} bf16={bf16} checkpointing={checkpointing}: said {said.total / 1e6:.0f} MB ({parts}), measured "
                      f"{peak / 1e6:.0f} MB, {said.total / peak - 1:+.1%}", flush=True)


if __name__ == "__main__":
    main()
