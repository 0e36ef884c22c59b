"""How the default model forks on the 80 questions of Vicuna Bench, and what that gives by the clock.

    python benchmarks/vicuna.py QUESTIONS.jsonl                   # all of it; writes docs/results.md and results.json
    python benchmarks/vicuna.py QUESTIONS.jsonl --timed 2         # two timed questions of each category

QUESTIONS.jsonl is FastChat's vicuna_bench/question.jsonl (Apache-2.0): a line has ``category`` and ``turns``; it is not part
of this package. Two runs, greedy both: the first counts steps, tokens and slots over all questions, in batches, since the
text of an answer does not depend on them; the second times questions one by one, plain decoding and APAR in turn, the order
swapped from one question to the next. Each answer is kept in the JSON file at once: a second call goes on where it stopped.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

import hf_apar

ROOT = Path(__file__).parents[1]


def main() -> None:
    options = parse()
    if not options.questions.is_file():
        sys.exit(
            f"{options.questions} is missing: name FastChat's vicuna_bench question file, JSON Lines with category and turns"
        )
    questions = [json.loads(line) for line in options.questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    transformers.utils.logging.disable_progress_bar()
    if options.model:
        model = hf_apar.AparModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    else:
        model, tokenizer = hf_apar.load_default_model(dtype=getattr(torch, options.dtype))
    record = json.loads(options.json.read_text()) if options.json.is_file() else {"counted": {}, "timed": {}}
    count(model, tokenizer, questions[: options.limit], record, options)
    chosen = [one for group in by_category(questions[: options.limit]).values() for one in group[: options.timed]]
    time_both(model, tokenizer, chosen, record, options)
    options.report.parent.mkdir(exist_ok=True)
    options.report.write_text(report(record, questions[: options.limit], options), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("--model", help="a folder; by default the model that the package ships")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--limit", type=int, default=None, help="the first so many questions only")
    parser.add_argument("--timed", type=int, default=10, help="timed questions of each category")
    parser.add_argument("--json", type=Path, default=ROOT / "results.json")
    parser.add_argument("--report", type=Path, default=ROOT / "docs" / "results.md")
    return parser.parse_args()


def by_category(questions):
    groups = defaultdict(list)
    for question in questions:
        groups[question["category"]].append(question)
    return groups


def key(question):
    return str(question.get("question_id", question["turns"][0]))


def save(record, options):
    options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


def generate(model, tokenizer, questions, options, **more):
    """Decode ``questions`` as one batch padded on the left; return the output and its seconds."""
    prompts = [hf_apar.encode_chat(tokenizer, [{"role": "user", "content": one["turns"][0]}]) for one in questions]
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    start = time.perf_counter()
    settings = {"max_new_tokens": options.max_new_tokens, "do_sample": False, "return_dict_in_generate": True} | more
    out = model.generate(**inputs, **settings)
    return out, time.perf_counter() - start


def count(model, tokenizer, questions, record, options):
    missing = [question for question in questions if key(question) not in record["counted"]]
    for start in range(0, len(missing), options.batch_size):
        batch = missing[start : start + options.batch_size]
        out, _ = generate(model, tokenizer, batch, options, apar=True)
        for question, tree, stats in zip(batch, out.trees, out.stats, strict=True):
            record["counted"][key(question)] = {
                "category": question["category"],
                "threads": len(tree.threads),
                "ended": all(thread.finish_reason == "eos" for thread in tree.threads),
                "empty_children": sum(not thread.tokens for thread in tree.threads[1:]),
                "text": tree.text(tokenizer),
                **asdict(stats),
            }
        save(record, options)
        print(f"counted {len(record['counted'])} of {len(questions)}", flush=True)


def time_both(model, tokenizer, questions, record, options):
    for number, question in enumerate(question for question in questions if key(question) not in record["timed"]):
        if number == 0:  # the first pass through a model pays for what later ones find ready
            for more in ({}, {"apar": True}):
                generate(model, tokenizer, [question], options, **more, max_new_tokens=8)
        row = {"category": question["category"]}
        for way in ("plain", "apar") if number % 2 else ("apar", "plain"):
            out, seconds = generate(model, tokenizer, [question], options, **({"apar": True} if way == "apar" else {}))
            if way == "apar":
                tokens, steps = out.stats[0].tokens, out.stats[0].steps
                row["threads"], row["ended"] = len(out.trees[0].threads), bool(out.trees[0].closing_ids)
            else:
                new = out.sequences[0].tolist()
                prompt = len(hf_apar.encode_chat(tokenizer, [{"role": "user", "content": question["turns"][0]}]))
                tokens = steps = len([token for token in new[prompt:] if token != tokenizer.eos_token_id])
            row[way] = {"seconds": seconds, "tokens": tokens, "steps": steps}
        record["timed"][key(question)] = row
        save(record, options)
        print(f"timed {len(record['timed'])} of {len(questions)}", flush=True)


def spread(values):
    values = sorted(values)
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def tokens_per_step(rows):
    """Tokens over steps in all; an answer that does not end by itself counts as 1, so that loops earn nothing."""
    steps = sum(row["steps"] if row["ended"] else max(row["tokens"], row["steps"]) for row in rows)
    return sum(row["tokens"] for row in rows) / max(steps, 1)


def report(record, questions, options):
    rows = [record["counted"][key(question)] for question in questions]
    lines = [
        "# Results of the default model on Vicuna Bench",
        "",
        f"Greedy, `max_new_tokens={options.max_new_tokens}`, {options.dtype}, batch 1 for all times; {platform.machine()} CPU,",
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, PyTorch {torch.__version__.split('+')[0]},"
        f" transformers {transformers.__version__}. Written by `benchmarks/vicuna.py`.",
        "",
        "## Forks and steps",
        "",
        "An answer that does not end by itself counts as 1 token a step.",
        "",
        "| category | answers | fork | end by themselves | tokens per step | peak KV / sequential | attended / sequential |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in [*by_category(rows).items(), ("**all**", rows)]:
        lines.append(
            f"| {name} | {len(group)} | {share(row['threads'] > 1 for row in group)} "
            f"| {share(row['ended'] for row in group)} | {tokens_per_step(group):.2f} | {ratio(group, 'peak_kv', 'kv_if_sequential')} "
            f"| {ratio(group, 'attended', 'attended_if_sequential')} |"
        )
    lines += ["", of_the_forked(rows), "", "## By the clock", ""]
    lines += [
        "Time per token of `model.generate`, with the same weights and both control tokens banned, over that of APAR: median",
        "and quartiles of the ratios question by question, interleaved in one run.",
        "",
        "| questions | number | wall ratio | tokens per step | wall ratio / tokens per step |",
        "|---|---|---|---|---|",
    ]
    timed = list(record["timed"].values())
    for name, group in (
        ("all", timed),
        ("answers that fork", [row for row in timed if row["threads"] > 1]),
        ("answers that do not", [row for row in timed if row["threads"] == 1]),
    ):
        if group:
            walls = [wall_ratio(row) for row in group]
            steps = [row["apar"]["tokens"] / row["apar"]["steps"] for row in group]
            each = [wall / step for wall, step in zip(walls, steps, strict=True)]
            lines.append(f"| {name} | {len(group)} | {spread(walls)} | {spread(steps)} | {spread(each)} |")
    return "\n".join(lines) + "\n"


def of_the_forked(rows):
    forked = [row for row in rows if row["threads"] > 1]
    several = [row for row in rows if row["threads"] >= 5]
    if not several:
        return "No answer has five threads."
    threads = statistics.fmean(row["threads"] for row in forked)
    empty, children = sum(row["empty_children"] for row in forked), sum(row["threads"] - 1 for row in forked)
    return (
        f"The answers that fork: {tokens_per_step(forked):.2f} tokens per step, {threads:.1f} threads on average, {empty} of "
        f"{children} children empty. Those with five threads or more: peak KV {ratio(several, 'peak_kv', 'kv_if_sequential')} "
        f"of sequential, attended tokens {ratio(several, 'attended', 'attended_if_sequential')} (medians)."
    )


def wall_ratio(row):
    per_token = {way: row[way]["seconds"] / max(row[way]["tokens"], 1) for way in ("plain", "apar")}
    return per_token["plain"] / per_token["apar"]


def share(values):
    values = list(values)
    return f"{sum(values)} ({100 * sum(values) / len(values):.0f} %)"


def ratio(rows, part, whole):
    return f"{statistics.median(row[part] / max(row[whole], 1) for row in rows):.2f}"


if __name__ == "__main__":
    main()
