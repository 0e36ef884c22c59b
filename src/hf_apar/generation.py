"""``model.generate(apar=True)``: a mixin that hands our decoding loop to ``generate``, and what it takes out of the call."""

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from hf_apar.checks import validate_streamer
from hf_apar.choice.stopping import stop_string_criteria
from hf_apar.config import AparConfig
from hf_apar.decoding import decode
from hf_apar.errors import ConfigurationError
from hf_apar.protocol import ForkProtocol
from hf_apar.results import AparOutput
from hf_apar.speculation.assistant import AssistantDrafts
from hf_apar.speculation.lookup import PromptLookup
from hf_apar.speculation.proposer import Proposer
from hf_apar.streaming import AparStreamer, PromptRelay, as_list, ended_by_errors


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
                several streamers in a list. With ``tokenizer`` the trees show their text in notebooks.

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
        taken, kwargs = _split_off(model, kwargs, _KEPT_FROM_GENERATE)
        tokenizer = kwargs.pop("tokenizer", None)
        criteria = stop_string_criteria(taken["stop_strings"], tokenizer)
        kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), *criteria]
        proposer = _proposer(proposer, kwargs.pop("assistant_model", None), taken)
        loop = partial(loop, apar=settings, protocol=protocol, streamer=streamer, proposer=proposer)
        out = generate(**kwargs | {"custom_generate": loop, "streamer": _prompt_relay(streamer, kwargs)})
        for tree in (getattr(out, "trees", None) or ()) if tokenizer is not None else ():
            tree.tokenizer = tokenizer
        return out


def apar_decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    apar: AparConfig | None = None,
    protocol: ForkProtocol | None = None,
    streamer: object | None = None,
    proposer: Proposer | None = None,
    **model_kwargs: Any,
) -> AparOutput | Tensor:
    """Decode along paragraph trees: a callable for ``model.generate(custom_generate=apar_decode)``.

    Args:
        apar: settings; what is ``None`` in them, or all, is taken from ``generation_config.apar_config``.
        protocol: who decides to fork; by default the control tokens of the checkpoint.
        streamer: an :class:`~hf_apar.streaming.AparStreamer`, a streamer of transformers for one prompt, or several in a
            list; bind it with ``functools.partial(apar_decode, streamer=...)``, since ``generate`` keeps its own to itself.
        proposer: guesses what threads write next; none by default.

    Raises:
        ControlTokenError: if the checkpoint has no control tokens, or the prompt holds one.
        ConfigurationError: for a generation option that threads cannot follow.
        UnsupportedModelError: for a model whose layers cannot attend along a tree.
    """
    arguments = (model, input_ids, logits_processor, stopping_criteria, generation_config)
    with ended_by_errors(streamer):
        return decode(*arguments, apar=apar, protocol=protocol, streamer=streamer, proposer=proposer, **model_kwargs)


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


# with these generate would assist its own loop, or, for stop strings, want a tokenizer that it keeps from ours
_KEPT_FROM_GENERATE = (
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
        ngram = _first_given(options["max_matching_ngram_size"], 2)
        return PromptLookup(lookup, max_ngram=ngram, schedule=_first_given(schedule, PromptLookup.schedule))
    if assistant is None:
        return proposer
    default = assistant.generation_config
    return AssistantDrafts(
        assistant,
        num_tokens=_first_given(options["num_assistant_tokens"], default.num_assistant_tokens, 5),
        schedule=_first_given(schedule, default.num_assistant_tokens_schedule, AssistantDrafts.schedule),
        confidence=_first_given(options["assistant_confidence_threshold"], default.assistant_confidence_threshold, 0.0),
    )


def _first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _split_off(model: Any, options: Mapping[str, Any], names: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take options that we serve out of a call, its generation config and the model's; return them, and the others."""
    rest = dict(options)
    given: GenerationConfig | None = copy.deepcopy(rest.get("generation_config"))
    taken = {}
    if given is not None:
        rest["generation_config"] = given
    for name in names:
        values = (rest.pop(name, None), getattr(given, name, None), getattr(model.generation_config, name, None))
        taken[name] = next((value for value in values if value is not None), None)
        if values[1] is not None:
            setattr(given, name, None)
        if values[2] is not None:
            rest[name] = None  # an argument outdoes the model's default, also if it is None
    return taken, rest
