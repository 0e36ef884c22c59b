"""Commands that make what is trained on: distill, elaborate, extract."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_apar.cli.common import (
    Dtype,
    DtypeOption,
    ModelOption,
    SeedOption,
    TemplateArgumentsOption,
    app,
    one_process,
    progress,
    template_arguments,
)
from hf_apar.cli.options import with_settings
from hf_apar.cli.writing import TextWriter
from hf_apar.data.settings import AnswerLimits, Elaboration, Loading, PromptChoice, Sampling, TreeLimits
from hf_apar.errors import ConfigurationError, DataError
from hf_apar.processes import process_count, process_number

if TYPE_CHECKING:
    from hf_apar.data.convert import ExtractionReport
    from hf_apar.data.distillation.distill import Question
    from hf_apar.data.records.rejections import Rejections

AnswersOutput = Annotated[Path, typer.Argument(help="JSON Lines that the answers are appended to.", dir_okay=False)]


@app.command("distill")
@with_settings
def distill_command(
    prompts: Annotated[str, typer.Argument(help="JSON Lines: `prompt`, and `opening` if wanted; - for none.")],
    output: AnswersOutput,
    asking: PromptChoice,
    limits: AnswerLimits,
    sampling: Sampling,
    loading: Loading,
    model: ModelOption = None,
    chat_template_kwargs: TemplateArgumentsOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Let a model answer prompts in its own words: the text for `train`. Goes on where it stopped."""
    writer = TextWriter(model, sampling, loading, dtype, seed, template_arguments(chat_template_kwargs))
    answer_prompts(writer, None if prompts == "-" else Path(prompts), output, asking, limits)


