"""Several processes that train one adapter: one of them works for all, and what is spread over them is gathered."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_apar.data.settings import Loading
from hf_apar.errors import ConfigurationError
from hf_apar.processes import process_count, process_number, shards_weights

Made = TypeVar("Made")


def check_processes(loading: Loading) -> None:
    """Refuse what several processes cannot do.

    Raises:
        ConfigurationError: if ``loading`` spreads the model over the GPUs of other processes, or packs what is to be
            sharded; if that is to be done by FSDP 1.
    """
    if loading.device_map is not None and process_count() > 1:
        raise ConfigurationError(
            f"device_map is {loading.device_map!r}, and each of {process_count()} processes has a GPU of its own; leave it "
            "out, or start one process without a launcher"
        )
    if shards_weights() and loading.bits is not None:
        raise ConfigurationError(
            f"FSDP shards whole weights, and load_in_{loading.bits}bit packs them; leave either out: without FSDP each "
            "process holds the packed model whole"
        )
    if shards_weights() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigurationError("FSDP 1 is not supported, and the launcher's default; pass --fsdp_version 2 to accelerate")


def once(work: Callable[[], Made]) -> Made:
    """Let one process do ``work``, and return what it made in all of them; what it raises is raised in all of them."""
    if process_count() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if process_number() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    made: Made = outcome[0]
    return made


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of ``model`` that are trained, whole; all processes must ask, since each may hold a part."""
    trained = {name: one for name, one in model.named_parameters(remove_duplicate=False) if one.requires_grad}
    return {name: one.full_tensor() if isinstance(one, DTensor) else one.detach() for name, one in trained.items()}
