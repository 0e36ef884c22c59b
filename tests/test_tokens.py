"""How a model gets [Fork] and [Child], and what their new rows are."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from byte_tokenizer import byte_tokenizer
from hf_apar import ControlTokenError, add_control_tokens, enable_apar


def llama(vocabulary, *, tied):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 40])
def test_new_rows_are_the_mean_of_their_word_pieces(tied, padding):
    tokenizer = byte_tokenizer()
    model = llama(len(tokenizer) + padding, tied=tied)
    before = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    pieces = {name: tokenizer.encode(name, add_special_tokens=False) for name in ("[Fork]", "[Child]")}
    ids = add_control_tokens(model, tokenizer)
    after = [layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    for old, new in zip(before, after, strict=True):
        for token, name in zip(ids, pieces, strict=True):
            assert torch.allclose(new[token], old[pieces[name]].mean(dim=0))
        others = [row for row in range(len(old)) if row not in ids]
        assert torch.equal(new[others], old[others])
    assert len(after[0]) == max(len(before[0]), len(tokenizer)), "a padded vocabulary has room and must not shrink"
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_plain_decoding_never_emits_them():
    tokenizer = byte_tokenizer()
    model = llama(len(tokenizer), tied=False)
    fork, child = add_control_tokens(model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight[[fork, child]] = 1e4 * torch.ones(16)  # by far the likeliest, or the least likely
    for sign in (1, -1):
        model.lm_head.weight.data[[fork, child]] *= sign
        out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
        assert not {fork, child} & set(out[0].tolist())


def test_enabling_asks_for_them_and_finds_them_in_the_tokenizer():
    tokenizer = byte_tokenizer()
    model = llama(len(tokenizer) + 8, tied=True)
    with pytest.raises(ControlTokenError, match="add_control_tokens"):
        enable_apar(model, tokenizer)
    tokenizer.add_tokens(["[Fork]", "[Child]"], special_tokens=True)
    enable_apar(model, tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["[Fork]", "[Child]"])
    assert [model.generation_config.apar_config[name] for name in ("fork_token_id", "child_token_id")] == ids
