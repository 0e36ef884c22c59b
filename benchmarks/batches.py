"""Tokens a second for batches of questions, APAR against ``generate`` with the same weights."""

from pathlib import Path

from common import Bars, encode, interleaved, load, parser, publish, spread, timed
from questions import evenly, read


def main() -> None:
    options = parser(__doc__)
    options.add_argument("questions", type=Path, help="JSON Lines with category and turns, as FastChat's Vicuna Bench")
    options.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16])
    options.add_argument("--number", type=int, default=16, help="questions of each batch size, evenly drawn from the file")
    options.add_argument("--max-new-tokens", type=int, default=256)
    options = options.parse_args()
    questions = [question.text for question in evenly(read(options.questions), options.number)]
    model, tokenizer = load(options.dtype)
    rows, data, gains = [], {}, {}
    for size in options.batches:
        batches = [encode(tokenizer, questions[start : start + size]) for start in range(0, len(questions), size)]
        measure(model, tokenizer, batches[0], True, 8)
        runs = [
            interleaved(
                {
                    name: lambda apar=apar, inputs=inputs: measure(model, tokenizer, inputs, apar, options.max_new_tokens)
                    for name, apar in (("plain", False), ("apar", True))
                },
                options.repeats,
            )
            for inputs in batches
        ]
        gains[f"batch {size}"] = [
            speed([one]) / speed([other]) for run in runs for one, other in zip(run["apar"], run["plain"], strict=True)
        ]
        plain, apar = (speed(one for run in runs for one in run[name]) for name in ("plain", "apar"))
        rows.append([str(size), f"{plain:.1f}", f"{apar:.1f}", f"{apar / plain:.2f}", spread(gains[f"batch {size}"])])
        print(rows[-1], flush=True)
        data[size] = runs
    publish(
        "batches" if options.dtype == "bfloat16" else f"batches_{options.dtype}",
        "Batches of questions" if options.dtype == "bfloat16" else f"Batches of questions in {options.dtype}",
        ["batch", "generate, tokens/s", "APAR, tokens/s", "APAR / generate in all", "batch by batch"],
        rows,
        f"{options.dtype}, greedy, {len(questions)} questions of Vicuna Bench, {options.max_new_tokens} new tokens at most; each "
        f"batch {options.repeats} times on each side, in turn.",
        data,
        Bars("tokens a second, APAR / generate, batch by batch", gains),
    )


def measure(model, tokenizer, inputs, apar, limit):
    """The tokens of all answers, and the seconds they took."""
    seconds, out = timed(
        lambda: model.generate(**inputs, apar=apar, do_sample=False, max_new_tokens=limit, return_dict_in_generate=True)
    )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    return int((new != tokenizer.eos_token_id).sum()), seconds


def speed(runs):
    """Tokens a second of ``runs``, pairs of tokens and seconds."""
    tokens, seconds = zip(*runs, strict=True)
    return sum(tokens) / sum(seconds)


if __name__ == "__main__":
    main()
