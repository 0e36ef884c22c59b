"""FIELD L6: rotary positions whose frequencies depend on the longest path of a forward pass: exact, or refused."""

import re

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Phi3Config, Phi3ForCausalLM

from conftest import EOS, left_padded, make_forks_likely, random_prompts, tiny_llama
from hf_apar import AparConfig, ConfigurationError, enable_apar

NO_FORK = AparConfig(fork_bias=float("-inf"))
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0], "rope_theta": 10000.0}
BOUNDARY = 40
SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "eos_token_id": EOS, "pad_token_id": EOS, "bos_token_id": None,
}  # fmt: skip


def longrope():
    torch.manual_seed(0)
    scaling = LONG | {"original_max_position_embeddings": BOUNDARY}
    config = Phi3Config(
        **SIZES, max_position_embeddings=400, original_max_position_embeddings=BOUNDARY, rope_parameters=scaling,
        tie_word_embeddings=False,
    )  # fmt: skip
    return make_forks_likely(Phi3ForCausalLM(config))


def dynamic(kind="dynamic"):
    scaling = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    return tiny_llama(max_position_embeddings=BOUNDARY, rope_parameters=scaling)


def by_layers():
    """A model with rotary positions of its own for each kind of layer."""
    torch.manual_seed(0)
    scaling = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    }
    config = Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=64, layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=BOUNDARY, rope_parameters=scaling,
    )  # fmt: skip
    return make_forks_likely(Gemma3ForCausalLM(config), eos_scale=3.0)


MODELS = {"longrope": longrope, "dynamic": dynamic, "by layers": by_layers}


def forks_of_equal_texts(model, prompts, limit):
    """Compare the answers for several ``max_threads``; return the most threads of an answer that no limit has cut."""
    most, options = 0, {"max_new_tokens": limit, "return_dict_in_generate": True}
    for prompt in prompts:
        trees = [
            model.generate(torch.tensor([prompt]), apar=AparConfig(max_threads=threads), **options).trees[0]
            for threads in (1, 2, 64)
        ]
        if all(tree.closing_ids for tree in trees):
            assert trees[0].token_ids == trees[1].token_ids == trees[2].token_ids
            most = max(most, len(trees[0].threads))
    return most


@pytest.mark.parametrize("name", MODELS)
def test_l6_within_the_first_window_the_text_is_the_same_for_any_max_threads(name):
    model = enable_apar(MODELS[name]())
    inputs = left_padded(random_prompts(4, seed=7))
    limit = BOUNDARY + 1 - 2 - 12  # depth 3: two [Child]; the longest prompt has 12 tokens
    plain = model.generate(**inputs, max_new_tokens=limit).tolist()
    assert model.generate(**inputs, apar=NO_FORK, max_new_tokens=limit).tolist() == plain
    assert forks_of_equal_texts(model, random_prompts(12, seed=9), limit) > 1


def test_l6_wholly_beyond_the_first_window_the_text_is_the_same_for_any_max_threads():
    model = enable_apar(longrope())
    inputs = left_padded(random_prompts(6, seed=7, shortest=BOUNDARY + 1, longest=BOUNDARY + 9))
    assert model.generate(**inputs, apar=NO_FORK, max_new_tokens=30).tolist() == (
        model.generate(**inputs, max_new_tokens=30).tolist()
    )
    prompts = random_prompts(6, seed=1, shortest=BOUNDARY + 1, longest=BOUNDARY + 9)
    assert forks_of_equal_texts(model, prompts, 300) > 3
    whole = model.generate(**inputs, apar=True, max_new_tokens=30).tolist()
    assert model.generate(**inputs, apar=True, max_new_tokens=30, prefill_chunk_size=16).tolist() == whole


@pytest.mark.parametrize("name", MODELS)
def test_l6_a_call_that_may_cross_is_refused_with_a_limit_that_works(name):
    model = enable_apar(MODELS[name]())
    inputs = {"input_ids": torch.tensor(random_prompts(1, seed=3, shortest=9, longest=9))}
    with pytest.raises(ConfigurationError, match=f"change beyond {BOUNDARY} positions.* may reach 109: pass") as raised:
        model.generate(**inputs, apar=True, max_new_tokens=99)
    assert ("prompts of more than" in str(raised.value)) == (name == "longrope")
    (limit,) = re.findall(r"max_new_tokens=(\d+) or less", str(raised.value))
    assert limit == "30"  # 9 + 30 - 1 sampled ones that are fed + two [Child] = 40
    assert model.generate(**inputs, apar=True, max_new_tokens=30).shape[1] <= 39
    with pytest.raises(ConfigurationError, match="may reach 41"):
        model.generate(**inputs, apar=True, max_new_tokens=31)
    flat = model.generate(**inputs, apar=AparConfig(max_depth=1), max_new_tokens=32)
    assert flat.tolist() == model.generate(**inputs, max_new_tokens=32).tolist()


def test_l6_a_batch_on_both_sides_is_refused_and_a_prompt_beyond_names_no_limit():
    model = enable_apar(longrope())
    both = left_padded([random_prompts(1, 1, 5, 5)[0], random_prompts(1, 2, 50, 50)[0]])
    with pytest.raises(ConfigurationError, match="shorten the prompts, or prompts of more than 40 tokens, or call generate"):
        model.generate(**both, apar=True, max_new_tokens=5)
    with pytest.raises(ConfigurationError, match="shorten the prompts, or call generate without apar"):
        enable_apar(dynamic()).generate(torch.ones(1, 60, dtype=torch.long), apar=True, max_new_tokens=5)


def test_l6_the_danger_is_real(monkeypatch):
    """Without the check the text of a call that crosses depends on ``max_threads``: the check is no mere caution."""
    monkeypatch.setattr("hf_apar.decoding.validate_positions", lambda *args: None)
    model = enable_apar(longrope())
    with pytest.raises(AssertionError):
        forks_of_equal_texts(model, random_prompts(12, seed=1, shortest=30, longest=36), 300)
