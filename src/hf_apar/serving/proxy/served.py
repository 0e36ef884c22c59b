"""The model behind the proxy, as far as the proxy needs it: its tokenizer, its settings, what ends a thread."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from hf_apar.checkpoints.loading import load_tokenizer
from hf_apar.checkpoints.sources import find_source, settings_in
from hf_apar.config import AparConfig
from hf_apar.errors import AparError, ControlTokenError
from hf_apar.generation_settings import eos_token_ids
from hf_apar.protocol import ControlTokens
from hf_apar.serving.proxy.asked import Asked
from hf_apar.serving.proxy.errors import ApiError, refuse
from hf_apar.text.chat import RESERVED, encode_chat
from hf_apar.text.encoding import encode_answer
from hf_apar.text.spelling import spelt
from hf_apar.tokens import completed, saved_settings

_REFUSED = frozenset(("chat_template", *RESERVED))
_CHOICE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # what vLLM, too, takes from a checkpoint


@dataclass(frozen=True)
class Served:
    """A model that is served upstream.

    Attributes:
        name: the folder or the name on the Hub that it was read from.
        config: the checkpoint's settings, with the ids of its control tokens.
        max_length: tokens of a path, its prompt included, by the checkpoint; ``None`` if it does not tell.
        eos_ids: what ends a thread.
        choice: how the checkpoint has tokens chosen where a request says nothing, under vLLM's names.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    config: AparConfig
    max_length: int | None = None
    eos_ids: frozenset[int] = frozenset()
    choice: Mapping[str, float] = field(default_factory=dict)
    _encoder: PreTrainedTokenizerBase = field(init=False, repr=False)  # for another thread than the one that decodes

    def __post_init__(self) -> None:
        object.__setattr__(self, "_encoder", copy.deepcopy(self.tokenizer))

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids of the control tokens."""
        return ControlTokens.of(self.config).control_ids

    @property
    def fork(self) -> int:
        """The id of the token that forks."""
        assert self.config.control_ids is not None
        return self.config.control_ids[0]

    def prompts(self, asked: Asked) -> list[list[int]]:
        """Return the tokens of each prompt of a request; no text in them is a control token.

        Raises:
            ApiError: with status 400, if there is none, or the chat template refuses it.
        """
        try:
            found = [self._chat(asked.body)] if asked.chat else self._texts(asked.body)
            return [spelt(ids, self.control_ids, self._encoder) for ids in found]
        except ApiError:
            raise
        except Exception as error:  # a template may raise anything
            said = str(error) if isinstance(error, AparError) else f"{type(error).__name__}: {error}"
            raise refuse("messages" if asked.chat else "prompt", said) from error

    def _chat(self, body: Mapping[str, Any]) -> list[int]:
        messages = body["messages"]
        given = body.get("chat_template_kwargs") or {}
        if not isinstance(given, dict) or not _REFUSED.isdisjoint(given):
            raise refuse("chat_template_kwargs", f"chat_template_kwargs is no object, or has {', '.join(sorted(_REFUSED))}")
        if body.get("chat_template"):
            raise refuse("chat_template", "a template of a client's own could run for ever; the checkpoint's is used")
        given = {**given}
        for name in ("tools", "documents", "reasoning_effort"):
            if body.get(name) is not None:
                given[name] = body[name]
        if not body.get("continue_final_message"):
            begin = body.get("add_generation_prompt", True) is not False
            return encode_chat(self._encoder, messages, begin, chat_template_kwargs=given)
        if body.get("add_generation_prompt"):
            raise refuse("continue_final_message", "continue_final_message and add_generation_prompt exclude each other")
        last = messages[-1]
        if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
            raise refuse(
                "continue_final_message", "the final message is no text of the assistant, so it cannot be continued"
            )
        ids = encode_chat(self._encoder, messages[:-1], chat_template_kwargs=given)
        return [*ids, *encode_answer(self._encoder, ids, last["content"], self.control_ids)]

    def _texts(self, body: Mapping[str, Any]) -> list[list[int]]:
        prompt = body.get("prompt")
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_ids(prompt)):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt or not all(isinstance(one, str) or _is_ids(one) for one in prompt):
            raise refuse("prompt", "prompt is no text, no list of token ids and no list of such; give one at least")
        special = body.get("add_special_tokens", True) is not False
        found = [self._encoder.encode(one, add_special_tokens=special) if isinstance(one, str) else one for one in prompt]
        size = len(self.tokenizer)
        if not all(found) or any(not 0 <= token < size for ids in found for token in ids):
            raise refuse("prompt", f"a prompt is empty, or holds an id that is none of the {size} tokens")
        return found


def _is_ids(value: object) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    )


def load_served(name: str) -> Served:
    """Read what the proxy needs of the model ``name``, a folder or a name on the Hub; an adapter will do, too.

    Raises:
        CheckpointError: if it is nowhere.
        ControlTokenError: if it has no control tokens.
    """
    source, tokenizer = find_source(name), load_tokenizer(name)
    generation = GenerationConfig()
    if (file := source.file("generation_config.json")) is not None:
        generation = GenerationConfig.from_pretrained(file.parent)
    config = completed(saved_settings(generation), tokenizer)
    if config.control_ids is None:
        raise ControlTokenError(
            f"{name} has no [Fork] and [Child] tokens; name the folder that `hf-apar merge` wrote of a model that was "
            "fine-tuned for APAR"
        )
    length = None
    if (file := source.file("config.json")) is not None:
        length = _context(file)
    eos = {*eos_token_ids(generation), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    choice = {key: value for key in _CHOICE if (value := getattr(generation, key, None)) is not None}
    return Served(name, tokenizer, config, length, frozenset(eos), choice)


def _context(file: Path) -> int | None:
    """Return the context that a model's settings name, also where this transformers does not know the model."""
    try:
        return getattr(AutoConfig.from_pretrained(file.parent), "max_position_embeddings", None)
    except (ValueError, KeyError):
        config = settings_in(file)
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return found if type(found) is int and found > 0 else None


def check_lengths(asked: Asked, prompts: Sequence[Sequence[int]], max_length: int) -> None:
    """Check that a token has room after each prompt.

    Raises:
        ApiError: with status 400, as OpenAI's API tells it.
    """
    if (longest := max(map(len, prompts))) >= max_length:
        raise refuse(
            "messages" if asked.chat else "prompt",
            f"the prompt has {longest} tokens, and the model's context is {max_length} with the answer; shorten it",
        )
