"""From a ShareGPT file to a model that forks, on tiny bases like those of the field: what a user does, in that order.

A *Vicuna-like* one (the paper's own set-up): an untied Llama, a sentencepiece tokenizer with a dummy prefix, a generation
config that transformers would not save, USER and ASSISTANT in the prompt. A Qwen3-like one: tied, a template with thoughts.
A Gemma-like one: a template that refuses systems, and a turn that ends with another token than the generation config knows.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from field_tokenizers import byte_level, gemma, llama_normalizer
from hf_apar import AparModelForCausalLM, check_model
from hf_apar.checkpoints.export import save_merged
from hf_apar.data.convert import extract_file
from hf_apar.training.tuning import Selection
from tuned import train, train_medusa

torch.set_num_threads(1)

TREES = ("Oak", "Ash", "Elm", "Fir", "Yew")
KINDS = ("tall", "old", "rare", "wet", "green", "hard", "black")
PART = r"\d\. \*\*[^*]*\w[^*]*\*\*: .*\w.*"  # a tiny model may misspell words that it puts together anew
PLAIN = "It depends on you."


def listed(number):
    """Return the answer of that number; no two of thirty-five in a row are the same."""
    parts = [
        f"{k}. **{TREES[(number + k) % 5]}**: it is very {KINDS[(number + 3 * k) % 7]} in these parts." for k in (1, 2, 3)
    ]
    return "Here are three:\n\n" + "\n".join(parts)


SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def vicuna():
    tokenizer = llama_normalizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, initializer_range=0.2, **SIZES
    )
    published = {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(config), tokenizer, published


def qwen3():
    tokenizer = byte_level()
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    config = Qwen3Config(
        vocab_size=512, head_dim=12, tie_word_embeddings=True, bos_token_id=None, eos_token_id=ends[0],
        initializer_range=0.2, **SIZES,
    )  # fmt: skip
    published = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": ends}
    return Qwen3ForCausalLM(config), tokenizer, published


def gemma3():
    tokenizer = gemma()
    end = tokenizer.convert_tokens_to_ids("<eos>")
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), head_dim=12, sliding_window=512, pad_token_id=0, eos_token_id=end, bos_token_id=2,
        query_pre_attn_scalar=12, initializer_range=0.2, **SIZES,
    )  # fmt: skip
    return Gemma3ForCausalLM(config), tokenizer, {"eos_token_id": end, "pad_token_id": 0, "bos_token_id": 2}


BASES = {"vicuna": vicuna, "qwen3": qwen3, "gemma": gemma3}
OPTIONS = {"rank": 8, "learning_rate": 2e-2, "token_rate": 2.0, "max_length": 256, "max_steps": 150, "batch_size": 2}


def share_gpt():
    """Chats as ShareGPT is published: among those of one turn some that are odd, and some that nobody can use."""

    def chat(*turns, **fields):
        return {"id": str(len(turns)), "conversations": [{"from": who, "value": text} for who, text in turns], **fields}

    asked = [(f"Which trees, {number}?", listed(number)) for number in range(33)] + [(f"And {n}?", PLAIN) for n in range(24)]
    clean = [chat(("human", prompt), ("gpt", answer)) for prompt, answer in asked]
    odd = [
        chat(("gpt", "Welcome back."), ("human", "Which trees, 40?"), ("gpt", listed(33)), ("human", "Thanks!")),
        chat(("human", "Which"), ("human", "trees, 41?"), ("gpt", listed(34)), system="You know trees."),
    ]
    useless = [
        chat(), chat(("human", "Hi"), ("gpt", None)), chat(("human", "Hi"), ("gpt", "One."), ("gpt", "Two.")), {"id": "x"},
    ]  # fmt: skip
    return [*clean[:30], *odd, *useless, *clean[30:]]


@pytest.fixture(scope="module", params=BASES)
def made(request, tmp_path_factory):
    """A folder with ``base``, ``adapter`` and ``merged``, and the metrics of the training."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model, tokenizer, published = BASES[request.param]()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "base" / "generation_config.json").write_text(json.dumps(published))
    check_model(AutoModelForCausalLM.from_pretrained(folder / "base"), AutoTokenizer.from_pretrained(folder / "base"))
    (folder / "sharegpt.json").write_text(json.dumps(share_gpt(), indent=2), encoding="utf-8")
    report = extract_file(folder / "sharegpt.json", folder / "answers.jsonl")
    assert (report.answers, report.structured, report.rejected.total()) == (57 + 2, 33 + 2, 4)
    selection = Selection(held_out=0.2, unforked_share=0.5)
    metrics = train(folder / "answers.jsonl", folder / "adapter", selection, model=str(folder / "base"), **OPTIONS)
    save_merged(AparModelForCausalLM.from_pretrained(folder / "adapter"), tokenizer_of(folder), folder / "merged")
    return folder, metrics


