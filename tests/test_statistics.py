"""Intervals hold what they should as often as they should, and the regression finds its minimum."""

from math import comb, sqrt
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_apar.errors import DataError
from hf_apar.evaluation.length_control import fit_logistic, length_controlled
from hf_apar.evaluation.statistics import Interval, bootstrap, mean, quantile, quotient, ratio, ratio_of_sums, wilson


def test_the_bootstrap_interval_of_a_mean_is_that_of_the_normal_distribution():
    """The mean of n draws of variance 1 lies within 1.96 / sqrt(n) of the truth in 95 % of experiments."""
    draws, held, widths = np.random.default_rng(0), 0, []
    for seed in range(400):
        found = bootstrap(draws.normal(3.0, 1.0, size=100), mean, n=500, seed=seed)
        held += 3.0 in found
        widths.append(found.high - found.low)
    assert held / 400 == pytest.approx(0.95, abs=0.03)
    assert np.mean(widths) == pytest.approx(2 * 1.96 / sqrt(100), rel=0.03)


def test_the_level_is_the_share_of_experiments():
    draws = np.random.default_rng(1)
    held = sum(0.0 in bootstrap(draws.normal(size=100), mean, n=500, seed=seed, level=0.5) for seed in range(400))
    assert held / 400 == pytest.approx(0.5, abs=0.07)


def test_the_interval_of_a_ratio_of_sums_knows_that_parts_belong_to_wholes():
    """A ratio that is the same in each pair is known exactly, however much the pairs differ."""
    wholes = np.random.default_rng(2).uniform(1, 100, size=50)
    assert ratio(2 * wholes, wholes) == Interval(*[pytest.approx(2.0)] * 3)
    noisy = wholes * np.random.default_rng(3).choice([1.0, 3.0], size=50)
    found = ratio(noisy, wholes)
    rate = noisy.sum() / wholes.sum()
    error = sqrt(np.sum((noisy - rate * wholes) ** 2)) / wholes.sum()  # the delta method
    assert found.value == pytest.approx(rate) and (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_the_quick_interval_of_a_ratio_is_the_bootstraps():
    """The oracle is the bootstrap, which draws one sample after the other; both differ by chance alone."""
    draws = np.random.default_rng(7)
    parts, wholes = draws.uniform(0, 9, size=30), draws.choice([0.0, 1.0, 5.0], size=30)
    quick, slow = ratio(parts, wholes, n=20_000), bootstrap(np.column_stack((parts, wholes)), ratio_of_sums, n=20_000)
    assert quick.value == slow.value
    assert (quick.low, quick.high) == (pytest.approx(slow.low, rel=0.02), pytest.approx(slow.high, rel=0.02))
    assert str(ratio([1.0, 2.0, 3.0, 4.0], [1.0] * 4)) == str(bootstrap([1.0, 2.0, 3.0, 4.0], mean))
    with pytest.raises(DataError, match="there is no figure with an interval of 0 items"):
        ratio([], [])


def test_the_quick_intervals_of_quantiles_and_quotients_are_the_bootstraps():
    draws = np.random.default_rng(8)
    values = draws.uniform(1, 9, size=(30, 4))
    quick = quantile(values[:, 0], 0.25, n=20_000)
    slow = bootstrap(values[:, 0], lambda some: float(np.quantile(some, 0.25)), n=20_000)
    assert (quick.low, quick.value, quick.high) == pytest.approx((slow.low, slow.value, slow.high), rel=0.02)

    def ratios(some):
        first, second, third, fourth = some.sum(axis=0)
        return first / second / (third / fourth)

    quick, slow = quotient(values[:, :2], values[:, 2:], n=20_000), bootstrap(values, ratios, n=20_000)
    assert (quick.low, quick.value, quick.high) == pytest.approx((slow.low, slow.value, slow.high), rel=0.02)
    assert quotient([[1, 2]], [[0, 2]]) is None and quotient([[1, 0]], [[1, 2]]) is None


def test_items_are_drawn_whole_and_the_seed_decides():
    values = [[number, number] for number in range(1, 21)]
    assert bootstrap(values, ratio_of_sums) == Interval(1.0, 1.0, 1.0)
    one, same, other = (bootstrap(range(20), mean, seed=seed) for seed in (5, 5, 6))
    assert one == same != other


@pytest.mark.parametrize(("values", "statistic"), [([], mean), (np.empty((0, 2)), ratio_of_sums), ([[1, 0]], ratio_of_sums)])
def test_what_cannot_be_counted_has_no_interval(values, statistic):
    with pytest.raises(DataError, match="there is no figure with an interval"):
        bootstrap(values, statistic)


@pytest.mark.parametrize(("trials", "chance"), [(20, 0.5), (40, 0.3), (100, 0.1), (200, 0.7)])
def test_wilsons_interval_covers_the_binomial_as_often_as_it_says(trials, chance):
    """Summed over all outcomes: the chance that the interval of one holds the truth."""
    covered = sum(
        comb(trials, count) * chance**count * (1 - chance) ** (trials - count)
        for count in range(trials + 1)
        if chance in wilson(count, trials)
    )
    assert covered == pytest.approx(0.95, abs=0.015)


@given(st.integers(1, 300).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))), st.floats(0.5, 0.99))
def test_wilsons_limits_are_where_the_score_test_turns(trials, level):
    """At a limit p that is inside (0, 1), the share lies z standard errors of p away."""
    count, total = trials
    found, z = wilson(count, total, level=level), NormalDist().inv_cdf((1 + level) / 2)
    for limit in {found.low, found.high} - {0.0, 1.0}:
        assert abs(count / total - limit) == pytest.approx(z * sqrt(limit * (1 - limit) / total), abs=1e-6)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(("count", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_what_is_no_share_is_refused(count, total):
    with pytest.raises(DataError, match=f"{count} of {total} is no share"):
        wilson(count, total)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1, 1), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=40),
    st.sampled_from([0.01, 1.0]),
)
def test_the_regression_ends_where_nothing_pulls(items, penalty):
    """At the minimum the gradient is 0, also where wins and losses are separable."""
    features = np.array([[1.0, x] for x, _ in items])
    targets, ridge = np.array([y for _, y in items]), np.array([0.01, penalty])
    weights = fit_logistic(features, targets, ridge)
    means = 1 / (1 + np.exp(-features @ weights))
    assert features.T @ (means - targets) + ridge * weights == pytest.approx([0.0, 0.0], abs=1e-5)


