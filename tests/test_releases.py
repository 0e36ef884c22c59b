"""The range of transformers that is tested is the one that is allowed, and what is beside it is said."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from conftest import random_prompts, tiny_llama
from hf_apar import AparConfig, enable_apar, releases

ROOT = Path(__file__).parents[1]


def test_h1_the_allowed_range_is_the_tested_one():
    """FIELD H1: ``<6`` let a release in that nothing had been tested with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (allowed,) = [one for one in map(Requirement, project["dependencies"]) if one.name == "transformers"]
    oldest, newest = releases.OLDEST, releases.NEWEST
    assert allowed.specifier.contains(f"{oldest}.0") and allowed.specifier.contains(f"{newest}.7")
    before, after = (f"5.{Version(one).minor + step}.0" for one, step in ((oldest, -1), (newest, 1)))
    assert not allowed.specifier.contains(before) and not allowed.specifier.contains(after)
    lowest = (ROOT / "requirements-lowest.lock").read_text()
    assert f"transformers=={oldest}." in lowest


def test_the_installed_release_is_in_the_range():
    code = "import warnings; warnings.simplefilter('error'); from hf_apar import releases; releases.warn_outside_range()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("installed", ["5.15.1", "5.25.0", "6.0.0.dev0"])
def test_another_release_is_named_beside_the_tested_ones(monkeypatch, installed):
    monkeypatch.setattr(releases.transformers, "__version__", installed)  # transformers may put another module in its place
    releases.warn_outside_range.cache_clear()
    with pytest.warns(UserWarning, match=rf"{releases.OLDEST} to {releases.NEWEST}, and {installed} is installed"):
        enable_apar(tiny_llama())
    releases.warn_outside_range.cache_clear()


def test_h1_a_cache_is_given_and_returned_under_either_name():
    model, prompt = enable_apar(tiny_llama()), torch.tensor(random_prompts(1, seed=3))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True}
    first = model.generate(input_ids=prompt, **options)
    longer, options["apar"] = first.sequences, AparConfig(fork_bias=float("-inf"))
    expected = model.generate(input_ids=longer, **options)
    for name in ("past_key_values", releases.GENERATE_CACHE):
        again = model.generate(input_ids=longer, **{name: first["past_key_values"]}, **options)
        assert again.sequences.tolist() == expected.sequences.tolist()
        assert again.cache is again.past_key_values is again["past_key_values"]
