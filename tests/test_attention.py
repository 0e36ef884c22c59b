"""The attention of a step: grouped heads and packed rows against plain sdpa, and how a model comes by it."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from conftest import left_padded, random_prompts, tiny_llama
from hf_apar import disable_apar, enable_apar
from hf_apar.attention import TREE_ATTENTION, Packing, tree_attention, tree_step
from hf_apar.masks import additive


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
    padded = enable_apar(tiny_llama(attn_implementation="eager"))
    assert padded.generate(**inputs, apar=True, max_new_tokens=300).tolist() == out.sequences.tolist()


def test_enabling_switches_sdpa_alone_and_disabling_switches_back(tmp_path):
    for attention, expected in (("sdpa", TREE_ATTENTION), ("eager", "eager")):
        model = enable_apar(tiny_llama(attn_implementation=attention))
        assert model.config._attn_implementation == expected
        model.save_pretrained(tmp_path / attention)
        assert TREE_ATTENTION not in (tmp_path / attention / "config.json").read_text()
        assert disable_apar(model).config._attn_implementation == attention


def test_importing_registers_nothing():
    code = "import hf_apar; from transformers import AttentionInterface as A; assert 'apar_sdpa' not in A()._global_mapping"
    subprocess.run([sys.executable, "-c", code], check=True)
