"""The upstreams of a proxy: which of them is given an answer, and which of them are back."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from hf_apar.errors import AparError
from hf_apar.serving.proxy.dialects import Dialect
from hf_apar.serving.proxy.errors import ApiError
from hf_apar.serving.proxy.upstream import Upstream

logger = logging.getLogger(__name__)

Look = Callable[[str], Awaitable[tuple[Dialect, int]]]
"""Has the server at an address show what it is: how it is talked to, and the tokens of its context.

Raises an :class:`AparError` if it does not answer, or cannot be an upstream.
"""

_PAUSE = 2.0  # seconds between two looks at an upstream that is down


class Pool:
    """The upstreams. An answer goes to one of them with all its threads, since a thread finds its prefix there."""

    def __init__(self, upstreams: Sequence[Upstream], look: Look) -> None:
        self.upstreams, self._look = upstreams, look
        self._turn = {one: place for place, one in enumerate(upstreams)}  # the longer ago it was chosen, the lower

    def choose(self, tried: Mapping[Upstream, ApiError]) -> Upstream:
        """Return the upstream with the fewest requests of those that are up and not ``tried``, in turn where they are alike.

        Args:
            tried: what others said to the same request.

        Raises:
            ApiError: if there is none: what was said last, else status 503.
        """
        left = [one for one in self.upstreams if one.up and one not in tried]
        if not left:
            nobody = ApiError(503, "no upstream takes requests now; try again", headers={"retry-after": "5"})
            raise [nobody, *tried.values()][-1]
        chosen = min(left, key=lambda one: (one.busy, self._turn[one]))
        self._turn[chosen] = max(self._turn.values()) + 1
        return chosen

    async def watch(self) -> None:
        """Look for ever whether upstreams that are down are back, and what they are by now."""
        await asyncio.gather(*map(self._watch, self.upstreams))

    async def _watch(self, upstream: Upstream) -> None:
        said = ""
        while True:
            await asyncio.sleep(_PAUSE)
            if upstream.up:
                continue
            try:
                upstream.dialect, upstream.max_length = await self._look(upstream.url)
            except AparError as error:
                if said != (said := str(error)):
                    logger.warning("hf_apar: %s is down: %s", upstream.url, error)
                continue
            logger.warning("hf_apar: %s is back", upstream.url)
            upstream.set_up(True)
            said = ""
