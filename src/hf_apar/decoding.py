"""The decoding loop: plan, forward, choose, advance.

Plain decoding is speculation with an empty draft, and a prompt is a root with many tokens: one loop serves everything.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.utils.generic import ModelOutput

from hf_apar.cache import TreeCache, layer_windows, new_tree_cache
from hf_apar.checks import (
    eos_token_ids,
    real_prompts,
    resolve_config,
    validate_generation,
    validate_model,
    validate_stopping,
)
from hf_apar.config import AparConfig, ResolvedConfig
from hf_apar.growth import GrowingTree
from hf_apar.layout import Query, lay_out
from hf_apar.sampling import Context, Sampler
from hf_apar.streaming import Broadcast
from hf_apar.tree import ParagraphTree, Thread


class Proposer(Protocol):
    """Guesses what threads write next; a guess changes the number of steps and never the text."""

    def propose(self, row: int, threads: Sequence[Thread]) -> Sequence[Sequence[int]]:
        """Return a draft, possibly empty, for each of the live ``threads`` of ``row``."""


class NoDrafts:
    """The proposer of plain decoding."""

    def propose(self, row: int, threads: Sequence[Thread]) -> Sequence[Sequence[int]]:
        return [()] * len(threads)


@dataclass
class AparStats:
    """What one row's answer cost; slots are KV cache entries of one layer.

    Attributes:
        steps: forward passes that the row took part in, its prefill included.
        tokens: tokens of the answer, without control tokens and EOS.
        critical_path: tokens, control tokens included, on the longest path: the steps with unbounded threads.
        peak_threads: the most threads that lived at once.
        peak_kv: the most slots that were held or lay below a held one, without padding.
        kv_if_sequential: slots that plain decoding of the same text ends with.
        attended: slots seen, summed over all tokens fed after the prompt.
        attended_if_sequential: the same for plain decoding of the same text.
        proposed: draft tokens fed.
        accepted: draft tokens kept.
        seconds: from the start of the batch's prefill to the row's last token.
    """

    steps: int = 0
    tokens: int = 0
    critical_path: int = 0
    peak_threads: int = 0
    peak_kv: int = 0
    kv_if_sequential: int = 0
    attended: int = 0
    attended_if_sequential: int = 0
    proposed: int = 0
    accepted: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens of the answer for each forward pass; plain decoding has at most 1."""
        return self.tokens / max(self.steps, 1)


@dataclass
class AparOutput(ModelOutput):
    """What ``generate`` returns with ``return_dict_in_generate=True``.

    Attributes:
        sequences: (batch, prompt + new): prompt, then the answer in reading order, control tokens left out, padded on the
            right; EOS last where every thread ended itself.
        trees: the paragraph tree of each row.
        stats: what each row cost.
    """

    sequences: LongTensor | None = None
    trees: list[ParagraphTree] | None = None
    stats: list[AparStats] | None = None


@dataclass(frozen=True)
class Turn:
    """What one thread feeds in a step: its path's last token and a draft; ``slots`` are theirs."""

    thread: Thread
    draft: Sequence[int]
    slots: Sequence[int]


