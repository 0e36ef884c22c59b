"""What a client asks, as far as the proxy has to understand it; the rest goes upstream as it came."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_apar.config import AparConfig
from hf_apar.errors import AparError
from hf_apar.serving.proxy.errors import refuse
from hf_apar.serving.vllm.plugin import NO, SETTINGS

MOST_CHOICES = 128  # answers to a prompt, ``n``
MOST_LOGPROBS = 100  # tokens that are told beside each one
MOST_TOKENS = 2**31

# What must hold for the whole text, or tells of it what threads cannot: such requests go upstream as they are.
_WHOLE = (
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar", "json_schema",
    "regex", "ebnf", "thinking_token_budget", "allowed_token_ids", "kv_transfer_params", "ec_transfer_params",
    "prompt_embeds", "use_beam_search", "suffix", "echo", "prompt_logprobs", "logprob_token_ids", "functions", "audio",
    "modalities", "truncate_prompt_tokens", "truncation_side",
)  # fmt: skip

# What is settled here, and so no business of a thread's request.
_SETTLED = (
    "messages", "prompt", "n", "best_of", "stop", "stream", "stream_options", "max_tokens", "max_completion_tokens",
    "seed", "logprobs", "top_logprobs", "logit_bias", "tools", "tool_choice", "parallel_tool_calls", "response_format",
    "chat_template", "chat_template_kwargs", "documents", "add_generation_prompt", "continue_final_message",
    "add_special_tokens", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens",
    "return_token_ids", "return_tokens_as_token_ids", "request_id", "stream_interval", "include_reasoning",
    "reasoning_effort",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request for text.

    Attributes:
        body: all of it, without the settings of APAR.
        chat: are messages answered, and no prompt?
        options: fields that each thread's request has as the client gave them: how tokens are chosen, and what is unknown.
        threads: was it asked for, or declined? ``None`` if nothing was said.
        config: the client's own settings of APAR.
        names_ids: are tokens named by their ids beside their log probabilities?
        logprobs: how many tokens that might have been are told beside each; ``None`` for no log probabilities.
    """

    body: Mapping[str, Any]
    chat: bool
    threads: bool | None = None
    config: AparConfig = field(default_factory=AparConfig)
    options: Mapping[str, Any] = field(default_factory=dict)
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    n: int = 1
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    include_stop: bool = False
    stop_tokens: Sequence[int] = ()
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    names_ids: bool = False

    @property
    def model(self) -> str:
        """The name of the model as the client gave it."""
        return str(self.body.get("model") or "")

    @property
    def prompts(self) -> int:
        """How many prompts it has."""
        prompt = self.body.get("prompt")
        if self.chat or not isinstance(prompt, list) or all(isinstance(one, int) for one in prompt):
            return 1
        return len(prompt)

    @property
    def cannot_fork(self) -> str | None:
        """Why the request is to go upstream as it is, whatever was asked for; ``None`` if threads may write it."""
        body = self.body
        if self.max_tokens is not None and self.max_tokens <= 1:
            return "it asks for one token"
        if (name := next((name for name in _WHOLE if body.get(name)), None)) is not None:
            return f"{name} concerns the whole text"
        if isinstance(shape := body.get("response_format"), Mapping) and shape.get("type") != "text":
            return "response_format concerns the whole text"
        if body.get("tools") and body.get("tool_choice") != "none":
            return "a call of a tool is read from the whole text"
        if body.get("best_of") not in (None, 1, self.n):
            return "best_of compares whole texts"
        return "a message holds more than text" if self.chat and not _all_text(body.get("messages")) else None


def parse(body: object, *, chat: bool) -> Asked:
    """Return what ``body``, the JSON of a request, asks.

    Raises:
        ApiError: with status 400 and the field that is wrong.
    """
    if not isinstance(body, dict):
        raise refuse("body", f"the body is {type(body).__name__}; send a JSON object")
    body, own = _without_settings(body)
    fields = _Fields(body)
    fields.check(chat)
    stream_options = _Fields(fields.mapping("stream_options"))
    default = None if chat else 16  # as in OpenAI's API
    limit, newer = fields.integer("max_tokens", 0, default=default), fields.integer("max_completion_tokens", 0)
    return Asked(
        body=body, chat=chat,
        threads=_wish(own.pop("apar", None)),
        config=_config(own),
        options={name: value for name, value in body.items() if name not in _SETTLED and value is not None},
        logit_bias=fields.biases(),
        n=fields.integer("n", 1, MOST_CHOICES) or 1,
        max_tokens=limit if newer is None else newer,
        stop=fields.strings("stop"),
        stop_tokens=fields.tokens("stop_token_ids"),
        include_stop=fields.flag("include_stop_str_in_output"),
        skip_special_tokens=fields.flag("skip_special_tokens", True),
        seed=fields.integer("seed", -(2**63), 2**63 - 1),
        logprobs=fields.logprobs(chat),
        stream=fields.flag("stream"),
        include_usage=stream_options.flag("include_usage"),
        return_token_ids=fields.flag("return_token_ids"),
        names_ids=fields.flag("return_tokens_as_token_ids"),
    )  # fmt: skip


