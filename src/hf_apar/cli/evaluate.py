"""The command that judges a tuned model by what it writes: evaluate."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_apar.cli.common import (
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    TemplateArgumentsOption,
    adapter_config,
    app,
    counted,
    known_model,
    load,
    load_untuned,
    on_device,
    say,
    template_arguments,
)
from hf_apar.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_apar.training.figures import Judged


@app.command("evaluate")
def evaluate_command(
    model: ModelOption = None,
    fork_bias: Annotated[
        list[float] | None, typer.Option(help="In place of the checkpoint's; may be given again, to compare.")
    ] = None,
    repetition_penalty: Annotated[
        list[float] | None, typer.Option(help="In place of the checkpoint's; may be given again, to compare.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            callback=known_model,
            help="The model before its tuning: say how likely it finds the answers, and its own. An adapter is put on it.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Sampled tokens of an answer.")] = 512,
    output: Annotated[Path | None, typer.Option(help="JSON for the last figures and answers.", dir_okay=False)] = None,
    chat_template_kwargs: TemplateArgumentsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write a JSON object a line, one for each setting.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Answer 40 prompts that no recipe trains on: what forks, ends, loops, is kept by plain decoding, tokens per step."""
    judge = Judge(model, base, dtype, device, template_arguments(chat_template_kwargs), max_new_tokens, as_json)
    judge.compare(fork_bias or [None], repetition_penalty or [None], output)


class Judge:
    """Judges a model, and where ``base`` is given how likely the model before its tuning finds the answers."""

    def __init__(
        self,
        model: str | None,
        base: str | None,
        dtype: Dtype,
        device: str,
        chat_template_kwargs: dict[str, object] | None,
        max_new_tokens: int = 512,
        as_json: bool = False,
    ) -> None:
        loaded, self.tokenizer, judge = _load_both(model, base, dtype)
        self.model, self.base = on_device(loaded, device), None if judge is None else on_device(judge, device)
        self.told: dict[str, Any] = {"chat_template_kwargs": chat_template_kwargs}
        self.limit, self.as_json = max_new_tokens, as_json

    def compare(self, biases: Sequence[float | None], penalties: Sequence[float | None], output: Path | None = None) -> None:
        """Write the figures of each setting, and those of the last with its answers to ``output`` too."""
        from hf_apar.training.evaluation import evaluate, likelihoods, write_evaluation
        from hf_apar.training.figures import summary

        for penalty in penalties:
            own = self._own(penalty)
            for bias in biases:
                say(f"the model answers {_prompts()} prompts, in threads and plainly")
                judged = evaluate(
                    self.model, self.tokenizer, fork_bias=bias, repetition_penalty=penalty, max_new_tokens=self.limit,
                    **self.told,
                )  # fmt: skip
                figures = summary(judged)
                if self.base is not None:
                    figures |= likelihoods(judged, self.base, self.tokenizer, own, **self.told)
                _show({"fork_bias": bias, "repetition_penalty": penalty}, figures, judged, self.as_json)
                _warn_of_cuts(judged, self.limit)
                if output is not None:
                    write_evaluation(judged, figures, output)

    def _own(self, penalty: float | None) -> list[str]:
        """Return what the base answers with the ``penalty`` that the model has."""
        from hf_apar.training.evaluation import PROMPTS, plain_answers

        if self.base is None:
            return []
        assert self.model.generation_config is not None
        say(f"the base answers {_prompts()} prompts")
        return plain_answers(
            self.base, self.tokenizer, PROMPTS, max_new_tokens=self.limit,
            repetition_penalty=penalty or self.model.generation_config.repetition_penalty or 1.0, **self.told,
        )  # fmt: skip


def _prompts() -> int:
    from hf_apar.training.evaluation import PROMPTS

    return len(PROMPTS)


def _load_both(
    model: str | None, base: str | None, dtype: Dtype
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, PreTrainedModel | None]":
    """Load the model, put on ``base`` where it is an adapter that names another one, its tokenizer, and the base."""
    if base is None:
        return *load(model, dtype), None
    judge, own = load_untuned(base, dtype)
    config = adapter_config(model)
    moved = config is not None and json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path") != base
    if moved:
        from hf_apar.checkpoints.loading import load_tokenizer

        assert model is not None
        _check_vocabulary(base, own, load_tokenizer(model, base=base))
    loaded, tokenizer = load(model, dtype, base if moved else None)
    _check_vocabulary(base, own, tokenizer)
    return loaded, tokenizer, judge


def _check_vocabulary(name: str, base: "PreTrainedTokenizerBase", tuned: "PreTrainedTokenizerBase") -> None:
    """Refuse a base whose vocabulary is not that of the model before the control tokens came."""
    if not base.get_vocab().items() <= tuned.get_vocab().items():
        raise ConfigurationError(f"--base {name} has another vocabulary; name the model that the tuned one was made from")


def _show(
    settings: Mapping[str, float | None], figures: Mapping[str, float], judged: "Sequence[Judged]", as_json: bool
) -> None:
    """Write the figures of one setting: a line each with what it means, or one JSON object."""
    if as_json:
        cut = {"cut": sum(not one.ended for one in judged), "plain_cut": sum(not one.plain_ended for one in judged)}
        typer.echo(json.dumps({"settings": settings, "answers": len(judged), **cut, "figures": figures}))
        return
    if chosen := [f"{name} {value:g}" for name, value in settings.items() if value is not None]:
        typer.secho(", ".join(chosen), bold=True)
    from hf_apar.training.figures import FIGURES, LIKELIHOODS

    says = {name: figure.says for name, figure in FIGURES.items()} | LIKELIHOODS
    width = max(map(len, figures))
    for name, value in figures.items():
        typer.echo(f"{name:<{width}}  {value:6.3f}  {says[name]}")


def _warn_of_cuts(judged: "Sequence[Judged]", limit: int) -> None:
    """Say that the figures are worth nothing where the limit, and no model, ended the answers."""
    cut, plain = sum(not one.ended for one in judged), sum(not one.plain_ended for one in judged)
    if max(cut, plain) < len(judged) / 2:
        return
    say(
        f"{cut} of {len(judged)} answers and {plain} of the plain ones were cut at {counted(limit, 'token')}: they count as "
        "1 token per step, so these figures are no result; give --max-new-tokens more"
    )
