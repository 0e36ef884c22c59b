"""Checkpoints by name or folder: what is loaded onto what, with which tokenizer."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.checkpoints.adapters import (
    PASS_BASE,
    adapter_settings,
    check_files,
    forks,
    load_adapter,
    recorded_base,
)
from hf_apar.checkpoints.conversion import cast_parameters, forget_quantization, taken_dtype, without_numbers
from hf_apar.checkpoints.default_model import DEFAULT_BASE, load_default_base
from hf_apar.checkpoints.sources import HUB_OPTIONS, Source, find_source, is_folder, settings_in
from hf_apar.enabling import enable_apar
from hf_apar.errors import CheckpointError, ConfigurationError, ControlTokenError
from hf_apar.tokens import KNOWN_PAIRS, checkpoint_config, known_pair

_NO_CODE = {"trust_remote_code": False}  # where nothing is said, transformers would ask on the terminal


def load_base(
    name: str | Path = DEFAULT_BASE, *, dtype: torch.dtype | str = torch.float32, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model to fine-tune and its tokenizer: a folder or a name on the Hub, or the default base.

    An adapter that learnt answers as they read (``hf-apar train --sequential``) is merged into its own base.

    Args:
        dtype: ``"auto"`` for that of the checkpoint.
        options: as those of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        CheckpointError: if ``name`` is nowhere.
        ConfigurationError: if it is an adapter that forks.
        MissingPackageError: if the default base is asked for and its packages are not installed.
    """
    return _load_base(name, taken_dtype(dtype, options), options)


