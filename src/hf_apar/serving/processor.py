"""Where a request may fork: a logits processor that vLLM finds by its entry point, idle for all other requests."""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from hf_apar.serving.engine import ARGUMENT

State = tuple[list[Any], list[int] | None, list[int]]  # the rules, the prompt's ids and, by reference, those made since


class ForkRules(LogitsProcessor):  # type: ignore[misc]
    """Bans [Child] always, and [Fork] at the greatest depth and right after [Fork] or [Child]; adds the bias of [Fork].

    The rules come with ``SamplingParams.extra_args["hf_apar"]``: the ids of both tokens, the bias, and whether the depth
    allows forks. Bans and bias come before penalties and temperature, as in ``model.generate(apar=True)``.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self.requests: dict[int, State] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self.requests, batch_update, _state)

    def apply(self, logits: Tensor) -> Tensor:
        if not self.requests:
            return logits
        rows = torch.tensor(list(self.requests), device=self.device)
        rules = [rules for rules, _, _ in self.requests.values()]
        forks = torch.tensor([one[0] for one in rules], device=self.device)
        children = torch.tensor([one[1] for one in rules], device=self.device)
        bias = [
            one[2] if _may_fork(*state) else -torch.inf for one, state in zip(rules, self.requests.values(), strict=True)
        ]
        logits[rows, forks] += torch.tensor(bias, device=self.device, dtype=logits.dtype)
        logits[rows, children] = -torch.inf
        return logits


def _state(params: Any, prompt_ids: list[int] | None, output_ids: list[int]) -> State | None:
    rules = (params.extra_args or {}).get(ARGUMENT)
    return None if rules is None else (rules, prompt_ids, output_ids)


def _may_fork(rules: list[Any], prompt_ids: list[int] | None, output_ids: list[int]) -> bool:
    last = (output_ids or prompt_ids or [-1])[-1]
    return bool(rules[3]) and last not in rules[:2]
