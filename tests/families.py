"""A tiny model of each of seventeen families, with every attention function that it has."""

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from hf_apar import AparConfig
from oracle import CHILD, EOS, FORK, make_forks_likely

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
