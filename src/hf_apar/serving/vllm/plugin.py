"""APAR behind ``vllm serve``: a general plugin, by which ``AsyncLLM.generate`` answers in threads where a request asks.

A request asks with ``"vllm_xargs": {"apar": 1}``, optionally with ``apar_max_threads``, ``apar_max_depth`` and
``apar_fork_bias``; the environment variable ``APAR_DEFAULT=1`` asks for all requests, and ``{"apar": 0}`` declines. What
cannot fork, and all that does not ask, takes vLLM's own path, where a model that knows the control tokens may write none:
what it puts behind a [Fork] would be missing in the text. ``{"apar": "thread"}`` is for programs that read threads
themselves: such a request is one of them, and gets all that the model writes.
"""

import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Set
from contextlib import aclosing
from typing import Any
from weakref import WeakKeyDictionary

from hf_apar.config import AparConfig
from hf_apar.errors import AparError, ControlTokenError
from hf_apar.protocol import ControlTokens
from hf_apar.serving.admission import policy_named

logger = logging.getLogger("vllm.hf_apar")

AS_IT_COMES = "thread"
"""What ``apar`` says of a request that is one thread of an answer: it is neither kept from forks nor answered in threads."""

Outputs = AsyncGenerator[Any, None]  # of vLLM's RequestOutput

NO = ("", "0", "0.0", "false", "no", "off", "none")
"""What ``apar`` may say to decline."""

SETTINGS = {"apar_max_threads": "max_threads", "apar_max_depth": "max_depth", "apar_fork_bias": "fork_bias"}
"""What else a request may say, and what :class:`~hf_apar.AparConfig` calls it."""

_found: "WeakKeyDictionary[Any, AparConfig | AparError]" = WeakKeyDictionary()  # by what makes an engine's requests


def register() -> None:
    """Let ``AsyncLLM.generate`` answer in threads, and ban control tokens elsewhere; a second call changes nothing.

    Raises:
        ConfigurationError: if this vLLM's seams are not those that this package knows, or ``APAR_POLICY`` names no policy.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    from hf_apar.serving.vllm.engine import check_seams

    policy_named(os.environ.get("APAR_POLICY") or "eager")  # a mistake is told now
    original: Callable[..., Outputs] = AsyncLLM.generate
    processed: Callable[..., Any] = InputProcessor.process_inputs
    if original.__module__ == __name__:  # ours already
        return
    check_seams(original, processed)
    if os.environ.get("VLLM_USE_RUST_FRONTEND") == "1":
        logger.warning("hf_apar: the Rust front end passes by AsyncLLM; unset VLLM_USE_RUST_FRONTEND to serve APAR")

    def generate(self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> Outputs:
        config = wanted(self, prompt, sampling_params)
        if config is None:
            outputs = original(self, prompt, sampling_params, request_id, **kwargs)
            return without_candidates(self.input_processor, sampling_params, outputs)
        from hf_apar.serving.vllm.online import answer_in_threads

        return answer_in_threads(self, original, config, prompt, sampling_params, request_id, **kwargs)

    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        return processed(self, request_id, prompt, without_forks(self, params), *args, **kwargs)

    AsyncLLM.generate = generate
    InputProcessor.process_inputs = process_inputs


def wanted(engine: Any, prompt: Any, params: Any) -> AparConfig | None:
    """Return the settings with which a request is to be answered in threads, ``None`` for vLLM's own path.

    Raises:
        VLLMValidationError: for settings that are no settings; the server answers with status 400.
    """
    given: Mapping[str, Any] = getattr(params, "extra_args", None) or {}
    asked = given.get("apar", os.environ.get("APAR_DEFAULT", "0"))
    if str(asked).lower() in NO:
        return None
    from hf_apar.serving.vllm.parameters import cannot_fork, check_bias

    if asked == AS_IT_COMES:
        return None
    reason = cannot_fork(params) or _unfit(engine, prompt)
    if reason is not None:
        logger.debug("hf_apar: decoded plainly, since %s", reason)
        return None
    try:
        own = {ours: given[name] for name, ours in SETTINGS.items() if name in given}
        for name in ("max_threads", "max_depth"):
            if name in own:
                own[name] = int(own[name])
        config = AparConfig.from_dict(own).filled_from(_settings(engine.input_processor))
        check_bias(config, engine.vllm_config)
        return config
    except (AparError, ValueError, TypeError, OverflowError) as error:
        if "apar" not in given:  # the server's setting, not the request's
            logger.debug("hf_apar: decoded plainly, since %s", error)
            return None
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(str(error)) from error


def without_forks(processor: Any, params: Any) -> Any:
    """Return ``params`` with both control tokens banned, where they ask for text of a model that knows them.

    Args:
        processor: makes the engine's requests: vLLM's ``InputProcessor``.
    """
    from vllm import SamplingParams

    from hf_apar.serving.vllm.parameters import banned

    if not isinstance(params, SamplingParams) or (params.extra_args or {}).get("apar") == AS_IT_COMES:
        return params
    control = _control_ids(processor)
    return banned(params, processor.tokenizer, [[token] for token in sorted(control)]) if control else params


def without_candidates(processor: Any, params: Any, outputs: Outputs) -> Outputs:
    """Return ``outputs``, where a beam search picks tokens from them without the control tokens: it reads the log
    probabilities of a step, in which banned tokens are by default."""
    beams = getattr(params, "max_tokens", None) == 1 and params.logprobs and not params.detokenize
    control = _control_ids(processor) if beams else frozenset[int]()
    return _without(outputs, control) if control else outputs


async def _without(outputs: Outputs, control: Set[int]) -> Outputs:
    async with aclosing(outputs):
        async for output in outputs:
            for one in output.outputs:
                steps = one.logprobs or ()
                left = [{key: value for key, value in step.items() if key not in control} for step in steps]
                one.logprobs = left or one.logprobs
            yield output


def _unfit(engine: Any, prompt: Any) -> str | None:
    if engine.model_config.skip_tokenizer_init:
        return "the engine has no tokenizer"
    if not isinstance(prompt, Mapping) or not prompt.get("prompt_token_ids"):
        return "its prompt is not given as tokens"
    if "prompt_embeds" in prompt or prompt.get("type") == "embeds":
        return "its prompt is given as embeddings"
    return None


def _control_ids(processor: Any) -> Set[int]:
    try:
        return ControlTokens.of(_settings(processor)).control_ids
    except ControlTokenError:
        return frozenset()  # a model without control tokens is none of our business


def _settings(processor: Any) -> AparConfig:
    """Return the settings of the engine's model; they are read once, and so is that there are none."""
    if processor not in _found:
        from hf_apar.serving.vllm.engine import model_settings

        try:
            _found[processor] = model_settings(processor.model_config, processor.tokenizer)
        except AparError as error:
            _found[processor] = error
            logger.info("hf_apar: %s", error)
    found = _found[processor]
    if isinstance(found, AparError):
        raise found.with_traceback(None)
    return found
