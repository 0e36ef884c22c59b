"""What a training step costs on packed trees, against plain paths of the same trees: seconds and peak memory.

The default base with its own LoRA settings, forward and backward. Paths come both ways that one would train on them: all
of a row's in one padded batch, and one by one without padding. The answers are a file that you name.
"""

import ctypes
import gc
import random
from pathlib import Path

import torch
from common import interleaved, on_the_cpu_alone, parser, publish, ratios, spread, timed

from hf_apar.checkpoints.loading import load_base
from hf_apar.data.distillation.distill import read_answers
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.tokens import add_control_tokens
from hf_apar.training.lora import add_lora
from hf_apar.training.mixture import training_mixture
from hf_apar.training.rows.collator import DataCollatorForApar, pack, path_rows
from hf_apar.training.rows.features import tree_features

M_MMAP_THRESHOLD = -3  # malloc.h
WAYS = ("packed trees", "paths, a batch", "paths, one by one")
COLUMNS = ["ms a tree, packed", "batch of paths / packed", "paths one by one / packed", *(f"MB, {way}" for way in WAYS)]


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(dtype="float32")
    options.add_argument(
        "answers", type=Path, help='JSON Lines with "prompt" and "response", as hf-apar distill writes them'
    )
    options.add_argument("--limit", type=int, default=24, help="trees of each set")
    options.add_argument("--tokens", type=int, default=1024, help="of a packed row")
    options.add_argument(
        "--threads",
        type=int,
        nargs="*",
        default=[1, 2, 4, 8, 16],
        help="of the synthetic trees; none leaves their table as it is",
    )
    options = options.parse_args()
    on_the_cpu_alone("the memory that this counts is the process's own")
    answers = read_answers(options.answers)
    if not answers:
        raise SystemExit(f"{options.answers} is missing or empty; write it with hf-apar distill, or give another file")
    base, tokenizer = load_base()
    control = add_control_tokens(base, tokenizer)
    model = add_lora(base, control)  # trained in float32, as the recipe does
    train = training_mixture(answers, tokenizer, control, max_length=options.tokens).train
    forked = [tree for tree in train if tree.children]
    sets = {"the training set": train[: options.limit], "those that fork": forked[: options.limit]}
    works = {name: pack(trees, options.tokens) for name, trees in sets.items()}
    works |= {n: [synthetic(n, tokenizer, control)] for n in options.threads}
    runs = {name: runs_of(model, rows, int(tokenizer.eos_token_id), options.dtype) for name, rows in works.items()}
    for ways in runs.values():
        for run in ways.values():
            timed(run)  # the first run is slower
    seconds = {name: interleaved({way: lambda run=run: timed(run)[0] for way, run in ways.items()}, options.repeats)
               for name, ways in runs.items()}  # fmt: skip
    memory = {name: {way: peak_of(run) for way, run in ways.items()} for name, ways in runs.items()}
    setting = f"Forward and backward of the default base with LoRA of rank 32, {options.dtype}"
    publish(
        "training",
        "Training on packed trees and on paths",
        ["", "trees", "threads a tree", "tokens a tree", *COLUMNS],
        [[name, *shape(trees, control[0]), *cells(seconds[name], memory[name], len(trees))] for name, trees in sets.items()],
        f"{setting}, on trees of its own answers mixed for training, and on those of them that fork, in rows of {options.tokens} tokens; memory: the most above what the model takes. Aim: at least 3, and no more memory.",
        [{"set": name, "seconds": seconds[name], "memory": memory[name]} for name in sets],
    )
    if options.threads:
        publish(
            "training_threads",
            "Training, by the threads of a tree",
            ["threads", *COLUMNS],
            [[str(n), *cells(seconds[n], memory[n], 1)] for n in options.threads],
            f"{setting}, on one tree: a prompt of about 60 tokens, then threads with titles of about 8 and details of about 48.",
            [{"threads": n, "seconds": seconds[n], "memory": memory[n]} for n in options.threads],
        )


def synthetic(threads, tokenizer, control):
    """A tree of that many threads, the root among them, of random words."""
    draw = random.Random(0)

    def words(count):
        return "".join(f" {draw.choice(('oak', 'river', 'stone', 'wind', 'light'))}" for _ in range(count))

    pieces = [piece for _ in range(threads - 1) for piece in (words(8), TextThread((words(48),)))]
    tree = TextThread((*pieces, words(8)))
    return tree_features(tokenizer.encode(words(60)), tree, tokenizer, *control, int(tokenizer.eos_token_id))


def runs_of(model, rows, padding, dtype):
    """A call for each way that goes forward and backward through all ``rows``."""
    rows = [row.to_dict() for row in rows]
    targets = sum(label != -100 for row in rows for label in row["shift_labels"])
    dense, paths = (DataCollatorForApar(padding, mode=mode) for mode in ("dense", "paths"))
    batches = (
        [dense([row]) for row in rows],
        [paths([row]) for row in rows],
        [paths([path]) for row in rows for path in path_rows(row)],
    )

    def run(way):
        for batch in way:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(**batch, num_items_in_batch=targets).loss
            loss.backward()
        model.zero_grad()

    return {name: lambda way=way: run(way) for name, way in zip(WAYS, batches, strict=True)}


def shape(trees, fork_id):
    """How many trees, and the mean of their threads and tokens."""
    threads = sum(tree.input_ids.count(fork_id) + 1 for tree in trees)
    return [str(len(trees)), f"{threads / len(trees):.1f}", f"{sum(map(len, trees)) / len(trees):.0f}"]


def cells(seconds, memory, trees):
    packed, batch, single = WAYS
    return [
        spread([1000 * value / trees for value in seconds[packed]]),
        spread(ratios(seconds, batch, packed)),
        spread(ratios(seconds, single, packed)),
        *(f"{memory[way]:.0f}" for way in WAYS),
    ]


def peak_of(call):
    """How much memory this process takes at most while it runs ``call``, beyond what it has before, in MB. Linux alone."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(
        M_MMAP_THRESHOLD, 2**16
    )  # what is freed goes back at once and is not counted; slower, so seconds come first
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, proc(5)
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


if __name__ == "__main__":
    main()
