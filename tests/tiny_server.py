"""A server with a tiny real model that speaks vLLM's dialect and llama.cpp's, and servers in threads of this process."""

import asyncio
import contextlib
import json
import math
import threading
import time

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from tiny_chat_model import LENGTH

ECHOED = ("embeddings", "responses", "messages", "messages/count_tokens", "chat/completions/batch", "echo/{path:path}")
RAW = b"\xe9 \xff \xe5\xad\x97"  # no text in any one encoding


class InThread:
    """What ``start`` makes, an application of the web, behind uvicorn in a thread and a loop of its own."""

    def __init__(self, start, port=0, **options):
        self.start, self.port, self.server, self.error, self.options = start, port, None, None, options
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()), daemon=True)

    async def run(self):
        try:
            app = await self.start()
        except Exception as error:
            self.error = error
            return
        config = uvicorn.Config(app, port=self.port, log_level="critical", timeout_graceful_shutdown=1, **self.options)
        self.server = uvicorn.Server(config)
        await self.server.serve()

    def __enter__(self):
        self.thread.start()
        while self.thread.is_alive() and not (self.server and self.server.started):
            time.sleep(0.01)
        if self.error is not None:
            raise self.error
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        if self.server is not None:
            self.server.should_exit = True
        self.thread.join(20)


