"""Stock vLLM as the engine: offline, and behind its own server."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_apar.serving.vllm.offline import AparLLM
    from hf_apar.serving.vllm.online import set_policy

__all__ = ["AparLLM", "set_policy"]

_HOMES = {"AparLLM": "offline", "set_policy": "online"}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: vLLM is optional, takes its time, and finds its plugin in this package."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
