"""What speculation in every thread gives: plain decoding, APAR and their drafts, one question after the other."""

import statistics

from common import Bars, Kept, encode, load, parser, publish, timed, weights
from questions import add_questions, asked, in_turn

import hf_apar
from hf_apar.speculation.lookup import PromptLookup
from hf_apar.speculation.medusa import MedusaDrafts

LOOKUP = 5


def main() -> None:
    options = parser(__doc__)
    add_questions(options)
    options.add_argument("--each", type=int, default=2, help="questions of each category")
    options.add_argument("--batch", type=int, default=1, help="questions decoded together")
    options.add_argument("--max-new-tokens", type=int, default=256)
    options = options.parse_args()
    name, questions = asked(options.questions)
    chosen = in_turn(questions, options.each)
    model, tokenizer = load(options.dtype)
    heads = MedusaDrafts(hf_apar.load_default_heads())
    ways = {
        "generate": {},
        "generate, prompt lookup": {"prompt_lookup_num_tokens": LOOKUP},
        "APAR": {"apar": True},
        "APAR, prompt lookup": {"apar": True, "proposer": PromptLookup(LOOKUP)},
        "APAR, Medusa heads": {"apar": True, "proposer": heads},
    }
    if options.batch > 1:
        del ways["generate, prompt lookup"]  # which takes one sequence
    groups = [chosen[start : start + options.batch] for start in range(0, len(chosen), options.batch)]
    kept, records = Kept("speculation"), []
    for number, group in enumerate(groups):

        def run(number=number, group=group):
            inputs = encode(tokenizer, [question.text for question in group])
            for way in ways.values() if kept.cold else ():
                decode(model, tokenizer, inputs, way, 8)
            order = list(ways) if number % 2 else list(reversed(ways))
            return {way: decode(model, tokenizer, inputs, ways[way], options.max_new_tokens) for way in order}

        key = [weights(options.dtype), options.max_new_tokens, [question.key for question in group]]
        records.append({"categories": [question.category for question in group], **kept.of(key, run)})
        print(records[-1]["categories"], {way: round(records[-1][way]["ms"], 1) for way in ways}, flush=True)
    file = "speculation" if options.batch == 1 else f"speculation_{options.batch}"
    forks = [one for one in records if one["APAR"]["forked"]]
    rows = [row(records, forks, way) for way in ways]
    title = "Speculation in every thread" + ("" if options.batch == 1 else f", batches of {options.batch}")
    publish(
        file,
        title,
        ["way", "tokens a step", "tokens fed a step", "accepted a draft", "ms a token", "generate / it", "where answers fork"],
        rows,
        f"{weights(options.dtype)}, greedy, {options.max_new_tokens} new tokens at most, {len(chosen)} questions of {name}, "
        f"{options.each} of each category, {len(forks)} of {len(records)} runs with forks. Ratios of time per token: medians "
        f"over the runs, with quartiles. {by_category(records)}",
        records,
        Bars("generate / it, seconds a token", {way: gains(records, way) for way in ways}),
    )


def decode(model, tokenizer, inputs, way, limit):
    seconds, out = timed(
        lambda: model.generate(**inputs, do_sample=False, max_new_tokens=limit, return_dict_in_generate=True, **way)
    )
    tokens = int((out.sequences[:, inputs["input_ids"].shape[1] :] != tokenizer.eos_token_id).sum())
    found = {"seconds": seconds, "tokens": tokens, "ms": 1000 * seconds / tokens}
    if way.get("apar"):
        sampled = sum(len(thread.sampled_ids) for tree in out.trees for thread in tree.threads)
        found |= {name: sum(getattr(one, name) for one in out.stats) for name in ("drafts", "proposed", "accepted")}
        found["steps"] = max(stats.steps for stats in out.stats)
        found["fed"] = sampled - found["accepted"] + found["proposed"]
        found["forked"] = any(len(tree.threads) > 1 for tree in out.trees)
    return found


def row(records, forks, name):
    mine = [record[name] for record in records]
    tokens = sum(one["tokens"] for one in mine)
    cells = [
        name,
        "",
        "",
        "",
        f"{1000 * sum(one['seconds'] for one in mine) / tokens:.1f}",
        gain(records, name),
        gain(forks, name),
    ]
    if "steps" in mine[0]:
        steps, drafts = (sum(one[what] for one in mine) for what in ("steps", "drafts"))
        cells[1] = f"{tokens / steps:.2f}"
        cells[2] = f"{sum(one['fed'] for one in mine) / steps:.1f}"
        cells[3] = f"{sum(one['accepted'] for one in mine) / drafts:.2f}" if drafts else ""
    return cells


def gain(records, name):
    return quartiles(gains(records, name))


def gains(records, name):
    return [record["generate"]["ms"] / record[name]["ms"] for record in records]


def quartiles(values):
    if not values:
        return ""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def by_category(records):
    """APAR with heads against APAR alone, by category, for runs of one question."""
    if any(len(set(record["categories"])) > 1 for record in records):
        return ""
    found = {}
    for record in records:
        found.setdefault(record["categories"][0], []).append(record["APAR"]["ms"] / record["APAR, Medusa heads"]["ms"])
    parts = ", ".join(f"{category} {statistics.median(values):.2f}" for category, values in found.items())
    return f"Heads against APAR alone by category: {parts}."


if __name__ == "__main__":
    main()
