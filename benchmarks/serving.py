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
from dataclasses import dataclass, field
from itertools import count, cycle, islice
from pathlib import Path
from typing import ClassVar, NamedTuple

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no process that spins beside the one that computes

import numpy as np
import torch
from questions import read
from vllm import AsyncEngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

import hf_apar
from hf_apar.checkpoints.export import save_merged
from hf_apar.serving.admission import Eager, EqualShare, FixedCap
from hf_apar.serving.vllm import set_policy, stats

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "benchmarks" / "output" / "serving.json"
LENGTH, BLOCK = 1024, 32


class Cost(NamedTuple):
    """What a step takes, in seconds: in any case, for each request, and for each token of prompts in it."""

    fixed: float
    each: float
    prompt: float


H100 = Cost(0.058, 0.0003, 0.0003)  # as transformers ran the default model there


class Steps(StatLoggerBase):
    """Notes how long each step took, and what was in it."""

    seen: ClassVar[list[tuple[float, int, int]]] = []  # seconds, requests, tokens of prompts

    def __init__(self, vllm_config, engine_index=0):
        self.at = None

    def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0, **_):
        now = time.perf_counter()
        running = scheduler_stats.num_running_reqs if scheduler_stats else 0
        if self.at is not None and iteration_stats is not None:
            self.seen.append((now - self.at, running, iteration_stats.prompt_token_stats.computed))
        self.at = now if running else None  # the time until the next step is then none of the engine's

    def log_engine_initialized(self):
        self.seen.clear()

    @classmethod
    def fitted(cls):
        seconds, running, prompt = np.array(cls.seen).T
        usual = seconds < np.quantile(seconds, 0.99)
        parts = np.stack([np.ones_like(running), running, prompt], 1)[usual]
        return Cost(*np.linalg.lstsq(parts, seconds[usual], rcond=None)[0])


@dataclass
class Told:
    """What a client saw of one answer; times in seconds."""

    question: str
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0
    prompt: int = 0  # its tokens
    threads: int = 1
    steps: int = 0  # on the longest path
    sampled: int = 0  # tokens, control tokens and EOS included
    again: int = 0  # tokens of paths that children compute anew, since threads share whole blocks alone

    @property
    def per_token(self) -> float:
        return self.seconds / max(self.tokens, 1)

    def count(self, tree) -> None:
        """Note what a finished answer took; ``tree`` of an answer in threads."""
        ends = [len(thread.path_ids) + (thread.eos_token_id is not None) for thread in tree.threads]
        begins = [end - len(thread.sampled_ids) for end, thread in zip(ends, tree.threads, strict=True)]
        self.threads, self.steps = len(tree.threads), max(ends) - self.prompt
        self.sampled = sum(ends) - sum(begins)
        self.again = sum((begin - 1) % BLOCK + 1 for begin in begins[1:])


@dataclass
class Pass:
    """One pass of some clients who ask on and on.

    Attributes:
        window: seconds and tokens until the first client found no more questions: so long all of them were busy.
        seconds: until the last of them had its answer.
        process: seconds of computing that the process that talks to clients took for a token.
    """

    told: list[Told] = field(default_factory=list)
    window: tuple[float, int] = (0.0, 0)
    seconds: float = 0.0
    process: float = 0.0
    blocks: int = 0

    @property
    def throughput(self) -> float:
        return self.window[1] / self.window[0]

    def of(self, questions) -> list[Told]:
        return [one for one in self.told if one.question in questions]


class Engine:
    def __init__(self, folder, options, blocks=None):
        os.environ["APAR_DEFAULT"] = "0"
        arguments = AsyncEngineArgs(
            str(folder), dtype=options.dtype, max_model_len=LENGTH, block_size=BLOCK, max_num_seqs=256,
            num_gpu_blocks_override=blocks, speculative_config=options.speculative_config,
        )  # fmt: skip
        self.engine = AsyncLLM.from_engine_args(arguments, stat_loggers=[Steps])
        self.tokenizer = self.engine.get_tokenizer()
        self.numbers = count()
        self.penalty = options.repetition_penalty
        self.peak, self.tokens = 0.0, 0

    @property
    def load(self):
        return stats.reported(self.engine.vllm_config, 0)

    @property
    def blocks(self):
        return self.engine.vllm_config.cache_config.num_gpu_blocks

    def params(self, apar, tokens):
        return SamplingParams(
            temperature=0.0, max_tokens=tokens, repetition_penalty=self.penalty, output_kind=RequestOutputKind.DELTA,
            extra_args={"apar": int(apar)},
        )  # fmt: skip

    def close(self):
        self.engine.shutdown()

    async def ask(self, question, apar, tokens):
        ids = hf_apar.encode_chat(self.tokenizer, [{"role": "user", "content": question}])
        told, start = Told(question, prompt=len(ids)), time.perf_counter()
        prompt = {"type": "token", "prompt_token_ids": ids}
        async for output in self.engine.generate(prompt, self.params(apar, tokens), f"bench-{next(self.numbers)}"):
            (one,) = output.outputs
            told.tokens += len(one.token_ids)
            self.tokens += len(one.token_ids)
            told.first = told.first or time.perf_counter() - start
            if not told.tokens % 16:
                self.peak = max(self.peak, self.load.kv_usage)
        told.seconds = time.perf_counter() - start
        told.steps = told.sampled = told.tokens
        if apar:
            told.count(one.tree)
        return told

    async def run(self, questions, apar, tokens, at_once):
        """Let ``at_once`` clients ask all ``questions``; ``apar`` tells for each client whether it asks for threads."""
        await self.engine.reset_prefix_cache()
        made, left, start = Pass(), iter(questions), time.perf_counter()
        self.peak, self.tokens, cpu = 0.0, 0, time.process_time()

        async def client(number):
            for question in left:
                made.told.append(await self.ask(question, apar(number), tokens))
            if not made.window[1]:
                made.window = time.perf_counter() - start, self.tokens

        await asyncio.gather(*map(client, range(at_once)))
        made.seconds = time.perf_counter() - start
        made.process = (time.process_time() - cpu) / self.tokens
        made.blocks = round(self.peak * self.blocks)
        return made


