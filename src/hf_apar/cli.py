"""The command line, ``hf-apar`` (needs the extra ``cli``).

What is slow to import is imported inside the commands, so that ``--help`` is quick.
"""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from hf_apar.errors import AparError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_apar.comparison import AparResult, Result
    from hf_apar.data.distill import Question, Sampler
    from hf_apar.speculation.proposer import Proposer

app = typer.Typer(
    name="hf-apar",
    help="Auto-parallel auto-regressive decoding: one answer, written by many threads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,  # an error is one line, not a box
)


_LOOKED_UP = 5  # tokens that `generate` looks up for a draft


class Engine(StrEnum):
    """What runs the model that ``distill`` asks."""

    transformers = "transformers"
    vllm = "vllm"


class Dtype(StrEnum):
    """Number formats that a model is loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


ModelOption = Annotated[
    str | None, typer.Option("--model", help="Folder or hub id of a model or adapter; default: the one that ships.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Number format of the weights.")]
SeedOption = Annotated[int, typer.Option(help="Seed of whatever is drawn at random.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The question, as one user turn; - reads it from the standard input.")],
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Bound on all tokens of all threads together.")] = 512,
    max_threads: Annotated[int | None, typer.Option(min=1, help="Threads that may live at once.")] = None,
    fork_bias: Annotated[float | None, typer.Option(help="Added to the logit of [Fork]: more forks, or fewer.")] = None,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Sample, instead of the likeliest token.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Temperature; implies --do-sample.")] = None,
    seed: SeedOption = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Decode plainly first, and show both times.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Decode plainly only, without APAR.")] = False,
    heads: Annotated[
        Path | None, typer.Option(help="Folder of Medusa heads; default: those that lie with the model, if any.")
    ] = None,
    no_heads: Annotated[bool, typer.Option("--no-heads", help="Write without Medusa heads.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object and nothing else.")] = False,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Answer PROMPT with many threads, and watch them write."""
    if plain and compare:
        raise typer.BadParameter("--plain leaves APAR out and --compare needs it; give one of them")
    with _errors_in_one_line():
        from hf_apar.comparison import Decoder
        from hf_apar.config import AparConfig

        loaded, tokenizer = _load(model, dtype)
        config = AparConfig(max_threads=max_threads, fork_bias=fork_bias)
        options: dict[str, object] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample}
        if temperature is not None:
            options |= {"do_sample": True, "temperature": temperature}
        text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
        proposer = None if no_heads else _heads(model, heads)
        decoder = Decoder(loaded, tokenizer, _encode(tokenizer, text), options, seed, not as_json, proposer)
        if compare:
            decoder.warm_up(config)
            _title("Plain decoding", decoder.show)
        one = decoder.plain() if plain or compare else None
        if compare:
            _title("APAR", decoder.show)
        many = None if plain else decoder.apar(config)
    if as_json:
        typer.echo(json.dumps(_record(text, one, many), ensure_ascii=False))
    else:
        _summarise(one, many)