def test_the_regression_finds_a_closed_form():
    """With a feature of -1 and 1 and no penalty to speak of, the fit is the two groups' own rates."""
    features = np.array([[1.0, -1.0]] * 10 + [[1.0, 1.0]] * 10)
    targets = np.array([1.0] * 2 + [0.0] * 8 + [1.0] * 7 + [0.0] * 3)
    low, high = np.log(2 / 8), np.log(7 / 3)
    assert fit_logistic(features, targets, np.full(2, 1e-9)) == pytest.approx([(low + high) / 2, (high - low) / 2], abs=1e-6)


def test_without_a_difference_in_length_the_rate_is_the_plain_one():
    scores = np.array([1.0] * 60 + [0.5] * 20 + [0.0] * 20)
    assert length_controlled(np.column_stack((scores, np.zeros(100)))) == pytest.approx(scores.mean(), abs=1e-3)


def test_the_rate_at_equal_length_is_that_of_the_model_that_made_the_wins():
    draws = np.random.default_rng(4)
    differences = draws.normal(80, 100, size=20_000)
    logits = 0.4 + 2.0 * np.tanh(differences / differences.std())
    wins = draws.random(20_000) < 1 / (1 + np.exp(-logits))
    found = length_controlled(np.column_stack((wins, differences)))
    assert wins.mean() > 0.7 and found == pytest.approx(1 / (1 + np.exp(-0.4)), abs=0.015)
    swapped = length_controlled(np.column_stack((1 - wins, -differences)))
    assert found + swapped == pytest.approx(1.0)
    assert np.isnan(length_controlled(np.column_stack((wins, np.abs(differences) + 1))))
