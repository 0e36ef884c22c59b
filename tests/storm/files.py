"""Hostile checkpoints and adapters: nothing in them runs, nothing is written, and what is wrong is one sentence."""

import filecmp
import json
import pickle
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from hf_apar import AparModelForCausalLM, encode_chat
from hf_apar.checkpoints.adapters import save_adapter
from hf_apar.checkpoints.loading import load_tokenizer
from hf_apar.cli.explanations import explain
from storm.mutation import mutated
from storm.storms import Scenario, Storm
from tiny_chat_model import tiny_chat_model

WEIGHTS = "adapter_model.safetensors"


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    """Return a folder with a model, ``base``, and an adapter of it, ``adapter``."""
    home = tempfile.TemporaryDirectory()
    folder = Path(home.name)
    tokenizer, model = tiny_chat_model()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tuned.peft_config["default"].base_model_name_or_path = str(folder / "base")
    save_adapter(tuned, tokenizer, folder / "adapter")
    return home


class _Runs:
    """A pickle of it writes a file where it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.file)!r}, 'w').close()",)


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path, Path], None]:
    def changed(folder: Path, _: Path) -> None:
        file = folder / (WEIGHTS if (folder / WEIGHTS).exists() else "model.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return changed


def _json(name: str, **changes: object) -> Callable[[Path, Path], None]:
    def changed(folder: Path, _: Path) -> None:
        if (folder / name).exists():
            told = json.loads((folder / name).read_text(encoding="utf-8"))
            (folder / name).write_text(json.dumps(told | changes), encoding="utf-8")

    return changed


def _pickled(name: str, instead: str) -> Callable[[Path, Path], None]:
    def changed(folder: Path, proof: Path) -> None:
        (folder / instead).unlink(missing_ok=True)
        (folder / name).write_bytes(pickle.dumps(_Runs(proof)))

    return changed


def _link(folder: Path, _: Path) -> None:
    file = folder / "generation_config.json"
    file.unlink()
    file.symlink_to("/etc/passwd")


def _code(folder: Path, proof: Path) -> None:
    (folder / "custom.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass M: pass\n")
    _json("config.json", auto_map={"AutoConfig": "custom.M", "AutoModelForCausalLM": "custom.M"}, model_type="m")(
        folder, proof
    )
    _json("tokenizer_config.json", auto_map={"AutoTokenizer": ["custom.M", None]}, tokenizer_class="M")(folder, proof)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"open({str(proof)!r}, 'w').close()\n")


def _text(name: str, text: str) -> Callable[[Path, Path], None]:
    def changed(folder: Path, _: Path) -> None:
        if (folder / name).exists():
            (folder / name).write_text(text, encoding="utf-8")

    return changed


def _module(folder: Path, proof: Path) -> None:
    """Name a module beside the adapter as the one that PEFT is to import."""
    if not (folder / "adapter_config.json").exists():
        return
    (folder.parent / "proven.py").write_text(f"open({str(proof)!r}, 'w').close()\n")
    sys.path.insert(0, str(folder.parent))
    _json("adapter_config.json", megatron_config={}, megatron_core="proven")(folder, proof)


def _elsewhere(folder: Path, _: Path) -> None:
    """Let an index of weights name files beside the folder."""
    if (folder / "model.safetensors").exists():
        (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
        names = {name: "../other.safetensors" for name in load_file(folder.parent / "other.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _last(tensors: dict[str, torch.Tensor], value: float) -> None:
    """Put ``value`` at one place of one tensor."""
    name = max(tensors)
    tensors[name].view(-1)[-1] = value


def _first(tensors: dict[str, torch.Tensor], value: torch.Tensor | None = None) -> None:
    name = next(iter(tensors))
    tensors[name] = torch.full_like(tensors[name], float("nan")) if value is None else value


APAR = {"fork_token_id": 256, "child_token_id": 257}
ATTACKS: dict[str, Callable[[Path, Path], None]] = {
    "a pickle for weights": _pickled("adapter_model.bin", WEIGHTS),
    "a pickle for a model": _pickled("pytorch_model.bin", "model.safetensors"),
    "a pickle under a safe name": lambda folder, proof: (folder / WEIGHTS).write_bytes(pickle.dumps(_Runs(proof))),
    "code": _code, "a link": _link, "cut": lambda folder, _: (folder / WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0{"),
    "nan": _weights(_first), "shape": _weights(lambda all_of: _first(all_of, torch.zeros(3, 3))),
    "line": _weights(lambda all_of: _first(all_of, torch.zeros(3))),
    "one nan": _weights(lambda all_of: _last(all_of, float("nan"))),
    "one infinity": _weights(lambda all_of: _last(all_of, float("-inf"))),
    "none": _weights(dict.clear), "stranger": _weights(lambda all_of: all_of.update(x=torch.zeros(1))),
    "base: nowhere": _json("adapter_config.json", base_model_name_or_path="/nowhere/else"),
    "base: up": _json("adapter_config.json", base_model_name_or_path="../../etc"),
    "base: root": _json("adapter_config.json", base_model_name_or_path="/etc"),
    "base: number": _json("adapter_config.json", base_model_name_or_path=5),
    "base: null": _json("adapter_config.json", base_model_name_or_path=None),
    "peft: kind": _json("adapter_config.json", peft_type="X"), "peft: rank": _json("adapter_config.json", r="two"),
    "peft: modules": _json("adapter_config.json", target_modules=5),
    "peft: other rank": _json("adapter_config.json", r=8), "peft: bias": _json("adapter_config.json", bias="0"),
    "peft: other LoRA": _json("adapter_config.json", alora_invocation_tokens="r"),
    "peft: tokens": _json("adapter_config.json", trainable_token_indices="x"),
    "peft: megatron": _module, "peft: revision": _json("adapter_config.json", revision={"a": 1}),
    "base: address": _json("adapter_config.json", base_model_name_or_path="https://example.org/x"),
    "base: itself": _json("adapter_config.json", base_model_name_or_path="."),
    "index: up": _elsewhere,
    "config: kernel": _json("config.json", attn_implementation="somebody/kernel"),
    "config: kernel within": _json("config.json", text_config={"attn_implementation": {"": "somebody/kernel"}}),
    "config: text": _json("config.json", hidden_size="big"), "config: zero": _json("config.json", num_attention_heads=0),
    "config: kind": _json("config.json", model_type="nothing"), "config: vocab": _json("config.json", vocab_size=3),
    "config: rope": _json("config.json", rope_parameters={"rope_type": "x"}),
    "tokenizer: length": _json("tokenizer_config.json", model_max_length="many"),
    "tokenizer: lengths": _json("tokenizer_config.json", model_max_length=[512]),
    "tokenizer: class": _json("tokenizer_config.json", tokenizer_class="os.system"),
    "tokenizer: file": _json("tokenizer_config.json", tokenizer_file="/etc/passwd", vocab_file="/etc/passwd"),
    "tokenizer: empty": _text("tokenizer.json", "{}"), "tokenizer: list": _text("tokenizer.json", "[]"),
    "tokenizer: model": _text("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}}}'),
    "ids: far": _json("generation_config.json", apar_config={"fork_token_id": 10**9, "child_token_id": 10**9 + 1}),
    "ids: equal": _json("generation_config.json", apar_config={"fork_token_id": 9, "child_token_id": 9}),
    "ids: text": _json("generation_config.json", apar_config={"fork_token_id": "9", "child_token_id": None}),
    "apar: list": _json("generation_config.json", apar_config=[1, 2]),
    "apar: text": _json("generation_config.json", apar_config="yes"),
    "apar: threads": _json("generation_config.json", apar_config=APAR | {"max_threads": "all"}),
    "eos: text": _json("generation_config.json", eos_token_id="x"),
    "eos: null": _json("generation_config.json", eos_token_id=[None]),
    "pad: list": _json("generation_config.json", pad_token_id=[5]),
    "template: error": _json("tokenizer_config.json", chat_template="{{ 1 / 0 }}"),
    "template: reach": _json("tokenizer_config.json", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template: endless": _json("tokenizer_config.json", chat_template="{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
    "template: broken": _json("tokenizer_config.json", chat_template="{% for %}"),
    "no json": lambda folder, _: (folder / "adapter_config.json").write_text("{"),
    "a list": lambda folder, _: (folder / "adapter_config.json").write_text("[]"),
    "settings: no json": lambda folder, _: (folder / "generation_config.json").write_text("{"),
    "settings: a list": lambda folder, _: (folder / "generation_config.json").write_text("[]"),
}  # fmt: skip
REFUSED = ("nan", "one nan", "one infinity", "shape", "line", "peft: megatron", "config: kernel", "tokenizer: length")
EVERY = tuple({"attack": name, "which": which, "changed": None} for name in ATTACKS for which in ("adapter", "base"))


def draw(draw: random.Random) -> Scenario:
    """Return a folder one of whose files of settings has odd values."""
    which = draw.choice(("adapter", "base"))
    name = draw.choice(("adapter_config.json",) * (which == "adapter") + ("generation_config.json", "tokenizer_config.json"))
    told = json.loads((Path(_home().name) / which / name).read_text(encoding="utf-8"))
    return {"attack": name, "which": which, "changed": mutated(draw, told, draw.randint(1, 2))}


def check(attack: str, which: str, changed: Any) -> None:
    """What is loaded from the folder loads, or says in a sentence why not."""
    logging.set_verbosity_error()
    home = Path(_home().name)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder, proof = Path(place) / which, Path(place) / "proof"
        shutil.copytree(home / which, folder)
        if attack in ATTACKS:
            try:
                ATTACKS[attack](folder, proof)
            except (KeyError, FileNotFoundError):
                return  # this folder has no such file
            compared = filecmp.dircmp(home / which, folder)
            if not (compared.left_only or compared.right_only or compared.diff_files):
                return
        else:
            (folder / attack).write_text(json.dumps(changed), encoding="utf-8")
        before = sorted(file.name for file in Path(place).rglob("*") if "__pycache__" not in file.parts)
        try:
            _use(folder)
        except Exception as error:
            sentence, foreseen = explain(error)
            assert foreseen, sentence
            assert 0 < len(sentence) < 2000, "a sentence that nobody reads"
        else:
            assert attack not in REFUSED, "it was taken"
        finally:
            sys.path[:] = [one for one in sys.path if one != place]
        after = sorted(file.name for file in Path(place).rglob("*") if "__pycache__" not in file.parts)
        assert not proof.exists(), "code of the folder ran"
        assert before == after, "something was written"


def _use(folder: Path) -> None:
    model, tokenizer = AparModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    ids = encode_chat(tokenizer, [{"role": "user", "content": "Trees?"}])
    model.generate(torch.tensor([ids]), apar=True, max_new_tokens=4)


STORM = Storm("files", draw, check, share=2.0, every=EVERY)
