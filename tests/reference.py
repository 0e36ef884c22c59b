"""The naive reference of the scripted model: one thread after the other, along full copies of their paths."""

from functools import partial

import torch
from transformers import StoppingCriteria

from hf_apar import AparConfig, apar_decode
from hf_apar.protocol import ControlTokens
from hf_apar.speculation.proposer import Draft, Proposer
from oracle import left_padded
from protocols import LetterForks, Writing
from scripted_model import CHILD, EOS, FORK, ScriptConfig, ScriptedModel, follow


def paper(max_depth):
    return ControlTokens(fork_token_id=FORK, child_token_id=CHILD, eos_token_ids=frozenset({EOS}), max_depth=max_depth)


def letters(max_depth):
    return LetterForks(trigger=3, opened=CHILD, closed=FORK, letter=7, end=EOS, max_depth=max_depth)


class Reference:
    """The answer to one prompt, written by one thread after the other along full copies of their paths."""

    def __init__(self, seed, rules, min_new_tokens):
        self.seed, self.rules, self.min_new_tokens = seed, rules, min_new_tokens

    def choose(self, path, depth, prompt_length):
        logits = follow(self.seed, path)
        for token in self.rules.banned(Writing(depth, path), path[-1]):
            logits[token] = -1.0
        if len(path) - prompt_length < self.min_new_tokens:
            logits[EOS] = -1.0
        return max(range(13), key=logits.__getitem__)

    def write(self, path, read, depth, prompt_length):
        """Yield ``(token, path, path as it reads, was it sampled?)`` for every token of text in reading order."""
        while not self.rules.ends(Writing(depth, path), token := self.choose(path, depth, prompt_length)):
            fork = self.rules.fork(Writing(depth, path), token)
            path, before, read = [*path, token], read, [*read, token]
            if token not in self.rules.control_ids:
                yield token, path, read, True
                before = read
            if fork is not None:
                child_path, child_read = path, before
                for given_token in fork.child:
                    child_path = [*child_path, given_token]
                    if given_token not in self.rules.control_ids:
                        child_read = [*child_read, given_token]
                        yield given_token, child_path, child_read, False
                yield from self.write(child_path, child_read, depth + 1, prompt_length)
                for given_token in fork.parent:
                    path, read = [*path, given_token], [*read, given_token]
                    if given_token not in self.rules.control_ids:
                        yield given_token, path, read, False


def as_letters(path):
    return "".join(chr(96 + token) for token in path)


class Ends(StoppingCriteria):
    """Stops a path that ends with one of some strings of letters."""

    def __init__(self, strings):
        self.strings = tuple(strings)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([as_letters(row).endswith(self.strings) for row in input_ids.tolist()])


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


def generate(prompts, reference, max_threads, pattern, **options):
    return ScriptedModel(ScriptConfig(seed=reference.seed)).generate(
        **left_padded(prompts),
        custom_generate=partial(
            apar_decode,
            apar=AparConfig(max_threads=max_threads),
            protocol=reference.rules,
            proposer=Guesses(reference, prompts, pattern),
        ),
        return_dict_in_generate=True,
        **options,
    )


class AtLeast:
    """Forbids EOS on a path shorter than so many new tokens, by the length of the row that it is shown."""

    def __init__(self, count, prompt_length):
        self.count, self.prompt_length = count, prompt_length

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        if input_ids.shape[1] - self.prompt_length < self.count:
            scores[:, EOS] = -1.0
        return scores
