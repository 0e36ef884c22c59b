"""Host work of a step: what passes between two calls of a tiny model, by the number of threads and the length of their paths."""

import statistics
import time

import torch
from common import on_the_cpu_alone, parser, publish
from transformers import LlamaConfig, LlamaForCausalLM

import hf_apar

SMALL, WHOLE = 64, 49154  # tokens of the vocabulary; the second is the default model's
PENALTY = 1.1
DIFFERENT = 1000  # tokens that prompts are drawn from: about as many as a text of 4,096 tokens has
STEPS = 60  # with all threads alive


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--threads", type=int, nargs="*", default=[1, 8, 32, 64])
    options.add_argument("--contexts", type=int, nargs="*", default=[256, 4096])
    options = options.parse_args()
    on_the_cpu_alone("the model's own work is to be over when it returns")
    torch.set_num_threads(1)
    cases = {"alone": (tiny(SMALL), 1.0), "vocabulary": (tiny(WHOLE), 1.0), "penalty": (tiny(WHOLE), PENALTY)}
    rows, data = [], {}
    for threads in options.threads:
        for context in options.contexts:
            cells = []
            for name, (model, penalty) in cases.items():
                found = [1000 * host_work(model, threads, context, penalty) for _ in range(options.repeats)]
                cells.append(f"{min(found):.2f}")
                data[f"{name}, {threads} threads, {context} tokens"] = found
            rows.append([str(threads), str(context), *cells])
            print(rows[-1], flush=True)
    publish(
        "host",
        "Host work of a step",
        ["threads", "tokens of a path", "between two calls of the model, ms", "with a vocabulary of 49,154", "and a repetition penalty"],
        rows,
        "A tiny random model in bfloat16 whose forks are forced, greedy, without drafts: the lower quartile of the steps that feed "
        f"every thread, the best of {options.repeats} runs. The vocabulary is of {SMALL} tokens, and then the default model's: "
        "what grows with it is to make float32 of the logits and to find the largest. Prompts have up to "
        f"{DIFFERENT} different tokens, which is what a repetition penalty looks at. Aim: at most 1 ms at 8 threads and 3 at 64, "
        "whatever the length.",
        data,
    )


def tiny(vocabulary):
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8192}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=None, pad_token_id=0)).eval().bfloat16()
    model.generation_config.apar_config = {"fork_token_id": vocabulary - 2, "child_token_id": vocabulary - 1}
    return hf_apar.enable_apar(model)


def host_work(model, threads, context, penalty):
    """Seconds between two forward passes that feed ``threads`` tokens each: the lower quartile of an answer's."""
    gaps, last = [], [0.0]

    def before(module, args, kwargs):
        if kwargs["input_ids"].numel() == threads:
            gaps.append(time.perf_counter() - last[0])

    def after(module, args, output):
        last[0] = time.perf_counter()

    handles = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        write(model, threads, context, penalty, steps=STEPS)
    finally:
        for handle in handles:
            handle.remove()
    return statistics.quantiles(gaps, n=4)[0]


def write(model, threads, context, penalty, steps):
    """Let the root fork in every other step, until ``threads`` threads write, and then ``steps`` steps of all of them."""
    apar = hf_apar.AparConfig(max_threads=threads, max_depth=2 if threads > 1 else 1, fork_bias=1e4)
    ids = torch.randint(1, min(model.config.vocab_size - 2, DIFFERENT), (1, context), generator=torch.Generator().manual_seed(0))
    model.generate(
        input_ids=ids, apar=apar, do_sample=False, repetition_penalty=penalty, max_new_tokens=threads * (threads + steps)
    )


if __name__ == "__main__":
    main()
