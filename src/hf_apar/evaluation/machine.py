"""What answers were made on: processor or GPU, threads, and the releases of the packages."""

import os
import platform
import re
from pathlib import Path

import torch
import transformers

import hf_apar

_CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """Return the processor's name where the system tells it, its architecture elsewhere."""
    try:
        named = re.search(r"^model name\s*:\s*(.*\S)", _CPUINFO.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def surroundings() -> dict[str, object]:
    """Return what figures depend on beside the settings, by name."""
    return {
        "machine": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "hf_apar": hf_apar.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
