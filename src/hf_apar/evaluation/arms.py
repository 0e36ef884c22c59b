"""The arms by name: what each shows, and how ``NAME``, ``NAME=MODEL`` and ``NAME!CHANGE=VALUE`` are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_apar.errors import ConfigurationError
from hf_apar.evaluation.arm import Arm
from hf_apar.evaluation.models import Loaded, Models
from hf_apar.evaluation.modified import modified
from hf_apar.evaluation.skeleton import SkeletonArm
from hf_apar.speculation.lookup import PromptLookup
from hf_apar.speculation.medusa import MedusaDrafts, MedusaHeads

AnyArm = Arm | SkeletonArm


@dataclass(frozen=True)
class _Kind:
    says: str
    of: str  # which model: base, or apar
    make: Callable[[Loaded], Mapping[str, Any]]
    arm: type[Arm] | type[SkeletonArm] = Arm


def _heads(loaded: Loaded) -> Mapping[str, Any]:
    if loaded.heads is None:
        raise ConfigurationError(
            f"{loaded.name} has no heads; train some with hf-apar train-medusa, or leave out apar+heads"
        )
    return {"apar": True, "proposer": MedusaDrafts(MedusaHeads.load(loaded.heads))}


ARMS: Mapping[str, _Kind] = {
    "base": _Kind("the model before its tuning", "base", lambda _: {}),
    "sequential": _Kind("the base tuned on the same answers, without control tokens", "named", lambda _: {}),
    "plain": _Kind("the APAR checkpoint, both control tokens banned", "apar", lambda _: {}),
    "apar": _Kind("the APAR checkpoint in threads", "apar", lambda _: {"apar": True}),
    "apar+lookup": _Kind(
        "in threads, with prompt lookup in each", "apar", lambda _: {"apar": True, "proposer": PromptLookup(5)}
    ),
    "apar+heads": _Kind("in threads, with Medusa heads in each", "apar", _heads),
    "skeleton": _Kind("Skeleton-of-Thought on the base", "base", lambda _: {}, SkeletonArm),
}
"""By name: what it is, of which model, and what it gives ``generate``."""


def arm_named(text: str, models: Models, seed: int = 0) -> AnyArm:
    """Return the arm that ``NAME``, ``NAME=MODEL`` or either with ``!CHANGE=VALUE`` asks for, one of :data:`ARMS`.

    Without a model it is of the APAR checkpoint that ``models`` has, or of that one's base. A model that is not the
    checkpoint decodes with the checkpoint's repetition penalty, which changes length and likelihood by itself.

    Args:
        seed: of faults.

    Raises:
        ConfigurationError: if there is no arm or change of that name, or it lacks a model or heads.
    """
    head, *changes = text.split("!")
    name, _, source = head.partition("=")
    if (kind := ARMS.get(name)) is None:
        raise ConfigurationError(f"there is no arm {name!r}; take one of {', '.join(ARMS)}, or NAME=MODEL")
    if kind.of == "named" and not source:
        raise ConfigurationError(f"the arm {name} needs its model; give {name}=FOLDER")
    loaded = models.apar(source) if kind.of == "apar" else models.plain(source)
    options = {} if kind.of == "apar" and not source else {"repetition_penalty": models.penalty}
    arm = kind.arm(head, kind.says, loaded, options | {**kind.make(loaded)})
    return modified(arm, changes, seed) if changes else arm
