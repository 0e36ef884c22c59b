"""Prompts to measure with, and what is expected of their answers: the package's own, a bench's, those of any chats.

The own ones stand in ``suites/``, JSON Lines by name. They are written for this package; no recipe trains on them.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

from hf_apar.data.records.chats import Message, read_chat, without_tree
from hf_apar.data.records.files import open_records, record_of, usable
from hf_apar.data.records.rejections import UNUSABLE
from hf_apar.errors import ConfigurationError, DataError

Item = TypeVar("Item")
Expected = Literal["parts", "whole", "either"]
"""Of an answer: are there parts that can be written without each other? Steps, stories and proofs are whole."""

SUITES = ("parts", "whole", "either", "languages", "formats", "nested", "dialogue")
"""The names of the package's own suites."""

FASTCHAT: Mapping[str, Expected] = {
    "generic": "parts", "knowledge": "parts", "common-sense": "parts", "counterfactual": "parts", "humanities": "parts",
    "fermi": "either", "stem": "either", "writing": "either", "roleplay": "either",
    "coding": "whole", "math": "whole", "reasoning": "whole", "extraction": "whole",
}  # fmt: skip
"""What the categories of Vicuna Bench and MT-Bench lead to expect."""

_FIELDS = {"key", "category", "expected", "messages", "language", "items", "check"}
_FOLDER = Path(__file__).with_name("suites")


@dataclass(frozen=True)
class Prompt:
    """A chat that waits for an answer, and what is known of a good one.

    Attributes:
        key: tells it from all others, and stays when prompts are added.
        suite, category: what its figures are counted under.
        expected: see :data:`Expected`; ``None`` where nobody knows.
        messages: perhaps one of the system, then the user and the assistant in turns, the user's last.
        language: the BCP 47 tag of the answer's; ``und`` where nobody knows.
        items: how many parts it asks for, counted or named, at the first level; ``None`` where it leaves that open.
        check: see :meth:`is_right`.
        after: the key of the prompt whose answer, the arm's own, comes before the user's last message: see :meth:`going_on`.
    """

    key: str
    suite: str
    category: str
    expected: Expected | None
    messages: tuple[Message, ...]
    language: str = "en"
    items: int | None = None
    check: str | None = None
    after: str | None = None

    @property
    def text(self) -> str:
        """The user's last message."""
        return self.messages[-1]["content"]

    def is_right(self, answer: str) -> bool | None:
        """Does ``check`` occur in ``answer``, whatever the case, ``^`` at each line? ``None`` where there is no check.

        >>> prompt = Prompt("sum", "own", "maths", "whole", ({"role": "user", "content": "7 + 8?"},), check=r"\\b15\\b")
        >>> prompt.text, prompt.is_right("It is 15."), prompt.is_right("It is 150.")
        ('7 + 8?', True, False)
        """
        return None if self.check is None else bool(re.search(self.check, answer, re.IGNORECASE | re.MULTILINE))

    def going_on(self, answer: str) -> "Prompt":
        """Return the chat with ``answer``, that to the prompt ``after``, in its place."""
        *before, last = self.messages
        return replace(self, messages=(*before, Message(role="assistant", content=answer), last))


def own(*names: str) -> list[Prompt]:
    """Return the prompts of the package's own suites of those names, one of :data:`SUITES` each; of all, if none is named.

    Raises:
        ConfigurationError: if there is no suite of a name.
    """
    if unknown := [name for name in names if name not in SUITES]:
        raise ConfigurationError(f"there is no suite {unknown[0]!r}; the package's own are {', '.join(SUITES)}")
    return [prompt for name in dict.fromkeys(names or SUITES) for prompt in read_suite(_FOLDER / f"{name}.jsonl")]


def read_suite(path: Path) -> list[Prompt]:
    """Read prompts in the package's own form: objects with ``key``, ``category``, ``expected`` and ``messages``.

    ``language``, ``items`` and ``check`` may stand beside them, see :class:`Prompt`; the suite has the name of the file.

    Raises:
        DataError: if there is none, or a line holds something else; it is named.
    """
    return _each(path, lambda record: [_own_prompt(record, path.stem)])


