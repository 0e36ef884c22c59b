"""``model.generate(apar=True)``: a mixin for one model object, and how it gets it and loses it again."""

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial
from inspect import signature
from typing import Any, TypeVar

from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.checks import learns_prompts, validate_model, validate_streamer
from hf_apar.config import AparConfig
from hf_apar.decoding import apar_decode
from hf_apar.errors import ConfigurationError, UnsupportedModelError
from hf_apar.speculation.assistant import AssistantDrafts
from hf_apar.speculation.lookup import PromptLookup
from hf_apar.speculation.proposer import Proposer
from hf_apar.stopping import stop_string_criteria
from hf_apar.streaming import AparStreamer, PromptRelay, as_list
from hf_apar.tokens import checkpoint_config, completed, find_control_tokens, record_settings

Model = TypeVar("Model", bound=PreTrainedModel)


class AparGenerationMixin:
    """Adds ``apar=`` to a model's ``generate``; without it, ``generate`` is untouched."""

    def generate(
        self,
        *args: Any,
        apar: bool | AparConfig | None = None,
        streamer: Any = None,
        proposer: Proposer | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, in parallel threads where ``apar`` is ``True`` or an :class:`AparConfig`.

        Args:
            streamer: also an :class:`~hf_apar.streaming.AparStreamer`, or several streamers in a list.
            proposer: guesses what threads write next.

        Returns:
            As ``generate``: a LongTensor (batch, prompt + new), or with ``return_dict_in_generate=True`` an
            :class:`~hf_apar.decoding.AparOutput` with ``sequences``, ``trees`` and ``stats``.

        Raises:
            ControlTokenError: if the checkpoint has no control tokens, or the prompt holds one.
            ConfigurationError: for a generation option that threads cannot follow.
            UnsupportedModelError: for a model whose layers cannot attend along a tree.
        """
        if apar is None or apar is False:
            if proposer is not None:
                raise ConfigurationError("proposer needs apar; pass apar=True too")
            return super().generate(*args, streamer=streamer, **kwargs)  # type: ignore[misc]
        generate = super().generate  # type: ignore[misc]
        return generate_in_threads(self, generate, *args, apar=apar, streamer=streamer, proposer=proposer, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[type], dict[str, Any]]:
        return _new_enabled, (_plain_class(type(self)),), self.__dict__


def generate_in_threads(
    model: Any,
    generate: Callable[..., Any],
    *args: Any,
    apar: bool | AparConfig = True,
    streamer: Any = None,
    proposer: Proposer | None = None,
    **kwargs: Any,
) -> Any:
    """Call ``model``'s own ``generate`` with APAR as its decoding loop; what :class:`AparGenerationMixin` does.

    Raises:
        ConfigurationError: for arguments that contradict each other, or that threads cannot follow.
    """
    if not isinstance(apar, AparConfig) and apar is not True:
        raise ConfigurationError(f"apar is {apar!r}; pass True, False or an AparConfig")
    kwargs |= zip(list(signature(GenerationMixin.generate).parameters)[1:], args, strict=False)
    _refuse_strategies(kwargs)
    settings = apar if isinstance(apar, AparConfig) else None
    taken, kwargs = _taken(model, kwargs, *_OURS)
    criteria = stop_string_criteria(taken["stop_strings"], kwargs.pop("tokenizer", None))
    kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), *criteria]
    proposer = _proposer(model, settings, proposer, kwargs.pop("assistant_model", None), taken)
    decode = partial(apar_decode, apar=settings, streamer=streamer, proposer=proposer)
    plain = [one for one in as_list(streamer) if not isinstance(one, AparStreamer)]
    if plain:
        prompt = kwargs.get("inputs", kwargs.get("input_ids"))
        validate_streamer(streamer, 1 if prompt is None else len(prompt))  # before the prompt is put
    relay = PromptRelay(plain) if plain else None
    return generate(**kwargs, custom_generate=decode, streamer=relay)


def _refuse_strategies(options: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigurationError` for arguments of ``generate`` that would not reach the loop."""
    if options.get("custom_generate") is not None:
        raise ConfigurationError("apar and custom_generate are two decoding strategies; pass one of them")
    if options.get("cache_implementation") == "paged":
        raise ConfigurationError("cache_implementation='paged' cannot be combined with apar; leave it out")
    for name in ("synced_gpus", "assistant_tokenizer", "negative_prompt_ids", "negative_prompt_attention_mask"):
        if options.get(name) is not None and options[name] is not False:
            raise ConfigurationError(f"{name} cannot be combined with apar; leave it out, or call generate without apar")


# options that generate would want a tokenizer for which it keeps from the loop, or take for its own assisted generation
_OURS = (
    "stop_strings", "prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold",
)  # fmt: skip


def _proposer(
    model: Any, config: AparConfig | None, proposer: Proposer | None, assistant: Any, options: Mapping[str, Any]
) -> Proposer | None:
    """Return what makes drafts, from transformers' own options or as it was given."""
    lookup = options["prompt_lookup_num_tokens"]
    if sum(source is not None for source in (proposer, assistant, lookup)) > 1:
        raise ConfigurationError("assistant_model, prompt_lookup_num_tokens and proposer all make drafts; pass one of them")
    if lookup is not None:
        schedule = options["num_assistant_tokens_schedule"]
        return PromptLookup(lookup, max_ngram=_first(options["max_matching_ngram_size"], 2), schedule=schedule)
    if assistant is None:
        return proposer
    ids = (config or AparConfig()).filled_from(checkpoint_config(model))
    if ids.fork_token_id is None or ids.child_token_id is None:
        raise ConfigurationError("an assistant needs the ids of the control tokens; call enable_apar(model) first")
    default = assistant.generation_config
    return AssistantDrafts(
        assistant,
        model,
        (ids.fork_token_id, ids.child_token_id),
        num_tokens=_first(options["num_assistant_tokens"], default.num_assistant_tokens, 5),
        schedule=_first(options["num_assistant_tokens_schedule"], default.num_assistant_tokens_schedule, None),
        confidence=_first(options["assistant_confidence_threshold"], default.assistant_confidence_threshold, 0.0),
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _taken(model: Any, options: Mapping[str, Any], *names: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take options that we serve out of a call, its generation config and the model's; return them, and the others."""
    rest = dict(options)
    given: GenerationConfig | None = rest.get("generation_config")
    taken = {}
    for name in names:
        values = (rest.pop(name, None), getattr(given, name, None), getattr(model.generation_config, name, None))
        taken[name] = next((value for value in values if value is not None), None)
        if values[1] is not None:
            rest["generation_config"] = copy.deepcopy(rest["generation_config"])
            setattr(rest["generation_config"], name, None)
        if values[2] is not None:
            rest[name] = None  # an argument outdoes the model's default, also if it is None
    return taken, rest


def enable_apar(model: Model, tokenizer: PreTrainedTokenizerBase | None = None, config: AparConfig | None = None) -> Model:
    """Give this one ``model`` object ``generate(apar=...)``; a PEFT model's base is changed. Enabling twice changes nothing.

    Args:
        tokenizer: where the ids of [Fork] and [Child] are looked up if the checkpoint does not carry them.
        config: the model's defaults from now on, kept in ``model.generation_config.apar_config`` as a plain ``dict``; what
            it leaves open stays as the checkpoint has it.

    Returns:
        ``model`` itself.

    Raises:
        ControlTokenError: if neither the checkpoint nor the tokenizer knows the control tokens.
        UnsupportedModelError: if the model's layers cannot attend along a tree, or its ``generate`` is shadowed.
    """
    base = _base_model(model)
    if "generate" in vars(base):
        raise UnsupportedModelError(
            f"this {type(base).__name__} object has a generate of its own, which would shadow APAR's; delete it first: "
            "del model.generate"
        )
    validate_model(base)
    settings = completed((config or AparConfig()).filled_from(checkpoint_config(base)), tokenizer)
    if settings.fork_token_id is None or settings.child_token_id is None:
        find_control_tokens(base, tokenizer)  # says what is missing
    record_settings(base, settings.to_dict())
    if not isinstance(base, AparGenerationMixin):
        base.__class__ = _enabled_class(type(base))  # type: ignore[arg-type]
    return model


def disable_apar(model: Model) -> Model:
    """Undo :func:`enable_apar`; a model that is not enabled is left as it is."""
    base = _base_model(model)
    if isinstance(base, AparGenerationMixin):
        base.__class__ = _plain_class(type(base))
    return model


def _base_model(model: Any) -> Any:
    """Return the model inside a PEFT model, whose ``generate`` calls that one's."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model") and not learns_prompts(model):
        return model.get_base_model()
    return model


@cache
def _enabled_class(plain: Any) -> Any:
    return type(
        plain.__name__, (AparGenerationMixin, plain), {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    )


def _plain_class(enabled: type) -> type:
    return enabled.__mro__[enabled.__mro__.index(AparGenerationMixin) + 1]


def _new_enabled(plain: type) -> Any:
    enabled = _enabled_class(plain)
    return enabled.__new__(enabled)
