"""An adapter on its way to the Hub and back: what is uploaded, what its card says, and what others load of it."""

import json
import re
import shutil

import pytest
import torch
import yaml
from typer.testing import CliRunner

from hf_apar import AparModelForCausalLM, ConfigurationError, export_adapter, load_heads
from hf_apar.checkpoints.default_model import DEFAULT_ADAPTER
from hf_apar.checkpoints.heads import find_heads
from hf_apar.checkpoints.loading import load_base, load_tokenizer
from hf_apar.cli import app
from hf_apar.errors import CheckpointError
from hf_apar.speculation.medusa import MedusaDrafts, MedusaHeads
from test_loading import CHILD, FORK, answers, into_cache, make_adapter, make_base, record

BASE = "some-org/chat-model"
MADE = {"eval_loss": 0.7654, "eval_fork_recall": 0.9876, "eval_runtime": 3.0}
FIGURES = {
    "tokens_per_step": {"low": 2.1, "value": 2.36, "high": 2.6, "n": 40},
    "ended": {"low": 0.9, "value": 1.0, "high": 1.0, "n": 40},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("models") / "chat", tied=True)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """An adapter, heads and all that a recipe leaves beside them, a checkpoint and reports with this machine's paths too."""
    folder = make_adapter(base, tmp_path_factory.mktemp("adapters") / "adapter", tied=True)
    torch.manual_seed(2)
    heads = MedusaHeads(64, 16, torch.arange(65, 97), 2)
    torch.nn.init.normal_(heads.down.weight)
    heads.save(folder)
    (folder / "metrics.json").write_text(json.dumps({"final": MADE, "steps": []}))
    prompts = f'prompts = "{base}/clients/what they ask.jsonl"\n'
    (folder / "recipe.toml").write_text(f'# Folder or Hub name\nmodel = "{base}"\n{prompts}#seed = 0\n[train]\nrank = 4\n')
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "figures.json").write_text(
        json.dumps({"made_with": {"model": str(folder)}, "figures": {"plain": {"all": {}}, "apar": {"all": FIGURES}}})
    )
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "optimizer.pt").write_bytes(b"x")
    (folder / "rejected.jsonl").write_text("{}\n")
    return folder


@pytest.fixture(scope="module")
def published(trained, tmp_path_factory):
    return export_adapter(trained, tmp_path_factory.mktemp("new") / "forks", name="some-org/forks", base=BASE, license="mit")


@pytest.fixture
def hub(base, published, tmp_path, monkeypatch):
    """A cache of the Hub with the base and what was published."""
    monkeypatch.chdir(tmp_path)
    into_cache(tmp_path / "hub", BASE, base)
    into_cache(tmp_path / "hub", "some-org/forks", published)
    return {"cache_dir": tmp_path / "hub", "local_files_only": True}


def test_what_is_uploaded_holds_nothing_of_this_machine(trained, published, base):
    names = {file.relative_to(published).as_posix() for file in published.rglob("*")}
    assert names == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "generation_config.json",
        "medusa.safetensors", "metrics.json", "recipe.toml", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for file in published.glob("*"):
        assert str(base).encode() not in file.read_bytes() and str(trained).encode() not in file.read_bytes(), file
    settings, before = (json.loads((one / "adapter_config.json").read_text()) for one in (published, trained))
    assert settings == before | {"base_model_name_or_path": BASE}
    recipes = [(one / "recipe.toml").read_text() for one in (published, trained)]
    assert recipes[0] == recipes[1].replace(f"{base}/clients/", "").replace(str(base), BASE)


def test_the_card_has_what_the_hub_reads_and_the_figures(published):
    _, head, card = (published / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": BASE, "base_model_relation": "adapter", "library_name": "peft", "license": "mit",
        "pipeline_tag": "text-generation", "tags": ["hf_apar", "lora"],
    }  # fmt: skip
    assert card.startswith(f"\n# forks\n\nA LoRA adapter of rank 4 for {BASE} that ")
    assert '--model some-org/forks "..."' in card and "medusa.safetensors" in card and "recipe.toml" in card
    assert re.findall(r"^\| (.+) \| (.+) \|$", card, re.MULTILINE) == [
        ("loss on held-out answers", "0.765"),
        ("share of the places where these fork that are found, the text forced", "0.988"),
        ("tokens per step, answers that do not end counted as 1 (of 40)", "2.36 (2.10 to 2.60)"),
        ("share of the answers that end by themselves (of 40)", "1.00 (0.90 to 1.00)"),
    ]


