"""One GPU in at most eight minutes: is it exact there, how fast is it, and what does a step wait for?

Each part has a budget of seconds and fails for itself; what was found stands in ``OUT/gpu.json`` and ``OUT/gpu.md`` after every
part, so that a run that is cut keeps it. It needs torch, transformers and this package alone. Without the default model's
packages and without ``--model`` it takes random weights of that shape, whose forks are forced: then times mean something, texts
do not.

    python benchmarks/gpu.py --out build/bench                     # on the GPU
    python benchmarks/gpu.py --out build/gpu --dry-run             # all parts on a CPU, with a tiny model: does it run?
"""

import argparse
import json
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, StaticCache

import hf_apar
from hf_apar.errors import AparError
from hf_apar.evaluation.machine import processor
from hf_apar.protocol import ControlTokens
from hf_apar.speculation.medusa import MedusaDrafts, MedusaHeads
from hf_apar.training.rows.collator import DataCollatorForApar, path_rows
from hf_apar.training.rows.features import TreeFeatures

QUESTIONS = (
    "Give me five practical ideas for saving water at home.", "What are the main benefits of reading books?",
    "What should I pack for a weekend in the mountains?", "How can I become better at public speaking?",
    "What are the effects of stress on the body?", "How should a small shop attract customers?",
    "Which habits help people to sleep better?", "Name six sights of Rome and say why each is worth a visit.",
)  # fmt: skip
SHAPE = {
    "vocab_size": 49154, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
TINY = SHAPE | {"vocab_size": 130, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}


@dataclass
class Bench:
    """What all parts need, and what they found: tables by title, each a list of columns and rows."""

    options: argparse.Namespace
    device: torch.device
    tables: dict[str, tuple[list[str], list[list[str]]]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    ends: float = 0.0  # when the part that runs should be over
    weights: str = ""  # what the figures are of

    @property
    def dry(self) -> bool:
        return bool(self.options.dry_run)

    def table(self, title: str, *columns: str) -> Callable[..., None]:
        """Begin a table; return what adds a row to it."""
        rows: list[list[str]] = []
        self.tables[title] = (list(columns), rows)

        def add(*cells: object) -> None:
            rows.append([f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells])
            print(title, "|", *rows[-1], flush=True)
            self.write()

        return add

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.ends

    @property
    def machine(self) -> str:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else processor()
        return f"{name}, PyTorch {torch.__version__}, transformers {transformers.__version__}"

    def write(self) -> None:
        lines = ["# On a GPU", "", f"{self.machine}. {self.weights}"]
        for title, (columns, rows) in self.tables.items():
            lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", *(f"- {part}: {note}" for part, note in self.notes.items())]
        self.options.out.mkdir(parents=True, exist_ok=True)
        (self.options.out / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        found = {"machine": self.machine, "weights": self.weights, "tables": self.tables, "notes": self.notes}
        (self.options.out / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--out", type=Path, required=True, help="folder of gpu.md and gpu.json")
    options.add_argument("--model", type=Path, help="folder of a whole checkpoint with control tokens, its heads in it")
    options.add_argument("--seconds", type=float, default=480, help="for all parts together")
    options.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    options.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    options = options.parse_args()
    cuda = torch.cuda.is_available() and not options.dry_run
    if not cuda and not options.dry_run:
        raise SystemExit("there is no GPU; --dry-run tries all parts on the CPU with a tiny model")
    bench = Bench(options, torch.device("cuda" if cuda else "cpu"))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    start = time.perf_counter()
    for name in options.parts:
        part, budget = PARTS[name]
        began, left = time.perf_counter(), options.seconds - (time.perf_counter() - start)
        if left < 10:
            bench.notes[name] = "not run: no time left"
            continue
        bench.ends = began + min(budget, left)
        try:
            part(bench)
            bench.notes[name] = f"{time.perf_counter() - began:.0f} s" + (", cut short" if bench.late else "")
        except Exception as error:  # the other parts shall run
            traceback.print_exc()
            bench.notes[name] = f"failed: {type(error).__name__}: {str(error)[:200]}"
        bench.write()
        if cuda:
            torch.cuda.empty_cache()


def loaded(bench: Bench, dtype: torch.dtype, **options):
    """The model, its tokenizer if it has one, and its heads."""
    if bench.options.model:
        bench.weights = f"Weights of {bench.options.model.name}."
        model = AutoModelForCausalLM.from_pretrained(bench.options.model, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(bench.options.model)
        return hf_apar.enable_apar(model).to(bench.device).eval(), tokenizer, MedusaHeads.load(bench.options.model)
    try:
        if not bench.dry:
            model, tokenizer = hf_apar.load_default_model(dtype=dtype, **options)
            bench.weights = "The default model."
            return model.to(bench.device), tokenizer, hf_apar.load_default_heads()
    except AparError as error:
        print(error)
    bench.weights = "Random weights; forks are forced."
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**(TINY if bench.dry else SHAPE), eos_token_id=None, pad_token_id=0), **options)
    size = model.config.vocab_size
    model.generation_config.apar_config = {"fork_token_id": size - 2, "child_token_id": size - 1, "max_depth": 2}
    heads = MedusaHeads(model.config.hidden_size, 64, torch.arange(min(4096, size - 2)), 3)
    return hf_apar.enable_apar(model.to(bench.device, dtype).eval()), None, heads


def prompts(bench, model, tokenizer, number):
    if tokenizer is None:
        ids = torch.randint(3, model.config.vocab_size - 2, (number, 48), generator=torch.Generator().manual_seed(1))
        return {"input_ids": ids.to(bench.device), "attention_mask": torch.ones_like(ids).to(bench.device)}
    tokenizer.padding_side = "left"
    asked = [QUESTIONS[index % len(QUESTIONS)] for index in range(number)]
    ids = [hf_apar.encode_chat(tokenizer, [{"role": "user", "content": question}]) for question in asked]
    return tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(bench.device)


def apar_of(tokenizer, **settings):
    """Settings under which answers fork whatever the weights are."""
    return hf_apar.AparConfig(max_threads=8, fork_bias=0.0 if tokenizer is not None else 2.0, **settings)


def timed(bench, call):
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.no_grad()
def exactness(bench: Bench) -> None:
    """Each sampled token against what the model, uncached, says after the whole path alone."""
    add = bench.table(
        "Exactness", "dtype", "drafts", "answers", "threads", "tokens", "not the path's own choice", "largest gap of logits"
    )
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer, heads = loaded(bench, dtype)
        inputs = prompts(bench, model, tokenizer, 2 if bench.dry else 4)
        for drafts, proposer in (("none", None), ("heads", MedusaDrafts(heads))):
            if bench.late:
                return
            apar = apar_of(tokenizer)
            out = model.generate(
                **inputs, apar=apar, proposer=proposer, do_sample=False, repetition_penalty=1.0,
                max_new_tokens=24 if bench.dry else 160, return_dict_in_generate=True,
            )  # fmt: skip
            rules = ControlTokens.of(hf_apar.AparConfig(**model.generation_config.apar_config | {"fork_bias": apar.fork_bias}))
            gaps = [gap for tree in out.trees for thread in tree.threads for gap in gaps_of(bench, model, rules, thread)]
            threads, wrong = sum(len(tree.threads) for tree in out.trees), sum(gap > 0 for gap in gaps)
            add(str(dtype)[6:], drafts, len(out.trees), threads, len(gaps), wrong, max(gaps))


def gaps_of(bench, model, rules, thread):
    """How far the logit of each token that ``thread`` sampled lies below the largest one, by the path alone; 0 if it is that."""
    ids = thread.path_ids + ([] if thread.eos_token_id is None else [thread.eos_token_id])
    logits = model(input_ids=torch.tensor([ids], device=bench.device)).logits[0].float()
    logits[:, rules.fork_token_id] += rules.fork_bias
    gaps = []
    for place in range(max(thread.start, 1), len(ids)):
        if place in thread.injected:
            continue
        scores = logits[place - 1].clone()
        scores[list(rules.banned(thread, ids[place - 1]))] = -torch.inf
        gaps.append(float(scores.max() - scores[ids[place]]))
    return gaps


def rates(bench: Bench) -> None:
    """Tokens a second by batch, and the most memory beyond the model's."""
    add = bench.table("Tokens a second", "batch", "way", "tokens", "seconds", "tokens a second", "peak memory, MB")
    model, tokenizer, heads = loaded(bench, torch.bfloat16)
    limit = 16 if bench.dry else 192
    for batch in (1, 2) if bench.dry else (1, 8, 32):
        inputs = prompts(bench, model, tokenizer, batch)
        ways = {
            "generate": {},
            "generate, static cache, compiled": {"cache_implementation": "static"},
            "APAR": {"apar": apar_of(tokenizer)},
            "APAR, Medusa heads": {"apar": apar_of(tokenizer), "proposer": MedusaDrafts(heads)},
        }
        for way in sorted(ways, key=lambda way: "compiled" in way):  # what compiles comes last
            if bench.late:
                return
            call = lambda tokens, options=ways[way], inputs=inputs: model.generate(  # noqa: E731
                **inputs, **options, do_sample=False, max_new_tokens=tokens, return_dict_in_generate=True
            )
            for _ in range(2 if "compiled" in way else 1):
                call(limit if "compiled" in way else 8)  # its graph is made for one length
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            seconds, out = timed(bench, lambda call=call: call(limit))
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if bench.device.type == "cuda" else 0.0
            new = out.sequences[:, inputs["input_ids"].shape[1] :]
            tokens = int((new != (model.generation_config.pad_token_id or 0)).sum())
            add(batch, way, tokens, seconds, tokens / seconds, peak)


@torch.no_grad()
def steps(bench: Bench) -> None:
    """A step of so many tokens over a static cache, run as it is and as a CUDA graph: what launching its kernels costs."""
    add = bench.table("A step by its width", "context", "tokens a step", "eager, ms", "CUDA graph, ms", "eager / graph")
    model, _, _ = loaded(bench, torch.bfloat16)
    for context in (64,) if bench.dry else (256, 2048):
        for width in (1, 4) if bench.dry else (1, 8, 32, 64, 128):
            if bench.late:
                return
            cache = StaticCache(model.config, max_cache_len=context + width)
            device = bench.device
            mask = torch.zeros(1, 1, width, context + width, dtype=model.dtype, device=device)
            step = {
                "input_ids": torch.zeros(1, width, dtype=torch.long, device=device),
                "position_ids": torch.full((1, width), context, device=device),
                "attention_mask": mask,
                "past_key_values": cache,
            }

            def run(step=step, cache=cache):
                cache.reset()  # the same slots each time
                return model(**step).logits

            eager = [1000 * timed(bench, run)[0] for _ in range(5 if bench.dry else 25)][3:]
            graphed = [float("nan")]
            if device.type == "cuda":
                graphed = graph_times(bench, run)
            one, other = statistics.median(eager), statistics.median(graphed)
            add(context, width, one, other, one / other)


def graph_times(bench, run):
    """Milliseconds of each replay of ``run`` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return [1000 * timed(bench, graph.replay)[0] for _ in range(25)][3:]


def waits(bench: Bench) -> None:
    """How often a step waits for the GPU, and how its time is shared: the loop against the model's own call."""
    add = bench.table("Host and GPU in a step", "threads", "steps", "waits for the GPU a step", "a step, ms", "of it in the model's call")
    model, tokenizer, _ = loaded(bench, torch.bfloat16)
    inputs = prompts(bench, model, tokenizer, 1)
    for threads in (1, 4) if bench.dry else (1, 8, 32):
        if bench.late:
            return
        apar = hf_apar.AparConfig(max_threads=threads, max_depth=2 if threads > 1 else 1, fork_bias=1e4)
        call = lambda tokens, apar=apar: model.generate(  # noqa: E731
            **inputs, apar=apar, do_sample=False, eos_token_id=None, max_new_tokens=tokens, return_dict_in_generate=True
        )
        call(8)
        spent, began = [], [0.0]
        hooks = [
            model.register_forward_pre_hook(lambda *_, began=began: began.__setitem__(0, time.perf_counter())),
            model.register_forward_hook(lambda *_, began=began, spent=spent: spent.append(time.perf_counter() - began[0])),
        ]
        tokens = threads * (threads + (4 if bench.dry else 24))
        seconds, out = timed(bench, lambda call=call, tokens=tokens: call(tokens))
        for hook in hooks:
            hook.remove()
        count = out.stats[0].steps
        add(threads, count, synchronisations(bench, lambda call=call, tokens=tokens: call(tokens)) / count,
            1000 * seconds / count, sum(spent) / seconds)  # fmt: skip


def synchronisations(bench, call):
    """How often ``call`` waits for the GPU."""
    if bench.device.type != "cuda":
        return float("nan")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def training(bench: Bench) -> None:
    """Forward and backward of all weights, on packed trees with flex attention and on the same trees' paths in a batch."""
    add = bench.table("A training step", "threads a tree", "rows", "way", "ms", "paths / it", "peak memory, MB")
    for threads in (2, 4) if bench.dry else (2, 8, 16):
        row = synthetic(threads, 64 if bench.dry else SHAPE["vocab_size"] - 2)
        rows, times = 1 if bench.dry else 8, {}
        # a batch of paths first: what the other is compared with
        for way, mode, attention in (("paths, sdpa", "paths", "sdpa"), ("packed, sdpa", "dense", "sdpa"), ("packed, flex", "flex", "flex_attention")):
            if bench.late or (mode == "flex" and bench.dry):  # on a CPU flex attention has no backward pass
                continue
            model, _, _ = loaded(bench, torch.bfloat16, attn_implementation=attention)
            model.train()
            features = path_rows(row.to_dict()) if mode == "paths" else [row.to_dict()]
            collator = DataCollatorForApar(0, mode=mode) if mode != "dense" else DataCollatorForApar(0, mode=mode, dtype=model.dtype)
            batch = collator(features * rows)
            batch = {name: value.to(bench.device) for name, value in batch.items()}

            def step(model=model, batch=batch):
                model(**batch, use_cache=False).loss.backward()
                model.zero_grad(set_to_none=True)

            for _ in range(2):
                step()
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times[way] = statistics.median(1000 * timed(bench, step)[0] for _ in range(2 if bench.dry else 7))
            peak = torch.cuda.max_memory_allocated() / 2**20 if bench.device.type == "cuda" else 0.0
            add(threads, rows, way, times[way], times["paths, sdpa"] / times[way], peak)
            del model


def synthetic(threads, vocabulary, prompt=60, title=8, detail=48):
    """A tree of that many threads, the root among them: a prompt, then titles with a detail after each but the last."""
    row, draw = TreeFeatures(), torch.Generator().manual_seed(0)
    total, depth = prompt + (threads - 1) * (title + 1 + detail + 1) + title, 0

    def append(count, position, until):
        row.input_ids.extend(torch.randint(3, vocabulary, (count,), generator=draw).tolist())
        row.position_ids.extend(range(position, position + count))
        row.visible_until.extend([until] * count)

    append(prompt, 0, total)
    depth = prompt
    for _ in range(threads - 1):
        append(title + 1, depth, total)  # the title, and what forks
        depth += title + 1
        append(detail + 1, depth, len(row) + detail + 1)
    append(title, depth, total)
    row.shift_labels.extend([*row.input_ids[1:], -100])
    return row


PARTS: dict[str, tuple[Callable[[Bench], None], float]] = {
    "exactness": (exactness, 90), "waits": (waits, 60), "steps": (steps, 60), "rates": (rates, 180), "training": (training, 120),
}  # fmt: skip

if __name__ == "__main__":
    main()
