"""Which of several processes this one is: ``accelerate launch`` and ``torchrun`` say it in the environment."""

import os


def process_number() -> int:
    """Return the number of this process among all, 0 for the one that writes and talks."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_number() -> int:
    """Return the number of this process on its machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def shards_weights() -> bool:
    """Are the weights spread over the processes (FSDP)?"""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
