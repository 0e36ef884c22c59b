"""Arms with other settings, or whose threads suffer faults or are guarded: ``apar!missed=0.1``, ``apar!fork-bias=1``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from transformers import LogitsProcessor

from hf_apar.config import AparConfig
from hf_apar.errors import ConfigurationError
from hf_apar.evaluation.answers import Answered
from hf_apar.evaluation.arm import Answerer, Arm
from hf_apar.evaluation.faults import FAULTS, Fault
from hf_apar.evaluation.models import Loaded
from hf_apar.evaluation.rewriting import rewrite
from hf_apar.evaluation.skeleton import SkeletonArm
from hf_apar.evaluation.strategies import STRATEGIES, Strategy
from hf_apar.evaluation.suites import Prompt
from hf_apar.evaluation.written import Signs
from hf_apar.tree.threads import Decodes, ParagraphTree

PENALTY = "repetition-penalty"
_SLOTS = ("peak_kv", "kv_if_sequential", "attended", "attended_if_sequential")
DETAIL = 128  # tokens of a detail that is written again; one that has not ended by then stays as it was
SETTINGS: Mapping[str, Callable[[float], Mapping[str, Any]]] = {
    "fork-bias": lambda value: {"fork_bias": value},
    "max-depth": lambda value: {"max_depth": int(value)},
    PENALTY: lambda value: {"repetition_penalty": value},
}
"""What ``generate`` is told in place of the checkpoint's setting, by name: a penalty, or settings of ``AparConfig``."""


@dataclass(frozen=True)
class ModifiedArm(Answerer):
    """An arm in threads, with what changes its scores, in order, and how many details are written again afterwards."""

    arm: Arm
    signs: Signs
    makes: tuple[Callable[[Signs, int], LogitsProcessor], ...]
    rewrites: int = 0

    @property
    def name(self) -> str:
        return self.arm.name

    @property
    def says(self) -> str:
        return self.arm.says

    @property
    def loaded(self) -> Loaded:
        return self.arm.loaded

    @property
    def together(self) -> bool:
        return self.arm.together

    def in_batch(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answered]:
        """Answer prompts as the arm does; what a strategy makes end has not ended by itself.

        The steps of what is written again, an answer at a time, count too; of slots nothing is known then.
        """
        rows = [self.loaded.encoded(prompt) for prompt in prompts]
        processors = [make(self.signs, max(map(len, rows))) for make in self.makes]
        options = {**self.arm.options, "logits_processor": processors} | ({"output_scores": True} if self.rewrites else {})
        found = replace(self.arm, options=options).in_batch(prompts, max_new_tokens)
        cut = {prompt for processor in processors if isinstance(processor, Strategy) for prompt in processor.cut}
        found = [replace(one, ended=one.ended and tuple(ids) not in cut) for one, ids in zip(found, rows, strict=True)]
        return [
            self._rewritten(one, ids, max_new_tokens) if self.rewrites and one.tree else one
            for one, ids in zip(found, rows, strict=True)
        ]

    def _rewritten(self, one: Answered, ids: list[int], max_new_tokens: int) -> Answered:
        assert one.tree is not None
        loaded, tree = self.arm.loaded, ParagraphTree.from_dict(one.tree)
        bound = min(max_new_tokens, DETAIL)
        new = rewrite(loaded.model, ids, tree, self.signs, most=self.rewrites, max_new_tokens=bound)
        slots: dict[str, Any] = dict.fromkeys(_SLOTS, 0) if new.steps else {}  # what new steps read and held is not known
        return replace(
            one,
            text=new.tree.text(cast(Decodes, loaded.tokenizer)),
            ended=bool(new.tree.closing_ids),
            tree=new.tree.to_dict(),
            tokens=len(new.tree.token_ids),
            steps=one.steps + new.steps,
            critical_path=one.critical_path + new.steps,
            **slots,
        )


def modified(arm: Arm | SkeletonArm, changes: Sequence[str], seed: int = 0) -> Arm | ModifiedArm:
    """Return ``arm`` with ``changes``, ``NAME=VALUE`` each: of :data:`SETTINGS`, faults, strategies, and ``rewrite=COUNT``.

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
    others = [(name, value) for name, value in values if name not in SETTINGS]
    if not others:
        return arm
    rewrites = sum(int(value) for name, value in others if name == "rewrite")
    makes = tuple(_maker(name, value, seed) for name, value in others if name != "rewrite")
    signs = arm.loaded.signs
    for make in makes:
        make(signs, 0)  # what does not exist is refused before anything is answered
    return ModifiedArm(arm, signs, makes, rewrites)


def _value(change: str) -> tuple[str, float]:
    name, _, value = change.partition("=")
    if name not in (names := [*SETTINGS, *FAULTS, *STRATEGIES, "rewrite"]):
        raise ConfigurationError(f"there is no change {name!r}; take one of {', '.join(names)}")
    try:
        return name, float(value)
    except ValueError as error:
        raise ConfigurationError(f"{change!r} has no number; give {name}=NUMBER") from error


def _maker(name: str, value: float, seed: int) -> Callable[[Signs, int], LogitsProcessor]:
    return partial(Fault, name, value, seed) if name in FAULTS else partial(Strategy, name, value)
