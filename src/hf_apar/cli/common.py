"""What the commands share: options, loading, where to compute, a progress bar."""

import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from enum import StrEnum
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, cast

import typer

from hf_apar.cli.application import app, say, tell
from hf_apar.data.settings import Loading
from hf_apar.errors import AparError, ConfigurationError, ControlTokenError
from hf_apar.processes import local_number, process_count, process_number

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["app", "say", "tell"]  # for the commands

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_MODEL_FILES = ("config.json", "adapter_config.json")


class Dtype(StrEnum):
    """Number formats that a model is loaded in; ``auto`` is the one that it was saved in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def known_model(name: str | None) -> str | None:
    """Return ``name`` if it is a folder with a model, or could be a name on the Hub; a path never goes to the Hub."""
    if name is None:
        return None
    folder = Path(name).expanduser()
    if folder.is_dir():
        if any((folder / file).is_file() for file in _MODEL_FILES):
            return str(folder)
        inside = sorted(one.parent for file in _MODEL_FILES for one in folder.glob(f"*/{file}"))
        hint = f"; did you mean {inside[0]}?" if inside else "; give the folder of a model or adapter, or a name on the Hub"
        raise typer.BadParameter(f"the folder {name} has no {' and no '.join(_MODEL_FILES)}{hint}")
    if folder.exists():
        raise typer.BadParameter(f"{name} is a file; give the folder of a model or adapter")
    if not _HUB_NAME.fullmatch(name):
        raise typer.BadParameter(f"there is no folder {name}; give the folder of a model or adapter, or a name on the Hub")
    return name


def known_heads(name: str | None) -> str | None:
    """Return ``name`` if it is a folder, which heads may lie in, or could be a name on the Hub."""
    folder = Path(name or "").expanduser()
    return str(folder) if name and folder.is_dir() else known_model(name)


def finite(value: float | None) -> float | None:
    """Refuse ``nan`` and ``inf``, which pass for numbers on a command line."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number to compute with")
    return value


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", callback=known_model, help="Folder or Hub name of a model or adapter; default: the one that ships."
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", callback=known_model, help="Where an adapter's base is now: folder or Hub name."),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Number format of the weights; auto: as they were saved.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1, mps ...; auto: a GPU if there is one.")
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of whatever is drawn at random.")]
TemplateArgumentsOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs", help='Arguments of the chat template, as a JSON object: {"enable_thinking": false}.'
    ),
]


def template_arguments(text: str | None) -> dict[str, object] | None:
    """Return what ``--chat-template-kwargs`` says.

    Raises:
        ConfigurationError: if it is no JSON object.
    """
    if text is None:
        return None
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise ConfigurationError(
            f'--chat-template-kwargs takes a JSON object such as {{"enable_thinking": false}}, got {text}'
        )
    return values


@contextmanager
def quietly() -> Iterator[None]:
    """Load without progress bars; that of GGUF files ignores the switch of transformers, so it is redirected."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    from hf_apar.releases import warn_outside_range

    with warnings.catch_warnings(record=True) as caught:
        warn_outside_range()  # once, and here, where it can be seen
    for warning in caught:
        say(str(warning.message))
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with redirect_stderr(io.StringIO()):
        yield


@contextmanager
def named(name: str) -> Iterator[None]:
    """Say in the words of the command line what is wrong with the model ``name``."""
    try:
        yield
    except ControlTokenError as error:
        raise ConfigurationError(
            f"{name} was not tuned for APAR ({str(error).split(';')[0]}); decode it with generate --plain, or teach it: "
            f"hf-apar recipe --model {name} --output DIR"
        ) from error
    except OSError as error:
        if (
            not isinstance(error, AparError) and error.errno is None and not Path(name).exists()
        ):  # what transformers raises for the Hub
            first = str(error).split("\n")[0].rstrip(".")
            raise ConfigurationError(f"there is no folder {name} here, and the Hub does not help: {first}") from error
        raise
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):  # from Rust, without a base class that says more
            raise ConfigurationError(
                f"the weights of {name} are damaged or cut ({error}); copy or make them again"
            ) from error
        raise


def load(
    name: str | None, dtype: Dtype, base: str | None = None, loading: Loading = Loading()
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a model that can fork, and its tokenizer; ``base`` is where an adapter's base is now."""
    from hf_apar.checkpoints.default_model import load_default_model
    from hf_apar.checkpoints.loading import AparModelForCausalLM, load_tokenizer

    if name is None:
        if base is not None:
            raise ConfigurationError("--base is for an adapter of yours; name it with --model")
        with quietly():
            return load_default_model(dtype=chosen_dtype(dtype), **loading_options(loading, dtype))
    with quietly(), named(name):
        options = loading_options(loading, dtype)
        loaded = AparModelForCausalLM.from_pretrained(name, base=base, dtype=chosen_dtype(dtype), **options)
        return loaded, load_tokenizer(name, base=base)


