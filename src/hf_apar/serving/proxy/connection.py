"""What belongs to one connection: some of its headers, and work that ends when the client hangs up."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from email.utils import formatdate
from typing import Any, TypeVar

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_apar.serving.proxy.errors import ApiError

T = TypeVar("T")

LONGEST_LINE = 1 << 24
"""Bytes of a line of a server's stream, so that one without an end fills no memory."""

_HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade",
}  # fmt: skip


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers to pass on, their names in small letters: those that the connection owns or names are left out.

    >>> end_to_end([(b"Connection", b"close, X-Hop"), (b"X-Hop", b"1"), (b"X-Own", b"2")])
    [(b'x-own', b'2')]
    """
    found = [(name.lower(), value) for name, value in headers]
    named = {one.strip() for name, value in found if name == b"connection" for one in value.lower().split(b",")}
    return [(name, value) for name, value in found if name not in _HOP_BY_HOP | named]


async def lines_of(parts: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
    """Yield the lines of a stream that comes in parts; what follows the last line's end is left out.

    Raises:
        ApiError: if a line is longer than :data:`LONGEST_LINE`.
    """
    held, length = list[bytes](), 0
    async for part in parts:
        *ended, rest = part.split(b"\n")
        for line in ended:
            yield b"".join([*held, line])
            held, length = [], 0
        held.append(rest)
        length += len(rest)
        if length > LONGEST_LINE:
            raise ApiError(502, f"the upstream sent a line of more than {LONGEST_LINE:,} bytes")


class Dated:
    """Gives each answer that has none a ``Date``: what is passed on has the upstream's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def dated(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault("date", formatdate(usegmt=True))
            await send(message)

        await self.app(scope, receive, dated)


class HungUp(Exception):
    """The client has gone."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what ``work`` returns; it is cancelled as soon as the client hangs up.

    Raises:
        HungUp: if the client does.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HungUp
        return task.result()
    finally:
        for one in (task, watch):
            if not one.done():
                one.cancel()
                with suppress(asyncio.CancelledError):
                    await one


class BrokenOff(Exception):
    """What was passed on has ended before its end."""


class Ending(StreamingResponse):
    """A stream that calls ``end`` when it is over, however it ends; what breaks off does so for the client, too."""

    def __init__(self, content: AsyncIterator[bytes], end: Callable[[], Awaitable[None]], **options: Any) -> None:
        super().__init__(content, **options)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except BrokenOff:
            pass  # not completed: the web server closes the connection, so nobody takes it for whole
        finally:
            await self._end()
