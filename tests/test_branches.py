"""``branch`` against ``generate`` of prompt + branch alone: the same model, one sequence at a time."""

import pytest
import torch

from conftest import left_padded, random_prompts
from hf_apar import branch

BRANCHES = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6], []]


def alone(model, prompt, ids, **options):
    row = torch.tensor([[*prompt, *ids]])
    return model.generate(row, attention_mask=torch.ones_like(row), **options)[0, row.shape[1] :].tolist()


def new_ids(out):
    return [[thread.sampled_ids for thread in threads] for threads in out.threads]


@pytest.mark.parametrize("max_threads", [None, 1, 2])
def test_each_branch_is_what_generate_gives_of_prompt_and_branch_alone(plain_llama, max_threads):
    prompts = random_prompts(3, seed=1)
    out = branch(
        plain_llama, **left_padded(prompts), branches=BRANCHES, max_threads=max_threads, max_new_tokens=40,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert new_ids(out) == [[alone(plain_llama, prompt, ids, max_new_tokens=40) for ids in BRANCHES] for prompt in prompts]
