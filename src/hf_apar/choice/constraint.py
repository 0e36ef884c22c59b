"""``prefix_allowed_tokens_fn`` along threads: asked about each path by itself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

from hf_apar.choice.paths import Path
from hf_apar.choice.purity import Pure


class Constraint:
    """Hides what ``prefix_allowed_tokens_fn`` does not allow after each of many paths.

    transformers asks it about all rows of a batch. The threads of an answer differ in length, so that it would be asked
    about rows that hold nothing but padding, and an empty list, its answer to them, is an error there. Here nothing is
    allowed then.

    Args:
        processor: what ``generate`` made of the function.
    """

    def __init__(self, processor: PrefixConstrainedLogitsProcessor) -> None:
        self.function: Callable[..., Any] = Pure(processor._prefix_allowed_tokens_fn)
        self.per_prompt: int = processor._num_beams  # rows of one prompt: num_return_sequences

    def __call__(self, prompt_ids: Tensor, scores: Tensor, paths: Sequence[Path]) -> Tensor:
        """Return ``scores`` (paths, vocabulary) with what is not allowed hidden.

        Args:
            prompt_ids: (batch, prompt); a path follows that of its row.
        """
        rows = [(path.row, torch.cat([prompt_ids[path.row], prompt_ids.new_tensor(path.new_ids)])) for path in paths]
        allowed = [self.function(row // self.per_prompt, ids) for row, ids in rows]
        hide = PrefixConstrainedLogitsProcessor(lambda place, _: allowed[place] if len(allowed[place]) else [0], 1)
        hidden: Tensor = hide(prompt_ids.new_empty(len(paths), 0), scores)
        hidden[[not len(tokens) for tokens in allowed]] = -torch.inf
        return hidden
