"""Chats in a file: one form for the ways in which records write them, and the trees that extraction adds."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_apar.data.text_tree import TextThread
from hf_apar.errors import DataError

Message = dict[str, str]

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
_KNOWN_ROLES = frozenset(("system", "developer", "user", "assistant", "tool"))


@dataclass(frozen=True)
class ChatAnswer:
    """An answer of a chat, the messages before it, and where it forks."""

    before: tuple[Message, ...]
    tree: TextThread


def chat_messages(record: object) -> list[Message]:
    """Return the messages of ``record``, with ``role`` and ``content``.

    >>> chat_messages({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]

    Args:
        record: with ``prompt`` and ``response``, with ``messages``, or with ``conversations`` of ``from`` and ``value``.

    Raises:
        DataError: if it is none of these, has a message that is no text, or no answer of the assistant.
    """
    if not isinstance(record, Mapping):
        raise DataError("the record is no object")
    if record.get("messages") is not None:
        messages = _messages(record["messages"], "role", "content")
    elif record.get("conversations") is not None:
        messages = _messages(record["conversations"], "from", "value")
    elif record.get("prompt") is not None and record.get("response") is not None:
        pair = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}]
        messages = _messages(pair, "role", "content")
    else:
        raise DataError("the record has neither messages nor conversations nor prompt and response")
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise DataError("the record has no answer of the assistant")
    if not all(answer.strip() for answer in answers):
        raise DataError("an answer is empty")
    return messages


def _messages(items: object, role_key: str, text_key: str) -> list[Message]:
    if not isinstance(items, Sequence) or isinstance(items, str) or not all(isinstance(item, Mapping) for item in items):
        raise DataError("the messages are no list of objects")
    messages = []
    for item in items:
        role, text = item.get(role_key), item.get(text_key)
        role = _ROLES.get(role, role) if isinstance(role, str) else None
        if role not in _KNOWN_ROLES:
            raise DataError(f"a message has the unknown {role_key} {str(item.get(role_key))[:40]!r}")
        if not isinstance(text, str):
            raise DataError(f"a message has no text under {text_key!r}")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise DataError("a message holds half a surrogate pair")
        messages.append({"role": role, "content": text})
    return messages


def chat_answers(record: Mapping[str, object]) -> Iterator[ChatAnswer]:
    """Yield the answers of a record that ``hf-apar extract`` wrote.

    Raises:
        DataError: if an answer has no tree, or one of another text.
    """
    messages = chat_messages(record)
    given = record["messages"]
    assert isinstance(given, Sequence)
    for index, (message, source) in enumerate(zip(messages, given, strict=True)):
        if message["role"] != "assistant":
            continue
        pieces = source.get("tree")
        tree = TextThread.from_json(json.loads(pieces) if isinstance(pieces, str) else pieces)  # text in Parquet
        if tree.text != message["content"]:
            raise DataError(f"the tree is not that of its answer, {message['content'][:40]!r}; extract it again")
        yield ChatAnswer(tuple(messages[:index]), tree)


@dataclass(frozen=True)
class RecordFile:
    """A file or folder of records: how many there are, about, and each with its number."""

    total: int
    rows: Iterator[tuple[int, object]]


def open_records(path: Path) -> RecordFile:
    """Open JSON Lines, a Parquet file (``.parquet``), or a dataset that ``save_to_disk`` wrote; rows are streamed.

    A row of JSON Lines comes as bytes, so that what cannot be read is the caller's to count.

    Raises:
        DataError: if the folder holds several splits, or no dataset.
    """
    if path.is_dir():
        return _open_dataset(path)
    if path.suffix == ".parquet":
        return _open_parquet(path)
    with path.open("rb") as file:
        total = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    return RecordFile(total, _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark


def _open_parquet(path: Path) -> RecordFile:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path)
    rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
    return RecordFile(file.metadata.num_rows, enumerate(rows, start=1))


def _open_dataset(path: Path) -> RecordFile:
    from datasets import Dataset, load_from_disk

    try:
        data = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path} is no dataset that save_to_disk wrote; give that, JSON Lines or Parquet") from error
    if not isinstance(data, Dataset):
        raise DataError(f"{path} holds the splits {', '.join(data)}; give the folder of one, {path / next(iter(data))}")
    return RecordFile(len(data), enumerate(data, start=1))
