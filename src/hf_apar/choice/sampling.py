"""The choice of the next tokens: bans of the control tokens, logits processors on each thread's path, argmax or draw."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from hf_apar.choice.constraint import Constraint
from hf_apar.choice.paths import Context, rounds
from hf_apar.choice.purity import Pure
from hf_apar.choice.seen import SeenTokens
from hf_apar.errors import ConfigurationError
from hf_apar.protocol import ForkProtocol
from hf_apar.releases import SCORES_ONLY, STATEFUL

Processor = Callable[..., Tensor]  # (input_ids, scores), as those of transformers, whose annotations say LongTensor


@dataclass(frozen=True)
class Penalty:
    """A repetition penalty: it asks only which tokens a path holds, wherever and however often.

    Attributes:
        processor: transformers' own, without anything that it ignores.
        seen: what paths hold, without that.
    """

    processor: Processor
    seen: SeenTokens

    def change(self, scores: Tensor, seen: Tensor) -> None:
        """Change, in place, the ``seen`` columns of ``scores``: a copy of all others would cost more."""
        columns = torch.arange(seen.shape[1], device=seen.device).expand_as(seen)
        scores.scatter_(1, seen, self.processor(columns, scores.gather(1, seen)))


def _starts(processor: logits_process.RepetitionPenaltyLogitsProcessor, prompt_ids: Tensor) -> tuple[int, ...] | None:
    """Return where each row's tokens begin that ``processor`` looks at; ``None`` where that is no place in each row.

    From transformers 5.24 on ``generate`` has it ignore the padding of each row.
    """
    ignored, (batch, length) = getattr(processor, "prompt_ignore_length", None), prompt_ids.shape
    if ignored is None:
        return (0,) * batch
    if not isinstance(ignored, Tensor) or ignored.shape != (batch,):
        return None
    starts = tuple(ignored.tolist())
    return starts if all(not start or 0 < start < length for start in starts) else None


def _with_one_more(scores: Tensor) -> Tensor:
    """Return ``scores`` with a column for tokens that have none: there are models with more embeddings than logits."""
    return functional.pad(scores, (0, 1), value=-torch.inf)


@dataclass(frozen=True)
class Choices:
    """The tokens chosen, and the processed ``scores`` (contexts, vocabulary) that they were chosen from.

    Where ``stuck`` nothing may be chosen, and token and scores mean nothing.
    """

    tokens: list[int]
    scores: Tensor
    stuck: list[bool]

    def logprobs(self) -> list[float]:
        """Return the log probability of each token under its ``scores``."""
        chosen = torch.tensor(self.tokens, device=self.scores.device)[:, None]
        return self.scores.log_softmax(dim=-1).gather(1, chosen)[:, 0].tolist()


class Sampler:
    """Chooses one token for each :class:`Context`, all in one go.

    Args:
        processors: what ``generate`` prepared; the suppression of control tokens is lifted.
        protocol: says which tokens are never text, and which are favoured.
        prompt_ids: (batch, prompt), padded on the left.
        pad_token_id: fills rows that a processor must get but whose result is not used.
        do_sample: draw from the softmax instead of taking the argmax.

    Raises:
        ConfigurationError: for a processor that keeps state across calls.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        protocol: ForkProtocol,
        prompt_ids: Tensor,
        *,
        pad_token_id: int,
        do_sample: bool,
    ) -> None:
        self.protocol = protocol
        self.prompt_ids, self.pad_token_id, self.do_sample = prompt_ids, pad_token_id, do_sample
        self._seen: dict[tuple[int, ...], SeenTokens] = {}  # by where rows begin
        self.processors = [kept for one in processors if (kept := self._lift(one)) is not None]

    def __call__(self, logits: Tensor, contexts: Sequence[Context]) -> Choices:
        """Choose one token for each context; ``logits`` is (contexts, vocabulary)."""
        scores, stuck = self.scores(logits, contexts)
        if self.do_sample:
            chances = _after_rejection(scores.softmax(dim=-1), contexts)
            chosen = torch.multinomial(chances, num_samples=1).squeeze(1)  # (contexts,)
        else:
            chosen = scores.argmax(dim=-1)
        return Choices(chosen.tolist(), scores, stuck)  # the step's one copy to the host, but for processors along paths

    def scores(self, logits: Tensor, contexts: Sequence[Context]) -> tuple[Tensor, list[bool]]:
        """Return ``logits`` (contexts, vocabulary) after bans and processors, in float32, and where nothing is left."""
        own = logits.clone() if logits.dtype == torch.float32 else logits.float()
        return self._process(self._rule(own, contexts, {}), contexts)

    def guess_scores(
        self, logits: Tensor, places: Tensor, columns: Mapping[int, int], contexts: Sequence[Context]
    ) -> Tensor:
        """Return about what :meth:`scores` would make of logits over some tokens alone, (contexts, tokens).

        For guesses, which may be wrong: processors that need more than a path's set of tokens are left out.

        Args:
            places: (vocabulary + 1,): the column of each token, the number of columns for those that have none.
            columns: the same by token, on the host, of the tokens that have one.
        """
        scores = _with_one_more(logits)
        ruled = {*self.protocol.bias, *(token for context in contexts for token in context.banned)}
        self._rule(scores, contexts, {token: columns.get(token, logits.shape[1]) for token in ruled})
        for processor in self.processors:
            if isinstance(processor, Penalty):
                processor.change(scores, places[processor.seen.of(contexts).to(places.device).clamp(max=len(places) - 1)])
        return scores[:, :-1]

    def _rule(self, scores: Tensor, contexts: Sequence[Context], columns: Mapping[int, int]) -> Tensor:
        """Favour and ban, in place, as the protocol says; ``columns``: where tokens stand, if not at their id."""
        for token, value in self.protocol.bias.items():
            scores[:, columns.get(token, token)] += value
        return self._ban(scores, contexts, columns)

    def _ban(self, scores: Tensor, contexts: Sequence[Context], columns: Mapping[int, int]) -> Tensor:
        banned = [(row, columns.get(token, token)) for row, one in enumerate(contexts) for token in one.banned]
        if banned:
            rows, tokens = torch.tensor(banned, device=scores.device).T
            scores[rows, tokens] = -torch.inf
        return scores

    def _process(self, scores: Tensor, contexts: Sequence[Context]) -> tuple[Tensor, list[bool]]:
        stuck = None  # (contexts,)
        for processor in self.processors:
            if isinstance(processor, Penalty):
                seen, width = processor.seen.of(contexts), scores.shape[1]
                fits = processor.seen.largest < width
                scores = scores if fits else _with_one_more(scores)
                processor.change(scores, seen if fits else seen.clamp(max=width))
                scores = scores[:, :width]
            elif type(processor) in SCORES_ONLY:
                scores = processor(self.prompt_ids, scores)
            else:
                scores = self._ban(self._along_paths(processor, scores, contexts), contexts, {})
                here = scores.amax(dim=-1).isneginf()
                stuck = here if stuck is None else stuck | here
                scores = scores.masked_fill(stuck[:, None], 0.0)  # whatever comes of it is not followed
        return scores, [False] * len(contexts) if stuck is None else stuck.tolist()

    def _along_paths(self, processor: Processor, scores: Tensor, contexts: Sequence[Context]) -> Tensor:
        """Call ``processor`` with each path as the row of a batch-sized input."""
        paths = [context.path for context in contexts]
        if isinstance(processor, Constraint):
            return processor(self.prompt_ids, scores, paths)
        result = scores.clone()
        for batch in rounds(self.prompt_ids, paths, self.pad_token_id):
            given = scores[batch.indices[0]].repeat(len(self.prompt_ids), 1)  # (batch, vocabulary)
            given[batch.rows] = scores[batch.indices]
            result[batch.indices] = processor(batch.input_ids, given)[batch.rows]
        return result

    def _lift(self, processor: Processor) -> Processor | Penalty | None:
        """Take control tokens out of a suppression, as a checkpoint suppresses them in plain decoding; refuse state."""
        if isinstance(processor, STATEFUL):
            raise ConfigurationError(
                f"{type(processor).__name__} cannot follow several threads: it keeps state, or takes several rows for one "
                "sequence; leave it out, and the option that asks for it (guidance_scale, watermarking_config), or call "
                "generate without apar"
            )
        if isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor):
            return Constraint(processor)
        if type(processor) is logits_process.RepetitionPenaltyLogitsProcessor:
            starts = _starts(processor, self.prompt_ids)
            if starts is not None:
                seen = self._seen.setdefault(starts, SeenTokens(self.prompt_ids, starts))
                return Penalty(type(processor)(processor.penalty), seen)
        if not isinstance(processor, logits_process.SuppressTokensLogitsProcessor):
            return processor if type(processor) in SCORES_ONLY else Pure(processor)
        kept = [token for token in processor.suppress_tokens.tolist() if token not in self.protocol.control_ids]
        return logits_process.SuppressTokensLogitsProcessor(kept, device=str(self.prompt_ids.device)) if kept else None


