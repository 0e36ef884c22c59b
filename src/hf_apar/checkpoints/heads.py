"""The Medusa heads of a checkpoint: in its folder, or in its repository on the Hub."""

from pathlib import Path
from typing import Any

from hf_apar.checkpoints.sources import FILES, find_source, is_folder
from hf_apar.errors import ConfigurationError
from hf_apar.speculation.medusa import HEADS_FILE, HEADS_FOLDER, MedusaHeads, heads_in

_PLACES = (HEADS_FILE, f"{HEADS_FOLDER}/{HEADS_FILE}")


def find_heads(name: str | Path, **options: Any) -> Path | None:
    """Return the file of the heads that lie in a folder or repository, got from the Hub if need be; ``None`` if none do.

    Args:
        name: a folder, or a name on the Hub: of a checkpoint, an adapter, or heads alone.
        options: how to get files from the Hub, as those of ``from_pretrained``: ``revision``, ``cache_dir`` and the others.

    Raises:
        CheckpointError: if there is no such repository, or it can be read neither on the Hub nor in the cache.
    """
    if is_folder(str(name)):
        return heads_in(Path(name) / options.get("subfolder", ""))
    source = find_source(name, options, files=(*_PLACES, *FILES))
    return next((file for place in _PLACES if (file := source.file(place)) is not None), None)


def load_heads(name: str | Path, **options: Any) -> MedusaHeads:
    """Load Medusa heads from a folder or a repository on the Hub, in float32; arguments as for :func:`find_heads`.

    Raises:
        CheckpointError: as :func:`find_heads`.
        ConfigurationError: if no heads lie there.
    """
    if (file := find_heads(name, **options)) is None:
        raise ConfigurationError(
            f"{name} has no {HEADS_FILE}; give a folder that hf-apar train-medusa wrote, or its copy on the Hub"
        )
    return MedusaHeads.load(file.parent)
