"""Metrics on literal tables; the replay against the loop itself."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from conftest import EOS, random_prompts, tiny_llama
from hf_apar import AparConfig, enable_apar
from hf_apar.decoding import Decoder
from hf_apar.evaluation.agreement import Agreement, Judged
from hf_apar.evaluation.answers import Answered
from hf_apar.evaluation.figures import figures, warnings
from hf_apar.evaluation.metrics import METRICS, measured
from hf_apar.evaluation.paired import Paired, compare
from hf_apar.evaluation.plots import MOST_GROUPS, PLOTS, _drew, draw, tokens_per_step
from hf_apar.evaluation.preference import Comparison
from hf_apar.evaluation.report import Report, markdown, table
from hf_apar.evaluation.rows import Detail, Row, rows_by_arm
from hf_apar.evaluation.statistics import Interval
from hf_apar.evaluation.suites import Prompt
from hf_apar.replay import trace_of_tree
from hf_apar.tree.threads import ParagraphTree, Thread
from letter_tokenizer import letter_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from peak_kv import kv_over_time

TOKENIZER = letter_tokenizer()


def tree(*children, written=3):
    """A root that forks a child for each of ``children``, (place, tokens)."""
    root = Thread(0, None, 0, 1, [1], tokens=[1] * written)
    threads = [Thread(number, 0, place, 2, [1], tokens=tokens) for number, (place, tokens) in enumerate(children, start=1)]
    return ParagraphTree([root, *threads]).to_dict()


def row(key, *, expected=None, category="a", items=None, check=None, text="", extras=None, **answered):
    prompt = Prompt(key, "own", category, expected, ({"role": "user", "content": "?"},), items=items, check=check)
    answer = Answered(**{"key": key, "arm": "apar", "text": text, "ended": True} | answered)
    return Row(prompt, answer, TOKENIZER, extras or {})


ROWS = [
    row("1", expected="parts", items=2, tree=tree((1, [5, 6]), (2, [7, 8])), tokens=30, steps=10, critical_path=9,
        seconds=2.0, peak_kv=8, kv_if_sequential=16, attended=30, attended_if_sequential=60, peak_threads=3,
        extras={"nll": 1.0}, text="- A: a b c d e\n- B: f g h i j\n- C: k l m n o"),
    row("2", expected="parts", items=3, tree=tree(), text="1 2", tokens=10, steps=20, critical_path=20,
        ended=False, seconds=1.0, peak_kv=4, kv_if_sequential=4, attended=10,
        attended_if_sequential=20, drafts=2, proposed=4, accepted=1),
    row("3", expected="whole", category="b", tree=tree((1, [5]), (1, [5])), check="four", text="It is Four.", tokens=20,
        steps=10, critical_path=10, seconds=3.0, peak_threads=2, extras={"nll": 2.0, "answers_question": 0.5}),
    row("4", expected="whole", category="b", check="^five", text="one two three four five " * 4, tree=tree(), tokens=20,
        steps=20, critical_path=20, extras={"nll": 6.0, "redundancy": 0.25, "relevance": 0.75}),
    row("5", expected="either", tree=tree((2, []), written=2), tokens=4, steps=4, critical_path=4),
]  # fmt: skip
TABLE = {
    "forks_in_parts": 1 / 2, "in_parts": 1 / 2, "false_forks": 1 / 2, "forks_either": 1.0,
    "forks": 3 / 5,
    "malformed": 1 / 3, "empty_or_repeated": 2 / 5, "items_right": 1 / 2, "items_ratio": 2 / 5, "ended": 4 / 5,
    "looped": 1 / 5, "right": 1 / 2, "tokens_per_step": 84 / 64, "total_over_critical_path": 84 / 63, "steps": 64 / 5,
    "tokens": 84 / 5, "seconds": 2.0, "seconds_per_token": 6 / 60, "peak_kv": 12 / 20, "attended": 40 / 80,
    "accepted": 1 / 4, "seconds_first_quartile": 1.5, "seconds_median": 2.0, "seconds_third_quartile": 2.5,
    "tokens_per_step_forked": 54 / 24, "seconds_per_token_forked": 5 / 50, "seconds_per_token_unforked": 1 / 10, "nll": 1.5,
    "distinct_4": (1 + 5 / 17) / 2,
    "seconds_forked": 2.5, "seconds_unforked": 1.0, "peak_slots": 6.0,
    "late_forks": 0.0, "nested": 0.0,
    "attended_per_token": 1.0, "peak_threads": 2.0, "redundancy": 0.25, "relevance": 0.75, "answers_question": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), TABLE.items())
def test_metrics_of_a_literal_table(name, value):
    figure = METRICS[name].of(ROWS)
    assert figure.value == pytest.approx(value) and figure.low <= figure.value <= figure.high


def test_nothing_to_count_is_no_figure():
    assert {*TABLE, "sibling_overlap"} == METRICS.keys(), "each figure stands in a literal table"
    assert {name for name, metric in METRICS.items() if metric.of(ROWS) is None} == {"sibling_overlap"}
    assert measured([]) == {}
    assert "ended" in measured([row("x")]) and "forks" not in measured([row("x", text="of an arm without threads")])


def test_rows_follow_the_prompts_and_leave_out_what_was_not_answered():
    answers = {(one.prompt.key, arm): one.answered for one in ROWS for arm in ("apar", "plain")}
    del answers["2", "plain"]
    prompts = [one.prompt for one in reversed(ROWS)]
    found = rows_by_arm(prompts, answers, {"apar": TOKENIZER}, {(one.prompt.key, "apar"): one.extras for one in ROWS})
    assert found["apar"] == [*reversed(ROWS)]
    assert [one.prompt.key for one in found["plain"]] == ["5", "4", "3", "1"]


def test_a_title_without_a_word_is_none():
    assert not row("x", tree=tree((1, [5]), (2, [6]))).malformed
    assert row("x", tree=tree((1, [5]), (1, [6]))).malformed
    assert row("x", tree=tree((0, [5]))).malformed
    blank = tree((1, [5]))
    blank["threads"][0]["tokens"][0] = EOS  # special, so it reads as nothing
    assert row("x", tree=blank).malformed


def letters(text):
    return TOKENIZER(text)["input_ids"]


def test_parts_are_what_threads_wrote_and_the_last_line_before_them_is_their_title():
    root = Thread(0, None, 0, 1, [1], tokens=letters("abcd"))
    threads = [root, Thread(1, 0, 2, 2, [1], tokens=letters("efg")), Thread(2, 1, 1, 3, [1], tokens=letters("hi"))]
    threads += [Thread(3, 0, 4, 2, [1], tokens=letters("jk")), Thread(4, 0, 4, 2, [1], tokens=[])]
    nested = row("x", text="abehifgcdjk", tree=ParagraphTree(threads).to_dict())
    assert nested.parts.to_json() == ["ab", ["e", ["hi"], "fg"], "cd", ["jk"], "", [""], ""]
    assert nested.siblings == [
        [Detail("ab", "ehifg"), Detail("cd", "jk"), Detail("", "")], [Detail("e", "hi")], [], [], [],
    ]  # fmt: skip
    plain = row("x", text="Do this:\n- Oak: it grows very slowly indeed\n- Ash: b c d e f\n- Elm: g h i j k")
    assert plain.siblings[0][0] == Detail("- Oak:", " it grows very slowly indeed")
    assert plain.items == 3 and nested.items == 3


class Codes:
    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(map(chr, token_ids))


def with_details(*details):
    threads = tree(*((1, [*map(ord, detail)]) for detail in details))
    return replace(row("x", tree=threads), tokenizer=Codes())


@pytest.mark.parametrize(
    ("details", "shared", "total"),
    [
        (["it is good for you", "It is good, for me"], 2, 3),
        (["it is good for you", "quite another thing", "it is good"], 1, 2),
        (["it is good", "it is"], 0, 0),
        (["it is good, it is good"], 0, 0),
    ],
)
def test_siblings_share_runs_of_three_words(details, shared, total):
    assert with_details(*details).sibling_runs == (shared, total)


def test_overlap_is_over_all_runs_that_could_be_shared():
    rows = [with_details("a b c d", "a b c d"), with_details("a b c", "x y z a b c"), with_details("a b c")]
    assert METRICS["sibling_overlap"].of(rows).value == pytest.approx(3 / 6)
    assert METRICS["sibling_overlap"].of(rows[2:]) is None


def test_a_cut_answer_earns_nothing_by_threads_that_go_on():
    cut = row("x", ended=False, tokens=100, steps=10, critical_path=10)
    assert [METRICS[name].of([cut]).value for name in ("tokens_per_step", "total_over_critical_path")] == [1.0, 1.0]


def test_late_and_nested_forks():
    threads = [Thread(0, None, 0, 1, [1], tokens=[1] * 200), Thread(1, 0, 128, 2, [1], tokens=[5] * 9)]
    late = row("x", tree=ParagraphTree(threads).to_dict())
    early = row("y", tree=ParagraphTree([*threads[:1], replace(threads[1], fork_position=127)]).to_dict())
    deep = row("z", tree=ParagraphTree([*threads, Thread(2, 1, 4, 3, [1], tokens=[6])]).to_dict())
    assert [METRICS["late_forks"].of([one]).value for one in (late, early)] == [1.0, 0.0]
    assert METRICS["nested"].of([late, deep, early]).value == pytest.approx(1 / 3)


def test_signs_are_no_words_whose_variety_counts():
    assert METRICS["distinct_4"].of([row("x", text="- - - -")]) is None


def test_pairs_are_compared_over_the_prompts_that_both_answered():
    slow = [row(key, seconds=seconds, tokens=10) for key, seconds in (("1", 4.0), ("2", 4.0), ("3", 1.0), ("9", 50.0))]
    found = compare(ROWS, slow)
    assert list(found) == ["all", "forked", "unforked", "suite own", "category a", "category b"]
    assert [one.count for one in found.values()] == [3, 2, 1, 3, 2, 1]
    assert found["all"].seconds.value == pytest.approx(6 / 9)
    assert found["all"].seconds_per_token.value == pytest.approx((6 / 60) / (9 / 30))
    assert found["all"].quartiles == pytest.approx((0.375, 0.5, 1.75))
    assert found["unforked"].seconds.value == pytest.approx(1 / 4)
    same = compare(ROWS, ROWS)["all"]
    assert (same.seconds.low, same.seconds.high) == (1.0, 1.0)


def answered(model, prompt, **settings):
    out = model.generate(
        torch.tensor([prompt]), apar=AparConfig(**settings), max_new_tokens=150, return_dict_in_generate=True
    )
    return out.trees[0], out.stats[0]


@pytest.mark.parametrize("seed", range(4))
def test_a_replay_holds_what_the_loop_held(seed):
    model = enable_apar(tiny_llama(seed=seed))
    forks = 0
    for prompt in random_prompts(3, seed=seed):
        whole, stats = answered(model, prompt, max_threads=512)
        held = kv_over_time(ParagraphTree.from_dict(whole.to_dict()))
        assert len(held) == stats.steps == stats.critical_path
        assert max(one.reach for one in held) == stats.peak_kv
        assert all(one.slots <= one.reach for one in held)
        narrow, cost = answered(model, prompt, max_threads=2)
        if whole.closing_ids and narrow.closing_ids:  # else the limit cut them at different places
            assert kv_over_time(narrow) == held and cost.critical_path == stats.critical_path
            fewer = kv_over_time(whole, max_threads=2)
            assert (len(fewer), max(one.reach for one in fewer)) == (cost.steps, cost.peak_kv)
        forks += len(whole.threads) - 1
    assert forks


@pytest.mark.parametrize("seed", range(4))
def test_a_tree_tells_what_the_loop_held_while_each_step_ran(seed, monkeypatch):
    held, forward = [], Decoder.forward

    def spied(decoder, plan):
        held.append(decoder.rows[0].pool.held)
        return forward(decoder, plan)

    monkeypatch.setattr(Decoder, "forward", spied)
    model = enable_apar(tiny_llama(seed=seed))
    for prompt in random_prompts(3, seed=seed):
        held.clear()
        tree, _ = answered(model, prompt, max_threads=512)
        assert trace_of_tree(tree, TOKENIZER).held[:-1] == held


def test_figures_by_arm_and_suite_are_json():
    found = json.loads(json.dumps(figures({"apar": ROWS})))
    assert list(found) == ["apar"] and list(found["apar"]) == ["all", "own"]
    assert found["apar"]["all"] == found["apar"]["own"] == {
        name: {"low": one.low, "value": one.value, "high": one.high, "n": len(METRICS[name].counted(ROWS))}
        for name, one in measured(ROWS).items()
    }
    assert [found["apar"]["all"][name]["n"] for name in ("ended", "forks_in_parts", "malformed")] == [5, 2, 3]


REPORT = """\
# Evaluation

