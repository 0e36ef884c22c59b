"""What the commands share: the application, options, loading, errors in one line, a progress bar."""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from hf_apar.errors import AparError, ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

app = typer.Typer(
    name="hf-apar",
    help="Auto-parallel auto-regressive decoding: one answer, written by many threads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,  # an error is one line, not a box
)


class Dtype(StrEnum):
    """Number formats that a model is loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


ModelOption = Annotated[
    str | None, typer.Option("--model", help="Folder or hub id of a model or adapter; default: the one that ships.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Number format of the weights.")]
TemplateArgumentsOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        help="Variables of the chat template, as JSON: '{\"enable_thinking\": false}'; default: none.",
    ),
]
SeedOption = Annotated[int, typer.Option(help="Seed of whatever is drawn at random.")]


def template_arguments(text: str | None) -> dict[str, object]:
    """Return what ``--chat-template-kwargs`` says.

    Raises:
        ConfigurationError: if it is no JSON object.
    """
    try:
        values = json.loads(text) if text else {}
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):
        raise ConfigurationError(
            f"--chat-template-kwargs is {text}; give a JSON object in quotes, such as '{{\"enable_thinking\": false}}'"
        )
    return values


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn an error that the user can mend into one line on the standard error and exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        typer.echo(f"hf-apar: {error.name} is not installed; pip install 'hf_apar[cli,train,default]'", err=True)
        raise typer.Exit(2) from error
    except (AparError, OSError) as error:
        typer.echo(f"hf-apar: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Load without progress bars; that of GGUF files ignores the switch of transformers, so it is redirected."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with redirect_stderr(io.StringIO()):
        yield


def load(name: str | None, dtype: Dtype) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a model that can fork, and its tokenizer."""
    import torch
    from transformers import AutoTokenizer

    import hf_apar
    from hf_apar.checkpoints import load_default_model

    torch_dtype = getattr(torch, dtype.value)
    with quietly():
        if name is None:
            return load_default_model(dtype=torch_dtype)
        model = hf_apar.AparModelForCausalLM.from_pretrained(name, dtype=torch_dtype)
        return model, AutoTokenizer.from_pretrained(name)


def load_base(name: str | None, dtype: Dtype) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load any model, without APAR, and its tokenizer."""
    import torch

    from hf_apar import checkpoints

    with quietly():
        return checkpoints.load_base(name or checkpoints.DEFAULT_BASE, dtype=getattr(torch, dtype.value))


def on_device(model: "PreTrainedModel") -> "PreTrainedModel":
    """Move ``model`` to the GPU, if there is one; ``CUDA_VISIBLE_DEVICES=`` hides it."""
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model  # type: ignore[arg-type]  # the decorator of `to` hides it


@contextmanager
def progress() -> Iterator[Callable[[int, int | None], None]]:
    """Draw a progress bar on the standard error; what is yielded takes the count of what is done, and of all if known."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
