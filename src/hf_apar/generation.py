"""``model.generate(apar=True)``: a mixin for one model object, and how it gets it and loses it again."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import Any, Self, TypeVar

from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.checks import learns_prompts, validate_model, validate_streamer
from hf_apar.choice.stopping import stop_string_criteria
from hf_apar.config import AparConfig
from hf_apar.decoding import decode
from hf_apar.errors import ConfigurationError, UnsupportedModelError
from hf_apar.protocol import ForkProtocol
from hf_apar.speculation.assistant import AssistantDrafts
from hf_apar.speculation.lookup import PromptLookup
from hf_apar.speculation.proposer import Proposer
from hf_apar.streaming import AparStreamer, PromptRelay, as_list, ended_by_errors
from hf_apar.tokens import checkpoint_config, completed, find_control_tokens, record_settings, validate_control_ids

Model = TypeVar("Model", bound=PreTrainedModel)


class AparGenerationMixin(GenerationMixin):
    """A ``GenerationMixin`` whose ``generate`` takes ``apar=``; without it, ``generate`` is untouched.

    :func:`enable_apar` gives it to one model object. A class may also have it from the start::

        class AparLlama(AparGenerationMixin, LlamaForCausalLM): ...
    """

    def generate(
        self,
        *args: Any,
        apar: bool | AparConfig | None = None,
        protocol: ForkProtocol | None = None,
        proposer: Proposer | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, in parallel threads where ``apar`` is ``True`` or an :class:`AparConfig`.

        Args:
            *args: as those of the model's own ``generate``.
            protocol: who decides to fork; by default the control tokens of the checkpoint.
            proposer: guesses what threads write next.
            **kwargs: as those of ``generate``; ``streamer`` may also be an :class:`~hf_apar.streaming.AparStreamer`, or
                several streamers in a list.

        Returns:
            As ``generate``: a LongTensor (batch, prompt + new), or with ``return_dict_in_generate=True`` an
            :class:`~hf_apar.results.AparOutput` with ``sequences``, ``trees`` and ``stats``.

        Raises:
            ControlTokenError: if the checkpoint has no control tokens, or the prompt holds one.
            ConfigurationError: for a generation option that threads cannot follow.
            UnsupportedModelError: for a model whose layers cannot attend along a tree.
        """
        generate: Callable[..., Any] = super().generate
        if apar is None or apar is False:
            if protocol is not None or proposer is not None:
                raise ConfigurationError("protocol and proposer need apar; pass apar=True too")
            return generate(*args, **kwargs)
        return generate_in_threads(self, generate, *args, apar=apar, protocol=protocol, proposer=proposer, **kwargs)


def generate_in_threads(
    model: Any,
    generate: Callable[..., Any],
    *args: Any,
    apar: bool | AparConfig = True,
    protocol: ForkProtocol | None = None,
    proposer: Proposer | None = None,
    loop: Callable[..., Any] = decode,
    **kwargs: Any,
) -> Any:
    """Call ``model``'s own ``generate`` with APAR as its decoding loop; what :class:`AparGenerationMixin` does.

    Raises:
        ConfigurationError: for arguments that contradict each other, or that threads cannot follow.
    """
    if not isinstance(apar, AparConfig) and apar is not True:
        raise ConfigurationError(f"apar is {apar!r}; pass True, False or an AparConfig")
    kwargs = _by_name(generate, args, kwargs)
    with ended_by_errors(streamer := kwargs.pop("streamer", None)):
        _refuse_strategies(kwargs)
        settings = apar if isinstance(apar, AparConfig) else None
        taken, kwargs = _taken(model, kwargs, *_OURS)
        criteria = stop_string_criteria(taken["stop_strings"], kwargs.pop("tokenizer", None))
        kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), *criteria]
        proposer = _proposer(proposer, kwargs.pop("assistant_model", None), taken)
        loop = partial(loop, apar=settings, protocol=protocol, streamer=streamer, proposer=proposer)
        return generate(**kwargs | {"custom_generate": loop, "streamer": _prompt_relay(streamer, kwargs)})


def _prompt_relay(streamer: object | None, options: Mapping[str, Any]) -> PromptRelay | None:
    """Return what hands the prompt to the plain streamers among ``streamer``, if there are any."""
    plain = [one for one in as_list(streamer) if not isinstance(one, AparStreamer)]
    if not plain:
        return None
    prompt = options.get("inputs", options.get("input_ids"))
    validate_streamer(streamer, 1 if prompt is None else len(prompt))  # before the prompt is put
    return PromptRelay(plain)


