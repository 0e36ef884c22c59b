"""Chats that a model answers behind any OpenAI-compatible server (extra ``evaluate``), asked again until it does."""

import json
import os
import random
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import count
from threading import Event
from typing import TypeVar

from hf_apar.errors import ConfigurationError, MissingPackageError, ServerError

try:
    import httpx2
except ImportError as error:
    raise MissingPackageError("to ask a server needs httpx2; run pip install 'hf-apar[evaluate]'") from error

from hf_apar.data.records.chats import Message

Key = TypeVar("Key")

_PATIENCE = 5  # requests in a row that fail for good until all stops
_LONGEST_PAUSE = 60.0  # seconds
_CONNECT = 10.0  # seconds
_REFUSALS = (400, 413, 422)  # of one request, unlike a wrong key or address


class RequestRefused(ServerError):
    """A request that the server does not take, such as one that is too long; others it may."""


@dataclass(frozen=True)
class Completion:
    """What a model replied.

    Attributes:
        text: none where the model stopped within its thoughts.
        thoughts: what it thought first, where the server keeps that apart.
        ended: false where a limit of length cut it.
    """

    text: str
    thoughts: str = ""
    ended: bool = True


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """A model behind a server, and how it is asked.

    Args:
        url: of the API, such as ``http://localhost:8000/v1``.
        model: its name there.
        key_variable: the environment variable that holds the key; no key is sent without.
        parameters: of a completion, beside model and messages.
        timeout: seconds that the server may say nothing.
        retries: of a request that was not answered, or with status 408, 425, 429 or 500 and above.
        pause: seconds before the first retry, twice as many before each other, a minute at most.
        concurrency: requests at once.

    Raises:
        ConfigurationError: if one of them cannot be, or the variable is not set.
    """

    url: str
    model: str
    key_variable: str | None = None
    parameters: Mapping[str, object] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 4096})
    timeout: float = 120.0
    retries: int = 5
    pause: float = 1.0
    concurrency: int = 8

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or "@" in self.url:
            raise ConfigurationError(f"the server's address is {self.url!r}; give one such as http://localhost:8000/v1")
        if self.timeout <= 0 or self.retries < 0 or self.pause < 0 or self.concurrency < 1:
            raise ConfigurationError(
                f"{self} cannot be asked; give timeout > 0, retries and pause of at least 0, concurrency of at least 1"
            )
        if self.key_variable is not None and not os.environ.get(self.key_variable):
            raise ConfigurationError(f"the variable {self.key_variable} holds no key for {self.url}; set it or name another")

    def ask(
        self, chats: Mapping[Key, Sequence[Message]], *, refusals_fail: bool = True
    ) -> Generator[tuple[Key, Completion | ServerError]]:
        """Yield the reply to each of ``chats`` as it comes, or why there is none.

        Args:
            refusals_fail: is a request that the server refuses a failure of the server, or of the chat?

        Raises:
            ServerError: if five requests in a row fail for good.
        """
        stop, failed = Event(), 0
        with self._client() as client, ThreadPoolExecutor(self.concurrency) as pool:
            asked = {pool.submit(self._reply, client, chat, stop): key for key, chat in chats.items()}
            try:
                for done in as_completed(asked):
                    reply = done.result()
                    yield asked[done], reply
                    if isinstance(reply, RequestRefused) and not refusals_fail:
                        continue
                    failed = failed + 1 if isinstance(reply, ServerError) else 0
                    if isinstance(reply, ServerError) and failed == _PATIENCE:
                        raise ServerError(
                            f"the server failed {_PATIENCE} times in a row, at last: {reply}; what it said until then is "
                            "kept, and the next call goes on from there"
                        ) from reply
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _client(self) -> httpx2.Client:
        key = os.environ[self.key_variable] if self.key_variable else None
        return httpx2.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, _CONNECT), pool=None),
            limits=httpx2.Limits(max_connections=self.concurrency),
        )

    def _reply(self, client: httpx2.Client, chat: Sequence[Message], stop: Event) -> Completion | ServerError:
        """Return the reply to ``chat``, asked for again until there is one or there is no use."""
        body = dict(self.parameters) | {"model": self.model, "messages": list(chat)}
        for attempt in count():
            pause, again = self.pause * 2**attempt * random.uniform(0.5, 1.0), True
            try:
                response = client.post("chat/completions", json=body)
                if response.is_success:
                    return _completion(response)
                kind = RequestRefused if response.status_code in _REFUSALS else ServerError
                error = kind(f"{client.base_url} answers with status {response.status_code}: {response.text[:300]}")
                again = response.status_code in (408, 425, 429) or response.status_code >= 500
                pause = max(pause, _seconds(response.headers.get("retry-after")))
            except httpx2.RequestError as failed:
                error = ServerError(f"{client.base_url} does not answer: {type(failed).__name__} {failed}".rstrip())
            except ServerError as failed:
                error = failed
            if not again or attempt == self.retries or stop.wait(min(pause, _LONGEST_PAUSE)):
                return error
        raise AssertionError("count() has no end")


def _seconds(header: str | None) -> float:
    return float(header) if header is not None and header.isdecimal() else 0.0


def _completion(response: httpx2.Response) -> Completion:
    try:
        choice = response.json()["choices"][0]
        message = choice["message"]
        thoughts = next(filter(None, map(message.get, ("reasoning", "reasoning_content"))), "")
        text, ended = message["content"] or "", choice.get("finish_reason") != "length"
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(f"{response.url} answers with no chat completion: {response.text[:300]}") from error
    if not isinstance(text, str) or not isinstance(thoughts, str):
        raise ServerError(f"{response.url} answers with content that is no text: {json.dumps(message)[:300]}")
    return Completion(_writable(text), _writable(thoughts), ended)


def _writable(text: str) -> str:
    """Return ``text`` without half surrogate pairs, which JSON may escape and no file takes."""
    return text.encode("utf-8", "replace").decode()
