"""Prints the files of those tests of NAMES that what pip installs today needs:
``python tests_wheel/contract.py NAMES VENV WHEEL``.

That is all of them where a package below has another version than in VENV, where all tests run; else those that depend on
what is not there, or on how the package was installed.
"""

import json
import subprocess
import sys

BELOW = ("transformers", "torch", "tokenizers", "accelerate", "safetensors", "peft", "huggingface_hub", "numpy")
ALONE = ("releases", "options", "adapters", "hub", "pipeline")
ASKED = f"import json, importlib.metadata as m; print(json.dumps([m.version(name) for name in {BELOW}]))"


def versions(environment: str) -> list[str]:
    python = f"{environment}/bin/python"
    return json.loads(subprocess.run([python, "-c", ASKED], check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    *everything, ours, theirs = sys.argv[1:]
    same = versions(ours) == versions(theirs)
    print(f"pip installs {'what' if same else 'others than'} all tests ran with", file=sys.stderr)
    print(*(f"tests/test_{name}.py" for name in (ALONE if same else everything)))
