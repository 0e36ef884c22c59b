"""APAR on stock vLLM against plain decoding with the same weights and both control tokens banned, in one engine.

Run it where vLLM is: `.venv-vllm/bin/python benchmarks/serving.py QUESTIONS.jsonl ...`, with nothing else running; then
`benchmarks/serving_plot.py` where matplotlib is.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no process that spins beside the one that computes

import torch
from questions import read
from vllm import AsyncEngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

import hf_apar
from hf_apar.checkpoints.export import save_merged
from hf_apar.serving.admission import Eager, EqualShare, FixedCap
from hf_apar.serving.vllm import set_policy, stats

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "benchmarks" / "output" / "serving.json"
LENGTH, BLOCK = 1024, 32
POLICIES = {"eager": Eager(), "at most 3 each": FixedCap(3), "equal share": EqualShare()}


@dataclass
class Told:
    """What a client saw of one answer; times in seconds."""

    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0
    threads: int = 1

    @property
    def per_token(self) -> float:
        return self.seconds / max(self.tokens, 1)


@dataclass
class Pass:
    """One pass of some clients at once."""

    told: list[Told]
    seconds: float
    blocks: int

    @property
    def throughput(self) -> float:
        return sum(one.tokens for one in self.told) / self.seconds

    @property
    def per_token(self) -> float:
        return statistics.mean(one.per_token for one in self.told)

    @property
    def first(self) -> float:
        return statistics.mean(one.first for one in self.told)


class Engine:
    def __init__(self, folder, dtype, penalty, blocks=None):
        os.environ["APAR_DEFAULT"] = "0"
        arguments = AsyncEngineArgs(
            str(folder),
            dtype=dtype,
            max_model_len=LENGTH,
            block_size=BLOCK,
            max_num_seqs=256,
            num_gpu_blocks_override=blocks,
        )
        self.engine = AsyncLLM.from_engine_args(arguments)
        self.tokenizer = self.engine.get_tokenizer()
        self.numbers = count()
        self.peak = 0.0
        self.penalty = penalty

    @property
    def blocks(self):
        return self.engine.vllm_config.cache_config.num_gpu_blocks

    def params(self, apar, tokens):
        return SamplingParams(
            temperature=0.0, max_tokens=tokens, repetition_penalty=self.penalty, output_kind=RequestOutputKind.DELTA,
            extra_args={"apar": int(apar)},
        )  # fmt: skip

    async def client(self, question, apar, tokens):
        ids = hf_apar.encode_chat(self.tokenizer, [{"role": "user", "content": question}])
        told, start = Told(), time.perf_counter()
        prompt = {"type": "token", "prompt_token_ids": ids}
        async for output in self.engine.generate(prompt, self.params(apar, tokens), f"bench-{next(self.numbers)}"):
            (one,) = output.outputs
            told.tokens += len(one.token_ids)
            told.first = told.first or time.perf_counter() - start
            told.threads = len(one.tree.threads) if apar else 1
            self.peak = max(self.peak, stats.reported[0].load.kv_usage)
        told.seconds = time.perf_counter() - start
        return told

    async def run(self, questions, apar, tokens, at_once=None):
        """All questions, ``at_once`` at a time; ``apar`` may say it for each."""
        await self.engine.reset_prefix_cache()
        self.peak, start = 0.0, time.perf_counter()
        each = apar if isinstance(apar, list) else [apar] * len(questions)
        places = asyncio.Semaphore(at_once or len(questions))

        async def one(question, wanted):
            async with places:
                return await self.client(question, wanted, tokens)

        told = await asyncio.gather(*(one(*pair) for pair in zip(questions, each, strict=True)))
        return Pass(list(told), time.perf_counter() - start, round(self.peak * self.blocks))

    def close(self):
        self.engine.shutdown()


def mixed(paths):
    """The questions of all files: of each in turn, and never a category for long."""
    mixed = [question.text for group in zip(*map(read, paths), strict=False) for question in group]
    step = 7  # neighbours are of one category: walk through all of them
    return [mixed[place * step % len(mixed)] for place in range(len(mixed))]


def spread(values, digits=2):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


async def alternate(engine, questions, tokens, passes, at_once):
    found = {False: [], True: []}
    for number in range(passes):
        for apar in (False, True) if number % 2 else (True, False):
            found[apar].append(await engine.run(questions, apar, tokens, at_once))
    return found


def row(name, found):
    plain, apar = found[False], found[True]
    pairs = list(zip(apar, plain, strict=True))
    return [
        name,
        f"{statistics.median(one.throughput for one in plain):.0f}",
        f"{statistics.median(one.throughput for one in apar):.0f}",
        spread([ours.throughput / theirs.throughput for ours, theirs in pairs]),
        spread([ours.per_token / theirs.per_token for ours, theirs in pairs]),
        spread([ours.first / theirs.first for ours, theirs in pairs]),
        f"{statistics.median(one.blocks for one in plain)} / {statistics.median(one.blocks for one in apar)}",
    ]


async def compare_policies(engine, questions, options):
    """Every second request plain, the rest in threads, under each policy in turn."""
    half = [number % 2 == 0 for number in range(len(questions))]
    alone = await engine.run(questions, False, options.max_new_tokens)
    slo = 1.25 * alone.per_token
    found = []
    for number in range(options.passes):
        for name, policy in POLICIES.items() if number % 2 else reversed(POLICIES.items()):
            set_policy(policy)
            made = await engine.run(questions, half, options.max_new_tokens)
            found.append([
                name, made.throughput, statistics.mean(one.per_token for one in made.told[::2]),
                statistics.mean(one.per_token for one in made.told[1::2]),
                sum(one.per_token <= slo for one in made.told) / made.seconds,
            ])  # fmt: skip
    set_policy(EqualShare())
    return {"policies": found, "slo_ms": 1000 * slo, "alone_ms": 1000 * alone.per_token}


async def measure(folder, options, questions):
    record = {"rows": [], "scarce": [], "policies": [], "slo_ms": 0.0, "alone_ms": 0.0}
    engine = Engine(folder, options.dtype, options.repetition_penalty)
    await alternate(engine, questions[:4], 16, 1, 4)  # warm
    wanted = {}
    for at_once in options.at_once:
        some = questions[: options.single if at_once == 1 else options.rounds * at_once]
        found = await alternate(engine, some, options.max_new_tokens, options.passes, at_once)
        record["rows"].append(row(str(at_once), found))
        wanted[at_once] = max(one.blocks for one in found[False])
        print(record["rows"][-1], flush=True)
        if at_once == 1:
            wide = [place for place, told in enumerate(found[True][0].told) if told.threads >= 5]
            if wide:
                chosen = {
                    apar: [Pass([one.told[place] for place in wide], sum(one.told[place].seconds for place in wide), one.blocks)
                           for one in passes]
                    for apar, passes in found.items()
                }  # fmt: skip
                record["rows"].append(row(f"1, the {len(wide)} of {len(some)} with five threads or more", chosen))
                print(record["rows"][-1], flush=True)
    if options.mixed:
        record |= await compare_policies(engine, questions[: options.mixed], options)
    engine.close()
    for at_once in options.scarce:
        quarter = max(wanted.get(at_once, 64) // 4, LENGTH // BLOCK + 2)
        engine = Engine(folder, options.dtype, options.repetition_penalty, quarter)
        await alternate(engine, questions[:4], 16, 1, 4)
        found = await alternate(
            engine, questions[: options.rounds * at_once], options.max_new_tokens, options.passes, at_once
        )
        record["scarce"].append(row(f"{at_once}, {quarter} blocks", found))
        print(record["scarce"][-1], flush=True)
        engine.close()
    return record


HEAD = ["at once", "plain, tokens/s", "APAR, tokens/s", "throughput", "time per token", "time to first token",
        "peak blocks, plain / APAR"]  # fmt: skip


def table(head, rows):
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)])


def page(record, options):
    by_policy = {name: [one[1:] for one in record["policies"] if one[0] == name] for name in POLICIES}
    rows = [
        [name, spread([one[0] for one in made], 0), spread([1000 * one[1] for one in made], 0),
         spread([1000 * one[2] for one in made], 0), spread([one[3] for one in made])]
        for name, made in by_policy.items() if made
    ]  # fmt: skip
    return f"""{options.dtype}, greedy, {options.max_new_tokens} new tokens at most, {options.passes} alternating passes of the same
