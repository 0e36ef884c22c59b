"""Memory that runs out in the midst of an answer: the model is as it was, and the next answer is right."""

import random
from typing import Any

import torch

from hf_apar.forward import attention
from oracle import left_padded, random_prompts
from storm import exactness
from storm.storms import Scenario, Storm

ERRORS = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "python": lambda: MemoryError(),
}


def draw(draw: random.Random) -> Scenario:
    return exactness.draw(draw) | {"module": draw.randrange(10**4), "call": draw.choice((0, 0, 1, 3, 9)),
                                   "error": draw.choice(list(ERRORS))}  # fmt: skip


def _state(model: Any) -> list[Any]:
    hooks = [(len(one._forward_hooks), len(one._forward_pre_hooks), sorted(vars(one))) for one in model.modules()]
    return [model.config._attn_implementation, model.generation_config.to_dict(), type(model), hooks]


@torch.no_grad()
def check(module: int, call: int, error: str, **scenario: Any) -> None:
    """An allocation fails in some module at some call; the model and the next answer are those of a run without."""
    _, enabled = exactness.models(scenario["family"], scenario["attention"])
    given = left_padded(random_prompts(max(scenario["batch"], 1), scenario["prompts"], shortest=4, longest=16))

    def answer() -> list[list[int]]:
        torch.manual_seed(scenario["prompts"])
        out = enabled.generate(**given, **exactness.options(scenario, enabled, given), return_dict_in_generate=True)
        return [tree.token_ids for tree in out.trees]

    expected, before = answer(), _state(enabled)
    calls = iter(range(10**9))

    def fails(*_: object) -> None:
        if next(calls) == call:
            raise ERRORS[error]()

    parts = list(enabled.modules())
    hook = parts[module % len(parts)].register_forward_pre_hook(fails)
    try:
        answer()
    except (RuntimeError, MemoryError) as raised:
        assert type(raised) is type(ERRORS[error]()) and str(raised) == str(ERRORS[error]()), f"{raised!r} hides it"
    finally:
        hook.remove()
    assert _state(enabled) == before, "the model is changed"
    assert not attention._SWITCHED and attention._STEP.get() is None, "its attention is still switched"
    assert answer() == expected, "another answer than before"


STORM = Storm("memory", draw, check, share=0.5)
