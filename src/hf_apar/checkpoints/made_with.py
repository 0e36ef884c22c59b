"""What an output was made with, in a file of JSON beside it, so that a call with other settings is told which differ."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from hf_apar.checkpoints.writing import write_whole

RECIPE_FILE = "recipe.toml"  # lies with an adapter that ``hf-apar recipe`` made


def digest(content: Path | bytes | str) -> str:
    """Return the SHA-256 of a file's bytes, or of bytes or text.

    >>> digest("")[:8]
    'e3b0c442'
    """
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def note(file: Path, settings: Mapping[str, object]) -> None:
    """Write ``settings`` to ``file``; what JSON does not know is written as text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(settings, indent=1, default=str) + "\n")


def noted(file: Path) -> dict[str, object] | None:
    """Return what :func:`note` wrote to ``file``; ``None`` if there is nothing that can be read."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> dict[str, str]:
    """Return the settings that differ, by name, each with both values in words.

    A setting that one of them does not know differs only where it has a value, or is a switch that is on: options that are
    new may be missing.

    >>> differences({"rank": 8, "seed": 0}, {"rank": 4, "seed": 0, "start": None, "sequential": False})
    {'rank': 'rank 8 (now 4)'}
    """
    known = json.loads(json.dumps(now, default=str))
    names = [name for name in {**before, **known} if _told(before.get(name)) != _told(known.get(name))]
    return {name: f"{name} {_short(before.get(name))} (now {_short(known.get(name))})" for name in names}


def _told(value: object) -> object:
    return None if value is False else value


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:8]}..." if len(text) == 64 else text  # a digest
