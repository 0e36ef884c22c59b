"""A smaller model drafts for every live thread at once: k draft tokens for all of them take k of its forward passes.

It follows the same tree in a cache of its own. When sampling, drafts are drawn, and kept or redrawn by rejection (Leviathan
et al., 2023, in :mod:`hf_apar.choice.sampling`): the text keeps the model's distribution exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from hf_apar.checks import validate_model
from hf_apar.choice.paths import Context
from hf_apar.errors import ConfigurationError
from hf_apar.forward.attention import tree_attention_for
from hf_apar.forward.cache import TreeCache
from hf_apar.forward.devices import input_device
from hf_apar.forward.layout import StepLayout
from hf_apar.forward.lines import Query
from hf_apar.forward.prompts import Prompts
from hf_apar.protocol import ThreadView
from hf_apar.releases import takes
from hf_apar.speculation.proposer import Draft, Proposer, RowView, Run
from hf_apar.tokens import control_ids_of, embedding_rows
from hf_apar.tree.slots import SlotPool


@dataclass
class Cached:
    """What the assistant has cached of one thread's path: the tokens that it saw, and their slots."""

    tokens: list[int]
    slots: list[int]


@dataclass
class Shadow:
    """The assistant's side of one row."""

    layout: StepLayout
    pool: SlotPool = field(default_factory=SlotPool)
    cached: dict[int, Cached] = field(default_factory=dict)  # of the threads that live or wait

    def follow(self, row: RowView, leave_out: frozenset[int]) -> list[tuple[ThreadView, list[int]]]:
        """Forget what is on no path any more; return each live thread with the tokens that are not cached yet."""
        waiting, live = row.waiting, row.live
        new = [thread for thread in [*waiting, *live] if thread.index not in self.cached]
        for thread in sorted(new, key=lambda one: one.index):  # a parent before its children
            assert thread.parent is not None
            parent = self.cached[thread.parent]
            self.pool.hold(parent.slots)
            self.cached[thread.index] = Cached(list(parent.tokens), list(parent.slots))
        behind = []
        for thread in [*(thread for thread in new if thread not in live), *live]:  # who waits writes nothing
            path = [token for token in thread.path_ids if token not in leave_out]
            missing = self._cut(self.cached[thread.index], path)
            if thread in live:
                behind.append((thread, missing))
        for index in self.cached.keys() - {thread.index for thread in [*waiting, *live]}:
            self.pool.release(self.cached.pop(index).slots)
        return behind

    def _cut(self, cached: Cached, path: Sequence[int]) -> list[int]:
        """Keep of ``cached`` what ``path`` begins with, short of its last token; return the rest of the path."""
        limit = min(len(cached.tokens), len(path) - 1)
        same = next((place for place in range(limit) if cached.tokens[place] != path[place]), limit)
        self.layout.lines.cut(cached.slots, same)
        self.pool.release(cached.slots[same:])
        del cached.tokens[same:], cached.slots[same:]
        return list(path[same:])

    def feed(self, thread: ThreadView, tokens: Sequence[int]) -> list[Query]:
        """Give ``tokens`` of ``thread`` slots, and return what feeds them."""
        cached, queries = self.cached[thread.index], list[Query]()
        for token in tokens:
            cached.tokens.append(token)
            cached.slots.append(self.pool.take())
            queries.append(Query(token, cached.slots, len(cached.slots), wanted=len(queries) == len(tokens) - 1))
        return queries


