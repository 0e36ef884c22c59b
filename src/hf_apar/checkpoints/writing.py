"""Writing that a killed process leaves whole or undone, and that two processes do one after the other."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_apar.errors import ConfigurationError

_PATIENCE = 2.0  # seconds: the processes that a killed one has started end a moment after it


def write_whole(file: Path, text: str) -> None:
    """Write ``text`` to ``file``, which at any time holds all of it or what it held before."""
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other processes from doing the same with ``path``, a folder, or a file, which is made if there is none.

    The system knows who holds it, so that nothing is left behind by one that was killed. Where it has no such locks, as on
    Windows and some network drives, nobody is kept away.

    Raises:
        ConfigurationError: if another process holds it.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _is_taken(handle, path):
            raise ConfigurationError(f"another process writes to {path}; wait until it ends, or name another output")
        yield
    finally:
        os.close(handle)


def _is_taken(handle: int, path: Path) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        except OSError:
            return True
        else:
            return path.exists() and os.path.samestat(os.fstat(handle), path.stat())  # not renamed meanwhile
