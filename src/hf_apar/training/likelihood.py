"""How likely a model finds an answer."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def mean_nll(model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """Return the negative log-likelihood that ``model`` gives a token of ``answers`` after their ``prompts``, in nats.

    Control tokens must have been left out: the model may not know them.
    """
    total, count = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        if not answer:
            continue
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        scores = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        total -= float(scores.gather(1, ids[0, len(prompt) :, None]).sum())
        count += len(answer)
    return total / max(count, 1)
