"""Draws what the mask and the cache of a real answer look like, for docs/how-it-works.md: docs/mask.svg and docs/cache.svg.

The default model answers; its threads then write the same tokens again through `GrowingTree`, which tells the slots.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import hf_apar
from hf_apar.protocol import ControlTokens
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import Thread

DOCS = Path(__file__).parents[1] / "docs"
QUESTION = "Give me three practical ideas for saving water at home."
PROMPT = "#8b949e"
THREADS = ("#3b82c4", "#e5832d", "#4fa152", "#d4567a", "#9a6fc9", "#2aa3a3", "#b8912f", "#a0674b")
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #24292f }
.line { stroke: #57606a; fill: none }
@media (prefers-color-scheme: dark) { text { fill: #d0d7de } .line { stroke: #9ea7b3 } }
</style>"""
WIDTH, LEFT, TOP, SIDE = 760, 44, 30, 480  # of a drawing, of what stands beside its square, and of that


@dataclass
class Replayed:
    """An answer that was written again.

    Attributes:
        row: the finished tree.
        held: (slot, first step, step after the last, who wrote it; -1 for the prompt) of each stretch in which a slot was held.
        steps: forward passes, the prompt's included.
        peak: the most slots that were held or lay below a held one.
    """

    row: GrowingTree
    held: list[tuple[int, int, int, int]] = field(default_factory=list)
    steps: int = 0
    peak: int = 0


def replay(threads: Sequence[Thread], prompt: Sequence[int], protocol: ControlTokens) -> Replayed:
    """Let the threads of a finished answer write the same tokens again."""
    left = {thread.index: iter(thread.sampled_ids) for thread in threads}
    done = Replayed(row := GrowingTree(prompt, protocol, max_threads=32))
    owners = {slot: (0, -1) for slot in row.slots(row.live[0])}  # by slot that is held: since which step, and whose it is
    while row.unfinished:
        fed = row.feed()
        for thread, count in fed if done.steps else ():
            owners.update({slot: (done.steps, thread.index) for slot in row.slots(thread)[-count:]})
        done.peak = max(done.peak, row.pool.high_water)
        for thread, _ in fed:
            if (token := next(left[thread.index], None)) is None:
                row.end(thread, "length")
            else:
                row.write(thread, token)
        done.steps += 1
        kept = {slot for thread in (*row.live, *row.waiting) for slot in row.slots(thread)}
        for slot in [slot for slot in owners if slot not in kept]:
            since, owner = owners.pop(slot)
            done.held.append((slot, since, done.steps, owner))
    return done


def colour(owner: int) -> str:
    return PROMPT if owner < 0 else THREADS[owner % len(THREADS)]


def tokens_by_thread(row: GrowingTree) -> list[tuple[int, list[int]]]:
    """Return, for each thread, the numbers of the tokens that it sees at its end; tokens are numbered thread after thread."""
    numbers: dict[int, list[int]] = {}
    count = 0
    for thread in row.threads:
        parent = None if thread.parent is None else row.threads[thread.parent]
        shared = 0 if parent is None else thread.start - 1  # all that it was given but [Child]
        own = range(count, count + len(thread.path_ids) - shared)
        numbers[thread.index] = [*(numbers[parent.index][:shared] if parent else ()), *own]
        count = own.stop
    return list(numbers.items())


def stretches(numbers: Sequence[int]) -> Iterator[range]:
    """Cut increasing ``numbers`` into stretches without a gap."""
    first = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield range(numbers[first], numbers[place - 1] + 1)
            first = place


