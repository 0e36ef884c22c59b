"""The command that tells before any training what threads could save: probe."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_apar.cli.common import (
    Dtype,
    DtypeOption,
    TemplateArgumentsOption,
    app,
    known_model,
    say,
    template_arguments,
)
from hf_apar.cli.data import follow
from hf_apar.cli.options import with_settings
from hf_apar.cli.writing import TextWriter
from hf_apar.data.described import setting
from hf_apar.data.settings import Loading, Sampling
from hf_apar.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_apar.probing.report import ProbeReport, Unit
    from hf_apar.probing.step_times import StepTimes


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Which answers are probed, and how a model writes them."""

    sample: int = setting(100, "Prompts, or answers, that are drawn.", least=1)
    seed: int = setting(0, "Seed of whatever is drawn at random.", least=0, most=2**32 - 1)
    max_new_tokens: int = setting(512, "Longer answers are cut.", least=1)
    temperature: float = setting(0.0, "Of sampling; at 0 the likeliest token is taken.", least=0)
    batch_size: int = setting(8, "Prompts that are answered at once, and kept together.", least=1, free=True)


@app.command("probe")
@with_settings
def probe_command(
    how: Sample,
    source: Annotated[
        str | None, typer.Argument(help="Prompts or chats: a file, or a suite of the package's; default: its own prompts.")
    ] = None,
    asked: Annotated[
        str | None, typer.Option("--model", help="Folder or Hub name of any chat model; none: the chats' own answers.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Ask the model behind this server's API, such as http://localhost:8000/v1.")
    ] = None,
    key_variable: Annotated[
        str | None, typer.Option(help="Environment variable with the server's key; none is sent without.")
    ] = None,
    chat_template_kwargs: TemplateArgumentsOption = None,
    output: Annotated[
        Path, typer.Option(help="Folder for answers.jsonl, probe.json and probe.html.", file_okay=False)
    ] = Path("probe"),
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object and nothing else.")] = False,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Before any training: how many answers come in parts, and what threads could save. Goes on where it stopped."""
    if asked is None and (base_url is not None or source is None):
        raise ConfigurationError("nobody is named to answer; give --model, or a file of chats that have answers")
    if key_variable is not None and base_url is None:
        raise ConfigurationError("--key-variable is for a server; name it with --base-url")
    if asked is None:
        report = _of_chats(str(source), how)
    else:
        run = _Asking(source or "own", asked, how, output, template_arguments(chat_template_kwargs))
        report = run.of_model(dtype) if base_url is None else run.of_server(base_url, key_variable)
    _write(report, output)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        from hf_apar.cli.probe_view import show_probe

        show_probe(report)
    say(f"all of it is in {output / 'probe.html'} and {output / 'probe.json'}")


def _of_chats(source: str, how: Sample) -> "ProbeReport":
    from hf_apar.probing.answers import answers_of_chats
    from hf_apar.probing.probed import probed
    from hf_apar.probing.report import ProbeReport

    path = Path(source)
    if not path.exists():
        raise ConfigurationError(f"there is no file {source}; give one of chats, or --model to answer the package's prompts")
    found = answers_of_chats(path, sample=how.sample, seed=how.seed)
    made_with = {"sample": how.sample, "seed": how.seed}
    return ProbeReport(answers=[probed(one) for one in found], unit="words", source=source, made_with=made_with)


class _Asking:
    """Prompts that are put to a model, and the answers that it gives, kept in ``output``."""

    def __init__(
        self, source: str, name: str, how: Sample, output: Path, chat_template_kwargs: dict[str, object] | None
    ) -> None:
        from hf_apar.evaluation.suites import suite_named

        self.source, self.name, self.how, self.chat_template_kwargs = source, name, how, chat_template_kwargs
        self.prompts = suite_named(source, sample=how.sample, seed=how.seed)
        output.mkdir(parents=True, exist_ok=True)
        self.answers = output / "answers.jsonl"

    def of_model(self, dtype: Dtype) -> "ProbeReport":
        """Ask a model that is loaded here, and time its steps."""
        from hf_apar.data.distillation.samplers import TransformersSampler
        from hf_apar.probing.answers import ask_model
        from hf_apar.text.encoding import encode_text

        how = Sampling(batch_size=self.how.batch_size, temperature=self.how.temperature)
        writer = TextWriter(known_model(self.name), how, Loading(), dtype, self.how.seed, self.chat_template_kwargs)
        with writer.loaded() as (sampler, tokenizer):
            assert isinstance(sampler, TransformersSampler)
            _refuse_tuned(self.name, sampler.model)
            steps = ask_model(
                replace(sampler, straggler_share=0.0), tokenizer, self.prompts, self.answers,
                batch_size=self.how.batch_size, max_new_tokens=self.how.max_new_tokens, made_with=str(writer),
                chat_template_kwargs=self.chat_template_kwargs,
            )  # fmt: skip
            follow(steps, total=len(self.prompts))
            report = self._report("tokens", lambda text: len(encode_text(tokenizer, text)), {"dtype": dtype})
            return replace(report, times=self._times(report, sampler.model, tokenizer)) if report.forking else report

    def of_server(self, url: str, key_variable: str | None) -> "ProbeReport":
        """Ask a model behind a server."""
        from hf_apar.data.extraction.cues import count_words
        from hf_apar.evaluation.chat_server import ChatServer
        from hf_apar.probing.served import ask_server

        parameters: dict[str, object] = {"temperature": self.how.temperature, "max_tokens": self.how.max_new_tokens}
        if self.how.temperature:
            parameters["seed"] = self.how.seed
        if self.chat_template_kwargs is not None:
            parameters["chat_template_kwargs"] = self.chat_template_kwargs
        where = ChatServer(
            url=url, model=self.name, key_variable=key_variable, parameters=parameters, concurrency=self.how.batch_size
        )
        follow(ask_server(where, self.prompts, self.answers), total=len(self.prompts))
        return self._report("words", count_words, {"url": url})

    def _report(self, unit: "Unit", length: Callable[[str], int], made_with: Mapping[str, object]) -> "ProbeReport":
        from hf_apar.data.distillation.batches import BatchReport
        from hf_apar.probing.answers import read_asked
        from hf_apar.probing.probed import probed
        from hf_apar.probing.report import ProbeReport

        dropped = BatchReport.of(self.answers).dropped
        answers = [probed(one, length) for one in read_asked(self.answers)]
        if not answers:
            ((reason, count),) = dropped.most_common(1)
            raise DataError(f"none of {len(self.prompts)} prompts was answered; of {count}: {reason}")
        more = {**made_with, "chat_template_kwargs": self.chat_template_kwargs}
        return ProbeReport(
            answers=answers, unit=unit, source=self.source, model=self.name, made_with=asdict(self.how) | more,
            left_out=dropped,
        )  # fmt: skip

    def _times(self, report: "ProbeReport", model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> "StepTimes":
        """Time steps in the middle of an answer of the usual length."""
        from hf_apar.probing.step_times import measure_steps
        from hf_apar.text.chat import encode_chat
        from hf_apar.text.encoding import encode_answer

        answer = report.typical.answer
        (prompt,) = [prompt for prompt in self.prompts if prompt.key == answer.key]
        ids = encode_chat(tokenizer, prompt.messages, chat_template_kwargs=self.chat_template_kwargs)
        ids += encode_answer(tokenizer, ids, answer.response[: len(answer.response) // 2])
        say("timing steps of one token and of several ...")
        return measure_steps(model, ids, report.usual_threads)


def _refuse_tuned(name: str, model: "PreTrainedModel") -> None:
    from hf_apar.tokens import checkpoint_config

    if checkpoint_config(model).control_ids is not None:
        raise ConfigurationError(
            f"{name} can fork already, and a probe is of one that cannot; hf-apar evaluate --output DIR --model {name}"
        )


def _write(report: "ProbeReport", output: Path) -> None:
    from hf_apar.probing.page import page

    output.mkdir(parents=True, exist_ok=True)
    record = json.dumps(report.to_dict(), indent=1, ensure_ascii=False)
    (output / "probe.json").write_text(record + "\n", encoding="utf-8")
    (output / "probe.html").write_text(page(report), encoding="utf-8")