class TinyServer(InThread):
    """Text completions and chats, greedy or drawn; each token from the whole path.

    Attributes:
        live: requests that are being written.
        asked: the bodies of all completions.
        keys: what came as ``Authorization``.
        fault: told of each token of a stream, ``(request's number, tokens so far)``: what to do in place of going on.
        takes_bias: as a server with a draft of its own does not.
        refuse_next: statuses that the next requests get.
        refuse_whole: statuses that the next requests without a stream get.
        refuses_when: an event that is waited for until a request is told so.
    """

    def __init__(self, tokenizer, model, root=None, port=0):
        super().__init__(self.make, port)
        self.tokenizer, self.model, self.root = tokenizer, model, root
        self.live, self.asked, self.keys, self.takes_bias = 0, [], [], True
        self.refuse_next, self.refuse_whole, self.refuses_when = [], [], None
        self.fault = lambda number, made: None
        self.gives_ids = True

    async def make(self):
        self.computing = asyncio.Lock()
        return Starlette(routes=[
            Route("/v1/models", self.models), Route("/completion", self.completion, methods=["POST"]),
            *(Route(f"/v1/{name}", self.echo, methods=["POST"]) for name in ECHOED),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.completions, methods=["POST"]),
        ])  # fmt: skip

    async def models(self, request):
        card = {"id": "tiny", "owned_by": "vllm", "root": self.root, "max_model_len": LENGTH}
        answer = JSONResponse({"object": "list", "data": [card]}, headers={"x-own": "yes"})
        answer.set_cookie("session", "of this client")
        return answer

    async def echo(self, request):
        target = request.scope["raw_path"] + b"?" + request.scope["query_string"]
        told = {
            "got": (await request.body()).decode(), "target": target.decode("latin-1"),
            "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in request.headers.raw],
        }  # fmt: skip
        answer = JSONResponse(told, 201)
        answer.raw_headers += [(b"connection", b"x-hop, X-Two"), (b"x-hop", b"1"), (b"x-two", b"2"), (b"x-raw", RAW)]
        return answer

    async def taken(self, request):
        """The body of a completion, and what it is refused with, if it is."""
        body = json.loads(await request.body())
        self.asked.append(body)
        self.keys.append(request.headers.get("authorization"))
        refusals = self.refuse_next or (not body.get("stream") and self.refuse_whole)
        if not refusals:
            return body, None
        status = refusals.pop(0)
        while self.refuses_when is not None and not self.refuses_when.is_set():
            await asyncio.sleep(0.01)
        return body, JSONResponse(
            {"error": {"message": "not now", "code": status}}, status, headers={"retry-after": "7"}
        )

    async def completion(self, request):
        """As llama.cpp writes: a stream does not name tokens that end within a character."""
        body, refused = await self.taken(request)
        if refused:
            return refused
        bias = {token: -math.inf if one is False else one for token, one in body["logit_bias"]}
        body |= {"max_tokens": body["n_predict"], "logit_bias": bias}
        if body.get("stream"):
            return StreamingResponse(self.named(body), media_type="text/event-stream")
        ids = [token async for token, _, _ in self.tokens(body)]
        return JSONResponse({"tokens": ids, "tokens_predicted": len(ids), "stop": True, "stop_type": self.end(ids)})

    async def named(self, body):
        ids = []
        async for token, _, _ in self.tokens(body):
            ids.append(token)
            if "\ufffd" not in self.tokenizer.decode([token]):
                yield f"data: {json.dumps({'tokens': [token], 'tokens_predicted': len(ids), 'stop': False})}\n\n"
        told = {"tokens": [], "tokens_predicted": len(ids), "stop": True, "stop_type": self.end(ids)}
        yield f"data: {json.dumps(told)}\n\n"

    def end(self, ids):
        return "eos" if ids[-1:] == [self.tokenizer.eos_token_id] else "limit"

    async def completions(self, request):
        body, refused = await self.taken(request)
        if refused:
            return refused
        if isinstance(body.get("temperature"), str):  # vLLM repeats what it was sent
            told = f"Input should be a valid number, input: {body['temperature']}"
            return JSONResponse({"error": {"message": told, "code": 400}}, 400)
        if body.get("temperature", 0) < 0:
            return JSONResponse({"error": {"message": "temperature is negative", "param": "temperature", "code": 400}}, 400)
        if body.get("logit_bias") and not self.takes_bias:
            return JSONResponse({"error": {"message": "logit_bias is not supported with speculative decoding"}}, 400)
        if body.get("stream"):
            return StreamingResponse(self.stream(body, len(self.asked)), media_type="text/event-stream")
        ids = [token async for token, _, _ in self.tokens(body)]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        about = {"index": 0, "finish_reason": "stop"}
        if body.get("return_token_ids") and self.gives_ids:
            about["token_ids"] = ids
        told = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        return JSONResponse({"id": "x", "choices": [about | told], "usage": {"completion_tokens": len(ids)}})

    async def stream(self, body, number):
        self.live += 1
        try:
            made = 0
            async for token, logprob, top in self.tokens(body):
                fault = self.fault(number, made)
                if fault == "die":
                    raise OSError("dies")
                if fault == "stall":
                    await asyncio.sleep(60)
                if fault in ("half", "garbage", "error", "end"):
                    yield {"half": 'data: {"choices": [', "garbage": "data: nonsense\n\n", "end": "",
                           "error": 'data: {"error": {"message": "out of memory", "code": 500}}\n\n'}[fault]  # fmt: skip
                    return
                made += 1
                ended = token == self.tokenizer.eos_token_id and not body.get("ignore_eos")
                reason = "stop" if ended else "length" if made == body.get("max_tokens") else None
                choice = {"index": 0, "text": "?", "finish_reason": reason, "stop_reason": None, "token_ids": [token]}
                if body.get("logprobs") is not None:
                    choice["logprobs"] = {"token_logprobs": [logprob], "top_logprobs": [top]}
                yield f"data: {json.dumps({'choices': [choice], 'error': None})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.live -= 1

    async def tokens(self, body):
        path, draw = self.prompt(body), torch.Generator().manual_seed(body.get("seed") or 0)
        words = map(self.tokenizer.convert_tokens_to_ids, body.get("bad_words") or ())
        banned = torch.tensor([token for token in words if token is not None], dtype=torch.long)
        for _ in range(body.get("max_tokens") or 200):
            async with self.computing:
                scores = await asyncio.to_thread(self.scores, path)
            for token, bias in (body.get("logit_bias") or {}).items():
                scores[int(token)] += bias
            scores[banned] = -torch.inf
            logprobs = scores.log_softmax(-1)
            if heat := body.get("temperature", 0):
                token = int(torch.multinomial((scores / heat).softmax(-1), 1, generator=draw))
            else:
                token = int(scores.argmax())
            best, ids = logprobs.topk(int(body.get("logprobs") or 1))
            named = {f"token_id:{one}": value for value, one in zip(best.tolist(), ids.tolist(), strict=True)}
            yield token, float(logprobs[token]), named
            if token == self.tokenizer.eos_token_id and not body.get("ignore_eos"):
                return
            path.append(token)

    def prompt(self, body):
        if "messages" in body:
            return self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        prompt = body["prompt"]
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    @torch.no_grad()
    def scores(self, path):
        return self.model(torch.tensor([path])).logits[0, -1].float()


def until(condition, seconds=10.0):
    """Wait until ``condition`` holds, and return whether it does."""
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return held


@contextlib.contextmanager
def proxy_before(upstreams, model, settings=None, **options):
    """The proxy in front of servers."""
    from hf_apar.serving.proxy.app import ProxySettings
    from hf_apar.serving.proxy.server import HEADERS, Upstreams, make_proxy

    urls = [f"{one.url}/v1" for one in upstreams]

    async def start():
        where = Upstreams(urls, str(model) if model else None, **options)
        running.proxy = await make_proxy(where, settings or ProxySettings())
        return running.proxy.app()

    running = InThread(start, **HEADERS)
    with running:
        yield running
