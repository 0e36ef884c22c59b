"""Ways in which an answer is made, each with a name and a line that says what it shows."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch

from hf_apar.errors import ConfigurationError
from hf_apar.evaluation.answers import Answered
from hf_apar.evaluation.models import Loaded, Models
from hf_apar.evaluation.run import Answers
from hf_apar.evaluation.skeleton import SkeletonArm
from hf_apar.evaluation.suites import Prompt
from hf_apar.generation_settings import eos_token_ids
from hf_apar.results import AparOutput
from hf_apar.speculation.lookup import PromptLookup
from hf_apar.speculation.medusa import MedusaDrafts, MedusaHeads
from hf_apar.tree.threads import Decodes


@dataclass(frozen=True)
class Arm:
    """A way of answering.

    Attributes:
        name: in files and tables.
        says: what it is.
        loaded: the model.
        options: of ``generate``; ``apar`` among them where threads write.
    """

    name: str
    says: str
    loaded: Loaded
    options: Mapping[str, Any] = field(default_factory=dict)

    def answer(self, prompt: Prompt, max_new_tokens: int) -> Answered:
        """Answer a prompt by itself, greedily unless ``options`` say otherwise, and on the clock."""
        model, ids = self.loaded.model, self.loaded.encoded(prompt)
        generate = cast(Callable[..., Any], model.generate)
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "return_dict_in_generate": True} | {**self.options}
        start = time.perf_counter()
        out = generate(input_ids=torch.tensor([ids], device=model.device), **settings)
        seconds = time.perf_counter() - start
        return (
            self._of_threads(prompt, out, seconds)
            if isinstance(out, AparOutput)
            else self._of_one(prompt, ids, out, seconds)
        )

    def _of_threads(self, prompt: Prompt, out: AparOutput, seconds: float) -> Answered:
        assert out.trees is not None and out.stats is not None
        (tree,), (stats,) = out.trees, out.stats
        counts = {name: value for name, value in asdict(stats).items() if name != "seconds"}
        text = tree.text(cast(Decodes, self.loaded.tokenizer))
        return Answered(
            key=prompt.key,
            arm=self.name,
            text=text,
            ended=bool(tree.closing_ids),
            seconds=seconds,
            tree=tree.to_dict(),
            **counts,
        )

    def _of_one(self, prompt: Prompt, ids: list[int], out: Any, seconds: float) -> Answered:
        new = out.sequences[0, len(ids) :].tolist()
        ended = bool(new) and new[-1] in eos_token_ids(self.loaded.model.generation_config)
        tokens, held = len(new) - ended, len(ids) + len(new) - 1
        seen = sum(range(len(ids) + 1, len(ids) + len(new)))
        text = cast(Decodes, self.loaded.tokenizer).decode(new, skip_special_tokens=True)
        return Answered(
            key=prompt.key, arm=self.name, text=text, ended=ended, seconds=seconds, tokens=tokens, steps=len(new),
            critical_path=len(new), peak_kv=held, kv_if_sequential=held, attended=seen, attended_if_sequential=seen,
        )  # fmt: skip


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


def arm_named(text: str, models: Models) -> Answers:
    """Return the arm that ``NAME`` or ``NAME=MODEL`` asks for, one of :data:`ARMS`.

    Without a model it is of the APAR checkpoint that ``models`` has, or of that one's base.

    Raises:
        ConfigurationError: if there is no arm of that name, or it lacks a model or heads.
    """
    name, _, source = text.partition("=")
    if (kind := ARMS.get(name)) is None:
        raise ConfigurationError(f"there is no arm {name!r}; take one of {', '.join(ARMS)}, or NAME=MODEL")
    if kind.of == "named" and not source:
        raise ConfigurationError(f"the arm {name} needs its model; give {name}=FOLDER")
    loaded = models.apar(source) if kind.of == "apar" else models.plain(source)
    return kind.arm(text, kind.says, loaded, models.options | {**kind.make(loaded)})
