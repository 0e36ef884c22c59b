"""Checkpoints and ``custom_generate`` repositories, as programs without hf_apar's API use them."""

import copy
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from byte_tokenizer import byte_tokenizer
from conftest import CHILD, FORK, left_padded, random_prompts, tiny_llama
from hf_apar import ConfigurationError, enable_apar, export_custom_generate
from hf_apar.checkpoints.export import save_merged
from hf_apar.checkpoints.loading import load_base

PROMPTS = left_padded(random_prompts(3, seed=7))
CONTROL = sorted([FORK, CHILD])
LIMIT = {"max_new_tokens": 80}


@pytest.fixture(scope="module")
def expected(apar_llama):
    return apar_llama.generate(**PROMPTS, apar=True, **LIMIT).tolist()


def test_a_model_that_is_not_enabled_decodes_through_the_repository(plain_llama, expected, tmp_path, capfd):
    folder = str(export_custom_generate(tmp_path / "repository"))
    got = plain_llama.generate(**PROMPTS, custom_generate=folder, trust_remote_code=True, **LIMIT)
    assert got.tolist() == expected
    narrow = {"max_threads": 1, "max_depth": 1}
    plain = plain_llama.generate(**PROMPTS, custom_generate=folder, trust_remote_code=True, apar=narrow, **LIMIT)
    assert plain.tolist() != expected
    endless = {"eos_token_id": None, "trust_remote_code": True, "custom_generate": folder}
    assert plain_llama.generate(**PROMPTS, **endless, **LIMIT).shape[1] > len(expected[0])
    assert plain_llama.generate(**PROMPTS, **endless, apar=False, **LIMIT).shape[1] == PROMPTS["input_ids"].shape[1] + 80
    with pytest.raises(ValueError, match="trust_remote_code"):
        plain_llama.generate(**PROMPTS, custom_generate=folder, trust_remote_code=False, **LIMIT)


def test_the_repository_is_laid_out_as_the_hub_expects(tmp_path):
    folder = export_custom_generate(tmp_path)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"]
    _, head, card = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "transformers", "license": "apache-2.0", "tags": ["custom_generate"]}
    assert [line[3:] for line in card.splitlines() if line.startswith("## ")] == [
        "Description", "Base model", "Model compatibility", "Additional Arguments", "Output Type changes", "Example usage",
    ]  # fmt: skip


def test_beside_a_checkpoint_it_is_the_generate_of_the_model(expected, tmp_path):
    folder = save_merged(enable_apar(tiny_llama()), byte_tokenizer(), tmp_path)
    export_custom_generate(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model.generate(**PROMPTS, **LIMIT).tolist() == expected
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.generate(**PROMPTS, **LIMIT).tolist() == model.generate(**PROMPTS, **LIMIT, apar=False).tolist() != expected


def test_a_requirement_that_is_missing_is_named(plain_llama, tmp_path):
    folder = export_custom_generate(tmp_path)
    (folder / "custom_generate" / "requirements.txt").write_text("hf_apar\nno-such-package-of-apar\n")
    with pytest.raises(ImportError, match=r"no-such-package-of-apar \(installed: None\)$"):
        plain_llama.generate(**PROMPTS, custom_generate=str(folder), trust_remote_code=True, **LIMIT)


def test_exporting_twice_is_the_same_and_overwrites_nothing_foreign(tmp_path):
    export_custom_generate(export_custom_generate(tmp_path))
    (tmp_path / "custom_generate" / "generate.py").write_text("mine")
    with pytest.raises(ConfigurationError, match="not ours"):
        export_custom_generate(tmp_path)


def test_a_merged_checkpoint_forks_with_hf_apar_and_decodes_plainly_without(expected, plain_llama, tmp_path):
    model = enable_apar(tiny_llama())
    model.generation_config.suppress_tokens = [3]
    model.generation_config.temperature = 0.5  # without do_sample it would not be saved
    config, before = model.generation_config, copy.deepcopy(vars(model.generation_config))
    folder = save_merged(model, byte_tokenizer(), tmp_path / "merged")
    assert model.generation_config is config and vars(config) == before, "the caller's model stays as it is"
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.suppress_tokens == [3, *CONTROL]
    save_merged(enable_apar(tiny_llama()), byte_tokenizer(), folder := tmp_path / "plain")
    assert list(folder.glob("*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert enable_apar(loaded).generate(**PROMPTS, apar=True, **LIMIT).tolist() == expected
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        f"ids = torch.tensor({PROMPTS['input_ids'].tolist()})\nmask = torch.tensor({PROMPTS['attention_mask'].tolist()})\n"
        "print(model.generate(ids, attention_mask=mask, max_new_tokens=80).tolist())\n"
        "assert 'hf_apar' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == str(plain_llama.generate(**PROMPTS, **LIMIT).tolist())
    with pytest.raises(ConfigurationError, match="not empty"):
        save_merged(loaded, byte_tokenizer(), folder)


def test_a_wrong_setting_in_a_checkpoint_names_the_right_ones(tmp_path):
    enable_apar(tiny_llama()).save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(file.read_text().replace('"fork_token_id"', '"max_thread": 3, "fork_token_id"'))
    with pytest.raises(ConfigurationError, match="unknown APAR setting max_thread; the settings are fork_token_id"):
        enable_apar(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def test_the_default_base_ends_and_pads_as_its_configuration_says():
    model, tokenizer = load_base()
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (model.config.eos_token_id, model.config.pad_token_id)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad({"input_ids": [[5, 6], [7]]})["input_ids"][1].count(tokenizer.pad_token_id) == 1
