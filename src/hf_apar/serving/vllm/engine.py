"""With ``parameters``, all that depends on vLLM's version: settings of a model, what a request made, a call and its outputs.

Tested with vLLM 0.29 and 0.32, the two ends of what is supported; 0.20.2 and 0.26 have the same names in what is used here.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams, exceptions
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from hf_apar.config import MAX_THREADS, AparConfig
from hf_apar.errors import ConfigurationError, ControlTokenError
from hf_apar.protocol import ControlTokens
from hf_apar.serving.admission import Load
from hf_apar.serving.answer import Answer, Limits
from hf_apar.serving.driver import Made, ThreadRequest
from hf_apar.serving.reading import MadeToken, Piece
from hf_apar.serving.vllm.parameters import stop_tokens, thread_params, wants_logprobs
from hf_apar.text.spelling import spelt
from hf_apar.tokens import completed
from hf_apar.tree.threads import FinishReason, ParagraphTree

QueueFull: Any = getattr(exceptions, "GracefulHTTPError", ())
"""What vLLM raises where its queue takes no request; nothing in versions that always take one."""

_FINISH: Mapping[str, FinishReason] = {"stop": "eos", "length": "length", "repetition": "stop"}
_REPEATED = "repetition_detected"  # vLLM's stop reason where `repetition_detection` ended a thread


@dataclass
class AparCompletion(CompletionOutput):  # type: ignore[misc]
    """vLLM's output of one sequence: the answer in reading order, and its tree, whole once the answer is finished."""

    tree: ParagraphTree | None = None


def model_settings(model_config: Any, tokenizer: Any) -> AparConfig:
    """Return the APAR settings that a checkpoint carries, with the ids of its control tokens.

    Args:
        tokenizer: ``None`` where the engine has none.

    Raises:
        ControlTokenError: if the model has no control tokens.
    """
    settings = AparConfig.from_dict(model_config.try_get_generation_config().get("apar_config") or {})
    settings = settings if tokenizer is None else completed(settings, tokenizer)
    if settings.control_ids is None:
        raise ControlTokenError(
            f"{model_config.model} has no [Fork] and [Child] tokens; serve a folder that `hf-apar merge` wrote "
            "of a model that was fine-tuned for APAR"
        )
    return settings


def made_by(request: ThreadRequest, output: CompletionOutput) -> Made:
    """Return what a request told, a delta, as the driver wants it."""
    ids, reason = list(output.token_ids), output.finish_reason
    logprobs = output.logprobs if output.logprobs is not None else [None] * len(ids)
    tokens = [
        MadeToken(token, None if note is None else note[token].logprob, note)
        for token, note in zip(ids, logprobs, strict=True)
    ]
    if reason is not None and reason not in _FINISH:
        return Made(request, tokens, failure=reason)
    return Made(request, tokens, None if reason is None else _FINISH[reason], output.stop_reason)


def load_of(vllm_config: Any, running: int, waiting: int, kv_usage: float) -> Load:
    """Return the load of an engine that has told the three numbers."""
    cache = vllm_config.cache_config  # its number of blocks is known once the engine has started
    tokens = cache.block_size * max((cache.num_gpu_blocks or 0) - 1, 0)  # one block is vLLM's own
    return Load(running, waiting, kv_usage, vllm_config.scheduler_config.max_num_seqs, tokens, cache.block_size)


def load_in_process(engine: Any) -> Load | None:
    """Return the load of an ``LLMEngine``, or ``None`` where it works in another process, which tells nothing."""
    core = getattr(getattr(engine, "engine_core", None), "engine_core", None)
    if core is None:
        return None
    running, waiting = core.scheduler.get_request_counts()
    return load_of(engine.vllm_config, running, waiting, core.scheduler.get_kv_cache_usage())


