"""A server that writes threads, each as an ordinary completion with token ids."""

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, TypeVar

import httpx2
from starlette.requests import Request

from hf_apar.serving.admission import AdmissionPolicy, Load
from hf_apar.serving.driver import Driver, Made, ThreadRequest
from hf_apar.serving.proxy.calls import Choice, ClientCall
from hf_apar.serving.proxy.connection import BrokenOff, end_to_end, lines_of
from hf_apar.serving.proxy.dialects import Dialect, Told, check_made
from hf_apar.serving.proxy.errors import ApiError, Busy, Reworded, Unreachable
from hf_apar.serving.proxy.metrics import ProxyMetrics
from hf_apar.serving.tasks import TaskEngine

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSE = 0.1  # seconds until what a full queue had no place for is tried again
_BUSY = (429, 503)
_OF_ITS_OWN = {"accept", "accept-encoding", "user-agent"}  # headers that the connection adds where a client sends none
_MADE_ANEW = (b"host", b"content-length")  # headers that the request upstream has of its own


class Upstream(TaskEngine):
    """One server and its driver: the engine of all answers that were given to it.

    Args:
        url: of its API, such as ``http://localhost:8000/v1``.
        client: the connections.
        dialect: how it is talked to.
        max_length: tokens of a path, its prompt included.
        policy: decides when children start.

    Attributes:
        up: does it take requests, by what was seen last?
        calls: that it writes.
        plain: requests of clients that it has as they came.
    """

    def __init__(
        self, url: str, client: httpx2.AsyncClient, dialect: Dialect, max_length: int, policy: AdmissionPolicy,
        metrics: ProxyMetrics,
    ) -> None:  # fmt: skip
        super().__init__()
        self.url, self.client, self.dialect, self.max_length = url.rstrip("/"), client, dialect, max_length
        self.driver = Driver(self, policy)
        self.calls: set[ClientCall] = set()
        self.plain = 0
        self._metrics = metrics
        self.set_up(True)

    @property
    def root(self) -> str:
        """The server's address without the path of its API."""
        return self.url.removesuffix("/v1")

    @property
    def busy(self) -> int:
        """Requests that it has now."""
        return self.driver.threads + self.plain

    def set_up(self, up: bool) -> None:
        """Note whether it takes requests."""
        self.up = up
        self._metrics.up.labels(self.url).set(up)

    def load(self) -> Load:
        return Load(running=self.busy)

    @property
    def waiting(self) -> int:
        """Threads that wait for their turn."""
        return sum(len(one.answer.row.waiting) for call in self.calls for one in call.choices)

    async def send(self, request: Request, body: bytes, *, plain: bool) -> httpx2.Response:
        """Pass on a client's request with ``body``; of the answer only the head was read.

        Args:
            plain: it is a completion without threads; until its answer was read the caller counts it in ``plain``.

        Raises:
            ApiError: if the server does not answer, or takes no further completion.
        """
        target = request.scope["raw_path"]  # as it came, escapes included
        if query := request.scope["query_string"]:
            target += b"?" + query
        if not target.isascii():
            raise ApiError(400, "the path or the query has bytes beyond ASCII; write them as %XX")
        target = httpx2.URL(self.url).raw_path.rstrip(b"/") + target.removeprefix(b"/v1")
        headers = [(name, value) for name, value in end_to_end(request.headers.raw) if name not in _MADE_ANEW]
        passed = self.client.build_request(
            request.method, self.url, headers=headers, content=body, extensions={"target": target}
        )
        for name in _OF_ITS_OWN.difference(request.headers):
            passed.headers.pop(name, None)
        passed.headers.setdefault("accept-encoding", "identity")  # left out, it means any
        self.plain += plain
        try:
            response = await self.client.send(passed, stream=True)
            if response.status_code >= 500:
                self._count_error(response.status_code)
            if plain and response.status_code in _BUSY:
                raise self.refused(response, await response.aread())
        except httpx2.HTTPError as error:
            self.plain -= plain
            told = self.failed(error)
            self._count_error(told.status)
            raise told from error
        except BaseException:
            self.plain -= plain
            raise
        if plain:
            self._metrics.plain.labels(self.url).inc()
        return response

    async def rest(self, response: httpx2.Response) -> AsyncGenerator[bytes, None]:
        """Yield the body of what :meth:`send` returned, as it came.

        Raises:
            BrokenOff: if the server breaks off, or says nothing for too long.
        """
        try:
            async for part in response.aiter_raw():
                yield part
        except httpx2.HTTPError as error:
            told = self.failed(error)
            self._count_error(told.status)
            logger.warning("hf_apar: %s: %s", self.url, told)
            raise BrokenOff from error

    def _count_error(self, status: int) -> None:
        self._metrics.errors.labels(self.url, str(status)).inc()

    def begin(self, call: ClientCall) -> None:
        """Take on a call."""
        self.calls.add(call)
        for choice in call.choices:
            self.driver.add(choice.answer, choice)

    async def end(self, call: ClientCall) -> None:
        """Let a call go, finished or not; nothing runs for it once this returns."""
        self.calls.discard(call)
        answers = [choice.answer for choice in call.choices]
        for answer in answers:
            self.driver.remove(answer)
            if call.error is not None:
                answer.failure = "error"
            self._metrics.ended(self.url, answer)
        await self.settled(answers)

    async def follow(self, request: ThreadRequest) -> None:
        choice: Choice = request.options
        try:
            await self._write(request, choice)
        except Exception as error:
            if not isinstance(error, ApiError | httpx2.HTTPError):
                logger.exception("hf_apar: a thread could not be written")
            told = error if isinstance(error, ApiError) else self.failed(error)
            self._count_error(told.status)
            choice.call.error = choice.call.error or told
        choice.call.news.set()

    async def _write(self, request: ThreadRequest, choice: Choice) -> None:
        call, made, dialect = choice.call, list[int](), self.dialect
        while True:
            body = dialect.body(request, call.asked, choice.number, made)
            follow = partial(self._follow_stream, request, call, body, made, dialect.by_words)
            patient = call.begun  # until then another upstream may write the answers
            try:
                gap = await (self._patiently(follow) if patient else follow())
            except Reworded:
                dialect = dialect.in_words()
                continue
            except Busy:
                if patient or not call.begun:
                    raise
                continue
            if gap is None:
                return
            # what a stream does not name is asked for anew, from before it
            body = dialect.whole(dialect.body(request, call.asked, choice.number, made), gap)
            told = await self._patiently(partial(self._ask_whole, call, body))
            made += [one.token for one in told.tokens]
            call.begun = True
            reason = told.reason or ("length" if len(made) >= request.max_tokens else None)
            self.driver.made(Made(request, told.tokens, reason))
            call.news.set()
            if reason is not None:
                return

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Return what ``ask`` returns, called again while the server is too busy: an answer stays where it began."""
        given_up = time.monotonic() + (self.client.timeout.read or math.inf)
        while True:
            try:
                return await ask()
            except Busy:
                if time.monotonic() > given_up:
                    raise
            await asyncio.sleep(_PAUSE)

    async def _follow_stream(
        self, request: ThreadRequest, call: ClientCall, body: dict[str, Any], made: list[int], by_words: bool
    ) -> int | None:
        """Report what a request makes until it has ended; return how many tokens are not named where some are missing."""
        begun = len(made)
        async with aclosing(self.events(body, call.headers, by_words)) as events:
            async for event in events:
                told = self._read(event, len(made) - begun)
                if told.missing:
                    return told.missing + len(told.tokens)
                if told.failure:
                    raise ApiError(502, f"the upstream gave a thread up: {told.failure}")
                if not (told.tokens or told.reason):
                    continue
                check_made(request, told)
                call.begun = True
                made += [one.token for one in told.tokens]
                self.driver.made(Made(request, told.tokens, told.reason, told.stop_reason))
                call.news.set()
                if told.reason is not None:
                    with suppress(ApiError, httpx2.HTTPError):
                        async for _ in events:
                            pass  # to the end of the stream, so that its connection can be used again
                    return None
        raise ApiError(502, "the upstream's stream ended before its answer did")

    def _read(self, event: Mapping[str, Any], so_far: int) -> Told:
        try:
            return self.dialect.read(event, so_far)
        except (LookupError, TypeError, ValueError) as error:
            raise ApiError(
                502, f"the upstream returns no token ids as {self.dialect.name} does ({error}): {json.dumps(event)[:200]}"
            ) from error

    async def _ask_whole(self, call: ClientCall, body: dict[str, Any]) -> Told:
        response = await self.client.post(self._address, json=body, headers=call.headers)
        if response.status_code != 200:
            raise self.refused(response, response.content)
        return self._read(self._event(response.content), 0)

    @property
    def _address(self) -> str:
        path = self.dialect.path
        return f"{self.root}{path}" if path.startswith("/") else f"{self.url}/{path}"

    async def events(
        self, body: dict[str, Any], headers: Sequence[tuple[bytes, bytes]], by_words: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of a streamed completion, whose bans ``body`` says as words or not.

        Raises:
            ApiError: if it is refused, or what comes is no event.
        """
        async with self.client.stream("POST", self._address, json=body, headers=headers) as response:
            if response.status_code != 200:
                told = await response.aread()
                if not by_words and self.dialect.takes_no_bias(response.status_code, told.decode(errors="replace")):
                    raise Reworded(response.status_code, "the upstream takes no logit_bias")
                raise self.refused(response, told)
            self.dialect.by_words |= by_words  # it takes them; what a refusal says may be a client's own words
            async with aclosing(lines_of(response.aiter_bytes())) as lines:
                async for line in lines:
                    if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                        yield self._event(data)

    def _event(self, data: bytes) -> dict[str, Any]:
        try:
            event = json.loads(data)
        except ValueError as error:
            raise ApiError(502, f"the upstream sent an event that is no JSON: {data[:100]!r}") from error
        if not isinstance(event, dict):
            raise ApiError(502, f"the upstream sent an event that is no object: {data[:100]!r}")
        if (about := event.get("error")) is not None:
            code = about.get("code") if isinstance(about, dict) else None
            raise ApiError(code if isinstance(code, int) and 400 <= code < 600 else 502, "the upstream failed", body=data)
        return event

    def refused(self, response: httpx2.Response, body: bytes) -> ApiError:
        """Return the error for what the upstream answered."""
        status, sent = response.status_code, [(name.lower(), value) for name, value in response.headers.raw]
        kept = {name.decode(): value.decode("latin-1") for name, value in sent if name in (b"content-type", b"retry-after")}
        kind = Busy if status in _BUSY else ApiError
        return kind(status, f"the upstream answered with status {status}", body=body, headers=kept)

    def failed(self, error: Exception) -> ApiError:
        """Return the error for what a request to the upstream met."""
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            self.set_up(False)
            return Unreachable(503, "the upstream takes no connection", headers={"retry-after": "5"})
        if isinstance(error, httpx2.TimeoutException):
            return ApiError(504, "the upstream said nothing for too long")
        if isinstance(error, httpx2.HTTPError):
            return ApiError(502, f"the upstream broke off: {type(error).__name__}")
        return ApiError(500, f"the proxy failed: {type(error).__name__}")
