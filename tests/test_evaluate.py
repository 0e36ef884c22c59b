"""The command evaluate on tiny models: what it writes is what the arms answered, and it goes on where it stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from forking_checkpoint import save_base_and_checkpoint
from hf_apar.cli import app
from hf_apar.evaluation.answers import answers_in
from hf_apar.evaluation.arms import ARMS
from hf_apar.evaluation.faults import FAULTS
from hf_apar.evaluation.metrics import METRICS
from hf_apar.evaluation.suites import SUITES
from hf_apar.prepacking import has_mkl
from judge_server import JudgeStandIn, prefers_longer

needs_mkl = pytest.mark.skipif(not has_mkl(), reason="PyTorch without MKL has no layout of its own to copy weights into")
NAMES = ("plain", "apar", "apar!missed=1", "base")
KEYS = ("a", "b", "c", "d", "e", "f")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base, forks = save_base_and_checkpoint(tmp_path_factory.mktemp("models"))
    return ["--model", forks, "--base", base, "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("suite") / "mine.jsonl")


def write_suite(path, **changed):
    asked = {key: f"Tell me of {key}." for key in KEYS} | changed
    records = [
        {"key": key, "category": "trees", "expected": "parts" if key in "abcd" else "whole",
         "messages": [{"role": "user", "content": text}]}
        for key, text in asked.items()
    ]  # fmt: skip
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def command(folder, suite, names=NAMES, limit=48):
    arms = [word for name in names for word in ("--arm", name)]
    return ["evaluate", "--output", str(folder), "--suite", suite, "--max-new-tokens", str(limit), *arms]


def evaluated(folder, models, suite, *options, names=NAMES, limit=48):
    return CliRunner().invoke(app, [*command(folder, suite, names, limit), *models, *options])


@pytest.fixture(scope="module")
def finished(models, suite, tmp_path_factory):
    """The folder of a whole evaluation, and what the command said."""
    folder = tmp_path_factory.mktemp("finished") / "new"
    result = evaluated(folder, models, suite)
    assert result.exit_code == 0, result.output
    return folder, result


def test_figures_are_those_of_the_answers(finished):
    """The oracle are the answers of the file."""
    folder, _ = finished
    answers, record = answers_in(folder / "answers.jsonl"), json.loads((folder / "figures.json").read_text())
    assert set(answers) == {(key, arm) for key in KEYS for arm in NAMES}
    assert tuple(record["arms"]) == tuple(record["figures"]) == NAMES and record["suites"] == {"mine": 6}
    for arm in NAMES:
        own, figures = [answers[key, arm] for key in KEYS], record["figures"][arm]["all"]
        assert figures["ended"]["value"] == sum(one.ended for one in own) / 6
        assert figures["tokens"]["value"] == pytest.approx(sum(one.tokens for one in own) / 6)
        assert figures["seconds_per_token"]["value"] == pytest.approx(
            sum(one.seconds for one in own) / sum(one.tokens for one in own)
        )
        assert all(one["low"] <= one["value"] <= one["high"] and 1 <= one["n"] <= 6 for one in figures.values())
        assert record["figures"][arm]["mine"] == figures
    forked = {arm: [len(answers[key, arm].tree["threads"]) > 1 for key in KEYS] for arm in NAMES[1:3]}
    share = record["figures"]["apar"]["all"]["forks_in_parts"]
    assert share["value"] == sum(forked["apar"][:4]) / 4 and share["n"] == 4 and sum(forked["apar"]) >= 2
    assert record["figures"]["apar!missed=1"]["all"]["forks"]["value"] == 0.0 and not any(forked["apar!missed=1"])
    seconds = {arm: sum(answers[key, arm].seconds for key in KEYS) for arm in NAMES}
    for arm in NAMES[1:]:
        ratio = record["compared"][f"{arm} against plain"]["all"]["seconds"]["value"]
        assert ratio == pytest.approx(seconds[arm] / seconds["plain"])
    made = record["made_with"]
    assert (made["dtype"], made["max_new_tokens"], made["seed"]) == ("float32", 48, 0)
    assert {"cores", "threads", "torch", "transformers", "hf_apar"} <= made.keys()


def test_answers_in_batches_have_all_figures_but_those_of_time(finished, models, suite, tmp_path):
    folder, _ = finished
    result = evaluated(tmp_path, models, suite, "--batch-size", "4", "--likelihood")
    assert result.exit_code == 0 and "answers 4 at once, without a clock" in result.output
    texts = [{key: one.text for key, one in answers_in(some / "answers.jsonl").items()} for some in (folder, tmp_path)]
    assert texts[0] == texts[1]
    timed, record = (json.loads((some / "figures.json").read_text()) for some in (folder, tmp_path))
    for arm in NAMES:
        expected = {name: one for name, one in timed["figures"][arm]["all"].items() if not name.startswith("seconds")}
        assert {name: one for name, one in record["figures"][arm]["all"].items() if name in expected} == expected
        assert not any(name.startswith("seconds") for name in record["figures"][arm]["all"])
    assert not record["compared"] and (tmp_path / "report.md").is_file()


def test_the_report_and_the_terminal_say_what_the_figures_say(finished):
    folder, result = finished
    record, report = json.loads((folder / "figures.json").read_text()), (folder / "report.md").read_text()
    lines = [line.split(" | ") for line in report.splitlines() if line.startswith("| tokens_per_step |")]
    cells = [record["figures"][arm]["all"]["tokens_per_step"] for arm in NAMES]
    told = [f"{one['value']:.3g} ({one['low']:.3g} to {one['high']:.3g})" for one in cells]
    assert lines[0] == ["| tokens_per_step", "high", *told[:-1], told[-1] + " |"]
    assert all(cell in result.stdout for cell in told) and "should be" in result.stdout
    assert all(warning in report for warning in record["warnings"])
    assert all(" ".join(warning.split()) in " ".join(result.stderr.split()) for warning in record["warnings"])
    assert record["plots"] and all((folder / file).read_bytes().startswith(b"\x89PNG") for file in record["plots"].values())
    assert "No judge compared the answers" in report
    assert result.stderr.count("0 of 24 answers") == result.stderr.count("24 of 24 answers") == 1
    alpaca = json.loads((folder / "alpaca" / "apar!missed=1.json").read_text())
    answers = answers_in(folder / "answers.jsonl")
    assert alpaca == [
        {"instruction": f"Tell me of {key}.", "output": answers[key, "apar!missed=1"].text, "generator": "apar!missed=1",
         "dataset": "mine"}
        for key in KEYS
    ]  # fmt: skip


def without_seconds(folder):
    """The answers and figures of a folder, but for what a clock told."""
    answers = {key: replace(one, seconds=None) for key, one in answers_in(folder / "answers.jsonl").items()}
    record = json.loads((folder / "figures.json").read_text())
    del record["compared"]
    for by_suite in (*record["figures"].values(), *record["differences"].values()):
        for some in by_suite.values():
            for name in [name for name in some if name.startswith("seconds")]:
                del some[name]
    return answers, record


def test_what_was_killed_goes_on_where_it_stopped(finished, models, suite, tmp_path):
    """A process of its own is killed in the middle of it; the oracle is the evaluation that nobody stopped."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    words = [sys.executable, "-m", "hf_apar.cli", *command(tmp_path, suite), *models]
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
    file = tmp_path / "answers.jsonl"
    while child.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    kept = file.read_bytes()[: file.read_bytes().rfind(b"\n") + 1]
    assert 3 <= kept.count(b"\n") < 24 and not (tmp_path / "figures.json").exists()
    result = evaluated(tmp_path, models, suite)
    assert result.exit_code == 0, result.output
    assert file.read_bytes().startswith(kept) and file.read_bytes().count(b"\n") == 24
    assert without_seconds(tmp_path) == without_seconds(finished[0])


