"""An arm: a way in which a model answers, on the clock."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch

from hf_apar.evaluation.answers import Answered
from hf_apar.evaluation.models import Loaded
from hf_apar.evaluation.suites import Prompt
from hf_apar.generation_settings import eos_token_ids
from hf_apar.results import AparOutput
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
