"""What the loop asks for drafts, and what it tells those who make them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from hf_apar.config import ResolvedConfig
from hf_apar.growth import GrowingTree
from hf_apar.sampling import Context, Sampler
from hf_apar.tree import Thread


@dataclass(frozen=True)
class Draft:
    """What a thread may write next.

    Attributes:
        tokens: the guesses, in order.
        drawn_from: (tokens, vocabulary): the probabilities that each guess was drawn with; ``None`` for guesses that were
            not drawn, as a best one. The vocabulary may be shorter than the model's.
    """

    tokens: Sequence[int] = ()
    drawn_from: Tensor | None = None

    def cut(self, length: int) -> "Draft":
        """Return the draft's first ``length`` tokens."""
        return Draft(self.tokens[:length], None if self.drawn_from is None else self.drawn_from[:length])


@dataclass(frozen=True)
class Run:
    """The ``generate`` call that drafts are for."""

    model: PreTrainedModel
    sampler: Sampler
    config: ResolvedConfig

    def context(self, number: int, row: GrowingTree, thread: Thread, drafted: Sequence[int] = ()) -> Context:
        """Return what the choice after ``thread``'s path and ``drafted`` may look at; ``number`` is the row's."""
        path = [*thread.path_ids[row.prompt_length :], *drafted]
        controls = (self.config.fork_token_id, self.config.child_token_id)
        return Context(number, path, thread.depth < self.config.max_depth and not (path and path[-1] in controls))


class Proposer(ABC):
    """Guesses what threads write next; a guess changes the number of steps and never what is written.

    Attributes:
        longest: of its drafts, in tokens.
        schedule: how the lengths of drafts follow what was accepted: ``None`` for as long as pays, by the measured cost of
            a step and the share that was accepted; transformers' ``"constant"`` and ``"heuristic"``.
        watches: does it want the model's last hidden states (:meth:`observe`)?
    """

    longest: int = 5
    schedule: str | None = None
    watches: bool = False

    def start(self, run: Run) -> None:  # noqa: B027 - nothing to do is right for most
        """Begin a ``generate`` call, and forget the last one."""

    @abstractmethod
    def propose(self, rows: Sequence[GrowingTree], limits: Sequence[Sequence[int]]) -> Sequence[Sequence[Draft]]:
        """Return for each row a draft for each of its live threads, in the order of ``row.live``.

        Args:
            limits: of the same shape: the longest draft that is wanted.
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
