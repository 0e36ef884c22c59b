"""hf-apar as a launcher starts it, for tests in processes of their own; adapters are written in float32.

Where FSDP is asked for it shards on CPUs too. With HF_APAR_KILL="RANK STEP" one process kills itself after a step.
"""

import functools
import os
import signal
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_apar.cli import main
from hf_apar.processes import process_number, shards_weights
from hf_apar.training import fine_tuning

KILL = tuple(map(int, os.environ.get("HF_APAR_KILL", "-1 -1").split()))
made = fine_tuning.training_arguments


class Watch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        assert all(isinstance(weight, DTensor) == shards_weights() for weight in kwargs["model"].parameters())
        if (process_number(), state.global_step) == KILL:
            os.kill(os.getpid(), signal.SIGKILL)


def on_cpus(*args, **options):
    arguments = made(*args, **options)
    assert arguments.device.type == "cpu"
    if shards_weights():
        PartialState().distributed_type = DistributedType.MULTI_GPU  # accelerate 1.15 trains with DDP instead on a CPU
    return arguments


class Watched(fine_tuning.AdapterTrainer):
    def __init__(self, *args, **options):
        super().__init__(*args, callbacks=[Watch()], **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    fine_tuning.training_arguments = on_cpus
    fine_tuning.AdapterTrainer = Watched
    fine_tuning.save_adapter = functools.partial(fine_tuning.save_adapter, dtype=torch.float32)
    main(sys.argv[1:])
