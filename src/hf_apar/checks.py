"""Input checks, once, at the boundary: what cannot follow a tree is refused with the way out."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from hf_apar.errors import ConfigurationError, UnsupportedModelError
from hf_apar.forward.attention import TREE_ATTENTION
from hf_apar.forward.cache import layer_windows
from hf_apar.processes import process_count
from hf_apar.releases import CACHE_NAMES, warn_outside_range
from hf_apar.streaming import as_list

_MODEL_KWARGS = ("attention_mask", "position_ids", *CACHE_NAMES, "inputs_embeds", "use_cache", "logits_to_keep")
_MASKS_BY_SLOT = ("gpt_neo", "doge")  # the latter's has one mask for each head, too
_ATTENTION = ("eager", "sdpa", "flex_attention", TREE_ATTENTION)


def validate_model(model: PreTrainedModel) -> None:
    """Raise :class:`UnsupportedModelError` for a model whose layers or attention cannot attend along a tree."""
    warn_outside_range()
    validate_layers(model)
    if (attention := model.config.get_text_config(decoder=True)._attn_implementation) not in _ATTENTION:
        raise UnsupportedModelError(
            f"{type(model).__name__} uses {attention} attention, which takes no tree mask while decoding; load it with "
            f"attn_implementation='sdpa' or 'eager'"
        )


def validate_layers(model: PreTrainedModel) -> None:
    """Raise :class:`UnsupportedModelError` for a model whose layers cannot attend along a tree, whatever the attention."""
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if not model.can_generate():
        raise UnsupportedModelError(f"{name} cannot generate, it has no output layer; load it with AutoModelForCausalLM")
    # a PEFT model lends its base this method while it generates
    if learns_prompts(model) or learns_prompts(getattr(model.prepare_inputs_for_generation, "__self__", None)):
        raise UnsupportedModelError(
            "a prompt-learning adapter puts virtual tokens before the prompt, which a tree mask does not know; use LoRA"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; APAR needs a decoder-only model")
    if unknown := set(layer_windows(config)) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"{name} has layers of kind {', '.join(sorted(unknown))}, which keep a state that threads cannot share; use a "
            "model with full or sliding-window attention"
        )
    if config.model_type in _MASKS_BY_SLOT:
        raise UnsupportedModelError(
            f"{name} masks attention by itself, by the places of the cache, where threads lie in no order; use a model that "
            "leaves masks to transformers"
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModelError(f"{name} has recurrent layers, whose state threads cannot share")
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        raise UnsupportedModelError(
            f"{name} takes no position_ids (ALiBi, or positions from the cache's length); APAR needs them, since threads "
            "share positions: use a model with rotary or learned positions"
        )


def learns_prompts(model: object) -> bool:
    """Does ``model`` carry a PEFT adapter that puts virtual tokens before the prompt?"""
    adapters: Mapping[str, Any] = getattr(model, "peft_config", {})
    return any(adapter.is_prompt_learning for adapter in adapters.values())


def validate_generation(generation_config: GenerationConfig, model_kwargs: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigurationError` for an option that threads cannot follow."""
    instead = "leave it out, or call generate without apar"
    for name, plain in (
        ("num_beams", 1), ("num_beam_groups", 1), ("penalty_alpha", None), ("dola_layers", None),
        ("guidance_scale", 1), ("token_healing", False), ("cache_implementation", "dynamic"),
        ("prompt_lookup_num_tokens", None), ("assistant_early_exit", None),
        ("assistant_ensemble_weight", None), ("speculation_type", None),
        ("use_mtp", False), ("constraints", None), ("force_words_ids", None),
        ("output_attentions", False), ("output_hidden_states", False),
    ):  # fmt: skip
        value = getattr(generation_config, name, None)
        if value not in (None, plain, False):
            raise ConfigurationError(f"{name}={value!r} cannot be combined with apar; {instead}")
    for name, value in model_kwargs.items():
        if value is not None and name not in _MODEL_KWARGS:
            raise ConfigurationError(
                f"{name} cannot be combined with apar, which has it for the prompt and not for what threads write; {instead}"
            )
    if generation_config.compile_config is not None:
        raise ConfigurationError(
            "compile_config cannot be combined with apar, whose steps differ in shape; leave it out, or compile the model "
            "yourself with model.compile(dynamic=True)"
        )
    if generation_config.use_cache is False:
        raise ConfigurationError("use_cache=False cannot be combined with apar, whose threads share the cache; leave it out")


