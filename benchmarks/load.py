"""Many clients at once on vLLM's own server, some of them rude: is any answer lost or crossed, does anything stay behind?

    .venv-vllm/bin/python benchmarks/load.py QUESTIONS.jsonl                  # five minutes, 64 clients
    .venv-vllm/bin/python benchmarks/load.py QUESTIONS.jsonl --seconds 60 --clients 8

    .venv-vllm/bin/python benchmarks/load.py QUESTIONS.jsonl --proxy          # through `hf-apar proxy`, vLLM without the plug-in

Each client asks on and on, and draws what it does: streams an answer in threads or plainly, asks for a whole one, hangs up
after a few words, sends a prompt that is too long or a body that makes no sense.
"""

import argparse
import asyncio
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import torch
from questions import evenly, read

import hf_apar
from hf_apar.checkpoints.export import save_merged
from hf_apar.serving.vllm.local import LocalServer

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "benchmarks" / "output" / "load.json"
KINDS = {"threads, stream": 6, "plain, stream": 6, "threads, whole": 3, "hang up": 3, "too long": 1, "malformed": 1}
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
LIMIT = 256
ALIKE = 0.2  # of the longer words of two texts: answers to different questions have fewer in common


class Clients:
    def __init__(self, url, questions, seed):
        self.http = httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None))
        self.questions, self.random = questions, random.Random(seed)
        self.alone = {}  # what each question is answered with nobody else around: (question, in threads) to (text, reason)
        self.counts, self.mistakes, self.crossed = Counter(), Counter(), []
        self.first, self.took = defaultdict(list), defaultdict(list)  # seconds by kind

    def body(self, question, apar, stream):
        return {
            "model": "apar", "messages": [{"role": "user", "content": question}], "max_tokens": LIMIT, "temperature": 0,
            "stream": stream, "vllm_xargs": {"apar": int(apar)},
        }  # fmt: skip

    async def stream(self, question, apar, chunks=None):
        """The text of an answer, why it ended, and the seconds until it began; hang up after so many ``chunks``."""
        text, ids, start, first, seen, reason = "", set(), time.perf_counter(), None, 0, None
        async with self.http.stream("POST", "/v1/chat/completions", json=self.body(question, apar, True)) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line.endswith("[DONE]"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                ids.add(chunk["id"])
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
                first = first or (time.perf_counter() - start if text else None)
                seen += 1
                if chunks is not None and seen >= chunks:
                    return text, reason, first
        self.mistakes["lost"] += reason is None
        self.mistakes["crossed"] += len(ids) != 1
        return text, reason, first

    async def whole(self, question, apar):
        answer = await self.http.post("/v1/chat/completions", json=self.body(question, apar, False))
        answer.raise_for_status()
        (choice,) = answer.json()["choices"]
        return choice["message"]["content"], choice["finish_reason"]

    def judge(self, question, apar, text, reason):
        """What no limit cut is what a quiet server says; where the limit falls depends on which thread writes when."""
        alone, how = self.alone[question, apar]
        if text == alone:
            self.counts[f"the same, {reason}"] += 1
            return
        self.mistakes["lost"] += not text
        if "length" not in (reason, how):
            self.mistakes["other words"] += 1
            self.crossed.append({"question": question, "in threads": apar, "text": text, "alone": alone})
            return
        self.counts["cut elsewhere"] += 1
        likeness = {asked: alike(text, said) for (asked, way), (said, _) in self.alone.items() if way == apar}
        likest = max(likeness, key=likeness.get)
        if likeness[likest] > max(likeness[question], ALIKE):
            self.mistakes["crossed"] += 1
            self.crossed.append({"question": question, "text": text, "more like": likest, "likeness": likeness})

    async def client(self, end):
        while time.monotonic() < end:
            (kind,) = self.random.choices(list(KINDS), list(KINDS.values()))
            question, start = self.random.choice(self.questions), time.perf_counter()
            self.counts[kind] += 1
            try:
                await self.one(kind, question)
                self.took[kind].append(time.perf_counter() - start)
            except Exception as error:
                self.mistakes[f"{kind}: {type(error).__name__}: {error}"[:200]] += 1

    async def one(self, kind, question):
        apar = "plain" not in kind
        if "stream" in kind:
            text, reason, first = await self.stream(question, apar)
            self.first[kind].append(first)
            self.judge(question, apar, text, reason)
        elif kind == "threads, whole":
            self.judge(question, apar, *await self.whole(question, apar))
        elif kind == "hang up":
            await self.stream(question, apar, chunks=self.random.randint(1, 40))
        else:
            body = self.body("word " * 4000, apar, True) if kind == "too long" else {"model": "apar", "messages": 7}
            answer = await self.http.post("/v1/chat/completions", json=body)
            self.mistakes[f"{kind}: status {answer.status_code}"] += answer.status_code != 400


def alike(one, other):
    """The share of the longer words of two texts that both have."""
    words = [set(re.findall(r"\w{5,}", text.lower())) for text in (one, other)]
    return len(words[0] & words[1]) / max(1, len(words[0] | words[1]))


async def run(server, url, questions, options):
    clients = Clients(url, questions, options.seed)
    for question in questions:
        for apar in (False, True):
            clients.alone[question, apar] = await clients.whole(question, apar)
    before = resources(server)
    end = time.monotonic() + options.seconds
    await asyncio.gather(*(clients.client(end) for _ in range(options.clients)))
    left = await asyncio.to_thread(server.await_rest, 60.0)
    await clients.http.aclose()
    await asyncio.sleep(2)
    return clients, left, before, resources(server)


def resources(server):
    return {name: server.metric(f"process_{name}") for name in ("open_fds", "resident_memory_bytes")}


@contextmanager
def proxy(server, folder):
    """The address of a proxy in front of ``server``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "hf_apar.cli", "proxy", "--base-url", f"{server.url}/v1", "--model", str(folder), "--port", str(port)]
    url, process = f"http://127.0.0.1:{port}", subprocess.Popen([sys.executable, *command])
    try:
        for _ in range(300):
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").is_success:
                    break
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def percentiles(values):
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return " / ".join(f"{cuts[place - 1]:.1f}" for place in (50, 90, 99))


def table(clients, left, before, after, options):
    wrong = {name: count for name, count in clients.mistakes.items() if count}
    rows = [
        f"| {kind} | {clients.counts[kind]} | {percentiles(clients.first[kind]) if clients.first[kind] else ''} "
        f"| {percentiles(clients.took[kind])} |"
        for kind in KINDS
        if len(clients.took[kind]) > 1
    ]
    return f"""{options.clients} clients for {options.seconds} s, {LIMIT} new tokens at most; seconds, as 50th / 90th / 99th percentile.

| what clients did | times | until the text began | until it was done |
|---|---|---|---|
{chr(10).join(rows)}

Mistakes: {wrong or "none"}. {clients.counts["the same, stop"]} answers that no limit cut were those of the quiet server, letter for
letter; of those that the limit cut, {clients.counts["the same, length"]} were, and {clients.counts["cut elsewhere"]} were cut elsewhere, since the limit counts all threads together. Requests and blocks
left afterwards: {left or "none"}; open files
{before["open_fds"]:.0f} before and {after["open_fds"]:.0f} after, memory {before["resident_memory_bytes"] / 2**20:.0f} and {after["resident_memory_bytes"] / 2**20:.0f} MiB (of the process that talks to clients).
"""


def main():
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("questions", type=Path, help="JSON Lines with `turns`, as FastChat's benches")
    options.add_argument("--model", type=Path, help="a merged checkpoint; default: the one that ships")
    options.add_argument("--dtype", default="float32", help="in bfloat16 most answers leave those of a quiet server")
    options.add_argument("--seconds", type=int, default=300)
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--number", type=int, default=16, help="different questions")
    options.add_argument("--proxy", action="store_true", help="ask a proxy, and leave the plug-in out of vLLM")
    options.add_argument("--seed", type=int, default=0)
    options = options.parse_args()
    questions = [question.text for question in evenly(read(options.questions), options.number)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or save_merged(
            *hf_apar.load_default_model(dtype=torch.bfloat16), Path(temporary) / "model"
        )  # fmt: skip
        arguments = (
            "--dtype", options.dtype, "--served-model-name", "apar", "--block-size", "32", "--max-model-len", "1024",
        )  # fmt: skip
        environment = SETTINGS | ({"VLLM_PLUGINS": "none"} if options.proxy else {}) | dict(os.environ)
        with ExitStack() as stack:
            server = stack.enter_context(LocalServer(folder, *arguments, environment=environment))
            url = stack.enter_context(proxy(server, folder)) if options.proxy else server.url
            clients, left, before, after = asyncio.run(run(server, url, questions, options))
    text = table(clients, left, before, after, options)
    print(text)
    if options.proxy:
        sys.exit(bool(left or any(clients.mistakes.values())))
    OUTPUT.parent.mkdir(exist_ok=True)
    found = {"markdown": text, "counts": clients.counts, "mistakes": clients.mistakes, "crossed": clients.crossed}
    OUTPUT.write_text(json.dumps(found, indent=1))
    page = ROOT / "docs" / "serving.md"
    begin, end = "<!-- measured by benchmarks/load.py -->\n", "<!-- end of the load run -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(before + begin + text + end + rest.split(end)[1], encoding="utf-8")
    if left or any(clients.mistakes.values()):
        sys.exit("an answer was lost or crossed, or something stayed behind")


if __name__ == "__main__":
    main()
