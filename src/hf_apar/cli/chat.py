"""The command ``chat``: turns in the terminal, or a line a turn from a pipe."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hf_apar.cli.answers import Answering, HeadsOption
from hf_apar.cli.application import Group
from hf_apar.cli.common import (
    BaseOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    TemplateArgumentsOption,
    app,
    say,
    template_arguments,
)
from hf_apar.cli.explanations import explain
from hf_apar.cli.options import with_settings
from hf_apar.errors import ConfigurationError

if TYPE_CHECKING:
    from hf_apar.cli.conversation import Conversation

PROMPT = "> "
HELP = """\
/apar         write answers in threads
/plain        write them token by token
/compare      both ways, and show both times
/save FILE    keep the chat, as a line that extract and train take
/html FILE    write a page that plays how the last answer came about
/help         show this
/quit         end, as Ctrl-D does
Ctrl-C stops an answer and keeps what was written. A question that begins with / needs a space before it."""


@app.command("chat")
@with_settings
def chat_command(
    how: Answering,
    model: ModelOption = None,
    base: BaseOption = None,
    chat_template_kwargs: TemplateArgumentsOption = None,
    heads: HeadsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Chat with a model and watch its threads write; /help tells what else can be typed. A pipe gives a line a turn."""
    if sys.stdin is None:
        raise ConfigurationError("there is no standard input to read questions from; start chat in a terminal or a pipe")
    arguments = template_arguments(chat_template_kwargs)
    method = how.loaded(model, base, heads, device, dtype)
    from hf_apar.cli.conversation import Conversation, Way
    from hf_apar.prepacking import prepacked_if_possible

    told = [] if how.system is None else [{"role": "system", "content": how.system}]
    with prepacked_if_possible(method.model):
        _converse(Conversation(method, how.config, arguments, told, Way.plain if how.plain else Way.apar))


def _converse(chat: "Conversation") -> None:
    """Take turns until there are none; at a terminal what goes wrong with one of them is said, and the chat goes on."""
    chat.prepared({"role": "user", "content": "Hello"})  # a template that refuses chats does so now
    typed = sys.stdin.isatty()
    if typed:
        say("type a question, or /help; Ctrl-D ends")
    for line in _typed() if typed else _piped():
        try:
            if not _goes_on(chat, line):
                return
        except KeyboardInterrupt:
            if not typed:
                raise
            say("stopped; what was written stays in the chat")
        except Exception as error:
            if not typed or isinstance(error, BrokenPipeError):
                raise
            sentence, foreseen = explain(error)
            if Group.debug and not foreseen:
                traceback.print_exception(error)
            say(sentence)


def _piped() -> Iterator[str]:
    for line in typer.get_text_stream("stdin", encoding="utf-8", errors="strict"):
        yield line.rstrip("\n")


def _typed() -> Iterator[str]:
    """Yield what is typed, with line editing and a history of lines; Ctrl-C begins the line anew."""
    with suppress(ImportError):  # not everywhere, and then lines are edited as the terminal does it
        import readline  # noqa: F401 - input() uses it
    while True:
        typer.echo(err=True)
        try:
            line = input(PROMPT) if _shown() else _asked_aside()
        except EOFError:
            typer.echo(err=True)
            return
        except KeyboardInterrupt:
            typer.echo(err=True)
            continue
        except UnicodeError:
            say("that is no UTF-8; type it again")
            continue
        yield line


def _asked_aside() -> str:
    """Read a line where the output is no terminal: the prompt shall not stand in it."""
    typer.echo(PROMPT, nl=False, err=True)
    return input()


def _shown() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _goes_on(chat: "Conversation", line: str) -> bool:
    """Do what a line says; return whether another one is wanted.

    Raises:
        ConfigurationError: if it says nothing that can be done.
    """
    from hf_apar.cli.conversation import Way

    name, _, rest = line.rstrip().partition(" ")
    if not line.startswith("/"):
        if line.strip():
            line.encode()  # what a terminal passed on need not be UTF-8
            if _shown() or chat.recorded:
                typer.echo()  # an empty line before each answer but the first of a pipe
            chat.ask(line.strip())
    elif name in ("/save", "/html"):
        if not (file := rest.strip()):
            raise ConfigurationError(f"{name} needs the name of a file; write it behind, with a space between")
        write = chat.save if name == "/save" else chat.replay
        write(Path(file).expanduser())
        say(f"wrote {file}")
    elif name == "/help":
        typer.echo(HELP, err=True)
    elif name == "/quit":
        return False
    elif name[1:] in list(Way):
        chat.choose(Way(name[1:]))
    else:
        raise ConfigurationError(f"there is no {name}; /help tells what there is, and a space begins a question with /")
    return True
