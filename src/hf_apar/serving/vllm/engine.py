"""All that depends on vLLM's version: settings of a model, parameters of a thread's request, what a request made.

Tested with vLLM 0.29 and 0.32, the two ends of what is supported; 0.20.2 and 0.26 have the same names in what is used here.
"""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams, exceptions
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from hf_apar.config import MAX_THREADS, AparConfig
from hf_apar.errors import ConfigurationError, ControlTokenError
from hf_apar.protocol import ControlTokens
from hf_apar.serving.answer import Answer, Limits, MadeToken, Piece
from hf_apar.text.encoding import encode_text, token_name
from hf_apar.tokens import CHILD_TOKEN, FORK_TOKEN, completed
from hf_apar.tree.threads import FinishReason, ParagraphTree, Thread

QueueFull: Any = getattr(exceptions, "GracefulHTTPError", ())
"""What vLLM raises where its queue takes no request; nothing in versions that always take one."""

_FINISH: Mapping[str, FinishReason] = {"stop": "eos", "length": "length"}


@dataclass
class AparCompletion(CompletionOutput):  # type: ignore[misc]
    """vLLM's output of one sequence: the answer in reading order, and its tree, whole once the answer is finished."""

    tree: ParagraphTree | None = None


def model_settings(model_config: Any, tokenizer: Any) -> AparConfig:
    """Return the APAR settings that a checkpoint carries, with the ids of its control tokens.

    Raises:
        ControlTokenError: if the model has no control tokens.
    """
    settings = AparConfig.from_dict(model_config.try_get_generation_config().get("apar_config") or {})
    settings = completed(settings, tokenizer)
    if settings.fork_token_id is None or settings.child_token_id is None:
        raise ControlTokenError(
            f"{model_config.model} has no {FORK_TOKEN} and {CHILD_TOKEN} tokens; serve a folder that `hf-apar merge` wrote "
            "of a model that was fine-tuned for APAR"
        )
    return settings


def as_text(prompt_ids: Sequence[int], control: Set[int], tokenizer: Any) -> list[int]:
    """Return ``prompt_ids`` with the control tokens that somebody typed as the words that they look like."""
    if control.isdisjoint(prompt_ids):
        return list(prompt_ids)
    words = {token: encode_text(tokenizer, token_name(tokenizer, token), control) for token in control}
    if any(control & set(ids) for ids in words.values()):
        raise ControlTokenError(
            f"the prompt holds a control token and {type(tokenizer).__name__} cannot spell it; remove it from the prompt"
        )
    return [part for token in prompt_ids for part in words.get(token, [token])]


def new_answer(
    prompt_ids: Sequence[int], config: AparConfig, params: SamplingParams, tokenizer: Any, max_length: int
) -> Answer:
    """Return the answer that ``params`` ask for."""
    stop = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
    limits = Limits(params.max_tokens, max_length, stop, params.include_stop_str_in_output)
    return Answer(
        prompt_ids, ControlTokens.of(config), limits, tokenizer, max_threads=config.max_threads or MAX_THREADS,
        skip_special_tokens=params.skip_special_tokens,
    )  # fmt: skip


def banned(params: SamplingParams, tokenizer: Any, runs: Sequence[Sequence[int]]) -> SamplingParams:
    """Return ``params`` under which none of ``runs`` of tokens is made, nor what their own ``bad_words`` say.

    As token ids, since vLLM would find other tokens for the text of a control token. Both of its model runners know them.
    """
    own = copy.deepcopy(params)
    own.update_from_tokenizer(tokenizer)
    own._bad_words_token_ids = [*(own.bad_words_token_ids or ()), *map(list, runs)]
    own.bad_words = []  # they are among the ids by now; else vLLM would make these anew, of the words alone
    return own


def thread_params(
    params: SamplingParams, answer: Answer, thread: Thread, tokenizer: Any, number: int = 0
) -> SamplingParams:
    """Return the parameters of the request that writes ``thread`` of the ``number``-th answer to a prompt.

    The rules of the control tokens are said with vLLM's own parameters: [Child] is a bad word, and so is [Fork] after
    [Fork] and at the greatest depth. Stop strings and the text are the answer's business, and so is its length: a thread may
    take all that is left of it.
    """
    config = answer.protocol
    fork, child = config.fork_token_id, config.child_token_id
    asked_again = answer.must_not_fork(thread)
    never = asked_again or thread.depth >= config.max_depth or config.fork_bias == -math.inf
    own = banned(params, tokenizer, [[child], [fork] if never else [fork, fork]])
    if config.fork_bias and not never:
        own.logit_bias = {**(own.logit_bias or {}), fork: config.fork_bias + (own.logit_bias or {}).get(fork, 0.0)}
    own.n, own.output_kind, own.stop, own.output_text_buffer_length = 1, RequestOutputKind.DELTA, [], 0
    if hasattr(own, "stream_interval"):
        own.stream_interval = None  # every token as it comes: a fork must not wait
    own.detokenize = params.logprobs is not None  # its logprobs spell the tokens that might have been
    room = answer.limits.max_length - len(thread.path_ids)
    own.max_tokens = 1 if asked_again else room if answer.room is None else min(room, answer.room)
    if params.seed is not None:
        own.seed = params.seed + 1009 * number + thread.index
    if thread.parent is not None:
        own.min_tokens, own.prompt_logprobs, own.skip_reading_prefix_cache = 0, None, False
    return own


