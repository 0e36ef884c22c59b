"""What a model that is large beside its device needs: few bits, checkpointing, other attention; beside plain training."""

import importlib.util
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from byte_tokenizer import byte_tokenizer
from hf_apar import AparModelForCausalLM
from hf_apar.checkpoints.loading import load_tokenizer
from hf_apar.cli.common import Dtype
from hf_apar.cli.writing import TextWriter
from hf_apar.data.settings import Engine, Loading, Sampling
from hf_apar.errors import ConfigurationError, MissingPackageError
from hf_apar.speculation.medusa import MedusaHeads
from hf_apar.text.chat import encode_chat
from hf_apar.training import fine_tuning
from hf_apar.training.tuning import Selection
from tiny_trainer import tiny_model
from tuned import train, train_medusa

LIST = "- A: a b c d e\n- B: f g h i j\n- C: k l m n o"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("base"), byte_tokenizer()
    tiny_model(vocab_size=len(tokenizer), initializer_range=0.2, tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    file = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    lines = [(f"list {n:02}", LIST) for n in range(16)] + [(f"say {n:02}", "no list") for n in range(40)]
    file.write_text("".join(json.dumps({"prompt": prompt, "response": text}) + "\n" for prompt, text in lines))
    return file


OPTIONS = {"rank": 8, "learning_rate": 2e-2, "token_rate": 2.0, "max_length": 256, "save_steps": 100}


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_of_few_bits_forks_on_the_plain_base_and_on_that_one(bits, base, answers, tmp_path):
    loading = Loading(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    options = {**OPTIONS, "max_steps": 60, "gradient_checkpointing": True, "loading": loading}
    metrics = train(answers, tmp_path, Selection(held_out=0.2), model=str(base), **options)
    assert metrics["eval_fork_recall"] > 0.9 and metrics["eval_fork_precision"] > 0.9
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    tokenizer = load_tokenizer(tmp_path)
    ids = torch.tensor([encode_chat(tokenizer, [{"role": "user", "content": "list 20"}])])
    packed = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    for given in ({}, {"quantization_config": packed}):
        model = AparModelForCausalLM.from_pretrained(tmp_path, **given)
        assert isinstance(model, PeftModel) == bool(given)
        out = model.generate(ids, apar=True, max_new_tokens=80, return_dict_in_generate=True)
        assert len(out.trees[0].threads) >= 4, "a thread for each item at least"
    found = train_medusa(model, tokenizer, answers, tmp_path / "heads", max_steps=2, max_length=256, inner_size=32)
    assert 0 <= found["eval_accepted"] <= 5
    assert MedusaHeads.load(tmp_path / "heads").hidden_size == 64


def test_the_model_that_writes_answers_is_packed_too(base):
    writer = TextWriter(str(base), Sampling(), Loading(load_in_4bit=True), Dtype.float32, 0, None)
    with writer.loaded() as (sample, _):
        kinds = {type(layer).__name__ for layer in sample.model.model.layers.modules()}
        assert "Linear4bit" in kinds and "Linear" not in kinds
        assert type(sample.model.lm_head).__name__ == "Linear"
    assert "4 bits" in str(writer) and "bits" not in str(replace(writer, loading=Loading()))


def test_checkpointing_attention_and_devices_change_no_adapter(base, answers, tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuning, "save_adapter", partial(fine_tuning.save_adapter, dtype=torch.float32))
    adapters = []
    for number, changes in enumerate([
        {}, {"gradient_checkpointing": True}, {"loading": Loading(attn_implementation="eager", device_map="cpu")},
    ]):  # fmt: skip
        train(answers, tmp_path / str(number), model=str(base), max_steps=3, **OPTIONS, **changes)
        adapters.append(load_file(tmp_path / str(number) / "adapter_model.safetensors"))
    for other in adapters[1:]:
        assert other.keys() == adapters[0].keys()
        for name in other:
            assert (other[name] - adapters[0][name]).abs().max() < 1e-4, name


def test_both_bits_at_once_are_refused():
    with pytest.raises(ConfigurationError, match="load_in_4bit and load_in_8bit are both set"):
        Loading(load_in_4bit=True, load_in_8bit=True)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(MissingPackageError, match=r"load_in_8bit needs.*pip install 'hf-apar\[bitsandbytes\]'"):
        Loading(load_in_8bit=True).options()


@pytest.mark.parametrize(
    ("attention", "message"),
    [("flash_attention_2", "takes no tree for a mask; give sdpa, eager"), ("flex_attention", "no backward pass of flex")],
)
def test_attention_that_cannot_be_trained_is_refused(attention, message, answers, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match=message):
        train(answers, tmp_path, loading=Loading(attn_implementation=attention))


@pytest.mark.parametrize("loading", [Loading(load_in_4bit=True), Loading(device_map="auto")])
def test_vllm_loads_as_it_does(loading):
    with pytest.raises(ConfigurationError, match="vLLM loads the model whole"):
        TextWriter(None, Sampling(engine=Engine.vllm), loading, Dtype.float32, 0, None)


def test_layers_outside_memory_are_refused(base, answers, tmp_path):
    with pytest.raises(ConfigurationError, match="device_map meta leaves layers of"):
        train(answers, tmp_path / "out", model=str(base), loading=Loading(device_map="meta"))
    assert not (tmp_path / "out").exists()
