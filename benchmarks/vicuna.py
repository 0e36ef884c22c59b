"""How a model forks on the 80 questions of Vicuna Bench, and what that gives by the clock.

    python benchmarks/vicuna.py QUESTIONS.jsonl                      # all of it; writes docs/results.md and results.json
    python benchmarks/vicuna.py QUESTIONS.jsonl --per-category 2     # two questions of each category
    python benchmarks/vicuna.py QUESTIONS.jsonl --timed 2            # two of each on the clock, the others in batches
    python benchmarks/vicuna.py QUESTIONS.jsonl --extraction MT_BENCH.jsonl    # and ten that should not fork

QUESTIONS.jsonl is FastChat's vicuna_bench/question.jsonl (Apache-2.0): a line has ``category`` and ``turns``; it is not part
of this package. Each question is answered greedily, one at a time, by plain decoding (both control tokens banned) and by
APAR, the order swapped from one question to the next; what is not on the clock is answered in batches, which is faster and,
in bfloat16, rounds a little differently. Every answer is kept in the JSON file at once: a second call goes
on where it stopped. With --model, both files are of that model's name and stand in the working folder, unless they are
named: the default model's own stay. Nothing else should run meanwhile.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from common import DEVICE, machine
from questions import by_category, read

import hf_apar
from hf_apar.checkpoints.default_model import DEFAULT_BASE
from hf_apar.checkpoints.loading import load_base
from hf_apar.data.extraction.markdown import extract
from hf_apar.data.extraction.repetition import repeated_share
from hf_apar.text.encoding import encode_answer
from hf_apar.training.quality import distinct, false_forks, mean_nll

ROOT = Path(__file__).parents[1]
AT_ONCE = 16  # questions of a batch, where no clock runs


def main() -> None:
    options = parse()
    questions = by_category(read(options.questions), options.per_category)
    extraction = [one for one in read(options.extraction) if one.category == "extraction"] if options.extraction else []
    record = json.loads(options.json.read_text()) if options.json.is_file() else {}
    missing = [question for question in questions + extraction if question.key not in record]
    if missing:
        answer_all(*load(options), by_category(questions, options.timed), missing, record, options)
    if options.quality:
        ask_the_base(questions, record, options)
    rows, extracted = ([record[question.key] for question in some] for some in (questions, extraction))
    options.report.parent.mkdir(exist_ok=True)
    options.report.write_text(report(rows, extracted, options), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("--model", help="a folder; by default the model that the package ships")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--per-category", type=int, help="the first so many questions of each category")
    parser.add_argument("--timed", type=int, help="so many of each category alone and on the clock; default: all")
    parser.add_argument("--extraction", type=Path, help="MT-bench's question.jsonl: do its extraction questions fork?")
    parser.add_argument("--quality", action="store_true", help="let the base model answer too, and judge the answers")
    parser.add_argument("--json", type=Path, help="of the answers; default: results.json of this repository")
    parser.add_argument("--report", type=Path, help="default: docs/results.md")
    options = parser.parse_args()
    own = Path(f"vicuna-{Path(options.model).resolve().name}.json") if options.model else None
    options.json = options.json or own or ROOT / "results.json"
    options.report = options.report or (own.with_suffix(".md") if own else ROOT / "docs" / "results.md")
    return options


def load(options):
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, options.dtype)
    if options.model is None:
        model, tokenizer = hf_apar.load_default_model(dtype=dtype)
    else:
        model = hf_apar.AparModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    return model.to(DEVICE), tokenizer


def grouped(rows):
    groups = defaultdict(list)
    for row in rows:
        groups[row["category"]].append(row)
    return groups


def answer_all(model, tokenizer, timed, missing, record, options):
    alone, others = ([one for one in missing if (one in timed) is on_the_clock] for on_the_clock in (True, False))
    penalty = model.generation_config.repetition_penalty or 1.0
    for apar in (False, True) if alone else ():  # the first pass through a model pays for what later ones find ready
        generate(model, tokenizer, alone[:1], apar, max_new_tokens=8)
    for number, question in enumerate(alone):
        row = {"category": question.category, "penalty": penalty}
        for apar in (False, True) if number % 2 else (True, False):
            out, seconds = generate(model, tokenizer, [question], apar, max_new_tokens=options.max_new_tokens)
            row |= of_apar(out, 0, seconds, tokenizer) if apar else of_plain(out, 0, seconds, tokenizer)
        keep({question.key: row}, record, options)
        print(f"{len(record)} answered: {row['apar']['threads']} threads, {wall_ratio(row):.2f} by the clock", flush=True)
    for start in range(0, len(others), AT_ONCE):
        some = others[start : start + AT_ONCE]
        out, plainly = (
            generate(model, tokenizer, some, apar, max_new_tokens=options.max_new_tokens)[0] for apar in (True, False)
        )
        rows = {
            question.key: {"category": question.category, "penalty": penalty}
            | of_apar(out, place, None, tokenizer)
            | of_plain(plainly, place, None, tokenizer)
            for place, question in enumerate(some)
        }
        keep(rows, record, options)
        print(f"{len(record)} answered: {[row['apar']['threads'] for row in rows.values()]} threads", flush=True)


def keep(rows, record, options):
    record |= rows
    options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


def ask_the_base(questions, record, options):
    """What the model before its tuning answers, and how likely it finds its own answers and those of APAR."""
    base = None if options.model is None else json.loads((Path(options.model) / "adapter_config.json").read_text())
    model, tokenizer = load_base(
        DEFAULT_BASE if base is None else base["base_model_name_or_path"], dtype=getattr(torch, options.dtype)
    )
    model.to(DEVICE)
    missing = [question for question in questions if "base" not in record[question.key]]
    for start in range(0, len(missing), AT_ONCE):
        some = missing[start : start + AT_ONCE]
        prompts = [encode(tokenizer, question) for question in some]
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(DEVICE)
        out = model.generate(
            **batch, do_sample=False, max_new_tokens=options.max_new_tokens,
            repetition_penalty=record[some[0].key].get("penalty", 1.0),
        )  # fmt: skip
        answers = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for question, prompt, text in zip(some, prompts, answers, strict=True):
            row = record[question.key]
            texts = {
                "base": text,
                "apar": row["apar"]["text"],
                "plain": row["plain"]["text"],
            }
            row["base"] = {"text": text}
            row["nll"] = {
                name: mean_nll(model, [prompt], [encode_answer(tokenizer, prompt, one)]) for name, one in texts.items()
            }
        options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
        print(f"{start + len(some)} of {len(missing)} judged", flush=True)


def encode(tokenizer, question):
    return hf_apar.encode_chat(tokenizer, [{"role": "user", "content": question.text}])


def generate(model, tokenizer, questions, apar, **more):
    encoded = [encode(tokenizer, question) for question in questions]
    batch = tokenizer.pad({"input_ids": encoded}, padding_side="left", return_tensors="pt").to(DEVICE)
    start = time.perf_counter()
    out = model.generate(**batch, do_sample=False, return_dict_in_generate=True, apar=apar, **more)
    out.prompt_length = batch["input_ids"].shape[1]
    return out, time.perf_counter() - start


def of_apar(out, place, seconds, tokenizer):
    tree, stats = out.trees[place], out.stats[place]
    children = tree.threads[1:]
    apar = {
        "threads": len(tree.threads),
        "ended": bool(tree.closing_ids),
        "empty_children": sum(not thread.tokens for thread in children),
        "false_forks": false_forks(tree, tokenizer),
        "text": tree.text(tokenizer),
        **asdict(stats),
        "seconds": seconds,
    }
    return {"apar": apar}


def of_plain(out, place, seconds, tokenizer):
    new = out.sequences[place, out.prompt_length :].tolist()
    ended = tokenizer.eos_token_id in new
    new = new[: new.index(tokenizer.eos_token_id)] if ended else new  # what follows is padding
    return {"plain": {"tokens": len(new), "ended": ended, "seconds": seconds, "text": tokenizer.decode(new)}}


def steps_counted(row):
    """An answer that does not end by itself counts as one token a step, so that loops earn nothing."""
    apar = row["apar"]
    return apar["steps"] if apar["ended"] else max(apar["tokens"], apar["steps"])


def tokens_per_step(rows):
    return sum(row["apar"]["tokens"] for row in rows) / max(sum(map(steps_counted, rows)), 1)


def wall_ratio(row):
    per_token = {way: row[way]["seconds"] / max(row[way]["tokens"], 1) for way in ("plain", "apar")}
    return per_token["plain"] / per_token["apar"]


def spread(values):
    values = sorted(values)
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def share(values):
    values = list(values)
    return f"{sum(values)} ({100 * sum(values) / len(values):.0f} %)"


def median(rows, part, whole):
    return f"{statistics.median(row['apar'][part] / max(row['apar'][whole], 1) for row in rows):.2f}"


def report(rows, extracted, options):
    alone = sum(row["apar"]["seconds"] is not None for row in rows)
    lines = [
        "# Results of the default model on Vicuna Bench",
        "",
        f"Greedy, `max_new_tokens={options.max_new_tokens}`, {options.dtype}; {alone} of the {len(rows)} questions one at a time, the others",
        f"in batches of {AT_ONCE}; {machine()}.",
        "Written by `benchmarks/vicuna.py`.",
        "",
        "## Forks and steps",
        "",
        "An answer that does not end by itself counts as one token a step. Peak KV and attended tokens: medians.",
        "",
        "| category | answers | fork | end by themselves (plain) | tokens per step | peak KV / sequential | attended / sequential |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in [*grouped(rows).items(), ("**all**", rows)]:
        lines.append(
            f"| {name} | {len(group)} | {share(row['apar']['threads'] > 1 for row in group)} "
            f"| {share(row['apar']['ended'] for row in group)} ({sum(row['plain']['ended'] for row in group)}) "
            f"| {tokens_per_step(group):.2f} | {median(group, 'peak_kv', 'kv_if_sequential')} "
            f"| {median(group, 'attended', 'attended_if_sequential')} |"
        )
    lines += ["", of_the_forked(rows), *of_extraction(extracted), "", *by_the_clock(rows), *of_quality(rows)]
    return "\n".join(lines) + "\n"


def of_the_forked(rows):
    forked = [row for row in rows if row["apar"]["threads"] > 1]
    several = [row for row in rows if row["apar"]["threads"] > 5]
    if not several:
        return "No answer has five children."
    threads = statistics.fmean(row["apar"]["threads"] for row in forked)
    empty, children = (sum(values) for values in zip(*map(children_of, forked), strict=True))
    kept = sum(extract(row["plain"]["text"]).is_structured for row in forked)
    return (
        f"The answers that fork: {tokens_per_step(forked):.2f} tokens per step, {threads:.1f} threads on average, {empty} of "
        f"{children} children empty. The {len(several)} with five children or more: peak KV "
        f"{median(several, 'peak_kv', 'kv_if_sequential')} of sequential, attended tokens "
        f"{median(several, 'attended', 'attended_if_sequential')}. Plain decoding, [Fork] banned, writes {kept} of these "
        f"{len(forked)} in parts that could fork too, with details below the titles."
    )


def of_extraction(rows):
    if not rows:
        return []
    forked, ended = (
        sum(values) for values in zip(*((row["apar"]["threads"] > 1, row["apar"]["ended"]) for row in rows), strict=True)
    )
    return [
        "",
        f"Of the {len(rows)} extraction questions of MT-bench (first turns), which should not fork: forked {forked}, ended by themselves {ended}.",
    ]


LOOP = 0.3
WHOLE = ("coding", "math", "extraction")  # categories whose answers should not fork


def of_quality(rows):
    judged = [row for row in rows if "nll" in row]
    if not judged:
        return []
    children = sum(row["apar"]["threads"] - 1 for row in rows)
    wrong = sum(row["apar"]["threads"] - 1 if row["category"] in WHOLE else row["apar"]["false_forks"] for row in rows)
    lines = [
        "",
        "## Quality",
        "",
        f"False forks (an empty child, one that repeats a sibling, any in an answer of {', '.join(WHOLE)}): {wrong} of {children}",
        f"({wrong / max(children, 1):.1%}). Likelihood: mean negative log-likelihood of a token under the base model, in nats, {len(judged)} answers.",
        "",
        "| answers | likelihood | distinct pairs of words | distinct runs of four |",
        "|---|---|---|---|",
    ]
    for name, way in (("APAR", "apar"), ("the tuned model, plainly", "plain"), ("the base model's own", "base")):
        texts = [row[way]["text"] for row in judged]
        lines.append(f"| {name} | {likelihood(judged, way):.3f} | {distinct(texts, 2):.3f} | {distinct(texts, 4):.3f} |")
    straight = [row for row in judged if repeated_share(row["base"]["text"]) <= LOOP]
    if straight:
        lines += [
            "",
            f"What loops is likely: the base model's own answers to {len(judged) - len(straight)} of the questions repeat more than "
            f"{LOOP} of their runs of five words, of APAR's {sum(repeated_share(row['apar']['text']) > LOOP for row in judged)} do. "
            f"On the other {len(straight)} questions: {likelihood(straight, 'apar'):.3f} for APAR, {likelihood(straight, 'plain'):.3f} "
            f"for the tuned model plainly, {likelihood(straight, 'base'):.3f} for the base model's own.",
        ]
    return lines


def likelihood(rows, way):
    return statistics.fmean(row["nll"][way] for row in rows)


def children_of(row):
    return row["apar"]["empty_children"], row["apar"]["threads"] - 1


def by_the_clock(rows):
    rows = [row for row in rows if row["apar"]["seconds"] is not None]
    if not rows:
        return []
    lines = [
        "## By the clock",
        "",
        "Seconds per token of `model.generate`, with the same weights and both control tokens banned, over those of APAR,",
        "interleaved in one run. In all: the sums over all answers, tokens per step as they were, loops included. By answer:",
        "median and quartiles.",
        "",
        "| answers | number | wall ratio in all | tokens per step in all | quotient | wall ratio by answer | quotient by answer |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in (
        ("all", rows),
        ("that fork", [row for row in rows if row["apar"]["threads"] > 1]),
        ("that fork and end by themselves", [row for row in rows if row["apar"]["threads"] > 1 and row["apar"]["ended"]]),
        ("that do not fork", [row for row in rows if row["apar"]["threads"] == 1]),
    ):
        if group:
            seconds, tokens = ({way: total(group, way, name) for way in ("plain", "apar")} for name in ("seconds", "tokens"))
            wall = (seconds["plain"] / tokens["plain"]) / (seconds["apar"] / tokens["apar"])
            steps = tokens["apar"] / sum(row["apar"]["steps"] for row in group)
            walls = [wall_ratio(row) for row in group]
            quotients = [wall_ratio(row) * row["apar"]["steps"] / max(row["apar"]["tokens"], 1) for row in group]
            lines.append(
                f"| {name} | {len(group)} | {wall:.2f} | {steps:.2f} | {wall / steps:.2f} | {spread(walls)} | {spread(quotients)} |"
            )
    return lines


def total(rows, way, name):
    return sum(row[way][name] for row in rows)


if __name__ == "__main__":
    main()
