"""How likely the base model finds answers: whether tuning, or writing in threads, has changed the words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_apar.evaluation.models import Loaded
from hf_apar.evaluation.rows import Row
from hf_apar.text.encoding import encode_answer


@torch.no_grad()
def mean_nll(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Return the negative log-likelihood that ``model`` gives a token of ``answer`` after its ``prompt``, in nats.

    Control tokens must have been left out: the model may not know them.
    """
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    scores = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return -float(scores.gather(1, ids[0, len(prompt) :, None]).mean())


@dataclass(frozen=True)
class Likelihood:
    """Measures ``nll``: the nats that the base gives a token of an answer as it reads, after its prompt.

    No control token is among them, since the text has none, and no end, which a cut answer lacks. Empty answers have none.

    Attributes:
        base: the model before its tuning.
    """

    base: Loaded

    @property
    def name(self) -> str:
        return f"nll by {self.base.name} in {str(self.base.model.dtype).removeprefix('torch.')}"

    def __call__(self, rows: Sequence[Row]) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield the place of each row and its ``nll``."""
        for place, row in enumerate(rows):
            text, prompt = row.answered.text, self.base.encoded(row.prompt)
            answer = encode_answer(self.base.tokenizer, prompt, text) if text.strip() else []
            yield place, {"nll": mean_nll(self.base.model, prompt, answer)} if answer else {}