def _by_name(generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of ``generate`` by their names; raise the TypeError that the call would raise."""
    named = dict(signature(generate).bind_partial(*args, **kwargs).arguments)
    return named | named.pop("kwargs", {})  # type: ignore[no-any-return]


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


def _proposer(proposer: Proposer | None, assistant: Any, options: Mapping[str, Any]) -> Proposer | None:
    """Return what makes drafts, from transformers' own options or as it was given."""
    lookup = options["prompt_lookup_num_tokens"]
    if sum(source is not None for source in (proposer, assistant, lookup)) > 1:
        raise ConfigurationError("assistant_model, prompt_lookup_num_tokens and proposer all make drafts; pass one of them")
    schedule = options["num_assistant_tokens_schedule"]
    if lookup is not None:
        ngram = _first(options["max_matching_ngram_size"], 2)
        return PromptLookup(lookup, max_ngram=ngram, schedule=_first(schedule, PromptLookup.schedule))
    if assistant is None:
        return proposer
    default = assistant.generation_config
    return AssistantDrafts(
        assistant,
        num_tokens=_first(options["num_assistant_tokens"], default.num_assistant_tokens, 5),
        schedule=_first(schedule, default.num_assistant_tokens_schedule, AssistantDrafts.schedule),
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
    ids = settings.control_ids or find_control_tokens(base, tokenizer)  # which says what is missing
    validate_control_ids(settings, base)
    before = _Settings.of(base.generation_config)
    record_settings(base, settings.to_dict())
    suppressed = {*(base.generation_config.suppress_tokens or ()), *ids}
    base.generation_config.suppress_tokens = sorted(suppressed)  # so that plain decoding loses no detail; apar lifts them
    known: _Change | None = vars(base).get("_apar_change")
    base._apar_change = _Change(known.before if known else before, _Settings.of(base.generation_config))
    if not isinstance(base, AparGenerationMixin):
        base.__class__ = _enabled_class(type(base))  # type: ignore[arg-type]
    return model


def disable_apar(model: Model) -> Model:
    """Undo :func:`enable_apar`, the generation config's changes too; a model that is not enabled is left as it is.

    Raises:
        UnsupportedModelError: if the model's class has :class:`AparGenerationMixin` by its own definition.
    """
    base = _base_model(model)
    if not isinstance(base, AparGenerationMixin):
        return model
    if not isinstance(base, _Enabled):
        raise UnsupportedModelError(
            f"{type(base).__name__} is a subclass of AparGenerationMixin by its definition, which disable_apar cannot undo; "
            "call generate without apar, or load the model as the class that it was before"
        )
    base.__class__ = type(base).plain
    change: _Change | None = vars(base).pop("_apar_change", None)
    if change is not None:
        change.undo(base.generation_config)
    return model


@dataclass(frozen=True)
class _Settings:
    """What :func:`enable_apar` changes in a generation config, attribute by attribute; what is absent is left out."""

    values: dict[str, Any]

    @classmethod
    def of(cls, generation: GenerationConfig) -> Self:
        known = vars(generation)
        names = ("apar_config", "suppress_tokens", "_from_model_config")
        return cls({name: copy.deepcopy(known[name]) for name in names if name in known})


@dataclass(frozen=True)
class _Change:
    before: _Settings
    after: _Settings

    def undo(self, generation: GenerationConfig) -> None:
        """Take back what nobody has changed since."""
        for name, value in self.after.values.items():
            if getattr(generation, name, None) != value:
                continue
            if name in self.before.values:
                setattr(generation, name, self.before.values[name])
            else:
                delattr(generation, name)


def _base_model(model: Any) -> Any:
    """Return the model inside a PEFT model, whose ``generate`` calls that one's."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model") and not learns_prompts(model):
        return model.get_base_model()
    return model


class _Enabled(AparGenerationMixin):
    """What :func:`enable_apar` makes a model's class a subclass of; ``plain`` is the class that it was."""

    plain: type

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[type], dict[str, Any]]:
        return _new_enabled, (type(self).plain,), self.__dict__


@cache
def _enabled_class(plain: Any) -> Any:
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "plain": plain}
    return type(plain.__name__, (_Enabled, plain), names)


def _new_enabled(plain: type) -> Any:
    enabled = _enabled_class(plain)
    return enabled.__new__(enabled)