def validate_call(
    model: PreTrainedModel,
    generation_config: GenerationConfig,
    model_kwargs: Mapping[str, Any],
    streamer: object | None,
    batch: int,
) -> None:
    """Raise for a call of ``generate`` that threads cannot follow."""
    validate_model(model)
    if process_count() > 1 and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)):
        raise ConfigurationError(
            "the weights are shared out among processes, whose answers take different numbers of steps: one would wait for "
            "another for ever; load the model whole in each of them, or call generate without apar"
        )
    validate_generation(generation_config, model_kwargs)
    validate_streamer(streamer, batch)


def validate_positions(model: PreTrainedModel, prompts: Sequence[int], budget: int, injected: int | None) -> None:
    """Raise :class:`ConfigurationError` for prompts of so many slots each after which positions are not exact.

    Args:
        budget: tokens that a row may sample.
        injected: tokens that are fed on a path and not sampled, which the budget does not count; ``None`` for any number.
    """
    if prompts:
        validate_length(max(prompts), model)
        validate_rope(min(prompts), max(prompts), budget, injected, model)


def validate_streamer(streamer: object | None, batch: int) -> None:
    """Raise :class:`ConfigurationError` for what is no streamer, and for a plain one and more than one prompt."""
    for one in as_list(streamer):
        if isinstance(one, type) or not callable(getattr(one, "end", None)):
            raise ConfigurationError(f"streamer is {one!r}; pass an object with put and end, such as AparStreamer()")
        if batch > 1 and not hasattr(one, "begin_thread"):
            raise ConfigurationError(f"a {type(one).__name__} takes one prompt, got {batch}; use an AparStreamer")


def validate_length(longest: int, model: PreTrainedModel) -> None:
    """Raise :class:`ConfigurationError` for a prompt that reaches beyond the positions that the model knows.

    Rotary positions that are scaled have no such limit.
    """
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    scaled = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    if limit is not None and longest > limit and not scaled:
        raise ConfigurationError(
            f"the prompt has {longest} positions and {type(model).__name__} knows {limit}; shorten it, or load the model "
            "with a larger max_position_embeddings"
        )


def validate_rope(shortest: int, longest: int, budget: int, injected: int | None, model: PreTrainedModel) -> None:
    """Raise :class:`ConfigurationError` where rotary frequencies may change while threads write.

    Dynamic NTK and longrope choose them by the longest path of a forward pass, for all threads in it: beyond that point a
    thread's text would depend on which others are running. On either side of it each thread has its path's own.

    Args:
        shortest, longest: positions of the shortest and the longest prompt of the batch.
        budget: tokens that a row may sample.
        injected: tokens that are fed on a path and not sampled, which the budget does not count; ``None`` for any number.
    """
    injected = budget if injected is None else injected  # a fork is a token of the budget
    reached = longest + budget - 1 + injected  # the last token is not fed
    for kind, boundary in _rope_switches(model.config.get_text_config(decoder=True)):
        if reached <= boundary or (kind == "longrope" and shortest > boundary):
            continue
        room = boundary + 1 - injected - longest
        less = f"pass max_new_tokens={room} or less" if room > 0 else "shorten the prompts"
        more = f", or prompts of more than {boundary} tokens" if kind == "longrope" else ""
        raise ConfigurationError(
            f"the rotary frequencies of {type(model).__name__} ({kind}) change beyond {boundary} positions, for all threads "
            f"at once, and this call may reach {reached}: {less}{more}, or call generate without apar"
        )


def _rope_switches(config: Any) -> list[tuple[str, int]]:
    """Return the kinds of rotary positions that depend on a pass's longest path, each with where they change."""
    parameters = getattr(config, "rope_parameters", None) or {}
    layers = [parameters] if "rope_type" in parameters else [one for one in parameters.values() if isinstance(one, dict)]
    switches = []
    for one in layers:  # one for all layers, or one for each kind of layer
        kind = one.get("rope_type", "default")
        if "dynamic" in kind:
            switches.append((kind, config.max_position_embeddings))
        elif kind == "longrope":
            known = one.get("original_max_position_embeddings")
            switches.append((kind, known or config.original_max_position_embeddings))
    return switches
