"""Every family against its oracle: the model itself, uncached, on each path alone."""

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from conftest import CHILD, EOS, FORK, left_padded, make_forks_likely, nested, random_prompts, walk
from hf_apar import AparConfig, enable_apar
from hf_apar.protocol import ControlTokens
from hf_apar.speculation.medusa import MedusaDrafts, MedusaHeads

LIMIT = 60
WINDOW = 6  # of the layers that slide; prompts and answers go beyond it
CONFIG = AparConfig(fork_token_id=FORK, child_token_id=CHILD)

SMALL = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "eos_token_id": EOS, "pad_token_id": EOS, "bos_token_id": None,
}  # fmt: skip
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW, "head_dim": 8},
    "mixtral": {"sliding_window": WINDOW, "head_dim": 8} | EXPERTS,
    "qwen2": SLIDING | {"use_sliding_window": True},
    "qwen3": SLIDING | {"use_sliding_window": True, "head_dim": 8},
    "gemma2": SLIDING | {"head_dim": 8},
    "gemma3_text": SLIDING | {"head_dim": 8},
    "phi3": {"sliding_window": WINDOW},
    "olmo": {},
    "olmo2": {},
    "granite": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "cohere2": SLIDING,
    "starcoder2": {"sliding_window": WINDOW},
    "gpt_neox": {},
    "gpt_oss": SLIDING | EXPERTS | {"head_dim": 8},
    "gpt2": {"n_positions": 256},
}


def model_class(family):
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]


SUPPORT = {"eager": None, "sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
CASES = [
    (family, attention)
    for family in FAMILIES
    for attention, flag in SUPPORT.items()
    if (flag is None or getattr(model_class(family), flag))
]


def tiny(family, attention):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SMALL | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return make_forks_likely(model, eos_scale=3.0 if family == "gpt2" else 1.5)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_every_family_writes_what_it_writes_on_each_path_alone(family, attention, monkeypatch):
    monkeypatch.setattr("hf_apar.speculation.medusa.LEAST_CHANCE", 0.01)  # random heads are never sure
    plain, enabled = tiny(family, "eager"), enable_apar(tiny(family, attention), config=CONFIG)
    forked = beyond = 0
    for seed in range(6):
        prompts = random_prompts(3, seed, shortest=8, longest=16)
        expected = [walk(plain, prompt, ControlTokens.of(CONFIG), LIMIT) for prompt in prompts]
        out = enabled.generate(**left_padded(prompts), apar=True, max_new_tokens=400, return_dict_in_generate=True)
        if not seed:  # trees of guesses, mostly wrong ones
            heads = MedusaHeads(SMALL["hidden_size"], 8, torch.arange(CHILD), 2)
            proposer = MedusaDrafts(heads)
            drafted = enabled.generate(
                **left_padded(prompts), apar=True, max_new_tokens=400, return_dict_in_generate=True, proposer=proposer
            )
            assert sum(stats.proposed for stats in drafted.stats) > 5
            for tree, other in zip(out.trees, drafted.trees, strict=True):
                if all(thread.finish_reason == "eos" for thread in tree.threads):
                    assert nested(other) == nested(tree)
        for answer, tree in zip(expected, out.trees, strict=True):
            if answer is not None and all(thread.finish_reason == "eos" for thread in tree.threads):
                assert nested(tree) == answer
                forked += len(tree.threads) > 1
                beyond += max(len(thread.path_ids) for thread in tree.threads) > 2 * WINDOW
    assert forked and beyond, "some answer must fork and go beyond the window"


def test_the_cases_are_what_transformers_offers():
    """So that a release that drops an attention function shows here, and not as a test that is gone."""
    missing = {(family, attention) for family in FAMILIES for attention in SUPPORT} - set(CASES)
    assert missing <= {("gemma2", "sdpa"), ("gpt_oss", "sdpa"), ("gpt2", "flex_attention")}
