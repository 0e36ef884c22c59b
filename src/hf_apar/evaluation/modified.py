"""Arms with other settings, or whose threads suffer faults: ``apar!missed=0.1``, ``apar!fork-bias=1``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hf_apar.config import AparConfig
from hf_apar.errors import ConfigurationError
from hf_apar.evaluation.answers import Answered
from hf_apar.evaluation.arm import Arm
from hf_apar.evaluation.faults import FAULTS, Fault
from hf_apar.evaluation.skeleton import SkeletonArm
from hf_apar.evaluation.suites import Prompt

PENALTY = "repetition-penalty"
SETTINGS: Mapping[str, Callable[[float], Mapping[str, Any]]] = {
    "fork-bias": lambda value: {"fork_bias": value},
    "max-depth": lambda value: {"max_depth": int(value)},
    PENALTY: lambda value: {"repetition_penalty": value},
}
"""What ``generate`` is told in place of the checkpoint's setting, by name: a penalty, or settings of ``AparConfig``."""


@dataclass(frozen=True)
class FaultyArm(Arm):
    """An arm whose threads suffer faults, which each of ``makes`` makes for a length of padded prompts."""

    makes: tuple[Callable[[int], Fault], ...] = ()

    def in_batch(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answered]:
        length = max(len(self.loaded.encoded(prompt)) for prompt in prompts)
        options = {**self.options, "logits_processor": [make(length) for make in self.makes]}
        return Arm(self.name, self.says, self.loaded, options).in_batch(prompts, max_new_tokens)


def modified(arm: Arm | SkeletonArm, changes: Sequence[str], seed: int = 0) -> Arm:
    """Return ``arm`` with ``changes``, ``NAME=VALUE`` each, of :data:`SETTINGS` and faults.

    Args:
        seed: of all faults.

    Raises:
        ConfigurationError: for a name that does not exist, a value that is none, or a change of threads
            where there are none.
    """
    values = [_value(change) for change in changes]
    in_threads = isinstance(arm, Arm) and bool(arm.options.get("apar"))
    if isinstance(arm, SkeletonArm) or (not in_threads and any(name != PENALTY for name, _ in values)):
        raise ConfigurationError(f"the arm {arm.name} does not write in threads, so nothing of them can change; take apar")
    name, says = "!".join((arm.name, *changes)), f"{arm.says}, with {', '.join(changes)}"
    settings = {key: one for name, value in values if name in SETTINGS for key, one in SETTINGS[name](value).items()}
    given = {"repetition_penalty": settings.pop("repetition_penalty")} if "repetition_penalty" in settings else {}
    threads = {"apar": AparConfig(**settings)} if settings else {}
    arm = replace(arm, name=name, says=says, options={**arm.options, **given, **threads})
    faults = [(name, value) for name, value in values if name in FAULTS]
    if not faults:
        return arm
    makes = tuple(partial(Fault, name, value, seed, arm.loaded.signs) for name, value in faults)
    for make in makes:
        make(0)  # what cannot be is refused before anything is answered
    return FaultyArm(arm.name, arm.says, arm.loaded, arm.options, makes)


def _value(change: str) -> tuple[str, float]:
    name, _, value = change.partition("=")
    if name not in (names := [*SETTINGS, *FAULTS]):
        raise ConfigurationError(f"there is no change {name!r}; take one of {', '.join(names)}")
    try:
        return name, float(value)
    except ValueError as error:
        raise ConfigurationError(f"{change!r} has no number; give {name}=NUMBER") from error

