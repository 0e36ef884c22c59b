"""Branches of one prompt: ``branch`` against separate calls, a padded batch of whole prompts, and vLLM's prefix caching.

Every case that was measured is a line of ``build/bench/branches.jsonl``; a run that was stopped goes on there. Cases that
would take minutes are not run: separate calls are timed on some of the branches, and a padded batch beyond ``--most`` tokens on
part of its rows; what follows from that by counting is marked with a tilde. Prompts of 4,096 tokens and large batches run once.

    benchmarks/branches.py                                                    # some ten minutes on two CPU cores
    benchmarks/branches.py --vllm-python .venv-vllm/bin/python                # and vLLM, in an environment of its own
    benchmarks/branches.py --branches 2 --prompts 32 --new 4 --repeats 1 --scratch   # to try it, kept nowhere
"""

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import DEVICE, OUTPUT, SUFFIX, load, parser, publish, timed

import hf_apar
from hf_apar.checkpoints.export import save_merged

BRANCH = 8  # tokens that each branch begins with
FEW = 4  # separate calls that are timed; the others are reckoned
VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
folder, file = sys.argv[1:]
task = json.load(open(file))
model = LLM(folder, dtype=task["dtype"], max_model_len=task["longest"], enable_prefix_caching=True, max_num_seqs=64)
def write(prompts, tokens):
    options = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    model.generate([{"prompt_token_ids": ids} for ids in prompts], options, use_tqdm=False)
write([[5, 6, 7]], 2)
for case in task["cases"]:
    start = time.perf_counter()
    write([case["prompt"]], 1)  # so that its blocks are there for all branches
    write([case["prompt"] + branch for branch in case["branches"]], task["new"])
    print(json.dumps(["found", case["key"], time.perf_counter() - start]), flush=True)
