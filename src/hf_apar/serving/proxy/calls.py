"""One request of a client while threads write it: its answers, and what of them can be told."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, cast

from hf_apar.config import MAX_THREADS
from hf_apar.protocol import ControlTokens
from hf_apar.serving.answer import Answer, Limits
from hf_apar.serving.proxy.asked import Asked
from hf_apar.serving.proxy.served import Served
from hf_apar.serving.reading import Piece
from hf_apar.tree.threads import Decodes

if TYPE_CHECKING:
    from hf_apar.serving.proxy.upstream import Upstream


class Choice:
    """One of the answers of a call, the ``number``-th to its prompt: goes with each of its threads' requests."""

    def __init__(self, call: "ClientCall", index: int, number: int, answer: Answer) -> None:
        self.call, self.index, self.number, self.answer = call, index, number, answer
        self.told = False  # has its end been told?

    def new(self) -> Piece | None:
        """Return what is new, its end included; ``None`` if there is nothing to tell."""
        piece, ended = self.answer.read(), self.answer.finished and not self.told
        self.told |= ended
        return piece if piece.tokens or piece.text or ended else None

    @property
    def finish_reason(self) -> str | None:
        """Why it ended, as OpenAI's API words it; ``None`` until its end was told."""
        return ("length" if self.answer.finish_reason == "length" else "stop") if self.told else None


class ClientCall:
    """The answers to the prompts of a request, ``n`` to each, all written by one upstream.

    Args:
        max_threads: the most that an answer may have at once, whatever the client says.
        headers: that go with each request upstream.

    Attributes:
        news: set when there may be something to tell.
        begun: was anything of any answer made? Until then another upstream may write all of them.
        error: what a thread met; the call ends with it.
    """

    def __init__(
        self, upstream: "Upstream", served: Served, asked: Asked, prompts: Sequence[Sequence[int]],
        *, max_threads: int, headers: Sequence[tuple[bytes, bytes]],
    ) -> None:  # fmt: skip
        self.upstream, self.asked, self.headers = upstream, asked, headers
        self.prompt_tokens = sum(map(len, prompts))
        self.news = asyncio.Event()
        self.begun = False
        self.error: Exception | None = None
        config = asked.config.filled_from(served.config)
        most = min(max_threads, config.max_threads or MAX_THREADS)
        tokenizer, protocol = cast(Decodes, served.tokenizer), ControlTokens.of(config)  # an upstream itself knows what ends
        stop_tokens = {*asked.stop_tokens} - served.eos_ids  # these end a thread, as they do without being named

        def limits(prompt: Sequence[int]) -> Limits:
            room = upstream.max_length - len(prompt)  # as on vLLM, of the whole answer where the client names no limit
            most = room if asked.max_tokens is None else min(asked.max_tokens, room)
            return Limits(most, upstream.max_length, asked.stop, asked.include_stop, stop_tokens)

        self.choices = [
            Choice(self, place * asked.n + number, number, Answer(
                ids, protocol, limits(ids), tokenizer, max_threads=most, skip_special_tokens=asked.skip_special_tokens
            ))
            for place, ids in enumerate(prompts)
            for number in range(asked.n)
        ]  # fmt: skip

    async def begin(self) -> None:
        """Start all answers, and return when there may be something to tell.

        Raises:
            ApiError: what the upstream said, if it takes the request not.
        """
        self.upstream.begin(self)
        await self.news.wait()
        if self.error is not None:
            raise self.error

    async def pieces(self) -> AsyncGenerator[tuple[Choice, Piece], None]:
        """Yield what becomes readable, answer by answer, until the end of each was told.

        Raises:
            ApiError: what any thread met.
        """
        while True:
            self.news.clear()
            for choice in self.choices:
                if self.error is None and (piece := choice.new()) is not None:
                    yield choice, piece
            if self.error is not None:
                raise self.error
            if all(choice.told for choice in self.choices):
                return
            await self.news.wait()

    async def end(self) -> None:
        """Let all answers go; nothing runs for them once this returns."""
        await self.upstream.end(self)
