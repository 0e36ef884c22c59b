"""What the loop asks a proposer for, and all that a proposer may read: to add one, write a subclass of Proposer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_apar.choice.paths import Context
from hf_apar.choice.sampling import Sampler
from hf_apar.errors import ConfigurationError
from hf_apar.protocol import ForkProtocol, ThreadView


@dataclass(frozen=True)
class Draft:
    """What a thread may write next: a chain of guesses, or a tree of them, all fed in one step.

    Attributes:
        tokens: the guesses, each after the one that it follows; guesses that follow the same one differ.
        parents: for each guess the index of the one that it follows, -1 for the first; ``None`` for a chain.
        drawn_from: (tokens, vocabulary), of chains alone: the probabilities that each guess was drawn with; ``None`` for
            guesses that were not drawn, as best ones. It may be shorter than the vocabulary, and gives [Child] no chance.

    Raises:
        ConfigurationError: for ``parents`` that make no tree, or one whose guesses were drawn.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] | None = None
    drawn_from: Tensor | None = None

    def __post_init__(self) -> None:
        if self.parents is None:
            return
        earlier = all(-1 <= parent < place for place, parent in enumerate(self.parents))
        if not earlier or len(self.parents) != len(self.tokens) or self.drawn_from is not None:
            raise ConfigurationError(
                f"a draft of {len(self.tokens)} tokens has the parents {[*self.parents]}; give each guess the index of an "
                "earlier one or -1, and drawn_from to chains alone"
            )

    def first(self, count: int) -> "Draft":
        """Return the first ``count`` guesses alone."""
        if count >= len(self.tokens):
            return self
        parents = None if self.parents is None else self.parents[:count]
        return Draft(self.tokens[:count], parents, None if self.drawn_from is None else self.drawn_from[:count])

    def way(self, place: int) -> list[int]:
        """Return the indices of the guesses from the first one to that at ``place``; none for -1.

        >>> Draft([5, 6, 7], parents=[-1, -1, 1]).way(2), Draft([5, 6, 7]).way(1)
        ([1, 2], [0, 1])
        """
        if self.parents is None:
            return list(range(place + 1))
        way = []
        while place >= 0:
            way.append(place)
            place = self.parents[place]
        return way[::-1]

    def after(self, place: int, token: int) -> int | None:
        """Return the index of the guess of ``token`` that follows the one at ``place``, -1 for the path itself."""
        for index, guess in enumerate(self.tokens):
            if guess == token and (index - 1 if self.parents is None else self.parents[index]) == place:
                return index
        return None


class RowView(Protocol):
    """The answer to one prompt while it is written, to be read.

    ``live`` are the threads that write, ``waiting`` those that may not start yet, both in reading order; ``threads`` are
    all of them, also those that ended, in the order of creation. The first ``prompt_length`` ids of any path are the
    prompt's; of a prompt given as embeddings they are fewer than its ``prompt_slots`` in the cache.
    """

    @property
    def live(self) -> Sequence[ThreadView]: ...
    @property
    def waiting(self) -> Sequence[ThreadView]: ...
    @property
    def threads(self) -> Sequence[ThreadView]: ...
    @property
    def prompt_length(self) -> int: ...
    @property
    def prompt_slots(self) -> int: ...


@dataclass(frozen=True)
class Run:
    """The ``generate`` call that drafts are for.

    Attributes:
        device: where the model takes its inputs.
    """

    model: PreTrainedModel
    sampler: Sampler
    protocol: ForkProtocol
    device: torch.device

    def is_last(self, thread: ThreadView, token: int) -> bool:
        """Is no guess kept after ``token`` of ``thread``, since it ends there or forks?"""
        return self.protocol.ends(thread, token) or self.protocol.fork(thread, token) is not None

    def context(self, number: int, row: RowView, thread: ThreadView, drafted: Sequence[int] = ()) -> Context:
        """Return what the choice after ``thread``'s path and ``drafted`` may look at; ``number`` is the row's."""
        return Context.after(thread, drafted, self.protocol, row=number, prompt_length=row.prompt_length)


class Proposer(ABC):
    """Guesses what threads write next; a guess changes the number of steps and never what is written.

    But where ``max_new_tokens`` cuts an answer: it cuts all threads where they stand, and guesses let some run ahead.

    :meth:`propose` is all that one must have. It reads rows and threads and writes to none.

    Attributes:
        longest: the most guesses in a draft.
        schedule: ``"constant"``, or ``"heuristic"``: after a draft that was kept whole the thread's next one may have two
            guesses more, after any other one less.
        width: how many tokens a step may have where drafts widen it. What the live threads leave of them is shared among
            these, so that drafts shrink as threads multiply; on a CPU a guess more is hardly ever worth a wider step.
        watches: does it want the model's last hidden states (:meth:`observe`)?
        layers: what it guesses with, from :meth:`start` on; where the model's weights are prepacked
            (:func:`hf_apar.prepacked`), so are those of these in each call.
    """

    longest: int = 5
    schedule: str = "constant"
    width: int = 32
    watches: bool = False
    layers: nn.Module | None = None

    def start(self, run: Run) -> None:  # noqa: B027 - nothing to do is right for most
        """Begin a ``generate`` call, and forget the last one."""

    @abstractmethod
    def propose(self, rows: Sequence[RowView], limits: Sequence[Sequence[int]]) -> Sequence[Sequence[Draft]]:
        """Return for each row a draft for each of its live threads, in the order of ``row.live``; called at each step.

        A draft may hold what the model cannot choose, as [Child]; it is cut there.

        Args:
            limits: of the same shape: the most guesses that are fed, 0 for all where the step is wide without any.
        """

    def observe(self, threads: Sequence[tuple[int, ThreadView]], states: Tensor) -> None:  # noqa: B027
        """Take the model's last hidden states (threads, hidden) that chose the last tokens of ``threads``.

        ``threads`` are (number of the row, thread).
        """
