"""What a step of a model takes on this machine: one of a single token, and one of as many tokens as threads would write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from hf_apar.branches import branch
from hf_apar.data.distillation.samplers import own_settings
from hf_apar.replay import Recorder

STEPS = 16  # of a round
_ROUNDS = 5
_LONG_ENOUGH = 30.0  # seconds after which no other round begins


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Two measured step times, in seconds.

    Attributes:
        one: of a step of one token, by ``generate`` as it is.
        many: of a step of ``threads`` tokens, by :func:`hf_apar.branch`.
        context: tokens before them.
        steps: how many of each were timed, the times being means of them.
        device: where.
    """

    one: float
    many: float
    threads: int
    context: int
    steps: int
    device: str

    def seconds(self, steps: int, sampled: int) -> float:
        """Return what ``steps`` take that make ``sampled`` tokens together, by the line through the two times."""
        slope = max(self.many - self.one, 0.0) / (self.threads - 1)
        return steps * self.one + (sampled - steps) * slope


def measure_steps(model: PreTrainedModel, context_ids: Sequence[int], threads: int) -> StepTimes:
    """Time steps of ``model`` after ``context_ids``, of one token and of ``threads`` of them, two at least, in turns.

    The model need not know how to fork. The times are of all steps together: what slows the machine down counts.
    """
    one, many, rounds, begun = 0.0, 0.0, 0, perf_counter()
    with own_settings(model, GenerationConfig(pad_token_id=0)):  # nothing ends before its last step
        _plain(model, context_ids, 2)
        _threads(model, context_ids, threads, 2)
        while rounds < _ROUNDS and perf_counter() - begun < _LONG_ENOUGH:
            one += _plain(model, context_ids, STEPS)
            many += _threads(model, context_ids, threads, STEPS)
            rounds += 1
    steps = rounds * STEPS
    return StepTimes(
        one=one / steps, many=many / steps, threads=threads, context=len(context_ids), steps=steps, device=str(model.device)
    )


def _plain(model: PreTrainedModel, context_ids: Sequence[int], steps: int) -> float:
    clock = Recorder()
    generate = cast(Callable[..., object], model.generate)  # the stubs take it for a module
    generate(**_options(model, context_ids, steps), streamer=clock)
    return clock.times[-1] - clock.times[0]


def _threads(model: PreTrainedModel, context_ids: Sequence[int], threads: int, steps: int) -> float:
    clock = Recorder()
    options = _options(model, context_ids, steps)
    apart = [[context_ids[-1 - number % len(context_ids)]] for number in range(threads)]  # that they write not all the same
    branch(model, options.pop("input_ids"), apart, streamer=clock, **options)
    return clock.times[-1] - clock.times[0]


def _options(model: PreTrainedModel, context_ids: Sequence[int], steps: int) -> dict[str, Any]:
    ids = torch.tensor([list(context_ids)], device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": steps + 1, "do_sample": False}
