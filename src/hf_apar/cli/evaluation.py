"""The command that judges a tuned model by what it writes: evaluate."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from hf_apar.cli.common import Dtype, DtypeOption, ModelOption, app, errors_in_one_line, load, load_base


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
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Answer 40 prompts that no recipe trains on: what forks, ends, loops, is kept by plain decoding, tokens per step."""
    with errors_in_one_line():
        from hf_apar.training import evaluation

        loaded, tokenizer = load(model, dtype)
        judge = None if base is None else load_base(base, dtype)[0]
        biases: Sequence[float | None] = fork_bias or [None]
        penalties: Sequence[float | None] = repetition_penalty or [None]
        for bias, penalty in product(biases, penalties):
            judged = evaluation.evaluate(
                loaded, tokenizer, fork_bias=bias, repetition_penalty=penalty, max_new_tokens=max_new_tokens
            )
            chosen = [f"{name} {value:g}" for name, value in (("bias", bias), ("penalty", penalty)) if value is not None]
            figures = evaluation.summary(judged)
            if judge is not None:
                figures |= evaluation.likelihoods(
                    judged, judge, tokenizer, max_new_tokens=max_new_tokens,
                    repetition_penalty=penalty or getattr(loaded.generation_config, "repetition_penalty", None) or 1.0,
                )  # fmt: skip
            typer.echo(", ".join([*chosen, *(f"{name} {value:.3f}" for name, value in figures.items())]))
            if output is not None:
                evaluation.write_evaluation(judged, figures, output)
