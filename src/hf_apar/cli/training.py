"""Commands that teach a model to fork, and heads to guess what it writes: train, train-medusa."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_apar.cli.common import (
    Dtype,
    DtypeOption,
    ModelOption,
    SeedOption,
    TemplateArgumentsOption,
    app,
    load,
    one_process,
    template_arguments,
)
from hf_apar.cli.options import with_settings
from hf_apar.data.settings import Loading
from hf_apar.processes import process_number
from hf_apar.training.tuning import HeadsTuning, Selection, Tuning

AnswersArgument = Annotated[
    Path, typer.Argument(help="Chats, as a file or folder that `extract` takes, or what it wrote.", exists=True)
]


@app.command("train")
@with_settings
def train_command(
    answers: AnswersArgument,
    output: Annotated[Path, typer.Argument(help="Folder for the adapter and its checkpoints.", file_okay=False)],
    tuning: Tuning,
    selection: Selection,
    loading: Loading,
    model: ModelOption = None,
    start: Annotated[
        Path | None,
        typer.Option(help="Adapter of this model to go on from; --rank is its own then.", exists=True, file_okay=False),
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 where it is safe.")] = False,
    chat_template_kwargs: TemplateArgumentsOption = None,
    seed: SeedOption = 0,
) -> None:
    """Teach a model where to fork, from ANSWERS to an adapter in OUTPUT. Goes on from a checkpoint found there."""
    from hf_apar.checkpoints.default_model import DEFAULT_BASE
    from hf_apar.training.fine_tuning import train

    metrics = train(
        answers, output, selection, tuning, model=model or DEFAULT_BASE, loading=loading, start=start, bf16=bf16,
        seed=seed, chat_template_kwargs=template_arguments(chat_template_kwargs),
    )  # fmt: skip
    if process_number() == 0:
        tell_metrics(metrics)


def tell_metrics(metrics: dict[str, float]) -> None:
    """Write what a training came to."""
    for name, value in metrics.items():
        typer.echo(f"{name:>24} {value:.4f}")


@app.command("train-medusa")
@with_settings
def train_medusa_command(
    answers: AnswersArgument,
    output: Annotated[Path, typer.Argument(help="Folder for the heads and their checkpoints.", file_okay=False)],
    tuning: HeadsTuning,
    loading: Loading,
    model: ModelOption = None,
    start: Annotated[
        Path | None, typer.Option(help="Folder of heads to go on from, of this model before it was tuned further.")
    ] = None,
    chat_template_kwargs: TemplateArgumentsOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Teach Medusa heads to guess what a model that can fork writes next. Goes on from a checkpoint found in OUTPUT."""
    from hf_apar.training.heads import train_medusa

    one_process("hf-apar train-medusa", "start it without a launcher: heads are small")
    loaded, tokenizer = load(model, dtype, loading=loading)
    metrics = train_medusa(
        loaded, tokenizer, answers, output, tuning, start=start, seed=seed,
        chat_template_kwargs=template_arguments(chat_template_kwargs),
    )  # fmt: skip
    typer.echo(json.dumps(metrics, indent=1))
