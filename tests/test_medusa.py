"""Medusa heads: the text is the same with and without them, and training makes them guess what the model writes."""

import copy
import json
import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from byte_tokenizer import byte_tokenizer
from conftest import CHILD, FORK, VOCABULARY, left_padded, random_prompts, tiny_llama
from hf_apar import AparConfig, ConfigurationError, DataError, UnsupportedModelError, add_control_tokens, enable_apar
from hf_apar.data.extraction.markdown import extract
from hf_apar.speculation.medusa import MedusaDrafts, MedusaHeads
from hf_apar.training.heads import HeadsLearn, most_frequent
from hf_apar.training.rows.features import successors, tree_features
from tuned import train_medusa

TEXT = "- A: a b c d e\n- B: f g h i j\n- C: k l m n o"
DRAFT_IDS = torch.tensor([token for token in range(VOCABULARY) if token != CHILD])


def random_heads(length=3):
    torch.manual_seed(1)
    heads = MedusaHeads(32, 16, DRAFT_IDS, length)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.4)
    return heads


def run(model, inputs, **options):
    return model.generate(**inputs, **{"apar": True, "max_new_tokens": 300, "return_dict_in_generate": True} | options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"apar": AparConfig(max_threads=2, max_depth=2)}])
def test_heads_change_no_text(attention, schedule, options):
    model = enable_apar(tiny_llama(attn_implementation=attention))
    inputs = left_padded(random_prompts(4, seed=3))
    alone = run(model, inputs, **options)
    out = run(model, inputs, proposer=MedusaDrafts(random_heads(), schedule=schedule), **options)
    assert [tree.token_ids for tree in out.trees] == [tree.token_ids for tree in alone.trees]
    if schedule == "constant":
        assert sum(stats.proposed for stats in out.stats) > 20
        assert any(stats.accepted for stats in out.stats), "of that many guesses some are right by chance"


def test_the_state_is_that_of_the_last_token_of_each_thread(apar_llama):
    """Heads that change nothing guess the model's own choice again: what it chose from the observed state."""
    heads = MedusaHeads(32, 16, DRAFT_IDS, 1)  # the cell adds nothing as it is made
    proposer = MedusaDrafts(heads, branches=1)
    seen = []
    propose = proposer.propose

    def watched(rows, limits):
        drafts = propose(rows, limits)
        for number, row in enumerate(rows):
            for thread, draft in zip(row.live, drafts[number], strict=True):
                if draft.tokens:
                    seen.append((list(thread.path_ids), thread.depth, list(draft.tokens)))
        return drafts

    proposer.propose = watched
    out = run(apar_llama, left_padded(random_prompts(4, seed=3)), proposer=proposer)
    assert max(stats.peak_threads for stats in out.stats) > 2 and len(seen) > 20
    for path, depth, (guess,) in seen:
        with torch.no_grad():
            logits = apar_llama(input_ids=torch.tensor([path[:-1]]), use_cache=False).logits[0, -1]
        logits[CHILD] = -torch.inf
        if path[-1] == FORK or depth >= 3:
            logits[FORK] = -torch.inf
        assert guess == int(logits.argmax())


def test_heads_of_another_size_are_refused(apar_llama):
    with pytest.raises(ConfigurationError, match="trained for it"):
        run(apar_llama, left_padded(random_prompts(1)), proposer=MedusaDrafts(MedusaHeads(16, 8, DRAFT_IDS, 2)))
    with pytest.raises(ConfigurationError, match="trained for it"):
        run(apar_llama, left_padded(random_prompts(1)), proposer=MedusaDrafts(MedusaHeads(32, 8, DRAFT_IDS + 9, 2)))


def test_saved_heads_are_the_same_ones(tmp_path):
    heads = random_heads(length=4)
    heads.save(tmp_path)
    loaded = MedusaHeads.load(tmp_path)
    assert loaded.length == 4 and loaded.draft_ids.tolist() == DRAFT_IDS.tolist()
    state, embedded = torch.randn(2, 5, 32)
    assert torch.allclose(loaded(state, embedded), heads(state, embedded), atol=0.1)
    with pytest.raises(ConfigurationError, match="train-medusa"):
        MedusaHeads.load(tmp_path / "elsewhere")


