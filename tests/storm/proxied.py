"""The proxy under clients that hang up, dawdle, ask too much or nonsense, before servers that die, stall and babble.

The server makes tokens without a model, so that thousands of requests take minutes.
"""

import asyncio
import atexit
import ctypes
import gc
import json
import logging
import os
import random
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

from hf_apar.checkpoints.export import save_merged
from hf_apar.serving.proxy.app import ProxyServer, ProxySettings
from hf_apar.serving.proxy.server import Upstreams, make_proxy
from storm.mutation import mutated
from storm.storms import Scenario, Storm
from tiny_chat_model import tiny_chat_model
from tiny_server import InThread, TinyServer, until

SECRET = "Bearer 5ecret-of-a-client"
LIMITS = ProxySettings(max_threads=16, max_answers=24, max_body=64 * 1024)
LONGEST = 21_000  # tokens of the context
SILENCE = 4.0  # seconds that the server may say nothing
BOUND = 90.0  # seconds of silence for a plain request beside whatever else is asked, on a machine that others use too
OTHERS = 600.0  # the same for the others: 10,000 threads take their time
GROWTH = 64 * 2**20  # bytes that the process may grow by, all scenarios together
FAULTS = ("die", "stall", "half", "garbage", "error", "end")
EXPECTED = {200, 400, 404, 405, 413, 422, 500, 502, 503, 504}
KINDS = ("plain", "threads", "flood", "endless", "malformed", "odd", "large", "many", "other")


class Babbler(TinyServer):
    """Writes what ``x_kind`` of a request says: a few letters, forks wherever it may, or letters without end."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.most_live = 0
        self.forks = self.tokenizer.convert_tokens_to_ids("[Fork]")
        self.letter = self.tokenizer.encode("a")[0]
        self.fault = self.wanted

    async def models(self, request: Any) -> Any:
        answer = await super().models(request)
        answer.body = answer.body.replace(b'"max_model_len":1024', f'"max_model_len":{LONGEST}'.encode())
        answer.headers["content-length"] = str(len(answer.body))
        return answer

    async def completions(self, request: Any) -> Any:
        try:
            return await super().completions(request)
        except Exception as error:  # as servers refuse what they cannot read
            return JSONResponse({"error": {"message": f"{type(error).__name__}: {error}", "code": 400}}, 400)

    async def taken(self, request: Any) -> Any:
        body, refused = await super().taken(request)
        if not (_is_prompt(body.get("prompt"), len(self.tokenizer)) or body.get("messages")):
            refused = JSONResponse({"error": {"message": "there is no prompt", "code": 400}}, 400)
        return body, refused

    def wanted(self, number: int, made: int) -> str | None:
        asked = self.asked[number - 1]
        return asked.get("x_fault") if made == asked.get("x_at", 0) else None

    async def tokens(self, body: dict[str, Any]) -> Any:
        self.most_live = max(self.most_live, self.live)
        kind = body.get("x_kind", "threads")
        bias = {int(token): one for token, one in (body.get("logit_bias") or {}).items()}
        forced = next((token for token, one in bias.items() if one > 50), None)
        for made in range(body.get("max_tokens") or 200):
            await asyncio.sleep(0)
            fork = forced is None and made % 2 == 0 and bias.get(self.forks, 0) > -50
            forks = fork and (kind == "flood" or (kind == "threads" and made < 5))
            ends = made >= 12 and kind not in ("flood", "endless")
            token = self.forks if forks else self.tokenizer.eos_token_id if ends else self.letter
            token = token if ends else forced or token
            yield token, -1.0, {f"token_id:{token}": -1.0}
            if ends:
                return


def _is_prompt(value: Any, vocabulary: int) -> bool:
    """Would a server take it?"""

    def one_is(one: Any) -> bool:
        ids = one if isinstance(one, list) else [None]
        return bool(one) and (isinstance(one, str) or all(type(it) is int and 0 <= it < vocabulary for it in ids))

    return one_is(value) or (isinstance(value, list) and value != [] and all(map(one_is, value)))


@dataclass
class Running:
    """A server, the proxy before it, and what it was like before anybody asked."""

    upstream: Babbler
    front: InThread
    proxy: ProxyServer
    loop: asyncio.AbstractEventLoop
    said: list[str]
    files: int = 0
    tasks: int = 0
    memory: int = 0
    statuses: Counter[str] = field(default_factory=Counter)

    async def ask(self, request: dict[str, Any]) -> None:
        await ask(self.front.port, request, self.statuses)

    def open_files(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    def open_tasks(self) -> int:
        return len(asyncio.all_tasks(self.loop))


def _memory() -> int:
    """Return the bytes that the process holds, without what the allocator keeps for later."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Said(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.INFO)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage() + str(record.exc_info or "")
        if SECRET.split()[1] in text or record.exc_info:
            self.said.append(text)


