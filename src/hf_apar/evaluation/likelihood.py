"""How likely the base model finds answers: whether tuning, or writing in threads, has changed the words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from hf_apar.evaluation.models import Loaded
from hf_apar.evaluation.rows import Row
from hf_apar.evaluation.statistics import Interval, bootstrap
from hf_apar.text.encoding import encode_answer


@dataclass(frozen=True)
class Likelihood:
    """Measures ``nll``: the nats that the base gives a token of an answer as it reads, after its prompt.

    No control token is among them, since the text has none, and no end, which a cut answer lacks. Empty answers have none.

    Attributes:
        base: the model before its tuning.
        positions: tokens of a batch, padding included; an answer that is longer is a batch of its own.
    """

    base: Loaded
    positions: int = 2048

    @property
    def name(self) -> str:
        return f"nll by {self.base.name} in {str(self.base.model.dtype).removeprefix('torch.')}"

    def __call__(self, rows: Sequence[Row]) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield the place of each row and its ``nll``, the longest first."""
        read = [self._read(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda place: -sum(map(len, read[place])))
        while order:
            size = max(self.positions // max(sum(map(len, read[order[0]])), 1), 1)
            batch, order = order[:size], order[size:]
            scored = [place for place in batch if read[place][1]]
            values = iter(self._nats([read[place] for place in scored]) if scored else ())
            yield from ((place, {"nll": next(values)} if read[place][1] else {}) for place in batch)

    def _read(self, row: Row) -> tuple[list[int], list[int]]:
        """Return the tokens of the prompt and of the answer; none of either where the answer is empty."""
        if not row.answered.text.strip():
            return [], []
        prompt = self.base.encoded(row.prompt)
        return prompt, encode_answer(self.base.tokenizer, prompt, row.answered.text)

    @torch.no_grad()
    def _nats(self, batch: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        model, width = self.base.model, max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        is_answer = torch.zeros_like(ids, dtype=torch.bool)
        mask = torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(batch):  # padded on the right, where nothing sees it
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            is_answer[row, len(prompt) : end] = True
            mask[row, :end] = 1
        ids, is_answer, mask = (one.to(model.device) for one in (ids, is_answer, mask))
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][is_answer[:, 1:]]  # (tokens, V)
        losses = functional.cross_entropy(logits.float(), ids[is_answer], reduction="none")
        return [float(one.mean()) for one in losses.split([len(answer) for _, answer in batch])]


def likelier(rows: Sequence[Row], others: Sequence[Row]) -> Interval | None:
    """Return how likely the base finds a token of ``rows`` over one of ``others``, on the prompts that both have ``nll`` of.

    It is the geometric mean over prompts of the ratio of the two probabilities: with 0.89, words are 11 % less likely.
    ``None`` where there is no such prompt.
    """
    known = {row.prompt.key: row.extras["nll"] for row in others if "nll" in row.extras}
    gains = [known[row.prompt.key] - row.extras["nll"] for row in rows if "nll" in row.extras and row.prompt.key in known]
    return bootstrap(gains, lambda some: float(np.exp(some.mean()))) if gains else None
