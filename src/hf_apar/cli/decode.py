"""Commands that use a model which can fork: ``generate``, ``merge``."""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_apar.cli.answers import Answering, HeadsOption, both_ways, refuse_together, say_what_was_cut, summarise
from hf_apar.cli.common import (
    BaseOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    TemplateArgumentsOption,
    app,
    load,
    say,
    template_arguments,
)
from hf_apar.cli.options import with_settings
from hf_apar.cli.replay import HtmlOption, TraceOption, keep_traces, refuse_missing_folders
from hf_apar.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_apar.cli.compare import AparResult, Result


_CONTROLS = re.compile("[\x7f-\x9f]")  # JSON itself escapes those below a space


@app.command("generate")
@with_settings
def generate_command(
    prompt: Annotated[str, typer.Argument(help="The question, as one user turn; - reads it from the standard input.")],
    how: Answering,
    model: ModelOption = None,
    base: BaseOption = None,
    chat_template_kwargs: TemplateArgumentsOption = None,
    compare: Annotated[bool, typer.Option("--compare", help="Decode plainly first, and show both times.")] = False,
    heads: HeadsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object and nothing else.")] = False,
    html: HtmlOption = None,
    trace: TraceOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Answer PROMPT with many threads, and watch them write. Sampling options sample; without one it is greedy."""
    refuse_together("--plain", how.plain, {"--compare": compare}, "leaves APAR out")
    refuse_missing_folders({"--html": html, "--trace": trace})
    text, arguments = _prompt(prompt), template_arguments(chat_template_kwargs)
    method = how.loaded(model, base, heads, device, dtype)
    from hf_apar.prepacking import prepacked_if_possible

    ids = _encode(method.tokenizer, text, how.system, arguments)
    decoder = replace(method, prompt=ids, show=not as_json, question=None if html is None and trace is None else text)
    with nullcontext() if how.plain else prepacked_if_possible(method.model):
        one, many = both_ways(decoder, how.config, plain=how.plain or compare)
    if as_json:
        typer.echo(_shown(_record(text, one, many)))
    else:
        summarise(one, many)
    say_what_was_cut(one, many, how.max_new_tokens)
    keep_traces([one.recorded for one in (many, one) if one is not None], html, trace)


@app.command("merge")
def merge_command(
    output: Annotated[Path, typer.Argument(help="A new folder.", file_okay=False)],
    model: ModelOption = None,
    base: BaseOption = None,
    dtype: DtypeOption = Dtype.bfloat16,
    plain: Annotated[
        bool, typer.Option("--plain", help="Without control tokens and heads, for engines that hf_apar is not in.")
    ] = False,
) -> None:
    """Write an adapter and its base as one ordinary checkpoint in OUTPUT; its heads go along.

    Without hf_apar it decodes plainly in transformers. Other engines, such as llama.cpp, SGLang, TGI or vLLM without
    hf_apar, do not read what suppresses the control tokens: they need --plain.
    """
    if output.exists() and any(output.iterdir()):
        raise typer.BadParameter(f"{output} is not empty; name a new folder", param_hint="OUTPUT")
    loaded, tokenizer = load(model, dtype, base)
    from hf_apar.checkpoints.default_model import DEFAULT_ADAPTER
    from hf_apar.checkpoints.export import save_merged
    from hf_apar.checkpoints.heads import find_heads
    from hf_apar.speculation.medusa import HEADS_FOLDER

    with _whole_or_nothing(output) as unfinished:
        save_merged(loaded, tokenizer, unfinished, plain=plain)
        heads = find_heads(model or DEFAULT_ADAPTER)
        if heads is not None and not plain:
            (unfinished / HEADS_FOLDER).mkdir()
            shutil.copy(heads, unfinished / HEADS_FOLDER)
    how = "in any engine" if plain else "with AutoModelForCausalLM, and with threads through hf_apar"
    typer.echo(f"{output} decodes plainly {how}")


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """Yield where to write what becomes ``folder`` once it is finished: half a model helps nobody.

    Raises:
        ConfigurationError: if somebody else has written into ``folder`` meanwhile, which stays as it is.
    """
    target = folder.resolve()  # a link, or the working directory, has another parent
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}-") as temporary:
        unfinished = Path(temporary) / "unfinished"
        yield unfinished
        try:
            os.rename(unfinished, target)  # replaces an empty folder and no other
        except OSError as error:
            raise ConfigurationError(f"{folder} cannot be written ({error.strerror}); name a new folder") from error


def _prompt(argument: str) -> str:
    """Return the question, read from the standard input for ``-``."""
    text = argument
    if argument == "-":
        if sys.stdin is None:
            raise ConfigurationError("the prompt is -, and there is no standard input; give the prompt itself")
        if sys.stdin.isatty():
            say("type the prompt, and end it with Ctrl-D on a line of its own")
        text = typer.get_text_stream("stdin", encoding="utf-8", errors="strict").read()
    if not text.strip():
        raise ConfigurationError("the prompt is empty; give a question, or - and one on the standard input")
    text.encode()  # what the shell passed on need not be UTF-8
    return text


def _encode(
    tokenizer: "PreTrainedTokenizerBase", text: str, system: str | None, arguments: dict[str, object] | None
) -> list[int]:
    """Return ``text`` as a user turn, or as it stands where the model is no chat model."""
    from hf_apar.text.chat import encode_chat
    from hf_apar.text.spelling import without_known

    if tokenizer.chat_template is None:
        if system is not None or arguments is not None:
            raise ConfigurationError(
                "this model has no chat template for --system and --chat-template-kwargs; write it into the prompt"
            )
        return without_known(tokenizer.encode(text, split_special_tokens=True), tokenizer)
    chat = [{"role": "user", "content": text}]
    if system is not None:
        chat.insert(0, {"role": "system", "content": system})
    try:
        return encode_chat(tokenizer, chat, chat_template_kwargs=arguments)
    except DataError as error:
        given = [name for name, value in (("--system", system), ("--chat-template-kwargs", arguments)) if value is not None]
        if error.__cause__ is None or not given:  # it is not the template that refuses, or nothing can be left out
            raise
        raise DataError(f"{str(error).rstrip('.')}; leave out {' or '.join(given)}") from error


def _record(prompt: str, one: "Result | None", many: "AparResult | None") -> dict[str, object]:
    """Return the JSON object: APAR's answer, or the plain one where it is the only one."""
    if many is None:
        assert one is not None
        return {"prompt": prompt, **_plain_record(one)}
    record: dict[str, object] = {"prompt": prompt, "text": many.text, "tokens": many.tokens, "seconds": many.seconds}
    record["unfinished"] = many.unfinished
    record["stats"] = asdict(many.stats) | {"tokens_per_step": many.stats.tokens_per_step}
    record["tree"] = many.tree
    return record if one is None else record | {"plain": _plain_record(one)}


def _shown(record: Mapping[str, object]) -> str:
    """Return ``record`` as JSON, in which no letter controls a terminal."""
    text = json.dumps(record, ensure_ascii=not _unicode_output())
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain_record(one: "Result") -> dict[str, object]:
    return {"text": one.text, "tokens": one.tokens, "seconds": one.seconds, "unfinished": one.unfinished}


def _unicode_output() -> bool:
    return sys.stdout is not None and (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