@app.command("elaborate")
@with_settings
def elaborate_command(
    answers: Annotated[Path, typer.Argument(help="What `distill` wrote.", exists=True, dir_okay=False)],
    output: AnswersOutput,
    elaboration: Elaboration,
    sampling: Sampling,
    loading: Loading,
    model: ModelOption = None,
    chat_template_kwargs: TemplateArgumentsOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Let a model go on with the short details of its ANSWERS, and close its lists. Goes on where it stopped."""
    writer = TextWriter(model, sampling, loading, dtype, seed, template_arguments(chat_template_kwargs))
    elaborate_answers(writer, answers, output, elaboration)


@app.command("extract")
@with_settings
def extract_command(
    source: Annotated[Path, typer.Argument(help="Chats: JSON Lines or array, Parquet, folder of `datasets`.", exists=True)],
    output: Annotated[Path, typer.Argument(help="JSON Lines, or Parquet if it ends so.", dir_okay=False)],
    limits: TreeLimits,
) -> None:
    """Find where the answers of chats fork, and report what keeps the others whole. Bad records are written aside."""
    one_process("hf-apar extract", "start it without a launcher, with --workers N for several")
    extract_trees(source, output, limits)


def answer_prompts(
    writer: TextWriter, prompts: Path | None, output: Path, asking: PromptChoice, limits: AnswerLimits
) -> None:
    """Let ``writer`` answer the prompts of a file and the package's own, and say what was dropped."""
    from hf_apar.data.distillation.distill import distill
    from hf_apar.data.distillation.questions import open_lists

    questions = [] if prompts is None else _read_questions(prompts, _aside(output))
    questions = open_lists(questions, asking.opened_share, seed=writer.seed)
    questions += template_questions_of(asking, writer.seed)
    if not questions:
        raise DataError("there are no prompts; name a file of them, or ask for some with --templates N")
    with writer.loaded() as (sample, tokenizer):
        steps = distill(
            sample, tokenizer, questions, output, batch_size=writer.sampling.batch_size, made_with=str(writer),
            chat_template_kwargs=writer.chat_template_kwargs, **asdict(limits),
        )  # fmt: skip
        follow(steps, total=len(questions))
    _tell_dropped(output, len(questions))


def elaborate_answers(writer: TextWriter, answers: Path, output: Path, elaboration: Elaboration) -> None:
    """Let ``writer`` go on with the details of its ``answers``."""
    from hf_apar.data.distillation.distill import read_answers
    from hf_apar.data.distillation.elaborate import elaborate
    from hf_apar.data.records.rejections import Rejections

    if not elaboration.min_detail_tokens:
        raise ConfigurationError("min_detail_tokens is 0, so that nothing is elaborated; give 1 or more")
    rejected = Rejections(answers, _aside(output))
    given = read_answers(answers, rejected)
    _tell_rejected(rejected)
    with writer.loaded() as (sample, tokenizer):
        steps = elaborate(
            sample, tokenizer, given, output, batch_size=writer.sampling.batch_size, made_with=str(writer),
            chat_template_kwargs=writer.chat_template_kwargs, **asdict(elaboration),
        )  # fmt: skip
        follow(steps, total=len(given))


def extract_trees(source: Path, output: Path, limits: TreeLimits) -> None:
    """Write the trees of the chats in ``source``, and say what came of them."""
    from hf_apar.data.convert import extract_file

    with progress() as show:
        report = extract_file(source, output, on_progress=show, **asdict(limits))
    _tell_extracted(report)
    if report.rejected:
        typer.echo(f"what was rejected, with line and reason: {output}.rejected.jsonl")
    if report.unread:
        raise DataError(f"{source} is not read to its end, see {output}.rejected.jsonl; what came before is written")


def _tell_extracted(report: "ExtractionReport") -> None:
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


def _aside(output: Path) -> Path | None:
    if process_number() > 0:
        return None  # the first one writes what all of them read
    return output.with_name(output.name + ".rejected.jsonl")


def _read_questions(path: Path, aside: Path | None) -> "list[Question]":
    from hf_apar.data.distillation.distill import Question
    from hf_apar.data.records.chats import check_letters
    from hf_apar.data.records.files import usable
    from hf_apar.data.records.rejections import Rejections

    def question(record: object, _: int) -> Question:
        fields = record if isinstance(record, dict) else {}
        prompt, opening = fields.get("prompt"), fields.get("opening") or ""
        if not isinstance(prompt, str) or not isinstance(opening, str):
            raise DataError("the record has no text under `prompt`, or something else under `opening`")
        if not prompt.strip():
            raise DataError("the record's `prompt` is empty")
        check_letters(prompt, opening)
        if unasked := _unasked(fields):
            raise DataError(f"the record has {unasked} beside `prompt`, which would not be asked; write it into that")
        return Question(prompt, opening)

    rejected = Rejections(path, aside)
    questions = usable(path, question, '{"prompt": "..."}, JSON Lines or one array', rejected)
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
    if rejected and process_number() == 0:
        typer.echo(f"hf-apar: {rejected}", err=True)


def _tell_dropped(answers: Path, asked: int) -> None:
    """Say how many answers there are, and why the others were dropped; of several processes the last to end says it.

    Raises:
        DataError: if there are none.
    """
    from hf_apar.data.distillation.batches import BatchReport

    report = BatchReport.of(answers)
    if process_count() > 1 and report.asked < asked:
        return
    typer.echo(f"of {report.asked} answers {report.answers} kept, {report.dropped.total()} dropped")
    for reason, count in report.dropped.most_common():
        typer.echo(f"{'dropped':>12} {count:8d}  {reason}")
    if report.dropped and not report.answers:
        ((reason, count),) = report.dropped.most_common(1)
        raise DataError(f"none of {report.asked} answers can be kept; of {count}: {reason}")


def template_questions_of(asking: PromptChoice, seed: int) -> "list[Question]":
    """Return those of the package's own prompts that are asked for.

    Raises:
        ConfigurationError: if there are not so many.
    """
    from hf_apar.data.distillation.questions import template_questions

    try:
        return template_questions(
            asking.templates, opened_share=asking.templates_opened, seed=seed, languages=asking.languages
        )
    except ValueError as error:
        raise ConfigurationError(f"templates is {asking.templates}: {error}") from error


def follow(steps: Iterator[int], *, total: int) -> None:
    """Draw a progress bar; each step is the count of what is done."""
    with progress() as show:
        for done in steps:
            show(done, total)
