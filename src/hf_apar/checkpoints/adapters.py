"""What an adapter's folder says of its base: where it was, and whether the weights fit a model."""

from pathlib import Path
from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

from hf_apar.checkpoints.sources import is_folder, is_path
from hf_apar.errors import CheckpointError, ConfigurationError

PASS_BASE = "pass base= (--base), the folder or name of the model that it was trained on"


def recorded_base(adapter: str, base: str) -> str:
    """Return ``base`` as ``adapter`` records it.

    Raises:
        CheckpointError: if it is a folder that does not exist, or may be another model here than where it was recorded.
    """
    if Path(base).is_absolute() and is_folder(base):
        return base
    if is_path(base):
        raise CheckpointError(f"the adapter {adapter} was trained on {base}, and there is no such folder; {PASS_BASE}")
    if is_folder(base):
        raise CheckpointError(
            f"the adapter {adapter} was trained on a model called {base}, which may be the folder of that name here or one "
            f"on the Hub; pass base={str(Path(base).resolve())!r} (--base) for the folder, or call from another one"
        )
    return base


def check_files(folder: Path) -> None:
    """Raise :class:`ConfigurationError` if ``folder`` lacks what an adapter needs; its weights are safetensors alone."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "generation_config.json"):
        if not (folder / name).is_file():
            raise ConfigurationError(f"{folder} has no {name}; give a folder that hf_apar.training.train wrote")


def check_fit(folder: Path, model: PreTrainedModel) -> None:
    """Raise :class:`ConfigurationError` if ``model`` has other shapes than the adapter in ``folder`` was trained on.

    Also if it is not all in memory: PEFT drops the weights of an adapter there, with a warning at most.
    """
    from safetensors import safe_open

    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigurationError(
            f"parts of {model.name_or_path} are offloaded, where no adapter can be put on them; make one checkpoint of both "
            "(hf-apar merge), and load that with this device_map"
        )
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - not a dict
            shape = tensors.get_slice(key).get_shape()
            layer, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
            if key.endswith(".trainable_tokens_delta"):  # (tokens, hidden)
                sizes = ("the hidden states", shape[1], int(cast(Tensor, model.get_input_embeddings().weight).shape[1]))
            elif rest in ("A.weight", "B.weight"):  # (rank, inputs) and (outputs, rank)
                try:
                    module = model.get_submodule(layer)
                except AttributeError:
                    raise _misfit(folder, model, f"the model has no {layer}") from None
                side, place = ("in_features", 1) if rest == "A.weight" else ("out_features", 0)
                sizes = (layer, shape[place], getattr(module, side, shape[place]))
            else:
                continue
            if sizes[1] != sizes[2]:
                raise _misfit(folder, model, f"{sizes[0]} have {sizes[1]} values there and {sizes[2]} in the model")


def _misfit(folder: Path, model: PreTrainedModel, reason: str) -> ConfigurationError:
    return ConfigurationError(f"the adapter in {folder} does not fit {model.name_or_path}: {reason}; {PASS_BASE}")
