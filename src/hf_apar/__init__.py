"""APAR, auto-parallel auto-regressive decoding (arXiv 2401.06761), for Hugging Face transformers."""

from hf_apar.chat import encode_chat
from hf_apar.checkpoints import AparModelForCausalLM, load_default_heads, load_default_model
from hf_apar.config import AparConfig
from hf_apar.decoding import apar_decode
from hf_apar.errors import AparError, ConfigurationError, ControlTokenError, DataError, UnsupportedModelError
from hf_apar.generation import AparGenerationMixin, disable_apar, enable_apar
from hf_apar.hub import export_custom_generate
from hf_apar.readiness import check_model
from hf_apar.results import AparOutput, AparStats
from hf_apar.streaming import AparStreamer
from hf_apar.tokens import add_control_tokens
from hf_apar.tree import ParagraphTree, Thread

__all__ = [
    "AparConfig",
    "AparError",
    "AparGenerationMixin",
    "AparModelForCausalLM",
    "AparOutput",
    "AparStats",
    "AparStreamer",
    "ConfigurationError",
    "ControlTokenError",
    "DataError",
    "ParagraphTree",
    "Thread",
    "UnsupportedModelError",
    "add_control_tokens",
    "apar_decode",
    "check_model",
    "disable_apar",
    "enable_apar",
    "encode_chat",
    "export_custom_generate",
    "load_default_heads",
    "load_default_model",
]