def test_a_line_that_was_torn_is_written_again(finished, models, suite, tmp_path):
    """As after a kill in the middle of a line."""
    folder, _ = finished
    lines = (folder / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:40])
    (tmp_path / "settings.json").write_bytes((folder / "settings.json").read_bytes())
    result = evaluated(tmp_path, models, suite)
    assert result.exit_code == 0 and "5 of 24 answers" in result.stderr, result.output
    again = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    assert again[:5] == lines[:5] and len(again) == 24
    first, second = (answers_in(one / "answers.jsonl") for one in (folder, tmp_path))
    assert {key: one.text for key, one in first.items()} == {key: one.text for key, one in second.items()}


def test_arms_and_prompts_may_be_added(finished, models, suite, tmp_path):
    folder = tmp_path / "grows"
    assert evaluated(folder, models, suite, "--sample", "2", names=("plain",)).exit_code == 0
    assert evaluated(folder, models, suite, names=("plain", "apar")).exit_code == 0
    whole, grown = answers_in(finished[0] / "answers.jsonl"), answers_in(folder / "answers.jsonl")
    assert {key: one.text for key, one in grown.items()} == {
        key: one.text for key, one in whole.items() if key[1] in ("plain", "apar")
    }
    assert len((folder / "answers.jsonl").read_bytes().splitlines()) == 12