@cache
def _running() -> Running:
    place = tempfile.TemporaryDirectory()
    tokenizer, model = tiny_chat_model()
    folder = save_merged(model, tokenizer, Path(place.name) / "model")
    upstream = Babbler(tokenizer, model, root=str(folder)).__enter__()
    made: dict[str, Any] = {}

    async def start() -> Any:
        where = Upstreams([f"{upstream.url}/v1"], str(folder), timeout=SILENCE)
        made["proxy"], made["loop"] = await make_proxy(where, LIMITS), asyncio.get_running_loop()
        return made["proxy"].app()

    front = InThread(start).__enter__()
    said: list[str] = []
    logging.getLogger().addHandler(_Said(said))
    running = Running(upstream, front, made["proxy"], made["loop"], said)
    for stop in (place.cleanup, upstream.stop, front.stop):
        atexit.register(stop)
    asyncio.run(running.ask({"kind": "plain"}))
    until(lambda: not upstream.live and running.open_tasks() <= 4, 8)
    running.files, running.tasks = running.open_files(), running.open_tasks()
    return running


def draw(draw: random.Random) -> Scenario:
    crowd = draw.random() < 0.2
    return {"requests": [drawn(draw) for _ in range(draw.randint(40, 150) if crowd else draw.randint(2, 12))]}


def drawn(draw: random.Random) -> dict[str, Any]:
    """Return what a client does."""
    asked: dict[str, Any] = {"kind": draw.choice(KINDS), "stream": draw.random() < 0.6, "chat": draw.random() < 0.7,
                             "key": draw.random() < 0.5, "seed": draw.randrange(10**6)}  # fmt: skip
    if draw.random() < 0.25:
        asked |= {"fault": draw.choice(FAULTS), "at": draw.choice((0, 0, 1, 3, 9))}
    if draw.random() < 0.35:
        asked["hangs_up"] = draw.choice(("writing", "waiting", "reading"))
        asked["after"] = draw.random()
    elif draw.random() < 0.2:
        asked["slow"] = True
    return asked


def _body(request: dict[str, Any]) -> bytes:
    """Return what a client sends."""
    kind, draw = request["kind"], random.Random(request.get("seed", 0))
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 40, "temperature": 0.0, "x_kind": kind,
                            "stream": bool(request.get("stream"))}  # fmt: skip
    said = {"messages": [{"role": "user", "content": "Why?"}]} if request.get("chat", True) else {"prompt": "Why?"}
    body |= said
    if kind == "plain":
        body["apar"] = 0
    if kind in ("flood", "endless"):
        body["max_tokens"] = request.get("tokens", 300)
    if kind == "many":
        body["n"] = draw.choice((2, 24, 25, 128, 129, 10**9))
        body["max_tokens"] = draw.choice((10, 10**6, 2**31, 2**63, -1))
    if request.get("fault"):
        body |= {"x_fault": request["fault"], "x_at": request.get("at", 0)}
    if kind == "odd":
        body = mutated(draw, body, 2)
    if kind == "large":
        body["user"] = "x" * draw.choice((60_000, 70_000, 300_000))
    data = json.dumps(body).encode("utf-8", "backslashreplace")
    if kind == "malformed":
        place = draw.randrange(len(data))
        put = draw.choice((b"", b"{", b"[" * 20_000, b"\xff\xfe", b"\0"))
        data = data[:place] + put + data[place + draw.choice((0, 9)) :]
    return data


