"""FIELD T1: bases whose output layer is not tied to the embeddings learn to fork as those where it is."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from byte_tokenizer import byte_tokenizer
from hf_apar import AparModelForCausalLM, add_control_tokens
from hf_apar.checkpoints.adapters import load_adapter, save_adapter
from hf_apar.checkpoints.export import save_merged
from hf_apar.data.distillation.distill import TextAnswer
from hf_apar.errors import ConfigurationError
from hf_apar.training.lora import add_lora, load_lora, token_indices
from hf_apar.training.tuning import Selection
from tuned import train

torch.set_num_threads(1)

LIST = "- A: a b c d e\n- B: f g h i j\n- C: k l m n o"
ANSWERS = [TextAnswer(f"list {n:02}", LIST) for n in range(16)] + [TextAnswer(f"say {n:02}", "no list") for n in range(40)]
OPTIONS = {"rank": 8, "learning_rate": 2e-2, "token_rate": 2.0, "max_length": 256, "save_steps": 40, "eval_steps": 40}


def untied(size, **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": False, "eos_token_id": byte_tokenizer().eos_token_id,
        "bos_token_id": None, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer()
    untied(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    file = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    file.write_text("".join(json.dumps({"prompt": a.prompt, "response": a.response}) + "\n" for a in ANSWERS))
    return file


@pytest.fixture(scope="module")
def trained(base, answers, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    return output, train(answers, output, Selection(held_out=0.2), model=str(base), max_steps=80, **OPTIONS)


def test_t1_an_untied_model_learns_where_to_fork(trained):
    output, metrics = trained
    assert metrics["eval_fork_recall"] == metrics["eval_fork_precision"] == 1.0
    tensors = load_file(output / "adapter_model.safetensors")
    rows = {name: tuple(tensor.shape) for name, tensor in tensors.items() if "trainable_tokens" in name}
    assert rows == {
        "base_model.model.lm_head.token_adapter.trainable_tokens_delta": (2, 32),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 32),
    }
    assert not any(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in tensors)


def environment():
    """For a process in another folder, where a relative path of the package would lead nowhere."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


ELSEWHERE = """
import json, sys
import torch
from transformers import AutoTokenizer
import hf_apar
for folder in sys.argv[1:]:
    model = hf_apar.AparModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = hf_apar.encode_chat(tokenizer, [{"role": "user", "content": "list 03"}])
    out = model.generate(torch.tensor([ids]), apar=True, do_sample=False, max_new_tokens=120, return_dict_in_generate=True)
    print(json.dumps([out.trees[0].text(tokenizer), len(out.trees[0].threads), out.stats[0].steps]))
"""


def test_t1_the_adapter_and_its_merged_checkpoint_fork_in_another_process(trained, tmp_path):
    output = trained[0]
    merged = AparModelForCausalLM.from_pretrained(output)
    save_merged(merged, AutoTokenizer.from_pretrained(output), tmp_path / "merged")
    command = [sys.executable, "-c", ELSEWHERE, str(output), str(tmp_path / "merged")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = done.stdout.splitlines()
    assert len(answers) == 2
    for answer in answers:
        text, threads, steps = json.loads(answer)
        assert text == LIST and threads == 4
        assert steps < len(LIST) + 3, "threads save steps"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.lm_head.weight.data_ptr() != plain.get_input_embeddings().weight.data_ptr()


def test_a_run_that_goes_on_ends_like_one_that_never_stopped(trained, base, answers, tmp_path):
    output, metrics = trained
    shutil.copytree(output / "checkpoint-40", tmp_path / "checkpoint-40")
    shutil.copy(output / "made_with.json", tmp_path)
    again = train(answers, tmp_path, Selection(held_out=0.2), model=str(base), max_steps=80, **OPTIONS)
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, output))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_starts_from_an_untied_adapter_and_from_no_half_one(trained, base, answers, tmp_path):
    output, metrics = trained
    hardly = OPTIONS | {"learning_rate": 1e-9}
    again = train(answers, tmp_path / "on", Selection(held_out=0.2), model=str(base), start=output, max_steps=1, **hardly)
    assert again["eval_fork_recall"] == metrics["eval_fork_recall"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), byte_tokenizer()
    ids = add_control_tokens(model, tokenizer)
    half = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=sorted(ids)))
    save_adapter(half, tokenizer, tmp_path / "half")
    fresh = AutoModelForCausalLM.from_pretrained(base)
    add_control_tokens(fresh, byte_tokenizer())
    with pytest.raises(ConfigurationError, match=r"the token rows \[258, 259\], this base needs {'model.embed_tokens"):
        load_lora(fresh, tmp_path / "half", ids)


