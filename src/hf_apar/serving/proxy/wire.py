"""The JSON of OpenAI's API: answers whole and in pieces, of chats and of texts."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_apar.serving.proxy.asked import Asked
from hf_apar.serving.proxy.calls import Choice, ClientCall
from hf_apar.serving.reading import MadeToken, Piece
from hf_apar.text.encoding import decode_text, token_name, untypable

_LEAST = -9999.0  # JSON has no infinity


@dataclass
class Wire:
    """One answer of the API: what its parts have in common, and what was told so far.

    Args:
        asked: what it answers.
        tokenizer: names tokens beside their log probabilities.
    """

    asked: Asked
    tokenizer: PreTrainedTokenizerBase
    completion_tokens: int = 0
    _offsets: dict[int, int] = field(default_factory=dict)  # by choice, where its next token begins in the text
    _head: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        name = self.asked.body.get("request_id") or uuid.uuid4().hex
        kind = "chatcmpl" if self.asked.chat else "cmpl"
        self._head = {"id": f"{kind}-{name}", "created": int(time.time()), "model": self.asked.model}

    def opening(self, call: ClientCall) -> list[bytes]:
        """Return the events that a stream begins with."""
        if not self.asked.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._event([{"index": one.index, "delta": delta, "finish_reason": None}]) for one in call.choices]

    def chunk(self, choice: Choice, piece: Piece) -> bytes:
        """Return the event for what became readable of an answer."""
        text = {"delta": {"content": piece.text}} if self.asked.chat else {"text": piece.text}
        return self._event([{"index": choice.index, **text, **self._about(choice, piece)}])

    def closing(self, call: ClientCall) -> list[bytes]:
        """Return the events that a stream ends with."""
        usage = [self._event([], usage=self.usage(call))] if self.asked.include_usage else []
        return [*usage, b"data: [DONE]\n\n"]

    def whole(self, call: ClientCall, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return a whole answer, of the pieces of each of its choices put together."""
        choices = []
        for choice, piece in zip(call.choices, pieces, strict=True):
            text = {"message": {"role": "assistant", "content": piece.text}} if self.asked.chat else {"text": piece.text}
            choices.append({"index": choice.index, **text, **self._about(choice, piece)})
        kind = "chat.completion" if self.asked.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage(call)}

    def usage(self, call: ClientCall) -> dict[str, int]:
        """Return the tokens of the prompts and of what was told, without control tokens."""
        prompt, completion = call.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"
        return b"data: " + json.dumps({**self._head, "object": kind, "choices": choices, **more}).encode() + b"\n\n"

    def _about(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        self.completion_tokens += len(piece.tokens)
        about: dict[str, Any] = {"finish_reason": choice.finish_reason, "logprobs": None}
        if choice.told:
            about["stop_reason"] = choice.answer.stop_reason
        if self.asked.logprobs is not None and (piece.tokens or choice.told):
            about["logprobs"] = (
                self._chat_logprobs(piece.tokens) if self.asked.chat else self._logprobs(choice, piece.tokens)
            )
        if self.asked.return_token_ids:
            about["token_ids"] = [one.token for one in piece.tokens]
        return about

    def _chat_logprobs(self, tokens: Sequence[MadeToken]) -> dict[str, Any]:
        def named(token: int, logprob: float | None) -> dict[str, Any]:
            name = self._name(token)
            return {"token": name, "logprob": _finite(logprob), "bytes": list(name.encode(errors="replace"))}

        wanted = self.asked.logprobs or 0
        return {
            "content": [
                named(one.token, one.logprob) | {"top_logprobs": [named(*top) for top in _best(one, wanted)]}
                for one in tokens
            ]
        }

    def _logprobs(self, choice: Choice, tokens: Sequence[MadeToken]) -> dict[str, Any]:
        names, offset = [self._name(one.token) for one in tokens], self._offsets.get(choice.index, 0)
        offsets = []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        self._offsets[choice.index] = offset
        tops = [
            {
                self._name(token): _finite(logprob)
                for token, logprob in [*_best(one, self.asked.logprobs or 0), (one.token, one.logprob)]
            }
            for one in tokens
        ]
        logprobs = [_finite(one.logprob) for one in tokens]
        return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _name(self, token: int) -> str:
        if self.asked.names_ids:
            return f"token_id:{token}"
        if token in untypable(self.tokenizer, len(self.tokenizer)):
            return token_name(self.tokenizer, token)
        return decode_text(self.tokenizer, [token])


def _best(one: MadeToken, wanted: int) -> list[tuple[int, float]]:
    return sorted(one.note or [], key=lambda top: -top[1])[:wanted]


def _finite(logprob: float | None) -> float:
    return _LEAST if logprob is None else max(logprob, _LEAST)
