"""Answers of a model behind an OpenAI-compatible server, to be probed (extra ``evaluate``)."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from hf_apar.data.distillation.batches import BatchReport, Dropped, begin_anew, in_batches
from hf_apar.data.extraction.thinking import TAGS
from hf_apar.errors import ServerError
from hf_apar.evaluation.chat_server import ChatServer, Completion, RequestRefused
from hf_apar.evaluation.suites import Prompt
from hf_apar.probing.answers import ProbeAnswer

ENOUGH = 16
"""Prompts that a server refuses before it is taken to refuse all."""


def ask_server(server: ChatServer, prompts: Sequence[Prompt], path: Path) -> Iterator[int]:
    """Do as :func:`~hf_apar.probing.answers.ask_model` does, with a model behind ``server``.

    Batches are as large as its concurrency. A prompt that the server refuses is left out.

    Raises:
        ServerError: if a request fails for good in another way, or the first :data:`ENOUGH` prompts, or all of fewer, are
            refused; ``path`` keeps what it has.
    """

    def answer(batch: Sequence[Prompt]) -> list[ProbeAnswer | Dropped]:
        outcomes: dict[int, ProbeAnswer | Dropped] = {}
        chats = {number: prompt.messages for number, prompt in enumerate(batch)}
        with closing(server.ask(chats, refusals_fail=False)) as replies:
            for number, reply in replies:
                outcomes[number] = _outcome(batch[number], reply)
        refused = [one.reason for one in outcomes.values() if isinstance(one, Dropped)]
        before = BatchReport.of(path)
        if len(refused) == len(batch) and not before.answers and before.asked + len(batch) >= min(ENOUGH, len(prompts)):
            begin_anew(path)  # it is not the prompts' fault
            raise ServerError(f"the server refuses every prompt: {refused[0]}")
        return [outcomes[number] for number in range(len(batch))]

    return in_batches(prompts, path, server.concurrency, (server.model, dict(server.parameters)), answer)


def _outcome(prompt: Prompt, reply: Completion | ServerError) -> ProbeAnswer | Dropped:
    if isinstance(reply, RequestRefused):
        return Dropped(str(reply))
    if isinstance(reply, ServerError):
        raise reply
    opening, end = TAGS[0]
    thoughts = f"{opening}{reply.thoughts}" if reply.thoughts else ""
    if thoughts and (reply.text or reply.ended):  # else the limit of tokens came before their end
        thoughts += f"{end}\n\n"
    return ProbeAnswer(prompt.text, thoughts + reply.text, prompt.key, reply.ended)
