"""Tokens a second for batches of questions, APAR against ``generate`` with the same weights."""

import json
import sys
from pathlib import Path

from common import encode, interleaved, load, parser, publish, spread, timed


def main() -> None:
    options = parser(__doc__)
    options.add_argument("questions", type=Path, help="JSON Lines with category and turns, as FastChat's Vicuna Bench")
    options.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16])
    options.add_argument("--number", type=int, default=16, help="questions of each batch size, evenly drawn from the file")
    options.add_argument("--max-new-tokens", type=int, default=256)
    options = options.parse_args()
    if not options.questions.is_file():
        sys.exit(f"{options.questions} is missing: name FastChat's vicuna_bench/question.jsonl, with category and turns")
    lines = options.questions.read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["turns"][0] for line in lines if line.strip()]
    questions = questions[:: max(len(questions) // options.number, 1)][: options.number]
    model, tokenizer = load(options.dtype)
    rows, data = [], {}
    for size in options.batches:
        batches = [encode(tokenizer, questions[start : start + size]) for start in range(0, len(questions), size)]
        ways = {
            name: lambda apar=apar, batches=batches: tokens_a_second(model, tokenizer, batches, apar, options.max_new_tokens)
            for name, apar in (("plain", False), ("apar", True))
        }
        tokens_a_second(model, tokenizer, batches[:1], True, 8)
        found = interleaved(ways, options.repeats)
        gains = [one / other for one, other in zip(found["apar"], found["plain"], strict=True)]
        rows.append([str(size), spread(found["plain"]), spread(found["apar"]), spread(gains)])
        data[size] = found
    publish(
        "batches" if options.dtype == "bfloat16" else f"batches_{options.dtype}",
        "Batches of questions" if options.dtype == "bfloat16" else f"Batches of questions in {options.dtype}",
        ["batch", "generate, tokens/s", "APAR, tokens/s", "APAR / generate"],
        rows,
        f"{options.dtype}, greedy, {options.number} questions of Vicuna Bench, {options.max_new_tokens} new tokens at most.",
        data,
    )


def tokens_a_second(model, tokenizer, batches, apar, limit):
    tokens = seconds = 0.0
    for inputs in batches:
        spent, out = timed(
            lambda inputs=inputs: model.generate(
                **inputs, apar=apar, do_sample=False, max_new_tokens=limit, return_dict_in_generate=True
            )
        )
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        tokens += int((new != tokenizer.eos_token_id).sum())
        seconds += spent
    return tokens / seconds


if __name__ == "__main__":
    main()