def read_fastchat(path: Path, turns: int = 1) -> list[Prompt]:
    """Read the questions of a bench in FastChat's form: objects with ``question_id``, ``category`` and ``turns``.

    The suite has the name of the file, or of its folder where that is ``question.jsonl``, as FastChat names them all. A key
    is ``SUITE-ID``, followed by ``-2`` for a second turn, which comes after the first. What is expected follows from the
    category (:data:`FASTCHAT`). A second turn may ask for anything about the first answer: where that was in parts,
    nothing is expected.

    Args:
        turns: 1, or 2 for the second ones too, where there are any.

    Raises:
        ConfigurationError: if ``turns`` is another.
        DataError: if there is none, or a line holds something else; it is named.
    """
    if turns not in (1, 2):
        raise ConfigurationError(f"turns is {turns!r}; give 1, or 2 for the second ones too")
    suite = path.resolve().parent.name if path.stem == "question" else path.stem
    return _each(path, lambda record: _bench_prompts(record, suite, turns))


def read_chats(path: Path) -> list[Prompt]:
    """Read what chats of any form ask: all before the first answer; equal prompts count once, nothing is expected of them.

    A warning tells of records that cannot be used. A key is ``FILE-NUMBER``, that of the record.

    Args:
        path: as for :func:`~hf_apar.data.records.files.open_records`; records as for
            :func:`~hf_apar.data.records.chats.read_chat`, or with a ``prompt`` alone.

    Raises:
        DataError: if none can be used.
    """

    def prompt(record: object, number: int) -> Prompt:
        return Prompt(f"{path.stem}-{number}", path.stem, "chat", None, _asked(record), language="und")

    found: dict[str, Prompt] = {}
    for one in usable(path, prompt, "chats, or a prompt and a response"):
        found.setdefault(str(one.messages), one)
    return list(found.values())


def suite_named(text: str, *, sample: int | None = None, seed: int = 0, turns: int = 1) -> list[Prompt]:
    """Return the prompts that ``text`` names: ``own`` for all of the package's, one of :data:`SUITES`, or a file.

    A file is one of :func:`read_suite`, :func:`read_fastchat` or :func:`read_chats`; its first record tells.

    Args:
        sample, seed: draw at most so many, as :func:`drawn` does; a second turn is drawn with the first.
        turns: as for :func:`read_fastchat`.

    Raises:
        ConfigurationError: if ``text`` is none of these.
        DataError: as the readers.
    """
    path = Path(text)
    if text == "own" or text in SUITES:
        prompts = own() if text == "own" else own(text)
    elif path.exists():
        prompts = _read(path, turns)
    else:
        raise ConfigurationError(
            f"the suite {text!r} is neither own, one of {', '.join(SUITES)}, nor a file; name one of these, or a file of "
            "prompts, of a bench in FastChat's form or of chats"
        )
    kept = set(drawn([prompt.key for prompt in prompts if prompt.after is None], sample, seed))
    return [prompt for prompt in prompts if (prompt.after or prompt.key) in kept]


def _read(path: Path, turns: int) -> list[Prompt]:
    """Read prompts as the first record of ``path`` says."""
    try:
        record = next((record_of(row) for _, row in open_records(path).rows), None)
    except UNUSABLE:  # the first line may be a chat's that is set aside
        record = None
    fields = record.keys() if isinstance(record, Mapping) else set()
    if "turns" in fields:
        return read_fastchat(path, turns)
    return read_suite(path) if {"expected", "messages"} <= fields else read_chats(path)


def drawn(items: Sequence[Item], sample: int | None, seed: int) -> list[Item]:
    """Return at most ``sample`` of ``items`` in their order, all without a number.

    They are the same ones for the same ``seed``, and a smaller sample is part of a larger one.

    Raises:
        ConfigurationError: if ``sample`` is below 1.
    """
    if sample is None or sample >= len(items):
        return list(items)
    if sample < 1:
        raise ConfigurationError(f"sample is {sample}; give a number from 1 on, or leave it out")
    everywhere = random.Random(seed).sample(range(len(items)), len(items))
    return [items[place] for place in sorted(everywhere[:sample])]


