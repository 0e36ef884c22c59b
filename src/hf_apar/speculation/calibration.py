"""How long a forward pass takes for so many tokens, measured once for each model and device."""

import time
from bisect import bisect_left
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from hf_apar.forward.attention import tree_attention_for
from hf_apar.forward.cache import TreeCache
from hf_apar.forward.layout import StepLayout
from hf_apar.forward.lines import Query
from hf_apar.releases import cache_argument

WIDTHS = (1, 4, 16, 64)
CONTEXT = 128  # slots that each query sees, at most
REPEATS = 4
PATIENCE = 0.5  # seconds after which no third or fourth repeat begins: the answer's first token waits for all this

_KNOWN: "WeakKeyDictionary[PreTrainedModel, dict[tuple[torch.device, torch.dtype], StepTimes]]" = WeakKeyDictionary()


class StepTimes:
    """Seconds of a forward pass by its number of tokens: linear between what was measured, and beyond it.

    >>> times = StepTimes([1, 4], [1.0, 1.5])
    >>> times(1), times(2), times(10)
    (1.0, 1.1666666666666667, 2.5)
    """

    def __init__(self, widths: Sequence[int], seconds: Sequence[float]) -> None:
        self.widths, self.seconds = list(widths), list(seconds)

    def __call__(self, width: int) -> float:
        right = min(max(bisect_left(self.widths, width), 1), len(self.widths) - 1)
        low, high = self.widths[right - 1], self.widths[right]
        slope = (self.seconds[right] - self.seconds[right - 1]) / (high - low)
        return self.seconds[right - 1] + slope * (width - low)


def step_times(model: PreTrainedModel, device: torch.device | None = None) -> StepTimes:
    """Return how long ``model`` takes, measured at the first call: 9 to 17 forward passes; its inputs are on ``device``."""
    known = _KNOWN.setdefault(model, {})
    where = model.device if device is None else device
    key = (where, model.dtype)
    if key not in known:
        known[key] = _measured(model, where)
    return known[key]


@torch.no_grad()
def _measured(model: PreTrainedModel, device: torch.device) -> StepTimes:
    cache, layout = TreeCache(), StepLayout.of(model, device)
    config = model.config.get_text_config(decoder=True)
    seen = min(CONTEXT, getattr(config, "max_position_embeddings", None) or CONTEXT) - 1
    prefix = torch.zeros(1, seen, dtype=torch.long, device=device)
    with tree_attention_for(model):
        model(input_ids=prefix, use_cache=True, **{cache_argument(model): cache})
        steps, path = [], [*range(seen)]
        for width in WIDTHS:
            queries = [Query(0, path, seen, [seen + place]) for place in range(width)]
            steps.append(layout.lay_out([queries], [0]))
        best = [float("inf")] * len(WIDTHS)
        begun = time.perf_counter()
        for repeat in range(REPEATS):  # in turn, so that a slow moment strikes all widths
            if repeat > 1 and time.perf_counter() - begun > PATIENCE:
                break
            for place, inputs in enumerate(steps):
                start = time.perf_counter()
                inputs.run(model, cache).flatten()[0].item()  # waits for the device
                best[place] = min(best[place], time.perf_counter() - start)
    for place in reversed(range(len(WIDTHS) - 1)):  # fewer tokens never take longer
        best[place] = min(best[place], best[place + 1])
    return StepTimes(WIDTHS, best)
