"""APAR behind vLLM's own server: merge the default model, serve it on loopback, ask through the `openai` client, stop.

Run it where vLLM is installed: `make serve-demo`, or `pip install "hf-apar[vllm,default]" openai` on a machine with a GPU.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from openai import OpenAI

import hf_apar
from hf_apar.checkpoints.export import save_merged
from hf_apar.serving.vllm.local import LocalServer

QUESTION = " ".join(sys.argv[1:]) or "What would happen if nobody needed sleep?"
APAR = {"vllm_xargs": {"apar": 1}}
PLAIN = {"vllm_xargs": {"apar": 0}}  # no forks: what the same weights write one token at a time


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_merged(*hf_apar.load_default_model(dtype=torch.bfloat16), Path(temporary) / "model")
        arguments = ("--served-model-name", "apar", "--block-size", "32", "--max-model-len", "1024")
        with LocalServer(folder, *arguments, environment={"VLLM_CPU_KVCACHE_SPACE": "1"} | dict(os.environ)) as server:
            client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
            ask(client, PLAIN, show=False, tokens=8)  # warm both ways
            ask(client, APAR, show=False, tokens=8)
            plain = ask(client, PLAIN, show=False)
            threads = ask(client, APAR, show=True)
            for name, (tokens, seconds) in (("plain", plain), ("APAR", threads)):
                print(f"{name:>5}: {tokens:4d} tokens {seconds:6.2f} s {tokens / seconds:7.1f} tokens/s")
            print(f"APAR is {threads[0] / threads[1] / (plain[0] / plain[1]):.2f} times as fast per token")


def ask(client: OpenAI, extra: dict[str, object], *, show: bool, tokens: int = 256) -> tuple[int, float]:
    """Return the tokens of an answer and the seconds that it took; print it as it comes."""
    start, used = time.perf_counter(), 0
    stream = client.chat.completions.create(
        model="apar", messages=[{"role": "user", "content": QUESTION}], max_tokens=tokens, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body=extra,
    )  # fmt: skip
    for chunk in stream:
        used = chunk.usage.completion_tokens if chunk.usage else used
        if show and chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    if show:
        print("\n")
    return used, time.perf_counter() - start


if __name__ == "__main__":
    main()
