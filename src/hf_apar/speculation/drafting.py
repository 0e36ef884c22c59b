"""The drafts of one ``generate`` call, as the loop sees them: all that decoding knows of speculation."""

import reprlib
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_apar.choice.sampling import Sampler
from hf_apar.errors import ConfigurationError
from hf_apar.prepacking import is_prepacked, prepackable, prepacked
from hf_apar.speculation.proposer import Draft, Proposer, Run
from hf_apar.tokens import embedding_rows
from hf_apar.tree.budget import RowBudget
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import Thread

SCHEDULES = ("constant", "heuristic")


@dataclass(frozen=True)
class Outcome:
    """What became of a thread's draft in a step.

    Attributes:
        row: number of the thread's row.
        kept: how many guesses the thread wrote.
        query: the place in the step, over all rows, of the token after which the thread's last one was chosen.
    """

    row: int
    thread: Thread
    draft: Draft
    kept: int
    query: int


class Drafting:
    """Asks ``proposer`` for the drafts of a call, bounds them and tells it what became of them; does nothing for ``None``.

    The loop touches it thrice: it is entered before the prompt is fed and left after the last step, :meth:`propose` gives
    the drafts to feed in a step, and :meth:`judged` hears of every step, the prompt's too, what was written. All of it
    follows from the tokens alone, never from a clock: a seeded call repeats itself.

    Raises:
        ConfigurationError: for another schedule, or a proposer that watches a compiled model.
    """

    def __init__(self, proposer: Proposer | None, run: Run) -> None:
        if not isinstance(proposer, Proposer | None):
            raise ConfigurationError(
                f"proposer is a {type(proposer).__name__}; pass a Proposer, such as MedusaDrafts(heads)"
            )
        self.proposer, self.run = proposer, run
        self.vocabulary = range(embedding_rows(run.model))
        self._states: Tensor | None = None  # what the last forward pass fed to the output layer, (batch, width, hidden)
        self._blocks = ExitStack()  # ended with the call
        self._lengths: dict[tuple[int, int], int] = {}  # of each thread's next draft, by the heuristic
        if proposer is None:
            return
        if proposer.schedule not in SCHEDULES:
            raise ConfigurationError(
                f"num_assistant_tokens_schedule is {proposer.schedule!r}; apar knows 'constant' and 'heuristic'"
            )
        if proposer.watches and run.model._compiled_call_impl is not None:
            raise ConfigurationError(
                f"{type(proposer).__name__} watches the model's last hidden states, which a compiled model does not show; "
                "do not compile it, or choose another proposer"
            )

    @classmethod
    def of(cls, proposer: Proposer | None, model: PreTrainedModel, sampler: Sampler, device: torch.device) -> Self:
        """Return the drafting of a call of ``model``, which takes its inputs on ``device`` and chooses by ``sampler``."""
        return cls(proposer, Run(model, sampler, sampler.protocol, device))

    def __enter__(self) -> Self:
        if self.proposer is not None:
            self.proposer.start(self.run)
            layers = self.proposer.layers
            if layers is not None and prepackable(layers) and is_prepacked(self.run.model):
                self._blocks.enter_context(prepacked(layers))
        if self._watching:
            layer = self.run.model.get_output_embeddings()
            assert isinstance(layer, nn.Module)
            self._caller = threading.get_ident()
            self._blocks.callback(layer.register_forward_pre_hook(self._keep).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._blocks.close()

    @property
    def _watching(self) -> bool:
        return self.proposer is not None and self.proposer.watches

    def _keep(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if threading.get_ident() == self._caller:  # another thread of the process may use the model meanwhile
            self._states = inputs[0]

    def propose(self, rows: Sequence[GrowingTree], budgets: Sequence[RowBudget]) -> list[list[Draft]]:
        """Return for each row a draft for each of its live threads, of guesses that may be kept.

        Args:
            budgets: of what each row may still write; no draft is asked for that goes beyond.
        """
        live = [row.live for row in rows]
        if self.proposer is None:
            return [[Draft()] * len(threads) for threads in live]
        limits = [
            budget.bound(row, lengths) for budget, row, lengths in zip(budgets, rows, self._limits(live), strict=True)
        ]
        drafts = self.proposer.propose(rows, limits)
        counts = [len(threads) for threads in live]
        if not isinstance(drafts, Sequence) or [_drafts_in(made) for made in drafts] != counts:
            raise ConfigurationError(
                f"{type(self.proposer).__name__}.propose gave {reprlib.repr(drafts)}; return a list for each row, and in it "
                f"a Draft for each live thread: {counts}"
            )
        return [
            [self._feasible(thread, draft.first(length)) for thread, length, draft in zip(*row, strict=True)]
            for row in zip(live, limits, drafts, strict=True)
        ]

    def _limits(self, live: Sequence[Sequence[Thread]]) -> list[list[int]]:
        """Share out what the step has room for, evenly and in reading order; no share is longer than the schedule says."""
        assert self.proposer is not None
        threads = sum(map(len, live))
        share, more = divmod(max(0, self.proposer.width - threads), max(1, threads))
        shares = iter([share + 1] * more + [share] * (threads - more))
        return [
            [min(next(shares), self._lengths.get((number, one.index), self.proposer.longest)) for one in row]
            for number, row in enumerate(live)
        ]

    def _feasible(self, thread: Thread, draft: Draft) -> Draft:
        """Cut ``draft`` before a token that the model does not know, and a chain after one that nothing is kept after."""
        for place, token in enumerate(draft.tokens):
            if token not in self.vocabulary:
                return draft.first(place)
            if draft.parents is None and self.run.is_last(thread, token):
                return draft.first(place + 1)
        return draft

    def judged(self, outcomes: Sequence[Outcome], in_order: Callable[[Tensor], Tensor]) -> None:
        """Learn what became of the drafts of a step.

        Args:
            outcomes: of every thread that was fed.
            in_order: picks what the model gave for each query of the step out of (batch, width, ...).
        """
        for one in outcomes:
            proposed = len(one.draft.tokens)
            one.thread.drafts += bool(proposed)
            one.thread.proposed += proposed
            one.thread.accepted += one.kept
            if proposed and self.proposer is not None and self.proposer.schedule == "heuristic":
                key = (one.row, one.thread.index)
                length = self._lengths.get(key, self.proposer.longest)
                self._lengths[key] = length + 2 if one.kept == proposed else max(1, length - 1)
        if self.proposer is not None and self._states is not None:
            states = in_order(self._states.to(self.run.device))  # (queries, hidden)
            self.proposer.observe([(one.row, one.thread) for one in outcomes], states[[one.query for one in outcomes]])


def _drafts_in(made: object) -> int:
    """Return how many drafts ``made`` is a list of, -1 if it is none."""
    return len(made) if isinstance(made, Sequence) and all(isinstance(one, Draft) for one in made) else -1