def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(folder / "adapter")


def test_it_forks_on_held_out_records(made):
    """No answer stands twice, so that none of the held-out ones can be known by heart."""
    assert len({listed(number) for number in range(35)}) == 35
    _, metrics = made
    assert metrics["eval_fork_recall"] >= 0.9 and metrics["eval_fork_precision"] >= 0.9


ELSEWHERE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import hf_apar
for folder, kind in zip(sys.argv[1::2], sys.argv[2::2]):
    loader = hf_apar.AparModelForCausalLM if kind == "apar" else AutoModelForCausalLM
    model, tokenizer = loader.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    for prompt in ("Which trees, 98?", "Which trees, 77?", "And 99?"):
        ids = torch.tensor([hf_apar.encode_chat(tokenizer, [{"role": "user", "content": prompt}])])
        options = {"do_sample": False, "max_new_tokens": 120, "return_dict_in_generate": True}
        out = model.generate(ids, **options, **({"apar": True} if kind == "apar" else {}))
        new = out.sequences[0, ids.shape[1]:]
        text = tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        threads, steps = (len(out.trees[0].threads), out.stats[0].steps) if kind == "apar" else (1, len(new))
        print(json.dumps([kind, prompt, text, threads, steps]))
"""


def test_another_process_in_another_folder_loads_it_and_it_forks_and_decodes_plainly(made, tmp_path):
    folder, _ = made
    asked = [str(folder / "adapter"), "apar", str(folder / "merged"), "apar", str(folder / "merged"), "plain"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", ELSEWHERE, *asked]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 9
    steps = {"apar": [], "plain": []}
    for kind, prompt, text, threads, count in found:
        if prompt.startswith("And"):
            assert (text, threads) == (PLAIN, 1), (kind, prompt)
            continue
        lead, empty, *parts = text.split("\n")
        assert (lead, empty, len(parts)) == ("Here are three:", "", 3), (kind, prompt, text)
        assert all(re.fullmatch(PART, part) for part in parts), (kind, prompt, text)
        assert threads == (4 if kind == "apar" else 1)
        steps[kind].append(count)
    assert max(steps["apar"]) < 0.8 * min(steps["plain"]), "threads save steps"


def test_its_generation_config_ends_samples_and_suppresses_as_it_should(made):
    folder, _ = made
    tokenizer = tokenizer_of(folder)
    for name in ("adapter", "merged"):
        written = json.loads((folder / name / "generation_config.json").read_text())
        ends = written["eos_token_id"]
        assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
        assert written["suppress_tokens"] == tokenizer.convert_tokens_to_ids(["[Fork]", "[Child]"])
        published = json.loads((folder / "base" / "generation_config.json").read_text())
        sampling = {setting: published[setting] for setting in ("temperature", "top_p") if setting in published}
        assert {setting: written.get(setting) for setting in sampling} == sampling
        assert written.get("do_sample", False) is bool(sampling)


def test_its_heads_train(made, tmp_path):
    folder, _ = made
    model, tokenizer = AparModelForCausalLM.from_pretrained(folder / "adapter"), tokenizer_of(folder)
    options = {"length": 2, "inner_size": 32, "draft_vocabulary": 64, "learning_rate": 1e-2, "max_length": 256, "places": 64}
    first, later = (
        train_medusa(model, tokenizer, folder / "answers.jsonl", tmp_path, max_steps=steps, **options) for steps in (1, 50)
    )
    assert later["eval_loss"] < first["eval_loss"] and later["eval_accepted"] > first["eval_accepted"]
    assert later["eval_accepted"] > 0.5


def test_what_a_strict_template_refuses_is_set_aside_with_the_reason(made):
    folder, _ = made
    file = folder / "adapter" / "rejected.jsonl"
    refused = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    expected = [(True, 32)] if "gemma" in folder.name else []
    assert [("System role" in one["reason"], one["line"]) for one in refused] == expected
