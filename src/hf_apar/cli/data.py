"""Commands that make what is trained on: distill, elaborate, extract."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from hf_apar.cli.common import (
    Dtype,
    DtypeOption,
    ModelOption,
    SeedOption,
    TemplateArgumentsOption,
    app,
    errors_in_one_line,
    load_base,
    on_device,
    progress,
    template_arguments,
)
from hf_apar.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_apar.data.distillation.distill import Question
    from hf_apar.data.distillation.samplers import TextSampler
    from hf_apar.data.records.rejections import Rejections


class Engine(StrEnum):
    """What runs the model that writes."""

    transformers = "transformers"
    vllm = "vllm"


MaxDepthOption = Annotated[int, typer.Option(min=1, help="Deepest thread; the root has depth 1.")]
MaxWholeTokensOption = Annotated[
    int | None, typer.Option(min=1, help="The same for prompts without an opening, whose answers mostly stay whole.")
]
MaxItemsOption = Annotated[
    int | None, typer.Option(min=2, help="Numbered lists end after so many items, or as many as they announce.")
]
SamplingPenaltyOption = Annotated[
    float, typer.Option("--repetition-penalty", help="Of the answers' sampling, 1 for none; small models loop without one.")
]
TemperatureOption = Annotated[
    float, typer.Option(min=0, help="Of the answers' sampling; at 0 the likeliest token is taken.")
]
MinDetailTokensOption = Annotated[int, typer.Option(min=1, help="A detail ends with the sentence that reaches this length.")]
TaperOption = Annotated[
    int, typer.Option(min=0, help="Each later detail may be so many tokens shorter; by a title's length all end together.")
]
ClosingOption = Annotated[bool, typer.Option("--closing/--no-closing", help="Let a sentence close a list.")]
EngineOption = Annotated[Engine, typer.Option(help="What runs the model; vllm is faster, and an environment of its own.")]


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
    temperature: TemperatureOption = 0.3,
    repetition_penalty: SamplingPenaltyOption = 1.0,
    engine: EngineOption = Engine.transformers,
    chat_template_kwargs: TemplateArgumentsOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Let a model answer prompts in its own words: the text for `train`. Goes on where it stopped."""
    with errors_in_one_line():
        variables = template_arguments(chat_template_kwargs)
        questions = [] if prompts == "-" else _read_questions(Path(prompts), _aside(output))
        questions = _opened(questions, opened_share, seed) + _template_questions(templates, seed)
        if not questions:
            raise DataError("there are no prompts; name a file of them, or ask for some with --templates N")
        from hf_apar.data.distillation.distill import distill as answer

        ready = _sampler(model, dtype, engine, batch_size, temperature, repetition_penalty, seed, variables)
        with ready as (sample, tokenizer, said):
            steps = answer(
                sample, tokenizer, questions, output, batch_size=batch_size, max_new_tokens=max_new_tokens,
                max_whole_tokens=max_whole_tokens, max_items=max_items,
                made_with=said, chat_template_kwargs=variables,
            )  # fmt: skip
            _follow(steps, total=len(questions))
        _tell_dropped(output)


