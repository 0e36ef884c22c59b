"""The command line, ``hf-apar`` (needs the extra ``cli``).

What is slow to import is imported inside the commands, so that ``--help`` is quick.
"""

from hf_apar.cli import chat, data, decode, evaluate, proxy, recipes, replay, training  # noqa: F401 - each adds its commands
from hf_apar.cli.application import app, main

__all__ = ["app", "main"]
