"""Each family, under any options, against the model itself, uncached, on each path alone."""

import random
from functools import cache
from typing import Any

import torch
from transformers import DynamicCache

from families import CASES, SMALL, tiny
from hf_apar import AparConfig, enable_apar
from hf_apar.protocol import ControlTokens
from hf_apar.speculation.medusa import MedusaDrafts, MedusaHeads
from oracle import CHILD, EOS, FORK, left_padded, nested, random_prompts, tiny_llama, walk
from protocols import LetterForks
from storm.storms import Scenario, Storm

CLOSE = 2e-3  # float32 logits of the same path, summed up in another order
LETTERS = LetterForks(trigger=11, opened=CHILD, closed=FORK, letter=7, end=EOS)


def draw(draw: random.Random) -> Scenario:
    family, attention = draw.choice([case for case in CASES if case[1] != "flex_attention"])
    return {
        "family": family, "attention": attention, "prompts": draw.randrange(10**6), "batch": draw.randint(1, 4),
        "max_depth": draw.randint(1, 4), "max_threads": draw.choice((1, 2, 5, 32)), "budget": draw.choice((3, 20, 60)),
        "stop": draw.choice((0, 0, draw.randint(1, 45))), "penalty": draw.random() < 0.3, "sampled": draw.random() < 0.3,
        "draft": draw.choice(("", "", "lookup", "assistant", "medusa")), "chunk": draw.choice((0, 0, 4)),
        "prefix": draw.random() < 0.2, "letters": draw.random() < 0.2,
    }  # fmt: skip


@cache
def models(family: str, attention: str) -> tuple[Any, Any]:
    return tiny(family, "eager"), enable_apar(tiny(family, attention))


def options(scenario: Scenario, enabled: Any, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return what ``generate`` is told."""
    told: dict[str, Any] = {"max_new_tokens": scenario["budget"], "do_sample": scenario["sampled"], "output_logits": True}
    told["output_scores"] = True
    if scenario["sampled"]:
        told |= {"temperature": 0.9, "top_k": 12}
    if scenario["penalty"]:
        told |= {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    if scenario["stop"]:
        told["stopping_criteria"] = [lambda ids, scores, **_: ids[:, -1] == scenario["stop"]]
    if scenario["chunk"]:
        told["prefill_chunk_size"] = scenario["chunk"]
    if scenario["draft"] == "lookup":
        told["prompt_lookup_num_tokens"] = 3
    elif scenario["draft"] == "assistant":
        told["assistant_model"] = assistant()
    elif scenario["draft"] == "medusa" and not scenario["letters"]:
        told["proposer"] = MedusaDrafts(MedusaHeads(SMALL["hidden_size"], 8, torch.arange(CHILD), 2))
    if scenario["letters"]:
        told["protocol"] = LETTERS
        told["apar"] = AparConfig(max_threads=max(scenario["max_threads"], 1))
    else:
        told["apar"] = AparConfig(max_threads=max(scenario["max_threads"], 1), max_depth=max(scenario["max_depth"], 1))
    if scenario["prefix"] and not scenario["chunk"]:
        head = {name: tensor[:, :-2] for name, tensor in given.items()}
        positions = (head["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            told["past_key_values"] = cache = DynamicCache()  # without a config: a window would drop what others see
            enabled(**head, position_ids=positions, past_key_values=cache, use_cache=True)
    return told


@cache
def assistant() -> Any:
    return tiny_llama(seed=1)


@torch.no_grad()
def check(**scenario: Any) -> None:
    """What each thread has sampled, it samples by the logits of its path alone; budgets and stops cut and change nothing."""
    plain, enabled = models(scenario["family"], scenario["attention"])
    prompts = random_prompts(max(scenario["batch"], 1), scenario["prompts"], shortest=4, longest=16)
    given = left_padded(prompts)
    torch.manual_seed(scenario["prompts"])
    out = enabled.generate(**given, **options(scenario, enabled, given), return_dict_in_generate=True)
    for prompt, tree, stats in zip(prompts, out.trees, out.stats, strict=True):
        assert stats.peak_threads <= max(scenario["max_threads"], 1), "too many threads"
        assert sum(len(thread.sampled_ids) for thread in tree.threads) <= max(scenario["budget"], 1), "over the budget"
        for thread in tree.threads:
            _compare(plain, prompt, thread, sampled=scenario["sampled"])
        plainly = not (scenario["sampled"] or scenario["penalty"] or scenario["letters"] or scenario["stop"])
        if plainly and all(thread.finish_reason == "eos" for thread in tree.threads):
            rules = ControlTokens(fork_token_id=FORK, child_token_id=CHILD, max_depth=max(scenario["max_depth"], 1))
            assert nested(tree) == walk(plain, prompt, rules, 200), "another answer than on each path alone"


def _compare(plain: Any, prompt: list[int], thread: Any, *, sampled: bool) -> None:
    assert thread.path_ids[: len(prompt)] == prompt, "a path begins with its prompt"
    if not thread.sampled_ids:
        return
    path = thread.path_ids
    alone = plain(input_ids=torch.tensor([path]), use_cache=False).logits[0].float()
    given = {*thread.injected}
    places = [place - 1 for place in range(thread.start, len(path)) if place not in given]
    places += [len(path) - 1] if thread.eos_token_id is not None else []
    for place, token, logits, scores in zip(places, thread.sampled_ids, thread.logits, thread.scores, strict=True):
        off = float((alone[place] - logits).abs().max())
        assert off < CLOSE * max(1.0, float(logits.abs().max())), f"the logits are off by {off:.4f} at place {place}"
        assert scores[token] > -torch.inf and (sampled or scores[token] == scores.max()), "another token than the likeliest"


STORM = Storm("exactness", draw, check, share=4.0)
