"""Which answers are held out: no prompt stands on both sides, or the held-out figures tell what was learnt by heart."""

import logging
from collections.abc import Sequence

from hf_apar.data.records.chats import Message
from hf_apar.errors import DataError

logger = logging.getLogger(__name__)


def prompt_key(before: Sequence[Message]) -> str:
    """Return what tells one chat from another: all up to its first question, whatever its case and spaces.

    Answers to one prompt have the same key, and so have the turns of one chat. One question about two documents, which the
    system's message may hold, is two prompts.

    >>> prompt_key([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What  is\\nTea?"}])
    'be brief. what is tea?'
    """
    asked = next((place for place, message in enumerate(before) if message["role"] == "user"), len(before))
    return " ".join(" ".join(message["content"] for message in before[: asked + 1]).casefold().split())


def held_out_places(keys: Sequence[str], count: int) -> list[int]:
    """Return the places of at most ``count`` answers, the first whose groups of one key fit whole; else the smallest group.

    Where that is more than twice as many, a warning says so.

    >>> held_out_places(["tea", "oak", "tea", "ash", "elm"], 2)
    [0, 2]
    >>> held_out_places(["tea", "tea", "tea", "oak", "oak"], 1)
    [3, 4]

    Raises:
        DataError: if all keys are one.
    """
    groups: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    if len(groups) < 2:
        raise DataError(
            f"all {len(keys)} answers are to one prompt, so that none can be held out to judge by; give answers to several"
        )
    chosen: list[int] = []
    for places in groups.values():
        if len(chosen) + len(places) <= count:
            chosen += places
    chosen = sorted(chosen) or min(groups.values(), key=len)
    if len(chosen) > 2 * count:
        logger.warning(
            "%d of %d answers are held out, where %d were asked for: to each of %d prompts there are at least so many",
            len(chosen), len(keys), count, len(groups),
        )  # fmt: skip
    return chosen