@pytest.mark.parametrize(
    ("options", "changed", "said"),
    [
        (["--max-new-tokens", "47"], {}, "were made with max_new_tokens 48 (now 47); go on with that, or name another"),
        (["--dtype", "bfloat16", "--seed", "1"], {}, "were made with dtype float32 (now bfloat16), seed 0 (now 1)"),
        (["--batch-size", "3"], {}, "were made with batched False (now True)"),
        pytest.param(["--prepack"], {}, "were made with prepack False (now True)", marks=needs_mkl),
        (["--sample", "6"], {"b": "Something else?"}, "the prompt b is another one than what was answered in"),
    ],
)
def test_other_settings_are_not_mixed_in(finished, models, tmp_path, options, changed, said):
    folder, _ = finished
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    result = evaluated(folder, models, write_suite(tmp_path / "mine.jsonl", **changed), *options)
    assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.output
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@needs_mkl
def test_answers_by_prepacked_weights_are_the_same(finished, models, suite, tmp_path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        assert evaluated(tmp_path / "packed", models, suite, "--prepack", names=("plain", "apar")).exit_code == 0
    assert any(event.name == "mkl::_mkl_linear" for event in seen.events())
    whole, packed = (answers_in(folder / "answers.jsonl") for folder in (finished[0], tmp_path / "packed"))
    assert {key: one.text for key, one in packed.items()} == {
        key: one.text for key, one in whole.items() if key[1] in ("plain", "apar")
    }


def test_weights_that_cannot_be_prepacked_are_refused(models, suite, tmp_path):
    result = evaluated(tmp_path, models, suite, "--prepack", "--dtype", "bfloat16")
    assert result.exit_code == 2 and "no weights to prepack; take float32 on a CPU" in " ".join(result.stderr.split())
    assert not any(tmp_path.iterdir())


def test_a_model_that_was_trained_again_is_another_one(suite, tmp_path):
    base, forks = save_base_and_checkpoint(tmp_path)
    models = ["--model", forks, "--base", base, "--dtype", "float32", "--device", "cpu"]
    assert evaluated(tmp_path / "out", models, suite, names=("apar",), limit=2).exit_code == 0
    weights = load_file(Path(forks) / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.01
    save_file(weights, Path(forks) / "model.safetensors", metadata={"format": "pt"})
    result = evaluated(tmp_path / "out", models, suite, names=("base", "apar"), limit=2)
    assert result.exit_code == 2 and "the arm apar has other weights or settings" in " ".join(result.stderr.split())
    assert evaluated(tmp_path / "out", models, suite, names=("base",), limit=2).exit_code == 0


def test_answers_of_which_nobody_knows_how_they_were_made(models, suite, tmp_path):
    (tmp_path / "answers.jsonl").write_text("{}\n")
    result = evaluated(tmp_path, models, suite)
    assert result.exit_code == 2 and "has answers and no settings.json" in " ".join(result.stderr.split())


def test_one_key_is_one_prompt(models, suite, tmp_path):
    other = write_suite(tmp_path / "mine.jsonl", c="Something else?")
    result = evaluated(tmp_path / "out", models, suite, "--suite", other)
    assert result.exit_code == 2 and "two suites have a prompt c, and these differ" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_there_are_no_plots(models, suite, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "hf_apar.evaluation.plots", raising=False)
    result = evaluated(tmp_path / "out", models, suite, names=("apar",))
    assert result.exit_code == 0 and "the report has no plots: install matplotlib" in " ".join(result.stderr.split())
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["plots"] == {}
    assert "# Evaluation" in (tmp_path / "out" / "report.md").read_text() and not list((tmp_path / "out").glob("*.png"))


def test_judges_compare_the_arms(finished, models, suite):
    folder, _ = finished
    with JudgeStandIn(prefers_longer) as longer, JudgeStandIn(lambda *_: "[[C]]") as undecided:
        urls = ["--judge-url", f"{longer.url}/v1", "--judge-url", f"{undecided.url}/v1"]
        judges = [*urls, "--judge-model", "long-winded", "--judge-model", "undecided"]
        result = evaluated(folder, models, suite, *judges, names=("plain", "apar"))
        asked = len(longer.asked), len(undecided.asked)
        assert evaluated(folder, models, suite, *judges, names=("plain", "apar")).exit_code == 0
        assert (len(longer.asked), len(undecided.asked)) == asked, "nothing is asked twice"
    assert result.exit_code == 0, result.output
    answers = answers_in(folder / "answers.jsonl")
    pairs = [(answers[key, "apar"].text, answers[key, "plain"].text) for key in KEYS]
    scores = [0.5 if len(one) == len(other) else float(len(one) > len(other)) for one, other in pairs]
    judged = json.loads((folder / "figures.json").read_text())["judged"]["apar against plain"]
    first, second = judged["comparisons"]
    assert first["judge"].startswith("long-winded ") and first["win_rate"]["value"] == pytest.approx(sum(scores) / 6)
    assert second["tie"]["value"] == second["consistency"]["value"] == 1.0
    assert judged["agreement"]["pairs"] == 6 and "### apar against plain" in (folder / "report.md").read_text()
    assert "win rate of apar against plain, says long-winded" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (["--judge-url", "http://localhost:1/v1"], "there are 1 --judge-url, 0 --judge-model and 0 --judge-key-variable;"),
        (["--judge-url", "http://localhost:1/v1", "--judge-model", "some/forks"], "would judge its own answers"),
    ],
)
def test_a_judge_that_cannot_be_is_refused_before_anything_is_answered(models, suite, tmp_path, judge, said):
    result = evaluated(tmp_path / "out", models, suite, *judge)
    assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "out").exists()


