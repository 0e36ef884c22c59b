"""A tiny model, rows of trees and the stock Trainer, for tests in this process and, as a script, in processes of their own.

python tiny_trainer.py '{"output_dir": ..., "max_steps": ...}' [the step after which the process kills itself]
"""

import json
import os
import signal
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from byte_tokenizer import byte_tokenizer
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.training.rows.collator import DataCollatorForApar, pack
from hf_apar.training.rows.features import tree_features

torch.set_num_threads(1)

TOKENIZER = byte_tokenizer()
TOKENIZER.add_tokens(["[Fork]", "[Child]"], special_tokens=True)
FORK, CHILD, EOS = (TOKENIZER.convert_tokens_to_ids(token) for token in ("[Fork]", "[Child]", "<|im_end|>"))
COLLATOR = DataCollatorForApar(EOS, 80)

DETAIL = TextThread((" and", TextThread((" so",)), " on"))
TREES = [
    TextThread(("a" * size, DETAIL, "b" * (9 - size), TextThread((" detail" * (size % 3 + 1),)), "c"))
    for size in range(1, 9)
]
ROWS = [
    row.to_dict() for row in pack([tree_features(TOKENIZER.encode("Q:"), t, TOKENIZER, FORK, CHILD, EOS) for t in TREES], 80)
]


def tiny_model(**changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(TOKENIZER), "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "eos_token_id": EOS,
        "pad_token_id": EOS, "bos_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


def arguments(kind=TrainingArguments, **changes):
    """Plain gradient descent: what it adds to the weights is the gradient itself, without Adam's division by its size."""
    settings = {
        "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 0.5, "lr_scheduler_type": "constant",
        "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "remove_unused_columns": False, "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return kind(**settings | changes)


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    settings = arguments(**json.loads(sys.argv[1]))
    if settings.fsdp:
        assert settings.device.type == "cpu"
        PartialState().distributed_type = DistributedType.MULTI_GPU  # accelerate 1.15 trains with DDP instead on a CPU
    callbacks = [Kill(int(step)) for step in sys.argv[2:]]
    trainer = Trainer(tiny_model(), settings, data_collator=COLLATOR, train_dataset=ROWS, callbacks=callbacks)
    trainer.train()
    assert all(isinstance(parameter, DTensor) == bool(settings.fsdp) for parameter in trainer.model_wrapped.parameters())
    trainer.save_model()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()  # else a thread of it may outlive the interpreter, which then aborts
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # all is saved; once it aborted all the same
