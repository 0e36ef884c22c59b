"""How likely a model finds an answer."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def mean_nll(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Return the negative log-likelihood that ``model`` gives a token of ``answer`` after its ``prompt``, in nats.

    Control tokens must have been left out: the model may not know them.
    """
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    scores = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return -float(scores.gather(1, ids[0, len(prompt) :, None]).mean())
