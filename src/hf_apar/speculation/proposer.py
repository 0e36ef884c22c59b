"""What the loop asks for drafts, and what it tells those who make them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_apar.choice.paths import Context
from hf_apar.choice.sampling import Sampler
from hf_apar.protocol import ForkProtocol
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import Thread


@dataclass(frozen=True)
class Draft:
    """What a thread may write next: a chain of guesses, or a tree of them, all fed in one step.

    Attributes:
        tokens: the guesses, each after the one that it follows; guesses that follow the same one differ.
        parents: for each guess the index of the one that it follows, -1 for the first; ``None`` for a chain.
        worth: for each guess the estimated chance that it is kept, at most that of the one that it follows; ``None`` if
            the proposer cannot tell.
        drawn_from: (tokens, vocabulary), of chains alone: the probabilities that each guess was drawn with; ``None`` for
            guesses that were not drawn, as best ones. It may be shorter than the vocabulary, and gives [Child] no chance.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] | None = None
    worth: Sequence[float] | None = None
    drawn_from: Tensor | None = None

    def keep(self, places: Sequence[int]) -> "Draft":
        """Return the guesses at ``places``, in ascending order, which hold with each guess the one that it follows."""
        if len(places) == len(self.tokens):
            return self
        new = {place: index for index, place in enumerate(places)} | {-1: -1}
        return Draft(
            [self.tokens[place] for place in places],
            None if self.parents is None else [new[self.parents[place]] for place in places],
            None if self.worth is None else [self.worth[place] for place in places],
            None if self.drawn_from is None else self.drawn_from[list(places)],
        )

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


@dataclass(frozen=True)
class Run:
    """The ``generate`` call that drafts are for.

    Attributes:
        device: where the model takes its inputs.
        seconds: about how long a step of so many tokens takes; ``None`` where drafts do not follow the clock.
        least_worth: what a guess must be worth to pay beside so many tokens.
    """

    model: PreTrainedModel
    sampler: Sampler
    protocol: ForkProtocol
    device: torch.device
    seconds: Callable[[int], float] | None = None
    least_worth: Callable[[int], float] = lambda width: 0.0

    def context(self, number: int, row: GrowingTree, thread: Thread, drafted: Sequence[int] = ()) -> Context:
        """Return what the choice after ``thread``'s path and ``drafted`` may look at; ``number`` is the row's."""
        last = drafted[-1] if drafted else thread.path_ids[-1] if thread.path_ids else -1
        return Context(number, thread, row.prompt_length, drafted, self.protocol.banned(thread, last))


class Proposer(ABC):
    """Guesses what threads write next; a guess changes the number of steps and never what is written.

    Attributes:
        longest: the most guesses in a draft.
        schedule: how the lengths of drafts follow what was accepted: ``None`` for as long as pays, by the measured cost of
            a step and the share that was accepted; transformers' ``"constant"`` and ``"heuristic"``.
        estimates: do its drafts tell what their guesses are worth?
        watches: does it want the model's last hidden states (:meth:`observe`)?
    """

    longest: int = 5
    schedule: str | None = None
    estimates: bool = False
    watches: bool = False

    def start(self, run: Run) -> None:  # noqa: B027 - nothing to do is right for most
        """Begin a ``generate`` call, and forget the last one."""

    @abstractmethod
    def propose(self, rows: Sequence[GrowingTree], limits: Sequence[Sequence[int]]) -> Sequence[Sequence[Draft]]:
        """Return for each row a draft for each of its live threads, in the order of ``row.live``.

        Args:
            limits: of the same shape: the most guesses that are wanted.
        """

    def observe(self, threads: Sequence[tuple[int, Thread]], states: Tensor) -> None:  # noqa: B027
        """Take the model's last hidden states (threads, hidden) that chose the last tokens of ``threads``."""

    def seconds(self, length: int, threads: int) -> float:
        """Return about how long drafts of ``length`` tokens for so many threads take to make."""
        return 0.0


class NoDrafts(Proposer):
    """The proposer of plain decoding."""

    longest = 0

    def propose(self, rows: Sequence[GrowingTree], limits: Sequence[Sequence[int]]) -> Sequence[Sequence[Draft]]:
        return [[Draft()] * len(row.live) for row in rows]
