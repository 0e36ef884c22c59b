"""Fine-tuning: answers to packed trees to an adapter that knows where to fork."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_apar.training.fine_tuning import train

__all__ = ["train"]


def __getattr__(name: str) -> object:
    """Import ``train`` when it is first asked for: what can be set is known without torch."""
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hf_apar.training.fine_tuning import train

    return train
