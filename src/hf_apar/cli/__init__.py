"""The command line, ``hf-apar`` (needs the extra ``cli``).

What is slow to import is imported inside the commands, so that ``--help`` is quick.
"""

from hf_apar.cli import (  # noqa: F401 - each adds its commands
    chat,
    data,
    decode,
    evaluate,
    probe,
    proxy,
    recipes,
    replay,
    training,
)
from hf_apar.cli.application import app, main

__all__ = ["app", "main"]
