"""Settings and fixtures of all tests; :mod:`oracle` has the models, the prompts and what answers are compared with."""

import copy

import pytest
import torch
from hypothesis import settings

from hf_apar import enable_apar
from oracle import (  # the tests' own names of them
    CHILD,
    EOS,
    FORK,
    VOCABULARY,
    flat,
    left_padded,
    make_forks_likely,
    nested,
    next_token,
    random_prompts,
    tiny_llama,
    walk,
)

__all__ = [
    "CHILD", "EOS", "FORK", "VOCABULARY", "flat", "left_padded", "make_forks_likely", "nested", "next_token",
    "random_prompts", "tiny_llama", "walk",
]  # fmt: skip

torch.set_num_threads(1)
settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def plain_llama():
    return tiny_llama()


@pytest.fixture(scope="session")
def apar_llama(plain_llama):
    return enable_apar(copy.deepcopy(plain_llama))
