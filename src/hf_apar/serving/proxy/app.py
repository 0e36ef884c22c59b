"""The proxy's web application: OpenAI's completions in threads, everything else passed on."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from typing import Any
from urllib.parse import unquote

import httpx2
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hf_apar.serving.proxy.asked import Asked, parse
from hf_apar.serving.proxy.calls import ClientCall
from hf_apar.serving.proxy.connection import Dated, Ending, HungUp, end_to_end, while_connected
from hf_apar.serving.proxy.dialects import OTHER_TEXTS, Dialect
from hf_apar.serving.proxy.errors import ApiError, Busy, Unreachable, refuse
from hf_apar.serving.proxy.metrics import ProxyMetrics
from hf_apar.serving.proxy.openapi import description
from hf_apar.serving.proxy.pool import Pool
from hf_apar.serving.proxy.served import Served, check_lengths
from hf_apar.serving.proxy.upstream import Upstream
from hf_apar.serving.proxy.wire import Wire
from hf_apar.serving.reading import Piece

_WITH_THREADS = (b"authorization", b"x-api-key", b"api-key", b"traceparent", b"tracestate")
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]


@dataclass(frozen=True)
class ProxySettings:
    """What a proxy allows.

    Attributes:
        default: answer in threads where a request does not say otherwise.
        max_threads: of one answer at once.
        max_answers: in flight at once; beyond that requests are refused with status 503.
        max_body: bytes of a request.
        allowed_origins: of pages whose scripts may ask from a browser; ``*`` for all, none where there are none.
    """

    default: bool = True
    max_threads: int = 32
    max_answers: int = 256
    max_body: int = 32 * 2**20
    allowed_origins: Sequence[str] = ()


class ProxyServer:
    """Answers the requests of clients with the upstreams of ``pool``."""

    def __init__(
        self, served: Served, pool: Pool, client: httpx2.AsyncClient, settings: ProxySettings, metrics: ProxyMetrics
    ) -> None:
        self.served, self.pool, self.client, self.settings, self.metrics = served, pool, client, settings, metrics
        self.in_flight = 0
        self._encoding = asyncio.Lock()

    def app(self) -> Starlette:
        """Return the web application."""
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.text, methods=["POST"]),
            Route("/v1/{path:path}", self.other, methods=_METHODS),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.numbers, methods=["GET"]),
            Route("/openapi.json", self.described, methods=["GET"]),
        ]
        handlers: Mapping[Any, Any] = {ApiError: _told, HungUp: _unheard, ClientDisconnect: _unheard}
        middleware = [Middleware(Dated)]
        if origins := self.settings.allowed_origins:
            middleware.append(Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]))
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._life, middleware=middleware)

    @asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        watch = asyncio.create_task(self.pool.watch())
        try:
            yield
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
            await self.client.aclose()

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        return await self._completion(request, chat=True)

    async def text(self, request: Request) -> Response:
        """Go on from a text, or from several."""
        return await self._completion(request, chat=False)

    async def other(self, request: Request) -> Response:
        """Pass on what is no completion, as it came; what makes text all the same with both control tokens banned."""
        path = request.scope["path"]
        while path != (path := unquote(path)):  # what an upstream might make of it
            pass
        if ".." in path.split("/"):
            raise ApiError(404, "there is no such path")
        path, asks = path.rstrip("/"), request.method == "POST"
        if asks and path in ("/v1/chat/completions", "/v1/completions"):
            return await self._completion(request, chat="chat" in path)
        body = await self._body(request)
        if asks and path in OTHER_TEXTS:
            asked = _parsed(body)
            return await self._plain(request, lambda dialect: dialect.elsewhere(path, asked))
        return await self._passed_on(request, lambda _: body, self._nothing)

    async def health(self, _: Request) -> Response:
        """Tell whether any upstream takes requests."""
        up = {one.url: one.up for one in self.pool.upstreams}
        return JSONResponse(
            {"status": "ok" if any(up.values()) else "down", "upstreams": up}, 200 if any(up.values()) else 503
        )

    async def numbers(self, _: Request) -> Response:
        """Tell what was counted."""
        for one in self.pool.upstreams:
            self.metrics.live.labels(one.url).set(one.driver.threads)
            self.metrics.waiting.labels(one.url).set(one.waiting)
        self.metrics.in_flight.set(self.in_flight)
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def described(self, _: Request) -> Response:
        """Tell what can be asked."""
        return JSONResponse(description(self.settings.max_body))

    async def _completion(self, request: Request, *, chat: bool) -> Response:
        asked = parse(_parsed(await self._body(request)), chat=chat)
        wanted = self.settings.default if asked.threads is None else asked.threads
        if not wanted or asked.cannot_fork:
            return await self._plain(request, lambda dialect: dialect.plain(asked.body))
        release = self._take(asked.prompts * asked.n)
        try:
            async with self._encoding:
                prompts = await asyncio.to_thread(self.served.prompts, asked)
            check_lengths(asked, prompts, min(one.max_length for one in self.pool.upstreams))
            call = await self._begun(request, asked, prompts)
        except BaseException:
            await release()
            raise
        return await self._told(request, asked, call, release)

    async def _told(
        self, request: Request, asked: Asked, call: ClientCall, release: Callable[[], Awaitable[None]]
    ) -> Response:
        async def end() -> None:
            await call.end()
            await release()

        wire = Wire(asked, self.served.tokenizer)
        if asked.stream:
            return Ending(_events(wire, call), end, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        try:
            pieces = await while_connected(request, _whole(call))
            return JSONResponse(wire.whole(call, pieces))
        finally:
            await end()

    async def _begun(self, request: Request, asked: Asked, prompts: list[list[int]]) -> ClientCall:
        """Give a call to an upstream, to another one if that cannot take it, and return when it has begun."""
        headers = [(name, value) for name, value in end_to_end(request.headers.raw) if name in _WITH_THREADS]
        tried: dict[Upstream, ApiError] = {}
        while True:
            upstream = self.pool.choose(tried)
            call = ClientCall(upstream, self.served, asked, prompts, max_threads=self.settings.max_threads, headers=headers)
            try:
                await while_connected(request, call.begin())
                return call
            except (Unreachable, Busy) as error:
                tried[upstream] = error
                await call.end()
            except BaseException:
                await call.end()
                raise

    async def _plain(self, request: Request, body: Callable[[Dialect], Mapping[str, Any]]) -> Response:
        """Have one answer written without threads."""
        return await self._passed_on(request, lambda one: _json(body(one.dialect)), self._take(1), plain=True)

    async def _passed_on(
        self, request: Request, body: Callable[[Upstream], bytes], end: Callable[[], Awaitable[None]], *, plain: bool = False
    ) -> Response:
        """Send a request to an upstream, and what it answers to the client."""
        tried: dict[Upstream, ApiError] = {}
        try:
            while True:
                upstream = self.pool.choose(tried)
                try:
                    response = await while_connected(request, upstream.send(request, body(upstream), plain=plain))
                    break
                except (Unreachable, Busy) as error:
                    tried[upstream] = error
        except BaseException:
            await end()
            raise

        async def over() -> None:
            await response.aclose()
            upstream.plain -= plain
            await end()

        told = Ending(upstream.rest(response), over, status_code=response.status_code)
        told.raw_headers = end_to_end(response.headers.raw)
        if self.settings.allowed_origins:  # who may ask is said here
            told.raw_headers = [one for one in told.raw_headers if not one[0].startswith(b"access-control-")]
        return told

    async def _body(self, request: Request) -> bytes:
        limit, found = self.settings.max_body, bytearray()
        async for part in request.stream():
            found += part
            if len(found) > limit:
                raise ApiError(413, f"the body is longer than {limit} bytes, the limit of this proxy")
        return bytes(found)

    def _take(self, count: int) -> Callable[[], Awaitable[None]]:
        """Count so many answers as in flight; what is returned ends that."""
        if count > self.settings.max_answers:
            raise refuse("n", f"{count} answers are asked for, and this proxy writes {self.settings.max_answers} at most")
        if self.in_flight + count > self.settings.max_answers:
            self.metrics.refused.inc()
            raise ApiError(
                503, f"{self.in_flight} answers are in flight, of at most {self.settings.max_answers}; try again",
                headers={"retry-after": "1"},
            )  # fmt: skip
        self.in_flight += count

        async def release() -> None:
            self.in_flight -= count

        return release

    @staticmethod
    async def _nothing() -> None:
        """Nothing is to be released."""


def _parsed(body: bytes) -> object:
    try:
        found: object = json.loads(body, parse_constant=_no_number, parse_float=_finite)
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate is no text
        return found
    except (ValueError, RecursionError) as error:
        raise refuse("body", f"the body is no JSON ({error})") from error


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


async def _events(wire: Wire, call: ClientCall) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream; an error ends it, as in OpenAI's API."""
    try:
        for event in wire.opening(call):
            yield event
        async for choice, piece in call.pieces():
            yield wire.chunk(choice, piece)
        for event in wire.closing(call):
            yield event
    except ApiError as error:
        yield b"data: " + _json(error.told) + b"\n\ndata: [DONE]\n\n"


async def _whole(call: ClientCall) -> list[Piece]:
    found = [Piece() for _ in call.choices]
    async for choice, piece in call.pieces():
        found[choice.index].text += piece.text
        found[choice.index].tokens += piece.tokens
    return found


def _told(_: Request, error: ApiError) -> Response:
    headers = {"content-type": "application/json"} | error.headers
    return Response(error.body, error.status, headers=headers)


def _unheard(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it