def _without_settings(body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ``body`` without the settings of APAR, at its top or in ``vllm_xargs``, and these."""
    names = {"apar", *SETTINGS}
    rest = {name: value for name, value in body.items() if name not in names}
    own = {name: body[name] for name in names & body.keys()}
    if isinstance(extra := body.get("vllm_xargs"), Mapping):
        own = {name: extra[name] for name in names & extra.keys()} | own
        rest["vllm_xargs"] = {name: value for name, value in extra.items() if name not in names}
        if not rest["vllm_xargs"]:
            del rest["vllm_xargs"]
    return rest, own


def _wish(value: object) -> bool | None:
    if value is not None and not isinstance(value, bool | int | float | str):
        raise refuse("apar", f"apar is {value!r}; give 1 to be answered in threads, or 0")
    return None if value is None else str(value).lower() not in NO


def _config(own: Mapping[str, Any]) -> AparConfig:
    settings = {}
    for name, value in own.items():
        if value is None:
            continue
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # extra arguments may spell it
            settings[SETTINGS[name]] = int(number) if name != "apar_fork_bias" and number == int(number) else number
            AparConfig.from_dict(settings)
        except (AparError, TypeError, ValueError, OverflowError) as error:
            said = str(error) if isinstance(error, AparError) else f"{name} is {value!r}; give a number"
            raise refuse(name, said) from error
    return AparConfig.from_dict(settings)


def _is_message(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    parts = value.get("content")
    return isinstance(parts, str | None) or (isinstance(parts, list) and all(isinstance(one, dict) for one in parts))


def _all_text(messages: object) -> bool:
    parts = [
        part
        for message in (messages if isinstance(messages, list) else ())
        if isinstance(message, Mapping) and isinstance(message.get("content"), list)
        for part in message["content"]
    ]
    return all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts)


@dataclass(frozen=True)
class _Fields:
    """The fields of a body, each checked as it is taken."""

    body: Mapping[str, Any]

    def check(self, chat: bool) -> None:
        """Check what is taken apart elsewhere, or put together with what is ours."""
        if not isinstance(self.body.get("model"), str | None):
            raise refuse("model", f"model is {self.body['model']!r}; give its name")
        if self.strings("bad_words") and isinstance(self.body["bad_words"], str):
            raise refuse("bad_words", "bad_words is a text; give a list of such")
        self.mapping("vllm_xargs")
        messages = self.body.get("messages")
        if chat and not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
            raise refuse(
                "messages",
                "messages is no list of messages; give one at least, each an object with role and content, a text or a list "
                "of objects",
            )

    def integer(self, name: str, least: int, most: int = MOST_TOKENS, default: int | None = None) -> int | None:
        value = self.body.get(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise refuse(name, f"{name} is {value!r}; give an integer from {least} to {most}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.body.get(name)
        if value is not None and not isinstance(value, bool):
            raise refuse(name, f"{name} is {value!r}; give true or false")
        return default if value is None else value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.body.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise refuse(name, f"{name} is {value!r}; give an object")
        return value or {}

    def strings(self, name: str) -> tuple[str, ...]:
        value = self.body.get(name)
        found = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
            raise refuse(name, f"{name} is {value!r}; give a text that is not empty, or a list of such")
        return tuple(found)

    def tokens(self, name: str) -> tuple[int, ...]:
        value = [] if (given := self.body.get(name)) is None else given
        if not isinstance(value, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in value):
            raise refuse(name, f"{name} is {value!r}; give a list of token ids")
        return tuple(value)

    def biases(self) -> dict[int, float]:
        given = self.mapping("logit_bias")
        try:
            found = {int(token): float(bias) for token, bias in given.items()}
            if not all(map(math.isfinite, found.values())):
                raise ValueError("a number is none")
            return found
        except (TypeError, ValueError, OverflowError) as error:
            raise refuse("logit_bias", "logit_bias is no object of token ids and numbers") from error

    def logprobs(self, chat: bool) -> int | None:
        if not chat:
            return self.integer("logprobs", 0, MOST_LOGPROBS)
        top = self.integer("top_logprobs", 0, MOST_LOGPROBS, default=0)
        if self.flag("logprobs"):
            return top
        if top:
            raise refuse("top_logprobs", f"top_logprobs is {top}, and logprobs is not true; set it too")
        return None
