"""Arms whose threads suffer faults, or are guarded: ``apar!missed=0.1``, ``apar!endless=0.2!most-tokens=200!rewrite=2``."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from transformers import LogitsProcessor

from hf_apar.errors import ConfigurationError
from hf_apar.evaluation.answers import Answered
from hf_apar.evaluation.arms import Arm, arm_named
from hf_apar.evaluation.faults import FAULTS, Fault
from hf_apar.evaluation.models import Models
from hf_apar.evaluation.rewriting import rewrite
from hf_apar.evaluation.strategies import STRATEGIES, Strategy
from hf_apar.evaluation.suites import Prompt
from hf_apar.evaluation.written import Signs
from hf_apar.tree.threads import Decodes, ParagraphTree


@dataclass(frozen=True)
class ModifiedArm:
    """An arm in threads, with what changes its scores, in order, and how many details are written again afterwards."""

    name: str
    says: str
    arm: Arm
    signs: Signs
    makes: tuple[Callable[[Signs, int], LogitsProcessor], ...]
    rewrites: int = 0

    def answer(self, prompt: Prompt, max_new_tokens: int) -> Answered:
        """Answer a prompt as the arm does; the steps of what is written again count too."""
        ids = self.arm.loaded.encoded(prompt)
        processors = [make(self.signs, len(ids)) for make in self.makes]
        options = {**self.arm.options, "logits_processor": processors} | ({"output_scores": True} if self.rewrites else {})
        one = replace(self.arm, name=self.name, options=options).answer(prompt, max_new_tokens)
        return self._rewritten(one, ids, max_new_tokens) if self.rewrites and one.tree else one

    def _rewritten(self, one: Answered, ids: list[int], max_new_tokens: int) -> Answered:
        assert one.tree is not None
        start = time.perf_counter()
        loaded, tree = self.arm.loaded, ParagraphTree.from_dict(one.tree)
        new = rewrite(loaded.model, ids, tree, self.signs, most=self.rewrites, max_new_tokens=max_new_tokens)
        seconds = time.perf_counter() - start
        return replace(
            one,
            text=new.tree.text(cast(Decodes, loaded.tokenizer)),
            ended=bool(new.tree.closing_ids),
            tree=new.tree.to_dict(),
            tokens=len(new.tree.token_ids),
            steps=one.steps + new.steps,
            critical_path=one.critical_path + new.steps,
            seconds=None if one.seconds is None else one.seconds + seconds,
        )


def modified_arm(text: str, models: Models, seed: int = 0) -> ModifiedArm:
    """Return the arm that ``ARM!NAME=VALUE!...`` asks for: faults, strategies, and ``rewrite=COUNT``.

    Args:
        seed: of all faults.

    Raises:
        ConfigurationError: for a name that does not exist, a value that is none, or an arm that is not in threads.
    """
    head, *changes = text.split("!")
    arm = arm_named(head, models)
    if not isinstance(arm, Arm) or not arm.options.get("apar"):
        raise ConfigurationError(f"the arm {head} does not write in threads, so nothing can go wrong with them; take apar")
    values = [_value(change) for change in changes]
    rewrites = sum(int(value) for name, value in values if name == "rewrite")
    makes = tuple(_maker(name, value, seed) for name, value in values if name != "rewrite")
    signs = Signs.of(arm.loaded.model, arm.loaded.tokenizer)
    for make in makes:
        make(signs, 0)  # what does not exist is refused before anything is answered
    return ModifiedArm(text, f"{arm.says}, with {', '.join(changes)}", arm, signs, makes, rewrites)


def _value(change: str) -> tuple[str, float]:
    name, _, value = change.partition("=")
    if name not in {*FAULTS, *STRATEGIES, "rewrite"}:
        raise ConfigurationError(f"there is no {name!r}; take one of {', '.join([*FAULTS, *STRATEGIES, 'rewrite'])}")
    try:
        return name, float(value)
    except ValueError as error:
        raise ConfigurationError(f"{change!r} has no number; give {name}=NUMBER") from error


def _maker(name: str, value: float, seed: int) -> Callable[[Signs, int], LogitsProcessor]:
    return partial(Fault, name, value, seed) if name in FAULTS else partial(Strategy, name, value)
