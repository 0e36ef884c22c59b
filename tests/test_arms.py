"""Arms on tiny models: what they count is what the loop and plain decoding count, and a run goes on where it stopped."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_apar
from byte_tokenizer import byte_tokenizer
from hf_apar.checkpoints.export import save_merged
from hf_apar.errors import ConfigurationError, DataError
from hf_apar.evaluation.answers import read_answers
from hf_apar.evaluation.arms import ARMS, arm_named
from hf_apar.evaluation.models import Models
from hf_apar.evaluation.run import answer_all
from hf_apar.evaluation.suites import own

LIMIT = 48


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and a checkpoint of it that forks and ends often."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    base = tmp_path_factory.mktemp("base")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    fork, _ = hf_apar.add_control_tokens(model, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        model.lm_head.weight[fork] *= 2.0
        model.lm_head.weight[tokenizer.eos_token_id] *= 1.6
    forks = tmp_path_factory.mktemp("forks") / "model"
    save_merged(model, tokenizer, forks)
    return str(base), str(forks)


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
    assert told == [(5, 6), (6, 6)] and {key: again[key] for key in first} == first
    assert read_answers(path) == again and path.read_text().count("\n") == 6
    path.write_text("no JSON\n" + path.read_text())
    with pytest.raises(DataError, match="line 1 is no answer"):
        read_answers(path)


@pytest.mark.parametrize(("name", "says"), [
    ("apart", "one of base"), ("sequential", "give sequential=FOLDER"), ("apar+heads", "train-medusa"),
])  # fmt: skip
def test_an_arm_that_cannot_be_is_told(models, name, says):
    with pytest.raises(ConfigurationError, match=says):
        arm_named(name, models)
    assert all(kind.says for kind in ARMS.values())
