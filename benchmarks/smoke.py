"""A guard against steps that grow dearer: forwards, host syncs, copied bytes and the host's work are counted, nothing is timed.

Each count has a bound; the script fails with the counts that break theirs.
"""

import statistics
import sys
from collections import Counter
from typing import ClassVar, NamedTuple
from unittest import mock

import torch
from common import load
from host import PENALTY, SMALL, tiny, write
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

import hf_apar
from hf_apar.tree import growth

COPIES = ("copy_", "cat", "clone", "index_put_", "_to_copy", "repeat", "index_select")
SYNCS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero")
CONTEXTS = (256, 1024)
NEW_TOKENS = 96
HOST_THREADS = (1, 8, 32, 64)
HOST_CONTEXTS = (256, 4096)
GROWTH = HOST_CONTEXTS[1] - HOST_CONTEXTS[0]
VIEWS = ("view", "slice", "select", "unsqueeze", "expand", "detach", "alias", "unbind", "permute", "transpose")


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
    model, _ = load("bfloat16")
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
    model = tiny(SMALL)
    for threads in HOST_THREADS:
        short, long = (host_work(model, threads, context) for context in HOST_CONTEXTS)
        name = f"{threads} threads: host, "
        check(f"{name}operations on tensors a step", long.operations, 60)
        check(f"{name}calls of Python functions a step", long.calls, 500 + 60 * threads)
        check(f"{name}the same, {HOST_CONTEXTS[1]} tokens of path over {HOST_CONTEXTS[0]}", long.calls / short.calls, 1.02)
        check(f"{name}bytes written, a token more of each path", (long.bytes - short.bytes) / threads / GROWTH, 0.01)
        check(f"{name}ids and slots of paths read in Python, a thread", long.read / threads, 16)
    Console().print(table)
    if failed:
        sys.exit("above their bounds: " + "; ".join(failed))


class Work(NamedTuple):
    """What the host does between two calls of the model: lower quartiles of the steps that feed every thread."""

    calls: float
    operations: float
    bytes: float
    read: float


class Path(list):
    """A list that counts what of it is copied, cut out or gone through."""

    read: ClassVar[int] = 0

    def __iter__(self):
        Path.read += len(self)
        return super().__iter__()

    def __getitem__(self, place):
        found = super().__getitem__(place)
        Path.read += len(found) if isinstance(place, slice) else 1
        return found


class Operations(TorchDispatchMode):
    """Counts operations and the bytes that they write."""

    def __init__(self):
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.count += 1
        if isinstance(result, torch.Tensor) and name not in VIEWS:
            written = args[2] if name in ("index_put_", "scatter_") and isinstance(args[2], torch.Tensor) else result
            self.bytes += written.numel() * written.element_size()
        return result


def host_work(model, threads, context):
    """What is done between forward passes that feed ``threads`` tokens each, with a repetition penalty."""
    steps, now, counts = [], [], Operations()
    calls = [0]

    def note(frame, event, arg):
        calls[0] += event == "call"

    def before(module, args, kwargs):
        sys.setprofile(None)
        if now and kwargs["input_ids"].numel() == threads == now[0]:
            steps.append([calls[0], counts.count, counts.bytes, Path.read])

    def after(module, args, kwargs, output):
        now[:] = [kwargs["input_ids"].numel()]
        calls[0] = counts.count = counts.bytes = Path.read = 0
        sys.setprofile(note)

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after, with_kwargs=True)]
    try:
        with counts, mock.patch.object(growth, "list", Path, create=True):
            write(model, threads, context, PENALTY, steps=20)
    finally:
        sys.setprofile(None)
        for hook in hooks:
            hook.remove()
    return Work(*(statistics.quantiles(values, n=4)[0] for values in zip(*steps, strict=True)))  # steps without a fork


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
