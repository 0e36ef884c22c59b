"""Each thread's path as the row of a batch: what logits processors and stopping criteria of transformers must get."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from hf_apar.protocol import ForkProtocol, ThreadView


@dataclass(frozen=True)
class Path:
    """A row's prompt and the tokens after it, as a logits processor or a stopping criterion sees them."""

    row: int
    new_ids: Sequence[int]


@dataclass(frozen=True)
class _Ahead:
    """A thread as it is once it has written ``guesses``; its path is put together for protocols that read it."""

    thread: ThreadView
    guesses: Sequence[int]

    @property
    def path_ids(self) -> Sequence[int]:
        return [*self.thread.path_ids, *self.guesses]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.thread, name)


@dataclass(frozen=True)
class Context:
    """What the choice of one token may look at; the token follows ``thread``'s path and ``guesses``.

    Attributes:
        row: of the batch.
        prompt_length: how many of the path's ids are the row's prompt.
        banned: tokens that may not be chosen.
        guess: a token that was drawn for this place, if one was.
        drawn_from: the probabilities (vocabulary,) that it was drawn with.
    """

    row: int
    thread: ThreadView
    prompt_length: int
    guesses: Sequence[int] = ()
    banned: Sequence[int] = ()
    guess: int | None = None
    drawn_from: Tensor | None = field(default=None, repr=False)

    @classmethod
    def after(
        cls, thread: ThreadView, guesses: Sequence[int], protocol: ForkProtocol, *, row: int, prompt_length: int
    ) -> "Context":
        """Return what the choice after ``thread``'s path and ``guesses`` may look at, with what ``protocol`` bans there."""
        last = guesses[-1] if guesses else thread.path_ids[-1] if thread.path_ids else -1
        writer = cast(ThreadView, _Ahead(thread, guesses)) if guesses else thread
        return cls(row, thread, prompt_length, guesses, protocol.banned(writer, last))

    @property
    def path(self) -> Path:
        """All that stands before the token: a copy of the path, so ask only where it is needed."""
        return Path(self.row, [*self.thread.path_ids[self.prompt_length :], *self.guesses])

    def as_read(self, token: int) -> Path:
        """Return the path up to ``token`` as the answer reads: without the control tokens between a prefix and its child."""
        unread = set(self.thread.unread)
        own = enumerate(self.thread.path_ids[self.prompt_length :], self.prompt_length)
        return Path(self.row, [*(one for place, one in own if place not in unread), *self.guesses, token])


    def last_read(self, token: int, count: int) -> list[int]:
        """Return the last ``count`` ids of the path up to ``token`` as the answer reads, fewer where there are no more."""
        unread, path, found = set(self.thread.unread), self.thread.path_ids, [token, *reversed(self.guesses)][:count]
        place = len(path) - 1
        while len(found) < count and place >= 0:
            if place not in unread:
                found.append(path[place])
            place -= 1
        return found[::-1]


@dataclass(frozen=True)
class Round:
    """Paths of one length, at most one of each row: ``input_ids`` is (batch, prompt + length).

    ``indices`` are the paths' places in what :func:`rounds` was given, ``rows`` their rows in ``input_ids``; the rows of
    ``input_ids`` that are not listed hold padding after the prompt.
    """

    input_ids: Tensor
    indices: list[int]
    rows: list[int]


def rounds(prompt_ids: Tensor, paths: Sequence[Path], pad_token_id: int) -> Iterator[Round]:
    """Split ``paths`` into as few batches as lengths and rows allow; ``prompt_ids`` is (batch, prompt), left-padded.

    >>> paths = [Path(0, [5]), Path(1, [6]), Path(0, [7])]
    >>> for batch in rounds(torch.tensor([[1], [2]]), paths, pad_token_id=0):
    ...     print(batch.input_ids.tolist(), batch.indices)
    [[1, 5], [2, 6]] [0, 1]
    [[1, 7], [2, 0]] [2]
    """
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    seen: dict[tuple[int, int], int] = defaultdict(int)
    for index, path in enumerate(paths):
        length = len(path.new_ids)
        found[length, seen[length, path.row]].append(index)
        seen[length, path.row] += 1
    for (length, _), indices in found.items():
        rows = [paths[index].row for index in indices]
        new_ids = torch.full((len(prompt_ids), length), pad_token_id, dtype=torch.long)
        new_ids[rows] = torch.tensor([list(paths[index].new_ids) for index in indices], dtype=torch.long)
        yield Round(torch.cat([prompt_ids, new_ids.to(prompt_ids.device)], dim=1), indices, rows)