def test_others_load_adapter_and_tokenizer_by_its_name(hub, trained):
    model = AparModelForCausalLM.from_pretrained("some-org/forks", **hub)
    assert answers(model) == answers(AparModelForCausalLM.from_pretrained(trained))
    tokenizer = load_tokenizer("some-org/forks", **hub)
    assert tokenizer.convert_tokens_to_ids(["[Fork]", "[Child]"]) == [FORK, CHILD]


def test_heads_are_loaded_by_name_too(hub, trained, tmp_path):
    own = MedusaHeads.load(trained)
    (tmp_path / "nested" / "heads").mkdir(parents=True)
    own.save(tmp_path / "nested" / "heads")
    own.save(tmp_path / "alone")
    for name, folder in (("some-org/nested", "nested"), ("some-org/alone", "alone")):
        into_cache(tmp_path / "hub", name, tmp_path / folder)
    for name in ("some-org/forks", "some-org/nested", "some-org/alone"):
        found = load_heads(name, **hub)
        assert found.length == own.length and found.state_dict().keys() == own.state_dict().keys()
        for key, tensor in own.state_dict().items():
            assert torch.equal(found.state_dict()[key], tensor), key
    assert find_heads(BASE, **hub) is None
    with pytest.raises(ConfigurationError, match=r"some-org/chat-model has no medusa\.safetensors; give a folder"):
        load_heads(BASE, **hub)
    with pytest.raises(CheckpointError, match=r"there is no folder some-org/nowhere here.*no copy is in the cache"):
        load_heads("some-org/nowhere", **hub)


def test_the_command_line_takes_the_heads_that_lie_with_a_model_on_the_hub(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub["cache_dir"]))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(hub["cache_dir"]))
    from hf_apar.cli.answers import heads_for

    with_model, named = heads_for("some-org/forks", None), heads_for("some-org/forks", "some-org/forks")
    assert isinstance(with_model, MedusaDrafts) and isinstance(named, MedusaDrafts)
    assert torch.equal(with_model.heads.down.weight, named.heads.down.weight)
    assert heads_for(BASE, None) is None


def test_what_others_could_not_load_is_refused(trained, base, tmp_path, monkeypatch):
    for given in (None, str(base), "./elsewhere"):
        with pytest.raises(ConfigurationError, match=r"as its base, which others do not have; pass base= \(--base\)"):
            export_adapter(trained, tmp_path / "out", name="some-org/forks", base=given)
    with pytest.raises(ConfigurationError, match=r"has no adapter_config\.json"):
        export_adapter(base, tmp_path / "out", name="some-org/forks", base=BASE)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(ConfigurationError, match="is not empty"):
        export_adapter(trained, tmp_path / "full", name="some-org/forks", base=BASE)
    sequential = tmp_path / "sequential"
    shutil.copytree(trained, sequential)
    load_base(base)[0].generation_config.save_pretrained(sequential)
    with pytest.raises(ConfigurationError, match="does not fork"):
        export_adapter(sequential, tmp_path / "out", name="some-org/forks", base=BASE)


def test_a_card_of_ones_own_and_a_recorded_name_are_kept(trained, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(trained, copied)
    record(copied, base_model_name_or_path=BASE)
    (copied / "README.md").write_text("mine")
    folder = export_adapter(copied, tmp_path / "out", name="some-org/forks")
    assert (folder / "README.md").read_text() == "mine"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE


def test_the_command_writes_the_same(trained, published, tmp_path):
    options = ("--model", str(trained), "--name", "some-org/forks", "--base", BASE, "--license", "mit")
    done = CliRunner().invoke(app, ["export", str(tmp_path / "out"), *options])
    assert done.exit_code == 0 and f"hf upload some-org/forks {tmp_path / 'out'}" in done.stdout.replace("\n", "")
    for file in published.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    refused = CliRunner().invoke(app, ["export", str(tmp_path / "other"), *options[:4]])
    assert refused.exit_code == 2 and "--base" in refused.stderr


def test_the_default_adapter_can_be_exported_as_it_ships(tmp_path):
    folder = export_adapter(DEFAULT_ADAPTER, tmp_path / "out", name="some-org/default")
    assert (folder / "README.md").read_text() == (DEFAULT_ADAPTER / "README.md").read_text()
    assert find_heads(folder) == folder / "medusa.safetensors"
