"""What ``apar=True`` costs when nothing forks: against ``generate``, the same tokens, prefill apart from decoding."""

import torch
from common import Bars, interleaved, load, parser, publish, ratios, spread, timed, weights

import hf_apar

NO_FORK = hf_apar.AparConfig(fork_bias=float("-inf"))
NEW_TOKENS = 48


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--contexts", type=int, nargs="*", default=[64, 256, 1024, 4096])
    options = options.parse_args()
    model, _ = load(options.dtype)
    rows, data = [], {}
    for context in options.contexts:
        torch.manual_seed(context)
        ids = torch.randint(1000, 20000, (1, context), device=model.device)
        prefill, decode = {}, {}
        for name, apar in (("plain", False), ("apar", NO_FORK)):
            prefill[name] = lambda ids=ids, apar=apar: run(model, ids, apar, 1)
            decode[name] = lambda ids=ids, apar=apar: run(model, ids, apar, NEW_TOKENS)
            run(model, ids, apar, 4)
        first, whole = interleaved(prefill, options.repeats), interleaved(decode, options.repeats)
        later = {name: [one - two for one, two in zip(whole[name], first[name], strict=True)] for name in whole}
        step = [1000 * seconds / (NEW_TOKENS - 1) for seconds in later["plain"]]
        rows.append([
            str(context), spread(ratios(first, "apar", "plain")), spread(step), spread(ratios(later, "apar", "plain")),
        ])  # fmt: skip
        data[context] = {"prefill": first, "decode": later}
    publish(
        "no_fork",
        "What apar=True costs when nothing forks",
        ["context", "prefill, APAR / generate", "a step of generate, ms", "decoding, APAR / generate"],
        rows,
        f"{weights(options.dtype)}, greedy, {NEW_TOKENS} new tokens after a random prompt, [Fork] banned. Aim: at most 1.00.",
        data,
        Bars(
            "decoding, APAR / generate",
            {f"context {context}": ratios(found["decode"], "apar", "plain") for context, found in data.items()},
        ),
    )


def run(model, ids, apar, limit):
    mask = torch.ones_like(ids)
    call = lambda: model.generate(  # noqa: E731
        input_ids=ids,
        attention_mask=mask,
        apar=apar,
        do_sample=False,
        repetition_penalty=1.0,
        max_new_tokens=limit,
        eos_token_id=None,
    )
    return timed(call)[0]


if __name__ == "__main__":
    main()
