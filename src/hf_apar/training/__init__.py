"""Fine-tuning: answers to packed trees to an adapter that knows where to fork."""

from hf_apar.training.recipe import train

__all__ = ["train"]
