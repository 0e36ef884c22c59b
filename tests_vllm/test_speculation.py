"""The engine's own speculation beside forks. The last file: vLLM 0.32 starts no other engine in a process after this one."""

from vllm import SamplingParams

from hf_apar.serving.vllm import AparLLM


def test_the_engines_own_drafts_change_no_text(folder, oracle, prompts):
    drafting = AparLLM(
        str(folder), dtype="float32", max_model_len=1024, enforce_eager=True, num_gpu_blocks_override=400,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    )  # fmt: skip
    outputs = drafting.generate(prompts, SamplingParams(temperature=0.0, max_tokens=600, repetition_penalty=1.1))
    for prompt, output in zip(prompts, outputs, strict=True):
        tree = oracle(prompt)
        assert list(output.outputs[0].token_ids) == tree.token_ids + tree.closing_ids