A figure stands before its 95 % interval; n is told where not all answers count. Shares lie between 0 and 1, ratios \
are of sums over the whole set; where a ratio's interval has no width, no answer differed, which others may.

Made with model m, cores 2. Suites, with their prompts: own (2). Arms:

- `apar`: in threads.
- `plain`: without.

## Read this first

- apar: 1 of 2 answers were cut by the limit; their length and wall clock are the limit's, and each counts one token a \
step; the figures of this arm are no result: allow more tokens.
- apar: fewer than 20 answers in own (2); the intervals there are too narrow.
- plain: fewer than 20 answers in own (1); the intervals there are too narrow.

## All suites (2 prompts)

| figure | should be | apar | plain |
| --- | --- | --- | --- |
| ended | high | 0.5 (0.0945 to 0.905) | 1 (0.207 to 1), n=1 (few) |
| seconds | low | 1.5 (1.5 to 1.5), n=1 (few) | - |

## What differs

By the intervals of the differences over the prompts that both answered; one in forty is better by chance.

### apar against plain

- Worse: `ended` by 0.5 (0.2 to 0.8).

## Wall clock: apar against plain

Ratios: below 1 the first arm is faster.

| answers | n | seconds, sum over sum | seconds per token | quartiles of single ratios |
| --- | --- | --- | --- | --- |
| all | 1 (few) | 0.5 (0.5 to 0.5) | - | 0.5 / 0.5 / 0.5 |

