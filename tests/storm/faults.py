"""What is killed, finds the disk full or a folder read-only, or is started twice, ends where nothing happened would end."""

import atexit
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from forking_checkpoint import save_base_and_checkpoint
from hf_apar.checkpoints.conversion import converted
from hf_apar.data.distillation.batches import TextAnswer, in_batches
from hf_apar.data.distillation.distill import _Limits
from hf_apar.data.distillation.questions import template_questions
from storm.storms import Scenario, Storm
from storm.warm import Warm

LIST = "- A: a b c d e\n- B: f g h i j\n- C: k l m n o"
TEXTS = [LIST] * 8 + ["no list"] * 4
STEPS = ("--max-steps", "4", "--save-steps", "1", "--eval-steps", "2")
SMALL = ("--max-length", "256")
HEADS = ("--inner-size", "8", "--draft-vocabulary", "32", "--length", "2", "--dtype", "float32")
RECIPE = """
[asking]
templates = 3
[elaborate]
min_detail_tokens = 0
[train]
max_steps = 2
save_steps = 1
[heads]
max_steps = 2
save_steps = 1
inner_size = 8
draft_vocabulary = 32
"""
OUT = "@"  # in a command: the folder of its output
COMMANDS: dict[str, tuple[str, ...]] = {
    "cache": (),  # no command
    "extract": ("extract", "{home}/many.jsonl", f"{OUT}/trees.jsonl", "--workers", "2"),
    "train": ("train", "{home}/answers.jsonl", f"{OUT}/adapter", "--model", "{home}/base", "--rank", "2", *STEPS, *SMALL),
    "distill": ("distill", "-", f"{OUT}/answers.jsonl", "--model", "{home}/forks", "--templates", "8", "--batch-size", "2",
                "--max-new-tokens", "32", "--opened-share", "0"),
    "elaborate": ("elaborate", "{home}/few.jsonl", f"{OUT}/longer.jsonl", "--model", "{home}/forks", "--batch-size", "1",
                  "--min-detail-tokens", "12"),
    "train-medusa": ("train-medusa", "{home}/answers.jsonl", f"{OUT}/heads", "--model", "{home}/forks", *HEADS, *STEPS,
                     *SMALL),
    "recipe": ("recipe", "{home}/recipe.toml", "--output", f"{OUT}/recipe", "--model", "{home}/base"),
    "evaluate": ("evaluate", "--output", f"{OUT}/evaluation", "--suite", "{home}/suite.jsonl", "--max-new-tokens", "4",
                 "--arm", "plain", "--arm", "apar", "--model", "{home}/forks", "--base", "{home}/base",
                 "--dtype", "float32"),
}  # fmt: skip
UNTOLD = "second|runtime|compared|train_loss"  # times, and the Trainer's mean of the losses since it was started
FAULTS = ("killed", "killed", "killed", "stopped", "full", "read-only", "two")