class Call:
    """One prompt and what vLLM was asked of it: ``n`` answers, told in its outputs.

    Args:
        prompt: vLLM's own dict, ``prompt_token_ids`` among it.
        params: of the call; its ``output_kind`` says in which form the answers are told.
        passed_on: what else goes with each request, such as ``lora_request``.

    Attributes:
        answers: the answers.
        first: what the first request told first: the prompt, its cached tokens, its times.
    """

    def __init__(
        self,
        prompt: Mapping[str, Any],
        params: SamplingParams,
        config: AparConfig,
        tokenizer: Any,
        model_config: Any,
        passed_on: Mapping[str, Any],
    ) -> None:
        control = ControlTokens.of(config).control_ids
        self.prompt = {**prompt, "prompt_token_ids": spelt(prompt["prompt_token_ids"], control, tokenizer)}
        self.params, self.tokenizer, self.passed_on = params, tokenizer, passed_on
        self.first: RequestOutput | None = None
        stop = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
        ends = stop_tokens(params, model_config, tokenizer) - control
        limits = Limits(
            params.max_tokens, model_config.max_model_len, stop, params.include_stop_str_in_output, ends
        )  # fmt: skip
        self.answers = [AnswerOutput(self, number, config, limits) for number in range(params.n)]

    @property
    def told(self) -> bool:
        """Has the end of every answer been told?"""
        return all(one.told for one in self.answers)

    def outputs(self) -> list[RequestOutput]:
        """Return what is new in the form that the caller asked for."""
        if self.params.output_kind != RequestOutputKind.FINAL_ONLY:
            return [self._merged([new]) for one in self.answers if (new := one.new()) is not None]
        if self.told or not all(one.answer.finished for one in self.answers):
            return []
        return [self._merged([new for one in self.answers if (new := one.new()) is not None])]

    def _merged(self, outputs: list["AparCompletion"]) -> RequestOutput:
        first = self.first
        assert first is not None
        return RequestOutput(
            request_id=first.request_id, prompt=first.prompt, prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=first.prompt_logprobs, outputs=outputs, finished=self.told, metrics=first.metrics,
            lora_request=first.lora_request, num_cached_tokens=first.num_cached_tokens,
        )  # fmt: skip


class AnswerOutput:
    """One answer of a call, its ``number``-th: goes with each of its requests, and puts what reads into vLLM's outputs."""

    def __init__(self, call: Call, number: int, config: AparConfig, limits: Limits) -> None:
        self.call, self.number = call, number
        self.answer = Answer(
            call.prompt["prompt_token_ids"], ControlTokens.of(config), limits, call.tokenizer,  # vLLM itself knows what ends
            max_threads=config.max_threads or MAX_THREADS, skip_special_tokens=call.params.skip_special_tokens,
        )  # fmt: skip
        self.told = False  # has its end been told?
        self._so_far = Piece()

    def request_params(self, request: ThreadRequest) -> SamplingParams:
        """Return the parameters under which vLLM writes ``request``; each answer to a prompt is drawn by itself."""
        own = thread_params(request, self.call.params, self.call.tokenizer)
        if own.seed is not None:
            own.seed = request.seed(self.call.params.seed, self.number)
        return own

    def new(self) -> "AparCompletion | None":
        """Return what is new, or all so far where the caller wants that; ``None`` if there is nothing to tell."""
        piece, ended = self.answer.read(), self.answer.finished and not self.told
        self.told |= ended
        if not (piece.tokens or piece.text or ended):
            return None
        if self.call.params.output_kind == RequestOutputKind.DELTA:
            return self._output(piece, ended)
        self._so_far = Piece(self._so_far.text + piece.text, self._so_far.tokens + piece.tokens)
        return self._output(self._so_far, ended)

    def _output(self, piece: Piece, ended: bool) -> "AparCompletion":
        asked = wants_logprobs(self.call.params)
        logprobs = [one.logprob for one in piece.tokens if one.logprob is not None]
        cut = "length" if self.answer.finish_reason == "length" else "stop"
        cut = "repetition" if self.answer.stop_reason == _REPEATED else cut
        return AparCompletion(
            index=self.number,
            text=piece.text,
            token_ids=[one.token for one in piece.tokens],
            cumulative_logprob=sum(logprobs) if asked else None,
            logprobs=[one.note for one in piece.tokens] if asked else None,
            finish_reason=self.answer.failure or cut if ended else None,
            stop_reason=self.answer.stop_reason if ended else None,
            tree=self.answer.tree,
        )


_GENERATE = ("self", "prompt", "sampling_params", "request_id")
_PROCESS = ("self", "request_id", "prompt", "params")


def check_seams(generate: Any, process_inputs: Any) -> None:
    """Check what :mod:`hf_apar.serving.vllm.plugin` relies on.

    Raises:
        ConfigurationError: if this vLLM is another one than those this module was written for.
    """
    found, processed = (tuple(inspect.signature(one).parameters) for one in (generate, process_inputs))
    fits = found[:4] == _GENERATE and {"lora_request", "priority", "data_parallel_rank"} <= set(found)
    if not fits or processed[:4] != _PROCESS:
        raise ConfigurationError(
            f"this vLLM's AsyncLLM.generate takes {', '.join(found)}, and its InputProcessor.process_inputs "
            f"{', '.join(processed)}; hf_apar knows vLLM 0.29 to 0.32: install one of these, or leave hf_apar out with "
            "VLLM_PLUGINS"
        )
