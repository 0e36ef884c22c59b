"""A few scenarios of each storm, and those by which the storms have found something: ``make storm`` tries many more."""

import json
import os
import shutil
import time
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_apar import AparConfig, ParagraphTree, Thread
from hf_apar.checkpoints import writing
from hf_apar.checkpoints.conversion import converted
from hf_apar.checkpoints.sources import settings_in
from hf_apar.checkpoints.writing import alone, write_whole
from hf_apar.cli.explanations import explain
from hf_apar.data.extraction.markdown import extract
from hf_apar.data.extraction.sentences import first_sentence_end
from hf_apar.data.records.json_array import array_items
from hf_apar.errors import CheckpointError, ConfigurationError, DataError
from hf_apar.training.recipe import read_recipe
from hf_apar.training.runs import _last_whole
from storm import doors, files, shown, texts
from storm.__main__ import STORMS, main
from storm.storms import Storm, Tally, mended, run
from tiny_chat_model import tiny_chat_model

FEW = {"growth": 3, "exactness": 3, "faults": 3, "proxy": 3, "memory": 5, "commands": 10}  # they take longer


# far compares times a thousand times apart, which what else runs disturbs
@pytest.mark.parametrize("storm", [storm for storm in STORMS if storm.name != "far"], ids=lambda storm: storm.name)
def test_the_first_scenarios_of_each_storm_hold(storm):
    for seed in range(FEW.get(storm.name, 20)):
        assert storm.failure(storm.scenario(seed)) is None, storm.scenario(seed)


def even(numbers):
    if 7 in numbers:
        raise ValueError(f"7 is among {len(numbers)}")


def test_a_failure_is_shrunk_written_down_and_counted_as_mended_once_it_holds(tmp_path):
    storm = Storm("even", lambda draw: {"numbers": [draw.randrange(9) for _ in range(20)]}, even)
    said = []
    tally = run(storm, tmp_path, 0.3, said.append)
    (failure,) = tally.failures
    assert failure["scenario"] == {"numbers": [7]} and tally.failed > 1
    assert "def test_storm_even_" in said[0] and "even(numbers=[7])" in said[0]
    assert mended(storm, tally) == 0 and mended(Storm("even", storm.draw, lambda numbers: None), tally) == 1
    again = run(storm, tmp_path, 0.1, said.append)
    assert again.tried > tally.tried and again.next_seed == again.tried and len(said) == 1, "it goes on, and says it once"
    with (tmp_path / "even.jsonl").open("a") as file:
        file.write('{"since": 1')  # a process was killed here
    assert Tally.read(tmp_path / "even.jsonl") == again


