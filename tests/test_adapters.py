"""PEFT models: wrapped before or after, several adapters, merged; and what is no adapter for threads."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

from conftest import CHILD, FORK, left_padded, random_prompts, tiny_llama
from hf_apar import AparConfig, ConfigurationError, UnsupportedModelError, disable_apar, enable_apar
from hf_apar.checkpoints.adapters import check_fit

PROMPTS = left_padded(random_prompts(3, seed=3))
CONFIG = AparConfig(fork_token_id=FORK, child_token_id=CHILD)


def lora(seed):
    torch.manual_seed(seed)
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


def run(model):
    out = model.generate(**PROMPTS, apar=True, max_new_tokens=200, return_dict_in_generate=True)
    return out.sequences.tolist()


def merged(seed):
    """The oracle: the adapter's weights added to the base's, an ordinary model."""
    return enable_apar(get_peft_model(tiny_llama(), lora(seed)).merge_and_unload())


@pytest.mark.parametrize("enabled_first", [True, False])
def test_a_lora_model_decodes_as_its_merged_weights_do(enabled_first):
    if enabled_first:
        wrapped = get_peft_model(enable_apar(tiny_llama()), lora(1))
    else:
        wrapped = enable_apar(get_peft_model(tiny_llama(), lora(1)))
    assert isinstance(wrapped, PeftModel)
    assert run(wrapped.eval()) == run(merged(1)) != run(enable_apar(tiny_llama()))
    assert run(wrapped.merge_and_unload()) == run(merged(1))


def test_an_adapter_with_magnitudes_of_one_dimension_fits_its_base(tmp_path):
    """DoRA's have one: it is the pairs of matrices alone whose shapes are compared with the base's."""
    torch.manual_seed(4)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", use_dora=True)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dim() for tensor in keys.values()} == {1, 2}
    check_fit(tmp_path, tiny_llama())
    with pytest.raises(ConfigurationError, match="does not fit"):
        check_fit(tmp_path, tiny_llama(hidden_size=64))


def test_several_adapters_and_none():
    wrapped = get_peft_model(enable_apar(tiny_llama()), lora(1))
    torch.manual_seed(2)
    wrapped.add_adapter("other", lora(2))
    wrapped.eval()
    first = run(wrapped)
    wrapped.set_adapter("other")
    assert run(wrapped) == run(merged(2)) != first
    with wrapped.disable_adapter():
        assert run(wrapped) == run(enable_apar(tiny_llama()))


def test_disabling_goes_through_the_wrapper():
    wrapped = get_peft_model(enable_apar(tiny_llama()), lora(1)).eval()
    disable_apar(wrapped)
    with pytest.raises((TypeError, ValueError), match="apar"):
        run(wrapped)


def test_prompt_learning_adapters_are_refused():
    tuned = get_peft_model(tiny_llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModelError, match="use LoRA"):
        enable_apar(tuned)
    tuned = get_peft_model(enable_apar(tiny_llama()), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="use LoRA"):
        run(tuned)
