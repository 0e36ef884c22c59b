"""``generate`` against a naive reference that keeps a full copy of each path: forks, ends, stops, budgets, drafts.

The rules of who forks are a parameter: the paper's, and others of the tests' own.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reference import AtLeast, Ends, Reference, as_letters, generate, letters, paper
from scripted_model import LETTERS

RULES = pytest.mark.parametrize("rules", [paper, letters])


@RULES
@settings(max_examples=120)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    max_threads=st.integers(1, 6),
    max_depth=st.integers(1, 3),
    stops=st.lists(st.text("abcdefghij", min_size=1, max_size=2), max_size=2),
    min_new_tokens=st.integers(0, 3),
    pattern=st.lists(st.sampled_from(["right", "wrong", "both"]), max_size=3),
)
def test_the_answer_is_that_of_the_naive_reference(
    rules, seed, lengths, max_threads, max_depth, stops, min_new_tokens, pattern
):
    draw = torch.Generator().manual_seed(seed)
    prompts = [(1 + torch.randint(len(LETTERS), (length,), generator=draw)).tolist() for length in lengths]
    reference = Reference(seed, rules(max_depth), min_new_tokens)
    out = generate(
        prompts,
        reference,
        max_threads,
        pattern,
        logits_processor=[AtLeast(min_new_tokens, max(lengths))],
        stopping_criteria=[Ends(stops)] if stops else None,
        max_new_tokens=2000,
    )
    for prompt, tree, stats in zip(prompts, out.trees, out.stats, strict=True):
        expected = []
        for token, _, read, sampled in reference.write(prompt, prompt, 1, len(prompt)):
            expected.append(token)
            if sampled and stops and as_letters(read).endswith(tuple(stops)):
                assert tree.threads[tree.stopped_by].finish_reason == "stop"
                break
        else:
            assert tree.stopped_by is None and all(thread.finish_reason == "eos" for thread in tree.threads)
        assert tree.token_ids == expected
        assert stats.peak_threads <= max_threads


@RULES
@settings(max_examples=50)
@example(seed=1670, budget=3, max_threads=2, guesses=True)  # ends a thread just as it has forked
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 60), max_threads=st.integers(1, 5), guesses=st.booleans())
def test_a_budget_cuts_threads_short_and_changes_nothing_else(rules, seed, budget, max_threads, guesses):
    prompts = [[1, 2], [3]]
    reference = Reference(seed, rules(3), 0)
    pattern = ["both", "right"] if guesses else []
    out = generate(prompts, reference, max_threads, pattern, max_new_tokens=budget)
    for prompt, tree in zip(prompts, out.trees, strict=True):
        sampled = sum(len(thread.sampled_ids) for thread in tree.threads)
        assert sampled == budget or (sampled < budget and all(thread.finish_reason == "eos" for thread in tree.threads))
        written = {tuple(path) for _, path, _, _ in reference.write(prompt, prompt, 1, len(prompt))}
        for thread in tree.threads:
            if thread.tokens:
                text = list(thread.path_ids)
                while text[-1] in reference.rules.control_ids:
                    text.pop()
                assert tuple(text) in written, "a prefix of what the thread would have written"