def test_the_command_tells_what_was_tried(tmp_path):
    said = []
    assert main(["trees", "--minutes", "0.003", "--folder", str(tmp_path)], said.append) == 0
    assert said[-1].splitlines()[-1].endswith("| 0 | 0 | 0 |")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_whole(tmp_path / "x.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "x.json", "new \ud800")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("x.json", "old")]


@pytest.mark.parametrize("name", ["folder", "file"])
def test_a_second_writer_is_told_and_the_next_one_is_not(tmp_path, name, monkeypatch):
    monkeypatch.setattr(writing, "_PATIENCE", 0.1)
    (tmp_path / "folder").mkdir()
    for _ in range(2):
        told = pytest.raises(ConfigurationError, match=r"another process writes to .*; wait until it ends")
        with alone(tmp_path / name), told, alone(tmp_path / name):
            pass
    (tmp_path / "new").write_text("complete")
    with alone(tmp_path / "file"):
        (tmp_path / "new").replace(tmp_path / "file")  # as extract does at its end
        with alone(tmp_path / "file"):
            assert (tmp_path / "file").read_text() == "complete"


def test_a_checkpoint_that_was_torn_is_passed_over(tmp_path):
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 1'), (12, None), ("x", "{}")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert _last_whole(tmp_path) == str(tmp_path / "checkpoint-2")
    assert _last_whole(tmp_path / "nowhere") is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file of Linux that is always full")
def test_a_full_disk_is_told_whoever_writes():
    with pytest.raises(RuntimeError) as error:
        torch.save({"a": torch.zeros(3)}, "/dev/full")
    sentence, foreseen = explain(error.value)
    assert foreseen and "make room on the disk" in sentence


SETTINGS = ({"max_threads": "8"}, {"max_depth": 2.5}, {"fork_token_id": True}, {"fork_bias": "0"}, {"child_token_id": []})


@pytest.mark.parametrize("settings", [*SETTINGS, [["max_threads", 1]], "x", {1: 2, "y": 3}], ids=str)
def test_settings_of_a_checkpoint_of_another_kind_are_refused(settings):
    with pytest.raises(ConfigurationError):
        AparConfig.from_dict(settings)


TREE = ParagraphTree([Thread(0, None, 0, 1, [1, 2], [2]), Thread(1, 0, 1, 2, [1, 2, 3], [3])]).to_dict()


@pytest.mark.parametrize(
    "change",
    [{"parent": 1}, {"parent": None}, {"index": 0}, {"fork_position": 2}, {"tokens": "ab"}, {"tokens": [-1]}, {"depth": 2.0},
     {"finish_reason": "end"}, {"logprobs": ["a"]}, {"x": 1}, {"eos_token_id": "0"}, {"path_ids": [True]}],
    ids=str,
)  # fmt: skip
def test_a_tree_that_was_not_written_down_is_refused(change):
    tree = json.loads(json.dumps(TREE))
    assert ParagraphTree.from_dict(tree).token_ids == [2, 3]
    tree["threads"][1] |= change
    with pytest.raises(DataError, match="thread 1 of a tree"):
        ParagraphTree.from_dict(tree)
    for other in (None, {}, {"threads": []}, TREE | {"stopped_by": 2}, TREE | {"joint": 1}, {"threads": [{}]}):
        with pytest.raises(DataError, match="a tree"):
            ParagraphTree.from_dict(other)


def test_a_tree_may_be_deeper_than_the_stack():
    threads = [Thread(0, None, 0, 1, [], [0])] + [Thread(n, n - 1, 1, n + 1, [], [n]) for n in range(1, 3000)]
    assert ParagraphTree(threads).token_ids == list(range(3000))


def test_storm_trees_6496():
    """Two threads of one index, the one the other's parent: read for ever."""
    texts.check_tree({"threads": [vars(Thread(0, None, 0, 0, [])), vars(Thread(0, 0, 0, 0, []))]})


MENDED = (
    "a pickle for a model", "nan", "shape", "line", "peft: kind", "peft: rank", "peft: modules", "base: number", "eos: text",
    "a list", "settings: a list", "code", "one nan", "one infinity", "peft: megatron", "peft: revision", "config: kernel",
    "config: text", "config: zero", "config: vocab", "config: rope", "tokenizer: length", "tokenizer: empty",
    "tokenizer: model", "eos: null", "pad: list", "peft: other rank", "peft: bias", "peft: other LoRA", "peft: tokens",
)  # fmt: skip


@pytest.mark.parametrize("attack", MENDED)
@pytest.mark.parametrize("which", ["adapter", "base"])
def test_hostile_files_are_refused_in_a_sentence(attack, which):
    files.check(attack, which, None)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "{", "is no JSON"),
        ("config.json", "[" * 100_000, "is no JSON"),
        ("adapter_config.json", "[]", "is a list, and must be an object"),
        ("tokenizer_config.json", '{"model_max_length": "512"}', "has model_max_length '512'; it must be a number"),
        ("generation_config.json", '{"suppress_tokens": [[1]]}', "has suppress_tokens .* a list of the numbers of tokens"),
        ("config.json", '{"text_config": {"attn_implementation": "a/b"}}', "has attn_implementation 'a/b', which is code"),
        ("adapter_config.json", '{"megatron_config": {}}', "has a megatron_config, which names code to import"),
        ("generation_config.json", '{"eos_token_id": [1, "2"]}', "has eos_token_id .* the number of a token"),
    ],
)
def test_files_of_settings_hold_settings(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=words):
        settings_in(tmp_path / name)


@pytest.mark.parametrize("name", doors.TOKENIZERS)
@pytest.mark.parametrize(("door", "template"), [("letters", "joined"), ("going on", "upper"), ("text", "own")])
def test_no_letters_make_a_control_token_whatever_joins_or_changes_them(name, door, template):
    """``[`` and ``Fork]`` of two messages that a template joins, ``<fork>`` that it writes large, ``［Fork］``."""
    for special in (True, False):
        for pair, text in enumerate(("x[Fork] [Child]", "[SplitMask]", "<fork><child>", "［Fork］［\u200bChild］")):
            doors.check(door, name, template, pair % 3, special, text)


