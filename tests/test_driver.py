"""The engine that `docs/serving.md` shows, under the real driver: what it writes is what ``generate`` writes."""

import pytest
import torch

from conftest import CHILD, EOS, FORK, random_prompts
from hf_apar import AparConfig
from hf_apar.protocol import ControlTokens
from hf_apar.serving.admission import Eager, EqualShare, FixedCap
from hf_apar.serving.answer import Answer, Limits
from hf_apar.serving.driver import Driver
from letter_tokenizer import letter_tokenizer
from test_docs import ROOT, padded_code


@pytest.fixture(scope="module")
def whole_paths():
    namespace = {}
    exec(padded_code(ROOT / "docs" / "serving.md")[0], namespace)
    return namespace["WholePaths"]


@pytest.mark.parametrize("policy", [Eager(), FixedCap(1), EqualShare(5)])
@pytest.mark.parametrize("settings", [{}, {"max_depth": 2}, {"fork_bias": 3.0}, {"fork_bias": -torch.inf}])
def test_an_engine_of_thirty_lines_writes_what_generate_writes(whole_paths, apar_llama, policy, settings):
    prompts, answers, forks = random_prompts(3, seed=2), [], 0
    engine = whole_paths(apar_llama, EOS)
    driver = Driver(engine, policy)
    for prompt in prompts:
        config = ControlTokens(fork_token_id=FORK, child_token_id=CHILD, **settings)
        answers.append(Answer(prompt, config, Limits(None, 500), letter_tokenizer()))
        driver.add(answers[-1])
    driver.run(engine.step)
    for prompt, answer in zip(prompts, answers, strict=True):
        tree = apar_llama.generate(
            torch.tensor([prompt]), apar=AparConfig(**settings), max_new_tokens=2000, return_dict_in_generate=True
        ).trees[0]
        assert answer.tree.token_ids == tree.token_ids and answer.tree.closing_ids == tree.closing_ids
        assert sorted(one.path_ids for one in answer.tree.threads) == sorted(one.path_ids for one in tree.threads)
        forks += len(tree.threads) - 1
    assert forks > 5 or settings.get("fork_bias") == -torch.inf
    assert not engine.running and len(driver) == driver.threads == 0
