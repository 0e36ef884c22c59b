"""The application that the commands join: a first word at once, an error in one sentence, an exit code that says which.

Exit codes: 0, 2 for what the user can mend, 1 for what nobody foresaw or a reader that went away, 130 after Ctrl-C.
"""

import atexit
import io
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hf_apar.cli.explanations import explain
from hf_apar.processes import local_number, process_count, process_number

# Threads of the math library that wait for each other spin, for milliseconds: beside another job they keep it from the cores
# that it needs. One that sleeps at once is late for each product of a narrow step. So they spin for a thirtieth of that.
SHORT_WAITS = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "0"}  # of GNU's OpenMP (300,000) and of LLVM's (200 ms)
_UsageError: Any = typer.BadParameter.__mro__[1]  # typer has a click of its own now, and had none before


def say(text: str) -> None:
    """Write one line to the standard error."""
    tell(f"hf-apar: {text}", err=True)


def tell(text: str, *, err: bool, **style: Any) -> None:
    """Write one line, to the standard error or output; on a terminal it is broken between words."""
    stream = sys.stderr if err else sys.stdout
    if stream is not None and stream.isatty():
        text = fill(text, max(shutil.get_terminal_size().columns, 1))
    typer.echo(typer.style(text, **style) if style else text, err=err)  # a style of nothing would write a reset


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn what is raised into one sentence on the standard error and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as error:
        _let_go_of_output()
        say("stopped")
        raise typer.Exit(130) from error
    except BrokenPipeError as error:
        _let_go_of_output()
        raise typer.Exit(1) from error
    except _UsageError as error:
        place = error.ctx.command_path if error.ctx is not None else "hf-apar"
        say(f"{' '.join(error.format_message().split()).rstrip('.')}; see {place} --help")
        raise typer.Exit(2) from error
    except Exception as error:
        _let_go_of_output()
        sentence, foreseen = explain(error)
        if not foreseen or local_number() == 0:  # the processes of a machine foresee the same
            say(sentence)
        raise typer.Exit(2 if foreseen else 1) from error


def _let_go_of_output() -> None:
    """Give up what cannot be written: the interpreter would try again at its end, and complain."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Command(TyperCommand):
    """A command that says at once that it loads, long before the libraries are there."""

    def invoke(self, ctx: Any) -> Any:
        model = ctx.params.get("model")
        where = "" if model is None or Path(model).is_dir() else " from the Hub"
        if process_number() == 0:
            say(f"loading {model or 'the default model'}{where} ..." if "model" in ctx.params else "loading ...")
        return super().invoke(ctx)


class Group(TyperGroup):
    """The commands, each under the same care; ``--debug`` may stand anywhere."""

    debug = False

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        options = args[: args.index("--")] if "--" in args else args
        Group.debug = "--debug" in options or os.environ.get("HF_APAR_DEBUG", "") not in ("", "0")
        kept = [one for one in options if one != "--debug"] + args[len(options) :]
        with self._watched():
            return super().make_context(info_name, kept, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        with self._watched(), _messages():
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk or a closed pipe shows here
            return result

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            with errors_in_one_line():
                yield
        except typer.Exit as end:
            if self.debug and end.__cause__ is not None:
                traceback.print_exception(end.__cause__)
            raise


@contextmanager
def _messages() -> Iterator[None]:
    """Show on the standard error the library's warnings, and what conversion and the choice of answers say."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.NOTSET if process_number() == 0 else logging.ERROR)
    handler.setFormatter(logging.Formatter("hf-apar: %(message)s"))
    ours, *talking = map(logging.getLogger, ("hf_apar", "hf_apar.checkpoints.conversion", "hf_apar.training.mixture"))
    ours.addHandler(handler)
    before = [logger.level for logger in talking]
    for logger in talking:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        for logger, level in zip(talking, before, strict=True):
            logger.setLevel(level)


class Application(typer.Typer):
    """A Typer application all of whose commands are :class:`Command`."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        return super().command(name, **{"cls": Command, **settings})


app = Application(
    name="hf-apar",
    help="Auto-parallel auto-regressive decoding: one answer, written by many threads.",
    cls=Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # an error is one line, not a box
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from hf_apar import __version__

        typer.echo(f"hf-apar {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error comes from; may stand after any command.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, in a process of its own: what is set here must be set before torch is loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in SHORT_WAITS.items():
            os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter is no error
    succeeded: list[bool] = []
    if process_count() > 1:
        atexit.register(_leave_at_once, succeeded)  # the first to be registered is the last to run
    try:
        app(arguments, prog_name="hf-apar")
    except SystemExit as end:
        succeeded.append(not end.code)
        raise


def _leave_at_once(succeeded: list[bool]) -> None:
    """End the process without the interpreter's own end, which threads of a process group may outlive: they abort then."""
    if any(succeeded):
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(0)
