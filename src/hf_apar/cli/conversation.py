"""Turns of a chat: each question is asked with all that was said before it, and its answer is shown while it is written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from hf_apar.checkpoints.writing import write_whole
from hf_apar.cli.answers import both_ways, say_what_was_cut, summarise
from hf_apar.cli.compare import Interrupted, Method, Recorded
from hf_apar.config import AparConfig
from hf_apar.errors import ConfigurationError
from hf_apar.replay import write_replay
from hf_apar.text.chat import encode_chat


class Way(StrEnum):
    """How answers are written: in threads, token by token, or both, one after the other."""

    apar = "apar"
    plain = "plain"
    compare = "compare"


@dataclass
class Conversation:
    """What was said so far, and how the next answer is written.

    Attributes:
        method: what decodes; its prompt and question are those of each turn.
        config: settings of answers in threads; ``None`` if the model cannot fork.
        messages: what was said, as chat templates take it; an answer in threads is there as it reads.
        way: how the next answer is written.
        recorded: how the last answer came about; with :attr:`Way.compare` also that of plain decoding, last.
        saved: the line that stands in each file where it was saved.
    """

    method: Method
    config: AparConfig | None
    chat_template_kwargs: Mapping[str, object] | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    way: Way = Way.apar
    recorded: list[Recorded] = field(default_factory=list)
    saved: dict[Path, bytes] = field(default_factory=dict)

    def ask(self, question: str) -> None:
        """Answer ``question``; a turn of which nothing can be kept is forgotten.

        Raises:
            KeyboardInterrupt: with Ctrl-C, after what was written by then has become the answer.
            DataError: if the chat template refuses the turn.
        """
        turn = {"role": "user", "content": question}
        method = self.prepared(turn)
        try:
            answer, recorded = self._answered(method)
        except Interrupted as stop:
            if stop.text:
                self._keep(turn, stop.text, [stop.recorded])
            raise
        self._keep(turn, answer, recorded)

    def prepared(self, turn: dict[str, str]) -> Method:
        """Return what answers ``turn`` after all that was said; what was typed is never a control token."""
        chat = [*self.messages, turn]
        ids = encode_chat(self.method.tokenizer, chat, chat_template_kwargs=self.chat_template_kwargs)
        return replace(self.method, prompt=ids, question=turn["content"])

    def _answered(self, method: Method) -> tuple[str, list[Recorded | None]]:
        config = None if self.way is Way.plain else self.config
        one, many = both_ways(method, config, plain=self.way is not Way.apar)
        summarise(one, many)
        say_what_was_cut(one, many, method.max_new_tokens)
        results = [result for result in (many, one) if result is not None]
        return results[0].text, [result.recorded for result in results]

    def _keep(self, turn: dict[str, str], answer: str, recorded: list[Recorded | None]) -> None:
        self.messages += [turn, {"role": "assistant", "content": answer}]
        self.recorded = [one for one in recorded if one is not None]

    def choose(self, way: Way) -> None:
        """Write the next answers so.

        Raises:
            ConfigurationError: if the model cannot fork.
        """
        if way is not Way.plain and self.config is None:
            raise ConfigurationError("the chat began with --plain, which leaves APAR out; begin one without it")
        self.way = way

    def save(self, file: Path) -> None:
        """Write the chat as one line of JSON Lines, as ``extract`` and ``train`` take chats.

        What it wrote there before becomes that line; of another chat's, and of what else is in the file, nothing is lost.
        """
        if not self.messages:
            raise ConfigurationError("nothing was said yet; ask something first")
        line = (json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n").encode()
        there = file.read_bytes() if file.exists() else b""
        before = there.replace(self.saved[file], b"", 1) if file in self.saved else there
        if before and not before.endswith(b"\n"):
            before += b"\n"
        write_whole(file, (before + line).decode())
        self.saved[file] = line

    def replay(self, file: Path) -> None:
        """Write a page that plays how the last answer came about."""
        if not self.recorded:
            raise ConfigurationError("there is no answer yet; ask something first")
        write_replay(file, *(one.trace() for one in self.recorded))
