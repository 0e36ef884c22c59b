"""Commands that make a model which can fork: distill, extract, train, train-medusa; ``recipe`` runs them and evaluates."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from hf_apar.cli.common import Dtype, DtypeOption, ModelOption, SeedOption, app, errors_in_one_line, load, progress, quietly
from hf_apar.cli.evaluation import evaluate
from hf_apar.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_apar.data.distill import Question
    from hf_apar.data.samplers import Sampler


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
MaxDepthOption = Annotated[int, typer.Option(min=1, help="Deepest thread; the root has depth 1.")]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile the model first: minutes, then steps of about two thirds the time.")
]
PenaltyOption = Annotated[float, typer.Option(help="The checkpoint's default of decoding; 1 for none.")]
MaxWholeTokensOption = Annotated[
    int | None, typer.Option(min=1, help="The same for prompts without an opening, whose answers mostly stay whole.")
]
MaxItemsOption = Annotated[
    int | None, typer.Option(min=2, help="Numbered lists end after so many items, or as many as they announce.")
]
MinElaboratedOption = Annotated[
    float, typer.Option(min=0, max=1, help="Leave out answers of whose threads a smaller share has a second sentence.")
]


class Engine(StrEnum):
    """What runs the model that ``distill`` asks."""

    transformers = "transformers"
    vllm = "vllm"


@app.command()
def distill(
    prompts: Annotated[str, typer.Argument(help="JSON Lines: `prompt`, and `opening` if wanted; - for none.")],
    output: Annotated[Path, typer.Argument(help="JSON Lines that the answers are appended to.", dir_okay=False)],
    model: ModelOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are dropped.")] = 384,
    max_whole_tokens: MaxWholeTokensOption = None,
    max_items: MaxItemsOption = None,
    templates: Annotated[int, typer.Option(min=0, help="Add so many prompts from the package's own templates.")] = 0,
    opened_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the prompts without an opening whose answers must hold a list.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Of the answers' sampling, 1 for none; small models loop without one.")
    ] = 1.0,
    engine: Annotated[Engine, typer.Option(help="What runs the model; vllm is faster, and an environment of its own.")] = (
        Engine.transformers
    ),
    seed: SeedOption = 0,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Let a model answer prompts in its own words: the text for `train`. Goes on where it stopped."""
    with errors_in_one_line():
        questions = [] if prompts == "-" else _read_questions(Path(prompts))
        questions = _opened(questions, opened_share, seed) + _template_questions(templates, seed)
        if not questions:
            raise DataError("there are no prompts; name a file of them, or ask for some with --templates N")
        from hf_apar.data.distill import distill as answer

        with _sampler(model, dtype, engine, batch_size, repetition_penalty, seed) as (sample, tokenizer):
            steps = answer(
                sample, tokenizer, questions, output, batch_size=batch_size, max_new_tokens=max_new_tokens,
                max_whole_tokens=max_whole_tokens, max_items=max_items,
            )  # fmt: skip
            _follow(steps, total=len(questions))


@app.command()
def extract(
    source: Annotated[Path, typer.Argument(help="Chats: JSON Lines, Parquet, or a folder of `datasets`.", exists=True)],
    output: Annotated[Path, typer.Argument(help="JSON Lines, or Parquet if it ends so.", dir_okay=False)],
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    max_depth: MaxDepthOption = 3,
    max_forks: Annotated[int, typer.Option(min=1, help="An answer that would fork more often stays whole.")] = 16,
    without: Annotated[list[str] | None, typer.Option(help="Switch off the rule of this name; may be given again.")] = None,
) -> None:
    """Find where the answers of chats fork, and report what keeps the others whole. Bad records are written aside."""
    with errors_in_one_line():
        from hf_apar.data.convert import extract_file

        with progress() as show:
            report = extract_file(
                source, output, workers=workers, max_depth=max_depth, max_forks=max_forks, without=without or (),
                on_progress=show,
            )  # fmt: skip
    counts = report.to_dict()
    typer.echo(
        f"{report.records} records, {report.rejected.total()} of them rejected; {report.answers} answers, "
        f"{counts['structured_share']:.1%} structured, {counts['threads_per_answer']:.2f} threads an answer, ideal ratio "
        f"{counts['ideal_ratio']:.2f}; {report.seconds:.1f} s"
    )
    for title, reasons in (("left whole", report.refused), ("parts kept", report.kept), ("rejected", report.rejected)):
        for reason, count in reasons.most_common():
            typer.echo(f"{title:>12} {count:8d}  {reason}")


