"""The prompts of a batch, whatever form they come in, and their prefill as ``generate`` does it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from hf_apar.errors import ConfigurationError, ControlTokenError
from hf_apar.forward.cache import TreeCache
from hf_apar.forward.devices import input_device, is_split
from hf_apar.releases import GENERATE_CACHE, cache_argument, without_cache


@dataclass(frozen=True)
class PromptRow:
    """One row: the ids that are known, the slots that its prompt takes, and those that padding takes below them."""

    ids: list[int]
    slots: int
    padding: int


@dataclass(frozen=True)
class Prompts:
    """Token ids, embeddings, or either of them after a prefix that is in a cache already.

    Attributes:
        input_ids: integers (batch, known); fewer than ``span`` where embeddings or a cached prefix stand for the others.
        attention_mask: (batch, span), ``None`` where nothing is padding.
        span: positions of the prefix and the prompt together, padding included.
        prefix: keys and values of the first positions, left as they are; ``None`` for none.
        model_kwargs: what else ``generate`` hands to the model.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    span: int
    prefix: DynamicCache | None
    model_kwargs: Mapping[str, Any]

    @classmethod
    def from_generate(
        cls, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: Mapping[str, Any]
    ) -> "Prompts":
        """Take the prompts out of what ``generate`` prepared.

        Raises:
            ConfigurationError: if the cache given is not a plain one of the whole prefix, or the prompt adds nothing to it,
                or ``position_ids`` are not those that follow from the mask.
        """
        cache, rest = without_cache(model_kwargs)
        mask, embeds = rest.pop("attention_mask", None), rest.get("inputs_embeds")
        if embeds is not None:
            span = embeds.shape[1]
        elif mask is not None:
            span = mask.shape[1]
        else:  # generate drops a mask of ones, and notes its length: it covers a prefix whose ids are not given again
            span = getattr(generation_config, "_mask_length", None) or input_ids.shape[1]
        prompts = cls(input_ids, mask, span, _checked_prefix(cache, len(input_ids), span), rest)
        prompts._check_positions(rest.pop("position_ids", None))
        return prompts

    @property
    def past(self) -> int:
        """Positions that the prefix holds."""
        return 0 if self.prefix is None else self.prefix.get_seq_length()

    def device(self, model: PreTrainedModel) -> torch.device:
        """Return where the model takes its inputs."""
        return input_device(model, self.input_ids.device)

    def rows(self, control_ids: Collection[int] = ()) -> list[PromptRow]:
        """Return each row without its left padding.

        Raises:
            ControlTokenError: if a prompt holds a control token.
            ConfigurationError: if a row is padded anywhere but on the left, or empty.
        """
        ids: list[list[int]] = self.input_ids.tolist()
        masks = [[1] * self.span for _ in ids] if self.attention_mask is None else self.attention_mask.long().tolist()
        return [self._row(index, row, mask, control_ids) for index, (row, mask) in enumerate(zip(ids, masks, strict=True))]

    def _row(self, index: int, ids: list[int], mask: list[int], control_ids: Collection[int]) -> PromptRow:
        if mask != sorted(mask) or not mask or not mask[-1]:
            raise ConfigurationError(
                f"row {index} of attention_mask has zeros after its first token; pad on the left (tokenizer.padding_side = "
                "'left') and leave at least one token"
            )
        padding = self.span - sum(mask)
        known = ids[max(0, padding - (self.span - len(ids))) :]
        for token in control_ids:
            if token in known:
                raise ControlTokenError(
                    f"the prompt of row {index} holds a control token (id {token}); text must not fork: tokenise it with "
                    "split_special_tokens=True, or use hf_apar.encode_chat"
                )
        return PromptRow(known, self.span - padding, padding)

    def prefill(self, model: PreTrainedModel, cache: TreeCache, chunk_size: int | None = None) -> Tensor:
        """Feed the prompts in chunks of ``chunk_size``; return the logits of their last tokens, (batch, vocabulary)."""
        if self.prefix is not None:
            for index, (keys, values, *_) in enumerate(self.prefix):
                cache.update(keys, values, index)
        device, logits = self.device(model), torch.empty(0)
        positions = self._positions().to(device)
        options = {**self.model_kwargs, "use_cache": True}
        prepare: Callable[..., dict[str, Any]] = model.prepare_inputs_for_generation  # type: ignore[assignment]
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        for start in range(self.past, self.span, chunk_size or self.span):
            end = min(start + (chunk_size or self.span), self.span)
            known = self.input_ids[:, : self.input_ids.shape[1] - (self.span - end)].to(device)
            embeds = self.model_kwargs.get("inputs_embeds")
            if "logits_to_keep" in options and not is_split(model):
                # by index: of a slice, torch copies the output layer's weights in bfloat16
                options["logits_to_keep"] = torch.tensor([end - start - 1], device=device)
            prepared = partial(
                prepare,
                known,
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=positions[:, :end],
                is_first_iteration=True,
                **{**options, "inputs_embeds": None if embeds is None else embeds[:, :end]},
            )
            kept, inputs = without_cache(prepared(next_sequence_length=end - start, **{GENERATE_CACHE: cache}))
            if kept is not cache:  # the model begins anew: Phi3 beyond its first window
                _, inputs = without_cache(prepared(next_sequence_length=end, **{GENERATE_CACHE: None}))
                cache.reset()  # type: ignore[no-untyped-call]
                if "logits_to_keep" in inputs:
                    inputs["logits_to_keep"] = 1
            logits = model(**inputs, **{cache_argument(model): cache}, return_dict=True).logits
        return logits[:, -1]

    def _positions(self) -> Tensor:
        """Return the position of each token among its row's own, (batch or 1, span)."""
        if self.attention_mask is None:
            return torch.arange(self.span, device=self.input_ids.device)[None]
        return (self.attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def _check_positions(self, given: Tensor | None) -> None:
        if given is None:
            return
        expected = self._positions().to(given.device)[:, -given.shape[-1] :]
        mask = None if self.attention_mask is None else self.attention_mask[:, -given.shape[-1] :].to(given.device)
        differs = given != expected
        if bool((differs if mask is None else differs & mask.bool()).any()):
            raise ConfigurationError(
                "position_ids other than those that follow from attention_mask cannot be combined with apar, which counts "
                "positions along each thread's path; leave them out"
            )


def _checked_prefix(cache: DynamicCache | None, batch: int, span: int) -> DynamicCache | None:
    if cache is not None and type(cache) not in (DynamicCache, TreeCache):
        raise ConfigurationError(
            f"past_key_values is a {type(cache).__name__}, and apar takes a DynamicCache: its threads share a cache of "
            "their own, into which a prefix is copied; leave it out, or prefill the prefix into a DynamicCache"
        )
    if cache is None or cache.get_seq_length() == 0:
        return None
    length = cache.get_seq_length()
    for keys, *_ in cache:
        if keys.shape[0] != batch or keys.shape[2] != length:
            raise ConfigurationError(
                f"past_key_values holds {keys.shape[0]} rows and {keys.shape[2]} of {length} positions, wanted {batch} rows "
                "and all positions; repeat the rows (batch_repeat_interleave), or prefill into a "
                "DynamicCache() without a config, which keeps what a sliding window would drop"
            )
    if length >= span:
        raise ConfigurationError(
            f"past_key_values holds {length} positions and the prompt has {span}, its prefix included; pass a prompt that "
            "goes on after the prefix"
        )
    return cache
