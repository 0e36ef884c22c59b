"""Commands that use a model which can fork: ``generate``, ``merge``."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_apar.cli.common import Dtype, DtypeOption, ModelOption, SeedOption, app, errors_in_one_line, load, on_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_apar.comparison import AparResult, Result
    from hf_apar.speculation.proposer import Proposer

_LOOKED_UP = 5  # tokens that `generate` looks up for a draft


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
    with errors_in_one_line():
        from hf_apar.comparison import Decoder
        from hf_apar.config import AparConfig

        loaded, tokenizer = load(model, dtype)
        on_device(loaded)
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
def merge(
    output: Annotated[Path, typer.Argument(help="A new folder.", file_okay=False)],
    model: ModelOption = None,
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Write an adapter and its base as one ordinary checkpoint in OUTPUT, which loads anywhere; its heads go along."""
    with errors_in_one_line():
        from hf_apar.checkpoints import DEFAULT_ADAPTER
        from hf_apar.hub import save_merged
        from hf_apar.speculation.medusa import HEADS_FILE

        loaded, tokenizer = load(model, dtype)
        save_merged(loaded, tokenizer, output)
        heads = (DEFAULT_ADAPTER if model is None else Path(model)) / HEADS_FILE
        if heads.is_file():
            shutil.copy(heads, output)
    typer.echo(f"{output} decodes plainly with AutoModelForCausalLM, and with threads through hf_apar")


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


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return ``text`` as a user turn, or as it stands where the model is no chat model."""
    from hf_apar.chat import encode_chat

    if tokenizer.chat_template is None:
        return list(tokenizer.encode(text, split_special_tokens=True))
    return encode_chat(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)


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
