"""A few scenarios of each storm, and those by which the storms have found something: ``make storm`` tries many more."""

import json

import pytest

from hf_apar import AparConfig, ParagraphTree, Thread
from hf_apar.errors import ConfigurationError, DataError
from storm import texts
from storm.__main__ import STORMS, main
from storm.storms import Storm, Tally, mended, run


@pytest.mark.parametrize("storm", STORMS, ids=lambda storm: storm.name)
def test_the_first_scenarios_of_each_storm_hold(storm):
    for seed in range(20):
        assert storm.failure(storm.scenario(seed)) is None, storm.scenario(seed)


def even(numbers):
    assert 7 not in numbers, f"7 among {len(numbers)}"


def test_a_failure_is_shrunk_written_down_and_counted_as_mended_once_it_holds(tmp_path):
    storm = Storm("even", lambda draw: {"numbers": [draw.randrange(9) for _ in range(20)]}, even)
    said = []
    tally = run(storm, tmp_path, 0.3, said.append)
    (failure,) = tally.failures
    assert failure["scenario"] == {"numbers": [7]} and tally.failed > 1 and "storm.even" not in said[0]
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


SETTINGS = ({"max_threads": "8"}, {"max_depth": 2.5}, {"fork_token_id": True}, {"fork_bias": "0"}, {"child_token_id": []})


@pytest.mark.parametrize("settings", [*SETTINGS, [["max_threads", 1]], "x", {1: 2, "y": 3}], ids=str)
def test_settings_of_a_checkpoint_of_another_kind_are_refused(settings):
    with pytest.raises(ConfigurationError):
        AparConfig.from_dict(settings)


TREE = {"threads": [vars(Thread(0, None, 0, 1, [1, 2], [2])), vars(Thread(1, 0, 1, 2, [1, 2, 3], [3]))]}


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