## Which answers a judge prefers

{judged}

## Held

![Held](held.png)

## What the figures are

- `ended`: share of the answers all of whose threads end by themselves.
- `seconds`: wall clock of an answer, on average.
"""
UNJUDGED = (
    "No judge compared the answers: what stands here says how they were written and what they cost, and, but for what is "
    "checked by a pattern, not whether they are right or good."
)
JUDGED = """\
### apar against plain

| judge | pairs judged | alike: ties | win_rate | length_controlled | win | tie | loss | longer | consistency | \
beyond_chance | first_place |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| strict 12ab | 2 | 1 | 0.5 (0 to 1) | - | 0.5 (0 to 1) | 0 (0 to 0) | 0.5 (0 to 1) | 1 (1 to 1) | 1 (0.342 to 1) | \
0.5 (0 to 1) | 0.5 (0.5 to 0.5) |

- strict 12ab: 2 pairs were judged: too few to say.
- strict 12ab: The judge says the same in both orders for 1 (0.342 to 1) of the pairs, and one who is blind to the answers \
might as often: its verdicts mean nothing here.
- strict 12ab: One arm's answers are always the longer ones: what is due to length cannot be told.
- Two judges agree on 0.5 (0.0945 to 0.905) of 2 pairs; Cohen's kappa -."""


