"""What :func:`hf_apar.prepacked` gives on a CPU: a step by its width, and whole answers."""

import statistics
from contextlib import nullcontext

import torch
from common import Kept, encode, load, on_the_cpu_alone, parser, publish, spread, timed
from questions import add_questions, asked, in_turn

import hf_apar
from hf_apar.speculation.medusa import MedusaDrafts

WIDTHS = (1, 2, 3, 4, 8, 16, 32, 48, 64)
WAYS = ("float32", "float32, prepacked", "bfloat16")
LAID_OUT = WAYS[:2]
CALLS = 10


def main() -> None:
    options = parser(__doc__)
    add_questions(options)
    options.add_argument("--each", type=int, default=1, help="questions of each category")
    options.add_argument("--max-new-tokens", type=int, default=256)
    options.add_argument("--no-steps", action="store_true", help="leave the table of widths as it is")
    options = options.parse_args()
    on_the_cpu_alone("weights are prepacked for CPUs")
    models = {dtype: load(dtype, prepack=False) for dtype in ("float32", "bfloat16")}
    if not options.no_steps:
        steps_by_width(models, options.repeats)
    whole_answers(models, options)


def ready(models, way):
    """The model of a way, and the block that it runs in."""
    model, tokenizer = models[way.split(",")[0]]
    return model, tokenizer, hf_apar.prepacked(model) if "prepacked" in way else nullcontext()


def steps_by_width(models, repeats: int) -> None:
    found = {(way, width): [] for way in WAYS for width in WIDTHS}
    for repeat in range(repeats):
        for way in WAYS if repeat % 2 else reversed(WAYS):
            model, _, block = ready(models, way)
            with block:
                for width in WIDTHS:
                    ids = torch.randint(100, 4000, (1, width))
                    model(ids, use_cache=False)
                    found[way, width] += [1000 * timed(lambda: model(ids, use_cache=False))[0] for _ in range(CALLS)]  # noqa: B023
    publish(
        "widths",
        "A step by its width, and prepacked weights",
        ["tokens", *(f"{way}, ms" for way in WAYS), "float32 / prepacked"],
        [
            [str(width), *(quartiles(found[way, width]) for way in WAYS),
             f"{statistics.median(found['float32', width]) / statistics.median(found['float32, prepacked', width]):.2f}"]
            for width in WIDTHS
        ],
        f"The forward pass of the default model over so many tokens, without a cache: medians of {CALLS} calls in each of "
        f"{repeats} passes, with quartiles. `hf_apar.prepacked` serves products of 4 to 48 rows.",
        {f"{way}, {width}": values for (way, width), values in found.items()},
    )  # fmt: skip


def quartiles(values) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def whole_answers(models, options) -> None:
    named, questions = asked(options.questions)
    chosen, kept = in_turn(questions, options.each), Kept("prepacking")
    drafts = MedusaDrafts(hf_apar.load_default_heads())
    methods = {"generate": {}, "APAR": {"apar": True}, "APAR, Medusa heads": {"apar": True, "proposer": drafts}}
    runs = []
    for number, question in enumerate(chosen):

        def run(number=number, question=question):
            measured = {}
            for way in LAID_OUT if number % 2 else reversed(LAID_OUT):
                model, tokenizer, block = ready(models, way)
                inputs = encode(tokenizer, [question.text])
                with block:
                    model(torch.zeros(1, 8, dtype=torch.long))  # makes the copies
                    for name, method in methods.items():
                        measured[f"{way}: {name}"] = answer(model, inputs, method, options.max_new_tokens)
            return measured

        runs.append(kept.of([options.max_new_tokens, question.key], run))
        print(number, {way: round(values[0], 1) for way, values in runs[-1].items()}, flush=True)
    forked = [run for run in runs if run["float32: APAR"][2]]
    rows, plain = [], [f"{way}: generate" for way in LAID_OUT]
    for name in methods:
        for way in LAID_OUT:
            one = f"{way}: {name}"
            rows.append(
                [name, way, f"{speed(runs, one):.1f}", f"{speed(runs, one) / speed(runs, *plain):.2f}",
                 f"{speed(forked, one) / speed(forked, *plain):.2f}" if forked else "",
                 spread([speed([run], one) / speed([run], *plain) for run in runs])]
            )  # fmt: skip
    publish(
        "prepacking",
        "Whole answers, and prepacked weights",
        ["way", "weights", "tokens/s", "over generate, in all", "where answers fork", "question by question"],
        rows,
        f"float32, greedy, one question at a time, {options.max_new_tokens} new tokens at most, {len(runs)} questions of "
        f"{named}, {options.each} of each category, {len(forked)} answers with forks. Over `generate` with either weights, whose "
        "steps have one row, so that it runs at one speed: sums of tokens over sums of seconds. The copies were made before, which "
        "takes about a second.",
        runs,
    )


def answer(model, inputs, method, limit):
    """Seconds, tokens, and whether the answer forks."""
    seconds, out = timed(
        lambda: model.generate(**inputs, **method, do_sample=False, max_new_tokens=limit, return_dict_in_generate=True)
    )
    new = int((out.sequences[:, inputs["input_ids"].shape[1] :] != model.generation_config.eos_token_id).sum())
    return [seconds, new, "apar" in method and len(out.trees[0].threads) > 1]


def speed(runs, *ways):
    return sum(run[way][1] for run in runs for way in ways) / sum(run[way][0] for run in runs for way in ways)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
