"""APAR, auto-parallel auto-regressive decoding (arXiv 2401.06761), for Hugging Face transformers.

Names are imported when they are first asked for: ``hf-apar --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_apar.branches import BranchOutput, branch
    from hf_apar.checkpoints.default_model import load_default_heads, load_default_model
    from hf_apar.checkpoints.export import export_custom_generate
    from hf_apar.checkpoints.heads import load_heads
    from hf_apar.checkpoints.loading import AparModelForCausalLM
    from hf_apar.checkpoints.publishing import export_adapter
    from hf_apar.checkpoints.readiness import check_model
    from hf_apar.config import AparConfig
    from hf_apar.enabling import disable_apar, enable_apar
    from hf_apar.errors import AparError, ConfigurationError, ControlTokenError, DataError, UnsupportedModelError
    from hf_apar.generation import AparGenerationMixin, apar_decode
    from hf_apar.prepacking import prepacked
    from hf_apar.results import AparOutput, AparStats
    from hf_apar.streaming import AparStreamer
    from hf_apar.text.chat import encode_chat
    from hf_apar.tokens import add_control_tokens
    from hf_apar.tree.threads import ParagraphTree, Thread

    __version__: str

__all__ = [
    "AparConfig",
    "AparError",
    "AparGenerationMixin",
    "AparModelForCausalLM",
    "AparOutput",
    "AparStats",
    "AparStreamer",
    "BranchOutput",
    "ConfigurationError",
    "ControlTokenError",
    "DataError",
    "ParagraphTree",
    "Thread",
    "UnsupportedModelError",
    "add_control_tokens",
    "apar_decode",
    "branch",
    "check_model",
    "disable_apar",
    "enable_apar",
    "encode_chat",
    "export_adapter",
    "export_custom_generate",
    "load_default_heads",
    "load_default_model",
    "load_heads",
    "prepacked",
]

_MODULES = {
    "branches": ("BranchOutput", "branch"),
    "text.chat": ("encode_chat",),
    "checkpoints.loading": ("AparModelForCausalLM",),
    "checkpoints.default_model": ("load_default_heads", "load_default_model"),
    "config": ("AparConfig",),
    "enabling": ("disable_apar", "enable_apar"),
    "errors": ("AparError", "ConfigurationError", "ControlTokenError", "DataError", "UnsupportedModelError"),
    "generation": ("AparGenerationMixin", "apar_decode"),
    "checkpoints.export": ("export_custom_generate",),
    "checkpoints.heads": ("load_heads",),
    "checkpoints.publishing": ("export_adapter",),
    "checkpoints.readiness": ("check_model",),
    "prepacking": ("prepacked",),
    "results": ("AparOutput", "AparStats"),
    "streaming": ("AparStreamer",),
    "tokens": ("add_control_tokens",),
    "tree.threads": ("ParagraphTree", "Thread"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = _version()
    elif name in _HOME:
        value = getattr(import_module(f"hf_apar.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'hf_apar' has no attribute {name!r}")
    globals()[name] = value  # the next time it is found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hf_apar")
    except PackageNotFoundError:  # the source without an installation
        return "0+unknown"
