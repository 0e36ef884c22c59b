"""APAR behind ``vllm serve``: a general plugin, by which ``AsyncLLM.generate`` answers in threads where a request asks.

A request asks with ``"vllm_xargs": {"apar": 1}``, optionally with ``apar_max_threads``, ``apar_max_depth`` and
``apar_fork_bias``; the environment variable ``APAR_DEFAULT=1`` asks for all requests, and ``{"apar": 0}`` declines. What
cannot fork, and all that does not ask, takes vLLM's own path, where a model that knows the control tokens may write none:
what it puts behind a [Fork] would be missing in the text.
"""

import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from hf_apar.config import AparConfig
from hf_apar.errors import AparError
from hf_apar.protocol import ControlTokens
from hf_apar.serving.admission import policy_named

logger = logging.getLogger("vllm.hf_apar")

_NO = ("", "0", "0.0", "false", "no", "none")
_found: "WeakKeyDictionary[Any, AparConfig | AparError]" = WeakKeyDictionary()  # by engine
_SETTINGS = {"apar_max_threads": "max_threads", "apar_max_depth": "max_depth", "apar_fork_bias": "fork_bias"}


def register() -> None:
    """Let ``AsyncLLM.generate`` answer in threads; a second call changes nothing.

    Raises:
        ConfigurationError: if this vLLM's seams are not those that this package knows, or ``APAR_POLICY`` names no policy.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    from hf_apar.serving.vllm.engine import check_seams

    policy_named(os.environ.get("APAR_POLICY") or "eager")  # a mistake is told now
    original: Callable[..., AsyncGenerator[Any, None]] = AsyncLLM.generate
    if original.__module__ == __name__:  # ours already
        return
    check_seams(original)
    if os.environ.get("VLLM_USE_RUST_FRONTEND") == "1":
        logger.warning("hf_apar: the Rust front end passes by AsyncLLM; unset VLLM_USE_RUST_FRONTEND to serve APAR")

    def generate(self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> AsyncGenerator[Any, None]:
        config = wanted(self, prompt, sampling_params)
        if config is None:
            plain = without_forks(self, sampling_params)
            return original(self, prompt, plain, request_id, **kwargs)
        from hf_apar.serving.vllm.online import answer_in_threads

        return answer_in_threads(self, original, config, prompt, sampling_params, request_id, **kwargs)

    AsyncLLM.generate = generate


def wanted(engine: Any, prompt: Any, params: Any) -> AparConfig | None:
    """Return the settings with which a request is to be answered in threads, ``None`` for vLLM's own path.

    Raises:
        VLLMValidationError: for settings that are no settings; the server answers with status 400.
    """
    given: Mapping[str, Any] = getattr(params, "extra_args", None) or {}
    asked = given.get("apar", os.environ.get("APAR_DEFAULT", "0"))
    if str(asked).lower() in _NO:
        return None
    from hf_apar.serving.vllm.engine import cannot_fork

    reason = cannot_fork(params) or _unfit(prompt)
    if reason is not None:
        logger.debug("hf_apar: decoded plainly, since %s", reason)
        return None
    try:
        own = {ours: given[name] for name, ours in _SETTINGS.items() if name in given}
        for name in ("max_threads", "max_depth"):
            if name in own:
                own[name] = int(own[name])
        return AparConfig.from_dict(own).filled_from(_settings(engine))
    except (AparError, ValueError, TypeError) as error:
        if "apar" not in given:  # the server's setting, not the request's
            logger.debug("hf_apar: decoded plainly, since %s", error)
            return None
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(str(error)) from error


def without_forks(engine: Any, params: Any) -> Any:
    """Return ``params`` with both control tokens banned, where they ask for text of a model that knows them."""
    try:
        settings = _settings(engine)
    except AparError:
        return params  # a model without control tokens is none of our business
    from vllm import SamplingParams

    from hf_apar.serving.vllm.engine import banned

    if not isinstance(params, SamplingParams) or engine.model_config.skip_tokenizer_init:
        return params
    runs = [[token] for token in sorted(ControlTokens.of(settings).control_ids)]
    return banned(params, engine.get_tokenizer(), runs)


def _unfit(prompt: Any) -> str | None:
    if not isinstance(prompt, Mapping) or not prompt.get("prompt_token_ids"):
        return "its prompt is not given as tokens"
    if "prompt_embeds" in prompt or prompt.get("type") == "embeds":
        return "its prompt is given as embeddings"
    return None


def _settings(engine: Any) -> AparConfig:
    """Return the settings of the engine's model; they are read once, and so is that there are none."""
    if engine not in _found:
        from hf_apar.serving.vllm.engine import model_settings

        try:
            _found[engine] = model_settings(engine.model_config, engine.get_tokenizer())
        except AparError as error:
            _found[engine] = error
            logger.warning("hf_apar: %s", error)
    found = _found[engine]
    if isinstance(found, AparError):
        raise found.with_traceback(None)
    return found
