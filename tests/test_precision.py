"""Number formats, quantised weights, and models that are spread over devices or processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from conftest import left_padded, random_prompts, tiny_llama
from hf_apar import AparConfig, enable_apar
from test_branches import BRANCHES, all_alone, branched, written

PROMPTS = left_padded(random_prompts(4, seed=7))
NO_FORK = AparConfig(fork_bias=float("-inf"))
LIMIT = {"max_new_tokens": 120}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose layers are wide enough for blocks of quantised weights."""
    path = tmp_path_factory.mktemp("model")
    enable_apar(tiny_llama(hidden_size=64, intermediate_size=128)).save_pretrained(path)
    return path


def along_paths(model, out):
    """Yield for each thread its logits and, as the oracle, the model's own over the path alone, uncached."""
    for tree in out.trees:
        for thread in tree.threads:
            if thread.sampled_ids:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([thread.path_ids]), use_cache=False).logits[0]
                last = thread.start + len(thread.sampled_ids) - 1
                yield torch.stack(thread.logits), logits[thread.start - 1 : last].float()


def run(model, **options):
    settings = {"apar": True, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**PROMPTS, **settings | LIMIT | options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_half_precision(dtype, tolerance):
    """Cached and uncached passes round differently, so logits are close relative to their size; without forks, exact."""
    model = enable_apar(tiny_llama().to(dtype))
    out = run(model)
    assert max(len(tree.threads) for tree in out.trees) > 3
    for ours, expected in along_paths(model, out):
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()
    plain = model.generate(**PROMPTS, **LIMIT)
    assert model.generate(**PROMPTS, apar=NO_FORK, **LIMIT).tolist() == plain.tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights(folder, bits):
    """4-bit weights are exact in any batch; 8-bit quantises activations by batch, so only logits are close."""
    settings = {"load_in_4bit": True} if bits == 4 else {"load_in_8bit": True}
    quantised = LlamaForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**settings))
    assert any(f"{bits}bit" in type(layer).__name__ for layer in quantised.modules())
    model = enable_apar(quantised)
    out = run(model)
    assert max(len(tree.threads) for tree in out.trees) > 1
    for ours, expected in along_paths(model, out):
        assert (ours - expected).abs().max() <= 0.1 * expected.abs().max()
    if bits == 4:
        assert model.generate(**PROMPTS, apar=NO_FORK, **LIMIT).tolist() == model.generate(**PROMPTS, **LIMIT).tolist()


@pytest.mark.parametrize("first", ["cpu", "disk"])
def test_weights_offloaded_to_disk(folder, tmp_path, first):
    whole = run(enable_apar(LlamaForCausalLM.from_pretrained(folder)))
    places = {
        "model.embed_tokens": first, "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
        "model.rotary_emb": "cpu", "lm_head": "disk",
    }  # fmt: skip
    spread = LlamaForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert {parameter.device.type for parameter in spread.parameters()} == {"cpu", "meta"}
    assert run(enable_apar(spread)).sequences.tolist() == whole.sequences.tolist()


def test_tensor_parallel_over_two_processes(folder, tmp_path):
    expected = run(enable_apar(LlamaForCausalLM.from_pretrained(folder))).sequences.tolist()
    script = tmp_path / "parallel.py"
    script.write_text(
        "import os, torch\n"
        "from transformers import LlamaForCausalLM\n"
        "from hf_apar import enable_apar\n"
        "torch.set_num_threads(1)\n"
        f"model = LlamaForCausalLM.from_pretrained({str(folder)!r}, tp_plan='auto')\n"
        "assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 32\n"
        f"ids = torch.tensor({PROMPTS['input_ids'].tolist()})\nmask = torch.tensor({PROMPTS['attention_mask'].tolist()})\n"
        "out = enable_apar(model).generate(input_ids=ids, attention_mask=mask, apar=True, max_new_tokens=120)\n"
        f"open({str(tmp_path)!r} + f'/{{os.environ[\"RANK\"]}}', 'w').write(str(out.tolist()))\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
        f"--master-port={port}", str(script),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert Path(tmp_path / str(rank)).read_text() == str(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the CUDA path is untested without one")
def test_a_gpu_writes_what_the_cpu_writes():
    expected = run(enable_apar(tiny_llama())).sequences.tolist()
    model = enable_apar(tiny_llama()).cuda()
    assert run(model).sequences.cpu().tolist() == expected, "prompts on the CPU move to the model"
    assert model.generate(**{k: v.cuda() for k, v in PROMPTS.items()}, apar=True, **LIMIT).tolist() == expected


def test_branches_of_quantised_weights(folder):
    """4-bit weights are exact in any batch."""
    quantised = LlamaForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert any("4bit" in type(layer).__name__ for layer in quantised.modules())
    prompts = random_prompts(2, seed=1)
    assert written(branched(quantised, prompts)) == all_alone(quantised, prompts, BRANCHES, max_new_tokens=40)
