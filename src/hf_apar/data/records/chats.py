"""Chats in one form, whatever form a record writes them in: turns that any chat template takes, answers and their trees."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

from hf_apar.data.extraction.markdown import extract
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.data.records.tool_calls import from_json, read_tools, shown, tool_calls
from hf_apar.errors import DataError
from hf_apar.text.content import flat


class Message(TypedDict):
    """A message as chat templates take it; the fields that need not be there are those of tool calls."""

    role: str
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, object]]]
    tool_call_id: NotRequired[str]
    tree: NotRequired[object]  # what ``hf-apar extract`` wrote; null: this answer is context alone


ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant", "ai": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
_FOLLOWERS = {
    "": ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}  # fmt: skip
_PAIRS = (
    ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"),
    ("question", "answer"), ("question", "response"),
)  # fmt: skip
_REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking")  # vLLM, OpenRouter, gpt-oss

LED = "answers that nothing asked for, at the start, are left out"
JOINED = "messages of one role in a row are joined by a blank line"
UNANSWERED = "what follows the last answer is left out"


@dataclass(frozen=True)
class Chat:
    """The messages of a record in the order that every chat template takes.

    Attributes:
        messages: perhaps one of the system, then the user and the assistant in turns, results of tools between; an
            answer of the assistant is the last.
        tools: what the model may call, as templates take it.
        repairs: what was done to bring them into that order, :data:`LED`, :data:`JOINED` or :data:`UNANSWERED`.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, object], ...] = ()
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatAnswer:
    """An answer of a chat, the messages before it, the tools that it may call, and where it forks.

    Attributes:
        record: the number of the record that it stands in, by which it is named where a template refuses it.
        repairs: what was done to its chat, see :class:`Chat`.
    """

    before: tuple[Message, ...]
    tree: TextThread
    tools: tuple[dict[str, object], ...] = ()
    record: int = field(default=0, compare=False)
    repairs: tuple[str, ...] = field(default=(), compare=False)


def read_chat(record: object) -> Chat:
    """Return the chat that ``record`` holds.

    >>> read_chat({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}).messages
    ({'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'})

    Args:
        record: with ``messages`` or ``conversations``, a list of ``role`` and ``content`` or of ``from`` and ``value``; or
            with a prompt and an answer to it: ``prompt`` and ``response`` or ``completion``, ``instruction`` (with
            ``input``) and ``output`` or ``response``, ``question`` and ``answer`` or ``response``. ``system``, ``tools`` and
            ``history`` (pairs that came before a prompt) may stand beside them; other fields are left out.

    Raises:
        DataError: if it is none of these, holds something else than text, or its messages are in no order that chat
            templates take. What is wrong is said in words that hardly depend on the record, so that they can be counted.
    """
    if not isinstance(record, Mapping):
        raise DataError("the record is no object")
    given = [_message(item) for item in [*_system(record), *_turns(record)]]
    messages, repairs = _in_order(_said_once(given))
    tools = read_tools(record.get("tools"))
    check_letters(shown(tools))
    return Chat(tuple(messages), tools, repairs)


def _said_once(given: Sequence[Message]) -> list[Message]:
    """Leave out what the system says once more: a field may say what the first turn says."""
    known: set[tuple[str, str | None]] = set()
    kept = []
    for message in given:
        told = message["content"], message.get("name")
        if message["role"] != "system" or told not in known:
            kept.append(message)
        if message["role"] == "system":
            known.add(told)
    return kept


def _system(record: Mapping[str, object]) -> Iterator[object]:
    for name in ("system", "system_prompt"):
        if record.get(name) not in (None, ""):
            yield {"role": "system", "content": record[name]}


def _turns(record: Mapping[str, object]) -> Iterator[object]:
    for name in ("messages", "conversations", "conversation"):
        if record.get(name) is not None:
            yield from _items(record[name])
            return
    pairs = [pair for pair in _PAIRS if record.keys() >= set(pair)]  # a table gives every row the fields of all
    if not pairs:
        raise DataError("the record has neither messages nor conversations nor a prompt and a response")
    yield from _pair(record, *next((pair for pair in pairs if None not in map(record.get, pair)), pairs[0]))


def _items(items: object) -> Sequence[object]:
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        raise DataError("the messages are no list of objects")
    return items