def test_second_turns_are_judged_with_the_first(models, tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps({"question_id": 1, "category": "math", "turns": ["Add 1 and 2.", "And 3?"]}) + "\n")
    folder = tmp_path / "out"
    with JudgeStandIn(prefers_longer) as server:
        judge = ["--judge-url", f"{server.url}/v1", "--judge-model", "long-winded"]
        result = evaluated(folder, models, str(path), "--turns", "2", *judge, names=("plain", "base"))
        assert result.exit_code == 0, result.output
        asked = [body["messages"][0]["content"] for body in server.asked]
    answers = answers_in(folder / "answers.jsonl")
    assert set(answers) == {(key, arm) for key in ("bench-1", "bench-1-2") for arm in ("plain", "base")}
    last = [text for text in asked if "[user]\nAdd 1 and 2.\n\n[user]\nAnd 3?" in text]
    assert len(asked) == 4 and len(last) == 2
    for arm in ("plain", "base"):
        both = f"[first answer]\n{answers['bench-1', arm].text}\n\n[last answer]\n{answers['bench-1-2', arm].text}"
        assert all(both in text for text in last)


def test_the_list_names_all_there_is():
    result = CliRunner().invoke(app, ["evaluate", "--list"])
    named = {line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")}
    assert result.exit_code == 0
    assert named == {*ARMS, *FAULTS, "fork-bias", "max-depth", "repetition-penalty", *SUITES, *METRICS}
