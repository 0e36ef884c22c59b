"""What decoding returns beside the tokens: what an answer cost, and the output of ``generate``."""

from dataclasses import dataclass
from typing import Any

from torch import LongTensor
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from hf_apar.tree.threads import ParagraphTree


@dataclass
class AparStats:
    """What one row's answer cost; slots are KV cache entries of one layer.

    Attributes:
        steps: forward passes that the row took part in, its prefill included.
        tokens: tokens of the answer, without control tokens and EOS.
        critical_path: tokens, control tokens and EOS included, on the longest path: the steps with unbounded threads.
        peak_threads: the most threads that lived at once.
        peak_kv: the most slots that were held or lay below a held one, without padding.
        kv_if_sequential: slots that plain decoding of the same text ends with.
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

    sequences: LongTensor | None = None
    trees: list[ParagraphTree] | None = None
    stats: list[AparStats] | None = None
    cache: Cache | None = None

    @property
    def past_key_values(self) -> Cache | None:
        """The cache under its name before transformers 5.24."""
        return self.cache

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__("cache" if key == "past_key_values" else key)  # type: ignore[no-untyped-call]
