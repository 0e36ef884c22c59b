"""How kinds of servers are told what a thread's request is, and how they tell what they made."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_apar.serving.driver import ThreadRequest
from hf_apar.serving.proxy.asked import Asked
from hf_apar.serving.proxy.errors import ApiError, refuse
from hf_apar.serving.proxy.served import Served
from hf_apar.serving.reading import MadeToken
from hf_apar.serving.vllm.plugin import AS_IT_COMES
from hf_apar.text.encoding import token_name
from hf_apar.tree.threads import FinishReason

OTHER_TEXTS = ("/v1/responses", "/v1/messages", "/v1/chat/completions/batch")
"""Paths where text is made, beside the completions that the proxy takes apart."""

_FAR = 8192  # tokens that a penalty looks back over where no context is known
LIMIT = 100.0  # of a bias, as in OpenAI's API: it bans for all that logits of models are
_FINISH: Mapping[str, FinishReason] = {"stop": "eos", "length": "length", "eos": "eos", "limit": "length"}


@dataclass(frozen=True)
class Told:
    """What an event of an upstream's stream says.

    Attributes:
        tokens: that were made since the event before, with the tokens that might have been as ``(id, logprob)`` in ``note``.
        reason: set once, with the last of them.
        failure: why the upstream gave up.
        missing: tokens that it made before these and does not name.
    """

    tokens: Sequence[MadeToken] = ()
    reason: FinishReason | None = None
    stop_reason: int | str | None = None
    failure: str | None = None
    missing: int = 0


class Dialect(ABC):
    """One kind of server, and what it has shown so far.

    Args:
        served: the model.

    Attributes:
        path: where threads are written, within the API or, with a slash, from the server's root.
        biased: those of :data:`OTHER_TEXTS` where ``logit_bias`` is heeded.
        by_words: are bans said as words, since the server takes no biases? The text of a control token is that one token.
    """

    name: ClassVar[str]
    path: ClassVar[str]
    biased: ClassVar[Collection[str]] = ()

    def __init__(self, served: Served) -> None:
        self.served = served
        self.by_words = False

    @abstractmethod
    def body(self, request: ThreadRequest, asked: Asked, number: int, made: Sequence[int] = ()) -> dict[str, Any]:
        """Return the JSON of a request that goes on after its prompt and ``made``, for an answer of this number."""

    @abstractmethod
    def read(self, event: Mapping[str, Any], so_far: int) -> Told:
        """Return what an event says, after ``so_far`` tokens.

        Raises:
            LookupError, TypeError, ValueError: if it is no event of this dialect.
        """

    def whole(self, body: dict[str, Any], count: int) -> dict[str, Any]:
        """Return ``body`` changed to ask for ``count`` tokens at once, where :meth:`read` may miss some."""
        raise NotImplementedError

    def plain(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return a client's ``body`` with both control tokens banned."""
        bans = {str(token): -LIMIT for token in sorted(self.served.control_ids)}
        return {**body, "logit_bias": {**(body.get("logit_bias") or {}), **bans}}

    def elsewhere(self, path: str, body: object) -> dict[str, Any]:
        """Return a client's ``body`` for one of :data:`OTHER_TEXTS`, with both control tokens banned.

        Raises:
            ApiError: with status 400, if no field of such a body bans them.
        """
        if not isinstance(body, dict):
            raise refuse("body", f"the body is {type(body).__name__}; send a JSON object")
        if not isinstance(body.get("logit_bias"), Mapping | None):
            raise refuse("logit_bias", f"logit_bias is {body['logit_bias']!r}; give an object of token ids and numbers")
        if self.by_words or path not in self.biased:
            raise ApiError(
                400, f"{path} of this server has no field that bans [Fork], and its text would lack what stands behind one; "
                "ask /v1/chat/completions"
            )  # fmt: skip
        return self.plain(body)

    def in_words(self) -> "Dialect":
        """Return the same dialect with bans said as words."""
        other = copy.copy(self)
        other.by_words = True
        return other

    def takes_no_bias(self, status: int, message: str) -> bool:
        """Was a request refused for its ``logit_bias``, and are there other words for bans?"""
        return False

    def _bias(self, request: ThreadRequest, asked: Asked) -> dict[int, float]:
        bias = dict(asked.logit_bias)
        for token, more in request.bias.items():
            bias[token] = min(LIMIT, max(-LIMIT, bias.get(token, 0.0) + more))
        return bias | dict.fromkeys(_banned(request), -LIMIT)