async def ask(port: int, request: dict[str, Any], statuses: Counter[str]) -> None:
    """Send a request as its client does, check what it is answered, and count its status."""
    data = _body(request)
    name = "chat/completions" if request.get("chat", True) else "completions"
    path = "/v1/models" if request["kind"] == "other" else f"/v1/{name}"
    key = f"authorization: {SECRET}\r\n" if request.get("key") else ""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{key}content-length: {len(data)}\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**12)
    bound = BOUND if request["kind"] == "plain" else OTHERS
    try:
        sent, hangs_up, after = head + data, request.get("hangs_up"), request.get("after", 0.5)
        if hangs_up == "writing":
            writer.write(sent[: int(after * len(sent))])
            await writer.drain()
            return
        writer.write(sent)
        await writer.drain()
        if hangs_up == "waiting":
            await asyncio.sleep(after * 0.2)
            return
        answer = b""
        while part := await asyncio.wait_for(reader.read(64 if request.get("slow") else 2**12), bound):
            answer += part
            if hangs_up == "reading" and len(answer) > after * 2000:
                return
            if request.get("slow"):
                await asyncio.sleep(0.01)
        _judge(request, answer, statuses)
    except (ConnectionError, BrokenPipeError):
        assert request["kind"] == "large", "the proxy hung up"  # it answers 413 and reads no further
    except TimeoutError:
        raise AssertionError(f"{request['kind']} got no answer in {bound} seconds") from None
    finally:
        writer.close()


def _judge(request: dict[str, Any], answer: bytes, statuses: Counter[str]) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    statuses[f"{request['kind']} {status}"] += 1
    assert status in EXPECTED and b"the proxy failed" not in body, f"{request['kind']}: status {status}, {body[:200]!r}"
    assert status != 500 or request.get("fault"), f"{request['kind']}: status 500, {body[:200]!r}"
    assert b"Internal Server Error" not in body, "an error that nobody foresaw"
    if request["kind"] in ("plain", "threads") and not request.get("fault"):
        assert status in (200, 503, 504), f"{request['kind']}: status {status}, {body[:200]!r}"
        whole = b"data: [DONE]" if request.get("stream") else b"usage"
        assert status != 200 or whole in body, "the answer is cut"


def check(requests: list[dict[str, Any]]) -> None:
    """Each request gets an answer or a status, a plain one beside them is not kept waiting, and nothing is left behind."""
    running = _running()
    upstream, proxy = running.upstream, running.proxy
    upstream.most_live = 0

    async def all_of() -> None:
        asked = [running.ask(one) for one in [*requests, {"kind": "plain"}] if "kind" in one]
        for one in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(one, BaseException):
                raise one

    asyncio.run(all_of())
    width = 128 + LIMITS.max_answers  # of a step, and at least one for each answer
    assert upstream.most_live <= width, f"{upstream.most_live} requests at once at the server"
    (one,) = proxy.pool.upstreams
    assert until(lambda: not upstream.live and not proxy.in_flight, 70), "something is still written"
    assert one.busy == len(one.driver) == len(one._tasks) == len(one.calls) == 0, "a thread is left"
    upstream.asked.clear()
    upstream.keys.clear()
    assert until(lambda: running.open_tasks() <= running.tasks, 20), f"{running.open_tasks()} tasks, {running.tasks} before"
    assert until(lambda: _few_files(running), 20), f"{running.open_files()} files, {running.files} before"
    assert not running.said, f"logged: {running.said.pop()[:300]}"
    memory = _memory()
    running.memory = running.memory or memory
    assert memory < running.memory + GROWTH, f"grown by {(memory - running.memory) >> 20} MiB"


def _few_files(running: Running) -> bool:
    """Connections that are kept for the next request are closed by it, if their time is over."""
    if running.open_files() > running.files + 2:
        asyncio.run(running.ask({"kind": "other"}))
    return running.open_files() <= running.files + 2


EVERY = (
    *({"requests": [{"kind": kind, "stream": stream} for kind in KINDS] * 2} for stream in (True, False)),
    *({"requests": [{"kind": kind, "stream": stream, "fault": fault, "at": at} for kind in ("plain", "threads")
                    for stream in (True, False) for at in (0, 3)]} for fault in FAULTS),
    *({"requests": [{"kind": kind, "stream": True, "hangs_up": how, "after": after} for after in (0.1, 0.9)]}
      for kind in ("plain", "threads", "flood") for how in ("writing", "waiting", "reading")),
    {"requests": [{"kind": "flood", "stream": True, "tokens": 20_000}]},  # 10,000 forks
)  # fmt: skip
STORM = Storm("proxy", draw, check, share=2.0, every=EVERY, parts=lambda scenario: len(scenario["requests"]) + 1)