def _after_rejection(chances: Tensor, contexts: Sequence[Context]) -> Tensor:
    """Return what to draw from, (contexts, vocabulary), so that guesses are kept as often as their distribution allows.

    A guess drawn from q is kept with the probability min(1, p / q), else a token is drawn from what p has more than q: the
    result is distributed as p (Leviathan et al., 2023, theorem 1). A kept guess is a row with that one token.
    """
    drawn = [(index, one.guess, one.drawn_from) for index, one in enumerate(contexts) if one.drawn_from is not None]
    if not drawn:
        return chances
    rows = torch.tensor([index for index, _, _ in drawn], device=chances.device)
    guesses = torch.tensor([guess for _, guess, _ in drawn], device=chances.device)[:, None]
    padded = [functional.pad(other, (0, chances.shape[1] - len(other))) for _, _, other in drawn]
    ours, theirs = chances[rows], torch.stack(padded).to(chances.device)
    kept = torch.rand(len(drawn), 1, device=chances.device) * theirs.gather(1, guesses) < ours.gather(1, guesses)
    more = (ours - theirs).clamp(min=0)
    more = torch.where(more.sum(dim=1, keepdim=True) > 0, more, ours)  # equal but for rounding
    alone = torch.zeros_like(ours).scatter(1, guesses, 1.0)
    return chances.index_copy(0, rows, torch.where(kept, alone, more))
