"""The upstreams of a proxy: which of them is given an answer, and which of them are back."""

import asyncio
import logging
from collections.abc import Collection, Sequence

from hf_apar.serving.proxy.errors import ApiError
from hf_apar.serving.proxy.upstream import Upstream

logger = logging.getLogger(__name__)

_PAUSE = 2.0  # seconds between two looks at upstreams that are down


class Pool:
    """The upstreams. An answer goes to one of them with all its threads, since a thread finds its prefix there."""

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self.upstreams = upstreams
        self._turn = {one: place for place, one in enumerate(upstreams)}  # the longer ago it was chosen, the lower

    def choose(self, tried: Collection[Upstream] = ()) -> Upstream:
        """Return the upstream with the fewest requests of those that are up and not ``tried``, in turn where they are alike.

        Raises:
            ApiError: with status 503, if there is none.
        """
        left = [one for one in self.upstreams if one.up and one not in tried]
        if not left:
            raise ApiError(503, "no upstream takes requests now; try again", headers={"retry-after": "5"})
        chosen = min(left, key=lambda one: (one.busy, self._turn[one]))
        self._turn[chosen] = max(self._turn.values()) + 1
        return chosen

    async def watch(self) -> None:
        """Look for ever whether upstreams that are down are back."""
        while True:
            await asyncio.sleep(_PAUSE)
            for one in self.upstreams:
                if not one.up and await one.answers():
                    logger.warning("hf_apar: %s is back", one.url)
                    one.set_up(True)
