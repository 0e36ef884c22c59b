"""How well a model forks where the training text forks, judged with the text forced (teacher forcing)."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import EvalPrediction

from hf_apar.training.rows.features import IGNORED


def fork_metrics(predicted: NDArray[np.int64], targets: NDArray[np.int64], fork_id: int) -> dict[str, float]:
    """Return recall and precision of [Fork], and the accuracy over all tokens; 0 where there is nothing to count.

    >>> fork_metrics(np.array([9, 9, 2, 3]), np.array([9, 1, 9, -100]), fork_id=9)
    {'fork_recall': 0.5, 'fork_precision': 0.5, 'accuracy': 0.3333333333333333}
    """
    counted = targets != IGNORED
    wanted, given = (targets == fork_id), (predicted == fork_id) & counted
    return {
        "fork_recall": _share(given & wanted, wanted),
        "fork_precision": _share(given & wanted, given),
        "accuracy": _share((predicted == targets) & counted, counted),
    }


def _share(part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> float:
    return float(part.sum() / whole.sum()) if whole.any() else 0.0


def best_tokens(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Reduce logits (batch, length, vocabulary) to their best tokens (batch, length) before the Trainer keeps them."""
    scores = logits[0] if isinstance(logits, tuple) else logits
    return scores.argmax(dim=-1)


def metrics_for(fork_id: int) -> Callable[[EvalPrediction], Mapping[str, float]]:
    """Return :func:`fork_metrics` in the form that the Trainer calls."""

    def compute(prediction: EvalPrediction) -> Mapping[str, float]:
        return fork_metrics(np.asarray(prediction.predictions), np.asarray(prediction.label_ids), fork_id)

    return compute
