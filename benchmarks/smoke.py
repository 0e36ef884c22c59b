"""A guard against steps that grow dearer: forwards, host syncs and copied bytes are counted, nothing is timed.

Each count has a bound; the script fails with the counts that break theirs.
"""

import sys
from collections import Counter
from unittest import mock

import torch
from common import load, parser
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

import hf_apar

COPIES = ("copy_", "cat", "clone", "index_put_", "_to_copy", "repeat", "index_select")
SYNCS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero")
CONTEXTS = (256, 1024)
NEW_TOKENS = 96


class CopiedBytes(TorchDispatchMode):
    """Sums up what operations that copy write."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in COPIES:
            written = args[2] if name == "index_put_" else result
            self.bytes += written.numel() * written.element_size()
        return result


def main() -> None:
    options = parser(__doc__).parse_args()
    model, _ = load(options.dtype)
    layer = sum(model.config.num_key_value_heads * model.config.head_dim * model.dtype.itemsize for _ in ("keys", "values"))
    slot = layer * model.config.num_hidden_layers  # bytes of one slot in the whole cache
    table = Table("what", "count", "bound", title="What a step costs, counted")
    failed = []

    def check(what, count, bound):
        table.add_row(what, f"{count:.2f}", f"{bound:.2f}")
        if count > bound:
            failed.append(what)

    for threads in (1, 8):
        copied = {}
        for context in CONTEXTS:
            steps, forwards, syncs, copied[context] = counted(model, context, threads)
            check(f"{threads} threads, context {context}: forwards a step", forwards / steps, 1)
            check(
                f"{threads} threads, context {context}: host syncs a step", syncs / steps, 1.1
            )  # transformers looks at a 2D mask once
        growth = (copied[CONTEXTS[1]] - copied[CONTEXTS[0]]) / steps / (slot * (CONTEXTS[1] - CONTEXTS[0]))
        check(f"{threads} threads: bytes copied a step, share of the cache", growth, 0.1)  # buffers double now and then
        check(f"{threads} threads: steps a token", steps / NEW_TOKENS, 1 if threads == 1 else 0.25)
    Console().print(table)
    if failed:
        sys.exit("above their bounds: " + "; ".join(failed))


def counted(model, context, threads):
    """Steps, forwards, host syncs and copied bytes of an answer whose forks are forced, its prefill left out."""
    torch.manual_seed(0)
    ids = torch.randint(1000, 20000, (1, context), device=model.device)
    once, whole = (_run(model, ids, threads, tokens) for tokens in (1, NEW_TOKENS))
    return tuple(one - other for one, other in zip(whole, once, strict=True))


def _run(model, ids, threads, tokens):
    calls = Counter()

    def noting(name, call):
        def noted(*args, **kwargs):
            calls[name] += 1
            return call(*args, **kwargs)

        return noted

    originals = {name: getattr(torch.Tensor, name) for name in SYNCS}
    patches = {name: noting("sync", original) for name, original in originals.items()}
    with mock.patch.multiple(torch.Tensor, **patches), CopiedBytes() as copied:
        hook = model.register_forward_pre_hook(lambda *_: calls.update(["forward"]))
        try:
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                apar=hf_apar.AparConfig(max_threads=threads, max_depth=2 if threads > 1 else 1, fork_bias=1e4),
                eos_token_id=None,
                do_sample=False,
                repetition_penalty=1.0,
                max_new_tokens=tokens,
                return_dict_in_generate=True,
            )
        finally:
            hook.remove()
    return out.stats[0].steps, calls["forward"], calls["sync"], copied.bytes


if __name__ == "__main__":
    main()
