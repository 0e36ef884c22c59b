"""Which tokens each path holds, kept from step to step: a step adds a few of them, however long the paths are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hf_apar.choice.paths import Context

SMALLEST = 256  # tokens that a line has room for at first


@dataclass
class _Line:
    """The line ``index`` of the buffer: ``tokens`` stand in it, those of the first ``read`` ids of a path."""

    index: int
    read: int
    tokens: set[int] = field(default_factory=set)


class SeenTokens:
    """Lines of token ids, one for each thread: what its path holds, prompt included, each token once.

    For what asks only which tokens a path holds. Lines of different lengths stand in one tensor: what a line does not fill
    repeats its first token. A path only ever grows.

    Args:
        prompt_ids: integers (batch, prompt).
        starts: where each row's own tokens begin, behind its padding; all count where it is left out.

    Attributes:
        largest: of all tokens so far: a model may have more input embeddings than logits.
    """

    def __init__(self, prompt_ids: Tensor, starts: Sequence[int] = ()) -> None:
        self.prompt_ids, self.starts = prompt_ids, starts or [0] * len(prompt_ids)
        self.largest = -1
        self._ids = prompt_ids.new_zeros(1, SMALLEST)  # (lines, tokens)
        self._lines: dict[tuple[int, int], _Line] = {}  # by row and thread
        self._free = [0]  # lines that are nobody's

    @cached_property
    def _prompts(self) -> list[list[int]]:
        return [list(dict.fromkeys(ids[start:])) for ids, start in zip(self.prompt_ids.tolist(), self.starts, strict=True)]

    def of(self, contexts: Sequence[Context]) -> Tensor:
        """Return the tokens of each context's path and guesses, integers (contexts, longest), some of them repeated.

        >>> from hf_apar.tree.threads import Thread
        >>> seen = SeenTokens(torch.tensor([[5, 6, 5]]))
        >>> short, long = Thread(0, None, 0, 1, [5, 6, 5, 7]), Thread(1, 0, 1, 2, [5, 6, 5, 8, 9])
        >>> seen.of([Context(0, short, 3), Context(0, long, 3)]).tolist()
        [[5, 6, 7, 5], [5, 6, 8, 9]]
        """
        threads = {(context.row, context.thread.index): context for context in contexts}
        self._make_room(threads)
        self._read(threads)
        lines = [self._lines[context.row, context.thread.index] for context in contexts]
        longest = max(len(line.tokens) for line in lines)
        chosen = torch.tensor([line.index for line in lines], device=self._ids.device)
        seen = self._ids[:, :longest].index_select(0, chosen)  # (contexts, longest)
        guesses = [list(dict.fromkeys(context.guesses)) for context in contexts]
        most = max(map(len, guesses))
        if not most:
            return seen
        self.largest = max(self.largest, *map(max, filter(None, guesses)))
        filled = [
            own + [next(iter(own or line.tokens))] * (most - len(own)) for own, line in zip(guesses, lines, strict=True)
        ]
        return torch.cat([seen, torch.tensor(filled, device=seen.device)], dim=1)

    def _make_room(self, threads: Mapping[tuple[int, int], Context]) -> None:
        """Have a line for each of ``threads``."""
        new = [key for key in threads if key not in self._lines]
        if len(new) > len(self._free):  # other threads have ended, or get a new line when they are asked for again
            self._free += [self._lines.pop(key).index for key in self._lines.keys() - threads.keys()]
        lines, missing = len(self._ids), len(new) - len(self._free)
        if missing > 0:
            more = 1 << (lines + missing - 1).bit_length()
            self._ids = torch.cat([self._ids, self._ids.new_zeros(more - lines, self._ids.shape[1])])
            self._free += range(lines, more)
        for key in new:
            self._lines[key] = _Line(self._free.pop(), read=threads[key].prompt_length)

    def _read(self, threads: Mapping[tuple[int, int], Context]) -> None:
        """Add to each thread's line what it has written since it was read, and the prompt to a new one."""
        places, columns, tokens = list[int](), list[int](), list[int]()
        for (row, index), context in threads.items():
            line, path = self._lines[row, index], context.thread.path_ids
            begun, known = len(line.tokens), self._prompts[row] if not line.tokens else ()
            ids = [*known, *path[line.read :]]
            line.read = len(path)
            new = [token for token in dict.fromkeys(ids) if token not in line.tokens]
            line.tokens.update(new)
            self.largest = max(self.largest, *new, -1)
            places += [line.index] * len(new)
            columns += range(begun, begun + len(new))
            tokens += new
            if new and not begun:
                self._ids[line.index] = new[0]
        missing = max(columns, default=0) + 1 - self._ids.shape[1]
        if missing > 0:
            more = max(missing, self._ids.shape[1])
            self._ids = torch.cat([self._ids, self._ids[:, :1].expand(-1, more)], dim=1)
        if tokens:
            *where, values = torch.tensor([places, columns, tokens], device=self._ids.device)
            self._ids[tuple(where)] = values
