"""The command that judges a tuned model by what it writes: evaluate."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_apar.cli.common import (
    Dtype,
    DtypeOption,
    ModelOption,
    TemplateArgumentsOption,
    app,
    errors_in_one_line,
    load,
    load_base,
    on_device,
    template_arguments,
)
from hf_apar.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@app.command()
def evaluate(
    model: ModelOption = None,
    fork_bias: Annotated[
        list[float] | None, typer.Option(help="In place of the checkpoint's; may be given again, to compare.")
    ] = None,
    repetition_penalty: Annotated[
        list[float] | None, typer.Option(help="In place of the checkpoint's; may be given again, to compare.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model before its tuning: say how likely it finds the answers, and its own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Sampled tokens of an answer.")] = 512,
    output: Annotated[Path | None, typer.Option(help="JSON for the last figures and answers.", dir_okay=False)] = None,
    chat_template_kwargs: TemplateArgumentsOption = None,
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Answer 40 prompts that no recipe trains on: what forks, ends, loops, is kept by plain decoding, tokens per step."""
    with errors_in_one_line():
        from hf_apar.training import evaluation

        variables = template_arguments(chat_template_kwargs)
        loaded, tokenizer = load(model, dtype)
        on_device(loaded)
        judge = None if base is None else _judge(base, tokenizer, dtype)
        biases: Sequence[float | None] = fork_bias or [None]
        penalties: Sequence[float | None] = repetition_penalty or [None]
        for penalty in penalties:
            own: list[str] = []
            if judge is not None:
                own = evaluation.plain_answers(
                    judge, tokenizer, evaluation.PROMPTS, max_new_tokens=max_new_tokens,
                    repetition_penalty=penalty or loaded.generation_config.repetition_penalty or 1.0,
                    chat_template_kwargs=variables,
                )  # fmt: skip
            for bias in biases:
                judged = evaluation.evaluate(
                    loaded, tokenizer, fork_bias=bias, repetition_penalty=penalty, max_new_tokens=max_new_tokens,
                    chat_template_kwargs=variables,
                )  # fmt: skip
                figures = evaluation.summary(judged)
                if judge is not None:
                    figures |= evaluation.likelihoods(judged, judge, tokenizer, own, chat_template_kwargs=variables)
                chosen = [f"{name} {value:g}" for name, value in (("bias", bias), ("penalty", penalty)) if value is not None]
                typer.echo(", ".join([*chosen, *(f"{name} {value:.3f}" for name, value in figures.items())]))
                if output is not None:
                    evaluation.write_evaluation(judged, figures, output)


def _judge(base: str, tokenizer: "PreTrainedTokenizerBase", dtype: Dtype) -> "PreTrainedModel":
    """Load ``base``, whose vocabulary must be that of ``tokenizer`` before the control tokens came."""
    judge, own = load_base(base, dtype)
    if not own.get_vocab().items() <= tokenizer.get_vocab().items():
        raise ConfigurationError(f"--base {base} has another vocabulary; name the model that the tuned one was made from")
    return on_device(judge)
