"""Chat prompts whose text cannot hold a control token, whatever the user typed."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_apar.errors import DataError


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True
) -> list[int]:
    """Return the tokens of ``messages`` in the tokenizer's chat template; special tokens typed in a message stay text.

    Without such text the result is what ``tokenizer.apply_chat_template`` gives. With it, the template's own parts and
    the messages are tokenised apart, the messages with ``split_special_tokens=True``.

    Args:
        messages: dicts with a ``role`` and a ``content``, both strings; what else stands in them is the template's.

    Raises:
        DataError: if a content is no string, or the template changes it in a way that cannot be followed.
    """
    chat: list[dict[str, Any]] = [dict(message) for message in messages]
    for message in chat:
        if not isinstance(message.get("content"), str):
            raise DataError(f"a message's content is {message.get('content')!r}; it must be a string")
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not any(special & set(tokenizer.encode(message["content"], add_special_tokens=False)) for message in chat):
        return _as_ids(tokenizer.apply_chat_template(chat, add_generation_prompt=add_generation_prompt, return_dict=False))
    ids: list[int] = []
    for text, is_content in _parts(tokenizer, chat, add_generation_prompt):
        ids += tokenizer.encode(text, add_special_tokens=False, split_special_tokens=is_content)
    return ids


def _parts(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[dict[str, Any]], add_generation_prompt: bool
) -> list[tuple[str, bool]]:
    """Cut the rendered chat into (text, is it a message's content?)."""
    marks = [secrets.token_hex(16) for _ in chat]  # a user cannot guess them
    marked = [message | {"content": mark} for message, mark in zip(chat, marks, strict=True)]
    rest = _render(tokenizer, marked, add_generation_prompt)
    for strip in (False, True):  # many templates trim a message
        contents = [message["content"].strip() if strip else message["content"] for message in chat]
        parts = _split(rest, marks, contents)
        if parts and "".join(text for text, _ in parts) == _render(tokenizer, chat, add_generation_prompt):
            return parts
    raise DataError(
        "a message holds the text of a special token, and the tokenizer's chat template changes messages in a way that "
        "cannot be followed; remove that text from the message"
    )


def _split(rest: str, marks: Sequence[str], contents: Sequence[str]) -> list[tuple[str, bool]]:
    parts: list[tuple[str, bool]] = []
    for mark, content in zip(marks, contents, strict=True):
        if rest.count(mark) != 1:
            return []
        before, rest = rest.split(mark)
        parts += [(before, False), (content, True)]
    return [*parts, (rest, False)]


def _render(tokenizer: PreTrainedTokenizerBase, chat: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=add_generation_prompt))


def _as_ids(ids: object) -> list[int]:
    if not isinstance(ids, list):
        raise DataError(f"the chat template gave {type(ids).__name__}, not a list of token ids")
    return ids
