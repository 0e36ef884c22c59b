"""What the benchmarks share: the model, own prompts, medians with their spread, tables, JSON and plots."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

import hf_apar

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "benchmarks" / "output"

QUESTIONS = (
    "Give me five practical ideas for saving water at home.",
    "What are the main benefits of reading books?",
    "What should I pack for a weekend in the mountains?",
    "How can I become better at public speaking?",
    "What are the effects of stress on the body?",
    "How should a small shop attract customers?",
)


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description.split("\n")[0])
    made.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    made.add_argument("--repeats", type=int, default=3, help="interleaved runs of each side")
    return made


def load(dtype: str):
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = hf_apar.load_default_model(dtype=getattr(torch, dtype))
    tokenizer.padding_side = "left"
    return model, tokenizer


def encode(tokenizer, questions: Sequence[str]):
    prompts = [hf_apar.encode_chat(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    return tokenizer.pad({"input_ids": prompts}, return_tensors="pt")


def timed(call: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    result = call()
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
    return (
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, PyTorch "
        f"{release}, transformers {transformers.__version__}"
    )


@dataclass(frozen=True)
class Bars:
    """A plot: medians as bars, with the lowest and the highest value, and a line at ``aim``."""

    axis: str
    values: Mapping[str, Sequence[float]]
    aim: float = 1.0


def publish(
    name: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    note: str,
    data: object,
    bars: Bars | None = None,
) -> None:
    """Show a table, and keep it as JSON, as a part of ``docs/performance.md`` and as a plot beside that."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    OUTPUT.mkdir(exist_ok=True)
    lines = [f"## {title}", "", note, "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    if bars is not None:
        lines += ["", f"![{bars.axis}]({name}.png)"]
        draw(bars, title, ROOT / "docs" / f"{name}.png")
    record = {"machine": machine(), "markdown": "\n".join(lines) + "\n", "data": data}
    (OUTPUT / f"{name}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    write_page()


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
    axes.axvline(bars.aim, color="black", linewidth=0.8, linestyle="--")
    axes.invert_yaxis()
    axes.set(xlabel=bars.axis, title=title)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


ORDER = (
    "loop",
    "no_fork",
    "batches",
    "batches_float32",
    "speculation",
    "speculation_4",
    "rivals",
    "growth",
    "training",
    "training_threads",
)


def write_page() -> None:
    """Put the parts that have been measured together."""
    parts = [json.loads(file.read_text()) for name in ORDER if (file := OUTPUT / f"{name}.json").is_file()]
    machines = dict.fromkeys(part["machine"] for part in parts)
    head = (
        "# Performance\n\nWritten by `make bench`; medians of interleaved runs with the lowest and highest value. Ratios inside "
        f"one run are\nwhat counts, seconds depend on the machine: {'; '.join(machines)}.\n\n"
    )
    (ROOT / "docs" / "performance.md").write_text(head + "\n".join(part["markdown"] for part in parts), encoding="utf-8")