def mixed(paths):
    """The questions of all files: of each in turn, and never a category for long."""
    mixed = [question.text for group in zip(*map(read, paths), strict=False) for question in group]
    step = 7  # neighbours are of one category: walk through all of them
    return [mixed[place * step % len(mixed)] for place in range(len(mixed))]


def in_threads(number):
    return True


def plainly(number):
    return False


def by_turns(number):
    """Every second client asks for threads."""
    return number % 2 == 0


def asked(questions, options, at_once):
    """The questions of a pass of so many clients."""
    return [*islice(cycle(questions), options.answers or max(16, min(5 * at_once, len(questions) + at_once // 2)))]


async def alternate(engine, questions, options, at_once, passes=None):
    found = {plainly: [], in_threads: []}
    for number in range(passes or options.passes):
        for apar in (plainly, in_threads) if number % 2 else (in_threads, plainly):
            found[apar].append(await engine.run(questions, apar, options.max_new_tokens, at_once))
    return [*zip(found[in_threads], found[plainly], strict=True)]


def spread(values, digits=2):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratio(pairs, number):
    return spread([number(apar) / number(plain) for apar, plain in pairs])


def per_token(told):
    return statistics.mean(one.per_token for one in told)


def late(told):
    """The 95th percentile of the time per token."""
    return float(np.percentile([one.per_token for one in told], 95))


def first(told):
    return statistics.mean(one.first for one in told)


HEAD = ["at once", "answers", "plain, tokens/s", "APAR, tokens/s", "throughput", "time per token, answers that fork", "the others",
        "95th percentile", "until text begins", "peak blocks, plain / APAR"]  # fmt: skip


def allowed(at_once, pairs, cost):
    """What throughput steps of this cost allow, APAR over plain, if nothing else took time and no child had to wait."""

    def seconds_a_token(passes):
        told = [one for made in passes for one in made.told]
        total = {name: sum(getattr(one, name) for one in told) for name in ("tokens", "steps", "sampled", "prompt", "again")}
        prompts = cost.prompt * (total["prompt"] + total["again"]) + cost.each * total["sampled"]
        return (cost.fixed * total["steps"] / at_once + prompts) / total["tokens"]

    return seconds_a_token([plain for _, plain in pairs]) / seconds_a_token([apar for apar, _ in pairs])


def row(name, pairs):
    """One line of the table: the medians of passes, each the ratio of APAR to the plain pass beside it."""
    forked = {one.question for apar, _ in pairs for one in apar.told if one.threads > 1}
    whole = {one.question for _, plain in pairs for one in plain.told} - forked
    among = [(apar.of(forked), plain.of(forked)) for apar, plain in pairs]
    others = [(apar.of(whole), plain.of(whole)) for apar, plain in pairs]
    everything = [(apar.told, plain.told) for apar, plain in pairs]
    return [
        name,
        str(len(pairs[0][0].told)),
        f"{statistics.median(plain.throughput for _, plain in pairs):.0f}",
        f"{statistics.median(apar.throughput for apar, _ in pairs):.0f}",
        ratio(pairs, lambda one: one.throughput),
        ratio(among, per_token) if forked else "",
        ratio(others, per_token) if whole else "",
        ratio(everything, late),
        ratio(everything, first),
        f"{statistics.median(plain.blocks for _, plain in pairs)} / {statistics.median(apar.blocks for apar, _ in pairs)}",
    ]


async def compare_policies(engine, questions, options):
    """Every second client plain, the others in threads, under each policy in turn."""
    questions = asked(questions, options, options.mixed)
    alone = await engine.run(questions, plainly, options.max_new_tokens, options.mixed)
    limit = 1.25 * per_token(alone.told)
    policies = {
        "eager": Eager(), "at most 3 each": FixedCap(3), "equal share": EqualShare(),
    }  # fmt: skip
    found = {name: [] for name in policies}
    for number in range(options.passes):
        for name in policies if number % 2 else reversed(policies):
            set_policy(policies[name])
            made = await engine.run(questions, by_turns, options.max_new_tokens, options.mixed)
            within = sum(one.per_token <= limit for one in made.told)
            found[name].append((made, within / len(made.told), within / made.seconds))
    set_policy(EqualShare())
    return found, limit


async def measure(folder, options, questions):
    record = {"rows": [], "allowed": [], "scarce": [], "policies": [], "limit_ms": 0.0, "process_us": []}
    engine = Engine(folder, options)
    await alternate(engine, questions[:4], options, 4, 1)  # warm
    wanted = {}
    for at_once in options.at_once:
        some = asked(questions, options, at_once)
        pairs = await alternate(engine, some, options, at_once)
        cost = Steps.fitted()
        record["rows"].append(row(str(at_once), pairs))
        record["allowed"].append([str(at_once), *(f"{allowed(at_once, pairs, one):.2f}" for one in (cost, H100))])
        by_way = [[plain for _, plain in pairs], [apar for apar, _ in pairs]]
        record["process_us"].append([str(at_once), *(spread([1e6 * one.process for one in made], 0) for made in by_way)])
        wanted[at_once] = max(plain.blocks for _, plain in pairs)
        record["cost"] = (
            f"{1000 * cost.fixed:.0f} ms, {1000 * cost.each:.2f} a request, {1000 * cost.prompt:.2f} a token of prompts"
        )
        print(record["rows"][-1], record["process_us"][-1], record["cost"], flush=True)
    if options.mixed:
        found, limit = await compare_policies(engine, questions, options)
        record["limit_ms"] = 1000 * limit
        for name, made in found.items():
            record["policies"].append([
                name, spread([one.throughput for one, _, _ in made], 0),
                spread([1000 * per_token([told for told in one.told if told.threads > 1]) for one, _, _ in made], 0),
                spread([1000 * per_token([told for told in one.told if told.threads == 1]) for one, _, _ in made], 0),
                spread([100 * share for _, share, _ in made], 0), spread([rate for _, _, rate in made]),
            ])  # fmt: skip
            print(record["policies"][-1], flush=True)
    engine.close()
    for at_once in options.scarce:
        quarter = max(wanted.get(at_once, 128) // 4, LENGTH // BLOCK + 2)
        engine = Engine(folder, options, quarter)
        await alternate(engine, questions[:4], options, 4, 1)
        pairs = await alternate(engine, asked(questions, options, at_once), options, at_once)
        record["scarce"].append(row(f"{at_once}, {quarter} blocks", pairs))
        print(record["scarce"][-1], flush=True)
        engine.close()
    return record


def table(head, rows):
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)])


def page(record, options):
    return f"""{options.dtype}, greedy, {options.max_new_tokens} new tokens at most, {options.passes} alternating passes of the same
questions in one engine. So many clients ask on and on; tokens are counted until the first of them finds no question left. Ratios
are APAR over plain, medians with the lowest and highest pass.

{table(HEAD, record["rows"])}

With a quarter of the KV blocks that plain decoding held at its peak:

{table(HEAD, record["scarce"])}

![tokens a second, APAR / plain](serving.png)

What steps allow, a calculation: throughput of APAR over plain for these answers' tokens, paths, prompts and what their children
compute anew, if nothing but steps took time and no thread waited. A step here takes {record["cost"]}, fitted while they
ran; one of an H100 58 ms and 0.3 a request, fitted to 1, 8 and 64 threads of [Performance](performance.md#on-a-gpu).

{table(["at once", "here", "with an H100's steps"], record["allowed"])}

Microseconds of the process that talks to clients, for a token:

{table(["at once", "plain", "APAR"], record["process_us"])}

{options.mixed} clients, every second one plain; goodput: answers a second whose time per token is at most 1.25 times what it is where
all are plain ({record["limit_ms"]:.0f} ms).

{table(["policy", "tokens/s", "answers that fork, ms a token", "the others, ms a token", "answers within the limit, %", "goodput"], record["policies"])}
"""


def main():
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("questions", type=Path, nargs="+", help="JSON Lines with `turns`, as FastChat's benches")
    options.add_argument("--model", type=Path, help="a merged checkpoint; default: the one that ships")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--max-new-tokens", type=int, default=256)
    options.add_argument("--repetition-penalty", type=float, default=1.08, help="the default model's own is 1.08")
    options.add_argument("--no-page", action="store_true", help="show the tables and leave docs/serving.md as it is")
    options.add_argument("--passes", type=int, default=3)
    options.add_argument("--at-once", type=int, nargs="*", default=[1, 4, 16, 64, 128])
    options.add_argument(
        "--answers", type=int, help="of a pass; default: five for each client, 16 at least, and hardly a question twice"
    )
    options.add_argument("--scarce", type=int, nargs="*", default=[16])
    options.add_argument("--mixed", type=int, default=32)
    options.add_argument("--speculative-config", type=json.loads, help="vLLM's own, in JSON: for threads and plain alike")
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