@app.command()
def distill(
    prompts: Annotated[str, typer.Argument(help="JSON Lines: `prompt`, and `opening` if wanted; - for none.")],
    output: Annotated[Path, typer.Argument(help="JSON Lines that the answers are appended to.", dir_okay=False)],
    model: ModelOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are dropped.")] = 384,
    templates: Annotated[int, typer.Option(min=0, help="Add so many prompts from the package's own templates.")] = 0,
    opened_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the prompts without an opening whose answers must hold a list.")
    ] = 0.0,
    engine: Annotated[Engine, typer.Option(help="What runs the model; vllm is faster, and an environment of its own.")] = (
        Engine.transformers
    ),
    seed: SeedOption = 0,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Let a model answer prompts in its own words: the text for `train`. Goes on where it stopped."""
    with _errors_in_one_line():
        questions = [] if prompts == "-" else _read_questions(Path(prompts))
        questions = _opened(questions, opened_share, seed) + _template_questions(templates, seed)
        if not questions:
            raise DataError("there are no prompts; name a file of them, or ask for some with --templates N")
        from hf_apar.data.distill import distill as answer

        with _sampler(model, dtype, engine, batch_size, seed) as (sample, tokenizer):
            steps = answer(sample, tokenizer, questions, output, batch_size=batch_size, max_new_tokens=max_new_tokens)
            _follow(steps, total=len(questions))


@app.command()
def extract(
    source: Annotated[Path, typer.Argument(help="Chats: JSON Lines, Parquet, or a folder of `datasets`.", exists=True)],
    output: Annotated[Path, typer.Argument(help="JSON Lines, or Parquet if it ends so.", dir_okay=False)],
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    max_depth: Annotated[int, typer.Option(min=1, help="Deepest thread; the root has depth 1.")] = 3,
    max_forks: Annotated[int, typer.Option(min=1, help="An answer that would fork more often stays whole.")] = 16,
    without: Annotated[list[str] | None, typer.Option(help="Switch off the rule of this name; may be given again.")] = None,
) -> None:
    """Find where the answers of chats fork, and report what keeps the others whole. Bad records are written aside."""
    with _errors_in_one_line():
        from hf_apar.data.convert import extract_file

        with _progress() as show:
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
    structured_share: Annotated[float, typer.Option(min=0, max=1, help="Share of the answers that fork.")] = 0.67,
    unforked_share: Annotated[
        float, typer.Option(min=0, max=1, help="Of these so many come once more without forks, for plain decoding.")
    ] = 0.15,
    max_repetition: Annotated[
        float, typer.Option(min=0, max=1, help="Leave out answers that repeat more of themselves; 1 keeps all.")
    ] = 0.1,
    held_out: Annotated[float, typer.Option(min=0, max=1, help="Share of the answers kept for the metrics.")] = 0.05,
    fork_bias: Annotated[float, typer.Option(help="The checkpoint's default of generate's --fork-bias.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="The checkpoint's default of decoding; 1 for none.")] = 1.0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 10,
    eval_steps: Annotated[int, typer.Option(min=1, help="Steps between two evaluations.")] = 100,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 where it is safe.")] = False,
    seed: SeedOption = 0,
) -> None:
    """Teach a model where to fork, from ANSWERS to an adapter in OUTPUT. Goes on from a checkpoint found there."""
    with _errors_in_one_line():
        from hf_apar.checkpoints import DEFAULT_BASE
        from hf_apar.training.recipe import train as fine_tune

        metrics = fine_tune(
            answers, output, model=model or DEFAULT_BASE, rank=rank, learning_rate=learning_rate, token_rate=token_rate,
            epochs=epochs, max_steps=max_steps, max_length=max_length, accumulation=accumulation,
            structured_share=structured_share, unforked_share=unforked_share, max_repetition=max_repetition,
            held_out=held_out, fork_bias=fork_bias,
            repetition_penalty=repetition_penalty, save_steps=save_steps, eval_steps=eval_steps, bf16=bf16, seed=seed,
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
    with _errors_in_one_line():
        from hf_apar.training.medusa import train_medusa as learn

        loaded, tokenizer = _load(model, dtype)
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
    templates: Annotated[int, typer.Option(min=0, help="Add so many prompts from the package's own templates.")] = 1388,
    opened_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the prompts without an opening whose answers must hold a list.")
    ] = 0.5,
    model: ModelOption = None,
    engine: Annotated[Engine, typer.Option(help="What answers the prompts.")] = Engine.transformers,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are dropped.")] = 384,
    max_forks: Annotated[int, typer.Option(min=1, help="An answer that would fork more often stays whole.")] = 9,
    workers: Annotated[int, typer.Option(min=1, help="Processes that extract.")] = 1,
    epochs: Annotated[float, typer.Option(help="Passes over the answers.")] = 2.0,
    max_steps: Annotated[int, typer.Option(help="Steps, in place of epochs; -1 for none.")] = -1,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row; several answers share one.")] = 1024,
    heads: Annotated[bool, typer.Option("--heads/--no-heads", help="Train Medusa heads too.")] = True,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 where it is safe.")] = False,
    seed: SeedOption = 0,
) -> None:
    """From a chat model to one that forks: `distill`, `extract`, `train`, `train-medusa`, each going on where it stopped."""
    output.mkdir(parents=True, exist_ok=True)
    answers, trees, adapter = output / "answers.jsonl", output / "trees.jsonl", output / "adapter"
    dtype = Dtype.bfloat16 if bf16 else Dtype.float32
    _stage(1, "the model answers prompts in its own words")
    distill(
        prompts, answers, model=model, batch_size=batch_size, max_new_tokens=max_new_tokens, templates=templates,
        opened_share=opened_share, engine=engine, seed=seed, dtype=dtype,
    )  # fmt: skip
    _stage(2, "trees are found in the answers")
    if not trees.exists() or trees.stat().st_mtime < answers.stat().st_mtime:
        extract(answers, trees, workers=workers, max_forks=max_forks)
    _stage(3, "the model learns where to fork")
    if not (adapter / "metrics.json").exists():
        train(trees, adapter, model=model, epochs=epochs, max_steps=max_steps, max_length=max_length, bf16=bf16, seed=seed)
    if heads and not (adapter / "medusa.safetensors").exists():
        _stage(4, "heads learn what it writes next")
        train_medusa(
            trees, adapter, model=str(adapter), epochs=epochs, max_steps=max_steps, max_length=max_length, seed=seed,
            dtype=dtype,
        )  # fmt: skip
    typer.echo(f'done: hf-apar generate --model {adapter} "..."')


def _stage(number: int, what: str) -> None:
    typer.secho(f"{number}. {what}", bold=True, err=True)


@app.command()
def merge(
    output: Annotated[Path, typer.Argument(help="A new folder.", file_okay=False)],
    model: ModelOption = None,
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Write an adapter and its base as one ordinary checkpoint in OUTPUT, which loads anywhere; its heads go along."""
    with _errors_in_one_line():
        from hf_apar.checkpoints import DEFAULT_ADAPTER
        from hf_apar.hub import save_merged
        from hf_apar.speculation.medusa import HEADS_FILE

        loaded, tokenizer = _load(model, dtype)
        save_merged(loaded, tokenizer, output)
        heads = (DEFAULT_ADAPTER if model is None else Path(model)) / HEADS_FILE
        if heads.is_file():
            shutil.copy(heads, output)
    typer.echo(f"{output} decodes plainly with AutoModelForCausalLM, and with threads through hf_apar")


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
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
def _quietly() -> Iterator[None]:
    """Load without progress bars; that of GGUF files ignores the switch of transformers, so it is redirected."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with redirect_stderr(io.StringIO()):
        yield


def _load(name: str | None, dtype: Dtype) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a model that can fork, and its tokenizer."""
    import torch
    from transformers import AutoTokenizer

    import hf_apar
    from hf_apar.checkpoints import load_default_model

    torch_dtype = getattr(torch, dtype.value)
    with _quietly():
        if name is None:
            return load_default_model(dtype=torch_dtype)
        model = hf_apar.AparModelForCausalLM.from_pretrained(name, dtype=torch_dtype)
        return model, AutoTokenizer.from_pretrained(name)