class Decoder:
    """The state of one ``generate`` call over a batch."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: LongTensor,
        attention_mask: Tensor | None,
        sampler: Sampler,
        config: ResolvedConfig,
        generation_config: GenerationConfig,
        broadcast: Broadcast,
        proposer: Proposer,
    ) -> None:
        self.model, self.sampler, self.config, self.proposer = model, sampler, config, proposer
        self.input_ids, self.attention_mask, self.broadcast = input_ids, attention_mask, broadcast
        self.cache: TreeCache = new_tree_cache(model.config)
        self.windows = layer_windows(model.config.get_text_config(decoder=True))
        self.eos = eos_token_ids(generation_config)
        self.budget = [int(generation_config.max_length) - input_ids.shape[1]] * len(input_ids)  # tokens left to sample
        self.rows = [
            GrowingTree(
                prompt,
                padding=input_ids.shape[1] - len(prompt),
                max_threads=config.max_threads,
                fork_token_id=config.fork_token_id,
                child_token_id=config.child_token_id,
            )
            for prompt in real_prompts(input_ids, attention_mask, config)
        ]
        self.stats = [AparStats() for _ in self.rows]
        self.started = time.perf_counter()

    @torch.no_grad()
    def run(self, **model_kwargs: Any) -> None:
        """Write the whole batch; the trees are in ``rows`` afterwards."""
        plan: list[list[Turn]] = [[Turn(row.live[0], (), row.slots(row.live[0])[-1:])] for row in self.rows]
        logits = self.prefill(**model_kwargs)
        while self.advance(plan, self.choose(plan, logits)):
            plan = self.plan()
            logits = self.forward(plan)

    def prefill(self, **model_kwargs: Any) -> Tensor:
        """Feed the prompts as ``generate`` does; return the logits of their last tokens, (batch, 1, vocabulary)."""
        length = self.input_ids.shape[1]
        self.cache.prepare(None, length, length)
        inputs = self.model.prepare_inputs_for_generation(  # type: ignore[operator]
            self.input_ids,
            attention_mask=self.attention_mask,
            past_key_values=self.cache,
            is_first_iteration=True,
            **model_kwargs | {"use_cache": True},
        )
        for row, stats in zip(self.rows, self.stats, strict=True):
            stats.steps, stats.peak_threads, stats.peak_kv = 1, 1, row.prompt_length
        return self.model(**inputs, return_dict=True).logits[:, -1:]  # type: ignore[no-any-return]

    def plan(self) -> list[list[Turn]]:
        """Give every live thread its last token and a draft to feed, and the draft its slots."""
        plan = []
        for index, (row, stats) in enumerate(zip(self.rows, self.stats, strict=True)):
            live = row.live
            spare = self.budget[index] - len(live)  # each thread samples one token for sure
            turns = []
            for thread, draft in zip(live, self.proposer.propose(index, live), strict=True):
                draft = list(draft)[: max(spare, 0)]
                spare -= len(draft)
                turns.append(Turn(thread, draft, [row.slots(thread)[-1], *(row.pool.take() for _ in draft)]))
                stats.proposed += len(draft)
            stats.steps += bool(turns)
            stats.peak_threads = max(stats.peak_threads, len(turns))
            stats.peak_kv = max(stats.peak_kv, row.pool.high_water - len(row.padding))
            plan.append(turns)
        return plan

    def forward(self, plan: list[list[Turn]]) -> Tensor:
        """Run the model over the plan once; return logits (batch, width, vocabulary)."""
        queries = [
            [query for turn in turns for query in self._queries(row, turn)]
            for row, turns in zip(self.rows, plan, strict=True)
        ]
        for stats, row in zip(self.stats, queries, strict=True):
            stats.attended += sum(len(query.sees) for query in row)
        inputs = lay_out(
            queries,
            [row.pool.peek() for row in self.rows],
            self.windows,
            dtype=self.model.dtype,
            device=self.input_ids.device,
            high_water=max(row.pool.high_water for row in self.rows),
        )
        self.cache.prepare(inputs.slots, inputs.high_water, inputs.slots.shape[1])
        return self.model(  # type: ignore[no-any-return]
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            attention_mask=inputs.attention_mask,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        ).logits

    def choose(self, plan: list[list[Turn]], logits: Tensor) -> list[list[list[int]]]:
        """Choose a token after every token that was fed, for all rows and threads at once.

        While nothing has forked, a finished row is still drawn for, so that sampling matches ``generate``.
        """
        places: list[tuple[int, int]] = []  # (row, column) of each choice in the logits
        owners: list[list[int] | None] = []  # what each choice is added to
        contexts: list[Context] = []
        chosen: list[list[list[int]]] = [[[] for _ in turns] for turns in plan]
        forked = any(len(row.tree.threads) > 1 for row in self.rows)
        for index, (row, turns) in enumerate(zip(self.rows, plan, strict=True)):
            found: list[tuple[Context, list[int] | None]] = [
                (context, owner)
                for turn, owner in zip(turns, chosen[index], strict=True)
                for context in self._contexts(index, row, turn)
            ]
            if not found and not forked:
                found = [(self._idle_context(index, row), None)]
            places += [(index, column) for column in range(len(found))]
            contexts += [context for context, _ in found]
            owners += [owner for _, owner in found]
        rows, columns = torch.tensor(places, device=logits.device).T
        for token, owner in zip(self.sampler(logits[rows, columns], contexts), owners, strict=True):
            if owner is not None:
                owner.append(token)
        return chosen

    def advance(self, plan: list[list[Turn]], chosen: list[list[list[int]]]) -> bool:
        """Append what was chosen, fork, end and release; is there anything left to write?"""
        for index, (row, turns) in enumerate(zip(self.rows, plan, strict=True)):
            if not turns:
                continue
            for turn, tokens in zip(turns, chosen[index], strict=True):
                self._take(index, row, turn, tokens)
            while len(live := row.live) > self.budget[index]:  # the last tokens go to threads in reading order
                row.end_all("length") if self.budget[index] == 0 else row.end(live[-1], "length")
            if not row.unfinished:
                self.stats[index].seconds = time.perf_counter() - self.started
        self.broadcast.update([row.tree for row in self.rows])
        return any(row.unfinished for row in self.rows)

    def _take(self, index: int, row: GrowingTree, turn: Turn, tokens: Sequence[int]) -> None:
        """Let a thread write the chosen tokens up to the first one that its draft did not guess, a [Fork] or EOS."""
        spare = list(turn.slots[1:])
        for guess, token in zip([*turn.draft, None], tokens, strict=True):
            self.budget[index] -= 1
            if token in self.eos:
                row.pool.release(spare)
                turn.thread.eos_token_id = token
                row.end(turn.thread, "eos")
                return
            if token != guess or token == self.config.fork_token_id:
                row.pool.release(spare)
                row.append(turn.thread, token)
                return
            row.append(turn.thread, token, spare.pop(0))
            self.stats[index].accepted += 1

    def _queries(self, row: GrowingTree, turn: Turn) -> list[Query]:
        path = row.slots(turn.thread)
        fed = [turn.thread.path_ids[-1], *turn.draft]
        return [
            Query(token, slot, [*path, *turn.slots[1 : 1 + count]])
            for count, (token, slot) in enumerate(zip(fed, turn.slots, strict=True))
        ]

    def _contexts(self, index: int, row: GrowingTree, turn: Turn) -> list[Context]:
        new_ids = turn.thread.path_ids[row.prompt_length :]
        paths = [[*new_ids, *turn.draft[:count]] for count in range(len(turn.slots))]
        deep = turn.thread.depth >= self.config.max_depth
        controls = (self.config.fork_token_id, self.config.child_token_id)
        return [Context(index, path, not deep and not (path and path[-1] in controls)) for path in paths]

    def _idle_context(self, index: int, row: GrowingTree) -> Context:
        length = max(len(other.path_ids) - another.prompt_length for another in self.rows for other in another.live)
        new_ids = row.tree.threads[0].path_ids[row.prompt_length :]
        return Context(index, [*new_ids, *[self.sampler.pad_token_id] * (length - len(new_ids))], may_fork=False)


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
        streamer: an :class:`~hf_apar.streaming.AparStreamer`, or a streamer of transformers for one prompt.
        proposer: guesses what threads write next; none by default.

    Raises:
        ControlTokenError: if the checkpoint has no control tokens, or the prompt holds one.
        ConfigurationError: for a generation option that threads cannot follow.
        UnsupportedModelError: for a model whose layers cannot attend along a tree.
    """
    validate_model(model)
    validate_generation(generation_config, model_kwargs)
    validate_stopping(stopping_criteria)
    config = resolve_config(apar, generation_config, model)
    eos = eos_token_ids(generation_config)
    pad = generation_config.pad_token_id if generation_config.pad_token_id is not None else next(iter(eos), 0)
    sampler = Sampler(
        logits_processor, config, input_ids, pad_token_id=int(pad), do_sample=bool(generation_config.do_sample)
    )
    attention_mask = model_kwargs.pop("attention_mask", None)
    broadcast = Broadcast(streamer, input_ids.device)
    model_kwargs.pop("past_key_values", None)  # the empty cache that generate made
    decoder = Decoder(
        model, input_ids, attention_mask, sampler, config, generation_config, broadcast, proposer or NoDrafts()
    )
    decoder.run(**model_kwargs)
    broadcast.end()
    return _output(decoder, generation_config, pad=int(pad))


def _output(decoder: Decoder, generation_config: GenerationConfig, *, pad: int) -> AparOutput | LongTensor:
    answers = []
    for row, stats in zip(decoder.rows, decoder.stats, strict=True):
        answer = row.tree.token_ids
        prompt = row.prompt_length
        stats.tokens = len(answer)
        stats.critical_path = max(len(thread.path_ids) - prompt for thread in row.tree.threads)
        fed = len(answer) if row.tree.closing_ids else max(len(answer) - 1, 0)  # the last token is fed to get EOS alone
        stats.kv_if_sequential = prompt + fed
        stats.attended_if_sequential = sum(range(prompt + 1, prompt + fed + 1))
        answers.append([*answer, *row.tree.closing_ids])
    width = max(len(answer) for answer in answers)
    new_ids = torch.tensor([answer + [pad] * (width - len(answer)) for answer in answers], dtype=torch.long)
    sequences: LongTensor = torch.cat([decoder.input_ids, new_ids.to(decoder.input_ids.device)], dim=1)  # type: ignore[assignment]
    if not generation_config.return_dict_in_generate:
        return sequences
    return AparOutput(sequences=sequences, trees=[row.tree for row in decoder.rows], stats=decoder.stats)
