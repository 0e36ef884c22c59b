"""Peak KV against the threads that may write at once: answers of the default model, replayed under fewer of them.

An answer's text does not depend on ``max_threads``, so that its tree tells what fewer threads would have held, and for how many
steps. Nothing is timed.
"""

import torch
from common import Kept, encode, load, parser, publish
from questions import add_questions, asked, evenly

from hf_apar.evaluation.kv_held import kv_over_time
from hf_apar.tree.threads import ParagraphTree

LEAST = 5  # children


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
