"""How the cost of a step grows with context, threads and batch: forks are forced, so that any model will do."""

import statistics
import time

import torch
from common import ROOT, SUFFIX, load, parser, publish, weights

import hf_apar
from hf_apar.speculation.proposer import Draft, Proposer

STEPS = 12  # timed steps, once all threads live


class Clock(Proposer):
    """A proposer without drafts that notes when each step is planned."""

    def __init__(self):
        self.times = []

    def propose(self, rows, limits):
        self.times.append(time.perf_counter())
        return [[Draft()] * len(row.live) for row in rows]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--contexts", type=int, nargs="*", default=[128, 1024, 4096])
    options.add_argument("--threads", type=int, nargs="*", default=[1, 8, 32])
    options.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    options = options.parse_args()
    model, _ = load(options.dtype)
    data = []
    for batch in options.batches:
        for context in options.contexts:
            for threads in options.threads:
                if batch * threads * context > 64 * 4096:
                    continue
                step, kv = measure(model, batch, context, threads)
                data.append({"batch": batch, "context": context, "threads": threads, "ms": step, "kv": kv})
                print(data[-1], flush=True)
    rows = [
        [str(one["batch"]), str(one["context"]), str(one["threads"]), f"{one['ms']:.0f}",
         f"{one['ms'] / (one['batch'] * one['threads']):.1f}", str(one["kv"])]
        for one in data
    ]  # fmt: skip
    publish(
        "growth",
        "How the cost of a step grows",
        ["batch", "context", "threads a row", "a step, ms", "ms a token", "peak KV of a row, slots"],
        rows,
        f"{weights(options.dtype)}; forks are forced, then {STEPS} steps timed; medians. ![curves](growth{SUFFIX}.png)",
        data,
    )
    plot(data)


def measure(model, batch, context, threads):
    """The median time of a step of ``threads`` live threads a row, and the slots that a row needs for them."""
    torch.manual_seed(0)
    ids = torch.randint(1000, 20000, (batch, context), device=model.device)
    clock = Clock()
    steps = 2 * (threads - 1) + STEPS + 1  # the root forks at every other step; from then on further children wait
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        apar=hf_apar.AparConfig(max_threads=threads, max_depth=2 if threads > 1 else 1, fork_bias=1e4),
        eos_token_id=None,
        do_sample=False,
        repetition_penalty=1.0,
        max_new_tokens=sum(min(threads, 1 + step // 2) for step in range(1, steps + 1)),
        return_dict_in_generate=True,
        proposer=clock,
    )
    assert out.stats[0].peak_threads == threads
    gaps = [1000 * (after - before) for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return statistics.median(gaps[-STEPS + 1 :]), max(stats.peak_kv for stats in out.stats)


def plot(data):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for batch in dict.fromkeys(one["batch"] for one in data):
        for context in dict.fromkeys(one["context"] for one in data):
            chosen = [one for one in data if one["batch"] == batch and one["context"] == context]
            if len(chosen) > 1:
                label = f"batch {batch}, context {context}"
                axes.plot([one["threads"] for one in chosen], [one["ms"] for one in chosen], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="threads a row", ylabel="a step, ms")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / f"growth{SUFFIX}.png", dpi=120)


if __name__ == "__main__":
    main()
