"""What can be known before training is asked before it, all at once, and what can be mended is mended."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from byte_tokenizer import byte_tokenizer
from hf_apar import UnsupportedModelError, add_control_tokens, check_model
from hf_apar.checkpoints.adapters import save_adapter
from hf_apar.checkpoints.export import save_merged
from hf_apar.errors import ConfigurationError
from hf_apar.generation_settings import eos_token_ids, make_savable
from hf_apar.training.fine_tuning import train
from hf_apar.training.lora import add_lora

torch.set_num_threads(1)

VICUNA = {"temperature": 0.9, "top_p": 0.6, "bos_token_id": None, "pad_token_id": 0}


def llama(tokenizer, **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


def lfm2(size):
    return Lfm2ForCausalLM(Lfm2Config(
        vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["conv", "full_attention"],
    ))  # fmt: skip


def qwen3_next(size):
    return Qwen3NextForCausalLM(Qwen3NextConfig(
        vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, layer_types=["linear_attention", "full_attention"], num_experts=0,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    ))  # fmt: skip


def bloom(size):
    return BloomForCausalLM(BloomConfig(vocab_size=size, hidden_size=16, n_layer=1, n_head=2))


def t5(size):
    return T5ForConditionalGeneration(T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("kind", "why"),
    [(lfm2, "layers of kind conv"), (qwen3_next, "linear_attention"), (bloom, "ALiBi"), (t5, "encoder-decoder")],
    ids=["LFM2", "Qwen3-Next", "ALiBi", "encoder-decoder"],
)
def test_t6_layers_that_cannot_follow_a_tree_are_refused_before_training(kind, why, tmp_path):
    tokenizer = byte_tokenizer()
    model = kind(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    with pytest.raises(UnsupportedModelError, match=why):
        check_model(model, tokenizer)
    if kind is t5:
        return
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "a", "response": "b"}\n')  # too few: never read
    with pytest.raises(UnsupportedModelError, match=why):
        train(answers, tmp_path / "out", model=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()


def test_a_prompt_learning_adapter_is_refused_and_lora_is_not():
    tokenizer = byte_tokenizer()
    check_model(get_peft_model(llama(tokenizer), LoraConfig(r=2, target_modules="all-linear")), tokenizer)
    prompts = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        check_model(get_peft_model(llama(tokenizer), prompts), tokenizer)


def test_a_model_of_ours_passes_before_and_after_its_tokens_and_nothing_is_changed():
    tokenizer = byte_tokenizer()
    for changes in ({}, {"tie_word_embeddings": True}, {"vocab_size": 300}):
        model = llama(tokenizer := byte_tokenizer(), **changes)
        before = (model.generation_config.to_dict(), len(tokenizer), model.get_input_embeddings().weight.clone())
        check_model(model, tokenizer)
        assert (model.generation_config.to_dict(), len(tokenizer)) == before[:2]
        assert torch.equal(model.get_input_embeddings().weight, before[2])
        add_control_tokens(model, tokenizer)
        check_model(model, tokenizer)


def test_all_problems_are_told_at_once():
    tokenizer = byte_tokenizer(template=None)
    tokenizer.add_tokens(["<pad>"], special_tokens=True)
    tokenizer.pad_token, tokenizer.eos_token = "<pad>", None
    model = bloom(len(tokenizer) - 1)
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id, model.generation_config.suppress_tokens = 5, [5]
    with pytest.raises(UnsupportedModelError) as raised:
        check_model(model, tokenizer)
    said = str(raised.value)
    for number, part in enumerate(
        ["ALiBi", "cannot be saved", "has an EOS", "padding has the id 258, the model has 258 rows", "no chat template"], 1
    ):
        assert f"({number})" in said and part in said
    assert said.startswith("5 things keep BloomForCausalLM from")
    with pytest.raises(UnsupportedModelError) as raised:
        check_model(model, tokenizer, chat=False)
    assert "chat template" not in str(raised.value)


def test_templates_that_fail_or_lead_out_of_the_vocabulary():
    tokenizer = byte_tokenizer(template="{{ raise_exception('only systems speak') }}")
    with pytest.raises(UnsupportedModelError, match=r"fails on a user's message .*only systems speak"):
        check_model(llama(tokenizer), tokenizer)
    tokenizer = byte_tokenizer(template="")
    with pytest.raises(UnsupportedModelError, match="no chat template"):
        check_model(llama(tokenizer), tokenizer)
    tokenizer = byte_tokenizer(template="{{ '<|turn|>' }}")
    model = llama(tokenizer)
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    with pytest.raises(UnsupportedModelError, match=r"the id 258 \(<\|turn\|>\), the model has 258 rows"):
        check_model(model, tokenizer)


def test_rows_that_cannot_be_trained_are_refused_with_the_way_out():
    """FIELD H4: the weights of a GGUF file may stay packed; a bias is lost where PEFT trains single rows."""
    tokenizer = byte_tokenizer()
    model = llama(tokenizer)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"GgufConfig.*dequantize=True"):
        check_model(model, tokenizer)
    model = llama(tokenizer)
    model.lm_head = torch.nn.Linear(16, len(tokenizer), bias=True)
    with pytest.raises(UnsupportedModelError, match="bias"):
        check_model(model, tokenizer)
    check_model(model, tokenizer, token_rows=False)


def test_t5_a_thread_ends_with_what_it_is_taught_to_end_with(caplog):
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    for given, wanted in (([3, 4], [3, 4, end]), (3, [3, end]), (None, [end]), (end, end), ([3, end], [3, end])):
        model = llama(tokenizer)
        model.generation_config.eos_token_id = given
        caplog.clear()
        check_model(model, byte_tokenizer())  # known before, and mended
        add_control_tokens(model, own := byte_tokenizer())
        assert model.generation_config.eos_token_id == wanted
        assert ("does not know" in caplog.text) == (given != wanted)
        assert own.eos_token_id in eos_token_ids(model.generation_config)
    model.generation_config.eos_token_id = 3
    with pytest.raises(UnsupportedModelError, match="no thread would end"):
        check_model(model, own)
    nameless = byte_tokenizer()
    nameless.eos_token = None
    model = llama(tokenizer)
    check_model(model, nameless)
    add_control_tokens(model, nameless)
    assert nameless.eos_token_id == end


def test_other_ids_than_the_tokenizers_are_refused():
    tokenizer = byte_tokenizer()
    model = llama(tokenizer)
    add_control_tokens(model, tokenizer)
    other = byte_tokenizer()
    other.add_tokens(["word", "[Fork]", "[Child]"], special_tokens=True)
    with pytest.raises(UnsupportedModelError, match=r"ids \(258, 259\), the tokenizer's \(259, 260\)"):
        check_model(model, other)
    model.resize_token_embeddings(258)
    with pytest.raises(UnsupportedModelError, match="id 259, the model has 258 rows"):
        check_model(model, tokenizer)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.6, "do_sample": True}),  # Vicuna's
        ({"temperature": 0.9, "do_sample": False}, {"do_sample": False}),
        ({"pad_token_id": -1, "eos_token_id": 2}, {"eos_token_id": 2}),  # the first Llama's
        ({"top_k": 7, "pad_token_id": -1}, {"top_k": 7, "do_sample": True}),
        ({"length_penalty": 2.0, "early_stopping": True}, {}),
        ({"temperature": 0.0, "top_p": 0.6}, {}),  # greedy, as some say it
        ({"top_k": 0}, {}),
        ({"num_beams": 2, "length_penalty": 2.0}, {"num_beams": 2, "length_penalty": 2.0}),
        ({"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}),
        ({"output_scores": True, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
    ],
)
def test_t3_a_generation_config_is_made_savable_and_keeps_what_it_means(settings, expected, tmp_path):
    config = GenerationConfig(**settings)
    changes = make_savable(config)
    assert bool(changes) == (settings != expected)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    saved.pop("transformers_version")
    assert saved == expected
    assert make_savable(config) == []


def test_t3_what_cannot_be_made_savable_is_told_before_training():
    config = GenerationConfig(temperature=0.9)
    config.forced_eos_token_id, config.suppress_tokens = 5, [5]
    with pytest.raises(ConfigurationError, match="correct it first: Every token in `forced_eos_token_id`"):
        make_savable(config)


def test_t3_a_base_with_vicunas_generation_config_saves_in_every_way(tmp_path, caplog):
    tokenizer = byte_tokenizer()
    model = llama(tokenizer)
    model.save_pretrained(tmp_path / "base")
    published = {"_from_model_config": False, "eos_token_id": tokenizer.eos_token_id} | VICUNA
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(published))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    check_model(model, tokenizer)
    add_control_tokens(model, tokenizer)
    assert "do_sample=True was added, since temperature and top_p are set" in caplog.text
    model.save_pretrained(tmp_path / "plain")
    save_merged(copy.deepcopy(model), tokenizer, tmp_path / "merged")
    save_adapter(add_lora(model, add_control_tokens(model, tokenizer), rank=2), tokenizer, tmp_path / "adapter")
    for name in ("plain", "merged", "adapter"):
        config = GenerationConfig.from_pretrained(tmp_path / name)
        assert (config.temperature, config.top_p, config.do_sample) == (0.9, 0.6, True)
        assert config.suppress_tokens == [258, 259]


def test_t3_what_was_set_after_the_tokens_were_added_saves_too(tmp_path):
    tokenizer = byte_tokenizer()
    model = llama(tokenizer)
    ids = add_control_tokens(model, tokenizer)
    model.generation_config.top_p = 0.5
    save_merged(copy.deepcopy(model), tokenizer, tmp_path / "merged")
    save_adapter(add_lora(model, ids, rank=2), tokenizer, tmp_path / "adapter")
    for name in ("merged", "adapter"):
        config = GenerationConfig.from_pretrained(tmp_path / name)
        assert (config.top_p, config.do_sample) == (0.5, True)