@pytest.fixture(scope="module")
def writer():
    """A tiny model with control tokens, random but for them, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.model.norm.weight.data *= 4.0  # a sharper choice of the next token, among those that the texts hold
    model.lm_head.weight.data[sorted(set(range(len(tokenizer))) - set(tokenizer(TEXT).input_ids))] = 0.0
    add_control_tokens(model, tokenizer)
    return enable_apar(model, tokenizer), tokenizer


def test_the_way_along_a_tree_is_that_of_its_threads(writer):
    _, tokenizer = writer
    fork, child = (tokenizer.get_vocab()[token] for token in ("[Fork]", "[Child]"))
    tree = extract(f"Intro:\n\n{TEXT}\n\nThe end.")
    row = tree_features([1, 2], tree, tokenizer, fork, child, tokenizer.eos_token_id)
    following = successors(row.visible_until, row.children)
    assert fork in row.input_ids
    for index, after in enumerate(following):
        if after >= 0:
            assert row.position_ids[after] == row.position_ids[index] + 1
            assert row.input_ids[after] != child
            if index > 0:  # of the prompt, the last token alone has a target
                assert row.input_ids[after] == row.shift_labels[index]
        else:
            assert row.shift_labels[index] == tokenizer.eos_token_id
    ids = most_frequent([row], 8, (fork, 0))
    assert len(ids) == 8 and {fork, 0} <= set(ids.tolist()) and child not in ids


def test_training_makes_the_heads_guess_what_the_model_writes(writer, tmp_path):
    model, tokenizer = writer
    answers = tmp_path / "answers.jsonl"
    texts = [TEXT] * 20 + ["no list, and no fork"] * 10
    answers.write_text(
        "".join(json.dumps({"prompt": f"list {n}", "response": text}) + "\n" for n, text in enumerate(texts))
    )
    options = {"length": 3, "inner_size": 64, "draft_vocabulary": 64, "learning_rate": 1e-2, "max_length": 256, "places": 64}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first = train_medusa(model, tokenizer, answers, tmp_path / "heads", max_steps=1, **options)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    later = train_medusa(model, tokenizer, answers, tmp_path / "heads", max_steps=60, **options)  # goes on
    assert later["eval_loss"] < first["eval_loss"]
    assert later["eval_accepted"] > first["eval_accepted"] + 0.3
    assert later["eval_accepted"] <= 3
    with pytest.raises(DataError, match=r"was trained with learning_rate 0\.01 \(now 0\.5\)"):
        train_medusa(model, tokenizer, answers, tmp_path / "heads", max_steps=80, **options | {"learning_rate": 0.5})
    heads = MedusaHeads.load(tmp_path / "heads")
    ids = tokenizer("list", return_tensors="pt").input_ids
    alone, out = (
        run(model, {"input_ids": ids}, max_new_tokens=60, proposer=proposer)
        for proposer in (None, MedusaDrafts(heads))
    )
    assert out.sequences.tolist() == alone.sequences.tolist()


def test_heads_learn_from_all_answers_that_stay_whole(writer, tmp_path, caplog):
    """As many as an adapter's mixture would draw were a hundredth of them."""
    model, tokenizer = writer
    texts = [TEXT] * 2 + ["no list, and no fork"] * 38
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"prompt": f"{n}?", "response": text}) + "\n" for n, text in enumerate(texts)))
    with caplog.at_level(logging.INFO):
        train_medusa(model, tokenizer, answers, tmp_path / "heads", length=1, inner_size=8, max_steps=1, max_length=256)
    assert "2 answers that fork and 38 others are drawn of 40" in caplog.text


def test_heads_are_not_trained_with_attention_that_takes_no_trees(writer, tmp_path, monkeypatch):
    model, tokenizer = writer
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"prompt": f"{n}?", "response": TEXT}) + "\n" for n in range(9)))
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ConfigurationError, match="takes no tree for a mask"):
        train_medusa(model, tokenizer, answers, tmp_path / "heads", max_steps=1)


def test_t5_heads_are_not_trained_for_a_model_whose_threads_would_not_end(writer, tmp_path):
    model, tokenizer = writer
    endless = copy.deepcopy(model)
    endless.generation_config.eos_token_id = 3
    with pytest.raises(UnsupportedModelError, match="no thread would end"):
        train_medusa(endless, tokenizer, tmp_path / "never_read.jsonl", tmp_path / "heads")


def test_training_guesses_from_some_places_evaluation_from_all(plain_llama):
    """On one path of twelve tokens, whose last one has nothing to guess."""
    ids = torch.arange(1, 13)[None]
    batch = {
        "input_ids": ids, "attention_mask": torch.zeros(1, 1, 12, 12).masked_fill(torch.ones(12, 12).triu(1) > 0, -1e9),
        "position_ids": torch.arange(12)[None], "successors": torch.tensor([[*range(1, 12), -1]]), "shift_labels": ids + 1,
    }  # fmt: skip
    sizes, losses = [], {}
    for places in (1, 4, 11, 99):
        learn = HeadsLearn(random_heads(), plain_llama, places)
        learn.heads.register_forward_hook(lambda cell, inputs, states: sizes.append(len(states)))
        for training in (False, True):
            sizes.clear()
            losses[places, training] = learn.train(training)(**batch)["loss"].item()
            assert sizes[0] == (min(places, 11) if training else 11)
    for (places, training), loss in losses.items():
        assert (loss == pytest.approx(losses[1, False], rel=1e-5)) is (not training or places >= 11)


def test_training_goes_on_from_other_heads(writer, tmp_path):
    model, tokenizer = writer
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"prompt": f"list {n}", "response": TEXT}) + "\n" for n in range(20)))
    options = {"length": 2, "max_length": 256, "max_steps": 1}
    anew = train_medusa(
        model, tokenizer, answers, tmp_path / "old", inner_size=64, learning_rate=1e-2, **options | {"max_steps": 40}
    )
    on = train_medusa(model, tokenizer, answers, tmp_path / "new", start=tmp_path / "old", learning_rate=1e-9, **options)
    assert on["eval_accepted"] == pytest.approx(anew["eval_accepted"], abs=0.05)  # the heads are kept in bfloat16
    MedusaHeads(16, 8, DRAFT_IDS, 2).save(tmp_path / "narrow")
    with pytest.raises(ConfigurationError, match="heads of the same model"):
        train_medusa(model, tokenizer, answers, tmp_path / "none", start=tmp_path / "narrow", **options)
