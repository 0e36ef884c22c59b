"""Many continuations of one prompt at once, by any model: the prompt is fed and held once, each branch is an answer alone.

Nothing is fine-tuned, and no control token is needed: the caller says where the answer splits.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.utils.generic import ModelOutput

from hf_apar.checks import validate_generation, validate_length
from hf_apar.choice.stopping import with_limits
from hf_apar.config import AparConfig
from hf_apar.decoding import Branches, decode
from hf_apar.errors import ConfigurationError
from hf_apar.forward.prompts import Prompts
from hf_apar.generation import generate_in_threads
from hf_apar.generation_settings import eos_token_ids, padding_token
from hf_apar.protocol import NoForks
from hf_apar.results import AparOutput, AparStats
from hf_apar.speculation.proposer import Proposer
from hf_apar.streaming import ended_by_errors
from hf_apar.text.encoding import decode_text, encode_text
from hf_apar.tokens import embedding_rows
from hf_apar.tree.budget import BranchBudget
from hf_apar.tree.threads import ParagraphTree, Thread

Branch = str | Sequence[int] | Tensor

# they count from where the prompt ends, which is somewhere else for each branch
_COUNT_FROM_PROMPT = {
    "min_new_tokens": None, "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0,
}  # fmt: skip
_OWN = ("apar", "protocol", "custom_generate", "inputs", "inputs_embeds")


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

    @property
    def logprobs(self) -> list[list[list[float]]]:
        """With ``output_scores=True``, the log probability of each token that a branch wrote, EOS included."""
        return [[list(thread.logprobs or ()) for thread in row] for row in self.threads]

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
        """Return what each branch wrote, prompt by prompt, without the branch itself and without special tokens."""
        return [[decode_text(tokenizer, thread.path_ids[thread.start :]) for thread in row] for row in self.threads]


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
        branches: token ids, or texts; the same ones for all prompts, or a list for each prompt, as many for each. The
            branch ``[]`` or ``""`` is the prompt itself.
        tokenizer: encodes texts, without special tokens, and finds ``stop_strings``.
        max_threads: branches of a prompt that write at once, all by default; the others wait. Less of them, less memory.
        **generate_options: as those of ``generate``; ``max_new_tokens``, stop strings and EOS bound each branch for itself.

    Returns:
        (batch * branches, prompt + longest), the branches of a prompt one after another; with
        ``return_dict_in_generate=True`` a :class:`BranchOutput`. ``num_return_sequences`` counts as so many prompts.

    Raises:
        ConfigurationError: for an option that branches cannot follow, or branches that are none.

    Example::

        fields = ["Name:", "Date of birth:", "Occupation:"]
        options = {"tokenizer": tokenizer, "stop_strings": "\\n", "max_new_tokens": 32}
        out = hf_apar.branch(model, prompt_ids, fields, return_dict_in_generate=True, **options)
        out.texts(tokenizer)  # [[" Ada Lovelace\\n", ...]]
    """
    with ended_by_errors(generate_options.get("streamer")):
        _check(model, input_ids, generate_options)
        rows = _rows(branches, len(input_ids), tokenizer, embedding_rows(model))
        threads = max(map(len, rows)) if max_threads is None else max_threads
        apar = AparConfig(max_threads=threads)
    configs = (generate_options.get("generation_config"), model.generation_config)
    lengths = (generate_options.get("max_length"), *(getattr(one, "max_length", None) for one in configs))
    bounded = any(length is not None for length in lengths)  # else generate's 20 new tokens
    options = {**generate_options, "inputs": input_ids, "tokenizer": tokenizer}
    generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
    loop = partial(_decode, branches=rows, bounded=bounded)
    result: BranchOutput | Tensor = generate_in_threads(model, generate, apar=apar, loop=loop, **options)
    return result


