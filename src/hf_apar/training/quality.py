"""What a tuned model's answers are worth: forks that are none, variety of words, what the base model thinks of them."""

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from hf_apar.data.extraction.repetition import repeated_share, repeats
from hf_apar.tree.threads import Decodes, ParagraphTree

_WORD = re.compile(r"\w+")


def false_forks(tree: ParagraphTree, tokenizer: Decodes) -> int:
    """Return how many children are empty or repeat an earlier child of the same thread."""
    found = 0
    for parent in tree.threads:
        told: list[str] = []
        for child in tree.children(parent):
            text = tokenizer.decode(child.tokens, skip_special_tokens=True)
            found += not _WORD.search(text) or any(repeats(text, other) for other in told)
            told.append(text)
    return found


def distinct(texts: Sequence[str], length: int = 2) -> float:
    """Return the share of different runs of ``length`` words, each text by itself, on average (Li et al., 2016).

    >>> round(distinct(["a b a b", "c d e"]), 2)
    0.83
    """
    shares = [1 - repeated_share(text, length) for text in texts if len(_WORD.findall(text)) >= length]
    return sum(shares) / len(shares) if shares else 0.0


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