@cache
def _home() -> Path:
    """Return a folder with all that the commands read."""
    place = tempfile.TemporaryDirectory()
    atexit.register(place.cleanup)
    home = Path(place.name)
    base, _ = save_base_and_checkpoint(home)
    asked = [{"prompt": f"{place}?", "response": text} for place, text in enumerate(TEXTS)]
    (home / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    (home / "few.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked[-6:]))
    many = [*(json.dumps(one) for one in asked * 20), "{", '{"x": 1}']
    (home / "many.jsonl").write_text("\n".join(many) + "\n")
    suite = [{"key": key, "category": "trees", "expected": "parts", "messages": [{"role": "user", "content": key}]}
             for key in "ab"]  # fmt: skip
    (home / "suite.jsonl").write_text("".join(json.dumps(one) + "\n" for one in suite))
    (home / "recipe.toml").write_text(RECIPE)
    (home / "begun" / "recipe").mkdir(parents=True)
    settings = (_Limits(384, 384, None), f"{base} transformers float32 0.3 1.0 0")
    own = [TextAnswer(f"{place}?", text) for place, text in enumerate(TEXTS)]  # a random model's own would hold no list
    list(in_batches(template_questions(3), home / "begun" / "recipe" / "answers.jsonl", 3, settings, lambda _: own))
    subprocess.run(["chmod", "-R", "a+rX", str(home)], check=True)  # for a user who may not write
    return home


@cache
def _warm() -> Warm:
    warm = Warm()
    atexit.register(warm.process.kill)
    return warm


def command(arguments: list[str]) -> None:
    """Run ``hf-apar``, which draws no pictures: they say nothing of faults, and take long."""
    from hf_apar.cli import main

    sys.modules["matplotlib.axes"] = None  # type: ignore[assignment]
    sys.modules.pop("hf_apar.evaluation.plots", None)

    main(arguments)


def keep(home: str) -> None:
    """Load a model by way of the cache."""

    def convert(**_: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        folder = f"{home}/base"
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    model, _ = converted("tiny", [Path(home) / "base" / "config.json"], convert, torch.float32, {})
    assert sum(float(one.double().abs().sum()) for one in model.parameters()) > 0


def _run(name: str, place: Path, **more: Any) -> list[dict[str, Any]]:
    home, out = _home(), place / "out"
    if name == "recipe" and not (out / "recipe").exists():
        shutil.copytree(home / "begun", out, dirs_exist_ok=True)
    call = [__name__, "command", [one.replace(OUT, str(out)).format(home=home) for one in COMMANDS[name]]]
    if name == "cache":
        call = [__name__, "keep", str(home)]
    return _warm().run(call=call, root=str(out), files=str(place / "files"), env={"HF_APAR_CACHE": str(out)}, **more)


@cache
def _whole(name: str) -> tuple[dict[str, Any], int, float]:
    """Return what stands in the folder where nothing happens, and how many changes of files and seconds that takes."""
    with _place() as place:
        (ran,) = _run(name, place)
        assert ran["code"] == 0, ran["said"]
        told = _told(place / "out")
        assert told, f"{name} leaves nothing"
        return told, ran["count"], ran["seconds"]


@contextmanager
def _place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o777)
        (Path(place) / "out").mkdir()
        yield Path(place)


def _told(out: Path) -> dict[str, Any]:
    """Return what each file says, but for times, pictures and the states of optimisers."""
    found: dict[str, Any] = {}
    for file in sorted(out.rglob("*")):
        name = file.relative_to(out).as_posix()
        if file.is_dir() or re.search(r"tiny-\w{16}-\w+/", name):  # an entry of the cache that was begun, kept for a month
            continue
        if "checkpoint" in name:
            found[name.partition("checkpoint-")[0] + "checkpoints"] = None
        elif file.suffix == ".safetensors":
            found[name] = load_file(file)
        elif file.suffix in (".json", ".jsonl"):
            text = file.read_text(encoding="utf-8").replace(str(out), OUT)
            timed = "evaluation" in name or file.suffix == ".json"
            found[name] = [_timeless(json.loads(line)) for line in _values(file, text)] if timed else text
        else:
            found[name] = None
    return found


def _values(file: Path, text: str) -> list[str]:
    return text.splitlines() if file.suffix == ".jsonl" else [text]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(one) for name, one in value.items() if not re.search(UNTOLD, name)}
    if isinstance(value, list):
        return [_timeless(one) for one in value if not (isinstance(one, dict) and "train_runtime" in one)]
    return value


def _differences(one: Any, other: Any, where: str) -> Iterator[str]:
    """Name the places where the two differ; numbers may by 1e-6."""
    if isinstance(one, torch.Tensor):
        if one.shape != other.shape or not torch.allclose(one.double(), other.double(), rtol=0, atol=1e-6):
            yield where
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for name in one:
            yield from _differences(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for place, pair in enumerate(zip(one, other, strict=True)):
            yield from _differences(*pair, f"{where}/{place}")
    elif isinstance(one, float) and isinstance(other, float):
        if not math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-6):
            yield f"{where}: {one} and {other}"
    elif one != other:
        yield f"{where}: {str(one)[:200]} and {str(other)[:200]}"


def _ends(name: str, place: Path, after: str) -> None:
    """The command ends, and leaves what it leaves where nothing happened."""
    (ran,) = _run(name, place)
    assert ran["code"] == 0, f"{name} does not go on after {after}: {ran['said'][-600:]}"
    whole, found = _whole(name)[0], _told(place / "out")
    assert found.keys() == whole.keys(), f"{name} after {after}: files {sorted(found.keys() ^ whole.keys())}"
    other = [*_differences(whole, found, name)]
    assert not other, f"after {after} {len(other)} things differ: {other[0]}"


def draw(draw: random.Random) -> Scenario:
    name = draw.choice(list(COMMANDS))
    return {
        "name": name, "fault": draw.choice(FAULTS), "moments": [round(draw.random(), 4) for _ in range(draw.randint(1, 3))],
        "torn": draw.random() < 0.5, "clock": draw.randrange(10**6) if draw.random() < 0.3 else 0,
    }  # fmt: skip


def check(name: str, fault: str, moments: list[float], torn: bool, clock: int) -> None:
    """Whatever happened, the command says it in a sentence, and ends as if nothing had happened where it is called again."""
    with _place() as place:
        _FAULTS[fault](name, place, moments, torn, clock)
        _ends(name, place, f"being {fault}")


def _killed(name: str, place: Path, moments: list[float], torn: bool, clock: int) -> None:
    for moment in moments:
        (ran,) = _run(name, place, kill=1 + int(moment * _whole(name)[1]), torn=torn)
        assert ran["code"] in (0, -9), ran["said"]
        _set_clocks(place, clock)


def _stopped(name: str, place: Path, moments: list[float], torn: bool, clock: int) -> None:
    for moment in moments:
        (ran,) = _run(name, place, after=moment * _whole(name)[2] + 0.001)
        assert ran["code"] in (0, -9), ran["said"]
        _set_clocks(place, clock)


def _set_clocks(place: Path, seed: int) -> None:
    """Let the files be of any time, as after a clock that was wrong."""
    draw = random.Random(seed)
    for file in sorted((place / "out").rglob("*")) if seed else ():
        os.utime(file, (when := draw.randrange(2**31), when))


def _mounted(place: Path, options: str) -> bool:
    """Put a file system of its own under the output, if this process may."""
    return subprocess.run(["mount", *options.split(), str(place / "out")], capture_output=True).returncode == 0


def _full(name: str, place: Path, moments: list[float], torn: bool, clock: int) -> None:
    """No file may be longer than this; where a file system may be mounted, all files together."""
    size = 4096 * (1 + int(100 * moments[0] ** 2))
    mounted = _mounted(place, f"-t tmpfs -o size={size} tmpfs")
    try:
        (ran,) = _run(name, place, largest=0 if mounted else size)
        kept = shutil.copytree(place / "out", place / "kept") if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(place / "out")], check=True)
    if mounted:
        shutil.copytree(kept, place / "out", dirs_exist_ok=True)
    _told_in_a_sentence(name, ran, "No space left|File too large|make room")