def loading_options(loading: Loading, dtype: Dtype) -> dict[str, object]:
    """Return how a model is loaded, as options of ``from_pretrained``."""
    options: dict[str, object] = loading.options("bfloat16" if dtype is Dtype.auto else dtype.value)
    if loading.bits is not None:
        options.setdefault("device_map", {"": chosen_device("auto")})  # packed weights do not move
    return options


def load_untuned(
    name: str | None, dtype: Dtype, loading: Loading = Loading()
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load any model, without APAR, and its tokenizer; by default the base of the default model."""
    from hf_apar.checkpoints.default_model import DEFAULT_BASE
    from hf_apar.checkpoints.loading import load_base

    name = name or DEFAULT_BASE
    with quietly(), named(name):
        return load_base(name, dtype=chosen_dtype(dtype), **loading_options(loading, dtype))


def load_any(name: str | None, dtype: Dtype, base: str | None = None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a model for plain decoding, whether it can fork or not, and its tokenizer; control tokens are suppressed."""
    from hf_apar.checkpoints.adapters import forks
    from hf_apar.tokens import checkpoint_config, completed

    if name is None or base is not None or ((config := adapter_config(name)) is not None and forks(config.parent)):
        return load(name, dtype, base)
    model, tokenizer = load_untuned(name, dtype)

    found = completed(checkpoint_config(model), tokenizer)
    if (ids := found.control_ids) is not None and (generation := model.generation_config) is not None:
        generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), *ids})
    return model, tokenizer


def adapter_config(name: str | None) -> Path | None:
    """Return the file that tells of the base of ``name``, a folder or a name on the Hub; ``None`` if it is no adapter."""
    from hf_apar.checkpoints.default_model import DEFAULT_BASE
    from hf_apar.checkpoints.sources import find_source

    if name is None or name == DEFAULT_BASE:
        return None
    with quietly(), named(name):
        return find_source(name).file("adapter_config.json")


def chosen_dtype(dtype: Dtype) -> "torch.dtype | str":
    """Return ``dtype`` as transformers takes it."""
    import torch

    return "auto" if dtype is Dtype.auto else getattr(torch, dtype.value)


def chosen_device(device: str, otherwise: str = "cpu") -> str:
    """Return ``device``; for ``auto`` a CUDA GPU, if there is one (``CUDA_VISIBLE_DEVICES=`` hides it), or ``otherwise``.

    Raises:
        ConfigurationError: if there is no such device here.
    """
    import torch

    if device == "auto":
        own = f"cuda:{local_number()}" if process_count() > 1 else "cuda"
        device = own if torch.cuda.is_available() else otherwise
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each back end has its own
        reason = shorten(str(error), 100, placeholder=" ...").rstrip(".")
        raise ConfigurationError(f"--device {device} cannot be used here ({reason}); --device cpu always works") from error
    return device


def on_device(model: "PreTrainedModel", device: str = "auto") -> "PreTrainedModel":
    """Move ``model`` to the device that :func:`chosen_device` returns, unless a device map has placed it."""
    import torch

    if hasattr(model, "hf_device_map"):
        return model

    device = chosen_device(device, model.device.type)
    if model.device != torch.device(device):
        cast(torch.nn.Module, model).to(device)
    return model


def one_process(command: str, instead: str) -> None:
    """Raise :class:`ConfigurationError` where ``command`` is one of several processes, and say what to do ``instead``."""
    if process_count() > 1:
        raise ConfigurationError(f"{command} runs in one process, and {process_count()} are started; {instead}")


@contextmanager
def progress() -> Iterator[Callable[[int, int | None], None]]:
    """Draw a progress bar on the standard error; what is yielded takes the count of what is done, and of all if known.

    Of several processes the first one draws.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True, quiet=process_number() > 0)
    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
