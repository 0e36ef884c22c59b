"""Both of vLLM's model runners follow the rules of threads and of plain requests, which are parameters of its own."""

import os
import subprocess
import sys
from pathlib import Path


def test_both_runners_ban_what_the_rules_say_and_agree_on_every_logit():
    """In a process of its own: Triton's interpreter, which takes the place of a GPU, is chosen when Triton is imported."""
    script = Path(__file__).with_name("runners.py")
    done = subprocess.run([sys.executable, script, "7", "50"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) > 600, "rows of logits"
