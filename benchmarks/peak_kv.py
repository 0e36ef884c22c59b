"""Peak KV against the threads that may write at once: answers of the default model, replayed under fewer of them.

An answer's text does not depend on ``max_threads``, so that its tree tells what fewer threads would have held, and for how many
steps. Nothing is timed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from common import Kept, encode, load, parser, publish
from questions import add_questions, asked, evenly

from hf_apar.protocol import Fork, ForkProtocol, ThreadView
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import ParagraphTree, Thread

LEAST = 5  # children


@dataclass(frozen=True)
class Held:
    """Cache slots of one layer while a forward pass runs.

    Attributes:
        slots: that some path holds.
        reach: that, and those below the highest held one; the largest is ``AparStats.peak_kv``.
    """

    slots: int
    reach: int


def kv_over_time(tree: ParagraphTree, max_threads: int | None = None) -> list[Held]:
    """Return the slots held in each step, the prefill first, without drafts.

    All threads that live write a token a step, as in the loop, on the same :class:`~hf_apar.tree.slots.SlotPool`.

    Args:
        max_threads: how many live at once, ``None`` for all of them.

    >>> root = Thread(0, None, 0, 1, [5, 6, 7], start=1, eos_token_id=0)
    >>> [held.slots for held in kv_over_time(ParagraphTree([root]))]
    [1, 2, 3]
    """
    script = _Recorded(tree)
    root = tree.threads[0]
    row = GrowingTree(root.path_ids[: root.start], script, max_threads=max_threads or len(tree.threads))
    held = []
    while row.unfinished:
        held.append(Held(row.pool.held, row.pool.high_water))
        for thread in row.live:
            script.go_on(row, thread)
    return held


class _Recorded(ForkProtocol):
    """Lets threads write what those of a finished tree wrote."""

    def __init__(self, tree: ParagraphTree) -> None:
        self.tree = tree
        self.recorded = [tree.threads[0]]  # the thread of the tree that each replayed one follows
        self.children: dict[tuple[int, int], Thread] = {}
        for child in tree.threads[1:]:
            assert child.parent is not None
            shared = _shared(child.path_ids[: child.start], tree.threads[child.parent].path_ids)
            if shared < child.start:  # else it waited until the answer was cut
                self.children[child.parent, shared] = child

    def go_on(self, row: GrowingTree, thread: Thread) -> None:
        """Let ``thread`` write its next token, and end where the recorded one was cut."""
        recorded, place = self.recorded[thread.index], len(thread.path_ids)
        if place < len(recorded.path_ids):
            row.write(thread, recorded.path_ids[place])
        elif recorded.eos_token_id is not None:
            row.write(thread, recorded.eos_token_id)
        cut = recorded.eos_token_id is None and len(thread.path_ids) >= len(recorded.path_ids)
        if cut and thread.finish_reason is None:
            row.end(thread, "length")

    def fork(self, thread: ThreadView, token: int) -> Fork | None:
        recorded, end = self.recorded[thread.index], len(thread.path_ids) + 1
        if (child := self.children.get((recorded.index, end))) is None:
            return None
        self.recorded.append(child)
        given, path = set(recorded.injected), recorded.path_ids
        fed = end
        while fed in given:
            fed += 1
        return Fork(parent=tuple(path[end:fed]), child=tuple(child.path_ids[end : child.start]))

    def ends(self, thread: ThreadView, token: int) -> bool:
        return len(thread.path_ids) == len(self.recorded[thread.index].path_ids)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(one), len(other)))


def main() -> None:
    options = parser(__doc__)
    add_questions(options)
    options.add_argument("--number", type=int, default=24, help="questions, evenly drawn; those with few children do not count")
    options.add_argument("--max-new-tokens", type=int, default=512)
    options.add_argument("--threads", type=int, nargs="*", default=[1, 2, 3, 4, 6, 8, 32])
    options = options.parse_args()
    name, questions = asked(options.questions)
    model, tokenizer = load(options.dtype)
    kept, answers = Kept("peak_kv"), []
    for question in evenly(questions, options.number):
        key = [options.dtype, options.max_new_tokens, question.key]
        answers.append(kept.of(key, lambda question=question: answer(model, tokenizer, question, options.max_new_tokens)))
    trees = [(ParagraphTree.from_dict(one["tree"]), one) for one in answers if len(one["tree"]["threads"]) > LEAST]
    if not trees:
        raise SystemExit(f"no answer has {LEAST} children or more; give more questions with --number")
    sequential = sum(one["kv_if_sequential"] for _, one in trees)
    rows = []
    for threads in options.threads:
        found = [kv_over_time(tree, threads) for tree, _ in trees]
        held, reach = (sum(max(getattr(one, what) for one in steps) for steps in found) for what in ("slots", "reach"))
        steps = sum(map(len, found))
        rows.append([str(threads), f"{held / sequential:.2f}", f"{reach / sequential:.2f}", str(steps),
                     f"{sum(one['tokens'] for _, one in trees) / steps:.2f}"])  # fmt: skip
    measured = sum(one["peak_kv"] for _, one in trees) / sequential
    publish(
        "peak_kv",
        "Peak KV, by the threads that may write at once",
        ["max_threads", "held at the peak", "reached by the loop", "steps", "tokens a step"],
        rows,
        f"Slots over those of the same text in sequence: {len(trees)} answers with {LEAST} children or more, {options.dtype}, greedy, "
        f"{options.max_new_tokens} new tokens at most, of {name}. Held: what the paths of threads that live or wait see, which is "
        f"the least that any loop can hold at that step. As measured, with 32 threads at most: {measured:.2f}.",
        [one for _, one in trees],
    )


def answer(model, tokenizer, question, limit):
    inputs = encode(tokenizer, [question.text])
    with torch.no_grad():
        out = model.generate(**inputs, apar=True, do_sample=False, max_new_tokens=limit, return_dict_in_generate=True)
    stats = out.stats[0]
    return {"tree": out.trees[0].to_dict(), "peak_kv": stats.peak_kv, "kv_if_sequential": stats.kv_if_sequential,
            "tokens": stats.tokens}  # fmt: skip


if __name__ == "__main__":
    main()
