"""What keeps plain values, read from a file or made by hand, from being the trace of an answer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

from hf_apar.tree.threads import FinishReason


def problem(trace: Mapping[str, Any]) -> str | None:
    """Say what first contradicts itself in ``trace``, as ``Trace.to_dict`` gives it; ``None`` for one that can be shown."""
    return next(_problems(trace), None)


def _problems(trace: Mapping[str, Any]) -> Iterator[str]:
    times, threads = trace["times"], trace["threads"]
    if not _numbers(times) or any(later < sooner for sooner, later in pairwise((0.0, *times))):
        yield "times must be numbers that grow"
        return
    if not isinstance(trace["question"], str) or not isinstance(trace["timed"], bool):
        yield "question must be a text, and timed true or false"
    if not threads:
        yield "it has no threads"
    forked: dict[int, int] = {}  # where each thread forked last
    for index in range(len(threads)):
        if found := next(_of_thread(index, threads, len(times), forked), None):
            yield f"of thread {index}, {found}"
            return  # what follows looks at its parent's fields
    if trace["stopped_by"] is not None and not _whole((trace["stopped_by"],), 0, len(threads) - 1):
        yield "stopped_by must name a thread"


def _of_thread(index: int, threads: Sequence[Mapping[str, Any]], steps: int, forked: dict[int, int]) -> Iterator[str]:
    one = threads[index]
    texts, places, own = one["texts"], one["places"], one["steps"]
    if not _sequence(texts) or not all(isinstance(text, str) for text in texts):
        yield "texts must be texts"
    elif not _whole((one["inherited"],), 0):
        yield "inherited must be the length of a path"
    elif not _whole((one["born"],), -1, steps - 1) or not _whole(own, max(one["born"], 0), steps - 1, ascending=True):
        yield "born and steps must be numbers of steps, in their order"
    elif one["ended"] is not None and not _whole((one["ended"],), max(one["born"], *own, 0), steps - 1):
        yield "ended must be the number of a step, none before its last"
    elif not _whole(places, one["inherited"], one["inherited"] + len(own) - 1, ascending=True):
        yield "places must be among those that were taken in steps, in their order"
    elif len({*places}) != len(texts):
        yield "places must be one for each text"
    elif one["finish_reason"] not in (None, *get_args(FinishReason)):
        yield f"finish_reason is none of {', '.join(get_args(FinishReason))}"
    elif not _whole(one["accepted"], 0, len(texts) - 1):
        yield "accepted must be indices of texts"
    elif one["logprobs"] is not None and not _logprobs(one["logprobs"], len(texts)):
        yield "logprobs must be a number or null for each text"
    yield from _of_fork(index, threads, forked)


def _of_fork(index: int, threads: Sequence[Mapping[str, Any]], forked: dict[int, int]) -> Iterator[str]:
    one = threads[index]
    if index == 0 or one["parent"] is None:
        if index or one["parent"] is not None:
            yield "the first one alone has no parent"
        return
    if not _whole((one["parent"],), 0, index - 1):
        yield "parent must be a thread before it"
        return
    parent = threads[one["parent"]]
    if not _whole((one["fork_position"],), forked.get(one["parent"], 0), len(parent["texts"])):
        yield "fork_position must be a place among its parent's texts, after those of threads before it"
        return
    forked[one["parent"]] = one["fork_position"]
    if one["born"] < parent["born"] or not 0 <= one["inherited"] - parent["inherited"] <= len(parent["steps"]):
        yield "it must be born in its parent, and inherit of it"


def _sequence(values: object) -> bool:
    return isinstance(values, list | tuple)


def _numbers(values: Any) -> bool:
    return _sequence(values) and all(
        isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in values
    )


def _whole(values: Any, least: int, most: float = math.inf, *, ascending: bool = False) -> bool:
    """Are they whole numbers from ``least`` to ``most``?"""
    if not _sequence(values) or not all(isinstance(one, int) and not isinstance(one, bool) for one in values):
        return False
    within = all(least <= one <= most for one in values)
    return within and (not ascending or all(sooner <= later for sooner, later in pairwise(values)))


def _logprobs(values: Any, count: int) -> bool:
    return _sequence(values) and len(values) == count and _numbers([one for one in values if one is not None])