def _banned(request: ThreadRequest) -> list[int]:
    """What must not be made anywhere; of longer runs the driver sees to it."""
    return [run[0] for run in request.banned if len(run) == 1]


def _options(request: ThreadRequest, asked: Asked, served: Served) -> dict[str, Any]:
    options = dict(asked.options)
    if not request.opens_answer:
        options.pop("min_tokens", None)
    if "stop_token_ids" in options:  # a thread goes on after a [Fork], whatever ends it
        options["stop_token_ids"] = [token for token in asked.stop_tokens if token not in served.control_ids]
    return options


class VLLM(Dialect):
    """vLLM's text completions, which take token ids and return them. A server with a draft of its own takes no biases."""

    name = "vllm"
    path = "completions"
    biased = ("/v1/responses", "/v1/chat/completions/batch")

    def body(self, request: ThreadRequest, asked: Asked, number: int, made: Sequence[int] = ()) -> dict[str, Any]:
        body = _options(request, asked, self.served) | {
            "prompt": [*request.prompt_ids, *made], "max_tokens": request.max_tokens - len(made),
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        body["vllm_xargs"] = {**(body.get("vllm_xargs") or {}), "apar": AS_IT_COMES}  # heeded where the plug-in is, too
        if asked.seed is not None:
            body["seed"] = request.seed(asked.seed, number)
        if asked.logprobs is not None:
            body |= {"logprobs": asked.logprobs, "return_tokens_as_token_ids": True}
        bias = self._bias(request, asked)
        if self.by_words:
            if request.bias:
                raise refuse("apar_fork_bias", "apar_fork_bias is set, and this server takes no logit_bias; leave it out")
            bias = dict(asked.logit_bias)
            body["bad_words"] = [*(body.get("bad_words") or ()), *self._words(_banned(request))]
        if bias:
            body["logit_bias"] = {str(token): one for token, one in bias.items()}
        return body

    def read(self, event: Mapping[str, Any], so_far: int) -> Told:
        if not event["choices"]:
            return Told()
        choice = event["choices"][0]
        ids, reason = choice.get("token_ids") or [], choice.get("finish_reason")
        if choice.get("token_ids") is None and choice.get("text"):
            raise ValueError("returns no token ids")
        tokens = [MadeToken(token) for token in ids]
        if logprobs := choice.get("logprobs"):
            tops = logprobs.get("top_logprobs") or [None] * len(ids)
            tokens = [
                MadeToken(token, logprob, [(_id_of(name), one) for name, one in (top or {}).items()])
                for token, logprob, top in zip(ids, logprobs["token_logprobs"], tops, strict=True)
            ]
        if reason is not None and reason not in _FINISH:
            return Told(tokens, failure=str(reason))
        return Told(tokens, None if reason is None else _FINISH[reason], choice.get("stop_reason"))

    def plain(self, body: Mapping[str, Any]) -> dict[str, Any]:
        if not self.by_words:
            return super().plain(body)
        return {**body, "bad_words": [*(body.get("bad_words") or ()), *self._words(sorted(self.served.control_ids))]}

    def takes_no_bias(self, status: int, message: str) -> bool:
        return status == 400 and "logit_bias" in message and "vocab" not in message

    def _words(self, tokens: Sequence[int]) -> list[str]:
        return [token_name(self.served.tokenizer, token) for token in tokens]


def _id_of(name: str) -> int:
    return int(name.removeprefix("token_id:"))


class LlamaCpp(Dialect):
    """llama.cpp's own completions. In a stream it does not name tokens that end within a character.

    Where a request does not say how tokens are chosen, the checkpoint does, as it would on vLLM.
    """

    name = "llama.cpp"
    path = "/completion"

    _NAMES: ClassVar[Mapping[str, str]] = {"repetition_penalty": "repeat_penalty"}

    def body(self, request: ThreadRequest, asked: Asked, number: int, made: Sequence[int] = ()) -> dict[str, Any]:
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        options = neutral | dict(self.served.choice) | _options(request, asked, self.served)
        body = {self._NAMES.get(name, name): value for name, value in options.items()} | {
            "prompt": [*request.prompt_ids, *made], "n_predict": request.max_tokens - len(made),
            "stream": True, "return_tokens": True, "cache_prompt": True, "n_probs": asked.logprobs or 0,
        }  # fmt: skip
        body.setdefault("repeat_last_n", self.served.max_length or _FAR)  # its own default is 64 tokens
        if asked.logprobs is not None:
            body["n_probs"] = max(1, asked.logprobs)
        if asked.seed is not None:
            body["seed"] = request.seed(asked.seed, number) % 2**32
        bias = self._bias(request, asked)
        body["logit_bias"] = [[token, False if one <= -LIMIT else one] for token, one in bias.items()]
        return body

    def read(self, event: Mapping[str, Any], so_far: int) -> Told:
        tokens, known = list(event["tokens"]), event["tokens_predicted"]
        missing = max(0, known - so_far - len(tokens))
        if event["stop"] and not tokens:  # the end of a stream
            return Told((), _FINISH[event["stop_type"]], missing=missing)
        probs = event.get("completion_probabilities") or [None] * len(tokens)
        made = [
            MadeToken(token) if one is None
            else MadeToken(token, one["logprob"], [(top["id"], top["logprob"]) for top in one["top_logprobs"]])
            for token, one in zip(tokens, probs, strict=True)
        ]  # fmt: skip
        # the token is told before the end of the stream is
        ended = event.get("stop_type") == "eos" or (bool(tokens) and tokens[-1] in self.served.eos_ids)
        return Told(made, "eos" if ended else None, missing=missing)

    def whole(self, body: dict[str, Any], count: int) -> dict[str, Any]:
        return body | {"stream": False, "n_predict": count, "n_probs": 0}  # it has none for tokens within a character


class SGLang(Dialect):
    """SGLang's own ``/generate``, by its documentation."""

    name = "sglang"
    path = "/generate"

    _TOP: ClassVar = ("priority", "user", "model", "lora_path", "rid")  # fields beside the parameters of sampling

    def body(self, request: ThreadRequest, asked: Asked, number: int, made: Sequence[int] = ()) -> dict[str, Any]:
        options = _options(request, asked, self.served)
        sampling = {name: value for name, value in options.items() if name not in self._TOP}
        sampling["max_new_tokens"] = request.max_tokens - len(made)
        if "min_tokens" in sampling:
            sampling["min_new_tokens"] = sampling.pop("min_tokens")
        if asked.seed is not None:
            sampling["sampling_seed"] = request.seed(asked.seed, number)
        if bias := self._bias(request, asked):
            sampling["logit_bias"] = {str(token): one for token, one in bias.items()}
        body: dict[str, Any] = {name: options[name] for name in ("priority", "lora_path") if name in options}
        body |= {"input_ids": [*request.prompt_ids, *made], "sampling_params": sampling, "stream": True}
        if asked.logprobs is not None:
            body |= {"return_logprob": True, "top_logprobs_num": asked.logprobs}
        return body

    def read(self, event: Mapping[str, Any], so_far: int) -> Told:
        about, ids = event["meta_info"], list(event["output_ids"])
        new = about["completion_tokens"] - so_far
        ids = ids[max(0, len(ids) - new) :] if new else []  # all so far, or what is new, by a setting of the server
        tokens = [MadeToken(token) for token in ids]
        if ids and (logprobs := about.get("output_token_logprobs")):
            tops = (about.get("output_top_logprobs") or [None] * len(logprobs))[-len(ids) :]
            tokens = [
                MadeToken(token, one[0], [(top[1], top[0]) for top in (others or [])])
                for token, one, others in zip(ids, logprobs[-len(ids) :], tops, strict=True)
            ]
        reason = about.get("finish_reason")
        if reason is None:
            return Told(tokens)
        if reason["type"] not in _FINISH:
            return Told(tokens, failure=str(reason.get("message") or reason["type"]))
        return Told(tokens, _FINISH[reason["type"]], reason.get("matched"))


DIALECTS: Mapping[str, type[Dialect]] = {one.name: one for one in (VLLM, LlamaCpp, SGLang)}


def check_made(request: ThreadRequest, told: Told) -> None:
    """Check that a thread which was refused a token has not got it again: it would be asked for ever.

    Raises:
        ApiError: with status 502.
    """
    if told.tokens and request.answer.refused(request.thread) and told.tokens[0].token in _banned(request):
        raise ApiError(502, "the upstream writes tokens that it was told to ban; it does not follow logit_bias")
