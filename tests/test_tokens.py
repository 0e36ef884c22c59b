"""How a model gets [Fork] and [Child], what their new rows are, and control tokens of other names."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from byte_tokenizer import byte_tokenizer
from field_tokenizers import MAKERS, llama_metaspace, llama_normalizer
from hf_apar import (
    AparConfig,
    ConfigurationError,
    ControlTokenError,
    ParagraphTree,
    Thread,
    add_control_tokens,
    enable_apar,
    encode_chat,
)
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.text.encoding import encode_text
from hf_apar.tokens import KNOWN_PAIRS, completed, find_control_tokens
from hf_apar.training.rows.features import tree_features


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


PAIRS = [(pair.fork, pair.child) for pair in KNOWN_PAIRS]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("make", [byte_tokenizer, llama_normalizer])
def test_a_known_pair_is_found_and_taken(make, names, special):
    tokenizer = make()
    tokenizer.add_tokens(list(names), special_tokens=special)
    ids = tuple(tokenizer.convert_tokens_to_ids(list(names)))
    size = len(tokenizer)
    model = llama(size, tied=False)
    before = model.lm_head.weight.detach().clone()
    assert find_control_tokens(model, tokenizer) == add_control_tokens(model, tokenizer) == ids
    model.generation_config.apar_config["joint"] = ""
    assert add_control_tokens(model, tokenizer) == ids and model.generation_config.apar_config.pop("joint") == ""
    add_control_tokens(model, tokenizer)
    assert len(tokenizer) == size and torch.equal(model.lm_head.weight, before), "what a checkpoint has stays as it is"
    settings = {"fork_token_id": ids[0], "child_token_id": ids[1]}
    if names[0] == "[SplitMask]":
        settings["joint"] = "\n"
    assert model.generation_config.apar_config == settings
    fresh = enable_apar(llama(size, tied=False), tokenizer)
    assert fresh.generation_config.apar_config == settings
    assert (
        enable_apar(llama(size, tied=False), tokenizer, AparConfig(joint="")).generation_config.apar_config["fork_token_id"]
        == ids[0]
    )


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("make", [byte_tokenizer, llama_normalizer, llama_metaspace])
def test_control_tokens_that_are_not_special_are_never_made_of_text(make, names):
    """As in the paper's checkpoints, whose tokens ``split_special_tokens`` does not split."""
    tokenizer = make()
    tokenizer.add_tokens(list(names))
    fork, child = tokenizer.convert_tokens_to_ids(list(names))
    typed = f"a {names[0]} b{names[1]}{names[1]}"
    assert fork in tokenizer.encode(typed, split_special_tokens=True), "the case that is tested"
    assert not {fork, child} & set(encode_text(tokenizer, typed))
    chat = [{"role": "user", "content": typed}]
    ids = encode_chat(tokenizer, chat)
    assert not {fork, child} & set(ids)
    spaceless = "".join(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False).split())
    assert "".join(tokenizer.decode(ids).split()) == spaceless
    tree = TextThread((typed, TextThread((f" {typed}",)), typed))
    row = tree_features(ids, tree, tokenizer, fork, child, tokenizer.eos_token_id)
    assert (row.input_ids.count(fork), row.input_ids.count(child)) == (1, 1)
    answer = [token for token in row.input_ids[len(ids) :] if token not in (fork, child)]
    assert tokenizer.decode(answer) == tree.text


def test_names_may_be_given_and_settings_name_them_from_then_on():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<FORK>", "<CHILD>"], special_tokens=True)
    model = llama(len(tokenizer), tied=True)
    ids = add_control_tokens(model, tokenizer, names=("<+>", "<->"))
    assert tokenizer.convert_ids_to_tokens(list(ids)) == ["<+>", "<->"]
    assert add_control_tokens(model, tokenizer) == find_control_tokens(model, tokenizer) == ids
    assert completed(AparConfig(fork_token_id=ids[0]), tokenizer) == AparConfig(fork_token_id=ids[0]), "no mixed pair"
    with pytest.raises(ControlTokenError, match="give two different names"):
        add_control_tokens(model, tokenizer, names=("<+>", "<+>"))


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_beyond_the_embeddings_get_rows(tied, caplog):
    """The tokenizer knows a pair, and more, that the model has never heard of."""
    tokenizer = llama_normalizer()
    size = len(tokenizer)
    model = llama(size, tied=tied)
    tokenizer.add_tokens(["<tool>", "<FORK>", "<CHILD>"])
    ids = add_control_tokens(model, tokenizer)
    assert ids == (size + 1, size + 2) and model.get_input_embeddings().weight.shape[0] == size + 3
    assert "<tool>" in caplog.text and "<FORK>" not in caplog.text
    spelt = encode_text(tokenizer, "<") + encode_text(tokenizer, "FORK>")
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        pieces = [token for part in ("<", "FORK>") for token in tokenizer.encode(part, add_special_tokens=False)]
        assert torch.allclose(layer.weight[ids[0]], layer.weight[pieces].mean(dim=0)) and set(spelt) <= set(pieces)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("name", MAKERS)
def test_a_base_without_padding_gets_them(name):
    tokenizer = MAKERS[name]()
    tokenizer.pad_token = None
    model = llama(len(tokenizer) + 8, tied=False)
    fork, child = add_control_tokens(model, tokenizer)
    assert (fork, child) == (len(tokenizer) - 2, len(tokenizer) - 1)
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
    assert not {fork, child} & set(out[0].tolist())


def test_line_breaks_are_put_back_where_there_is_no_space():
    tokenizer = llama_normalizer()
    pieces = ["1. Oak:", " it grows", "2. Ash:", "it burns\n", "3. Elm."]
    ids = [tokenizer.encode(pieces[0], add_special_tokens=False), *(encode_text(tokenizer, one) for one in pieces[1:])]
    root = Thread(0, None, 0, 1, [], tokens=ids[0] + ids[2] + ids[4], finish_reason="eos")
    children = [
        Thread(1, 0, len(ids[0]), 2, [], tokens=ids[1], finish_reason="eos"),
        Thread(2, 0, len(ids[0] + ids[2]), 2, [], tokens=ids[3], finish_reason="eos"),
    ]
    plain = ParagraphTree([root, *children])
    with_breaks = ParagraphTree([root, *children], joint="\n")
    assert plain.text(tokenizer) == with_breaks.text(tokenizer, joint="") == "".join(pieces)
    assert with_breaks.text(tokenizer) == plain.text(tokenizer, joint="\n")
    assert with_breaks.text(tokenizer) == "1. Oak: it grows\n2. Ash:\nit burns\n3. Elm."
    with pytest.raises(ConfigurationError, match="joint is 1; it must be a text"):
        AparConfig(joint=1)
    assert ParagraphTree.from_dict(with_breaks.to_dict()).joint == "\n" and "joint" not in plain.to_dict()