def _heads(model: str | None, folder: Path | None) -> "Proposer | None":
    """Return what makes drafts: heads in ``folder``, or those that lie with the model, and prompt lookup beside them."""
    from hf_apar.checkpoints import DEFAULT_ADAPTER
    from hf_apar.speculation.lookup import PromptLookup
    from hf_apar.speculation.medusa import HEADS_FILE, MedusaDrafts, MedusaHeads
    from hf_apar.speculation.together import Together

    lies_with_model = DEFAULT_ADAPTER if model is None else Path(model)
    if folder is None and not (lies_with_model / HEADS_FILE).is_file():
        return None
    return Together(MedusaDrafts(MedusaHeads.load(folder or lies_with_model)), PromptLookup(_LOOKED_UP))


def _load_base(name: str | None, dtype: Dtype) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load any model, without APAR, and its tokenizer."""
    import torch

    from hf_apar.checkpoints import DEFAULT_BASE, load_base

    with _quietly():
        return load_base(name or DEFAULT_BASE, dtype=getattr(torch, dtype.value))


@contextmanager
def _sampler(
    name: str | None, dtype: Dtype, engine: Engine, batch_size: int, seed: int
) -> "Iterator[tuple[Sampler, PreTrainedTokenizerBase]]":
    """Load what answers the prompts of ``distill``."""
    import torch

    from hf_apar.data.distill import TransformersSampler, VllmSampler

    loaded, tokenizer = _load_base(name, dtype)
    if engine is Engine.transformers:
        torch.manual_seed(seed)
        yield TransformersSampler(loaded, tokenizer), tokenizer
        return
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # on few cores a second process only competes
    from vllm import LLM

    with TemporaryDirectory() as folder:  # vLLM reads no GGUF file, and no adapter with new tokens
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        llm = LLM(folder, dtype=dtype.value, max_num_seqs=min(batch_size, 128), block_size=32, max_model_len=2048, seed=seed)
        yield VllmSampler(llm), tokenizer


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return ``text`` as a user turn, or as it stands where the model is no chat model."""
    from hf_apar.chat import encode_chat

    if tokenizer.chat_template is None:
        return list(tokenizer.encode(text, split_special_tokens=True))
    return encode_chat(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)


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
    with _progress() as show:
        for done in steps:
            show(done, total)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Draw a progress bar on the standard error; what is yielded takes the count of what is done, and of all."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _record(prompt: str, one: "Result | None", many: "AparResult | None") -> dict[str, object]:
    """Return the JSON object: APAR's answer, or the plain one where it is the only one."""
    if many is None:
        assert one is not None
        return {"prompt": prompt, **asdict(one)}
    record: dict[str, object] = {"prompt": prompt, "text": many.text, "tokens": many.tokens, "seconds": many.seconds}
    record["stats"] = asdict(many.stats) | {"tokens_per_step": many.stats.tokens_per_step}
    record["tree"] = many.tree
    return record if one is None else record | {"plain": asdict(one)}


def _title(text: str, show: bool) -> None:
    if show:
        typer.secho(f"--- {text}", bold=True)


def _summarise(one: "Result | None", many: "AparResult | None") -> None:
    if many is not None:
        stats, threads = many.stats, len(many.tree["threads"])  # type: ignore[arg-type]
        typer.secho(
            f"\n{threads} threads, {stats.tokens} tokens in {stats.steps} steps ({stats.tokens_per_step:.2f} a step), "
            f"{many.seconds:.2f} s; peak KV cache {stats.peak_kv} slots, "
            f"{stats.peak_kv / stats.kv_if_sequential:.0%} of sequential",
            dim=True,
        )
    for name, result in (("plain", one), ("APAR", many)):
        if result is not None:
            speed = f"{result.tokens_per_second:7.1f} tokens/s"
            typer.echo(f"{name:>5}: {result.tokens:5d} tokens {result.seconds:8.2f} s {speed}")
    if one is not None and many is not None:
        typer.secho(
            f"APAR is {many.tokens_per_second / one.tokens_per_second:.2f} times as fast per token, "
            f"{one.seconds / many.seconds:.2f} times in all",
            bold=True,
        )
