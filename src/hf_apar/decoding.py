"""The decoding loop: plan, forward, choose, advance.

Plain decoding is speculation with an empty draft, and a prompt is a root with many tokens: one loop serves everything.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from hf_apar.checks import validate_call, validate_positions
from hf_apar.choice.chooser import Chooser, Sampled
from hf_apar.choice.paths import Context
from hf_apar.choice.stopping import with_limits
from hf_apar.config import AparConfig
from hf_apar.errors import ConfigurationError
from hf_apar.forward.lines import Query
from hf_apar.forward.passes import Passes
from hf_apar.forward.prompts import Prompts
from hf_apar.protocol import ForkProtocol
from hf_apar.results import AparOutput, AparStats, output
from hf_apar.speculation.drafting import Drafting, Outcome
from hf_apar.speculation.proposer import Draft, Proposer
from hf_apar.streaming import Broadcast
from hf_apar.tokens import fork_rules
from hf_apar.tree.budget import RowBudget
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import Thread

Branches = Sequence[Sequence[int]]
"""Token ids of the branches of one prompt."""

WIDEST = 1024  # tokens that a pass feeds of what threads of a row begin with, where prefill_chunk_size says nothing


@dataclass(frozen=True)
class Turn:
    """What one thread feeds in a step: the last ``fed`` tokens of its path, and a draft; ``slots`` are theirs."""

    row: int
    thread: Thread
    fed: int
    draft: Draft
    slots: Sequence[int]


class Decoder:
    """The state of one ``generate`` call over a batch.

    Attributes:
        rows: the tree of each prompt.
        budgets: tokens that each row may still sample.
        stats: what each row has cost so far.
        chunk: tokens that one pass feeds of a prompt, or of what threads of a row have begun with; ``None`` for a default.
    """

    def __init__(
        self,
        rows: Sequence[GrowingTree],
        budgets: Sequence[RowBudget],
        passes: Passes,
        chooser: Chooser,
        drafting: Drafting,
        broadcast: Broadcast,
        chunk: int | None = None,
    ) -> None:
        self.rows, self.budgets, self.stats = rows, budgets, [AparStats() for _ in rows]
        self.passes, self.chooser, self.drafting, self.broadcast = passes, chooser, drafting, broadcast
        self.chunk, self.started = chunk, time.perf_counter()

    @property
    def forked(self) -> bool:
        """Has any row of the batch forked?"""
        return any(len(row.tree.threads) > 1 for row in self.rows)

    @torch.no_grad()
    def run(self, branches: Sequence[Branches] = ()) -> None:
        """Write the whole batch; the trees are in ``rows`` afterwards.

        Args:
            branches: those of each prompt, with which it goes on in place of what the model would choose.
        """
        with self.passes, self.drafting:
            plan = [Turn(index, row.live[0], 1, Draft(), row.slots(row.live[0])[-1:]) for index, row in enumerate(self.rows)]
            for row, stats in zip(self.rows, self.stats, strict=True):
                stats.steps, stats.peak_threads, stats.peak_kv = 1, 1, row.prompt_slots
            logits = self.passes.prefill(self.chunk)
            for row, ids in zip(self.rows, branches, strict=False):
                row.branch(row.live[0], ids)
            if not branches:
                self.advance(plan, self.choose(plan, logits))
            while any(row.unfinished for row in self.rows):
                plan = self.plan()
                self.advance(plan, self.choose(plan, self.forward(plan)))

    def plan(self) -> list[Turn]:
        """Give every live thread what of its path is not cached yet, a draft, and the draft its slots."""
        self._feed_ahead()
        plan = []
        drafts = self.drafting.propose(self.rows, self.budgets)
        for index, (row, stats) in enumerate(zip(self.rows, self.stats, strict=True)):
            for (thread, fed), draft in zip(row.feed(), drafts[index], strict=True):
                slots = [*row.slots(thread)[-fed:], *(row.pool.take() for _ in draft.tokens)]
                plan.append(Turn(index, thread, fed, draft, slots))
            stats.steps += row.unfinished
            stats.peak_threads = max(stats.peak_threads, len(row.live))
            stats.peak_kv = max(stats.peak_kv, row.pool.high_water - len(row.padding))
        return plan

    def _feed_ahead(self) -> None:
        """Feed what threads have begun with in passes of its own, as long as a row has more of it than one pass may have."""
        while any(ahead := [row.feed_ahead(self.chunk or WIDEST) for row in self.rows]):
            queries = [
                [
                    Query(thread.path_ids[place], path := row.slots(thread), len(path) + place + 1, wanted=number == 0)
                    for number, (thread, place) in enumerate(fed)  # one at least must be wanted; nobody looks at it
                ]
                for row, fed in zip(self.rows, ahead, strict=True)
            ]
            for stats, row in zip(self.stats, queries, strict=True):
                stats.steps += bool(row)
                stats.attended += sum(query.seen for query in row)
            self.passes.step(self.rows, queries)

    def forward(self, plan: Sequence[Turn]) -> Tensor:
        """Run the model over the plan once; return the logits after the last token of each path and after each guess."""
        queries: list[list[Query]] = [[] for _ in self.rows]
        for turn in plan:
            queries[turn.row] += self._queries(turn)
        for stats, row in zip(self.stats, queries, strict=True):
            stats.attended += sum(query.seen for query in row)
        return self.passes.step(self.rows, queries)

    def _queries(self, turn: Turn) -> list[Query]:
        path, draft, ids = self.rows[turn.row].slots(turn.thread), turn.draft, turn.thread.path_ids
        length = len(path)
        ends = range(length - turn.fed + 1, length + 1)
        own = [Query(ids[end - 1 - length], path, end, wanted=end == length) for end in ends]
        guesses = [
            Query(token, path, length, [turn.slots[turn.fed + one] for one in draft.way(place)])
            for place, token in enumerate(draft.tokens)
        ]
        return own + guesses

    def choose(self, plan: Sequence[Turn], logits: Tensor) -> list[list[Sampled]]:
        """Choose, for each turn, a token after its path and one after each of its guesses; ``logits`` as of :meth:`forward`.

        Where tokens are drawn, a finished row is drawn for too until something has forked, so that sampling matches
        ``generate``.
        """
        chosen: list[list[Sampled]] = [[] for _ in plan]
        asked = [(context, chosen[place]) for place, turn in enumerate(plan) for context in self._contexts(turn)]
        logits = logits.to(self.chooser.sampler.prompt_ids.device)
        draws = self.chooser.sampler.do_sample
        if draws and not self.forked and (idle := set(range(len(self.rows))) - {turn.row for turn in plan}):
            length = max(len(turn.thread.path_ids) - self.rows[turn.row].prompt_length for turn in plan)
            asked += [(self._idle_context(row, length), []) for row in idle]
            order = sorted(range(len(asked)), key=lambda place: asked[place][0].row)
            asked = [asked[place] for place in order]
            logits = torch.cat([logits, logits.new_zeros(len(idle), logits.shape[1])])[order]
        for sampled, (_, mine) in zip(self.chooser(logits, [context for context, _ in asked]), asked, strict=True):
            mine.append(sampled)
        return chosen

    def _contexts(self, turn: Turn) -> list[Context]:
        draft, row = turn.draft, self.rows[turn.row]
        where = {"row": turn.row, "prompt_length": row.prompt_length}
        ways = ([draft.tokens[guess] for guess in draft.way(place)] for place in range(-1, len(draft.tokens)))
        contexts = [Context.after(turn.thread, way, row.protocol, **where) for way in ways]
        if draft.drawn_from is not None:
            guessed = zip(contexts, draft.tokens, draft.drawn_from, strict=False)
            contexts[:-1] = [replace(one, guess=token, drawn_from=chances) for one, token, chances in guessed]
        return contexts

    def _idle_context(self, index: int, length: int) -> Context:
        """Return the context of a row that has ended as ``generate`` sees it: EOS, then padding to ``length`` new tokens."""
        row, root = self.rows[index], self.rows[index].tree.threads[0]
        missing = length - (len(root.path_ids) - row.prompt_length)
        end = [] if root.eos_token_id is None else [root.eos_token_id]
        padding = [self.chooser.sampler.pad_token_id] * missing
        return Context(index, root, row.prompt_length, [*end, *padding][:missing])

    def advance(self, plan: Sequence[Turn], chosen: Sequence[Sequence[Sampled]]) -> None:
        """Append what was chosen, fork, end and release."""
        out_of_time = self.chooser.stopper.out_of_time
        choices, outcomes = 0, []  # choices before this turn, and what became of the drafts
        for turn, tokens in zip(plan, chosen, strict=True):
            kept, query = self._write(turn, tokens)
            outcomes.append(Outcome(turn.row, turn.thread, turn.draft, kept, choices + query))
            choices += len(tokens)
        for index in {turn.row for turn in plan}:
            row = self.rows[index]
            if out_of_time:
                row.end_all("length")
            self.budgets[index].settle(row)
            if not row.unfinished:
                self.stats[index].seconds = time.perf_counter() - self.started
        self.drafting.judged(outcomes, self.passes.in_order)
        self.broadcast.update([row.tree for row in self.rows])

    def _write(self, turn: Turn, tokens: Sequence[Sampled]) -> tuple[int, int]:
        """Let a thread write the chosen tokens up to the first one that its draft did not guess, a fork, a stop or its end.

        Returns how many guesses were kept, and the index of the choice that was the last one.
        """
        row, thread, draft = self.rows[turn.row], turn.thread, turn.draft
        spare = dict(enumerate(turn.slots[turn.fed :]))
        place, last, kept = -1, 0, 0  # the guess that was kept last, the choice that made the last token, how many were
        goes_on = thread.finish_reason is None  # else what a thread before it in the answer wrote just now has cut it off
        while goes_on:
            last = place + 1
            sampled = tokens[last]
            if sampled.stuck:
                raise ConfigurationError(
                    "the logits processors, or prefix_allowed_tokens_fn, leave a thread no token but those that "
                    f"{type(row.protocol).__name__} bans there; let them allow another, such as the one that ends a thread"
                )
            sampled.note(thread)
            guess = draft.after(place, sampled.token)
            kept += guess is not None
            if guess is None:
                row.pool.release(spare.values())  # first, so that the token gets the lowest slot
                spare = {}
            slot = None if guess is None else spare.pop(guess)
            goes_on = row.write(thread, sampled.token, slot, stops=sampled.stops)
            self.budgets[turn.row].spend(row, thread)
            goes_on &= guess is not None and thread.finish_reason is None
            place = place if guess is None else guess
        row.pool.release(spare.values())
        return kept, last


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    apar: AparConfig | None = None,
    protocol: ForkProtocol | None = None,
    branches: Sequence[Branches] = (),
    budget: Callable[[int], RowBudget] = RowBudget,
    streamer: object | None = None,
    proposer: Proposer | None = None,
    **model_kwargs: Any,
) -> AparOutput | Tensor:
    """Set up the loop for what ``generate`` prepared, run it, and return what it wrote.

    Args:
        branches: those of each prompt, with which it goes on in place of what the model would choose.
        budget: makes a row's budget of the tokens that the call may sample.
    """
    validate_call(model, generation_config, model_kwargs, streamer, len(input_ids))
    config = with_limits(generation_config, stopping_criteria)
    protocol, max_threads = fork_rules(model, config, apar, protocol)
    prompts = Prompts.from_generate(input_ids, config, model_kwargs)
    prompt_rows = prompts.rows(protocol.control_ids)
    tokens = int(config.max_length) - input_ids.shape[1]
    validate_positions(model, [row.slots for row in prompt_rows], tokens, protocol.most_injected)
    rows = [
        GrowingTree(row.ids, protocol, max_threads=max_threads, prompt_slots=row.slots, padding=row.padding)
        for row in prompt_rows
    ]
    passes, chooser = Passes(model, prompts), Chooser.of(logits_processor, stopping_criteria, config, protocol, input_ids)
    drafting, broadcast = Drafting.of(proposer, model, chooser.sampler, passes.device), Broadcast(streamer)
    decoder = Decoder(rows, [budget(tokens) for _ in rows], passes, chooser, drafting, broadcast, config.prefill_chunk_size)
    if rows:
        decoder.run(branches)
    broadcast.end()
    pad, as_dict = chooser.sampler.pad_token_id, bool(config.return_dict_in_generate)
    return output(rows, decoder.stats, passes, pad=pad, as_dict=as_dict)
