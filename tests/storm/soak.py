"""``python -m storm.soak``: one proxy under a steady mixed load; what it holds is sampled each minute, while nobody asks."""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from hf_apar.checkpoints.export import save_merged
from hf_apar.serving.proxy.server import Upstreams, make_proxy
from storm import proxied
from tiny_chat_model import tiny_chat_model
from tiny_server import until

CLIENTS = 4
PAUSE = 0.6  # seconds at most that a client waits between two requests
WARM = 5  # minutes after which memory is to be flat
GROWTH = 16 * 2**20  # bytes that it may be greater by at the end
QUIET = 5.0  # seconds of each minute in which nobody asks: connections are kept for two


async def serve(url: str, folder: str, port: int) -> None:
    """Serve the proxy as the command does, with a path that counts its tasks."""
    proxy = await make_proxy(Upstreams([url], folder, timeout=proxied.SILENCE), proxied.LIMITS)

    async def tasks(_: Request) -> JSONResponse:
        return JSONResponse(len(asyncio.all_tasks()))

    app = proxy.app()
    app.routes.append(Route("/tasks", tasks))
    await uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning")).serve()


@contextmanager
def _served(url: str, folder: Path) -> Iterator[tuple[int, int]]:
    """Have a process of its own serve the proxy; its number and its port. Afterwards it may have said nothing odd."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import asyncio, sys; from storm.soak import serve; asyncio.run(serve(*sys.argv[1:3], int(sys.argv[3])))"
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (folder / "said").open("w") as said:
        process = subprocess.Popen([sys.executable, "-c", code, url, str(folder), str(port)], stderr=said, env=paths)
    try:
        until(lambda: process.poll() is not None or _takes_connections(port), 600)
        assert _takes_connections(port), "the proxy does not start"
        yield process.pid, port
    finally:
        process.terminate()
        process.wait(60)
        text = (folder / "said").read_text()
        assert "Traceback" not in text and proxied.SECRET.split()[1] not in text, text


def _takes_connections(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _sample(process: int, port: int) -> dict[str, int]:
    memory = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    tasks = httpx2.get(f"http://127.0.0.1:{port}/tasks", headers={"connection": "close"}).json()
    return {"memory": memory, "files": len(os.listdir(f"/proc/{process}/fd")), "tasks": tasks}


def _at_rest(process: int, port: int, samples: list[dict[str, Any]]) -> bool:
    """Connections that are kept for the next request are closed by it, if their time is over."""
    held = _sample(process, port)["files"]
    if samples and held > samples[0]["files"] + 2:
        httpx2.get(f"http://127.0.0.1:{port}/v1/models", headers={"connection": "close"})
    return not samples or held <= samples[0]["files"] + 2


async def _load(port: int, end: float, draw: random.Random, statuses: Counter[str]) -> int:
    """Ask until ``end``; return how many requests that were."""

    async def client() -> int:
        asked = 0
        while not asked or time.monotonic() < end:
            await proxied.ask(port, proxied.drawn(draw), statuses)
            asked += 1
            await asyncio.sleep(draw.random() * PAUSE)
        return asked

    return sum(await asyncio.gather(*(client() for _ in range(CLIENTS))))


def soak(minutes: int, file: Path, minute: float = 60.0) -> list[dict[str, Any]]:
    """Return a sample for each minute, and one from before; each is written to ``file`` as it is taken."""
    tokenizer, model = tiny_chat_model()
    draw, statuses, samples = random.Random(0), Counter[str](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as place:
        folder = save_merged(model, tokenizer, Path(place) / "model")
        babbler = proxied.Babbler(tokenizer, model, root=str(folder))
        with babbler, _served(f"{babbler.url}/v1", folder) as (process, port), file.open("w") as lines:
            asyncio.run(proxied.ask(port, {"kind": "plain"}, statuses))
            start, requests = time.monotonic(), 0
            for number in range(minutes + 1):
                if number:
                    end = start + number * minute - QUIET
                    requests += asyncio.run(_load(port, end, draw, statuses))
                time.sleep(max(QUIET / 2, start + number * minute - time.monotonic()))
                assert until(lambda: not babbler.live, 70), "something is still written"
                until(lambda: _at_rest(process, port, samples), 20)
                babbler.asked.clear()
                babbler.keys.clear()
                samples.append({"minute": number, "requests": requests, **_sample(process, port)})
                lines.write(json.dumps(samples[-1]) + "\n")
                lines.flush()
    return samples


def grown(samples: list[dict[str, Any]], warm: int = WARM) -> str | None:
    """Return in words what has grown, ``None`` if nothing has."""
    first, warmed, last = samples[0], samples[min(warm, len(samples) - 1)], samples[-1]
    if last["tasks"] > first["tasks"] or last["files"] > first["files"] + 2:
        return f"{last['tasks']} tasks and {last['files']} files, {first['tasks']} and {first['files']} before"
    more = last["memory"] - warmed["memory"]
    return f"grown by {more >> 20} MiB since minute {warmed['minute']}" if more > GROWTH else None


def main() -> int:
    """Print what was sampled; return 1 if something grows."""
    parser = argparse.ArgumentParser("storm.soak", description=__doc__)
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("--file", type=Path, default=Path("build/storm/soak.jsonl"), help="of the samples")
    asked = parser.parse_args()
    asked.file.parent.mkdir(parents=True, exist_ok=True)
    samples = soak(asked.minutes, asked.file)
    for one in samples:
        held = f"{one['memory'] / 2**20:.1f} MiB, {one['files']} files, {one['tasks']} tasks"
        print(f"minute {one['minute']}: {one['requests']:,} requests, {held}")
    print(grown(samples) or "nothing grows")
    return int(grown(samples) is not None)


if __name__ == "__main__":
    sys.exit(main())
