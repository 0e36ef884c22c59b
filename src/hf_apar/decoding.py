"""The decoding loop: plan, forward, choose, advance.

Plain decoding is speculation with an empty draft, and a prompt is a root with many tokens: one loop serves everything.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from hf_apar.checks import (
    resolve_config,
    validate_generation,
    validate_length,
    validate_model,
    validate_rope,
    validate_streamer,
)
from hf_apar.choice.paths import Path
from hf_apar.choice.sampling import Context, Sampler
from hf_apar.choice.stopping import Stopper, with_limits
from hf_apar.config import AparConfig, ResolvedConfig
from hf_apar.errors import ConfigurationError
from hf_apar.forward.attention import tree_attention_for
from hf_apar.forward.cache import TreeCache
from hf_apar.forward.devices import runs_in_step
from hf_apar.forward.layout import StepLayout
from hf_apar.forward.lines import Query
from hf_apar.forward.prompts import Prompts
from hf_apar.generation_settings import eos_token_ids
from hf_apar.results import AparOutput, AparStats
from hf_apar.speculation.calibration import step_times
from hf_apar.speculation.lengths import DraftLengths
from hf_apar.speculation.proposer import Draft, NoDrafts, Proposer, Run
from hf_apar.speculation.states import LastHidden
from hf_apar.streaming import Broadcast, ended_by_errors
from hf_apar.tokens import embedding_rows
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import Thread

Item = TypeVar("Item")


@dataclass(frozen=True)
class Turn:
    """What one thread feeds in a step: its path's last token and a draft; ``slots`` are theirs."""

    thread: Thread
    draft: Draft
    slots: Sequence[int]


@dataclass(frozen=True)
class Sampled:
    """A token that was chosen, whether its thread must stop there, and what it was chosen from where that is asked for."""

    token: int
    stops: bool
    logprob: float | None = None
    scores: Tensor | None = None
    logits: Tensor | None = None


