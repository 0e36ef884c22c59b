"""Where a model takes its inputs, and whether it stands on several devices."""

import torch
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel, prompts: torch.device) -> torch.device:
    """Return where ``model`` takes its inputs: its own device, that of the ``prompts`` where its weights are offloaded."""
    return prompts if model.device.type == "meta" else model.device


def is_split(model: PreTrainedModel) -> bool:
    """Do the layers of ``model`` stand on several devices?"""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
