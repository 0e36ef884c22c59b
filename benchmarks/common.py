"""What the benchmarks share: the model, own prompts, medians with their spread, tables, JSON and plots."""

import argparse
import hashlib
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

import hf_apar
from hf_apar.checkpoints.default_model import DEFAULT_ADAPTER
from hf_apar.evaluation.machine import processor
from hf_apar.prepacking import prepackable

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "bench"
PAGE = ROOT / "docs" / "performance.md"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # CUDA_VISIBLE_DEVICES= hides a GPU
SUFFIX = "_cuda" if DEVICE.type == "cuda" else ""  # of the files that a GPU's figures are kept in

QUESTIONS = (
    "Give me five practical ideas for saving water at home.",
    "What are the main benefits of reading books?",
    "What should I pack for a weekend in the mountains?",
    "How can I become better at public speaking?",
    "What are the effects of stress on the body?",
    "How should a small shop attract customers?",
)


_PREPACKED = ExitStack()  # until the program ends


def native() -> str:
    """The number format that this machine computes in: bfloat16 where it has arithmetic for it."""
    known = (f"_is_{unit}_supported" for unit in ("avx512_bf16", "amx_tile"))
    return "bfloat16" if SUFFIX or any(getattr(torch.cpu, name, bool)() for name in known) else "float32"


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description.split("\n")[0])
    made.add_argument("--dtype", default=native(), choices=["float32", "bfloat16"])
    made.add_argument("--repeats", type=int, default=3, help="interleaved runs of each side")
    return made


def on_the_cpu_alone(why: str) -> None:
    """Stop where a GPU is in sight, whose name the figures would bear."""
    if SUFFIX:
        raise SystemExit(f"{why}; hide the GPU: set CUDA_VISIBLE_DEVICES to nothing")


def load(dtype: str, *, prepack: bool = True):
    """The default model and its tokenizer; on a CPU in float32 its weights are prepacked, as those of the commands."""
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = hf_apar.load_default_model(dtype=getattr(torch, dtype))
    tokenizer.padding_side = "left"
    model = model.to(DEVICE)
    if prepack and prepackable(model):
        _PREPACKED.enter_context(hf_apar.prepacked(model))
    return model, tokenizer


def weights(dtype: str) -> str:
    """The weights of :func:`load`, in words."""
    return f"{dtype}, prepacked weights" if dtype == "float32" and not SUFFIX else dtype


def encode(tokenizer, questions: Sequence[str]):
    prompts = [hf_apar.encode_chat(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    return tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(DEVICE)


def timed(call: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = call()
    if SUFFIX:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def interleaved(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call each way ``repeats`` times, in turn, the order turned round each time; each returns what it measured."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name in list(ways) if repeat % 2 else reversed(list(ways)):
            found[name].append(ways[name]())
    return found


def ratios(found: dict[str, list[float]], part: str, whole: str) -> list[float]:
    return [one / other for one, other in zip(found[part], found[whole], strict=True)]


def spread(values: Sequence[float]) -> str:
    """The median, and the lowest and highest value."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def machine() -> str:
    release = torch.__version__.split("+")[0]
    on = (
        torch.cuda.get_device_name()
        if SUFFIX
        else f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    return f"{on}, PyTorch {release}, transformers {transformers.__version__}"


class Kept:
    """What was measured, a line each, in ``build/bench/NAME.jsonl``: a run that was stopped goes on from there.

    What another model, machine or release measured does not count. ``cold``: has nothing run yet in this process?
    """

    def __init__(self, name: str) -> None:
        self.file = OUTPUT / f"{name}{SUFFIX}.jsonl"
        self.cold = True
        self.made_with = [machine(), hashlib.sha256((DEFAULT_ADAPTER / "adapter_model.safetensors").read_bytes()).hexdigest()]
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        self.found = {json.dumps(one["key"]): one["value"] for one in map(json.loads, lines) if one["with"] == self.made_with}

    def of(self, key: Sequence[object], measure: Callable[[], object]):
        """What was measured under ``key``, or is now."""
        name = json.dumps(key)
        if name not in self.found:
            self.found[name] = json.loads(json.dumps(measure()))
            self.cold = False
            OUTPUT.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"with": self.made_with, "key": key, "value": self.found[name]}) + "\n")
        return self.found[name]


@dataclass(frozen=True)
class Bars:
    """A plot: medians as bars, with the lowest and the highest value, and a line at 1."""

    axis: str
    values: Mapping[str, Sequence[float]]


def publish(
    name: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    note: str,
    data: object,
    bars: Bars | None = None,
) -> None:
    """Show a table, and keep it as JSON, as a section of ``docs/performance.md`` and as a plot beside that.

    A GPU's section and plot stand beside the CPU's.
    """
    name, title = name + SUFFIX, f"{title}, on a GPU" if SUFFIX else title
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    lines = [f"## {title}", "", f"{note} Measured on {machine()}.", ""]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    if bars is not None:
        lines += ["", f"![{bars.axis}]({name}.png)"]
        draw(bars, title, ROOT / "docs" / f"{name}.png")
    (OUTPUT / f"{name}.json").write_text(json.dumps({"machine": machine(), "data": data}, indent=1), encoding="utf-8")
    write_section(title, "\n".join(lines))


def draw(bars: Bars, title: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, middles = list(bars.values), [statistics.median(values) for values in bars.values.values()]
    ends = [
        (middle - min(values), max(values) - middle) for middle, values in zip(middles, bars.values.values(), strict=True)
    ]
    figure, axes = pyplot.subplots(figsize=(7, 0.8 + 0.4 * len(names)))
    axes.barh(names, middles, xerr=list(zip(*ends, strict=True)), capsize=3, height=0.6)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.invert_yaxis()
    axes.set(xlabel=bars.axis, title=title)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def write_section(title: str, section: str) -> None:
    """Put ``section`` into the page where one of that title stands, or at its end."""
    head, *sections = re.split(r"^(?=## )", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = {part.partition("\n")[0].removeprefix("## "): part.rstrip() + "\n" for part in sections}
    named[title] = section.rstrip() + "\n"
    PAGE.write_text(head + "\n".join(named.values()), encoding="utf-8")
