"""Runs the benchmarks one after another, those that are not done yet: ``make bench`` and ``make bench-long``.

A part that is done has a file in ``build/bench/done``; one that was stopped goes on where it can. Remove ``build/bench`` to begin
anew. The times are for two quiet cores: nothing else may run meanwhile.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from common import native

FOLDER = Path(__file__).parent
DONE = FOLDER.parent / "build" / "bench" / "done"


class Part(NamedTuple):
    name: str
    minutes: int  # that it takes
    command: str  # the script and its options; {questions} stands for the questions given, {other} for a number format


SHORT = (
    Part("loop", 2, "loop.py"),
    Part("host", 3, "host.py"),
    Part("no-fork", 3, "no_fork.py"),
    Part("prepacking", 12, "prepacking.py {questions}"),
    Part("growth", 4, "growth.py --contexts 128 1024 --batches 1 8"),
    Part("peak-kv", 3, "peak_kv.py --number 16"),
    Part("batches", 12, "batches.py --number 20 {questions}"),
    Part("speculation", 6, "speculation.py --each 3 {questions}"),
    Part("rivals", 6, "rivals.py --number 5 {questions}"),
)
LONG = (
    Part("batches, all", 75, "batches.py --number 1000 {questions}"),
    Part("batches in the other format", 20, "batches.py --dtype {other} --batches 4 16 --number 32 {questions}"),
    Part("speculation, more", 30, "speculation.py --each 10 {questions}"),
    Part("speculation in batches", 10, "speculation.py --each 10 --batch 4 {questions}"),
    Part("rivals, more", 20, "rivals.py --number 16 {questions}"),
    Part("growth, more", 10, "growth.py --contexts 128 1024 8192 --threads 1 8 64"),
    Part("branches", 12, "branches.py"),
    Part("training", 15, "training_cost.py --dtype bfloat16 {answers}"),
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--long", action="store_true", help="the long parts in place of the short ones")
    options.add_argument("--questions", type=Path, help="as FastChat's Vicuna Bench, in place of our own")
    options.add_argument("--answers", type=Path, help="what hf-apar distill wrote; without it, training is left out")
    options.add_argument("--list", action="store_true", help="tell what would run, and for how long")
    options = options.parse_args()
    other = "float32" if native() == "bfloat16" else "bfloat16"
    questions = "" if options.questions is None else f"--questions {options.questions}"
    parts = [part for part in (LONG if options.long else SHORT) if "{answers}" not in part.command or options.answers]
    failed = []
    for part in parts:
        stamp = DONE / part.name.replace(", ", "-").replace(" ", "-")
        command = part.command.format(questions=questions, answers=options.answers, other=other).split()
        print(f"{part.name}: {'done' if stamp.is_file() else f'{part.minutes} min'}: {' '.join(command)}", flush=True)
        if options.list or stamp.is_file():
            continue
        start = time.perf_counter()
        code = subprocess.run([sys.executable, FOLDER / command[0], *command[1:]]).returncode
        if code:
            failed.append(part.name)
        else:
            DONE.mkdir(parents=True, exist_ok=True)
            stamp.write_text(f"{(time.perf_counter() - start) / 60:.1f} minutes\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; run it again, and these go on")


if __name__ == "__main__":
    main()
