"""Pages that play how an answer was written: options of ``generate``, and the command ``replay`` for what was saved."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from hf_apar.cli.common import BaseOption, Dtype, app, known_model, load, quietly, say
from hf_apar.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_apar.cli.compare import Recorded
    from hf_apar.replay import Trace

HtmlOption = Annotated[
    Path | None,
    typer.Option("--html", dir_okay=False, help="Write a page that plays how the answer came about; it needs no network."),
]
TraceOption = Annotated[
    Path | None,
    typer.Option("--trace", dir_okay=False, help="Save what such a page is made of, as JSON: hf-apar replay makes one."),
]


@app.command("replay")
def replay_command(
    saved: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What --trace or generate --json wrote.")],
    page: Annotated[Path, typer.Argument(dir_okay=False, help="The page to write.")],
    tokenizer_of: Annotated[
        str | None,
        typer.Option("--model", callback=known_model, help="The model of what --json wrote; default: the one that ships."),
    ] = None,
    base: BaseOption = None,
) -> None:
    """Make a page that plays a SAVED answer: with its clock from a trace, step by step from a tree."""
    from hf_apar.replay import load_traces, write_replay

    refuse_missing_folders({"PAGE": page})
    tree = _saved_tree(saved)
    trace, plain = load_traces(saved) if tree is None else (_of_tree(tree, tokenizer_of, base), None)
    write_replay(page, trace, plain)
    typer.echo(f"{page} plays the answer; open it in a browser")


def refuse_missing_folders(files: Mapping[str, Path | None]) -> None:
    """Refuse what cannot be written, before minutes are spent on it."""
    for name, file in files.items():
        if file is not None and not file.absolute().parent.is_dir():
            raise typer.BadParameter(f"{name} {file} lies in no folder that is there; make {file.parent}, or name another")


def keep_traces(answers: "Sequence[Recorded | None]", html: Path | None, saved: Path | None) -> None:
    """Write the files that were asked for, of an answer and of a plain one if there is one, and say where the page lies."""
    from hf_apar.replay import save_traces, write_replay

    traces = [one.trace() for one in answers if one is not None]  # none where no file was asked for
    if saved is not None:
        save_traces(saved, *traces)
    if html is not None:
        write_replay(html, *traces)
        say(f"{html} plays the answer; open it in a browser")


def _saved_tree(file: Path) -> dict[str, object] | None:
    """Return what ``generate --json`` wrote, ``None`` if the file is something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return values if isinstance(values, dict) and "tree" in values else None


def _of_tree(record: Mapping[str, object], model: str | None, base: str | None) -> "Trace":
    from hf_apar.replay import trace_of_tree
    from hf_apar.tree.threads import ParagraphTree

    try:
        tree = ParagraphTree.from_dict(cast(Mapping[str, object], record["tree"]))
    except DataError as error:
        raise DataError(f"{error}; give what generate --json wrote, or --trace") from error
    trace = trace_of_tree(tree, _tokenizer(model, base), question=str(record.get("prompt", "")))
    if record.get("text", trace.text) != trace.text:
        raise DataError("another model wrote that answer, with other tokens; name it with --model")
    return trace


def _tokenizer(model: str | None, base: str | None) -> "PreTrainedTokenizerBase":
    from hf_apar.checkpoints.loading import load_tokenizer

    if model is None:
        return load(None, Dtype.auto)[1]
    with quietly():
        return load_tokenizer(model, base=base)