def _read_only(name: str, place: Path, moments: list[float], torn: bool, clock: int) -> None:
    """Another user, where this one may write anywhere."""
    if moments[0] < 0.5:
        _killed(name, place, moments[:1], torn, clock)  # there is something that may not be changed
    if os.getuid() == 0:
        subprocess.run(["chmod", "-R", "a+rX,go-w", str(place / "out")], check=True)
        (ran,) = _run(name, place, user=65534)
        _told_in_a_sentence(name, ran, "Permission denied|not writable|cannot be written")


def _two(name: str, place: Path, moments: list[float], torn: bool, clock: int) -> None:
    """One of two does it, or both one after the other."""
    both = _run(name, place, times=2)
    for ran in both:
        _told_in_a_sentence(name, ran, "another process writes to")
    assert any(ran["code"] == 0 for ran in both), both[0]["said"]


def _told_in_a_sentence(name: str, ran: dict[str, Any], words: str) -> None:
    assert "Traceback" not in ran["said"], ran["said"][-600:]
    if name == "cache" or ran["code"] == 0:
        assert ran["code"] == 0, ran["said"]
        return
    assert ran["code"] == 2, f"code {ran['code']}: {ran['said'][-600:]}"
    sentence = ran["said"].rpartition("hf-apar: ")[2].splitlines()[0]  # progress bars may come after it
    assert re.search(words, sentence), f"the message does not name the cause: {sentence}"


_FAULTS = {
    "killed": _killed, "stopped": _stopped, "full": _full, "read-only": _read_only, "two": _two,
}  # fmt: skip
EVERY = tuple(
    {"name": name, "fault": fault, "moments": [0.98, 0.87, 0.29], "torn": True, "clock": 7}
    for fault in _FAULTS for name in COMMANDS
)  # fmt: skip
STORM = Storm(
    "faults", draw, check, share=4.0, every=EVERY,
    parts=lambda one: len(one["moments"]) if one["fault"] in ("killed", "stopped") else 1,
)  # fmt: skip