@pytest.mark.parametrize("options", [{"bf16": True}, {"accumulation": 2, "batch_size": 2}], ids=["bf16", "accumulation"])
def test_t1_it_learns_in_other_ways_of_computing(options, base, answers, tmp_path):
    few = OPTIONS | {"max_steps": 60} | options
    metrics = train(answers, tmp_path, Selection(held_out=0.2), model=str(base), **few)
    assert metrics["eval_fork_recall"] == 1.0


def gpt2(size, tied):
    return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=tied))


def gpt_neox(size, tied):
    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    ))  # fmt: skip


GPT_NEOX_HEAD = "lm_head" if hasattr(gpt_neox(8, False), "lm_head") else "embed_out"  # by the version of transformers


def llama(size, tied):
    return untied(size, tie_word_embeddings=tied)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (llama, ("model.embed_tokens", "lm_head")),
        (gpt2, ("transformer.wte", "lm_head")),
        (gpt_neox, ("gpt_neox.embed_in", GPT_NEOX_HEAD)),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_t1_the_layers_are_found_in_every_family(family, names, tied, tmp_path):
    """Both rows have gradients, are saved, and are there again after loading and merging, in a plain LoraConfig too."""
    tokenizer = byte_tokenizer()
    model = family(len(tokenizer), tied)
    model.save_pretrained(tmp_path / "base")
    ids = add_control_tokens(model, tokenizer)
    found = token_indices(model, ids)
    assert found == (sorted(ids) if tied else dict.fromkeys(names, sorted(ids)))
    own = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", trainable_token_indices=found)
    wrapped = get_peft_model(model, own)
    inputs = torch.tensor([[5, ids[0], ids[1], 9]])
    wrapped(input_ids=inputs, labels=inputs).loss.backward()
    rows = [weight for name, weight in wrapped.named_parameters() if "trainable_tokens" in name]
    assert len(rows) == (1 if tied else 2) and all((row.grad.abs().sum(-1) > 0).all() for row in rows)
    with torch.no_grad():
        for row in rows:
            row += torch.randn_like(row)
    expected = wrapped.eval()(input_ids=inputs).logits
    save_adapter(wrapped, tokenizer, tmp_path / "adapter", dtype=torch.float32)
    merged = load_adapter(type(model).from_pretrained(tmp_path / "base"), byte_tokenizer(), tmp_path / "adapter").eval()
    assert (merged(input_ids=inputs).logits - expected).abs().max() < 1e-4
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) is tied


def test_t1_a_model_in_4_bits_trains_both_rows(tmp_path):
    tokenizer = byte_tokenizer()
    model = untied(len(tokenizer), hidden_size=64)
    ids = add_control_tokens(model, tokenizer)
    model.save_pretrained(tmp_path)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=bits)
    wrapped = add_lora(quantised, ids, rank=2)
    assert isinstance(wrapped, PeftModel) and any("4bit" in type(layer).__name__ for layer in wrapped.modules())
    inputs = torch.tensor([[5, ids[0], ids[1], 9]])
    wrapped(input_ids=inputs, labels=inputs).loss.backward()
    rows = {name: weight for name, weight in wrapped.named_parameters() if "trainable_tokens" in name}
    assert len(rows) == 2 and all((row.grad.abs().sum(-1) > 0).all() for row in rows.values())