@app.command()
def train(
    answers: Annotated[
        Path, typer.Argument(help="Prompts and responses, or what `extract` wrote.", exists=True, dir_okay=False)
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the adapter and its checkpoints.", file_okay=False)],
    model: ModelOption = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-4,
    token_rate: Annotated[float, typer.Option(help="[Fork] and [Child] learn so many times faster.")] = 12.0,
    epochs: Annotated[float, typer.Option(help="Passes over the answers.")] = 2.0,
    max_steps: Annotated[int, typer.Option(help="Steps, in place of epochs; -1 for none.")] = -1,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row; several answers share one.")] = 1024,
    accumulation: Annotated[int, typer.Option(min=1, help="Rows of one optimizer step.")] = 1,
    structured_share: StructuredShareOption = 0.67,
    unforked_share: UnforkedShareOption = 0.15,
    max_repetition: MaxRepetitionOption = 0.1,
    max_forks: MaxForksOption = None,
    min_ideal_ratio: MinIdealRatioOption = 1.0,
    min_elaborated: MinElaboratedOption = 0.0,
    held_out: Annotated[float, typer.Option(min=0, max=1, help="Share of the answers kept for the metrics.")] = 0.05,
    fork_bias: Annotated[float, typer.Option(help="The checkpoint's default of generate's --fork-bias.")] = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 10,
    eval_steps: Annotated[int, typer.Option(min=1, help="Steps between two evaluations.")] = 100,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 where it is safe.")] = False,
    compile: CompileOption = False,
    seed: SeedOption = 0,
) -> None:
    """Teach a model where to fork, from ANSWERS to an adapter in OUTPUT. Goes on from a checkpoint found there."""
    with errors_in_one_line():
        from hf_apar.checkpoints import DEFAULT_BASE
        from hf_apar.training.recipe import train as fine_tune

        metrics = fine_tune(
            answers, output, model=model or DEFAULT_BASE, rank=rank, learning_rate=learning_rate, token_rate=token_rate,
            epochs=epochs, max_steps=max_steps, max_length=max_length, accumulation=accumulation,
            structured_share=structured_share, unforked_share=unforked_share, max_repetition=max_repetition,
            max_forks=max_forks, min_ideal_ratio=min_ideal_ratio, min_elaborated=min_elaborated,
            held_out=held_out, fork_bias=fork_bias,
            repetition_penalty=repetition_penalty, save_steps=save_steps, eval_steps=eval_steps, bf16=bf16,
            compile=compile, seed=seed,
        )  # fmt: skip
    for name, value in metrics.items():
        typer.echo(f"{name:>24} {value:.4f}")


@app.command("train-medusa")
def train_medusa(
    answers: Annotated[
        Path, typer.Argument(help="Prompts and responses, or what `extract` wrote.", exists=True, dir_okay=False)
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
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 50,
    eval_steps: Annotated[int, typer.Option(min=1, help="Steps between two evaluations.")] = 250,
    seed: SeedOption = 0,
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Teach Medusa heads to guess what a model that can fork writes next. Goes on from a checkpoint found in OUTPUT."""
    with errors_in_one_line():
        from hf_apar.training.medusa import train_medusa as learn

        loaded, tokenizer = load(model, dtype)
        metrics = learn(
            loaded, tokenizer, answers, output, start=start, length=length, inner_size=inner_size,
            draft_vocabulary=draft_vocabulary, learning_rate=learning_rate, epochs=epochs, max_steps=max_steps,
            max_length=max_length, save_steps=save_steps, eval_steps=eval_steps, seed=seed,
        )  # fmt: skip
    typer.echo(json.dumps(metrics, indent=1))


@app.command()
def recipe(
    output: Annotated[Path, typer.Option(help="Folder for all that is made; the adapter lies in its `adapter`.")],
    prompts: Annotated[str, typer.Option(help="JSON Lines of prompts; - for the package's templates alone.")] = "-",
    templates: Annotated[int, typer.Option(min=0, help="Add so many prompts from the package's own templates.")] = 3484,
    opened_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the prompts without an opening whose answers must hold a list.")
    ] = 0.5,
    model: ModelOption = None,
    engine: Annotated[Engine, typer.Option(help="What answers the prompts.")] = Engine.transformers,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are dropped.")] = 384,
    max_whole_tokens: MaxWholeTokensOption = None,
    max_items: MaxItemsOption = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Of the answers' sampling, 1 for none; small models loop without one.")
    ] = 1.0,
    max_depth: MaxDepthOption = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes that extract.")] = 1,
    structured_share: StructuredShareOption = 0.67,
    unforked_share: UnforkedShareOption = 0.15,
    max_repetition: MaxRepetitionOption = 0.1,
    max_forks: MaxForksOption = None,
    min_ideal_ratio: MinIdealRatioOption = 1.0,
    min_elaborated: MinElaboratedOption = 0.0,
    epochs: Annotated[float, typer.Option(help="Passes over the answers.")] = 2.0,
    max_steps: Annotated[int, typer.Option(help="Steps, in place of epochs; -1 for none.")] = -1,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row; several answers share one.")] = 1024,
    heads: Annotated[bool, typer.Option("--heads/--no-heads", help="Train Medusa heads too.")] = True,
    decoding_penalty: PenaltyOption = 1.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 where it is safe.")] = False,
    compile: CompileOption = False,
    seed: SeedOption = 0,
) -> None:
    """From a chat model to one that forks: distill, extract, train, train-medusa, evaluate; goes on where it stopped."""
    output.mkdir(parents=True, exist_ok=True)
    answers, trees, adapter = output / "answers.jsonl", output / "trees.jsonl", output / "adapter"
    dtype = Dtype.bfloat16 if bf16 else Dtype.float32
    _stage(1, "the model answers prompts in its own words")
    distill(
        prompts, answers, model=model, batch_size=batch_size, max_new_tokens=max_new_tokens,
        max_whole_tokens=max_whole_tokens, max_items=max_items, templates=templates, opened_share=opened_share,
        repetition_penalty=repetition_penalty, engine=engine, seed=seed, dtype=dtype,
    )  # fmt: skip
    _stage(2, "trees are found in the answers")
    if not trees.exists() or trees.stat().st_mtime < answers.stat().st_mtime:
        extract(answers, trees, workers=workers, max_depth=max_depth)
    _stage(3, "the model learns where to fork")
    if not (adapter / "metrics.json").exists():
        train(
            trees, adapter, model=model, epochs=epochs, max_steps=max_steps, max_length=max_length,
            structured_share=structured_share, unforked_share=unforked_share, max_repetition=max_repetition,
            max_forks=max_forks, min_ideal_ratio=min_ideal_ratio, min_elaborated=min_elaborated,
            repetition_penalty=decoding_penalty, bf16=bf16, compile=compile, seed=seed,
        )  # fmt: skip
    if heads and not (adapter / "medusa.safetensors").exists():
        _stage(4, "heads learn what it writes next")
        train_medusa(
            trees, adapter, model=str(adapter), epochs=epochs, max_steps=max_steps, max_length=max_length, seed=seed,
            dtype=dtype,
        )  # fmt: skip
    if not (adapter / "evaluation.json").exists():
        _stage(5, "it answers prompts that it has not seen")
        evaluate(str(adapter), None, None, output=adapter / "evaluation.json", dtype=dtype)
    typer.echo(f'done: hf-apar generate --model {adapter} "..."')


def _stage(number: int, what: str) -> None:
    typer.secho(f"{number}. {what}", bold=True, err=True)


def _load_base(name: str | None, dtype: Dtype) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load any model, without APAR, and its tokenizer."""
    import torch

    from hf_apar.checkpoints import DEFAULT_BASE, load_base

    with quietly():
        return load_base(name or DEFAULT_BASE, dtype=getattr(torch, dtype.value))


@contextmanager
def _sampler(
    name: str | None, dtype: Dtype, engine: Engine, batch_size: int, repetition_penalty: float, seed: int
) -> "Iterator[tuple[Sampler, PreTrainedTokenizerBase]]":
    """Load what answers the prompts of ``distill``."""
    import torch

    from hf_apar.data.samplers import TransformersSampler, VllmSampler

    loaded, tokenizer = _load_base(name, dtype)
    if engine is Engine.transformers:
        torch.manual_seed(seed)
        yield TransformersSampler(loaded, tokenizer, repetition_penalty=repetition_penalty), tokenizer
        return
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # on few cores a second process only competes
    from vllm import LLM

    with TemporaryDirectory() as folder:  # vLLM reads no GGUF file, and no adapter with new tokens
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        llm = LLM(
            folder, dtype=dtype.value, max_num_seqs=min(batch_size, 128), block_size=32, max_model_len=2048, seed=seed,
            gpu_memory_utilization=0.7,  # of the memory that is free for it: on CPUs the default leaves too little to others
        )  # fmt: skip
        yield VllmSampler(llm, repetition_penalty=repetition_penalty), tokenizer


def _read_questions(path: Path) -> "list[Question]":
    from hf_apar.data.distill import Question

    questions = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                questions.append(Question(str(record["prompt"]), str(record.get("opening", ""))))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f'{path}, line {number}: wanted {{"prompt": "..."}}, got {line.strip()[:80]}') from error
    return questions


def _opened(questions: "list[Question]", share: float, seed: int) -> "list[Question]":
    from hf_apar.data.prompts import open_lists

    return open_lists(questions, share, seed=seed)


def _template_questions(count: int, seed: int) -> "list[Question]":
    from hf_apar.data.prompts import template_questions

    try:
        return template_questions(count, seed=seed)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--templates") from error


def _follow(steps: Iterator[int], *, total: int) -> None:
    """Draw a progress bar; each step is the count of what is done."""
    with progress() as show:
        for done in steps:
            show(done, total)