def test_the_report_is_the_same_for_the_same_input():
    rows = {"apar": [row("1", seconds=1.5), row("2", ended=False)], "plain": [row("1", seconds=3.0)]}
    half, third = Interval(0.0, 0.5, 1.0), Interval(0.0945, 0.5, 0.905)
    report = Report(
        made_with={"model": "m", "base": None, "chat_template_kwargs": {}, "cores": 2},
        arms={"apar": "in threads", "plain": "without"},
        suites={"own": 2},
        warnings=warnings(rows),
        figures={
            "apar": {
                "all": {
                    "ended": {"low": 0.0945, "value": 0.5, "high": 0.905, "n": 2},
                    "seconds": {"low": 1.5, "value": 1.5, "high": 1.5, "n": 1},
                }
            },
            "plain": {"all": {"ended": {"low": 0.207, "value": 1.0, "high": 1.0, "n": 1}}},
        },
        compared={"apar against plain": {"all": Paired(1, Interval(0.5, 0.5, 0.5), None, (0.5, 0.5, 0.5))}},
        differences={"apar against plain": {"all": {"ended": {"low": -0.8, "value": -0.5, "high": -0.2, "n": 30}}}},
        plots={"Held": "held.png"},
    )
    assert markdown(report) == REPORT.format(judged=UNJUDGED)
    said = Comparison(
        judge="strict 12ab", pairs=3, alike=1, judged=2, not_given=0, no_verdict=0, win=half, tie=Interval(0, 0, 0),
        loss=half, win_rate=half, length_controlled=None, longer=Interval(1, 1, 1), consistency=Interval(0.342, 1, 1),
        beyond_chance=half,
        first_place=Interval(0.5, 0.5, 0.5),
    )  # fmt: skip
    judged = Judged((said,), Agreement(2, ((1, 0, 0), (1, 0, 0), (0, 0, 0)), third, None))
    assert markdown(replace(report, judged={"apar against plain": judged})) == REPORT.format(judged=JUDGED)