questions in one engine; ratios are APAR over plain, medians with the lowest and highest pass.

{table(HEAD, record["rows"])}

With a quarter of the KV blocks that plain decoding held at its peak:

{table(HEAD, record["scarce"])}

![tokens a second, APAR / plain](serving.png)

{options.mixed} requests at once, every second one plain; goodput: answers a second whose time per token is at most 1.25 times
what all-plain requests have ({record["slo_ms"]:.0f} ms). Alone they have {record["alone_ms"]:.0f} ms.

{table(["policy", "tokens/s", "APAR, ms a token", "plain, ms a token", "goodput"], rows)}
"""


def main():
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("questions", type=Path, nargs="+", help="JSON Lines with `turns`, as FastChat's benches")
    options.add_argument("--model", type=Path, help="a merged checkpoint; default: the one that ships")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--max-new-tokens", type=int, default=256)
    options.add_argument("--repetition-penalty", type=float, default=1.1, help="the default model's own is 1.1")
    options.add_argument("--no-page", action="store_true", help="show the tables and leave docs/serving.md as it is")
    options.add_argument("--passes", type=int, default=5)
    options.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16, 64])
    options.add_argument("--single", type=int, default=4, help="questions of the passes of one at a time")
    options.add_argument("--rounds", type=int, default=2, help="questions of a pass for each client, who asks on at once")
    options.add_argument("--scarce", type=int, nargs="*", default=[16, 64])
    options.add_argument("--mixed", type=int, default=32)
    options = options.parse_args()
    questions = mixed(options.questions)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or save_merged(
            *hf_apar.load_default_model(dtype=torch.bfloat16), Path(temporary) / "model"
        )  # fmt: skip
        record = asyncio.run(measure(folder, options, questions))
    print(page(record, options))
    if options.no_page:
        return
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(record, indent=1), encoding="utf-8")
    file = ROOT / "docs" / "serving.md"
    begin, end = "<!-- measured by benchmarks/serving.py -->\n", "<!-- end of what is measured -->"
    text = file.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    file.write_text(before + begin + page(record, options) + end + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
