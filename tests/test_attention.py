"""The attention of a step: grouped heads and packed rows against plain sdpa, and how a model comes by it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from conftest import CHILD, FORK, left_padded, random_prompts, tiny_llama
from hf_apar import enable_apar
from hf_apar.forward.attention import TREE_ATTENTION, Packing, tree_attention, tree_attention_for, tree_step
from hf_apar.forward.masks import additive


class Layer(nn.Module):
    is_causal = True

    def __init__(self, heads, groups):
        super().__init__()
        self.num_key_value_groups = heads // groups


@pytest.mark.parametrize(("heads", "groups", "width", "value_dim"), [(9, 3, 5, 8), (4, 4, 3, 8), (4, 1, 1, 8), (6, 2, 7, 4)])
def test_a_step_attends_as_sdpa_with_repeated_keys(heads, groups, width, value_dim):
    torch.manual_seed(0)
    batch, slots, dim = 3, 11, 8
    layer = Layer(heads, groups)
    query, key = torch.randn(batch, heads, width, dim), torch.randn(batch, groups, slots, dim)
    value = torch.randn(batch, groups, slots, value_dim)
    visible = torch.rand(batch, 1, width, slots) < 0.5
    visible[..., 0] = True
    mask = additive(visible, torch.float32)
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3)
    with tree_step(None):
        for _ in range(2):  # the second layer of a step finds its mask ready
            got, _ = tree_attention(layer, query, key, value, mask, scaling=0.3)
            torch.testing.assert_close(got, expected)
    rows, columns = (torch.rand(batch, width) < 0.6).nonzero(as_tuple=True)
    packed = query[rows, :, columns].transpose(0, 1)[None]  # (1, heads, queries, dim)
    with tree_step(Packing(rows, columns, batch, width)):
        got, _ = tree_attention(layer, packed, key, value, mask, scaling=0.3)
    torch.testing.assert_close(got[0], expected[rows, columns])
    outside, _ = tree_attention(layer, query, key, value, mask, scaling=0.3)
    assert torch.equal(outside, expected), "outside a step it is sdpa"


def test_rows_of_different_widths_cost_no_padding(plain_llama):
    """One forward pass feeds as many tokens as threads live, in all rows together."""
    fed = []
    model = enable_apar(tiny_llama())
    model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    inputs = left_padded(random_prompts(5, seed=2))
    out = model.generate(**inputs, apar=True, max_new_tokens=300, return_dict_in_generate=True)
    sampled = sum(len(thread.sampled_ids) for tree in out.trees for thread in tree.threads)
    children = sum(len(tree.threads) - 1 for tree in out.trees)
    ended = sum(thread.finish_reason == "eos" for tree in out.trees for thread in tree.threads)
    assert fed[0] == tuple(inputs["input_ids"].shape)
    steps = fed[1:]
    assert sum(rows * width for rows, width in steps) == sampled + children - ended  # [Child] is fed, EOS is not
    assert any(rows == 1 and width > 5 for rows, width in steps)
    padded = enable_apar(tiny_llama(attn_implementation="eager"))  # no rows are packed here
    assert padded.generate(**inputs, apar=True, max_new_tokens=300).tolist() == out.sequences.tolist()


def test_a_model_is_switched_for_the_time_of_a_run_alone(plain_llama):
    seen = []
    for attention, expected in (("sdpa", TREE_ATTENTION), ("flex_attention", TREE_ATTENTION), ("eager", "eager")):
        model = enable_apar(tiny_llama(attn_implementation=attention))
        watch = [lambda ids, scores, model=model: seen.append(model.config._attn_implementation) or ids[:, -1] < 0]
        model.generate(**left_padded(random_prompts(2, seed=3)), apar=True, max_new_tokens=9, stopping_criteria=watch)
        assert set(seen) == {expected} and model.config._attn_implementation == attention
        seen.clear()
    with tree_attention_for(plain_llama) as packs, tree_attention_for(plain_llama):
        assert packs and plain_llama.config._attn_implementation == TREE_ATTENTION
    assert plain_llama.config._attn_implementation == "sdpa"


def test_h3_flex_attention_is_right_in_a_fresh_process():
    """FIELD H3: the compiled kernel read out of bounds, and only where dynamo had given up before was the text right."""
    code = """
import torch
from conftest import CHILD, FORK, left_padded, random_prompts, tiny_llama
from hf_apar import enable_apar
inputs, compiled = left_padded(random_prompts(3, seed=2)), torch._dynamo.utils.counters["stats"]
models = [enable_apar(tiny_llama(attn_implementation=name)) for name in ("sdpa", "flex_attention")]
sdpa, flex = (model.generate(**inputs, apar=True, max_new_tokens=200) for model in models)
assert sdpa.tolist() == flex.tolist() and sdpa.shape[1] > 25
assert not compiled["unique_graphs"], compiled
assert models[1].config._attn_implementation == "flex_attention"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_continuous_batching_on_an_enabled_model_writes_what_generate_writes(apar_llama):
    prompt = random_prompts(1, seed=3)[0]
    expected = apar_llama.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, eos_token_id=-1, do_sample=False)
    model = enable_apar(tiny_llama())
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)  # else it takes all memory that is free
    settings = GenerationConfig(max_new_tokens=8, eos_token_id=-1, do_sample=False, suppress_tokens=[FORK, CHILD])
    (out,) = model.generate_batch([prompt], generation_config=settings, continuous_batching_config=small).values()
    assert prompt + out.generated_tokens == expected[0].tolist()


def test_importing_registers_nothing():
    code = "import hf_apar; from transformers import AttentionInterface as A; assert 'apar_sdpa' not in A()._global_mapping"
    subprocess.run([sys.executable, "-c", code], check=True)