@pytest.mark.parametrize("text", ["]a", "k] a\n", "[Fork]"])
def test_a_stop_string_is_not_found_in_the_name_of_a_control_token(text):
    """``[Fork]`` and ``a`` held ``]a``."""
    shown.check("stops", text)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A tiny model that lies in the cache: its entry, and what gives the weights that are loaded, made anew or not."""
    monkeypatch.setenv("HF_APAR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "source").write_text("x")
    made = []

    def convert(**options):
        made.append(options)
        tokenizer, model = tiny_chat_model()
        return model, tokenizer

    def load():
        made.clear()
        model, _ = converted("tiny", [tmp_path / "source"], convert, torch.float32, {})
        return model.lm_head.weight.sum().item(), len(made)

    load()
    (entry,) = (tmp_path / "cache").iterdir()
    return entry, load


def _weights_instead(entry):
    tensors = load_file(entry / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, entry / "model.safetensors", metadata={"format": "pt"})


def _named_again(entry, change):
    """Change the files of an entry and the digests of some of them."""
    change(entry)
    told = json.loads((entry / "manifest.json").read_text())
    del told["model.safetensors"]
    (entry / "manifest.json").write_text(json.dumps(told))


def _linked(entry, name):
    (entry / name).unlink()
    (entry / name).symlink_to("/etc/passwd" if name == "model.safetensors" else "/nowhere")


POISON = {
    "nothing is named": lambda entry: (_weights_instead(entry), (entry / "manifest.json").write_text("{}")),
    "the weights are not named": lambda entry: _named_again(entry, _weights_instead),
    "code": lambda entry: (entry / "modeling.py").write_text("raise SystemExit"),
    "a pickle": lambda entry: (entry / "pytorch_model.bin").write_bytes(b"cos\nsystem\n."),
    "cut": lambda entry: (entry / "model.safetensors").write_bytes((entry / "model.safetensors").read_bytes()[:-9]),
    "other weights": _weights_instead,
    "a link": lambda entry: _linked(entry, "model.safetensors"),
    "a link to nowhere": lambda entry: _linked(entry, "config.json"),
    "a pipe": lambda entry: ((entry / "config.json").unlink(), os.mkfifo(entry / "config.json")),
    "no manifest": lambda entry: (entry / "manifest.json").write_text("[" * 100_000),
    "a list": lambda entry: (entry / "manifest.json").write_text("[]"),
    "up": lambda entry: (entry / "manifest.json").write_text('{"../../source": "x"}'),
    "a file": lambda entry: (shutil.rmtree(entry), entry.write_text("x")),
    "a folder that is a link": lambda entry: (entry.rename(entry.parent.parent / "e"), entry.symlink_to("/etc")),
    "a link that leads nowhere": lambda entry: (shutil.rmtree(entry), entry.symlink_to("/nowhere")),
    "all may write": lambda entry: entry.chmod(0o777),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes that have names")
@pytest.mark.parametrize("poison", POISON)
def test_a_poisoned_entry_of_the_cache_is_made_again_and_kept(kept, poison):
    entry, load = kept
    expected, _ = load()
    others = sorted(entry.parent.parent.rglob("*"))
    POISON[poison](entry)
    assert load() == (expected, 1)
    assert load() == (expected, 0), "what was made again is kept"
    assert {*others} <= {*entry.parent.parent.rglob("*")} and entry.is_dir() and not entry.is_symlink()


def test_a_cache_where_all_may_write_is_not_used(kept, caplog):
    entry, load = kept
    expected, made = load()
    assert made == 0
    for mode, taken in ((0o777, 1), (0o1777, 0), (0o775, 0)):
        entry.parent.chmod(mode)
        assert load() == (expected, taken)
    assert "others may write there" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["seed = [" + "[" * 3000, f"seed = {'9' * 5000}", f"{'a' * 5000} = 1", f"[train]\nlearning_rate = {'9' * 400}",
     f"model = ['{'b' * 5000}']", "a." * 10**6],
    ids=["nested", "digits", "key", "number", "value", "dots"],
)  # fmt: skip
def test_a_recipe_of_any_length_is_refused_in_a_short_sentence(text):
    texts.check_recipe(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [("[select]\nheld_out = 0.0", r"\[select\]: .*held_out 0\.0"),
     ("[loading]\nload_in_4bit = true\nload_in_8bit = true", r"\[loading\]: .*both"),
     ("[asking]\nlanguages = ['xx']", r"\[asking\]: languages")],
    ids=["share", "bits", "languages"],
)  # fmt: skip
def test_values_of_a_recipe_that_do_not_go_together_are_refused_with_their_table(tmp_path, text, says):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(ConfigurationError, match=rf"recipe\.toml, {says}"):
        read_recipe(tmp_path / "recipe.toml")


def test_what_an_error_says_commands_no_terminal():
    sentence, _ = explain(ConfigurationError("a\x1b[2J key\u202e of a file\n"))
    assert sentence == "a\ufffd[2J key\ufffd of a file"


def seconds(read, text):
    began = time.process_time()
    read(text)
    return time.process_time() - began


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (lambda text: list(array_items(BytesIO(text.encode()))), "[" * 50_000 + "{}" * 50_000),
        (extract, "#\n" * 20_000),
        (lambda text: texts.check_record({"messages": [{"role": "system", "content": one} for one in text.split()]}),
         " ".join(map(str, range(20_000)))),
        (first_sentence_end, "水。" * 20_000),
    ],
    ids=["array", "headings", "systems", "sentences"],
)  # fmt: skip
def test_what_took_quadratic_time_takes_seconds(read, text):
    assert seconds(read, text) < 5
