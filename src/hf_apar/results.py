"""What decoding returns beside the tokens: what an answer cost, and the output of ``generate``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from hf_apar.forward.passes import Passes
from hf_apar.tree.display import counted, tree_html
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import ParagraphTree


@dataclass
class AparStats:
    """What one row's answer cost; slots are KV cache entries of one layer.

    Attributes:
        steps: forward passes that the row took part in, its prefill included.
        tokens: tokens of the answer, without control tokens and EOS; of branches, what they wrote.
        critical_path: tokens sampled along the path with most of them, [Fork] and EOS included: the steps with unbounded
            threads and without drafts, but for passes that only feed. What is injected, as [Child], takes no step.
        peak_threads: the most threads that lived at once.
        peak_kv: the most slots that were held or lay below a held one, without padding.
        kv_if_sequential: slots that plain decoding of the same text ends with; of branches, of each alone, all added up.
        attended: slots seen, summed over all tokens fed after the prompt.
        attended_if_sequential: the same for plain decoding of the same text.
        drafts: drafts fed, one for a thread and step at most; each thread of the tree has its own count of these three.
        proposed: their tokens.
        accepted: those of them that were kept.
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
    drafts: int = 0
    proposed: int = 0
    accepted: int = 0
    seconds: float = 0.0

    def finish(self, row: GrowingTree) -> None:
        """Add what only a finished answer tells."""
        threads, answer = row.tree.threads, row.tree.token_ids
        for name in ("drafts", "proposed", "accepted"):
            setattr(self, name, sum(getattr(thread, name) for thread in threads))
        ends = [one.eos_token_id is not None for one in threads]
        self.tokens = len(answer)
        self.critical_path = max(map(row.sampled, threads))
        texts = [len(answer) + bool(row.tree.closing_ids)]
        if row.apart:
            self.tokens = sum(len(one.path_ids) - one.start for one in threads)
            texts = [len(one.path_ids) - row.prompt_length + end for one, end in zip(threads[1:], ends[1:], strict=True)]
        fed = [max(length - 1, 0) for length in texts]  # the last token is fed to get EOS alone
        self.kv_if_sequential = sum(row.prompt_slots + count for count in fed)
        self.attended_if_sequential = sum(sum(range(row.prompt_slots + 1, row.prompt_slots + count + 1)) for count in fed)

    @property
    def tokens_per_step(self) -> float:
        """Tokens of the answer for each forward pass; plain decoding has at most 1."""
        return self.tokens / max(self.steps, 1)

    @property
    def mean_accepted(self) -> float:
        """Tokens that a draft spared a thread, on average; 0 without drafts."""
        return self.accepted / max(self.drafts, 1)


@dataclass
class AparOutput(ModelOutput):
    """What ``generate`` returns with ``return_dict_in_generate=True``.

    Attributes:
        sequences: (batch, prompt + new): prompt, then the answer in reading order, control tokens left out, padded on the
            right; EOS last where every thread ended itself.
        trees: the paragraph tree of each row.
        stats: what each row cost.
        cache: the cache of the whole batch where no row forked, as ``generate`` gives it, but for the last token
            of rows that ended before others, which it does not hold. ``None`` where a row forked: a next turn reads the
            answer as a plain sequence.
    """

    sequences: Tensor | None = None
    trees: list[ParagraphTree] | None = None
    stats: list[AparStats] | None = None
    cache: Cache | None = None

    @property
    def past_key_values(self) -> Cache | None:
        """The cache under its name before transformers 5.24."""
        return self.cache

    def _repr_html_(self) -> str:
        return "".join(map(_row_html, self.trees or (), self.stats or ()))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__("cache" if key == "past_key_values" else key)  # type: ignore[no-untyped-call]


def _row_html(tree: ParagraphTree, stats: AparStats) -> str:
    speed = f"{stats.tokens} tokens in {stats.steps} steps, {stats.tokens_per_step:.2f} a step, {stats.seconds:.2f} s"
    return tree_html(tree, tree.tokenizer, f"{counted(len(tree.threads), 'thread')}, {speed}")


def output(
    rows: Sequence[GrowingTree], stats: list[AparStats], passes: Passes, *, pad: int, as_dict: bool
) -> AparOutput | Tensor:
    """Return finished ``rows`` as ``generate`` does: the sequences alone, or ``as_dict`` all that there is."""
    for row, cost in zip(rows, stats, strict=True):
        cost.finish(row)
    prompt_ids = passes.prompts.input_ids
    answers = [[*row.tree.token_ids, *row.tree.closing_ids] for row in rows]
    width = max(map(len, answers), default=0)
    new_ids = torch.tensor([answer + [pad] * (width - len(answer)) for answer in answers], dtype=torch.long)
    sequences = torch.cat([prompt_ids, new_ids.view(len(answers), width).to(prompt_ids.device)], dim=1)
    if not as_dict:
        return sequences
    forked = any(len(row.tree.threads) > 1 for row in rows)
    cache = None if forked or not rows else _plain_cache(rows, stats, passes)
    return AparOutput(sequences=sequences, trees=[row.tree for row in rows], stats=stats, cache=cache)


def _plain_cache(rows: Sequence[GrowingTree], stats: Sequence[AparStats], passes: Passes) -> Cache:
    """Return what a batch without forks has cached: all but the last token that each row wrote."""
    longest = max(len(row.padding) + cost.kv_if_sequential for row, cost in zip(rows, stats, strict=True))
    held = [[*row.padding, *row.root_slots] for row in rows]
    passes.cache.put_in_order(torch.tensor([[*slots, *range(len(slots), longest)][:longest] for slots in held]))
    return passes.cache
