"""What the loop adds to a step: a whole answer against the bare model calls of the same widths and lengths, replayed."""

import torch
from common import QUESTIONS, encode, interleaved, load, parser, publish, ratios, spread, timed, weights

from hf_apar.forward.attention import tree_attention_for
from hf_apar.forward.cache import TreeCache
from hf_apar.forward.layout import StepLayout
from hf_apar.releases import cache_argument


def main() -> None:
    options = parser(__doc__).parse_args()
    model, tokenizer = load(options.dtype)
    rows, data = [], {}
    for name, questions in (("1 question", QUESTIONS[1:2]), ("6 questions in a batch", QUESTIONS)):
        inputs = encode(tokenizer, questions)
        generate(model, inputs, limit=8)
        steps = recorded(model, inputs)
        found = interleaved(
            {
                "generate": lambda inputs=inputs: timed(lambda: generate(model, inputs))[0],
                "bare": lambda inputs=inputs, steps=steps: timed(lambda: replay(model, inputs, steps))[0],
            },
            options.repeats,
        )
        width = sum(step.input_ids.numel() for step in steps) / len(steps)
        rows.append(
            [name, str(len(steps)), f"{width:.1f}", spread(found["bare"]), spread(ratios(found, "generate", "bare"))]
        )
        data[name] = found
    publish(
        "loop",
        "What the loop adds to a step",
        ["answers", "steps", "tokens a step", "bare model calls, s", "generate / bare"],
        rows,
        f"{weights(options.dtype)}, greedy, no logits processors, 256 new tokens a row at most; prefill included on both sides. Aim: at most 1.05.",
        data,
    )


def generate(model, inputs, limit=256):
    options = {"do_sample": False, "repetition_penalty": 1.0, "return_dict_in_generate": True}
    return model.generate(**inputs, apar=True, max_new_tokens=limit, **options)


def recorded(model, inputs):
    """The tensors of each step of an answer."""
    steps, lay_out = [], StepLayout.lay_out

    def record(*args, **kwargs):
        steps.append(lay_out(*args, **kwargs))
        return steps[-1]

    StepLayout.lay_out = record
    try:
        generate(model, inputs)
    finally:
        StepLayout.lay_out = lay_out
    return steps


@torch.no_grad()
def replay(model, inputs, steps):
    cache = TreeCache()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    mask = None if bool(inputs["attention_mask"].all()) else inputs["attention_mask"]
    model(
        input_ids=inputs["input_ids"],
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=1,
        **{cache_argument(model): cache},
    )
    for step in steps:
        with tree_attention_for(model):
            step.run(model, cache)


if __name__ == "__main__":
    main()
