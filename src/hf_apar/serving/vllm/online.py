"""One request of ``AsyncLLM`` answered in threads: a request of the engine for each, read in order as they come."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from hf_apar.config import AparConfig
from hf_apar.protocol import ControlTokens
from hf_apar.serving.admission import Admission, AdmissionPolicy, Admitted, Load, ProportionalFair
from hf_apar.serving.vllm import stats
from hf_apar.serving.vllm.engine import (
    AparCompletion,
    Collector,
    QueueFull,
    as_text,
    merged,
    new_answer,
    take,
    thread_params,
)
from hf_apar.tree.threads import Thread

_PAUSE = 0.05  # seconds until a child that the server's queue had no place for is tried again

Event = tuple[Admitted, Thread, int, RequestOutput] | Exception  # the number is that of the thread's request

_admissions: "WeakKeyDictionary[Any, dict[int | None, Admission]]" = WeakKeyDictionary()

policy: AdmissionPolicy = ProportionalFair()
"""Decides when children start, for answers that begin from now on."""


def admission(engine: Any, rank: int | None) -> Admission:
    """Return what starts the threads of ``engine``, or of its data-parallel ``rank``."""
    found = _admissions.setdefault(engine, {})
    if rank not in found:
        found[rank] = Admission(policy, lambda: _load(found[rank], rank))
    found[rank].policy = policy
    return found[rank]


def _load(threads: Admission, rank: int | None) -> Load:
    told = stats.reported.get(rank or 0)
    return Load(running=threads.threads) if told is None else told.load


def _choose_rank(engine: Any) -> int | None:
    """Return the data-parallel rank with the fewest threads: a thread finds its prefix on its parent's rank alone."""
    size = engine.vllm_config.parallel_config.data_parallel_size
    if size <= 1 or engine.vllm_config.parallel_config.data_parallel_external_lb:
        return None
    known = _admissions.get(engine, {})
    return min(range(size), key=lambda rank: known[rank].threads if rank in known else 0)


async def answer_in_threads(
    engine: Any,
    original: Callable[..., AsyncGenerator[RequestOutput, None]],
    config: AparConfig,
    prompt: dict[str, Any],
    params: SamplingParams,
    request_id: str,
    *,
    data_parallel_rank: int | None = None,
    **kwargs: Any,
) -> AsyncGenerator[RequestOutput, None]:
    """Answer as ``AsyncLLM.generate`` does, in the output kind that ``params`` ask for.

    All threads run under ``request_id``, so that the server's own abort reaches them all. A caller that goes away, or an
    error of any thread, ends every one of them.
    """
    rank = _choose_rank(engine) if data_parallel_rank is None else data_parallel_rank
    tokenizer, shared = engine.get_tokenizer(), admission(engine, rank)
    ids = as_text(prompt["prompt_token_ids"], ControlTokens.of(config).control_ids, tokenizer)
    events: asyncio.Queue[Event] = asyncio.Queue()
    tasks: dict[tuple[Admitted, int], asyncio.Task[None]] = {}
    latest: dict[tuple[Admitted, int], int] = {}  # the number of each thread's request: one that is asked again has several
    started = count()

    def new_family(number: int) -> Admitted:
        answer = new_answer(ids, config, params, tokenizer, engine.model_config.max_model_len)

        async def follow(thread: Thread, request_number: int) -> None:
            path = {**prompt, "prompt_token_ids": list(thread.path_ids)}
            if thread.parent is not None:  # these describe the prompt alone
                path.pop("prompt", None)
                path.pop("prompt_token_offsets", None)
            own = thread_params(params, answer, thread, tokenizer, number)
            while True:
                try:
                    request = original(engine, path, own, request_id, data_parallel_rank=rank, **kwargs)
                    async for output in request:
                        events.put_nowait((family, thread, request_number, output))
                    return
                except QueueFull as error:  # the server's queue is full: a child waits, a new answer is refused
                    if thread.parent is None:
                        events.put_nowait(error)
                        return
                    await asyncio.sleep(_PAUSE)
                except Exception as error:
                    events.put_nowait(error)
                    return

        def start(thread: Thread) -> None:
            latest[family, thread.index] = own = next(started)
            tasks[family, thread.index] = asyncio.create_task(follow(thread, own))

        def cancel(thread: Thread) -> None:
            tasks[family, thread.index].cancel()

        family = Admitted(answer, start, cancel)
        return family

    families = [new_family(number) for number in range(params.n)]
    collectors = [Collector(family.answer, number, params) for number, family in enumerate(families)]
    finals: list[AparCompletion] = []
    first: RequestOutput | None = None
    try:
        for family in families:
            shared.add(family)
        while not all(collector.told for collector in collectors):
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            family, thread, request_number, output = event
            first = first or output
            if latest[family, thread.index] != request_number:
                continue  # what a cancelled request still told
            take(family.answer, thread, output.outputs[0])
            if family.answer.finished:
                shared.remove(family)
            else:
                shared.changed(family)
                shared.share()
            collector = collectors[families.index(family)]
            if collector.told:
                continue
            new = collector.collect()
            if family.answer.finished:
                shared.remove(family)  # a stop string cut it
            if new is None:
                continue
            if params.output_kind != RequestOutputKind.FINAL_ONLY:
                yield merged(first, [new], all(collector.told for collector in collectors))
                continue
            finals.append(new)
        if finals:
            assert first is not None
            yield merged(first, sorted(finals, key=lambda one: one.index), True)
    finally:
        for family in families:
            shared.remove(family)
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