def svg(title: str, height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">'
    return "\n".join([head, f"<title>{title}</title>", STYLE, *parts, "</svg>", ""])


def legend(row: GrowingTree, notes: Sequence[str]) -> Iterator[str]:
    names = ["prompt", "thread 0, the outline", *(f"thread {thread.index}" for thread in row.threads[1:])]
    x = LEFT + SIDE + 24
    for place, name in enumerate(names):
        yield f'<rect x="{x}" y="{TOP + 22 * place}" width="12" height="12" fill="{colour(place - 1)}"/>'
        yield f'<text x="{x + 20}" y="{TOP + 11 + 22 * place}">{name}</text>'
    for place, note in enumerate(notes):
        yield f'<text x="{x}" y="{TOP + 22 * len(names) + 24 + 19 * place}">{note}</text>'


def frame(across: str, down: str) -> Iterator[str]:
    yield f'<rect class="line" x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}"/>'
    yield f'<text x="{LEFT}" y="{TOP - 10}">{across}</text>'
    yield f'<text transform="translate({LEFT - 12} {TOP + SIDE}) rotate(-90)">{down}</text>'


def mask(done: Replayed) -> str:
    """Draw who sees whom: a row is a token, a column one that it may see; both stand thread by thread."""
    row = done.row
    seen = tokens_by_thread(row)
    owner = {number: thread for thread, numbers in reversed(seen) for number in numbers}
    owner |= {number: -1 for number in range(row.prompt_length)}
    unit = SIDE / len(owner)
    strokes: dict[int, list[str]] = {}
    for thread, numbers in seen:
        for place, number in enumerate(numbers):
            if owner[number] not in (thread, -1) or (owner[number] == -1 and thread):
                continue  # another thread's row
            for stretch in stretches(numbers[: place + 1]):
                for whose in sorted({owner[one] for one in stretch}):
                    part = [one for one in stretch if owner[one] == whose]
                    strokes.setdefault(whose, []).append(f"M{part[0]} {number}.5h{len(part)}")
    paths = [
        f'<path d="{"".join(strokes[whose])}" stroke="{colour(whose)}" stroke-width="1.3"/>' for whose in sorted(strokes)
    ]
    area = f'<g transform="translate({LEFT} {TOP}) scale({unit:.4f})">{"".join(paths)}</g>'
    notes = [f"{len(owner)} tokens", "A thread sees the prompt,", "what its parent wrote before", "the fork, and itself."]
    parts = [area, *frame("the tokens that it may see", "each token, thread by thread"), *legend(row, notes)]
    return svg("The mask of one answer", TOP + SIDE + 16, parts)


def cache(done: Replayed, sequential: int) -> str:
    """Draw which slots are held in which step, in the colour of who wrote them."""
    wide, high = SIDE / done.steps, SIDE / done.peak
    paths = []
    for owner in sorted({owner for *_, owner in done.held}):
        stretches = "".join(f"M{since} {slot}.5H{until}" for slot, since, until, whose in done.held if whose == owner)
        paths.append(f'<path d="{stretches}" stroke="{colour(owner)}"/>')
    area = f'<g transform="translate({LEFT} {TOP}) scale({wide:.4f} {high:.4f})" shape-rendering="crispEdges">{"".join(paths)}</g>'
    notes = [
        f"{done.steps} steps, {done.peak} slots at most;", f"plain decoding: {sequential} slots.", "Where a colour ends its thread",
        "has ended, and others take", "its slots.",
    ]  # fmt: skip
    parts = [area, *frame("steps", "slots of the cache"), *legend(done.row, notes)]
    return svg("The cache while one answer is written", TOP + SIDE + 16, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--folder", type=Path, default=DOCS)
    options = parser.parse_args()
    model, tokenizer = hf_apar.load_default_model()
    prompt = hf_apar.encode_chat(tokenizer, [{"role": "user", "content": options.question}])
    given = {"input_ids": torch.tensor([prompt]), "max_new_tokens": 512, "return_dict_in_generate": True}
    out = model.generate(**given, apar=True)
    fork, child = hf_apar.AparConfig.from_dict(model.generation_config.apar_config).control_ids
    threads, stats = out.trees[0].threads, out.stats[0]
    ends = frozenset(one.eos_token_id for one in threads if one.eos_token_id is not None)
    done = replay(threads, prompt, ControlTokens(fork_token_id=fork, child_token_id=child, eos_token_ids=ends))
    assert [one.path_ids for one in done.row.threads] == [one.path_ids for one in threads]
    assert (done.steps, done.peak) == (stats.steps, stats.peak_kv), "the run was another one"
    (options.folder / "mask.svg").write_text(mask(done), encoding="utf-8")
    (options.folder / "cache.svg").write_text(cache(done, stats.kv_if_sequential), encoding="utf-8")


if __name__ == "__main__":
    main()
