"""What arms differ by, prompt by prompt, and what is said of it: by intervals alone."""

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest

from hf_apar.evaluation.answers import Answered
from hf_apar.evaluation.differences import Says, compare_figures, pairs_of, says, sentence, summary
from hf_apar.evaluation.figures import Figure
from hf_apar.evaluation.metrics import METRICS, Ratio, measured
from hf_apar.evaluation.paired import compare
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


def test_a_difference_is_of_the_prompts_that_count_on_both_sides():
    """Where one arm has easy prompts beside those that both have, it is no better on these."""
    asked = Prompt("p", "own", "a", "parts", ({"role": "user", "content": "?"},))

    def row(number, redundancy):
        prompt, extras = replace(asked, key=f"p{number}"), {} if redundancy is None else {"redundancy": redundancy}
        return Row(prompt, Answered(key=prompt.key, arm="x", text="a", ended=True), extras=extras)

    ours = [row(number, 0.7 if number < 20 else 0.3) for number in range(40)]
    theirs = [row(number, 0.7 if number < 20 else None) for number in range(40)]
    assert compare_figures(ours, theirs)["all"]["redundancy"] == {"low": 0.0, "value": 0.0, "high": 0.0, "n": 20}
    assert "redundancy" not in compare_figures(ours[20:], theirs[20:])["all"]


def test_turns_of_one_conversation_are_drawn_together():
    """Second turns that repeat the first ones tell nothing new: the interval stays as wide."""
    first = rows([30, 10, 20, 40], [10, 10, 10, 10])
    second = [replace(row, prompt=replace(row.prompt, key=f"{row.prompt.key}-2", after=row.prompt.key)) for row in first]
    plain = [replace(row, answered=replace(row.answered, tokens=10)) for row in (*first, *second)]
    once, twice = (compare_figures(some, plain)["all"]["tokens_per_step"] for some in (first, [*first, *second]))
    assert once == twice | {"n": 4} and twice["n"] == 8
    once, twice = (measured(some)["ended"] for some in (first, [*first, *second]))
    assert once == twice
    seconds = [replace(row, answered=replace(row.answered, seconds=float(row.answered.tokens))) for row in (*first, *second)]
    slow = [replace(row, answered=replace(row.answered, seconds=30.0)) for row in seconds]
    once, twice = (compare(seconds[:number], slow)["all"] for number in (4, 8))
    assert once.seconds == twice.seconds and once.seconds_per_token == twice.seconds_per_token


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


def test_drafts_are_compared_with_the_same_arm_without_them():
    names = ["plain", "apar", "apar!short=0.1", "apar+heads!short=0.1"]
    assert list(pairs_of(names).values()) == [
        (names[1], "plain"), (names[2], "plain"), (names[3], "plain"), (names[3], names[2]),
    ]  # fmt: skip
    assert pairs_of(["apar"]) == {}


def test_a_ratio_of_sums_of_one_item():
    assert difference([[3, 2]], [[1, 2]]) == Interval(1.0, 1.0, 1.0) and ratio_of_sums(np.array([[3.0, 2.0]])) == 1.5
