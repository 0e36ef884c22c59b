"""Command lines: any options and values of any command end with code 0 or 2 and one sentence, and write what they name."""

import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import typer
from typer.testing import CliRunner

from forking_checkpoint import save_base_and_checkpoint
from hf_apar.cli import app
from storm.storms import Scenario, Storm
from storm.texts import RECORDS

LONGEST = 20  # seconds of the processor; what is asked for may take longer, and is stopped then
ASIDE = ("--help", "--list", "--example", "--debug", "--compile")  # the last takes minutes
NUMBERS = (
    "0", "1", "2", "2", "3", "-1", "8", "1e3", "", "x", "9" * 20, "0x10", "１", "nan", "inf", "-inf", "0.5", "1.5", "-0.0",
    "1e400", "true", "1_0",
)  # fmt: skip
FILES = (
    "chats.jsonl", "bad.jsonl", "empty.jsonl", "bytes.jsonl", "folder", "recipe.toml", "nowhere", "nowhere/x", "", ".",
    "..", "forks/config.json", "-", "/dev/null", "~", "é字.jsonl", "a" * 300,
)  # fmt: skip
OUTPUTS = ("out", "out.jsonl", "out.parquet", "out.html", "deep/er/out.jsonl", "folder", "folder/out.jsonl")
MODELS = ("nowhere", "folder", "chats.jsonl", "..", "a/b/c", "-x", "", "é", "broken", "~", "forks/config.json", "a//b")
TEXTS = (
    "", "Why?", "-", "--", "[Fork]", "\udcff", "é字", "{}", "[1]", '{"a": 1}', '{"enable_thinking": false}', "{", "nan",
    "cpu", "cuda:99", "meta", "plain", "apar", "own", "vllm", "eager", "cap:0", "chats.jsonl", "x" * 3000,
    "\x1b[2J", "PATH", "a=b",
)  # fmt: skip
NEEDED = ("model", "served", "asked", "base", "tokenizer_of", "max_steps", "max_new_tokens")  # else it takes long
WORDS = ("auto", "float32", "bfloat16", "float16", "transformers", "vllm", "on", "off")
ADDRESSES = (
    "http://127.0.0.1:1/v1", "http://127.0.0.1:1", "ftp://x", "", "http://", "http://a@b/v1", "127.0.0.1", "http://[::1",
)  # fmt: skip


@cache
def _commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that the commands find as theirs."""
    home = tempfile.TemporaryDirectory()
    folder = Path(home.name)
    save_base_and_checkpoint(folder)
    (folder / "chats.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    (folder / "bad.jsonl").write_text('{"prompt": 5}\n{\n[1\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "bytes.jsonl").write_bytes(bytes(range(256)))
    (folder / "folder").mkdir()
    (folder / "folder" / "kept").write_text("kept")
    (folder / "recipe.toml").write_text("[asking]\ntemplates = 1\n[train]\nmax_steps = 1\n")
    shutil.copytree(folder / "forks", folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    return home


def draw(draw: random.Random) -> Scenario:
    name = draw.choice(list(_commands()))
    arguments: list[str] = []
    for one in _commands()[name].params:
        needed = one.required or one.name in NEEDED
        if draw.random() > (0.97 if needed else 0.15) or set(one.opts) & {*ASIDE}:
            continue
        value = _value(draw, one)
        if one.param_type_name == "argument":
            arguments.insert(0 if draw.random() < 0.2 else len(arguments), value)
        else:
            option = draw.choice([*one.opts, *one.secondary_opts])
            arguments += [option] if one.is_flag else [option, value]
    if draw.random() < 0.1:
        odd = draw.choice(("--no-such", "-q", "--", "more", "", "--model", "--help", "--list", "--example"))
        arguments.insert(draw.randint(0, len(arguments)), odd)
    return {"name": name, "arguments": arguments}


def _value(draw: random.Random, one: Any) -> str:
    kind, name = one.bare_type().lower(), one.name
    if name in ("model", "served", "asked", "base", "tokenizer_of", "start", "heads"):
        return draw.choice(("forks", "base", draw.choice(MODELS), draw.choice(MODELS)))
    if "url" in name:
        return draw.choice(ADDRESSES)
    if name in ("output", "page", "html", "trace"):
        return draw.choice(OUTPUTS if draw.random() < 0.8 else FILES[:5])
    if kind in ("int", "float"):
        return "2" if draw.random() < 0.5 else draw.choice(NUMBERS)
    if kind not in ("str", "list[str]", "path") and draw.random() < 0.8:
        return draw.choice(WORDS)
    return draw.choice(FILES if kind == "path" or one.param_type_name == "argument" else TEXTS)


def check(name: str, arguments: list[str]) -> None:
    """It ends with a code that says whose fault it was, says so in a sentence, and changes what it names alone."""
    with _folder() as folder:
        before = _told(folder.parent)
        result = _ran(name, arguments)
        after = _told(folder.parent)
        changed = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{type(result.exception).__name__} came out") from result.exception
    assert result.exit_code in (0, 2, 130), f"code {result.exit_code}: {_last(result.stderr)}"
    assert "Traceback" not in result.output + result.stderr, "a traceback"
    if result.exit_code == 2:
        last = _last(result.stderr)
        assert last.startswith("hf-apar: ") and 12 < len(last) < 4000, f"this is no sentence: {last[:300]}"
    named = tuple(f"in/{one}" for one in (*arguments, "probe" if name == "probe" else "") if one)
    wrong = [file for file in changed if not file.startswith(tuple(os.path.normpath(one) for one in named))]
    assert not wrong, f"{sorted(wrong)[0]} was written"


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _ran(name: str, arguments: list[str]) -> Any:
    offline, huggingface_hub.constants.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE, True
    before = signal.signal(signal.SIGPROF, _out_of_time)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return CliRunner().invoke(app, [name, *arguments], input="")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        huggingface_hub.constants.HF_HUB_OFFLINE = offline


def _out_of_time(*_: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Stand in a folder as :func:`_home` made it."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "in"
        shutil.copytree(_home().name, folder)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(here)


def _told(place: Path) -> dict[str, object]:
    files = [file for file in place.rglob("*") if file.is_file()]
    return {file.relative_to(place).as_posix(): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


STORM = Storm("commands", draw, check, share=1.5)