class Decoder:
    """The state of one ``generate`` call over a batch."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        sampler: Sampler,
        stopper: Stopper,
        config: ResolvedConfig,
        generation_config: GenerationConfig,
        broadcast: Broadcast,
        proposer: Proposer,
    ) -> None:
        self.model, self.prompts, self.config, self.generation_config = model, prompts, config, generation_config
        self.sampler, self.stopper, self.broadcast, self.proposer = sampler, stopper, broadcast, proposer
        self.device = prompts.input_ids.device
        self.vocabulary = embedding_rows(model)
        self.cache, self.layout = TreeCache(), StepLayout.of(model, prompts.device(model))
        self.eos = eos_token_ids(generation_config)
        keep = bool(generation_config.return_dict_in_generate)
        self.keep_scores = keep and bool(generation_config.output_scores)
        self.keep_logits = keep and bool(generation_config.output_logits)
        rows = prompts.rows(config)
        self.budget = [int(generation_config.max_length) - prompts.input_ids.shape[1]] * len(rows)  # tokens left to sample
        self.rows = [
            GrowingTree(
                row.ids,
                prompt_slots=row.slots,
                padding=row.padding,
                max_threads=config.max_threads,
                fork_token_id=config.fork_token_id,
                child_token_id=config.child_token_id,
                joint=config.joint,
            )
            for row in rows
        ]
        self.stats = [AparStats() for _ in self.rows]

    @property
    def forked(self) -> bool:
        """Has any row of the batch forked?"""
        return any(len(row.tree.threads) > 1 for row in self.rows)

    @torch.no_grad()
    def run(self) -> None:
        """Write the whole batch; the trees are in ``rows`` afterwards."""
        proposer, device = self.proposer, self.prompts.device(self.model)
        if proposer.watches and self.model._compiled_call_impl is not None:
            raise ConfigurationError(
                f"{type(proposer).__name__} watches the model's last hidden states, which a compiled model does not show; "
                "do not compile it, or choose another proposer"
            )
        schedule = "constant" if proposer.schedule is None and runs_in_step(self.model) else proposer.schedule
        adapts = proposer.longest > 0 and schedule is None
        times = step_times(self.model, device) if adapts else lambda width: 0.0
        lengths = DraftLengths(proposer.longest, schedule, times, proposer.seconds, proposer.estimates)
        self.lengths, pace = lengths, lengths.seconds if adapts else None
        self.drafting = Run(self.model, self.sampler, self.config, device, pace, lengths.least_worth)
        proposer.start(self.drafting)
        with tree_attention_for(self.model) as self.pack, LastHidden(self.model, active=proposer.watches) as self.hidden:
            self.started = time.perf_counter()
            self._run()

    def _run(self) -> None:
        plan: list[list[Turn]] = [[Turn(row.live[0], Draft(), row.slots(row.live[0])[-1:])] for row in self.rows]
        logits, states = self.prefill()
        while self.advance(plan, self.choose(plan, logits), states):
            plan = self.plan()
            logits, states = self.forward(plan)

    def prefill(self) -> tuple[Tensor, Tensor | None]:
        """Feed the prompts; return the logits of their last tokens, (batch, vocabulary), and hidden states if watched."""
        for row, stats in zip(self.rows, self.stats, strict=True):
            stats.steps, stats.peak_threads, stats.peak_kv = 1, 1, row.prompt_slots
        logits = self.prompts.prefill(self.model, self.cache, self.generation_config.prefill_chunk_size)
        return logits, None if self.hidden.states is None else self.hidden.states[:, -1]

    def plan(self) -> list[list[Turn]]:
        """Give every live thread its last token and a draft to feed, and the draft its slots."""
        plan = []
        limits = self.lengths.limits([row.live for row in self.rows])
        drafts = self.lengths.trimmed(self.proposer.propose(self.rows, limits))
        for index, (row, stats) in enumerate(zip(self.rows, self.stats, strict=True)):
            live = row.live
            spare = self.budget[index] - len(live)  # each thread samples one token for sure
            turns = []
            for thread, draft in zip(live, drafts[index], strict=True):
                draft = self._feasible(draft)
                draft = draft.keep(range(min(len(draft.tokens), max(spare, 0))))
                spare -= len(draft.tokens)
                turns.append(Turn(thread, draft, [row.slots(thread)[-1], *(row.pool.take() for _ in draft.tokens)]))
            stats.steps += bool(turns)
            stats.peak_threads = max(stats.peak_threads, len(turns))
            stats.peak_kv = max(stats.peak_kv, row.pool.high_water - len(row.padding))
            plan.append(turns)
        return plan

    def _feasible(self, draft: Draft) -> Draft:
        """Cut ``draft`` before the first token that the model cannot choose: [Child], or one beyond its vocabulary."""
        known, child = range(self.vocabulary), self.config.child_token_id
        if draft.drawn_from is not None:  # to drop what was drawn would bend the distribution; it has no chance there
            child = -1
        end = next((place for place, one in enumerate(draft.tokens) if one == child or one not in known), None)
        return draft if end is None else draft.keep(range(end))

    def forward(self, plan: list[list[Turn]]) -> tuple[Tensor, Tensor | None]:
        """Run the model over the plan once; return logits (queries, vocabulary) and, if watched, hidden states likewise."""
        queries = [
            [query for turn in turns for query in self._queries(row, turn)]
            for row, turns in zip(self.rows, plan, strict=True)
        ]
        for stats, row in zip(self.stats, queries, strict=True):
            stats.attended += sum(query.seen for query in row)
        inputs = self.layout.lay_out(
            queries,
            [row.scratch for row in self.rows],
            high_water=max(row.pool.high_water for row in self.rows),
            pack=self.pack,
        )
        logits = inputs.in_plan_order(inputs.run(self.model, self.cache))
        states = self.hidden.states
        return logits, None if states is None else inputs.in_plan_order(states.to(logits.device))

    def choose(self, plan: list[list[Turn]], logits: Tensor) -> list[list[list[Sampled]]]:
        """Choose a token after every token that was fed, for all rows and threads at once.

        While nothing has forked, a finished row is still drawn for, so that sampling matches ``generate``.
        """
        owners: list[list[Sampled] | None] = []  # what each choice is added to
        contexts: list[Context] = []
        chosen: list[list[list[Sampled]]] = [[[] for _ in turns] for turns in plan]
        for index, (row, turns) in enumerate(zip(self.rows, plan, strict=True)):
            for place, turn in enumerate(turns):
                found = self._contexts(index, row, turn)
                contexts += found
                owners += [chosen[index][place]] * len(found)
            if not turns and not self.forked:
                contexts.append(self._idle_context(index, row))
                owners.append(None)
        start = time.perf_counter()
        for sampled, owner in zip(self._sample(_spread(logits.to(self.device), owners), contexts), owners, strict=True):
            if owner is not None:
                owner.append(sampled)
        if self.device.type == "cpu":  # elsewhere this waits for the forward pass
            self.lengths.chose(time.perf_counter() - start, len(contexts))
        return chosen

    def _sample(self, logits: Tensor, contexts: Sequence[Context]) -> Iterator[Sampled]:
        choices = self.sampler(logits, contexts)
        stops = self.stopper([Path(context.row, context.new_ids) for context in contexts], choices.tokens)
        logprobs = choices.logprobs() if self.keep_scores else None
        for index, token in enumerate(choices.tokens):
            yield Sampled(
                token,
                stops[index],
                None if logprobs is None else logprobs[index],
                choices.scores[index] if self.keep_scores else None,
                choices.logits[index] if self.keep_logits else None,
            )

    def advance(self, plan: list[list[Turn]], chosen: list[list[list[Sampled]]], states: Tensor | None = None) -> bool:
        """Append what was chosen, fork, end and release; is there anything left to write?"""
        out_of_time = self.stopper.out_of_time
        fed, last = 0, []  # queries before this turn, and those that chose the last token of each thread
        for index, (row, turns) in enumerate(zip(self.rows, plan, strict=True)):
            if not turns:
                continue
            for turn, tokens in zip(turns, chosen[index], strict=True):
                last.append((index, turn.thread, fed + self._take(index, row, turn, tokens)))
                fed += len(turn.slots)
            if out_of_time:
                row.end_all("length")
            while len(live := row.live) > self.budget[index]:  # the last tokens go to threads in reading order
                row.end_all("length") if self.budget[index] == 0 else row.end(row.newborn(live[-1]) or live[-1], "length")
            if not row.unfinished:
                self.stats[index].seconds = time.perf_counter() - self.started
        if states is not None:
            self.proposer.observe([(index, thread) for index, thread, _ in last], states[[query for *_, query in last]])
        self.broadcast.update([row.tree for row in self.rows])
        return any(row.unfinished for row in self.rows)

    def _take(self, index: int, row: GrowingTree, turn: Turn, tokens: Sequence[Sampled]) -> int:
        """Let a thread write the chosen tokens up to the first one that its draft did not guess, a [Fork], a stop or EOS.

        Returns the index of the query that chose the last of them.
        """
        thread, draft, spare = turn.thread, turn.draft, dict(enumerate(turn.slots[1:]))
        place, query, kept = -1, 0, 0  # the last guess that was kept, the query that it is, how many were
        while thread.finish_reason is None:  # else what a thread before it in the answer wrote just now has cut it off
            query = place + 1
            sampled = tokens[query]
            token = sampled.token
            self.budget[index] -= 1
            _keep(thread, sampled)
            guess = draft.after(place, token)
            kept += guess is not None
            if token in self.eos:
                thread.eos_token_id = token
                row.end(thread, "eos")
                break
            if guess is None or token == self.config.fork_token_id:
                row.pool.release(spare.values())  # first, so that the token gets the lowest slot
                spare, guess = {}, None
            row.append(thread, token, None if guess is None else spare.pop(guess))
            if sampled.stops:
                row.stop(thread)
            if guess is None:
                break
            place = guess
        row.pool.release(spare.values())
        thread.drafts += bool(draft.tokens)
        thread.proposed += len(draft.tokens)
        thread.accepted += kept
        self.lengths.judged(index, thread, draft, kept)
        return query

    def _queries(self, row: GrowingTree, turn: Turn) -> list[Query]:
        path, draft = row.slots(turn.thread), turn.draft
        fed = [turn.thread.path_ids[-1], *draft.tokens]
        return [
            Query(token, path, len(path), [turn.slots[1 + guess] for guess in draft.way(place - 1)])
            for place, token in enumerate(fed)
        ]

    def _contexts(self, index: int, row: GrowingTree, turn: Turn) -> list[Context]:
        draft = turn.draft
        contexts = [
            self.drafting.context(index, row, turn.thread, [draft.tokens[guess] for guess in draft.way(place)])
            for place in range(-1, len(draft.tokens))
        ]
        if draft.drawn_from is not None:
            guessed = zip(contexts, draft.tokens, draft.drawn_from, strict=False)
            contexts[:-1] = [replace(one, guess=token, drawn_from=chances) for one, token, chances in guessed]
        return contexts

    def _idle_context(self, index: int, row: GrowingTree) -> Context:
        length = max(len(other.path_ids) - another.prompt_length for another in self.rows for other in another.live)
        new_ids = row.tree.threads[0].path_ids[row.prompt_length :]
        return Context(index, [*new_ids, *[self.sampler.pad_token_id] * (length - len(new_ids))], may_fork=False)


def _spread(logits: Tensor, owners: Sequence[object | None]) -> Tensor:
    """Return ``logits`` (queries, vocabulary) with a row of zeros wherever a choice belongs to nobody."""
    if None not in owners:
        return logits
    spread = logits.new_zeros(len(owners), logits.shape[1])
    spread[[index for index, owner in enumerate(owners) if owner is not None]] = logits
    return spread


def _keep(thread: Thread, sampled: Sampled) -> None:
    """Note down with ``thread`` what ``sampled`` was chosen from."""
    thread.logprobs = _extended(thread.logprobs, sampled.logprob)
    thread.scores = _extended(thread.scores, sampled.scores)
    thread.logits = _extended(thread.logits, sampled.logits)


def _extended(values: list[Item] | None, value: Item | None) -> list[Item] | None:
    return values if value is None else [*(values or ()), value]


def apar_decode(
    model: PreTrainedModel,
    input_ids: LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    apar: AparConfig | None = None,
    streamer: object | None = None,
    proposer: Proposer | None = None,
    **model_kwargs: Any,
) -> AparOutput | LongTensor:
    """Decode along paragraph trees: a callable for ``model.generate(custom_generate=apar_decode)``.

    Args:
        apar: settings; what is ``None`` in them, or all, is taken from ``generation_config.apar_config``.
        streamer: an :class:`~hf_apar.streaming.AparStreamer`, a streamer of transformers for one prompt, or several in a
            list; bind it with ``functools.partial(apar_decode, streamer=...)``, since ``generate`` keeps its own to itself.
        proposer: guesses what threads write next; none by default.

    Raises:
        ControlTokenError: if the checkpoint has no control tokens, or the prompt holds one.
        ConfigurationError: for a generation option that threads cannot follow.
        UnsupportedModelError: for a model whose layers cannot attend along a tree.
    """
    with ended_by_errors(streamer):
        return decode_in_threads(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            apar=apar,
            streamer=streamer,
            proposer=proposer,
            **model_kwargs,
        )


def decode_in_threads(
    model: PreTrainedModel,
    input_ids: LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    apar: AparConfig | None = None,
    streamer: object | None = None,
    proposer: Proposer | None = None,
    **model_kwargs: Any,
) -> AparOutput | LongTensor:
    """Do what :func:`apar_decode` does, and leave the streamers to the caller where something is raised."""
    validate_model(model)
    validate_generation(generation_config, model_kwargs)
    validate_streamer(streamer, len(input_ids))
    if not isinstance(proposer, Proposer | None):
        raise ConfigurationError(f"proposer is a {type(proposer).__name__}; pass a Proposer, such as MedusaDrafts(heads)")
    config = resolve_config(apar, generation_config, model)
    generation_config = with_limits(generation_config, stopping_criteria)
    prompts = Prompts.from_generate(input_ids, generation_config, model_kwargs)
    lengths = [row.slots for row in prompts.rows(config)] or [0]
    validate_length(max(lengths), model)
    budget = int(generation_config.max_length) - input_ids.shape[1]
    validate_rope(min(lengths), max(lengths), budget, config, model)
    eos = eos_token_ids(generation_config)
    pad = int(generation_config.pad_token_id if generation_config.pad_token_id is not None else next(iter(eos), 0))
    sampler = Sampler(logits_processor, config, input_ids, pad_token_id=pad, do_sample=bool(generation_config.do_sample))
    stopper = Stopper(stopping_criteria, config, input_ids, pad_token_id=pad)
    broadcast = Broadcast(streamer, input_ids.device)
    decoder = Decoder(model, prompts, sampler, stopper, config, generation_config, broadcast, proposer or NoDrafts())
    if len(input_ids):
        decoder.run()
    broadcast.end()
    return _output(decoder, pad=pad)


def _output(decoder: Decoder, *, pad: int) -> AparOutput | LongTensor:
    answers = []
    for row, stats in zip(decoder.rows, decoder.stats, strict=True):
        answer, slots = row.tree.token_ids, row.prompt_slots
        for name in ("drafts", "proposed", "accepted"):
            setattr(stats, name, sum(getattr(thread, name) for thread in row.tree.threads))
        stats.tokens = len(answer)
        stats.critical_path = max(thread.start + len(thread.sampled_ids) for thread in row.tree.threads) - row.prompt_length
        fed = len(answer) if row.tree.closing_ids else max(len(answer) - 1, 0)  # the last token is fed to get EOS alone
        stats.kv_if_sequential = slots + fed
        stats.attended_if_sequential = sum(range(slots + 1, slots + fed + 1))
        answers.append([*answer, *row.tree.closing_ids])
    width = max(map(len, answers), default=0)
    prompt_ids = decoder.prompts.input_ids
    new_ids = torch.tensor([answer + [pad] * (width - len(answer)) for answer in answers], dtype=torch.long)
    sequences: LongTensor = torch.cat([prompt_ids, new_ids.view(len(answers), width).to(prompt_ids.device)], dim=1)  # type: ignore[assignment]
    if not decoder.generation_config.return_dict_in_generate:
        return sequences
    trees = [row.tree for row in decoder.rows]
    cache = None if decoder.forked or not trees else _plain_cache(decoder)
    return AparOutput(sequences=sequences, trees=trees, stats=decoder.stats, cache=cache)


def _plain_cache(decoder: Decoder) -> TreeCache:
    """Return what a batch without forks has cached: all but the last token that each row wrote."""
    rows = [[*row.padding, *row.root_slots] for row in decoder.rows]
    longest = max(len(row.padding) + cost.kv_if_sequential for row, cost in zip(decoder.rows, decoder.stats, strict=True))
    decoder.cache.put_in_order(torch.tensor([[*row, *range(len(row), longest)][:longest] for row in rows]))
    return decoder.cache