"""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--branches", type=int, nargs="*", default=[4, 16, 64])
    options.add_argument("--prompts", type=int, nargs="*", default=[256, 1024, 4096], help="tokens of the prompt")
    options.add_argument("--new", type=int, default=32, help="tokens that each branch writes")
    options.add_argument("--most", type=int, default=32768, help="tokens of the prompts of a padded batch that is run whole")
    options.add_argument("--vllm-python", type=Path, help="Python of an environment with vLLM")
    options.add_argument("--scratch", action="store_true", help="show the table, and keep nothing")
    options = options.parse_args()
    file = OUTPUT / f"branches{SUFFIX}.jsonl"
    known = [] if options.scratch or not file.is_file() else [json.loads(line) for line in file.read_text().splitlines()]
    found = {(one["way"], one["prompt"], one["branches"]): one for one in known if one["new"] == options.new}

    def keep(way, prompt, branches, seconds: list[float], memory: float | None, reckoned: bool = False) -> None:
        line = {"way": way, "prompt": prompt, "branches": branches, "new": options.new, "seconds": seconds, "memory": memory}
        found[way, prompt, branches] = line | {"reckoned": reckoned}
        print(line, flush=True)
        if not options.scratch:
            OUTPUT.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(found[way, prompt, branches]) + "\n")

    model, tokenizer = load(options.dtype)
    settings = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": options.new, "eos_token_id": None,
                "pad_token_id": 0}  # fmt: skip
    hf_apar.branch(model, drawn(1, 16, 0), drawn(2, BRANCH, 1).tolist(), **settings)  # warm
    parts: dict[tuple[int, int], tuple[list[float], float]] = {}  # what padded batches of so many rows cost
    for length in options.prompts:
        for count in options.branches:
            measure(model, settings, length, count, options, found, keep, parts)
    if options.vllm_python:
        with_vllm(model, tokenizer, options, found, keep)
    show(options, found)


def measure(model, settings, length, count, options, found, keep, parts) -> None:
    """Time the ways of one case that are not known yet, and their peak memory over that of the loaded model."""
    branches = drawn(count, BRANCH, count)
    prompts = [drawn(1, length, length + repeat) for repeat in range(options.repeats if length < 4096 else 1)]

    def whole(prompt, rows):
        inputs = torch.cat([prompt.expand(rows, -1), branches[:rows]], dim=1)
        return model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)

    if ("branch", length, count) not in found:
        ids = branches.tolist()
        keep("branch", length, count, *cost(lambda prompt: hf_apar.branch(model, prompt, ids, **settings), prompts))
    if ("separate", length, count) not in found:
        known = next((one for key, one in found.items() if key[:2] == ("separate", length)), None)
        if known is None:  # the time of a call does not depend on how many follow
            seconds, memory = cost(lambda prompt: [whole(prompt, 1) for _ in range(FEW)], prompts[:2])
            each = [one / FEW for one in seconds]
        else:
            each, memory = [one / known["branches"] for one in known["seconds"]], known["memory"]
        keep("separate", length, count, [one * count for one in each], memory, count != FEW)
    if ("batch", length, count) not in found:
        rows = min(count, max(1, options.most // length))
        if (length, rows) not in parts:  # large ones once
            often = prompts[: 1 if length * rows > options.most // 4 else None]
            parts[length, rows] = cost(lambda prompt: whole(prompt, rows), often)
        seconds, memory = parts[length, rows]
        keep("batch", length, count, [one * count / rows for one in seconds], memory * count / rows, rows < count)


def drawn(rows: int, length: int, seed: int) -> torch.Tensor:
    """Token ids (rows, length) at random: what is computed does not depend on them."""
    return torch.randint(1000, 20000, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def cost(call: Callable[[torch.Tensor], object], prompts) -> tuple[list[float], float]:
    """Return the seconds of each call, and how many MB the first one took at most beyond what was there before (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is no part of it
    before = resident("VmRSS")
    if SUFFIX:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    first, _ = timed(lambda: call(prompts[0]))
    peak = torch.cuda.max_memory_allocated() / 2**20 if SUFFIX else resident("VmHWM")
    return [first, *(timed(lambda prompt=prompt: call(prompt))[0] for prompt in prompts[1:])], peak - before


def resident(name: str) -> float:
    """MB of the process now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def with_vllm(model, tokenizer, options, found, keep) -> None:
    """The same cases, each with prompts of its own that the engine has not seen."""
    sizes = [(length, count) for length in options.prompts for count in options.branches]
    cases = [
        {"key": [length, count], "prompt": drawn(1, length, 100 * length + 10 * count + repeat)[0].tolist(),
         "branches": drawn(count, BRANCH, count).tolist()}
        for length, count in sizes if ("vLLM", length, count) not in found for repeat in range(options.repeats)
    ]  # fmt: skip
    if not cases:
        return
    task = {"dtype": options.dtype, "new": options.new, "cases": cases,
            "longest": max(options.prompts) + BRANCH + options.new}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file, script = Path(folder) / "task.json", Path(folder) / "run.py"
        merged = save_merged(model, tokenizer, Path(folder) / "merged")
        file.write_text(json.dumps(task))
        script.write_text(VLLM)
        # one process: on few cores vLLM's engine process would compete with the one that waits for it
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
        done = subprocess.run(
            [options.vllm_python, script, merged, file], env=environment, capture_output=True, text=True, timeout=900
        )
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["found"')]
    for length, count in sizes:
        if seconds := [one for _, key, one in told if key == [length, count]]:
            keep("vLLM", length, count, seconds, None)
    if done.returncode:
        print(f"vLLM ended with {done.returncode}\n{done.stderr[-3000:]}", file=sys.stderr)


def show(options, found) -> None:
    """A row for each case: seconds, the others' over ``branch``'s in brackets, and memory."""
    ways = [way for way in ("branch", "separate", "batch", "vLLM") if any(key[0] == way for key in found)]
    rows = []
    for length in options.prompts:
        for count in options.branches:
            ours = statistics.median(found["branch", length, count]["seconds"])
            row = [str(length), str(count)]
            for one in (found.get((way, length, count)) for way in ways):
                row.append("" if one is None else seconds_of(one, ours))
            for one in (found.get((way, length, count)) for way in ways if way != "vLLM"):
                row.append(f"{'~' * (one['reckoned'] and one['way'] == 'batch')}{one['memory']:.0f}")
            rows.append(row)
    columns = ["prompt", "branches", *(f"{way}, s" for way in ways), *(f"{way}, MB" for way in ways if way != "vLLM")]
    if options.scratch:
        print("\n".join(" | ".join(row) for row in [columns, *rows]))
        return
    publish(
        "branches",
        "Branches of one prompt",
        columns,
        rows,
        f"{options.dtype}, greedy, {BRANCH} tokens a branch and {options.new} new ones; medians, one run from 4,096 tokens on; in "
        "brackets over that of branch. "
        f"`separate`: a call of `generate` for each branch, {FEW} of them timed; `batch`: one call with all whole prompts; both "
        "with ~ where part was timed and the rest reckoned. vLLM with prefix caching, the prompt sent first. MB: the peak of the "
        "process beyond the loaded model; vLLM takes its pool beforehand.",
        list(found.values()),
    )


def seconds_of(one, ours: float) -> str:
    middle = statistics.median(one["seconds"])
    mark = "~" if one["reckoned"] else ""
    return f"{mark}{middle:.1f}" + ("" if one["way"] == "branch" else f" ({mark}{middle / ours:.1f})")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
