"""A tiny random checkpoint that forks and ends often, and vLLM with it: `make test-vllm` runs this where vLLM is."""

import os
import sys
from copy import deepcopy
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
sys.path += [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parent)]

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from hf_apar import enable_apar
from hf_apar.checkpoints.export import save_merged
from hf_apar.speculation.medusa import HEADS_FILE, HEADS_FOLDER
from served import Server
from tiny_chat_model import tiny_chat_model

collect_ignore = ["runners.py"]  # for a process of its own


@pytest.fixture(scope="session")
def tokenizer_and_model():
    tokenizer, model = tiny_chat_model()
    model.generation_config.repetition_penalty = 1.1
    return tokenizer, model


@pytest.fixture(scope="session")
def folder(tokenizer_and_model, tmp_path_factory):
    tokenizer, model = tokenizer_and_model
    target = tmp_path_factory.mktemp("tiny") / "model"
    save_merged(model, tokenizer, target)
    (target / HEADS_FOLDER).mkdir()  # as `hf-apar merge` has them; vLLM must not take them for the model's
    save_file({"down.weight": torch.zeros(2)}, target / HEADS_FOLDER / HEADS_FILE)
    return target


@pytest.fixture(scope="session")
def plain_folder(tokenizer_and_model, tmp_path_factory):
    """The same without control tokens: what `hf-apar merge --plain` writes."""
    tokenizer, model = tokenizer_and_model
    return save_merged(model, tokenizer, tmp_path_factory.mktemp("tiny") / "plain", plain=True)


@pytest.fixture(scope="session")
def control(tokenizer_and_model):
    """The ids of [Fork] and [Child]."""
    return {tokenizer_and_model[0].vocab[name] for name in ("[Fork]", "[Child]")}


@pytest.fixture(scope="session")
def server(folder):
    """The model behind vLLM's server, hf_apar installed beside it."""
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with Server(folder, *tools, "--scheduling-policy", "priority", "--enable-prompt-embeds") as server:
        yield server


def oracle_of(model):
    """``model.generate(apar=True)`` for one prompt."""
    enable_apar(model)

    def answer(prompt_ids, **options):
        settings = {"apar": True, "max_new_tokens": 600, "return_dict_in_generate": True, "output_scores": True}
        return model.generate(torch.tensor([prompt_ids]), **settings | options).trees[0]

    return answer


@pytest.fixture(scope="session")
def oracle(tokenizer_and_model):
    """The same checkpoint in transformers."""
    return oracle_of(tokenizer_and_model[1])


@pytest.fixture(scope="session")
def lora(tokenizer_and_model, tmp_path_factory):
    """A LoRA adapter of the tiny model, in a folder, and the oracle of the two together."""
    torch.manual_seed(16)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(deepcopy(tokenizer_and_model[1]), config)
    target = tmp_path_factory.mktemp("lora")
    tuned.save_pretrained(target)
    return target, oracle_of(tuned.merge_and_unload())


@pytest.fixture(scope="session")
def prompts(tokenizer_and_model):
    tokenizer, _ = tokenizer_and_model
    texts = (
        "Why?",
        "Name three birds.",
        "x",
        "And now, at some length, please: what is a hedge for?",
        "Tell me more.",
        "é字",
    )
    return [tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n") for text in texts]