def take(answer: Answer, thread: Thread, output: CompletionOutput) -> None:
    """Hand the answer what a request told: the delta of ``thread``."""
    ids, reason = list(output.token_ids), output.finish_reason
    logprobs = output.logprobs if output.logprobs is not None else [None] * len(ids)
    written = [
        MadeToken(token, None if note is None else note[token].logprob, note)
        for token, note in zip(ids, logprobs, strict=True)
    ]
    if reason is not None and reason not in _FINISH:
        answer.write(thread, written)
        answer.fail(reason)
    else:
        answer.write(
            thread, written, reason=None if reason is None else _FINISH[reason], stop_reason=output.stop_reason
        )  # fmt: skip


class Collector:
    """Puts what reads of an answer into vLLM's outputs: what is new, or all so far.

    Args:
        number: index of the answer among those to its prompt.
    """

    def __init__(self, answer: Answer, number: int, params: SamplingParams) -> None:
        self.answer, self.number, self.params = answer, number, params
        self.told = False  # has its end been told?
        self._text, self._tokens = "", list[MadeToken]()

    def collect(self) -> AparCompletion | None:
        """Return what is new in the form that the caller asked for; ``None`` if there is nothing to tell."""
        piece, ended = self.answer.read(), self.answer.finished and not self.told
        self.told |= ended
        if self.params.output_kind == RequestOutputKind.DELTA:
            return self._output(piece, ended) if piece.tokens or piece.text or ended else None
        self._text += piece.text
        self._tokens += piece.tokens
        if not ended and (self.params.output_kind == RequestOutputKind.FINAL_ONLY or not piece.tokens):
            return None
        return self._output(Piece(self._text, list(self._tokens)), ended)

    def _output(self, piece: Piece, ended: bool) -> AparCompletion:
        asked = self.params.logprobs is not None
        logprobs = [one.logprob for one in piece.tokens if one.logprob is not None]
        cut = "length" if self.answer.finish_reason == "length" else "stop"
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


def merged(first: RequestOutput, outputs: list[AparCompletion], finished: bool) -> RequestOutput:
    """Return the output of a request whose root told ``first``: its prompt, its cached tokens, its times."""
    return RequestOutput(
        request_id=first.request_id, prompt=first.prompt, prompt_token_ids=first.prompt_token_ids,
        prompt_logprobs=first.prompt_logprobs, outputs=outputs, finished=finished, metrics=first.metrics,
        lora_request=first.lora_request, num_cached_tokens=first.num_cached_tokens,
    )  # fmt: skip


def cannot_fork(params: Any) -> str | None:
    """Return why a request is decoded plainly whatever was asked for, or ``None``."""
    if not isinstance(params, SamplingParams):
        return "it is no text generation"
    if params.max_tokens is not None and params.max_tokens <= 1:
        return "it asks for one token"
    for name in ("structured_outputs", "thinking_token_budget", "allowed_token_ids"):
        if getattr(params, name, None):
            return f"{name} must hold for the whole text"
    given = params.extra_args or {}
    return "its KV cache is handed on" if {"kv_transfer_params", "ec_transfer_params"} & given.keys() else None


_GENERATE = ("self", "prompt", "sampling_params", "request_id")


def check_seams(generate: Any) -> None:
    """Check what :mod:`hf_apar.serving.vllm.plugin` relies on.

    Raises:
        ConfigurationError: if this vLLM is another one than those this module was written for.
    """
    found = tuple(inspect.signature(generate).parameters)
    if found[:4] != _GENERATE or not {"lora_request", "priority", "data_parallel_rank"} <= set(found):
        raise ConfigurationError(
            f"this vLLM's AsyncLLM.generate takes {', '.join(found)}; hf_apar knows vLLM 0.29 to 0.32: install one of "
            "these, or leave hf_apar out with VLLM_PLUGINS"
        )
