"""A win rate as it would be between answers of one length."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Of the intercept, which stays finite where all are won, and of the slope where wins and lengths are separable. A slope held
# harder leaves a part of length in the rate: at 1.0 a judge of nothing but length gave 0.58 for 200 prompts, at 0.1 0.53.
RIDGE = np.array([0.01, 0.1])
_STEPS = 100


def length_controlled(values: Array) -> float:
    """Return the win rate at equal length, a statistic for :func:`~hf_apar.evaluation.statistics.bootstrap`.

    The idea is that of AlpacaEval 2 (Dubois et al., arXiv 2404.04475): a logistic regression of the wins on the difference
    in length, ``win ~ intercept + slope * tanh(difference / its standard deviation)``, read off where the difference is 0.
    What is published differs: it has a term for how hard each of its 805 instructions is, known from other models' answers;
    answers of its baseline that were made short or long on purpose are fitted along; its penalty is an L1 chosen by
    cross-validation; and it is fitted to a judge's probabilities in one order, where these are verdicts of both. The rates
    of this function compare with one another, and not with those of the leaderboard.

    Args:
        values: (prompts, 2): 1 for a win, 0.5 for a tie, 0 for a loss; how much longer the answer is than the other, in any
            unit.

    Returns:
        The rate; ``nan`` where no answer is at least as long as the other, or none at most as long: then the rate at equal
        length is a guess.
    """
    scores, differences = values.T
    if differences.min() > 0 or differences.max() < 0:
        return np.nan
    spread = differences.std()
    features = np.column_stack((np.ones(len(scores)), np.tanh(differences / (spread or 1.0))))  # (prompts, 2)
    return float(_logistic(fit_logistic(features, scores, RIDGE)[:1])[0])


def fit_logistic(features: Array, targets: Array, ridge: Array) -> Array:
    """Return the weights (columns) of a logistic regression, by Newton's method (iteratively reweighted least squares).

    They minimise the sum of the cross entropies and ``ridge / 2 * weights**2``.

    Args:
        features: (items, columns).
        targets: (items,), each from 0 to 1.
        ridge: (columns,), each greater than 0.
    """
    weights = np.zeros(features.shape[1])
    loss = _loss(features, targets, ridge, weights)
    for _ in range(_STEPS):
        means = _logistic(features @ weights)
        slope = features.T @ (means - targets) + ridge * weights
        curvature = (features.T * (means * (1 - means))) @ features + np.diag(ridge)
        step = np.linalg.solve(curvature, slope)
        while (next_loss := _loss(features, targets, ridge, weights - step)) > loss + 1e-9:
            step /= 2  # a full step may overshoot where the curvature is small
        weights, loss = weights - step, next_loss
        if np.abs(step).max() < 1e-8:
            break
    return weights


def _loss(features: Array, targets: Array, ridge: Array, weights: Array) -> float:
    logits = features @ weights
    return float(np.sum(np.logaddexp(0, logits) - targets * logits) + ridge @ weights**2 / 2)


def _logistic(logits: Array) -> Array:
    return np.exp(-np.logaddexp(0, -logits))