def _load_base(
    name: str | Path, dtype: torch.dtype | str, options: dict[str, Any], *, to_merge: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base; one that an adapter is merged into as precisely as it was saved, so that their sum is rounded once."""
    if name == DEFAULT_BASE:
        rest = {key: value for key, value in options.items() if key not in HUB_OPTIONS}
        return load_default_base("auto" if to_merge and "quantization_config" not in rest else dtype, **rest)
    source = find_source(name, {key: options.pop(key) for key in HUB_OPTIONS if key in options})
    # PEFT records the name with the adapters of this model: it must hold in any folder
    source = Source(str(Path(name).resolve()) if is_folder(source.name) else source.name, source.options)
    if (config := source.file("adapter_config.json")) is not None:
        source.file("generation_config.json")  # from the Hub into the folder of its configuration
        if not forks(config.parent):
            return _load_sequential(source, config, dtype, options)
        raise ConfigurationError(
            f"{name} is an adapter, and a base is asked for; AparModelForCausalLM.from_pretrained loads it onto its own, "
            "and hf-apar merge makes one checkpoint of both"
        )
    if to_merge and dtype in (torch.float16, torch.bfloat16) and not _is_quantised(source, options):
        dtype = "auto"
    return _read(source, dtype, options), _read_tokenizer(source, options)


def _load_sequential(
    adapter: Source, config: Path, dtype: torch.dtype | str, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an adapter without control tokens: with its base it is a model like any other."""
    model = _load_with_base(adapter, config, None, dtype, options)
    model.name_or_path = model.config._name_or_path = adapter.name  # what PEFT is to record, and not the base within
    return model, load_tokenizer(config.parent)


def _is_quantised(source: Source, options: Mapping[str, Any]) -> bool:
    config = source.file("config.json")
    saved = {} if config is None else json.loads(config.read_text(encoding="utf-8"))
    return "quantization_config" in options or "quantization_config" in saved


def _read(source: Source, dtype: torch.dtype | str, options: Mapping[str, Any]) -> PreTrainedModel:
    # without adapter_kwargs, transformers looks on the Hub for an adapter, whatever local_files_only says
    everything: dict[str, Any] = {"adapter_kwargs": dict(source.options), **_NO_CODE, **source.options, **options}
    source.check_settings()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source.name, dtype=dtype, **everything)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{source.name} holds a pickle that is more than weights, and is not read; give one with safetensors"
        ) from error
    except (AssertionError, LookupError, ArithmeticError, StrictDataclassError) as error:
        raise CheckpointError(
            f"the settings in the config.json of {source.name} make no model ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise CheckpointError(f"the weights of {source.name} have other shapes than its config.json says") from error
    if "gguf_file" in options:
        forget_quantization(_without_info(model))
    if (name := without_numbers(_without_info(model))) is not None:
        raise CheckpointError(f"{source.name} has weights in {name} that are no numbers (NaN, infinity); copy it again")
    return model


def _without_info(loaded: Any) -> PreTrainedModel:
    """Return the model alone of what transformers gives: with ``output_loading_info`` it is the first of two."""
    model: PreTrainedModel = loaded[0] if isinstance(loaded, tuple) else loaded
    return model


def _read_tokenizer(source: Source, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model that is loaded with ``options``."""
    shared = _NO_CODE | {key: options[key] for key in ("trust_remote_code", "gguf_file") if key in options}
    return _tried_tokenizer(source.name, **source.options, **shared)


def _tried_tokenizer(place: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer and use it once: what is wrong in its files may be met there alone.

    Raises:
        CheckpointError: if its files make no tokenizer that works, where transformers does not say so itself.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, **options)
        tokenizer.decode(tokenizer.encode("a"), skip_special_tokens=True)
    except (OSError, ValueError, ImportError, MemoryError):
        raise
    except Exception as error:  # Rust's tokenizers raise nothing more special
        raise CheckpointError(
            f"the tokenizer of {place} cannot be used ({type(error).__name__}: {str(error)[:200]}); copy its files again"
        ) from error
    return tokenizer


def _tokenizer_with_ids(
    model: PreTrainedModel, source: Source, options: Mapping[str, Any]
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer where the settings name no control tokens: it may, as those of the paper's checkpoints do."""
    if checkpoint_config(model).control_ids is not None:
        return None
    with suppress(OSError, ValueError):  # it has none, and no control tokens therefore
        return _read_tokenizer(source, options)
    return None


class AparModelForCausalLM:
    """Loads a fine-tuned checkpoint, or an adapter with its base, and enables APAR, in one call."""

    @staticmethod
    def from_pretrained(
        name_or_adapter: str | Path,
        *,
        base: str | Path | None = None,
        dtype: torch.dtype | str = "auto",
        **options: Any,
    ) -> PreTrainedModel:
        """Return the model, enabled; its tokenizer is that of :func:`load_tokenizer`.

        Args:
            name_or_adapter: a folder or a name on the Hub; an adapter is merged into its base, or wraps it (a ``PeftModel``)
                where the base is quantised.
            base: the folder or name of an adapter's base, where it is not what its ``adapter_config.json`` names.
            dtype: ``"auto"`` for that of the checkpoint, or of the base.
            options: as those of ``AutoModelForCausalLM.from_pretrained``: ``device_map``, ``attn_implementation``,
                ``quantization_config``, ``revision``, ``token`` and the others. With an adapter, ``revision`` and
                ``subfolder`` are the adapter's own (the base's revision is what the adapter records); ``token``,
                ``cache_dir``, ``local_files_only``, ``force_download`` and ``proxies`` are for both; the rest is the base's.

        Raises:
            CheckpointError: if the checkpoint, the adapter or its base is nowhere.
            ConfigurationError: if adapter and base do not fit.
            ControlTokenError: if the checkpoint has no control tokens.
        """
        if name_or_adapter == DEFAULT_BASE:
            raise ControlTokenError(f"{DEFAULT_BASE} is the base of the default model; load_default_model loads what forks")
        dtype = taken_dtype(dtype, options)
        source = find_source(name_or_adapter, {key: options.pop(key) for key in HUB_OPTIONS if key in options})
        source.check_settings()
        if (config := source.file("adapter_config.json")) is not None:
            if options.pop("output_loading_info", False):
                raise ConfigurationError(f"output_loading_info tells of a checkpoint, and {source.name} is an adapter")
            return enable_apar(_load_with_base(source, config, base, dtype, options))
        if base is not None:
            raise ConfigurationError(f"base={str(base)!r} goes with an adapter, and {source.name} is none; leave it out")
        loaded = _read(source, dtype, options)
        model = _without_info(loaded)
        enable_apar(model, _tokenizer_with_ids(model, source, options))
        return loaded


def load_tokenizer(
    name_or_adapter: str | Path, *, base: str | Path | None = None, **options: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint or an adapter: ``AutoTokenizer.from_pretrained``, which asks no silent Hub again.

    That of an adapter without one, as this package ships it, is its base's, with the control tokens.

    Args:
        base: as that of :meth:`AparModelForCausalLM.from_pretrained`.
        options: as those of ``AutoTokenizer.from_pretrained``.

    Raises:
        CheckpointError: if ``name_or_adapter`` is nowhere, or the base of an adapter that needs it.
    """
    if name_or_adapter == DEFAULT_BASE:
        return load_default_base()[1]
    source = find_source(name_or_adapter, {key: options.pop(key) for key in HUB_OPTIONS if key in options})
    source.check_settings()
    options = _NO_CODE | options
    config = source.file("adapter_config.json")
    if config is None:
        return _tried_tokenizer(source.name, **source.options, **options)
    # from the Hub; by an adapter's name, transformers 5.16 asks for a config.json, which it has not
    if not any([source.file(name) for name in TOKENIZER_FILES]):
        return _tokenizer_of_base(source, config, base, options)
    return _tried_tokenizer(config.parent, **options)


def _tokenizer_of_base(
    adapter: Source, config: Path, base: str | Path | None, options: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    place, shared = _base_of(adapter, config, base)
    adapter.file("generation_config.json")
    tokenizer = load_tokenizer(place, **shared, **options)
    pair = known_pair(tokenizer) or KNOWN_PAIRS[0]
    tokenizer.add_tokens([pair.fork, pair.child], special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    adapter_settings(config.parent, (vocabulary[pair.fork], vocabulary[pair.child]))  # refuses other ids
    return tokenizer


TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip


def _base_of(adapter: Source, config: Path, base: str | Path | None) -> tuple[str | Path, dict[str, Any]]:
    """Return where the base of ``adapter`` is, ``base`` or what its ``config`` names, and the options for the Hub."""
    shared = {key: value for key, value in adapter.options.items() if key not in ("revision", "subfolder")}
    if base is not None:
        return base, shared
    recorded = settings_in(config)
    place = recorded.get("base_model_name_or_path")
    if not isinstance(place, str) or not place:
        raise CheckpointError(f"{config} names no base but {str(place)[:80]!r}; {PASS_BASE}")
    shared |= {"revision": recorded.get("revision")}  # PEFT's word for the base's, mostly None
    return place if place == DEFAULT_BASE else recorded_base(adapter.name, place), shared


def _load_with_base(
    adapter: Source, config: Path, base: str | Path | None, dtype: torch.dtype | str, options: Mapping[str, Any]
) -> PreTrainedModel:
    for name in ("adapter_model.safetensors", "generation_config.json"):
        adapter.file(name)  # from the Hub into the folder of its configuration
    check_files(config.parent)
    place, shared = _base_of(adapter, config, base)
    try:
        model, tokenizer = _load_base(place, dtype, {**shared, **options}, to_merge=True)
    except CheckpointError as error:
        raise CheckpointError(f"the adapter {adapter.name} needs its base {place}: {error}; {PASS_BASE}") from error
    if not isinstance(dtype, torch.dtype) or model.dtype == dtype or getattr(model, "hf_quantizer", None) is not None:
        return load_adapter(model, tokenizer, config.parent)
    cast_parameters(model, torch.float32)  # exact; the sum is then rounded once
    return cast_parameters(load_adapter(model, tokenizer, config.parent), dtype)
