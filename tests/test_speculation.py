"""Proposers: the text is the same with and without them."""

import time
from collections import Counter
from random import Random

import pytest
import torch

from conftest import CHILD, EOS, FORK, left_padded, random_prompts, tiny_llama
from hf_apar import AparConfig, ConfigurationError, enable_apar
from hf_apar.protocol import ControlTokens, ForkProtocol
from hf_apar.speculation.lookup import PromptLookup
from hf_apar.speculation.medusa import MedusaDrafts, MedusaHeads
from hf_apar.speculation.proposer import Draft, Proposer
from hf_apar.tree.growth import GrowingTree

NO_FORK = AparConfig(fork_bias=float("-inf"))


def run(model, inputs, **options):
    return model.generate(**inputs, **{"apar": True, "max_new_tokens": 400, "return_dict_in_generate": True} | options)


def repetitive_prompts(count):
    return [prompt * 3 for prompt in random_prompts(count, seed=3, shortest=4, longest=7)]


@pytest.mark.parametrize("max_threads", [1, 3, 64])
def test_prompt_lookup_writes_the_same_text_in_fewer_steps(apar_llama, max_threads):
    inputs, config = left_padded(random_prompts(5, seed=3)), AparConfig(max_threads=max_threads)
    alone = run(apar_llama, inputs, apar=config)
    constant = {"num_assistant_tokens_schedule": "constant"}
    heuristic, out = (run(apar_llama, inputs, apar=config, prompt_lookup_num_tokens=4, **more) for more in ({}, constant))
    for one in (heuristic, out):
        assert [tree.token_ids for tree in one.trees] == [tree.token_ids for tree in alone.trees]
    assert 0 < sum(stats.accepted for stats in out.stats) <= sum(stats.proposed for stats in out.stats)
    assert sum(stats.steps for stats in out.stats) < sum(stats.steps for stats in alone.stats)


def test_without_forks_it_is_generate_for_any_batch(plain_llama, apar_llama):
    inputs = left_padded(repetitive_prompts(4))
    expected = plain_llama.generate(**inputs, max_new_tokens=60)
    for lookup in ({"prompt_lookup_num_tokens": 3}, {"prompt_lookup_num_tokens": 8, "max_matching_ngram_size": 1}):
        assert run(apar_llama, inputs, apar=NO_FORK, max_new_tokens=60, **lookup).sequences.tolist() == expected.tolist()
    several = run(apar_llama, inputs, do_sample=True, num_return_sequences=2, prompt_lookup_num_tokens=3)
    assert len(several.trees) == 8


def without_controls():
    """A model with the same words and no control tokens: the target's own weights but for those rows."""
    model = tiny_llama()
    model.resize_token_embeddings(FORK)
    model.generation_config.apar_config = None
    return model


ASSISTANTS = {
    "the model itself": lambda: enable_apar(tiny_llama()),
    "the model itself, eager": lambda: tiny_llama(attn_implementation="eager"),
    "without control tokens": without_controls,
    "another model": lambda: tiny_llama(seed=5, num_hidden_layers=1),
}


@pytest.mark.parametrize("kind", ASSISTANTS)
@pytest.mark.parametrize("max_threads", [2, 64])
def test_an_assistant_follows_the_tree_and_changes_no_text(apar_llama, kind, max_threads):
    inputs, config = left_padded(random_prompts(5, seed=3)), AparConfig(max_threads=max_threads)
    alone = run(apar_llama, inputs, apar=config)
    out = run(
        apar_llama, inputs, apar=config, assistant_model=ASSISTANTS[kind](), num_assistant_tokens=3,
        assistant_confidence_threshold=0.1,
    )  # fmt: skip
    assert [tree.token_ids for tree in out.trees] == [tree.token_ids for tree in alone.trees]
    proposed, accepted = (sum(getattr(stats, name) for stats in out.stats) for name in ("proposed", "accepted"))
    steps, before = (sum(stats.steps for stats in one.stats) for one in (out, alone))
    assert 0 < accepted <= proposed and steps < before
    if "itself" in kind:
        assert accepted > 0.45 * proposed, "all but what a [Fork] or EOS cut off, and these are frequent here"


def test_lookups_come_from_all_threads():
    row = GrowingTree([1, 2, 3], ControlTokens(fork_token_id=FORK, child_token_id=CHILD), max_threads=8)
    root = row.live[0]
    for token in (4, 5, FORK):
        row.write(root, token)
    child, root = row.live
    for token in (6, 7, 8, 9):
        row.write(child, token)
    row.write(root, 7)  # a sibling's word, which the root does not see
    lookup = PromptLookup(4)

    def drafts(lookup, length):
        (found,) = lookup.propose([row], [[length] * 2])
        return [list(draft.tokens) for draft in found]

    assert drafts(lookup, 4) == [[], [8]], "after one word one guess"
    row.write(root, 6)
    row.write(root, 7)
    assert drafts(lookup, 1) == [[], [8]] and drafts(lookup, 4) == [[], [8, 9]] and drafts(lookup, 0) == [[], []]
    for token in (1, 2):
        row.write(root, token)
    assert drafts(lookup, 2) == [[], [3, 4]]
    assert drafts(lookup, 4) == [[], [3, 4, 5, FORK]], "and on to what followed in the prompt"
    assert drafts(PromptLookup(9), 9)[1][:6] == [3, 4, 5, FORK, 7, 6]