def _pair(record: Mapping[str, object], prompt_key: str, answer_key: str) -> Iterator[object]:
    """Yield the turns of a prompt and its answer: texts or, as TRL writes them, lists of messages."""
    prompt, answer = record[prompt_key], record[answer_key]
    for key in (prompt_key, answer_key):
        if not isinstance(record[key], str | Sequence) or isinstance(record[key], bytes):
            raise DataError(f"the {key} is no text")
    for turn in _items(record.get("history") or ()):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise DataError("the history is no list of pairs of texts")
        yield from ({"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]})
    more = (record.get("input") or record.get("context")) if prompt_key == "instruction" else None
    if isinstance(prompt, str) and isinstance(more, str):
        prompt = "\n\n".join(text for text in (prompt, more) if text)
    for role, text in (("user", prompt), ("assistant", answer)):
        yield from [{"role": role, "content": text}] if isinstance(text, str) else _items(text)


def _message(item: object) -> Message:
    if not isinstance(item, Mapping):
        raise DataError("the messages are no list of objects")
    role_key, text_key = ("from", "value") if item.get("role") is None and "from" in item else ("role", "content")
    given = item.get(role_key)
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        raise DataError(f"a message has the unknown {role_key} {str(given)[:40]!r}")
    if name := next(filter(item.get, _REASONING), None):
        raise DataError(
            f"a message keeps its reasoning in a field of its own, {name}; write it into the content, as the model does"
        )
    calls = tool_calls(item)
    message = Message(role=role, content=_text(item.get(text_key), text_key, bool(calls)))
    if calls:
        message["tool_calls"] = calls
    if isinstance(name := item.get("name"), str):
        message["name"] = name
    if isinstance(call := item.get("tool_call_id"), str):
        message["tool_call_id"] = call
    if "tree" in item or item.get("weight") == 0:  # OpenAI's weight
        message["tree"] = item.get("tree")
    check_letters(message["content"], message.get("name", ""), message.get("tool_call_id", ""), shown(calls))
    return message


def check_letters(*texts: str) -> None:
    """Refuse what no tokenizer can read: half a surrogate pair, which JSON may escape, and bytes that are no UTF-8."""
    if any("\ud800" <= letter <= "\udfff" for text in texts if not text.isascii() for letter in text):
        raise DataError("a message holds half a surrogate pair, or bytes that are no UTF-8")


def _text(content: object, key: str, may_lack: bool) -> str:
    """Return the text of a message's content: a string, or parts that are texts."""
    if isinstance(content, str):
        return content
    if content is None and may_lack:
        return ""
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise DataError(f"a message has no text under {key!r}")
    return flat(content)


def _in_order(given: Sequence[Message]) -> tuple[list[Message], tuple[str, ...]]:
    """Return messages in the order that strict templates ask for, and what had to be done to them."""
    repairs: dict[str, None] = {}
    messages: list[Message] = []
    more: dict[int, list[str]] = {}  # what is joined to a message
    for message in given:
        last = messages[-1]["role"] if messages else ""
        if message["role"] == "assistant" and last in ("", "system"):
            repairs[LED] = None
        elif message["role"] == last and last in ("system", "user"):
            repairs[JOINED] = None
            more.setdefault(len(messages) - 1, []).append(message["content"])
        elif message["role"] not in _FOLLOWERS[last]:
            raise DataError(f"a message of the role {message['role']} follows one of the role {last}" if last else
                            f"the chat begins with a message of the role {message['role']}")  # fmt: skip
        else:
            messages.append(message)
    for place, texts in more.items():
        text = "\n\n".join(text for text in (messages[place]["content"], *texts) if text)
        messages[place] = Message(role=messages[place]["role"], content=text)
    while messages and not is_answer(messages[-1]):
        repairs[UNANSWERED] = None
        messages.pop()
    if not messages:
        raise DataError("the record has no answer of the assistant")
    if not all(message["content"].strip() for message in messages if is_answer(message)):
        raise DataError("an answer is empty")
    return messages, tuple(repairs)


def is_answer(message: Message) -> bool:
    """Can it be learnt from? A call of tools is written by the template, and is context alone."""
    learnt = "tree" not in message or message["tree"] is not None
    return message["role"] == "assistant" and not message.get("tool_calls") and learnt


def chat_answers(record: object, number: int = 0) -> Iterator[ChatAnswer]:
    """Yield the answers of a record of that number, with the trees that ``hf-apar extract`` found or, without those, others.

    Raises:
        DataError: as :func:`read_chat`, and if a tree is one of another text.
    """
    chat = read_chat(record)
    plain = tuple(without_tree(message) for message in chat.messages)
    for index, message in enumerate(chat.messages):
        if is_answer(message):
            yield ChatAnswer(plain[:index], _tree(message), chat.tools, number, chat.repairs)


def without_tree(message: Message) -> Message:
    """Return the message as a template takes it."""
    plain = message.copy()
    plain.pop("tree", None)
    return plain


def _tree(message: Message) -> TextThread:
    if "tree" not in message:
        return extract(message["content"])
    pieces = message["tree"]
    if isinstance(pieces, str):  # in Parquet
        pieces = from_json(pieces, "a tree")
    tree = TextThread.from_json(pieces)
    if tree.text != message["content"]:
        raise DataError("a tree is not that of its answer; extract it again")
    return tree
