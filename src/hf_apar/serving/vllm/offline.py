"""Answers with APAR from an engine in this process: ``vllm.LLM`` with children as requests of its own."""

import os
import time
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from hf_apar.config import AparConfig
from hf_apar.errors import ConfigurationError
from hf_apar.protocol import ControlTokens
from hf_apar.serving.admission import Admission, AdmissionPolicy, Admitted, Eager, Load, StepTimes
from hf_apar.serving.answer import Answer
from hf_apar.text.chat import encode_chat
from hf_apar.tree.threads import Thread

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # before vLLM is imported: one process, whose load can be seen

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput

from hf_apar.serving.vllm.engine import (
    AparCompletion,
    Collector,
    as_text,
    cannot_fork,
    merged,
    model_settings,
    new_answer,
    take,
    thread_params,
)

Message = Mapping[str, object]
Prompt = str | Sequence[int] | Mapping[str, Any]  # text, token ids, or vLLM's dicts of either


class AparLLM:
    """vLLM's ``LLM`` whose answers are written in parallel threads.

    Args:
        model: a folder that ``hf-apar merge`` wrote, or any checkpoint with control tokens.
        apar: settings that differ from the checkpoint's.
        policy: decides when a child starts; by default at once.
        vllm_arguments: those of ``vllm.LLM``. Threads share whole blocks of the KV cache alone: ``block_size`` is 32 unless
            you set it, since vLLM's own 128 on CPUs would share nothing of a short prompt.

    Attributes:
        llm: the engine, for all else that it can do.

    Raises:
        ControlTokenError: if the model has no control tokens.
    """

    def __init__(
        self,
        model: str,
        *,
        apar: AparConfig | None = None,
        policy: AdmissionPolicy | None = None,
        **vllm_arguments: Any,
    ) -> None:
        self.llm = LLM(model, **({"block_size": 32, "enable_prefix_caching": True} | vllm_arguments))
        self._engine = self.llm.llm_engine
        self._tokenizer = self.llm.get_tokenizer()
        settings = (apar or AparConfig()).filled_from(model_settings(self._engine.model_config, self._tokenizer))
        self.config = settings
        self.control_ids = ControlTokens.of(settings).control_ids
        self.times = StepTimes()
        self._admission = Admission(policy or Eager(), self._load)
        self._numbers = count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: Any = None,
    ) -> list[RequestOutput]:
        """Answer ``prompts``, texts or token ids, all at once.

        Returns:
            For each prompt vLLM's ``RequestOutput``; each of its ``outputs`` has the answer in reading order and its
            ``tree``, an :class:`~hf_apar.tree.threads.ParagraphTree`.

        Raises:
            ConfigurationError: for parameters that threads cannot follow, or of another number than the prompts.
        """
        one_prompt = isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int))
        given: list[Prompt] = [prompts] if one_prompt else list(prompts)  # type: ignore[list-item, arg-type]
        params = sampling_params or self.llm.get_default_sampling_params()
        each = [params] * len(given) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(given):
            raise ConfigurationError(f"{len(given)} prompts and {len(each)} sampling_params; give one for all, or one each")
        for one in each:
            if reason := cannot_fork(one):
                raise ConfigurationError(f"APAR cannot follow these sampling_params, since {reason}; use llm.generate")
        asked = [
            _Asked(self, self._ids(prompt), one, lora_request) for prompt, one in zip(given, each, strict=True)
        ]  # fmt: skip
        self._run(asked)
        return [one.output for one in asked]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora_request: Any = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Answer one chat, or several: as :meth:`generate`. What users typed cannot act as a special token.

        ``chat_template_kwargs`` are those of :func:`~hf_apar.text.chat.encode_chat`.
        """
        chats = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            encode_chat(self._tokenizer, chat, chat_template_kwargs=chat_template_kwargs)  # type: ignore[arg-type]
            for chat in chats
        ]
        return self.generate(prompts, sampling_params, lora_request=lora_request)

    def _ids(self, prompt: Prompt) -> list[int]:
        given: Any = prompt
        if isinstance(prompt, Mapping):
            given = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt["prompt"]
        return as_text(self._tokenizer.encode(given) if isinstance(given, str) else given, self.control_ids, self._tokenizer)

    def _run(self, asked: "Sequence[_Asked]") -> None:
        threads: dict[str, tuple[_Asked, Thread, Admitted]] = {}
        try:
            for one in asked:
                for number in range(one.params.n):
                    one.add(number, f"apar-{next(self._numbers)}", threads)
            while self._engine.has_unfinished_requests():
                width, started = len(threads), time.perf_counter()
                for output in self._engine.step():
                    if output.request_id not in threads:
                        continue  # cancelled before this step
                    request, thread, family = threads[output.request_id]
                    request.first = request.first or output
                    take(family.answer, thread, output.outputs[0])
                    if output.finished:
                        del threads[output.request_id]
                    self._admission.changed(family)
                    request.collect()
                self.times.add(width, time.perf_counter() - started)
                self._admission.share()
        finally:
            for one in asked:
                one.close()

    def _load(self) -> Load:
        core = getattr(getattr(self._engine, "engine_core", None), "engine_core", None)
        if core is None:  # an engine in another process tells nothing
            return Load(running=self._admission.threads, step_seconds=self.times)
        running, waiting = core.scheduler.get_request_counts()
        most = core.scheduler.max_num_running_reqs
        blocks, size = (getattr(self._engine.vllm_config.cache_config, name) for name in ("num_gpu_blocks", "block_size"))
        room = size * max((blocks or 0) - 1, 0)  # one block is vLLM's own
        return Load(running, waiting, core.scheduler.get_kv_cache_usage(), most, self.times, room, size)


class _Asked:
    """A prompt, its answers, and the requests that write them."""

    def __init__(self, owner: AparLLM, prompt_ids: list[int], params: SamplingParams, lora_request: Any) -> None:
        self.owner, self.prompt_ids, self.params, self.lora_request = owner, prompt_ids, params, lora_request
        self.first: RequestOutput | None = None
        self.families: list[Admitted] = []
        self.collectors: list[Collector] = []
        self.outputs: list[AparCompletion] = []  # of the answers that are finished
        self.output: Any = None

    def add(self, number: int, name: str, threads: "dict[str, tuple[_Asked, Thread, Admitted]]") -> None:
        """Start the ``number``-th answer; its requests are called ``name`` and the thread's number."""
        engine, answer = self.owner._engine, self._new_answer()

        requests, tries = dict[int, str](), count()  # a thread that is asked again has a request of another name

        def start(thread: Thread) -> None:
            request = requests[thread.index] = f"{name}-{next(tries)}"
            threads[request] = (self, thread, family)
            engine.add_request(
                request, TokensPrompt(prompt_token_ids=list(thread.path_ids)),
                thread_params(self.params, answer, thread, self.owner._tokenizer, number), lora_request=self.lora_request,
            )  # fmt: skip

        def cancel(thread: Thread) -> None:
            engine.abort_request([requests[thread.index]])
            threads.pop(requests[thread.index], None)

        family = Admitted(answer, start, cancel)
        self.families.append(family)
        self.collectors.append(Collector(answer, number, _final(self.params)))
        self.owner._admission.add(family)

    def collect(self) -> None:
        """Read what is new, so that a stop string cuts at once, and let finished answers go; the last makes the output."""
        self.outputs += [output for one in self.collectors if (output := one.collect()) is not None]
        for family in [one for one in self.families if one.answer.finished]:
            self.owner._admission.remove(family)
            self.families.remove(family)
        if not self.families and self.output is None:
            assert self.first is not None
            self.output = merged(self.first, sorted(self.outputs, key=lambda one: one.index), True)

    def close(self) -> None:
        """Cancel what still runs."""
        for family in self.families:
            self.owner._admission.remove(family)

    def _new_answer(self) -> Answer:
        owner = self.owner
        length = owner._engine.model_config.max_model_len
        return new_answer(self.prompt_ids, owner.config, self.params, owner._tokenizer, length)


def _final(params: SamplingParams) -> SamplingParams:
    from vllm.sampling_params import RequestOutputKind

    own = params.clone()
    own.output_kind = RequestOutputKind.FINAL_ONLY
    return own
