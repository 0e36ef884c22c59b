"""Chat prompts whose text cannot hold a control token, whatever the user typed."""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_apar.errors import DataError
from hf_apar.text.content import flat, is_text
from hf_apar.text.encoding import encode_template, encode_text, known_control, token_name, untypable
from hf_apar.text.spelling import without_known

RESERVED = (
    "conversation", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens",
    "messages",
)  # fmt: skip
"""What :func:`encode_chat` tells a template itself, so that no argument of it may be called so."""


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, object]],
    add_generation_prompt: bool = True,
    *,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> list[int]:
    """Return the tokens of ``messages`` in the tokenizer's chat template; special tokens typed in a message stay text.

    Without such text the result is what ``tokenizer.apply_chat_template`` gives. With it, what was typed is tokenised apart,
    wherever in the messages, tools or documents it stands.

    Args:
        messages: dicts with a ``role`` and a ``content``: a string, or content parts, of which a template that knows no
            parts gets the text. A message with ``tool_calls`` needs no content. All fields reach the template.
        chat_template_kwargs: variables of the template, as vLLM calls them: ``enable_thinking``, ``tools``, ``documents``;
            ``chat_template`` is one to take in place of the tokenizer's.

    Raises:
        DataError: if there is no template, it refuses the chat, a content is none, or the template changes the text of a
            special token in a way that cannot be followed.
    """
    chat = [dict(message) for message in messages]
    for message in chat:
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise DataError(f"a message's content is {content!r}; it must be a string, or a list of content parts")
    given = dict(chat_template_kwargs or {})
    if refused := sorted(given.keys() & set(RESERVED)):
        raise DataError(f"chat_template_kwargs has {', '.join(refused)}, which encode_chat sets itself; leave it out")
    template = _Template(tokenizer, add_generation_prompt)
    values = template.readable({"messages": chat, **given})
    typed = _typed(tokenizer, {name: value for name, value in values.items() if name != "chat_template"})
    ids = _with_typed(template, values, typed) if typed else template.ids(values)
    return without_known(ids, tokenizer)  # a template may make one of letters of two messages


def left_out(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, object]],
    *,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> list[str]:
    """Return what the chat template says nothing of, in words: system messages, results and calls of tools, the tools.

    Templates write what they know and pass over the rest. Each of these is marked, and looked for in what is rendered. An
    empty message is never left out, and where the marks make the template refuse the chat nothing is known.

    Args:
        messages, chat_template_kwargs: as for :func:`encode_chat`, which takes them.
    """
    marks: dict[str, str] = {}

    def marked(what: str) -> str:
        return marks.setdefault(what, secrets.token_hex(8))

    chat = [_with_marks(dict(message), number, marked) for number, message in enumerate(messages, start=1)]
    given = dict(chat_template_kwargs or {})
    if isinstance(tools := given.get("tools"), list):
        given["tools"] = [_renamed(tool, lambda: marked("the tools")) for tool in tools]
    if not marks:
        return []
    template = _Template(tokenizer, add_generation_prompt=True)
    try:
        text = template.text(template.readable({"messages": chat, **given}))
    except DataError:
        return []
    return [what for what, mark in marks.items() if mark not in text]


def check_written(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, object]],
    *,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> None:
    """Check that the chat template writes all of a chat, see :func:`left_out`.

    Raises:
        DataError: if it does not.
    """
    if missing := left_out(tokenizer, messages, chat_template_kwargs=chat_template_kwargs):
        raise DataError(
            f"the chat template leaves out {', '.join(missing)}; give a template that writes it, or leave the record out"
        )


def _with_marks(message: dict[str, object], number: int, marked: Callable[[str], str]) -> dict[str, object]:
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role in ("system", "developer", "tool") and content:
        mark = marked(f"the {role} message (message {number})")
        message["content"] = content + mark if isinstance(content, str) else _with_mark(content, mark)
    if isinstance(calls, list):
        message["tool_calls"] = [_renamed(call, lambda: marked(f"the tool call of message {number}")) for call in calls]
    return message


def _renamed(item: object, mark: Callable[[], str]) -> object:
    """Return a tool, or a call of one, with a mark at the end of its name."""
    if isinstance(item, Mapping) and isinstance(item.get("function"), Mapping):
        return {**item, "function": _renamed(item["function"], mark)}
    if isinstance(item, Mapping) and isinstance(item.get("name"), str):
        return {**item, "name": item["name"] + mark()}
    return item


