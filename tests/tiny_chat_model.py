"""A tiny random model of bytes with a chat template, that forks and ends often."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from byte_tokenizer import byte_tokenizer
from hf_apar import add_control_tokens

LENGTH = 1024  # tokens that fit into it


def make_likely(model, fork, eos, eos_scale):
    """Give a random model sharp logits, and large rows of ``fork`` and ``eos`` in its head, so that both are drawn often."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "router" not in name:
                parameter.normal_(std=0.3)
        head = model.get_output_embeddings().weight
        head[fork] *= 2.0
        head[eos] *= eos_scale
    return model.eval()


def tiny_chat_model():
    """Return the tokenizer and the model."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(3)
    eos = tokenizer.eos_token_id
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=LENGTH, tie_word_embeddings=False, eos_token_id=eos,
        pad_token_id=eos, bos_token_id=None,
    ))  # fmt: skip
    fork, _ = add_control_tokens(model, tokenizer)
    model.generation_config.eos_token_id = eos
    return tokenizer, make_likely(model, fork, eos, 1.6)
