"""A random base on disk, and a checkpoint of it that forks and ends often."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_apar
from byte_tokenizer import byte_tokenizer
from hf_apar.checkpoints.export import save_merged


def save_base_and_checkpoint(folder):
    """Write ``base`` and ``forks`` into ``folder``, and return their paths."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    fork, _ = hf_apar.add_control_tokens(model, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        model.lm_head.weight[fork] *= 2.0
        model.lm_head.weight[tokenizer.eos_token_id] *= 1.6
    save_merged(model, tokenizer, folder / "forks")
    return str(folder / "base"), str(folder / "forks")
