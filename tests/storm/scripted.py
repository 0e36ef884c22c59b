"""The scripted model against the naive reference, along any forks, stops and drafts."""

import random

import torch

from reference import AtLeast, Ends, Reference, as_letters, generate, letters, paper
from scripted_model import LETTERS
from storm.storms import Scenario, Storm

RULES = {"paper": paper, "letters": letters}


def draw(draw: random.Random) -> Scenario:
    return {
        "rules": draw.choice(list(RULES)), "seed": draw.randrange(10**9),
        "lengths": [draw.randint(1, 6) for _ in range(draw.randint(1, 4))], "max_threads": draw.randint(1, 6),
        "max_depth": draw.randint(1, 4), "min_new_tokens": draw.randint(0, 3),
        "stops": ["".join(draw.choice("abcdefghij") for _ in range(draw.randint(1, 2))) for _ in range(draw.randint(0, 2))],
        "pattern": [draw.choice(("right", "wrong", "both")) for _ in range(draw.randint(0, 3))],
    }  # fmt: skip


def check(
    rules: str, seed: int, lengths: list[int], max_threads: int, max_depth: int, min_new_tokens: int, stops: list[str],
    pattern: list[str],
) -> None:  # fmt: skip
    """The answers are those of the reference, up to the stop string that reads first."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        (1 + torch.randint(len(LETTERS), (max(length, 1),), generator=generator)).tolist() for length in lengths or [1]
    ]
    reference = Reference(seed, RULES[rules](max(max_depth, 1)), min_new_tokens)
    stops = [stop for stop in stops if stop]
    out = generate(
        prompts, reference, max(max_threads, 1), [kind for kind in pattern if kind in ("right", "wrong", "both")],
        logits_processor=[AtLeast(min_new_tokens, max(map(len, prompts)))],
        stopping_criteria=[Ends(stops)] if stops else None, max_new_tokens=2000,
    )  # fmt: skip
    for prompt, tree in zip(prompts, out.trees, strict=True):
        expected = []
        for token, _, read, sampled in reference.write(prompt, prompt, 1, len(prompt)):
            expected.append(token)
            if sampled and stops and as_letters(read).endswith(tuple(stops)):
                break
        assert tree.token_ids == expected, f"{tree.token_ids} is not {expected}"


STORM = Storm("scripted", draw, check, share=1.5)
