"""Arms on tiny models: what they count is what the loop and plain decoding count, and a run goes on where it stopped."""

import json
from dataclasses import replace

import pytest
import torch

import hf_apar
from forking_checkpoint import save_base_and_checkpoint
from hf_apar.errors import ConfigurationError, DataError
from hf_apar.evaluation.answers import Answered, answers_in
from hf_apar.evaluation.arms import ARMS, arm_named
from hf_apar.evaluation.models import Models
from hf_apar.evaluation.rows import rows_by_arm
from hf_apar.evaluation.run import answer_all
from hf_apar.evaluation.suites import own, read_fastchat

LIMIT = 48


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_base_and_checkpoint(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def models(folders):
    return Models(checkpoint=folders[1], base=folders[0], dtype=torch.float32)


def test_threads_and_plain_answers_count_what_generate_counts(models):
    prompts, loaded = own("parts")[:12], models.apar()
    forked = 0
    for prompt in prompts:
        ids = torch.tensor([loaded.encoded(prompt)])
        threads, plain = (arm_named(name, models).answer(prompt, LIMIT) for name in ("apar", "plain"))
        out = loaded.model.generate(ids, apar=True, do_sample=False, max_new_tokens=LIMIT, return_dict_in_generate=True)
        (tree,), (stats,) = out.trees, out.stats
        assert threads.text == tree.text(loaded.tokenizer)
        assert hf_apar.ParagraphTree.from_dict(threads.tree).token_ids == tree.token_ids
        assert (threads.tokens, threads.steps, threads.peak_kv, threads.attended) == (
            stats.tokens, stats.steps, stats.peak_kv, stats.attended,
        )  # fmt: skip
        forked += threads.peak_threads > 1
        row = loaded.model.generate(ids, do_sample=False, max_new_tokens=LIMIT)[0, ids.shape[1] :].tolist()
        assert plain.ended is (row[-1] == loaded.tokenizer.eos_token_id)
        assert (plain.tokens, plain.steps, plain.critical_path) == (len(row) - plain.ended, len(row), len(row))
        assert plain.text == loaded.tokenizer.decode(row, skip_special_tokens=True)
        assert plain.peak_kv == ids.shape[1] + len(row) - 1 and plain.attended == plain.attended_if_sequential
    assert forked >= 3


def test_drafts_change_no_text(models):
    for prompt in own("whole")[:3]:
        alone, drafted = (arm_named(name, models).answer(prompt, LIMIT) for name in ("apar", "apar+lookup"))
        assert drafted.text == alone.text and drafted.steps <= alone.steps


def test_an_outline_costs_its_steps_too(models):
    one = arm_named("skeleton", models).answer(own("parts")[0], LIMIT)
    assert LIMIT < one.steps <= 2 * LIMIT and one.tokens > 0 and one.arm == "skeleton"


@pytest.mark.parametrize(
    "name",
    [
        "apar",
        "plain",
        "apar+lookup",
        "apar!missed=0.5",
        "apar+lookup!short=0.5",
        "skeleton",
    ],
)
def test_several_prompts_at_once_are_answered_as_each_alone_and_without_a_clock(models, name):
    arm, prompts = arm_named(name, models), [*own("parts")[:5], *own("whole")[:2]]
    alone = [arm.answer(prompt, LIMIT) for prompt in prompts]
    assert all(one.seconds > 0 for one in alone)
    several = arm.answers(prompts, LIMIT)
    assert [replace(one, tree=None) for one in several] == [replace(one, seconds=None, tree=None) for one in alone]
    for one, other in zip(several, alone, strict=True):  # log-likelihoods are rounded otherwise in a batch
        trees = [{**tree, "threads": [{**thread, "logprobs": None} for thread in tree["threads"]]}
                 for tree in (one.tree, other.tree) if tree]  # fmt: skip
        assert trees[:1] == trees[1:]


def test_a_run_of_batches_asks_second_turns_after_the_first_ones_and_goes_on_where_it_stopped(models, tmp_path):
    path = tmp_path / "bench.jsonl"
    rows = [{"question_id": number, "category": "math", "turns": [f"Add 1 and {number}.", "And 3?"]} for number in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, told = read_fastchat(path, turns=2), []
    arms = [arm_named(name, models) for name in ("apar", "plain")]
    one = answer_all(arms, prompts, tmp_path / "one.jsonl", max_new_tokens=LIMIT)
    answer_all(arms, prompts[:2], tmp_path / "some.jsonl", max_new_tokens=LIMIT)
    some = answer_all(
        arms, prompts, tmp_path / "some.jsonl", max_new_tokens=LIMIT, batch_size=4, progress=lambda *said: told.append(said)
    )
    assert {key: found.text for key, found in some.items()} == {key: found.text for key, found in one.items()}
    assert [key for key, found in some.items() if found.seconds] == [*some][:4], "what had a clock keeps it"
    assert [done for done, *_ in told] == [4, 7, 10, 11, 12, 15, 18, 19, 20] and all(left > 0 for *_, left in told[:-1])


def test_a_run_goes_on_where_it_stopped(models, tmp_path):
    class Counting:
        def __init__(self, arm):
            self.arm, self.name, self.asked = arm, arm.name, []

        def answer(self, prompt, limit):
            self.asked.append((prompt.key, limit))
            return self.arm.answer(prompt, limit)

    path, prompts, told = tmp_path / "new" / "answers.jsonl", own("either")[:3], []
    arms = [Counting(arm_named(name, models)) for name in ("apar", "plain")]
    first = answer_all(arms, prompts[:2], path, max_new_tokens=LIMIT)
    assert [limit for _, limit in arms[0].asked] == [8, LIMIT, LIMIT] and len(first) == 4
    with path.open("a") as file:
        file.write('{"key": "torn')
    again = answer_all(arms, prompts, path, max_new_tokens=LIMIT, progress=lambda *numbers: told.append(numbers[:2]))
    assert told == [(4, 6), (5, 6), (6, 6)] and {key: again[key] for key in first} == first
    assert answers_in(path) == again and path.read_text().count("\n") == 6
    path.write_text("no JSON\n" + path.read_text())
    with pytest.raises(DataError, match="line 1 is no answer"):
        answers_in(path)


@pytest.mark.parametrize(("name", "says"), [
    ("apart", "one of base"), ("sequential", "give sequential=FOLDER"), ("apar+heads", "train-medusa"),
])  # fmt: skip
def test_an_arm_that_cannot_be_is_told(models, name, says):
    with pytest.raises(ConfigurationError, match=says):
        arm_named(name, models)
    assert all(kind.says for kind in ARMS.values())


def test_what_is_left_takes_as_long_as_each_arm_took(models, tmp_path):
    """By the clock of the file: a new arm is as slow as the others are on average."""

    class Silent:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def answer(self, prompt, limit):
            return Answered(key=prompt.key, arm=self.name, text="", ended=True, seconds=self.seconds)

    told, prompts = [], own("either")[:3]

    def answered(*arms, count):
        answer_all(arms, prompts[:count], tmp_path / "answers.jsonl", progress=lambda *numbers: told.append(numbers))

    answered(Silent("slow", 5.0), Silent("quick", 1.0), count=1)
    assert told == [(0, 2, None), (1, 2, 5.0), (2, 2, 0.0)]
    told.clear()
    answered(Silent("slow", 5.0), Silent("quick", 1.0), Silent("new", 2.0), count=3)
    assert told[0] == (2, 9, 2 * 5.0 + 2 * 1.0 + 3 * 3.0) and told[-1] == (9, 9, 0.0)


def test_another_model_decodes_with_the_checkpoints_penalty(folders):
    """The oracle is the base, told the penalty; without it the two write other words."""
    models = Models(checkpoint=folders[1], base=folders[0], dtype=torch.float32)
    models.apar().model.generation_config.repetition_penalty = 1.3
    prompt, base = own("either")[0], models.plain()
    ids = torch.tensor([base.encoded(prompt)])

    def written(**options):
        row = base.model.generate(ids, do_sample=False, max_new_tokens=LIMIT, **options)[0]
        return base.tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)

    one, bare = written(repetition_penalty=1.3), written()
    assert arm_named("base", models).answer(prompt, LIMIT).text == one != bare
    assert arm_named("base!repetition-penalty=1", models).answer(prompt, LIMIT).text == bare


def test_a_bias_is_a_change_of_an_arm(models):
    prompt, loaded = own("parts")[0], models.apar()
    ids = torch.tensor([loaded.encoded(prompt)])
    for bias in (-50.0, 5.0):
        apar = hf_apar.AparConfig(fork_bias=bias)
        out = loaded.model.generate(ids, apar=apar, do_sample=False, max_new_tokens=LIMIT, return_dict_in_generate=True)
        one = arm_named(f"apar!fork-bias={bias}", models).answer(prompt, LIMIT)
        assert (one.arm, one.text) == (f"apar!fork-bias={bias}", out.trees[0].text(loaded.tokenizer))


def test_the_second_turn_goes_on_from_the_arms_own_first_answer(models, tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps({"question_id": 1, "category": "math", "turns": ["Add 1 and 2.", "And 3?"]}) + "\n")
    arms = [arm_named(name, models) for name in ("apar", "base")]
    first, second = read_fastchat(path, turns=2)
    found = answer_all(arms, [first, second], tmp_path / "answers.jsonl", max_new_tokens=LIMIT)
    for arm in arms:
        chat = [*first.messages, {"role": "assistant", "content": found["bench-1", arm.name].text}, second.messages[-1]]
        expected = arm.answer(replace(second, messages=tuple(chat), after=None), LIMIT)
        assert found["bench-1-2", arm.name].text == expected.text
        (_, row) = rows_by_arm([first, second], found)[arm.name]
        assert [*row.prompt.messages] == chat
    assert found["bench-1", "apar"].text != found["bench-1", "base"].text
