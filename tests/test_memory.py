"""The bytes that are calculated beside those that are counted, on two small random models."""

import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from training_memory import measured_peak

from hf_apar.training.memory import LLAMA_8B, ModelShape, training_memory
from hf_apar.training.tuning import Tuning

SIZES = {"num_hidden_layers": 6, "num_attention_heads": 4, "max_position_embeddings": 256}
MODELS = {
    "tied": {"vocab_size": 8192, "hidden_size": 128, "intermediate_size": 384, "num_key_value_heads": 4},
    "untied": {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 896, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_calculated_is_within_15_percent_of_what_is_counted(name, bf16, checkpointing):
    config = LlamaConfig(**SIZES, **MODELS[name], tie_word_embeddings=name == "tied")
    tuning = Tuning(rank=8, max_length=128, batch_size=2, gradient_checkpointing=checkpointing)
    peak = measured_peak(LlamaForCausalLM(config), tuning, bf16=bf16)
    assert training_memory(ModelShape.of(config), tuning, bf16=bf16).total == pytest.approx(peak, rel=0.15)


def test_the_shape_of_a_config_has_its_weights():
    for name, sizes in MODELS.items():
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **sizes, tie_word_embeddings=name == "tied"))
        shape = ModelShape.of(model.config)
        norms = sum(weight.numel() for weight in model.parameters() if weight.dim() == 1)
        assert shape.linear + shape.embeddings + norms == sum(weight.numel() for weight in model.parameters())
    assert round((LLAMA_8B.linear + LLAMA_8B.embeddings) / 1e9, 2) == 8.03
