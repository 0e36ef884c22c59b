"""What a step of an engine costs, learnt from its latest steps: more requests and more of prompts take longer."""

import numpy as np

from hf_apar.serving.admission import StepCost

_KEPT = 0.998  # weight of the steps so far when another one has been seen: about the last 500 count
_RIDGE = 1e-3  # of a unit; steps that are all alike say nothing of others, and are taken to cost what they are wide


class StepCosts:
    """A least-squares fit of a step's seconds to its requests and its prompts' tokens, older steps weighing less.

    Attributes:
        steps: how many it has seen.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._products = np.zeros((3, 3))
        self._sums = np.zeros(3)

    def add(self, seconds: float, requests: int, prompt_tokens: int) -> None:
        """Take a step into account."""
        self.steps += 1
        made = np.array([1.0, requests, prompt_tokens])
        self._products = self._products * _KEPT + np.outer(made, made)
        self._sums = self._sums * _KEPT + made * seconds

    def fitted(self) -> StepCost | None:
        """Return what a step costs, ``None`` while none was seen; no part of it is negative."""
        if not self.steps:
            return None
        costs = np.linalg.solve(self._products + _RIDGE * np.eye(3), self._sums)
        return StepCost(*np.maximum(costs, 0.0).tolist())
