"""An arm: a way in which a model answers, on the clock or several prompts at once."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from hf_apar.evaluation.answers import Answered
from hf_apar.evaluation.models import Loaded, padded
from hf_apar.evaluation.suites import Prompt
from hf_apar.generation_settings import eos_token_ids
from hf_apar.results import AparOutput, AparStats
from hf_apar.tree.threads import Decodes, ParagraphTree


class Answerer(ABC):
    """What answers prompts."""

    @property
    @abstractmethod
    def together(self) -> bool:
        """Does a batch of prompts cost each of them the steps that it would cost alone?"""

    @abstractmethod
    def in_batch(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answered]:
        """Answer prompts in one batch, without a clock; only one at once if not :attr:`together`."""

    def answers(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answered]:
        """Answer prompts, in one batch where that can be, without a clock."""
        size = len(prompts) if self.together else 1
        batches = (prompts[start : start + size] for start in range(0, len(prompts), size))
        return [one for batch in batches for one in self.in_batch(batch, max_new_tokens)]

    def answer(self, prompt: Prompt, max_new_tokens: int) -> Answered:
        """Answer a prompt by itself, on the clock."""
        start = time.perf_counter()
        (one,) = self.in_batch([prompt], max_new_tokens)
        return replace(one, seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class Arm(Answerer):
    """A way of answering: greedily, unless ``options`` say otherwise.

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

    @property
    def together(self) -> bool:
        return not self.options.get("proposer")  # a batch has fewer drafts a row

    def in_batch(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answered]:
        rows = [self.loaded.encoded(prompt) for prompt in prompts]
        batch = padded(rows, self.loaded.model)
        generate = cast(Callable[..., Any], self.loaded.model.generate)
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "return_dict_in_generate": True} | {**self.options}
        out = generate(**batch, **settings)
        if isinstance(out, AparOutput):
            assert out.trees is not None and out.stats is not None
            return [self._of_threads(*one) for one in zip(prompts, out.trees, out.stats, strict=True)]
        new = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
        return [self._of_one(prompt, len(ids), tokens) for prompt, ids, tokens in zip(prompts, rows, new, strict=True)]

    def _of_threads(self, prompt: Prompt, tree: ParagraphTree, stats: AparStats) -> Answered:
        counts = {name: value for name, value in asdict(stats).items() if name != "seconds"}
        text = tree.text(cast(Decodes, self.loaded.tokenizer))
        return Answered(
            key=prompt.key, arm=self.name, text=text, ended=bool(tree.closing_ids), tree=tree.to_dict(), **counts
        )

    def _of_one(self, prompt: Prompt, given: int, row: list[int]) -> Answered:
        new, ended = up_to_end(row, eos_token_ids(self.loaded.model.generation_config))
        tokens, held = len(new) - ended, given + len(new) - 1
        seen = sum(range(given + 1, given + len(new)))
        text = cast(Decodes, self.loaded.tokenizer).decode(new, skip_special_tokens=True)
        return Answered(
            key=prompt.key, arm=self.name, text=text, ended=ended, tokens=tokens, steps=len(new),
            critical_path=len(new), peak_kv=held, kv_if_sequential=held, attended=seen, attended_if_sequential=seen,
        )  # fmt: skip


def up_to_end(row: list[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    """Return a row of a batch without what pads it, and whether it ended.

    >>> up_to_end([5, 6, 2, 0, 0], ends=[2]), up_to_end([5, 6], ends=[2])
    (([5, 6, 2], True), ([5, 6], False))
    """
    end = next((place for place, token in enumerate(row) if token in ends), None)
    return (row, False) if end is None else (row[: end + 1], True)
