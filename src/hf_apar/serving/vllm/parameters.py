"""What vLLM is asked: parameters under which a thread follows its rules, and no other request writes a control token."""

import copy
import math
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams, envs, exceptions
from vllm.sampling_params import RequestOutputKind

from hf_apar.config import AparConfig
from hf_apar.errors import ConfigurationError
from hf_apar.serving.driver import ThreadRequest
from hf_apar.serving.vllm.plugin import AS_IT_COMES


def banned(params: SamplingParams, tokenizer: Any, runs: Sequence[Sequence[int]]) -> SamplingParams:
    """Return ``params`` under which none of ``runs`` of tokens is made, nor what their own ``bad_words`` say.

    As token ids, since vLLM would find other tokens for the text of a control token. Both of its model runners know them.

    Raises:
        VLLMValidationError: if that is more than vLLM has room for: an engine with the second runner would die of it.
    """
    own = copy.deepcopy(params)
    if tokenizer is not None:
        own.update_from_tokenizer(tokenizer)
    words = [*(own.bad_words_token_ids or ()), *map(list, runs)]
    most, most_tokens = envs.VLLM_MAX_NUM_BAD_WORDS, envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
    if len(words) > most or sum(map(len, words)) > most_tokens:
        raise exceptions.VLLMValidationError(
            f"bad_words come to {len(words)} sequences of {sum(map(len, words))} tokens, {len(runs)} for the model's "
            f"control tokens among them, and this server takes {most} of {most_tokens}: give fewer, or start it with a "
            "greater VLLM_MAX_NUM_BAD_WORDS and VLLM_MAX_BAD_WORDS_TOTAL_TOKENS",
            parameter="bad_words",
        )
    own._bad_words_token_ids = words
    own.bad_words = []  # they are among the ids by now; else vLLM would make these anew, of the words alone
    return own


def thread_params(request: ThreadRequest, params: SamplingParams, tokenizer: Any) -> SamplingParams:
    """Return the parameters under which vLLM writes ``request``, those of its answer being ``params``.

    Stop strings and the text are the answer's business.
    """
    own = banned(params, tokenizer, request.banned)
    if request.bias:
        given = own.logit_bias or {}
        own.logit_bias = given | {token: bias + given.get(token, 0.0) for token, bias in request.bias.items()}
    own.n, own.output_kind, own.stop, own.output_text_buffer_length = 1, RequestOutputKind.DELTA, [], 0
    if hasattr(own, "stream_interval"):
        own.stream_interval = None  # every token as it comes: a fork must not wait
    own.detokenize = wants_logprobs(params) or params.prompt_logprobs is not None  # they spell what might have been
    own.max_tokens = request.max_tokens
    if params.seed is not None:
        own.seed = request.seed(params.seed)
    own.stop_token_ids = [token for token in own.stop_token_ids or () if token not in request.answer.protocol.control_ids]
    own.extra_args = {**(own.extra_args or {}), "apar": AS_IT_COMES}
    if not request.opens_answer:
        own.min_tokens, own.skip_reading_prefix_cache = 0, False
        for name in {"prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start"} & {*own.__struct_fields__}:
            setattr(own, name, None)  # they are told of the answer's prompt
    return own


def wants_logprobs(params: SamplingParams) -> bool:
    """Is the log probability of each token to be told?"""
    return params.logprobs is not None or bool(getattr(params, "logprob_token_ids", None))


def stop_tokens(params: SamplingParams, model_config: Any, tokenizer: Any) -> frozenset[int]:
    """Return the ``stop_token_ids`` that end the answer; those with which the model itself ends a text end a thread."""
    if not params.stop_token_ids:
        return frozenset()
    ends = model_config.try_get_generation_config().get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return frozenset(params.stop_token_ids) - {*ends, tokenizer.eos_token_id}


def check_bias(config: AparConfig, vllm_config: Any) -> None:
    """Check that vLLM can be told of a bias of forks.

    Raises:
        ConfigurationError: if it cannot, since it takes no ``logit_bias`` beside its own speculation.
    """
    bias = config.fork_bias or 0.0
    if bias and math.isfinite(bias) and vllm_config.speculative_config is not None:
        raise ConfigurationError(
            f"the fork bias is {bias}, and vLLM takes no bias beside its own speculation; leave one of them out"
        )


def cannot_fork(params: Any) -> str | None:
    """Return why a request is decoded plainly whatever was asked for, or ``None``."""
    if not isinstance(params, SamplingParams):
        return "it is no text generation"
    if params.max_tokens is not None and params.max_tokens <= 1:
        return "it asks for one token"
    for name in ("structured_outputs", "thinking_token_budget", "allowed_token_ids", "trace_decode_token_ids"):
        if getattr(params, name, None):
            return f"{name} must hold for the whole text"
    given = params.extra_args or {}
    return "its KV cache is handed on" if {"kv_transfer_params", "ec_transfer_params"} & given.keys() else None
