"""What benchmarks/evaluation.py writes: sentences that follow from figures, and a page around them that stays as it was."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("evaluation_page", ROOT / "benchmarks" / "evaluation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figure(low, value, high, n=40):
    return {"low": low, "value": value, "high": high, "n": n}


def record(arms, figures, differences=(), compared=(), suites=None, **more):
    return {
        "made_with": {"dtype": "bfloat16", "max_new_tokens": 512, "cores": 2, "model": "/some/folder"},
        "arms": dict.fromkeys(arms, "an arm"),
        "suites": suites or {"parts": 40},
        "warnings": [],
        "figures": {arm: {suite: figures.get(arm, {}) for suite in ("all", *(suites or {"parts": 40}))} for arm in arms},
        "differences": {name: {"all": found} for name, found in dict(differences).items()},
        "compared": {name: {"all": {"count": 40, "seconds": one}, "suite parts": {"count": 40, "seconds": one}}
                     for name, one in dict(compared).items()},
        "plots": {},
    } | more  # fmt: skip


FASTER = {"low": 0.5, "value": 0.6, "high": 0.7}
SUITES = record(
    ["plain", "apar"],
    {
        "apar": {"tokens_per_step": figure(2, 2.5, 3), "nll": figure(0.8, 0.9, 1), "peak_kv": figure(0.7, 0.75, 0.8),
                 "attended": figure(0.9, 0.95, 1.1), "forks": figure(0.6, 0.7, 0.8), "late_forks": figure(0, 0, 0.1)},
        "plain": {"tokens_per_step": figure(1, 1, 1), "nll": figure(0.7, 0.8, 0.9)},
    },
    {"apar against plain": {"tokens_per_step": figure(1, 1.5, 2), "nll": figure(0.05, 0.1, 0.15)}},
    {"apar against plain": FASTER},
)  # fmt: skip


def test_a_judge_that_disagrees_with_itself_decides_nothing(page):
    half, sure, interval = ({"low": one - 0.1, "value": one, "high": one + 0.1} for one in (0.5, 0.9, 0.7))
    counts = {"pairs": 50, "alike": 2, "judged": 48, "not_given": 0, "no_verdict": 0}
    shares = dict.fromkeys(("win", "tie", "loss", "win_rate", "length_controlled", "longer"), interval)
    one = {"judge": "tiny", "consistency": sure, "beyond_chance": half, "first_place": half} | counts | shares
    blind = {"consistency": half, "beyond_chance": {"low": -0.1, "value": 0.1, "high": 0.3}}
    told = {"apar against plain": {"comparisons": [one, one | blind], "agreement": None}}
    assert list(page.of_judged({"judged": told})) == [
        "", "#### Which answers a judge prefers: apar against plain", "",
        "- tiny: the same in both orders for 0.9 (0.8 to 1) of 48 pairs; between what a blind one would say (0) "
        "and always (1) that is 0.5 (0.4 to 0.6). 2 more pairs are of two answers that are alike.",
        "  - Win rate 0.7 (0.6 to 0.8), at equal length 0.7 (0.6 to 0.8).",
        "- tiny: the same in both orders for 0.5 (0.4 to 0.6) of 48 pairs; between what a blind one would say (0) "
        "and always (1) that is 0.1 (-0.1 to 0.3). 2 more pairs are of two answers that are alike.",
        "  - The judge says the same in both orders for 0.5 (0.4 to 0.6) of the pairs, and one who is blind to the answers "
        "might as often: its verdicts mean nothing here.",
    ]  # fmt: skip


def test_threads_against_plain_decoding(page):
    assert list(page.of_suites(SUITES)) == [
        "", "#### With and without threads, same weights", "",
        "- `tokens_per_step`: 2.5 (2 to 3) against 1 (1 to 1): better by 1.5 (1 to 2), n=40.",
        "- `nll`: 0.9 (0.8 to 1) against 0.8 (0.7 to 0.9): worse by 0.1 (0.05 to 0.15), n=40.",
        "", "#### KV cache and attention", "",
        "- `peak_kv`: less than the same text in sequence, 0.75 (0.7 to 0.8) of it, n=40.",
        "- `attended`: no gain over the same text in sequence, 0.95 (0.9 to 1.1) of it, n=40.",
    ]  # fmt: skip


def test_quality_against_speed(page):
    clock = record(
        ["sequential", "apar", "base"], {},
        {"apar against sequential": SUITES["differences"]["apar against plain"]["all"],
         "base against sequential": {"ended": figure(-0.3, -0.2, 0.1), "right": figure(0, 0.2, 0.3, n=4)}},
        {"apar against sequential": FASTER,
         "base against sequential": {"low": 1.1, "value": 1.2, "high": 1.3}},
    )  # fmt: skip
    assert list(page.of_clock(clock))[-2:] == [
        "- apar against sequential. Wall clock, sum over sum: 0.6 (0.5 to 0.7) of the other's: faster, n=40. "
        "Quality, better: nothing; worse: `nll`.",
        "- base against sequential. Wall clock, sum over sum: 1.2 (1.1 to 1.3) of the other's: slower, n=40. "
        "Quality, better: nothing; worse: nothing; too few answers: `right`.",
    ]


def test_real_prompts(page):
    chats = record(["apar"], {"apar": {"forks": figure(0.05, 0.1, 0.15, n=500)}})
    assert list(page.of_chats(chats, SUITES))[3:] == [
        "- 0.1 (0.05 to 0.15) of 500 answers to what people asked an assistant fork within 512 tokens.",
        "- `late_forks` of the prompts above: 0 (0 to 0.1), n=40: share of the answers that fork whose first fork comes "
        "after 128 tokens or more.",
    ]


def faulty():
    arms = ["apar", "apar!short=0.1", "apar!short=0.5"]
    return record(arms, {arm: {"tokens_per_step": figure(1, 2, 3)} for arm in arms}, {
        "apar!short=0.1 against apar": {"tokens_per_step": figure(-0.1, 0, 0.1)},
        "apar!short=0.5 against apar": {"ended": figure(-0.3, -0.2, -0.1)},
    })  # fmt: skip


def test_faults_in_a_table(page):
    lines = list(page.faults(faulty()))
    assert [line for line in lines if line.startswith("| ")][2:5] == [
        "| none | 0 | 2 (1 to 3) | - | - |  |  |", "| short | 0.1 | 2 (1 to 3) | - | - | nothing | nothing |",
        "| short | 0.5 | 2 (1 to 3) | - | - | ended | nothing |",
    ]  # fmt: skip


def test_still_deeper_structure(page):
    arms = ["apar", "apar!max-depth=3"]
    differ = {"apar!max-depth=3 against apar": {"tokens_per_step": figure(0.1, 0.2, 0.3)}}
    found = record(arms, {arms[1]: {"nested": figure(0.05, 0.1, 0.2)}}, differ, suites={"nested": 40})
    assert list(page.of_deeper(found)) == [
        "", "#### Still deeper: apar!max-depth=3 against apar, suite nested", "", "- `nested`: 0.1 (0.05 to 0.2), n=40.",
        "- `tokens_per_step`: - against -: better by 0.2 (0.1 to 0.3), n=40.",
    ]  # fmt: skip


def test_readmes_tables(page):
    rows = [
        f"| {suite} | 0.7 (0.6 to 0.8) | 2.5 (2 to 3) | 0.75 (0.7 to 0.8) | 0.95 (0.9 to 1.1) | -, plainly - |"
        for suite in ("all (40)", "parts (40)")
    ]
    assert page.readme(SUITES, None).splitlines()[2:] == rows
    assert page.readme(SUITES, SUITES).splitlines()[2:] == [
        *rows, "", "| arm | answers | n | seconds, of plain |", "| --- | --- | --- | --- |",
        "| apar | all | 40 | 0.6 (0.5 to 0.7) |",
    ]  # fmt: skip


def test_the_page_is_written_between_its_marks_and_names_no_folder(page, tmp_path, monkeypatch):
    clock = record(["sequential=/a/folder", "apar"], {}, {}, {"apar against sequential=/a/folder": FASTER},
                   warnings=["sequential=/a/folder: cut"])  # fmt: skip
    for name, one in {"suites": SUITES, "clock": clock}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "figures.json").write_text(json.dumps(one))
    (tmp_path / "suites" / "bars.png").write_bytes(b"PNG")
    one = {**SUITES, "plots": {"Tokens per step": "bars.png"}}
    (tmp_path / "suites" / "figures.json").write_text(json.dumps(one))
    docs = tmp_path / "docs" / "evaluation.md"
    docs.parent.mkdir()
    docs.write_text(f"before\n{page.START}{page.END}\nafter\n")
    monkeypatch.setattr("sys.argv", ["evaluation.py", str(tmp_path), "--page", str(docs)])
    page.main()
    first = docs.read_text()
    page.main()
    assert docs.read_text() == first and first.startswith("before\n") and first.endswith("\nafter\n")
    kept = docs.parent / page.KEPT
    assert not any("folder" in text for text in (first, (kept / "clock.json").read_text()))
    assert "- `clock`: sequential: cut" in first and "## By the clock: apar against sequential" in first
    assert f"![Tokens per step]({page.KEPT}/suites.png)" in first and (kept / "suites.png").read_bytes() == b"PNG"
    assert (tmp_path / "readme.md").read_text() == page.readme(SUITES, page.fit_to_keep(clock))
    assert (ROOT / "docs" / "evaluation.md").read_text().count(page.START) == 1


def test_what_a_run_leaves_out_stays_as_it_was(page, tmp_path, monkeypatch):
    docs = tmp_path / "docs" / "evaluation.md"
    docs.parent.mkdir()
    docs.write_text(f"{page.START}{page.END}")
    written = []
    for name, one in {"suites": SUITES, "chats": record(["apar"], {"apar": {"forks": figure(0, 1 / 3, 0.5)}})}.items():
        folder = tmp_path / f"run of {name}"
        (folder / name).mkdir(parents=True)
        (folder / name / "plot.png").write_bytes(b"PNG")
        (folder / name / "figures.json").write_text(json.dumps(one | {"plots": {"Tokens per step": "plot.png"}}))
        monkeypatch.setattr("sys.argv", ["evaluation.py", str(folder), "--page", str(docs)])
        page.main()
        written.append(docs.read_text())
    first, second = written
    assert set(first.splitlines()) < set(second.splitlines()) and "- 0.333 (0 to 0.5) of 40 answers" in second
    assert "0.33333," in (docs.parent / page.KEPT / "chats.json").read_text()
