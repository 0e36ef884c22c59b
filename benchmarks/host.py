"""Host work of a step: what passes between two calls of a tiny model, by the number of threads and the length of their paths."""

import statistics
import time

import torch
from common import on_the_cpu_alone, parser, publish
from transformers import LlamaConfig, LlamaForCausalLM

import hf_apar

FORK, CHILD = 62, 63
STEPS = 60  # with all threads alive


def main() -> None:
    options = parser(__doc__).parse_args()
    on_the_cpu_alone("the model's own work is to be over when it returns")
    torch.set_num_threads(1)
    model, rows, data = tiny(), [], {}
    for threads in (8, 64):
        for context in (256, 4096):
            found = [1000 * host_work(model, threads, context) for _ in range(options.repeats)]
            rows.append([str(threads), str(context), f"{min(found):.2f}"])
            data[f"{threads} threads, {context} tokens"] = found
    publish(
        "host",
        "Host work of a step",
        ["threads", "tokens of a path", "between two calls of the model, ms"],
        rows,
        "A tiny random model whose forks are forced, greedy, without drafts: the lower quartile of the steps that feed every thread, "
        f"the best of {options.repeats} runs.",
        data,
    )


def tiny():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8192}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=None, pad_token_id=0)).eval()
    model.generation_config.apar_config = {"fork_token_id": FORK, "child_token_id": CHILD}
    return hf_apar.enable_apar(model)


def host_work(model, threads, context):
    """Seconds between two forward passes that feed ``threads`` tokens each: the lower quartile of an answer's."""
    gaps, last = [], [0.0]

    def before(module, args, kwargs):
        if kwargs["input_ids"].numel() == threads:
            gaps.append(time.perf_counter() - last[0])

    def after(module, args, output):
        last[0] = time.perf_counter()

    handles = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    tokens = threads * (threads + STEPS)  # the root forks in every other step
    apar = hf_apar.AparConfig(max_threads=threads, max_depth=2, fork_bias=1e4)
    try:
        ids = torch.randint(1, FORK, (1, context), generator=torch.Generator().manual_seed(0))
        model.generate(input_ids=ids, apar=apar, do_sample=False, max_new_tokens=tokens)
    finally:
        for handle in handles:
            handle.remove()
    return statistics.quantiles(gaps, n=4)[0]


if __name__ == "__main__":
    main()
