"""Many continuations of one prompt at once, by any model: the prompt is fed and held once, each branch is an answer alone.

Nothing is fine-tuned, and no control token is needed: the caller says where the answer splits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from hf_apar.config import AparConfig
from hf_apar.decoding import decode
from hf_apar.errors import ConfigurationError
from hf_apar.generation import generate_in_threads
from hf_apar.generation_settings import padding_token
from hf_apar.results import AparOutput, AparStats
from hf_apar.text.encoding import encode_text
from hf_apar.tree.threads import ParagraphTree, Thread

Branch = str | Sequence[int] | Tensor

# they count from where the prompt ends, which is somewhere else for each branch
_COUNT_FROM_PROMPT = (
    "min_new_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", 
    "exponential_decay_length_penalty", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
)  # fmt: skip


@dataclass
class BranchOutput(ModelOutput):
    """What :func:`branch` returns with ``return_dict_in_generate=True``.

    Attributes:
        sequences: (batch * branches, prompt + longest): prompt, branch and what followed, padded on the right; EOS last
            where the branch ended itself.
        trees: of each prompt, a root that wrote nothing and a thread for each branch.
        stats: what each prompt with all its branches cost.
    """

    sequences: Tensor | None = None
    trees: list[ParagraphTree] | None = None
    stats: list[AparStats] | None = None

    @property
    def threads(self) -> list[list[Thread]]:
        """The thread of each branch, prompt by prompt; its ``sampled_ids`` are what it wrote, ``tokens`` the branch too."""
        return [tree.threads[1:] for tree in self.trees or ()]


def branch(
    model: PreTrainedModel,
    input_ids: Tensor,
    branches: Sequence[Branch] | Sequence[Sequence[Branch]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_threads: int | None = None,
    **generate_options: Any,
) -> BranchOutput | Tensor:
    """Continue each prompt with each of ``branches``, as ``generate`` would continue prompt + branch alone.

    Args:
        input_ids: (batch, prompt), padded on the left, with an ``attention_mask`` among the options then.
        branches: token ids, or texts; the same ones for all prompts, or a list for each prompt, as many for each.
        tokenizer: encodes texts, and finds ``stop_strings``.
        max_threads: branches of a prompt that write at once, all by default; the others wait. Less of them, less memory.
        **generate_options: as those of ``generate``; ``max_new_tokens``, stop strings and EOS bound each branch for itself.

    Returns:
        (batch * branches, prompt + longest), the branches of a prompt one after another; with
        ``return_dict_in_generate=True`` a :class:`BranchOutput`.

    Raises:
        ConfigurationError: for an option that branches cannot follow.

    Example::

        fields = ["Name:", "Date of birth:", "Occupation:"]
        out = hf_apar.branch(model, prompt_ids, fields, tokenizer=tokenizer, stop_strings="\\n", max_new_tokens=32)
    """
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "get_base_model"):
        raise ConfigurationError(f"model is a {type(model).__name__}; pass a model of transformers, or one that PEFT wraps")
    rows = _rows(branches, len(input_ids), tokenizer)
    configs = [one for one in (generate_options.get("generation_config"), model.generation_config) if one is not None]
    _refuse(generate_options, configs)
    loop = partial(decode, branches=rows, branch_length=_given("max_length", generate_options, configs, "max_new_tokens"))
    wants_dict = _given("return_dict_in_generate", generate_options, configs)
    options = {**generate_options, "inputs": input_ids, "return_dict_in_generate": True, "tokenizer": tokenizer}
    threads = max_threads or max(map(len, rows))
    generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
    out: AparOutput = generate_in_threads(model, generate, apar=AparConfig(max_threads=threads), loop=loop, **options)
    assert out.trees is not None
    sequences = _sequences(input_ids, out.trees, configs)
    return BranchOutput(sequences, out.trees, out.stats) if wants_dict else sequences


def _rows(
    branches: Sequence[Branch] | Sequence[Sequence[Branch]], batch: int, tokenizer: PreTrainedTokenizerBase | None
) -> list[list[list[int]]]:
    """Return the token ids of each branch of each prompt."""
    if not len(branches):
        raise ConfigurationError("there are no branches; give at least one, as token ids or as text with tokenizer=")
    nested = not isinstance(first := branches[0], str) and not _is_ids(first)
    rows: list[Any] = list(branches) if nested else [branches] * batch
    sizes = {len(row) for row in rows}
    if len(rows) != batch or len(sizes) != 1 or not min(sizes):
        raise ConfigurationError(
            f"there are branches for {len(rows)} prompts, {sorted(sizes)} for each, and {batch} prompts; give one list for "
            "all, or as many for each prompt"
        )
    return [[_ids(one, tokenizer) for one in row] for row in rows]


def _is_ids(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 1 and not value.is_floating_point()
    return isinstance(value, Sequence) and all(isinstance(one, int) for one in value)


def _ids(branch: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if isinstance(branch, str):
        if tokenizer is None:
            raise ConfigurationError(f"the branch {branch!r} is a text; pass tokenizer=tokenizer, or its token ids")
        return encode_text(tokenizer, branch)
    if not _is_ids(branch):
        raise ConfigurationError(f"a branch is {branch!r}; give a text, or a list or one-dimensional tensor of token ids")
    return [int(one) for one in branch]


def _refuse(options: Mapping[str, Any], configs: Sequence[GenerationConfig]) -> None:
    for name in _COUNT_FROM_PROMPT:
        if _given(name, options, configs) is not None:
            raise ConfigurationError(f"{name} counts from the end of the prompt, and each branch has its own; leave it out")


def _given(name: str, options: Mapping[str, Any], configs: Sequence[GenerationConfig], before: str | None = None) -> Any:
    """Return what a call says of ``name``, its options first; ``None`` where it says nothing, or ``before`` comes before."""
    if before is not None and _given(before, options, configs) is not None:
        return None
    if name in options:
        return options[name]
    return next((value for one in configs if (value := getattr(one, name, None)) is not None), None)


def _sequences(input_ids: Tensor, trees: Sequence[ParagraphTree], configs: Sequence[GenerationConfig]) -> Tensor:
    """Return (batch * branches, longest): prompt, branch and what followed, padded on the right."""
    copies = len(trees) // len(input_ids)
    prompts: list[list[int]] = input_ids.tolist()
    rows = []
    for index, tree in enumerate(trees):
        for thread in tree.threads[1:]:
            new = thread.path_ids[len(tree.threads[0].path_ids) :]
            end = [] if thread.eos_token_id is None else [thread.eos_token_id]
            rows.append([*prompts[index // copies], *new, *end])
    width, pad = max(map(len, rows)), padding_token(configs[0])
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=input_ids.device)
