"""A run that goes on from a checkpoint goes on with what it began with, or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path

from hf_apar.checkpoints.made_with import differences, digest, note, noted
from hf_apar.errors import DataError
from hf_apar.training.mixture import Mixture

MADE_WITH = "made_with.json"


def keep_to_settings(options: Mapping[str, object], mixture: Mixture, folder: Path, checkpoint: str | None) -> None:
    """Note in ``folder`` what a run trains on, holds out and is told, and refuse to go on with anything else.

    Raises:
        DataError: if there is a ``checkpoint`` and it was made with something else, or nobody knows with what.
    """
    rows = json.dumps([[row.to_dict() for row in rows] for rows in (mixture.train, mixture.held_out)])
    settings, file = {**options, "mixture": digest(rows)}, folder / MADE_WITH
    other = differences(noted(file) or {}, settings) if checkpoint else {}
    if "mixture" in other:
        raise DataError(
            f"{checkpoint} comes from other answers, filters, shares or another seed, or its likeliest answers from another "
            "machine; go on with those, or train into a folder of its own: what was trained on must not be "
            "held out"
        )
    if other:
        raise DataError(
            f"{checkpoint} was trained with {', '.join(other.values())}; go on with that, or train into a folder of its own"
        )
    note(file, settings)