class AssistantDrafts(Proposer):
    """Proposes what ``assistant`` would write: its likeliest tokens, or tokens drawn from its distribution when sampling.

    Args:
        assistant: a model with the target's vocabulary, the control tokens may be missing: they leave its path then, and
            it never proposes them.
        num_tokens: the longest draft.
        schedule: see :class:`~hf_apar.speculation.proposer.Proposer`.
        confidence: a draft ends with the first token that the assistant gives less than this probability.

    Raises:
        ConfigurationError: at the start of a call, if the vocabularies differ by more than the control tokens.
        UnsupportedModelError: if the assistant cannot attend along a tree.
    """

    def __init__(
        self,
        assistant: PreTrainedModel,
        *,
        num_tokens: int = 5,
        schedule: str = "constant",
        confidence: float = 0.0,
    ) -> None:
        validate_model(assistant)
        self.assistant, self.longest, self.schedule, self.confidence = assistant, num_tokens, schedule, confidence

    def start(self, run: Run) -> None:
        controls = run.protocol.control_ids
        ours, theirs = embedding_rows(self.assistant), embedding_rows(run.model)
        if not min(controls, default=theirs) <= ours <= theirs:
            raise ConfigurationError(
                f"the assistant knows {ours} tokens and the model {theirs}; pass an assistant with the model's own "
                "tokenizer, with or without the control tokens"
            )
        self.leave_out = frozenset() if control_ids_of(self.assistant) == controls else controls
        self.banned = [token for token in self.leave_out if token < ours]  # the rules ban what else may not come
        self.run, self.cache = run, TreeCache()
        self.shadows: list[Shadow] = []
        self.device = input_device(self.assistant, run.device)
        self.layout = StepLayout.of(self.assistant, self.device)

    @torch.no_grad()
    def propose(self, rows: Sequence[RowView], limits: Sequence[Sequence[int]]) -> Sequence[Sequence[Draft]]:
        with tree_attention_for(self.assistant) as self.pack:
            return self._propose(rows, limits)

    def _propose(self, rows: Sequence[RowView], limits: Sequence[Sequence[int]]) -> Sequence[Sequence[Draft]]:
        if not self.shadows:
            self._prefill(rows)
        wanted = [
            {thread.index: limit for thread, limit in zip(row.live, lengths, strict=True)}
            for row, lengths in zip(rows, limits, strict=True)
        ]
        followed = [shadow.follow(row, self.leave_out) for shadow, row in zip(self.shadows, rows, strict=True)]
        plan = [[turn for turn in turns if many[turn[0].index]] for turns, many in zip(followed, wanted, strict=True)]
        drafts: list[dict[int, _Drafted]] = [{thread.index: _Drafted() for thread, _ in turns} for turns in followed]
        while going := [(number, thread) for number, turns in enumerate(plan) for thread, _ in turns]:
            contexts = [
                self.run.context(number, rows[number], thread, drafts[number][thread.index].tokens)
                for number, thread in going
            ]
            tokens, sure, drawn_from, stuck = self._forward(plan, contexts)
            plan = [[] for _ in rows]
            for place, (number, thread) in enumerate(going):
                draft = drafts[number][thread.index]
                if stuck[place]:
                    continue
                draft.tokens.append(tokens[place])  # an unsure one too: to drop what was drawn would bend the distribution
                if drawn_from is not None:
                    draft.drawn_from.append(drawn_from[place])
                ends = sure[place] < self.confidence or self.run.is_last(thread, tokens[place])
                if not ends and len(draft.tokens) < wanted[number][thread.index]:
                    plan[number].append((thread, [tokens[place]]))
        return [[drafts[number][thread.index].done() for thread in row.live] for number, row in enumerate(rows)]

    def _prefill(self, rows: Sequence[RowView]) -> None:
        """Feed the prompts, padded on the left as the target has them, so that each has its slots below any path's."""
        prompts = [row.threads[0].path_ids[: row.prompt_length] for row in rows]
        if any(row.prompt_slots != row.prompt_length for row in rows):
            raise ConfigurationError(
                "an assistant needs the prompt's tokens; pass input_ids, all of them, without embeddings"
            )
        span = max(map(len, prompts))
        ids = torch.tensor([[0] * (span - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (span - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options = {"logits_to_keep": 1} if takes(type(self.assistant).forward, "logits_to_keep") else {}
        whole = Prompts(ids, None if bool(mask.all()) else mask, span, None, options)
        whole.prefill(self.assistant, self.cache)
        for prompt in prompts:
            shadow = Shadow(self.layout)
            taken = [shadow.pool.take() for _ in range(span)]
            shadow.cached[0] = Cached(list(prompt), taken[span - len(prompt) :])
            self.shadows.append(shadow)

    def _forward(
        self, plan: Sequence[Sequence[tuple[ThreadView, list[int]]]], contexts: Sequence[Context]
    ) -> tuple[list[int], list[float], Tensor | None, list[bool]]:
        """Feed each thread its tokens; return each one's next, its probability, what it was drawn from, and who has none.

        The assistant's logits go through the model's own logits processors: its choices are judged after them.
        """
        fed = [[shadow.feed(*turn) for turn in turns] for shadow, turns in zip(self.shadows, plan, strict=True)]
        inputs = self.layout.lay_out(
            [[query for queries in row for query in queries] for row in fed],
            [shadow.pool.peek() for shadow in self.shadows],
            high_water=max(shadow.pool.high_water for shadow in self.shadows),
            pack=self.pack,
        )
        last = inputs.in_plan_order(inputs.run(self.assistant, self.cache)).float()  # (threads, vocabulary)
        last[:, self.banned] = -torch.inf
        sampler = self.run.sampler
        last = functional.pad(last, (0, embedding_rows(self.run.model) - last.shape[1]), value=-torch.inf)
        scores, stuck = sampler.scores(last.to(sampler.prompt_ids.device), contexts)
        chances = scores.softmax(dim=-1)
        tokens = torch.multinomial(chances, num_samples=1) if sampler.do_sample else chances.argmax(dim=-1, keepdim=True)
        sure = chances.gather(1, tokens)[:, 0].tolist() if self.confidence else [1.0] * len(contexts)
        return tokens[:, 0].tolist(), sure, chances if sampler.do_sample else None, stuck


@dataclass
class _Drafted:
    tokens: list[int] = field(default_factory=list)
    drawn_from: list[Tensor] = field(default_factory=list)

    def done(self) -> Draft:
        return Draft(self.tokens, drawn_from=torch.stack(self.drawn_from) if self.drawn_from else None)
