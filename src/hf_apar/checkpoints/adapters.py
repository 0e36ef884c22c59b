"""Adapters on disk: what their folder says of their base, whether they fit a model, put on one, written."""

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.checkpoints.sources import is_folder, is_path
from hf_apar.errors import (
    AparError,
    CheckpointError,
    ConfigurationError,
    ControlTokenError,
    MissingPackageError,
    lacks_memory,
)
from hf_apar.generation_settings import make_savable
from hf_apar.tokens import add_control_tokens, saved_settings

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

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
            if not tensors.get_tensor(key).isfinite().all():
                raise ConfigurationError(f"the adapter in {folder} has values in {key} that are no numbers; train it again")
            layer, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
            compared = key.endswith(".trainable_tokens_delta") or rest in ("A.weight", "B.weight")
            if compared and len(shape) < 2:  # the magnitudes of DoRA, and biases, have one
                raise _misfit(folder, model, f"{key} has the shape {shape}, and not two dimensions")
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


def forks(folder: Path) -> bool:
    """Has the adapter in ``folder`` control tokens? One that learnt answers as they read has none, and says so here."""
    if not (folder / "generation_config.json").is_file():
        return True  # what it lacks is told where it is loaded
    return saved_settings(GenerationConfig.from_pretrained(folder)).control_ids is not None


def load_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> PreTrainedModel:
    """Put the adapter in ``folder`` on ``model`` and take over its generation config; both arguments are changed.

    Args:
        model: the base that the adapter was trained on, without control tokens or with the same ones; it gets them if the
            adapter has some.
        folder: what :func:`save_adapter` wrote.

    Returns:
        The model with the adapter merged into it; a quantised one, which takes no sums without loss, in a ``PeftModel``.

    Raises:
        ConfigurationError: if ``folder`` holds no adapter, or no generation config, or the adapter does not fit.
        ControlTokenError: if the adapter's control tokens have other ids than ``tokenizer`` gives them.
        MissingPackageError: if PEFT is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingPackageError(f"the adapter {folder} needs the package peft; run pip install peft")
    from peft import PeftModel

    folder = Path(folder)
    check_files(folder)
    check_fit(folder, model)
    generation_config = adapter_settings(folder, add_control_tokens(model, tokenizer) if forks(folder) else None)
    with settings_make_an_adapter(folder):
        wrapped = PeftModel.from_pretrained(model, str(folder))
        whole = getattr(model, "hf_quantizer", None) is None
        made = cast(PreTrainedModel, wrapped.merge_and_unload() if whole else wrapped.eval())
    model.generation_config = generation_config  # which PEFT passes on to, where the adapter is not merged
    return made


@contextmanager
def settings_make_an_adapter(folder: Path) -> Iterator[None]:
    """Say so where they make none: PEFT takes its settings as they come.

    Raises:
        ConfigurationError: for whatever it raises, lack of memory aside.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if lacks_memory(error) or isinstance(error, AparError):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise ConfigurationError(f"the settings in {folder / 'adapter_config.json'} make no adapter ({reason})") from error


def adapter_settings(folder: Path, control_ids: tuple[int, int] | None) -> GenerationConfig:
    """Return the generation config of the adapter in ``folder``, for a model whose [Fork] and [Child] have ``control_ids``.

    ``None`` is for a model that answers in sequence.

    Raises:
        ConfigurationError: if ``folder`` holds no adapter, or no generation config.
        ControlTokenError: if the adapter's control tokens have other ids, or one of the two has none.
    """
    check_files(folder)
    generation_config = GenerationConfig.from_pretrained(folder)
    trained = saved_settings(generation_config).control_ids
    if (control_ids is None) is not (trained is None):
        raise ControlTokenError(
            f"the adapter in {folder} has learnt to fork, and this model is to answer in sequence; start from none, or from "
            "one that was trained with sequential"
            if control_ids is None
            else f"the adapter in {folder} was trained with sequential and has no control tokens; start from none, or from "
            "one that has learnt to fork"
        )
    if control_ids != trained:
        raise ControlTokenError(
            f"the adapter in {folder} was trained with the [Fork] and [Child] ids {trained}, this model has {control_ids}; "
            f"load it onto the base that it was trained on: {PASS_BASE}"
        )
    return generation_config


def save_adapter(
    model: "PeftModel",
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter alone, cast to ``dtype``, with its generation config and tokenizer.

    PEFT's own ``save_pretrained`` would add the embeddings, which the two trained rows make needless.

    Args:
        weights: those of the adapter by their names in ``model``, where ``model`` holds a part of them.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    save_settings(base, tokenizer, folder)
    config = model.peft_config[model.active_adapter]
    inference_mode, config.inference_mode = config.inference_mode, True
    if is_folder(base_name := str(config.base_model_name_or_path)):  # as it was typed: found from here alone
        config.base_model_name_or_path = str(Path(base_name).resolve())
    config.save_pretrained(str(folder))
    config.inference_mode = inference_mode
    state = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    unfinished = folder / "adapter_model.safetensors.unfinished"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / "adapter_model.safetensors")  # last: where it lies, the folder loads


def save_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the generation config, corrected where transformers would not save it, and the tokenizer."""
    assert model.generation_config is not None
    for change in make_savable(model.generation_config):
        logger.warning("the generation config could not be saved as it was: %s", change)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
