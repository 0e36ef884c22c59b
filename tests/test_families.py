"""Every family against its oracle: the model itself, uncached, on each path alone."""

from functools import cache

import pytest
import torch

from families import CASES, CONFIG, FAMILIES, SMALL, SUPPORT, WINDOW, tiny
from hf_apar import enable_apar
from hf_apar.protocol import ControlTokens
from hf_apar.speculation.medusa import MedusaDrafts, MedusaHeads
from oracle import CHILD, left_padded, nested, random_prompts, walk

LIMIT = 60


@cache
def walked(family, seed):
    """The prompts of a seed, and what the model writes on each path alone: once for all attention functions."""
    prompts, plain = random_prompts(3, seed, shortest=8, longest=16), tiny(family, "eager")
    return prompts, [walk(plain, prompt, ControlTokens.of(CONFIG), LIMIT) for prompt in prompts]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_every_family_writes_what_it_writes_on_each_path_alone(family, attention, monkeypatch):
    monkeypatch.setattr("hf_apar.speculation.medusa.LEAST_CHANCE", 0.01)  # random heads are never sure
    enabled = enable_apar(tiny(family, attention), config=CONFIG)
    forked = beyond = 0
    for seed in range(6):
        prompts, expected = walked(family, seed)
        out = enabled.generate(**left_padded(prompts), apar=True, max_new_tokens=400, return_dict_in_generate=True)
        if not seed:  # trees of guesses, mostly wrong ones
            heads = MedusaHeads(SMALL["hidden_size"], 8, torch.arange(CHILD), 2)
            proposer = MedusaDrafts(heads)
            drafted = enabled.generate(
                **left_padded(prompts), apar=True, max_new_tokens=400, return_dict_in_generate=True, proposer=proposer
            )
            assert sum(stats.proposed for stats in drafted.stats) > 5
            for tree, other in zip(out.trees, drafted.trees, strict=True):
                if all(thread.finish_reason == "eos" for thread in tree.threads):
                    assert nested(other) == nested(tree)
        for answer, tree in zip(expected, out.trees, strict=True):
            if answer is not None and all(thread.finish_reason == "eos" for thread in tree.threads):
                assert nested(tree) == answer
                forked += len(tree.threads) > 1
                beyond += max(len(thread.path_ids) for thread in tree.threads) > 2 * WINDOW
    assert forked and beyond, "some answer must fork and go beyond the window"


def test_the_cases_are_what_transformers_offers():
    """So that a release that drops an attention function shows here, and not as a test that is gone."""
    missing = {(family, attention) for family in FAMILIES for attention in SUPPORT} - set(CASES)
    assert missing <= {("gemma2", "sdpa"), ("gpt_oss", "sdpa"), ("gpt2", "flex_attention")}
