"""``generate`` against a naive reference that keeps a full copy of each path: forks, ends, stops, budgets, drafts."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import StoppingCriteria

from conftest import left_padded
from hf_apar import AparConfig, enable_apar
from hf_apar.speculation.proposer import Draft, Proposer
from scripted_model import CHILD, EOS, FORK, LETTERS, ScriptConfig, ScriptedModel, follow


class Reference:
    """The answer to one prompt, written by one thread after the other along full copies of their paths."""

    def __init__(self, seed, max_depth, min_new_tokens):
        self.seed, self.max_depth, self.min_new_tokens = seed, max_depth, min_new_tokens

    def choose(self, path, depth, prompt_length):
        logits = follow(self.seed, path)
        logits[CHILD] = -1.0
        if path[-1] in (FORK, CHILD) or depth >= self.max_depth:
            logits[FORK] = -1.0
        if len(path) - prompt_length < self.min_new_tokens:
            logits[EOS] = -1.0
        return max(range(13), key=logits.__getitem__)

    def write(self, path, depth, prompt_length):
        """Yield ``(token, the path up to it)`` in reading order."""
        while (token := self.choose(path, depth, prompt_length)) != EOS:
            path = [*path, token]
            if token == FORK:
                yield from self.write([*path, CHILD], depth + 1, prompt_length)
            else:
                yield token, path


def as_read(path):
    """A path without the control tokens where a child begins."""
    text = "".join(chr(96 + token) for token in path)
    return text.replace(chr(96 + FORK) + chr(96 + CHILD), "")


class Ends(StoppingCriteria):
    """Stops a path that ends with one of some strings of letters."""

    def __init__(self, strings):
        self.strings = tuple(strings)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([as_read(row).endswith(self.strings) for row in input_ids.tolist()])


class Guesses(Proposer):
    """A proposer that is right, wrong, or both by turns."""

    longest = 9
    width = 10**6

    def __init__(self, reference, prompts, pattern):
        self.reference, self.prompts, self.pattern = reference, prompts, pattern

    def propose(self, rows, limits):
        return [[self.draft(thread, self.prompts[number]) for thread in row.live] for number, row in enumerate(rows)]

    def draft(self, thread, prompt):
        """A tree: at each depth a right guess, a wrong one, or first a wrong one and then the right one beside it."""
        path, tokens, parents, last = list(thread.path_ids), [], [], -1
        for kind in self.pattern:
            right = self.reference.choose(path, thread.depth, len(prompt))
            guesses = {"right": [right], "wrong": [1 + right % 10], "both": [1 + right % 10, right]}[kind]
            for guess in guesses:
                tokens.append(guess)
                parents.append(last)
            last = len(tokens) - 1
            path.append(tokens[-1])
        return Draft(tokens, parents)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    max_threads=st.integers(1, 6),
    max_depth=st.integers(1, 3),
    stops=st.lists(st.text("abcdefghij", min_size=1, max_size=2), max_size=2),
    min_new_tokens=st.integers(0, 3),
    pattern=st.lists(st.sampled_from(["right", "wrong", "both"]), max_size=3),
)
def test_the_answer_is_that_of_the_naive_reference(seed, lengths, max_threads, max_depth, stops, min_new_tokens, pattern):
    draw = torch.Generator().manual_seed(seed)
    prompts = [(1 + torch.randint(len(LETTERS), (length,), generator=draw)).tolist() for length in lengths]
    reference = Reference(seed, max_depth, min_new_tokens)
    model = enable_apar(ScriptedModel(ScriptConfig(seed=seed)), config=AparConfig(fork_token_id=FORK, child_token_id=CHILD))
    options = {"stopping_criteria": [Ends(stops)]} if stops else {}
    out = model.generate(
        **left_padded(prompts),
        apar=AparConfig(max_threads=max_threads, max_depth=max_depth),
        proposer=Guesses(reference, prompts, pattern),
        logits_processor=[AtLeast(min_new_tokens, max(lengths))],
        max_new_tokens=2000,
        return_dict_in_generate=True,
        **options,
    )
    for prompt, tree, stats in zip(prompts, out.trees, out.stats, strict=True):
        expected = []
        for token, path in reference.write(prompt, 1, len(prompt)):
            expected.append(token)
            if as_read(path).endswith(tuple(stops)) and stops:
                assert tree.threads[tree.stopped_by].finish_reason == "stop"
                break
        else:
            assert tree.stopped_by is None and all(thread.finish_reason == "eos" for thread in tree.threads)
        assert tree.token_ids == expected
        assert stats.peak_threads <= max_threads


class AtLeast:
    """Forbids EOS on a path shorter than so many new tokens, by the length of the row that it is shown."""

    def __init__(self, count, prompt_length):
        self.count, self.prompt_length = count, prompt_length

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        if input_ids.shape[1] - self.prompt_length < self.count:
            scores[:, EOS] = -1.0
        return scores


@settings(max_examples=60)
@example(seed=1670, budget=3, max_threads=2, guesses=True)  # ends a thread just as it has forked
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 60), max_threads=st.integers(1, 5), guesses=st.booleans())
def test_a_budget_cuts_threads_short_and_changes_nothing_else(seed, budget, max_threads, guesses):
    prompts = [[1, 2], [3]]
    reference = Reference(seed, 3, 0)
    model = enable_apar(ScriptedModel(ScriptConfig(seed=seed)), config=AparConfig(fork_token_id=FORK, child_token_id=CHILD))
    out = model.generate(
        **left_padded(prompts),
        apar=AparConfig(max_threads=max_threads, max_depth=3),
        proposer=Guesses(reference, prompts, ["both", "right"] if guesses else []),
        max_new_tokens=budget,
        return_dict_in_generate=True,
    )
    for prompt, tree in zip(prompts, out.trees, strict=True):
        sampled = sum(len(thread.sampled_ids) for thread in tree.threads)
        assert sampled == budget or (sampled < budget and all(thread.finish_reason == "eos" for thread in tree.threads))
        written = {tuple(path) for _, path in reference.write(prompt, 1, len(prompt))}
        for thread in tree.threads:
            if thread.tokens:
                text = thread.path_ids[:-1] if thread.path_ids[-1] == FORK else thread.path_ids
                assert tuple(text) in written, "a prefix of what the thread would have written"
