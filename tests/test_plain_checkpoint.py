"""A checkpoint for engines that know nothing of control tokens: it does not have them, and is otherwise the model."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM
from typer.testing import CliRunner

from byte_tokenizer import byte_tokenizer
from hf_apar import ConfigurationError, add_control_tokens
from hf_apar.checkpoints.export import save_merged
from hf_apar.cli import app
from hf_apar.speculation.medusa import HEADS_FILE
from hf_apar.tokens import checkpoint_config

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "bos_token_id": None,
}  # fmt: skip


def forking(kind=LlamaForCausalLM, config=LlamaConfig, padding=0, **changes):
    """A tokenizer and a random model that likes to fork; the rows of its vocabulary go on for ``padding`` ones."""
    torch.manual_seed(5)
    tokenizer = byte_tokenizer()
    eos = tokenizer.eos_token_id
    model = kind(config(vocab_size=len(tokenizer) + padding, eos_token_id=eos, pad_token_id=eos, **SIZES | changes)).eval()
    fork, child = add_control_tokens(model, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        model.get_output_embeddings().weight[fork] *= 6.0
    return tokenizer, model, (fork, child)


def written(model, ids, **options):
    return model.generate(torch.tensor([ids]), **{"max_new_tokens": 60, "do_sample": False} | options)[0].tolist()


@pytest.mark.parametrize("settings", [
    {"tie_word_embeddings": False},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": True, "padding": 30},  # room for both tokens, as Qwen's vocabulary has
    {"kind": PhiForCausalLM, "config": PhiConfig, "tie_word_embeddings": False},  # its head has a bias
], ids=["untied", "tied", "padded", "bias"])  # fmt: skip
def test_what_is_left_writes_what_the_model_writes_plainly(tmp_path, settings):
    tokenizer, model, control = forking(**settings)
    model.generation_config.suppress_tokens = [7, *control]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_merged(model, tokenizer, tmp_path / "plain", plain=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.vocab_size == len(before[next(iter(before))]) and model.generation_config.suppress_tokens

    left, names = AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), ["[Fork]", "[Child]"]
    assert left.config.vocab_size == left.get_output_embeddings().weight.shape[0] == min(control)
    assert left.generation_config.suppress_tokens == [7] and not hasattr(left.generation_config, "apar_config")
    assert checkpoint_config(left).control_ids is None
    own = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert own.get_vocab() == byte_tokenizer().get_vocab() and own.chat_template == tokenizer.chat_template
    assert own.encode("[Fork][Child] x") == byte_tokenizer().encode("[Fork][Child] x")
    assert not any(name in file.read_text() for file in (tmp_path / "plain").glob("*.json") for name in names)
    gone = range(min(control), model.config.vocab_size)  # random rows without a name are likely here
    for text in ("Why?", "Name three birds.", "x"):
        ids = tokenizer.encode(text)
        assert written(left, ids) == written(model, ids, suppress_tokens=[7, *gone])
        with torch.no_grad():
            rows = [one(torch.tensor([ids])).logits[..., : min(control)] for one in (left, model)]
        torch.testing.assert_close(*rows)
    free = [written(model, tokenizer.encode(letter), max_new_tokens=4, suppress_tokens=[]) for letter in "ABCDEFGHIJKLMNOP"]
    assert any(set(control) & {*ids} for ids in free), "it must like to fork"


def test_what_cannot_be_left_out_is_told(tmp_path):
    tokenizer, model, _ = forking(tie_word_embeddings=True)
    tokenizer.add_tokens(["[Later]"])
    with pytest.raises(ConfigurationError, match=r"tokens \['\[Later\]'\] follow the control tokens.*without --plain"):
        save_merged(model, tokenizer, tmp_path / "plain", plain=True)


def test_tokens_of_the_tokenizers_own_vocabulary_stay(tmp_path):
    """Two that were there already serve as control tokens; a vocabulary cannot lose them."""
    tokenizer = byte_tokenizer()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    last = sorted(vocabulary, key=vocabulary.get)[-2:]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES))
    names = add_control_tokens(model, tokenizer, names=tuple(last))
    assert set(names) == {vocabulary[name] for name in last}
    with pytest.raises(ConfigurationError, match="cannot be left out"):
        save_merged(model, tokenizer, tmp_path / "plain", plain=True)


def test_plain_transformers_reads_either_checkpoint_without_hf_apar(tmp_path):
    tokenizer, model, control = forking(tie_word_embeddings=True)
    ids = tokenizer.encode("Name three birds.")
    code = (
        "import sys, torch\nsys.modules['hf_apar'] = None  # importing it fails\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        f"print(model.generate(torch.tensor([{ids}]), max_new_tokens=60, do_sample=False)[0].tolist())\n"
    )
    for plain in (False, True):
        folder = save_merged(model, tokenizer, tmp_path / str(plain), plain=plain)
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout.splitlines()[-1]) == written(model, ids)
    assert not set(control) & set(written(model, ids))


def test_the_command_writes_it_without_heads(tmp_path):
    tokenizer, model, control = forking()
    save_merged(model, tokenizer, tmp_path / "whole")
    (tmp_path / "whole" / HEADS_FILE).write_bytes(b"")
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "plain"), "--model", str(tmp_path / "whole"), "--plain"])
    assert result.exit_code == 0 and "decodes plainly in any engine" in result.stdout
    assert not (tmp_path / "plain" / HEADS_FILE).exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").config.vocab_size == min(control)