def _decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    branches: Sequence[Branches],
    bounded: bool,
    apar: AparConfig,
    protocol: None,
    streamer: object | None,
    proposer: Proposer | None,
    **model_kwargs: Any,
) -> BranchOutput | Tensor:
    """Decode what ``generate`` prepared; ``bounded``: has the caller set a ``max_length``?"""
    validate_generation(generation_config, model_kwargs)
    for name, unused in _COUNT_FROM_PROMPT.items():
        if getattr(generation_config, name, None) not in (None, unused):
            raise ConfigurationError(f"{name} counts from the end of the prompt, and each branch has its own; leave it out")
    length = int(generation_config.max_length)
    if any(one.max_length != length for one in stopping_criteria if isinstance(one, MaxLengthCriteria)):
        raise ConfigurationError("a MaxLengthCriteria counts the prompt too; pass max_length or max_new_tokens instead")
    config = copy.copy(generation_config)
    config.return_dict_in_generate = True
    limit = length if bounded and generation_config.max_new_tokens is None else None
    each = [branches[index * len(branches) // len(input_ids)] for index in range(len(input_ids))]
    _check_lengths(model, Prompts.from_generate(input_ids, config, model_kwargs), each, limit)
    # a max_length counts what branches begin with too
    injected = max(len(ids) for row in branches for ids in row) if limit is None else 0
    out = decode(
        model, input_ids, logits_processor, stopping_criteria, config, apar=apar, streamer=streamer, proposer=proposer,
        protocol=NoForks(frozenset(eos_token_ids(with_limits(config, stopping_criteria))), most_injected=injected),
        branches=each, budget=partial(BranchBudget, length=limit), **model_kwargs,
    )  # fmt: skip
    assert isinstance(out, AparOutput) and out.trees is not None
    sequences = _sequences(input_ids, out.trees, padding_token(generation_config))
    return BranchOutput(sequences, out.trees, out.stats) if generation_config.return_dict_in_generate else sequences


def _check_lengths(model: PreTrainedModel, prompts: Prompts, branches: Sequence[Branches], limit: int | None) -> None:
    longest = max(prompt.slots + len(ids) for prompt, row in zip(prompts.rows(), branches, strict=True) for ids in row)
    validate_length(longest, model)
    if limit is not None and longest >= limit:
        raise ConfigurationError(
            f"max_length is {limit}, and a prompt with its branch has {longest} tokens; pass max_new_tokens, which counts "
            "what a branch writes alone"
        )


def _sequences(input_ids: Tensor, trees: Sequence[ParagraphTree], pad: int) -> Tensor:
    """Return (batch * branches, longest): prompt, branch and what followed, padded on the right."""
    rows: list[list[int]] = []
    for prompt, tree in zip(input_ids.tolist(), trees, strict=True):
        for thread in tree.threads[1:]:
            new = thread.path_ids[len(tree.threads[0].path_ids) :]
            rows.append([*prompt, *new, *([] if thread.eos_token_id is None else [thread.eos_token_id])])
    width = max(map(len, rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=input_ids.device)


def _check(model: object, input_ids: object, options: dict[str, Any]) -> None:
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "get_base_model"):
        raise ConfigurationError(f"model is a {type(model).__name__}; pass a model of transformers, or one that PEFT wraps")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel() or input_ids.is_floating_point():
        got = f"a {input_ids.dtype} of shape {tuple(input_ids.shape)}" if isinstance(input_ids, Tensor) else repr(input_ids)
        raise ConfigurationError(f"input_ids is {got}; pass a tensor of token ids of shape (batch, prompt)")
    for name in _OWN:
        if options.get(name) is not None:
            raise ConfigurationError(f"{name} cannot be combined with branches: they go on from input_ids; leave it out")


def _rows(
    branches: Sequence[Branch] | Sequence[Sequence[Branch]],
    batch: int,
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
) -> list[list[list[int]]]:
    """Return the token ids of each branch of each prompt."""
    if isinstance(branches, str) or not isinstance(branches, Sequence | Tensor) or not len(branches):
        raise ConfigurationError(f"branches is {branches!r}; give a list of one at least, of token ids or of text")
    nested = not isinstance(first := branches[0], str) and isinstance(first, Sequence) and not _is_ids(first)
    rows: list[Any] = list(branches) if nested else [branches] * batch
    sizes = {0 if isinstance(row, str) else len(row) for row in rows}
    if len(rows) != batch or len(sizes) != 1 or not min(sizes):
        raise ConfigurationError(
            f"there are branches for {len(rows)} prompts, {sorted(sizes)} for each, and {batch} prompts; give one list for "
            "all, or as many for each prompt"
        )
    return [[_ids(one, tokenizer, vocabulary) for one in row] for row in rows]


def _is_ids(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 1 and not (value.numel() and value.is_floating_point())
    return isinstance(value, Sequence) and all(isinstance(one, Integral) for one in value)


def _ids(branch: Any, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> list[int]:
    if isinstance(branch, str):
        if tokenizer is None:
            raise ConfigurationError(f"the branch {branch!r} is a text; pass tokenizer=tokenizer, or its token ids")
        return encode_text(tokenizer, branch)
    if not _is_ids(branch):
        raise ConfigurationError(f"a branch is {branch!r}; give a text, or a list or one-dimensional tensor of token ids")
    ids = [int(one) for one in branch]
    if strange := [one for one in ids if not 0 <= one < vocabulary]:
        raise ConfigurationError(f"a branch has the token id {strange[0]}, and the model's vocabulary {vocabulary} tokens")
    return ids
