"""Are two environments alike below transformers' seams? ``python tests_wheel/same.py VENV WHEEL`` ends with 0 then."""

import subprocess
import sys

BELOW = ("transformers", "torch", "tokenizers", "accelerate", "safetensors", "peft", "huggingface_hub", "numpy")
ASKED = f"import sys, importlib.metadata as m; print(sys.version, *(m.version(name) for name in {BELOW}))"


def versions(environment: str) -> str:
    python = f"{environment}/bin/python"
    return subprocess.run([python, "-c", ASKED], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(versions(sys.argv[1]) != versions(sys.argv[2]))
