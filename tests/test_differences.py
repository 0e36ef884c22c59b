"""What arms differ by, prompt by prompt, and what is said of it: by intervals alone."""

from math import sqrt

import numpy as np
import pytest

from hf_apar.evaluation.answers import Answered
from hf_apar.evaluation.differences import Says, compare_figures, pairs_of, says, sentence, summary
from hf_apar.evaluation.figures import Figure
from hf_apar.evaluation.metrics import METRICS, Ratio
from hf_apar.evaluation.rows import Row
from hf_apar.evaluation.statistics import Interval, difference, ratio_of_sums
from hf_apar.evaluation.suites import Prompt


def rows(tokens, steps, suite="own", **answered):
    asked = ({"role": "user", "content": "?"},)
    return [
        Row(
            Prompt(f"{suite}-{number}", suite, "a", "parts", asked),
            Answered(key=f"{suite}-{number}", arm="x", text="a b c", ended=True, tokens=one, steps=step, **answered),
        )
        for number, (one, step) in enumerate(zip(tokens, steps, strict=True))
    ]


def test_an_interval_of_a_difference_is_that_of_pairs():
    """Of means: the normal distribution's, with the deviation of the differences, far smaller than that of either sample."""
    draws = np.random.default_rng(0)
    common, noise = draws.normal(0, 10, size=400), draws.normal(1, 1, size=400)
    ones = np.ones(400)
    found = difference(np.column_stack((common + noise, ones)), np.column_stack((common, ones)))
    assert found.value == pytest.approx(noise.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * noise.std() / sqrt(400), rel=0.1)


def test_what_does_not_count_on_a_side_weighs_nothing_there():
    assert difference([[2, 1], [0, 0]], [[0, 0], [1, 1]]).value == 1.0
    assert difference([[2, 1]], [[0, 0]]) is None


def test_differences_are_those_of_the_prompts_that_both_answered():
    fast, slow = rows([30, 10, 10], [10, 10, 10]), rows([10, 20, 90], [10, 20, 90])[:2]
    found = compare_figures([*fast, *rows([8], [2], suite="other")], [*slow, *rows([8], [8], suite="other")])
    assert list(found) == ["own", "other", "all"] or list(found) == ["all", "own", "other"]
    assert found["own"]["tokens_per_step"]["value"] == pytest.approx(40 / 20 - 30 / 30)
    assert found["other"]["tokens_per_step"] == {"low": 3.0, "value": 3.0, "high": 3.0, "n": 1}
    assert found["all"]["tokens_per_step"]["value"] == pytest.approx(48 / 22 - 1)
    assert found["all"]["tokens_per_step"]["n"] == 3
    assert "seconds" not in found["all"] and "tokens_per_step_forked" not in found["all"]
    assert compare_figures(fast, rows([1], [1], suite="other")) == {}


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if isinstance(metric.figure, Ratio)])
def test_each_figure_differs_by_the_difference_of_both(name):
    """The oracle is the figure of each arm."""
    metric = METRICS[name]
    one = [row for row in rows([30, 10], [10, 10], seconds=2.0, peak_kv=4, kv_if_sequential=8)]
    other = [row for row in rows([10, 20], [10, 20], seconds=1.0, peak_kv=3, kv_if_sequential=3)]
    values = [metric.of(some) for some in (one, other)]
    found = compare_figures(one, other)["all"].get(name)
    assert (found is None) == (None in values)
    if found is not None:
        assert found["value"] == pytest.approx(values[0].value - values[1].value)


@pytest.mark.parametrize(
    ("metric", "low", "high", "n", "what", "said"),
    [
        ("tokens_per_step", 0.5, 1.5, 20, Says.better, "better by 1 (0.5 to 1.5)"),
        ("tokens_per_step", -1.5, -0.5, 20, Says.worse, "worse by 1 (0.5 to 1.5)"),
        ("nll", -1.5, -0.5, 20, Says.better, "better by 1 (0.5 to 1.5)"),
        ("nll", 0.5, 1.5, 20, Says.worse, "worse by 1 (0.5 to 1.5)"),
        ("tokens", 0.5, 1.5, 99, Says.more, "higher by 1 (0.5 to 1.5)"),
        ("tokens", -1.5, -0.5, 99, Says.less, "lower by 1 (0.5 to 1.5)"),
        ("tokens", -1.0, 3.0, 99, Says.nothing, "no difference: a difference of 1 (-1 to 3)"),
        ("nll", -1.0, 3.0, 99, Says.nothing, "no gain: a difference of 1 (-1 to 3)"),
        ("nll", 0.0, 2.0, 99, Says.nothing, "no gain: a difference of 1 (0 to 2)"),
        ("nll", 0.5, 1.5, 19, Says.few, "too few answers to say: a difference of 1 (0.5 to 1.5)"),
    ],
)
def test_what_is_said_follows_from_the_interval(metric, low, high, n, what, said):
    found = Figure(low=low, value=(low + high) / 2, high=high, n=n)
    assert (says(metric, found), sentence(metric, found)) == (what, said)


def test_a_summary_names_each_figure_once():
    found = {
        "nll": Figure(low=0.5, value=1.0, high=1.5, n=40), "seconds": Figure(low=-3.0, value=-2.0, high=-1.0, n=40),
        "steps": Figure(low=-3.0, value=-2.0, high=1.0, n=40), "right": Figure(low=0.5, value=1.0, high=1.5, n=4),
    }  # fmt: skip
    assert summary(found) == [
        "Better: `seconds` by 2 (1 to 3).", "Worse: `nll` by 1 (0.5 to 1.5).", "No difference told: `steps`.",
        "Too few answers: `right`.",
    ]  # fmt: skip


def test_strategies_are_compared_with_the_same_fault_without_them():
    names = ["apar", "apar!loops=9", "apar!short=0.1", "apar!short=0.1!loops=9", "apar!short=0.1!rewrite=2"]
    assert list(pairs_of(names).values()) == [
        (names[1], "apar"), (names[2], "apar"), (names[3], "apar"), (names[4], "apar"), (names[3], names[2]),
        (names[4], names[2]),
    ]  # fmt: skip
    assert pairs_of(["apar"]) == {}


def test_a_ratio_of_sums_of_one_item():
    assert difference([[3, 2]], [[1, 2]]) == Interval(1.0, 1.0, 1.0) and ratio_of_sums(np.array([[3.0, 2.0]])) == 1.5