@dataclass(frozen=True)
class _Template:
    """The tokenizer's chat template; it takes ``values``: the messages and its other variables."""

    tokenizer: PreTrainedTokenizerBase
    add_generation_prompt: bool

    def ids(self, values: Mapping[str, object]) -> list[int]:
        ids = self._apply(values, tokenize=True)
        if not isinstance(ids, list):
            raise DataError(f"the chat template gave {type(ids).__name__}, not a list of token ids")
        return ids

    def text(self, values: Mapping[str, object]) -> str:
        return str(self._apply(values, tokenize=False))

    def readable(self, values: dict[str, object]) -> dict[str, object]:
        """Return ``values`` with content parts as one text where the template knows no parts: marks in them tell."""
        chat = cast(list[dict[str, object]], values["messages"])
        if not any(isinstance(message.get("content"), list) for message in chat):
            return values
        marks = [secrets.token_hex(8) for _ in chat]
        marked = [_with_mark(message.get("content"), mark) for message, mark in zip(chat, marks, strict=True)]
        try:
            text = self.text(values | {"messages": _with_contents(chat, marked)})
        except DataError:
            text = ""  # if it refuses strings too, it says so once more
        contents = [_readable(message.get("content"), mark, text) for message, mark in zip(chat, marks, strict=True)]
        return values | {"messages": _with_contents(chat, contents)}

    def _apply(self, values: Mapping[str, object], *, tokenize: bool) -> object:
        options: dict[str, Any] = dict(values)
        if getattr(self.tokenizer, "chat_template", None) is None and "chat_template" not in options:
            raise DataError(
                f"{type(self.tokenizer).__name__} has no chat template, so that a chat cannot be written for its model; set "
                "tokenizer.chat_template to the prompt format that the model knows, or put it as chat_template.jinja beside "
                "its tokenizer's files"
            )
        try:
            return self.tokenizer.apply_chat_template(
                options.pop("messages"),
                add_generation_prompt=self.add_generation_prompt, tokenize=tokenize, return_dict=False,
                **options,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"the chat template refuses this chat: {error}") from error


def _with_contents(chat: Sequence[dict[str, object]], contents: Sequence[object]) -> list[dict[str, object]]:
    return [
        message | {"content": content} if isinstance(message.get("content"), list) else message
        for message, content in zip(chat, contents, strict=True)
    ]


def _with_mark(content: object, mark: str) -> object:
    """Return content parts with ``mark`` at the end of each text among them; if there is none, in one more part."""
    if not isinstance(content, list):
        return content
    if not any(map(is_text, content)):
        return [*content, {"type": "text", "text": mark}]
    return [part | {"text": part["text"] + mark} if is_text(part) else part for part in content]


def _readable(content: object, mark: str, text: str) -> object:
    """Return content parts as they are if ``text`` has their marks, and not within a list as Python or JSON writes it."""
    if not isinstance(content, list):
        return content
    all_there = text.count(mark) >= max(1, sum(map(is_text, content)))
    if all_there and not re.search(mark + r"""['"]\s*[,}\]]""", text):
        return content
    try:
        return flat(content)
    except DataError as error:
        raise DataError(f"{error}, and the chat template takes text alone; leave it out") from error


def _typed(tokenizer: PreTrainedTokenizerBase, values: object) -> list[str]:
    """Return the names of special tokens that stand in the strings of ``values`` and would become tokens."""
    special = untypable(tokenizer, len(tokenizer))
    followed = {tokenizer.unk_token_id, *known_control(tokenizer, len(tokenizer))}  # the one stands for unknown letters, too
    names: set[str] = set()

    def look(text: str) -> str:
        if found := special & set(tokenizer.encode(text, add_special_tokens=False)):
            here = {name for token in found if (name := token_name(tokenizer, token)) in text}
            if not here and not found <= followed:
                raise DataError(f"the tokenizer makes a special token of the text {text[:40]!r}; remove it from the message")
            names.update(here)
        return text

    _replaced(values, look)
    return sorted(names, key=len, reverse=True)  # of two that begin alike the longer one is meant


def _with_typed(template: _Template, values: dict[str, object], names: Sequence[str]) -> list[int]:
    """Render the chat with marks where ``names`` stand in it, and put these back as text."""
    marks = {secrets.token_hex(16): name for name in names}  # a user cannot guess them
    mark_of = {name: mark for mark, name in marks.items()}
    any_name = re.compile("|".join(map(re.escape, names)))
    own = {name: value for name, value in values.items() if name != "chat_template"}
    marked = cast(dict[str, object], _replaced(own, lambda text: any_name.sub(lambda found: mark_of[found[0]], text)))
    parts = re.split(f"({'|'.join(marks)})", template.text(values | marked))
    if "".join(marks.get(part, part) for part in parts) != template.text(values):
        raise DataError(
            "a message holds the text of a special token, and the tokenizer's chat template changes messages in a way that "
            "cannot be followed; remove that text from the message"
        )
    ids: list[int] = []
    for number, part in enumerate(parts):
        if part in marks:
            ids += encode_text(template.tokenizer, marks[part])
        elif number:
            ids += encode_template(template.tokenizer, part)
        else:
            ids += template.tokenizer.encode(part, add_special_tokens=False)
    return ids


def _replaced(value: object, change: Callable[[str], str]) -> object:
    """Return ``value`` with every string in it changed, in lists and dicts too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_replaced(name, change): _replaced(one, change) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(one, change) for one in value]
    return value
