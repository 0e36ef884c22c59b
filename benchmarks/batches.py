"""Tokens a second for batches of questions: APAR, alone and with drafts, against ``generate`` with the same weights."""

from collections import defaultdict

from common import Bars, Kept, encode, load, parser, publish, spread, timed, weights
from questions import add_questions, asked, evenly

import hf_apar
from hf_apar.evaluation.figures import FEW
from hf_apar.evaluation.statistics import quotient
from hf_apar.speculation.medusa import MedusaDrafts

WAYS = ("generate", "APAR", "APAR, Medusa heads")


def main() -> None:
    options = parser(__doc__)
    add_questions(options)
    options.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16])
    options.add_argument("--number", type=int, nargs="*", default=[16], help="questions, evenly drawn: of all batch sizes or of each")
    options.add_argument("--max-new-tokens", type=int, default=256)
    options = options.parse_args()
    name, questions = asked(options.questions)
    numbers = options.number * len(options.batches) if len(options.number) == 1 else options.number
    if len(numbers) != len(options.batches):
        raise SystemExit(f"--number: one for all sizes of a batch, or one for each of the {len(options.batches)}")
    model, tokenizer = load(options.dtype)
    drafts = {"proposer": MedusaDrafts(hf_apar.load_default_heads())}
    ways = dict(zip(WAYS, ({}, {"apar": True}, {"apar": True, **drafts}), strict=True))
    kept, rows, data = Kept("batches"), [], {}
    for size, number in zip(options.batches, numbers, strict=True):
        runs, chosen = [], evenly(questions, number)
        for start in range(0, len(chosen), size):
            group, order = chosen[start : start + size], list(ways) if len(runs) % 2 else list(reversed(ways))

            def run(group=group, order=order):
                inputs = encode(tokenizer, [question.text for question in group])
                for way in ways.values() if kept.cold else ():
                    measure(model, tokenizer, inputs, way, 8)
                return {way: measure(model, tokenizer, inputs, ways[way], options.max_new_tokens) for way in order}

            key = [weights(options.dtype), size, options.max_new_tokens, [question.key for question in group]]
            runs.append({"categories": [question.category for question in group], **kept.of(key, run)})
            print(size, [round(ratio([runs[-1]], way), 2) for way in WAYS[1:]], flush=True)
        data[f"batch {size}"] = runs
        rows.append([str(size), str(len(chosen)), *(f"{speed(runs, way):.1f}" for way in WAYS), *cells(runs)])
    publish(
        "batches" if options.dtype == "bfloat16" else f"batches_{options.dtype}",
        "Batches of questions" if options.dtype == "bfloat16" else f"Batches of questions in {options.dtype}",
        ["batch", "questions", *(f"{way}, tokens/s" for way in WAYS), "APAR / generate in all", "with heads, in all", "APAR, batch by batch",
         "batches that fork, in all", "with heads"],
        rows,
        f"{weights(options.dtype)}, greedy, questions of {name}, {options.max_new_tokens} new tokens at most; each "
        f"batch once each way, in turn. In all: sums of tokens over sums of seconds, of {FEW} runs and "
        f"more with a 95 % interval. {by_category(data.get('batch 1', []))}",
        data,
        Bars(
            "tokens a second, APAR / generate, batch by batch",
            {size: [ratio([run], "APAR") for run in runs] for size, runs in data.items()},
        ),
    )


def measure(model, tokenizer, inputs, way, limit):
    """The tokens of all answers, the seconds they took, and whether any forks."""
    seconds, out = timed(
        lambda: model.generate(**inputs, **way, do_sample=False, max_new_tokens=limit, return_dict_in_generate=True)
    )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    forks = "apar" in way and any(len(tree.threads) > 1 for tree in out.trees)
    return int((new != tokenizer.eos_token_id).sum()), seconds, forks


def cells(runs):
    forked = [run for run in runs if run["APAR"][2]]
    both = [in_all(forked, way) if forked else "" for way in WAYS[1:]]
    return [*(in_all(runs, way) for way in WAYS[1:]), spread([ratio([run], "APAR") for run in runs]), *both]


def in_all(runs, way):
    """The same, with a 95 % interval where there are enough runs for one."""
    found = quotient([run[way][:2] for run in runs], [run["generate"][:2] for run in runs])
    return str(found) if len(runs) >= FEW else f"{found.value:.2f}"


def ratio(runs, way):
    """How many times as many tokens a second ``way`` wrote as ``generate``, over all ``runs``."""
    return speed(runs, way) / speed(runs, "generate")


def speed(runs, way):
    return sum(run[way][0] for run in runs) / sum(run[way][1] for run in runs)


def by_category(runs):
    """APAR against ``generate`` for one question at a time, by category, alone and with heads."""
    groups = defaultdict(list)
    for run in runs:
        groups[run["categories"][0]].append(run)
    if not groups:
        return ""
    told = ", ".join(f"{name} {' and '.join(f'{ratio(group, way):.2f}' for way in WAYS[1:])}" for name, group in groups.items())
    return f"One at a time, by category, without and with heads: {told}."


if __name__ == "__main__":
    main()
