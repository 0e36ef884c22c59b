"""One request of ``AsyncLLM`` answered in threads: a request of the engine for each, read in order as they come."""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from hf_apar.config import AparConfig
from hf_apar.serving.admission import AdmissionPolicy, EqualShare, Load, policy_named
from hf_apar.serving.driver import Driver, ThreadRequest
from hf_apar.serving.tasks import TaskEngine
from hf_apar.serving.vllm import stats
from hf_apar.serving.vllm.engine import Call, QueueFull, made_by

_PAUSE = 0.05  # seconds until a child that the server's queue had no place for is tried again

Generate = Callable[..., AsyncGenerator[RequestOutput, None]]

_engines: "WeakKeyDictionary[Any, dict[int | None, ServerEngine]]" = WeakKeyDictionary()
_policy = policy_named(os.environ["APAR_POLICY"]) if os.environ.get("APAR_POLICY") else EqualShare()


def set_policy(policy: AdmissionPolicy) -> None:
    """Let ``policy`` decide when children start, in all servers of this process, from now on."""
    global _policy
    _policy = policy
    for ranks in _engines.values():
        for engine in ranks.values():
            engine.driver.admission.policy = policy


class ServerEngine(TaskEngine):
    """The part of a running ``AsyncLLM``, or one data-parallel rank of it, that writes threads."""

    def __init__(self, vllm_config: Any, rank: int | None) -> None:
        super().__init__()
        self.vllm_config, self.rank = vllm_config, rank
        self.driver = Driver(self, _policy)

    def load(self) -> Load:
        told = stats.reported(self.vllm_config, self.rank or 0)
        return Load(running=self.driver.threads) if told is None else told

    async def follow(self, request: ThreadRequest) -> None:
        call: ServerCall = request.options.call
        try:
            await self._report(request, call)
        except Exception as error:
            call.error = error
            call.news.set()

    async def _report(self, request: ThreadRequest, call: "ServerCall") -> None:
        prompt, params = call.prompt_of(request), request.options.request_params(request)
        while True:
            try:
                async for output in call.generate(prompt, params, **call.passed_on):
                    call.first = call.first or output
                    self.driver.made(made_by(request, output.outputs[0]))
                    if request.answer.news:
                        call.news.set()
                return
            except QueueFull:  # the server's queue is full: a child waits, a new answer is refused
                if request.opens_answer:
                    raise
                await asyncio.sleep(_PAUSE)


class ServerCall(Call):
    """A call of ``AsyncLLM.generate`` in threads.

    Attributes:
        generate: the stock method of the engine.
        news: set when there may be something to tell.
        error: what a request met; the call ends with it.
    """

    def __init__(self, generate: Generate, *asked: Any) -> None:
        super().__init__(*asked)
        self.generate = generate
        self.news = asyncio.Event()
        self.error: Exception | None = None

    def prompt_of(self, request: ThreadRequest) -> dict[str, Any]:
        """Return the prompt of a thread: its path in place of the call's own, with all that goes with it."""
        path = {**self.prompt, "prompt_token_ids": list(request.prompt_ids)}
        if not request.opens_answer:  # these describe the call's prompt alone
            path.pop("prompt", None)
            path.pop("prompt_token_offsets", None)
        return path


def engine_of(engine: Any, rank: int | None) -> ServerEngine:
    """Return what writes threads for ``engine``, or for its data-parallel ``rank``."""
    known = _engines.setdefault(engine, {})
    if rank not in known:
        known[rank] = ServerEngine(engine.vllm_config, rank)
    return known[rank]


def _choose_rank(engine: Any) -> int | None:
    """Return the data-parallel rank with the fewest threads: a thread finds its prefix on its parent's rank alone."""
    size = engine.vllm_config.parallel_config.data_parallel_size
    if size <= 1 or engine.vllm_config.parallel_config.data_parallel_external_lb:
        return None
    known = _engines.get(engine, {})
    return min(range(size), key=lambda rank: known[rank].driver.threads if rank in known else 0)


async def answer_in_threads(
    engine: Any,
    original: Generate,
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
    writer = engine_of(engine, rank)
    passed_on = {"request_id": request_id, "data_parallel_rank": rank, **kwargs}
    tokenizer, model_config = engine.get_tokenizer(), engine.model_config
    call = ServerCall(partial(original, engine), prompt, params, config, tokenizer, model_config, passed_on)
    try:
        for one in call.answers:
            writer.driver.add(one.answer, one)
        while not call.told:
            await call.news.wait()
            call.news.clear()
            if call.error is not None:
                raise call.error
            for output in call.outputs():
                yield output
    finally:
        for one in call.answers:
            writer.driver.remove(one.answer)
        await writer.settled([one.answer for one in call.answers])
