"""Commands that teach a model to fork: train, train-medusa; ``recipe`` runs them after those that make the answers."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_apar.cli.common import (
    Dtype,
    DtypeOption,
    ModelOption,
    SeedOption,
    TemplateArgumentsOption,
    app,
    errors_in_one_line,
    load,
    load_base,
    template_arguments,
)
from hf_apar.cli.data import (
    ClosingOption,
    Engine,
    EngineOption,
    MaxDepthOption,
    MaxItemsOption,
    MaxWholeTokensOption,
    SamplingPenaltyOption,
    TaperOption,
    TemperatureOption,
    distill,
    elaborate,
    extract,
)
from hf_apar.cli.evaluation import evaluate
from hf_apar.cli.stages import Stages

StructuredShareOption = Annotated[float, typer.Option(min=0, max=1, help="Share of the answers that fork.")]
UnforkedShareOption = Annotated[
    float, typer.Option(min=0, max=1, help="Of these so many come once more without forks, for plain decoding.")
]
MaxRepetitionOption = Annotated[
    float, typer.Option(min=0, max=1, help="Leave out answers that repeat more of themselves; 1 keeps all.")
]
MaxForksOption = Annotated[int | None, typer.Option(min=1, help="Leave out answers that fork more often.")]
MinIdealRatioOption = Annotated[
    float,
    typer.Option(min=1, help="Leave out answers that fork and whose text is not so many times their longest path."),
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile the model first: minutes, then steps of about two thirds the time.")
]
ForkBiasOption = Annotated[float, typer.Option(help="The checkpoint's default of generate's --fork-bias.")]
PenaltyOption = Annotated[float, typer.Option(help="The checkpoint's default of decoding; 1 for none.")]
TrainBatchOption = Annotated[int, typer.Option(min=1, help="Rows computed at once: more on a GPU.")]
LikeliestOption = Annotated[
    bool, typer.Option("--likeliest", help="Of several answers to a prompt train on one that forks, the likeliest.")
]
MinElaboratedOption = Annotated[
    float, typer.Option(min=0, max=1, help="Leave out answers of whose threads a smaller share has a second sentence.")
]


@app.command()
def train(
    answers: Annotated[
        Path, typer.Argument(help="Chats, as a file or folder that `extract` takes, or what it wrote.", exists=True)
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the adapter and its checkpoints.", file_okay=False)],
    model: ModelOption = None,
    start: Annotated[
        Path | None,
        typer.Option(help="Adapter of this model to go on from; --rank is its own then.", exists=True, file_okay=False),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-4,
    token_rate: Annotated[float, typer.Option(help="[Fork] and [Child] learn so many times faster.")] = 12.0,
    epochs: Annotated[float, typer.Option(help="Passes over the answers.")] = 2.0,
    max_steps: Annotated[int, typer.Option(help="Steps, in place of epochs; -1 for none.")] = -1,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row; several answers share one.")] = 1024,
    batch_size: TrainBatchOption = 1,
    accumulation: Annotated[int, typer.Option(min=1, help="So many batches are one optimizer step.")] = 1,
    structured_share: StructuredShareOption = 0.67,
    unforked_share: UnforkedShareOption = 0.15,
    max_repetition: MaxRepetitionOption = 0.1,
    max_forks: MaxForksOption = None,
    min_ideal_ratio: MinIdealRatioOption = 1.0,
    min_elaborated: MinElaboratedOption = 0.0,
    likeliest: LikeliestOption = False,
    held_out: Annotated[float, typer.Option(min=0, max=1, help="Share of the answers kept for the metrics.")] = 0.05,
    fork_bias: ForkBiasOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 10,
    eval_steps: Annotated[int, typer.Option(min=1, help="Steps between two evaluations.")] = 100,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 where it is safe.")] = False,
    compile: CompileOption = False,
    chat_template_kwargs: TemplateArgumentsOption = None,
    seed: SeedOption = 0,
) -> None:
    """Teach a model where to fork, from ANSWERS to an adapter in OUTPUT. Goes on from a checkpoint found there."""
    with errors_in_one_line():
        from hf_apar.checkpoints.loading import DEFAULT_BASE
        from hf_apar.training.recipe import train as fine_tune
        from hf_apar.training.selection import Selection

        selection = Selection(
            structured_share=structured_share, unforked_share=unforked_share, held_out=held_out,
            max_repetition=max_repetition, max_forks=max_forks, min_ideal_ratio=min_ideal_ratio,
            min_elaborated=min_elaborated, likeliest=likeliest,
        )  # fmt: skip
        variables = template_arguments(chat_template_kwargs)
        metrics = fine_tune(
            answers, output, selection, model=model or DEFAULT_BASE, start=start, rank=rank, learning_rate=learning_rate,
            token_rate=token_rate, epochs=epochs, max_steps=max_steps, max_length=max_length, batch_size=batch_size,
            accumulation=accumulation, fork_bias=fork_bias,
            repetition_penalty=repetition_penalty, save_steps=save_steps, eval_steps=eval_steps,
            bf16=bf16, compile=compile, seed=seed, chat_template_kwargs=variables,
        )  # fmt: skip
    for name, value in metrics.items():
        typer.echo(f"{name:>24} {value:.4f}")


@app.command("train-medusa")
def train_medusa(
    answers: Annotated[
        Path, typer.Argument(help="Chats, as a file or folder that `extract` takes, or what it wrote.", exists=True)
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the heads and their checkpoints.", file_okay=False)],
    model: ModelOption = None,
    start: Annotated[
        Path | None, typer.Option(help="Folder of heads to go on from, of this model before it was tuned further.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Guesses in a row.")] = 5,
    inner_size: Annotated[int, typer.Option(min=1, help="Width of the heads' gated layer.")] = 1024,
    draft_vocabulary: Annotated[int, typer.Option(min=8, help="So many frequent tokens may be guessed.")] = 8192,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    epochs: Annotated[float, typer.Option(help="Passes over the answers.")] = 2.0,
    max_steps: Annotated[int, typer.Option(help="Steps, in place of epochs; -1 for none.")] = -1,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row; several answers share one.")] = 1024,
    places: Annotated[int, typer.Option(min=1, help="Places of a row that are guessed from.")] = 256,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 50,
    eval_steps: Annotated[int, typer.Option(min=1, help="Steps between two evaluations.")] = 250,
    chat_template_kwargs: TemplateArgumentsOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Teach Medusa heads to guess what a model that can fork writes next. Goes on from a checkpoint found in OUTPUT."""
    with errors_in_one_line():
        from hf_apar.training.heads import train_medusa as learn

        variables = template_arguments(chat_template_kwargs)
        loaded, tokenizer = load(model, dtype)
        metrics = learn(
            loaded, tokenizer, answers, output, start=start, length=length, inner_size=inner_size,
            draft_vocabulary=draft_vocabulary, learning_rate=learning_rate, epochs=epochs, max_steps=max_steps,
            max_length=max_length, places=places, save_steps=save_steps, eval_steps=eval_steps, seed=seed,
            chat_template_kwargs=variables,
        )  # fmt: skip
    typer.echo(json.dumps(metrics, indent=1))


