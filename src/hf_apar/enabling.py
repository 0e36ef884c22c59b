"""How one model object gets ``generate(apar=...)``, and loses it again."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.checks import learns_prompts, validate_model
from hf_apar.config import AparConfig
from hf_apar.errors import UnsupportedModelError
from hf_apar.generation import AparGenerationMixin
from hf_apar.tokens import checkpoint_config, completed, find_control_tokens, record_settings, validate_control_ids

Model = TypeVar("Model", bound=PreTrainedModel)


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
    before = _settings(base.generation_config)
    record_settings(base, settings.to_dict())
    suppressed = {*(base.generation_config.suppress_tokens or ()), *ids}
    base.generation_config.suppress_tokens = sorted(suppressed)  # so that plain decoding loses no detail; apar lifts them
    first, _ = vars(base).get("_apar_change", (before, None))
    base._apar_change = first, _settings(base.generation_config)
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
    before, after = vars(base).pop("_apar_change", ({}, {}))
    for name, value in after.items():
        if getattr(base.generation_config, name, None) != value:
            continue  # somebody has changed it since
        if name in before:
            setattr(base.generation_config, name, before[name])
        else:
            delattr(base.generation_config, name)
    return model


def _settings(generation: GenerationConfig) -> dict[str, Any]:
    """Return what :func:`enable_apar` changes in a generation config, attribute by attribute; what is absent is left out."""
    changed = ("apar_config", "suppress_tokens", "_from_model_config")
    return {name: copy.deepcopy(value) for name, value in vars(generation).items() if name in changed}


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