@app.command()
def elaborate(
    answers: Annotated[Path, typer.Argument(help="What `distill` wrote.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Argument(help="JSON Lines that the answers are appended to.", dir_okay=False)],
    model: ModelOption = None,
    min_detail_tokens: MinDetailTokensOption = 40,
    taper: TaperOption = 0,
    closing: ClosingOption = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at once.")] = 64,
    temperature: TemperatureOption = 0.3,
    repetition_penalty: SamplingPenaltyOption = 1.0,
    engine: EngineOption = Engine.transformers,
    chat_template_kwargs: TemplateArgumentsOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Let a model go on with the short details of its ANSWERS, and close its lists. Goes on where it stopped."""
    with errors_in_one_line():
        from hf_apar.data.distillation.distill import read_answers
        from hf_apar.data.distillation.elaborate import elaborate as go_on
        from hf_apar.data.records.rejections import Rejections

        rejected = Rejections(answers, _aside(output))
        given = read_answers(answers, rejected)
        _tell_rejected(rejected)
        variables = template_arguments(chat_template_kwargs)
        ready = _sampler(model, dtype, engine, batch_size, temperature, repetition_penalty, seed, variables)
        with ready as (sample, tokenizer, said):
            steps = go_on(
                sample, tokenizer, given, output, min_detail_tokens=min_detail_tokens, taper=taper,
                closing=closing, batch_size=batch_size, made_with=said, chat_template_kwargs=variables,
            )  # fmt: skip
            _follow(steps, total=len(given))


@app.command()
def extract(
    source: Annotated[Path, typer.Argument(help="Chats: JSON Lines or array, Parquet, folder of `datasets`.", exists=True)],
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
    told = (
        ("left whole", report.refused), ("parts kept", report.kept), ("repaired", report.repaired),
        ("rejected", report.rejected),
    )  # fmt: skip
    for title, reasons in told:
        for reason, count in reasons.most_common():
            typer.echo(f"{title:>12} {count:8d}  {reason}")
    if report.rejected:
        typer.echo(f"what was rejected, with line and reason: {output}.rejected.jsonl")
    if report.unread:
        with errors_in_one_line():
            raise DataError(f"{source} is not read to its end, see {output}.rejected.jsonl; what came before is written")


@contextmanager
def _sampler(
    name: str | None,
    dtype: Dtype,
    engine: Engine,
    batch_size: int,
    temperature: float,
    repetition_penalty: float,
    seed: int,
    chat_template_kwargs: dict[str, object] | None,
) -> "Iterator[tuple[TextSampler, PreTrainedTokenizerBase, str]]":
    """Load what lets a model write, and say in words what it is."""
    import torch

    from hf_apar.checkpoints.loading import DEFAULT_BASE
    from hf_apar.checkpoints.readiness import check_model
    from hf_apar.data.distillation.samplers import TransformersSampler, VllmSampler

    loaded, tokenizer = load_base(name, dtype)
    check_model(loaded, tokenizer, token_rows=False, chat_template_kwargs=chat_template_kwargs)
    said = f"{name or DEFAULT_BASE} {engine} {dtype} {temperature} {repetition_penalty} {seed}"
    if engine is Engine.transformers:
        torch.manual_seed(seed)
        yield (
            TransformersSampler(on_device(loaded), tokenizer, temperature, repetition_penalty=repetition_penalty),
            tokenizer,
            said,
        )
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
        yield VllmSampler(llm, tokenizer, temperature, repetition_penalty=repetition_penalty), tokenizer, said


def _aside(output: Path) -> Path:
    return output.with_name(output.name + ".rejected.jsonl")


def _read_questions(path: Path, aside: Path) -> "list[Question]":
    from hf_apar.data.distillation.distill import Question
    from hf_apar.data.records.files import open_records, record_of
    from hf_apar.data.records.rejections import UNUSABLE, Rejected, Rejections

    questions, rejected = [], Rejections(path, aside)
    for number, row in open_records(path).rows:
        try:
            record = record_of(row)
            fields = record if isinstance(record, dict) else {}
            prompt, opening = fields.get("prompt"), fields.get("opening") or ""
            if not isinstance(prompt, str) or not isinstance(opening, str):
                raise DataError("the record has no text under `prompt`, or something else under `opening`")
            if unasked := _unasked(fields):
                raise DataError(f"the record has {unasked} beside `prompt`, which would not be asked; write it into that")
            questions.append(Question(prompt, opening))
        except UNUSABLE as error:
            rejected.add([Rejected.by(error, number, row)])
    if not questions:
        raise rejected.nothing_left('{"prompt": "..."}, JSON Lines or one array')
    _tell_rejected(rejected)
    return questions


def _unasked(fields: dict[str, object]) -> str:
    """Name what of a record says something to a model and is not asked, "" for nothing; messages may repeat the prompt."""
    for name in ("system", "system_prompt", "messages", "conversations", "tools", "history", "input"):
        match fields.get(name):
            case None | "" | []:
                pass
            case [{"content": text} | {"value": text}, *_] if text == fields["prompt"]:
                pass
            case _:
                return f"`{name}`"
    return ""


def _tell_rejected(rejected: "Rejections") -> None:
    if rejected:
        typer.echo(f"hf-apar: {rejected}", err=True)


def _tell_dropped(answers: Path) -> None:
    """Say how many answers there are, and why the others were dropped.

    Raises:
        DataError: if there are none.
    """
    from hf_apar.data.distillation.batches import BatchReport

    report = BatchReport.of(answers)
    typer.echo(f"of {report.asked} answers {report.answers} kept, {report.dropped.total()} dropped")
    for reason, count in report.dropped.most_common():
        typer.echo(f"{'dropped':>12} {count:8d}  {reason}")
    if report.dropped and not report.answers:
        ((reason, count),) = report.dropped.most_common(1)
        raise DataError(f"none of {report.asked} answers can be kept; of {count}: {reason}")


def _opened(questions: "list[Question]", share: float, seed: int) -> "list[Question]":
    from hf_apar.data.distillation.questions import open_lists

    return open_lists(questions, share, seed=seed)


def _template_questions(count: int, seed: int) -> "list[Question]":
    from hf_apar.data.distillation.questions import template_questions

    try:
        return template_questions(count, seed=seed)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--templates") from error


def _follow(steps: Iterator[int], *, total: int) -> None:
    """Draw a progress bar; each step is the count of what is done."""
    with progress() as show:
        for done in steps:
            show(done, total)