class Fresh(ForkProtocol):
    """Nobody forks, and no token may be one of the last four of its path."""

    def fork(self, thread, token):
        return None

    def ends(self, thread, token):
        return token == EOS

    def banned(self, thread, last):
        return tuple({*thread.path_ids[-4:]} - {EOS})


def test_a_protocol_that_reads_paths_reads_the_guesses_too(apar_llama):
    inputs = left_padded(random_prompts(5, seed=0))
    expected = run(apar_llama, inputs, protocol=Fresh())
    answers = [tree.threads[0].path_ids for tree in expected.trees]

    class Known(Proposer):
        def propose(self, rows, limits):
            return [[Draft(path[len(one.path_ids) :]) for one in row.live] for path, row in zip(answers, rows, strict=True)]

    drafted = run(apar_llama, inputs, protocol=Fresh(), proposer=Known())
    assert [tree.threads[0].path_ids for tree in drafted.trees] == answers
    assert max(stats.accepted for stats in drafted.stats) > 5


def test_two_sources_of_drafts_are_one_too_many(apar_llama):
    inputs = left_padded(random_prompts(1, seed=3))
    with pytest.raises(ConfigurationError, match="all make drafts"):
        run(apar_llama, inputs, prompt_lookup_num_tokens=3, proposer=PromptLookup(2))


def random_heads():
    torch.manual_seed(1)
    heads = MedusaHeads(32, 16, torch.arange(CHILD), 2)
    with torch.no_grad():
        heads.down.weight.normal_(std=0.4)
    return heads


SOURCES = {
    "lookup": lambda: {"prompt_lookup_num_tokens": 2},
    "assistant": lambda: {
        "assistant_model": tiny_llama(seed=5, num_hidden_layers=1), "num_assistant_tokens": 2,
        "assistant_confidence_threshold": 0.4,
    },
    "heads": lambda: {"proposer": MedusaDrafts(random_heads())},
}  # fmt: skip


def beginnings(model, count, seed, **options):
    """How often each beginning of an answer was sampled: the root's first tokens, and its first child's first."""
    torch.manual_seed(seed)
    prompt = torch.arange(1, 46)[None].repeat(count, 1)  # whatever comes next has occurred
    warped = {"do_sample": True, "max_new_tokens": 24, "top_k": 3, "apar": AparConfig(max_depth=2)}
    out = run(model, {"input_ids": prompt}, **warped, **options)
    trees = [[tuple(thread.tokens[: 3 - thread.depth]) for thread in tree.threads[:2]] for tree in out.trees]
    return Counter(map(tuple, trees)), out


@pytest.fixture(scope="module")
def without_drafts(apar_llama):
    return beginnings(apar_llama, 1500, seed=0)[0]


@pytest.mark.parametrize("kind", SOURCES)
def test_sampling_with_drafts_keeps_the_distribution(apar_llama, without_drafts, kind, monkeypatch):
    """A chi-square test over how many answers begin, forks among them, with drafts and without."""
    monkeypatch.setattr(Proposer, "width", 10**6)  # that many answers at once leave no room
    found, out = beginnings(apar_llama, 1500, seed=1, **SOURCES[kind]())
    assert sum(stats.accepted for stats in out.stats) > 100
    assert sum(len(tree.threads) > 1 for tree in out.trees) > 100
    both = {word: found[word] + without_drafts[word] for word in found | without_drafts}
    common = [word for word, count in both.items() if count >= 20]
    difference = sum((found[word] - without_drafts[word]) ** 2 / both[word] for word in common)
    freedom = len(common) - 1
    assert freedom >= 10
    assert difference < freedom + 4 * (2 * freedom) ** 0.5, "four standard deviations above the mean of chi-square"


@pytest.mark.parametrize("kind", SOURCES)
def test_a_seeded_call_with_drafts_repeats_itself_in_a_slow_process_too(apar_llama, kind):
    def draws(slow):
        torch.manual_seed(7)
        waits = Random(7)
        pause = apar_llama.register_forward_pre_hook(lambda *_: time.sleep(waits.choice([0, 0, 0.02])) if slow else None)
        try:
            out = run(apar_llama, left_padded(repetitive_prompts(3)), do_sample=True, max_new_tokens=60, **SOURCES[kind]())
        finally:
            pause.remove()
        counts = [(one.drafts, one.proposed, one.accepted) for tree in out.trees for one in tree.threads]
        return out.sequences.tolist(), counts, [stats.steps for stats in out.stats]

    first = draws(slow=False)
    assert sum(proposed for _, proposed, _ in first[1]) > 0
    assert draws(slow=False) == first and draws(slow=True) == first


def test_an_object_that_makes_no_drafts_is_named(apar_llama):
    with pytest.raises(ConfigurationError, match=r"MedusaDrafts\(heads\)"):
        run(apar_llama, left_padded(random_prompts(1, seed=3)), proposer=random_heads())


def test_a_compiled_model_and_heads_are_refused_together():
    model = enable_apar(tiny_llama())
    model.compile(backend="eager")
    with pytest.raises(ConfigurationError, match="do not compile it"):
        run(model, left_padded(random_prompts(1, seed=3)), proposer=MedusaDrafts(random_heads()))
