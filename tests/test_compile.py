"""A compiled model meets few shapes; the backend here records graphs and runs them as they are, so no compiler is needed."""

import pytest
import torch
from transformers import CompileConfig

from conftest import left_padded, random_prompts, tiny_llama
from hf_apar import enable_apar

GRAPHS = CompileConfig(backend="eager", mode=None, fullgraph=True)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_compiled_model_writes_the_same_text_with_few_graphs(apar_llama, batch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = enable_apar(tiny_llama())
    threads = 0
    for seed in range(4):
        inputs = left_padded(random_prompts(batch, seed))
        expected = apar_llama.generate(**inputs, apar=True, max_new_tokens=200, return_dict_in_generate=True)
        got = model.generate(**inputs, apar=True, max_new_tokens=200, compile_config=GRAPHS)
        assert got.tolist() == expected.sequences.tolist()
        threads = max(threads, *(stats.peak_threads for stats in expected.stats))
    assert threads > 3
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_without_apar_a_compiled_enabled_model_is_itself(plain_llama):
    torch._dynamo.reset()
    inputs = left_padded(random_prompts(2, seed=3))
    options = {"max_new_tokens": 12, "cache_implementation": "static", "compile_config": GRAPHS}
    expected = plain_llama.generate(**inputs, **options)
    assert enable_apar(tiny_llama()).generate(**inputs, **options).tolist() == expected.tolist()
