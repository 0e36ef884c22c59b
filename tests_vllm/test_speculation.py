"""The engine's own speculation beside forks. The last file: vLLM 0.32 starts no other engine in a process after this one."""

import math

import pytest
from vllm import SamplingParams

from hf_apar import AparConfig
from hf_apar.errors import ConfigurationError
from hf_apar.serving.vllm import AparLLM
from hf_apar.serving.vllm.parameters import check_bias


def test_the_engines_own_drafts_change_no_text(folder, oracle, prompts):
    drafting = AparLLM(
        str(folder), dtype="float32", max_model_len=1024, enforce_eager=True, num_gpu_blocks_override=400,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    )  # fmt: skip
    outputs = drafting.generate(prompts, SamplingParams(temperature=0.0, max_tokens=600, repetition_penalty=1.1))
    check_bias(AparConfig(fork_bias=-math.inf), drafting.llm.llm_engine.vllm_config)
    with pytest.raises(ConfigurationError, match="no bias beside its own speculation"):
        check_bias(AparConfig(fork_bias=2.0), drafting.llm.llm_engine.vllm_config)
    for prompt, output in zip(prompts, outputs, strict=True):
        tree = oracle(prompt)
        assert list(output.outputs[0].token_ids) == tree.token_ids + tree.closing_ids