def _no_folder(prompts: str) -> str:
    if Path(prompts).is_dir():
        raise typer.BadParameter(f"{prompts} is a folder; give a file of prompts, JSON Lines or one array")
    return prompts


@app.command()
def recipe(
    output: Annotated[Path, typer.Option(help="Folder for all that is made; the adapter lies in its `adapter`.")],
    prompts: Annotated[
        str, typer.Option(callback=_no_folder, help="JSON Lines of prompts; - for the package's templates alone.")
    ] = "-",
    templates: Annotated[int, typer.Option(min=0, help="Add so many prompts from the package's own templates.")] = 5920,
    opened_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the prompts without an opening whose answers must hold a list.")
    ] = 0.5,
    model: ModelOption = None,
    engine: EngineOption = Engine.transformers,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are dropped.")] = 384,
    max_whole_tokens: MaxWholeTokensOption = None,
    max_items: MaxItemsOption = None,
    temperature: TemperatureOption = 0.3,
    repetition_penalty: SamplingPenaltyOption = 1.0,
    min_detail_tokens: Annotated[
        int, typer.Option(min=0, help="Details go on to this length; 0 leaves the answers as they are.")
    ] = 40,
    taper: TaperOption = 0,
    closing: ClosingOption = True,
    max_depth: MaxDepthOption = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes that extract.")] = 1,
    structured_share: StructuredShareOption = 0.67,
    unforked_share: UnforkedShareOption = 0.15,
    max_repetition: MaxRepetitionOption = 0.1,
    max_forks: MaxForksOption = None,
    min_ideal_ratio: MinIdealRatioOption = 1.0,
    min_elaborated: MinElaboratedOption = 0.0,
    likeliest: LikeliestOption = False,
    epochs: Annotated[float, typer.Option(help="Passes over the answers.")] = 2.0,
    max_steps: Annotated[int, typer.Option(help="Steps, in place of epochs; -1 for none.")] = -1,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row; several answers share one.")] = 1024,
    train_batch_size: TrainBatchOption = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the adapter.")] = 4e-4,
    heads: Annotated[bool, typer.Option("--heads/--no-heads", help="Train Medusa heads too.")] = True,
    fork_bias: ForkBiasOption = 0.0,
    decoding_penalty: PenaltyOption = 1.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 where it is safe.")] = False,
    compile: CompileOption = False,
    chat_template_kwargs: TemplateArgumentsOption = None,
    seed: SeedOption = 0,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Make again what was made with other settings, and all after it; the old is kept."),
    ] = False,
) -> None:
    """From a chat model to one that forks: all of these commands and evaluate; goes on where it stopped."""
    output.mkdir(parents=True, exist_ok=True)
    answers, longer, adapter = (output / name for name in ("answers.jsonl", "longer.jsonl", "adapter"))
    trees = (longer if min_detail_tokens else answers).with_suffix(".trees.jsonl")
    dtype = Dtype.bfloat16 if bf16 else Dtype.float32
    writing: dict[str, Any] = {
        "model": model, "temperature": temperature, "repetition_penalty": repetition_penalty, "engine": engine,
        "chat_template_kwargs": chat_template_kwargs, "seed": seed, "dtype": dtype,
    }  # fmt: skip
    asking = writing | {
        "max_new_tokens": max_new_tokens, "max_whole_tokens": max_whole_tokens, "max_items": max_items,
        "templates": templates, "opened_share": opened_share,
    }  # fmt: skip
    going_on = writing | {"min_detail_tokens": min_detail_tokens, "taper": taper, "closing": closing}
    rows: dict[str, Any] = {
        "epochs": epochs, "max_steps": max_steps, "max_length": max_length, "chat_template_kwargs": chat_template_kwargs,
        "seed": seed,
    }  # fmt: skip
    learning = rows | {
        "model": model, "structured_share": structured_share, "unforked_share": unforked_share,
        "max_repetition": max_repetition, "max_forks": max_forks, "min_ideal_ratio": min_ideal_ratio,
        "min_elaborated": min_elaborated, "likeliest": likeliest, "batch_size": train_batch_size,
        "learning_rate": learning_rate, "fork_bias": fork_bias, "repetition_penalty": decoding_penalty, "bf16": bf16,
    }  # fmt: skip
    judging = {"base": model, "chat_template_kwargs": chat_template_kwargs, "dtype": dtype}
    weights = adapter / "adapter_model.safetensors"
    stages = Stages(output, {
        "answers": [answers, output / "answers.jsonl.done"], "longer": [longer, output / "longer.jsonl.done"],
        "trees": [trees], "adapter": [adapter],
        "heads": [adapter / name for name in ("medusa.safetensors", "medusa_checkpoints", "medusa_metrics.json")],
        "evaluation": [adapter / "evaluation.json"],
    }, restart=restart)  # fmt: skip
    with errors_in_one_line():
        if not weights.is_file():
            _check(model, chat_template_kwargs)
        with stages.stage("answers", asking, [] if prompts == "-" else [Path(prompts)]) as wanted:
            if _stage(1, "the model answers prompts in its own words", wanted):
                distill(prompts, answers, batch_size=batch_size, **asking)
        with stages.stage("longer", going_on, [answers]) as wanted:
            if min_detail_tokens and _stage(2, "it goes on with short details", wanted):
                elaborate(answers, longer, batch_size=batch_size, **going_on)
        source = longer if min_detail_tokens else answers
        with stages.stage("trees", {"max_depth": max_depth}, [source]) as wanted:
            if _stage(3, "trees are found in the answers", wanted):
                extract(source, trees, workers=workers, max_depth=max_depth)
        with stages.stage("adapter", learning, [trees]) as wanted:
            if _stage(4, "the model learns where to fork", wanted):
                train(trees, adapter, compile=compile, **learning)
        if heads:
            with stages.stage("heads", rows | {"dtype": dtype}, [trees, weights]) as wanted:
                if _stage(5, "heads learn what it writes next", wanted):
                    train_medusa(trees, adapter, model=str(adapter), dtype=dtype, **rows)
        with stages.stage("evaluation", judging, [weights]) as wanted:
            if _stage(6, "it answers prompts that it has not seen", wanted):
                _evaluate(adapter, model, dtype, chat_template_kwargs)
    typer.echo(f'done: hf-apar generate --model {adapter} "..."')


def _check(model: str | None, chat_template_kwargs: str | None) -> None:
    """Raise what keeps ``model`` from being taught, before it answers for hours."""
    from hf_apar.checkpoints.readiness import check_model

    check_model(*load_base(model, Dtype.float32), chat_template_kwargs=template_arguments(chat_template_kwargs))


def _evaluate(adapter: Path, base: str | None, dtype: Dtype, chat_template_kwargs: str | None) -> None:
    from hf_apar.checkpoints.loading import DEFAULT_BASE

    evaluate(
        str(adapter), None, None, base=base or DEFAULT_BASE, output=adapter / "evaluation.json",
        chat_template_kwargs=chat_template_kwargs, dtype=dtype,
    )  # fmt: skip


def _stage(number: int, what: str, wanted: bool) -> bool:
    """Say what a stage does, or that it was done, and return ``wanted``."""
    typer.secho(f"{number}. {what}" + ("" if wanted else ": made already"), bold=wanted, err=True)
    return wanted