def _each(path: Path, read: Callable[[object], list[Prompt]]) -> list[Prompt]:
    """Return what ``read`` makes of each record of ``path``: measured is all of a suite, or an error names what is wrong."""
    prompts: dict[str, Prompt] = {}
    for number, row in open_records(path).rows:
        try:
            for prompt in read(record_of(row)):
                if prompt.key in prompts:
                    raise DataError(f"{prompt.key} stands there twice; give each prompt a key of its own")
                prompts[prompt.key] = prompt
        except UNUSABLE as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    if not prompts:
        raise DataError(f"{path} holds no prompts")
    return list(prompts.values())


def _own_prompt(record: object, suite: str) -> Prompt:
    fields = _mapping(record, ("key", "category", "expected", "messages"))
    if unknown := sorted(fields.keys() - _FIELDS):
        raise DataError(f"the prompt has the unknown field {unknown[0]}; there are {', '.join(sorted(_FIELDS))}")
    expected, items, check = (fields.get(name) for name in ("expected", "items", "check"))
    if expected is not None and expected not in get_args(Expected):
        raise DataError(f"expected is {expected!r}; wanted one of {', '.join(get_args(Expected))}, or null")
    if items is not None and (type(items) is not int or items < 1):
        raise DataError(f"items is {items!r}; wanted a number of parts")
    if check is not None:
        _check_pattern(_word(fields, "check"))
    return Prompt(
        _word(fields, "key"), suite, _word(fields, "category"), cast(Expected | None, expected), _asking(fields["messages"]),
        _word({"language": "en", **fields}, "language"), items, cast(str | None, check),
    )  # fmt: skip


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise DataError(f"check is no regular expression: {error}") from error


def _bench_prompts(record: object, suite: str, wanted: int) -> list[Prompt]:
    fields = _mapping(record, ("question_id", "category", "turns"))
    key, category, turns = f"{suite}-{fields['question_id']}", _word(fields, "category"), fields["turns"]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise DataError("turns is no list of at least 1 text")
    expected = FASTCHAT.get(category)
    asked = [_asking([{"role": "user", "content": turn}]) for turn in turns[:wanted]]
    first = Prompt(key, suite, category, expected, asked[0])
    later = None if expected == "parts" else expected
    return [first, *(Prompt(f"{key}-2", suite, category, later, asked[0] + one, after=key) for one in asked[1:])]


def _mapping(record: object, wanted: Iterable[str]) -> Mapping[str, object]:
    if not isinstance(record, Mapping):
        raise DataError("the record is no object")
    if missing := [name for name in wanted if name not in record]:
        raise DataError(f"the prompt has no {missing[0]}; wanted {', '.join(wanted)}")
    return record


def _word(fields: Mapping[str, object], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name} is {value!r}; wanted a text")
    return value


def _asking(messages: object) -> tuple[Message, ...]:
    """Return ``messages``, checked: they wait for an answer."""
    match messages:
        case [*_, {"role": "user"}]:
            return _with_question(read_chat({"messages": [*messages, {"role": "assistant", "content": "?"}]}).messages[:-1])
    raise DataError("the messages are no list of objects that ends with one of the user")


def _asked(record: object) -> tuple[Message, ...]:
    """Return what a chat asks first."""
    if isinstance(record, Mapping) and "prompt" in record and not record.keys() & {"response", "completion"}:
        record = {**record, "response": "?"}
    chat = read_chat(record)
    if chat.tools:
        raise DataError("the chat has tools, which would not be asked with")
    return _with_question(tuple(takewhile(lambda message: message["role"] != "assistant", chat.messages)))


def _with_question(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not messages[-1]["content"].strip():
        raise DataError("the question is empty")
    return tuple(map(without_tree, messages))