def test_plots_are_drawn_where_they_show_something(apar_llama, tmp_path):
    assert draw({"plain": [row("1")]}, tmp_path) == {}
    whole, stats = answered(apar_llama, random_prompts(1, seed=1)[0], max_threads=512)
    assert len(whole.threads) > 1
    made = row("1", tree=whole.to_dict(), **vars(stats))
    plain = row("1", tokens=10, steps=10, seconds=1.0)
    files = draw({"apar": [made], "plain": [plain]}, tmp_path)
    assert list(files) == [title for title in PLOTS if title != "Under faults"]
    files = draw({"apar": [made], "plain": [plain], "apar!missed=0.5": [plain], "apar!rewrite=2": [plain]}, tmp_path)
    assert list(files) == list(PLOTS) and files["Under faults"] == "under-faults.png"
    for name in files.values():
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [MOST_GROUPS, MOST_GROUPS + 1])
def test_names_of_bars_can_be_read(count):
    names = [f"c{n}" for n in range(count)] if count == MOST_GROUPS else ["own"]
    some = [row(str(n), category=f"c{n}", tree=tree((1, [2])), tokens=4, steps=2) for n in range(count)]
    axes = Figure().subplots()
    assert tokens_per_step({"apar": some}, axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == names


def test_panels_that_show_nothing_leave_no_hole():
    def named(name):
        return lambda rows, axes: bool(axes.set_title(name) and name)

    figure = Figure()
    assert _drew([named(""), named("one"), named(""), named("two"), named("")], {}, figure)
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]
    assert [axes.get_subplotspec().num1 for axes in figure.axes] == [0, 1]
    assert not _drew([named("")], {}, Figure())


def test_the_terminals_table_has_a_line_for_each_figure():
    found = figures({"apar": ROWS, "plain": ROWS})
    made = table(found, ["apar"])
    assert [column.header for column in made.columns] == ["figure", "should be", "apar"]
    assert list(made.columns[0].cells) == list(found["apar"]["all"])
    assert set(TABLE) <= set(made.columns[0].cells)
