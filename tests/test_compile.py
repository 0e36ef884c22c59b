"""Compiled models; the backend here records graphs and runs them as they are, so no compiler is needed."""

import pytest
import torch
from transformers import CompileConfig

from conftest import left_padded, random_prompts, tiny_llama
from hf_apar import ConfigurationError, enable_apar

FORMS = {1: 5, 3: 3}  # beyond eight graphs Dynamo runs the rest as it is
GRAPHS = CompileConfig(backend="eager", mode=None, fullgraph=True)


@pytest.mark.parametrize(("how", "batch"), [("compile", 1), ("compile", 3), ("forward", 1)])
def test_a_model_that_the_user_compiled_writes_the_same(apar_llama, how, batch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, threads = enable_apar(tiny_llama()), 0
    if how == "compile":
        model.compile(backend="eager", dynamic=True)
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    for seed in range(6):  # the last one fills the first buffers
        inputs = left_padded(random_prompts(batch, seed, *((3, 12) if seed < 5 else (245, 250))))
        expected = apar_llama.generate(**inputs, apar=True, max_new_tokens=200, return_dict_in_generate=True)
        assert model.generate(**inputs, apar=True, max_new_tokens=200).tolist() == expected.sequences.tolist()
        threads = max(threads, *(stats.peak_threads for stats in expected.stats))
    assert threads > 3
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 1, "prompts and steps both"
    assert how == "forward" or graphs <= FORMS[batch], "one for each form of a step, none for a width or a length"
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compile_config_is_refused_with_apar(apar_llama):
    with pytest.raises(ConfigurationError, match=r"compile_config cannot be combined .* model.compile\(dynamic=True\)"):
        apar_llama.generate(**left_padded(random_prompts(2, seed=3)), apar=True, max_new_tokens=3, compile_config=GRAPHS)


def test_without_apar_a_compiled_enabled_model_is_itself(plain_llama):
    torch._dynamo.reset()
    inputs = left_padded(random_prompts(2, seed=3))
    options = {"max_new_tokens": 12, "cache_implementation": "static", "compile_config": GRAPHS}
    expected = plain_llama.generate(**inputs, **options)
    assert enable_apar(tiny_llama()).generate(**inputs, **options).tolist() == expected.tolist()
