"""The tokens that paths hold, kept from step to step, against sets of whole paths."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from hf_apar.choice.paths import Context
from hf_apar.choice.seen import SeenTokens
from hf_apar.tree.threads import Thread

TOKENS = st.integers(0, 600)


class Seen(RuleBasedStateMachine):
    """Threads of a batch that write, fork and end, and choices for some of them, with guesses and without."""

    @initialize(data=st.data(), rows=st.integers(1, 3), length=st.integers(0, 4))
    def start(self, data, rows, length):
        prompts = [[data.draw(TOKENS) for _ in range(length)] for _ in range(rows)]
        self.seen, self.length = SeenTokens(torch.tensor(prompts, dtype=torch.long).view(rows, length)), length
        self.prompts, self.forked = prompts, [1] * rows
        self.threads = [(row, Thread(0, None, 0, 1, list(ids))) for row, ids in enumerate(prompts)]

    @rule(pick=st.integers(0, 9), first=TOKENS, count=st.integers(1, 300))
    def write(self, pick, first, count):
        if self.threads:
            self.threads[pick % len(self.threads)][1].path_ids.extend((first + one * one) % 601 for one in range(count))

    @rule(pick=st.integers(0, 9), token=TOKENS)
    def fork(self, pick, token):
        if 0 < len(self.threads) < 9:
            row, parent = self.threads[pick % len(self.threads)]
            self.threads.append((row, Thread(self.forked[row], parent.index, 0, 2, [*parent.path_ids, token])))
            self.forked[row] += 1

    @rule(pick=st.integers(0, 9))
    def end(self, pick):
        if len(self.threads) > 1:
            self.threads.pop(pick % len(self.threads))

    @rule(data=st.data())
    def ask(self, data):
        told = [one for one in self.threads if one[1].path_ids]  # before that there is nothing to guess after
        guesses = st.lists(TOKENS, max_size=3)
        asked = data.draw(st.lists(st.tuples(st.sampled_from(told), guesses), min_size=1, max_size=9)) if told else []
        contexts = [Context(row, thread, self.length, guess) for (row, thread), guess in asked]
        for context, ids in zip(contexts, self.seen.of(contexts) if contexts else (), strict=True):
            expected = {*self.prompts[context.row], *context.thread.path_ids, *context.guesses}
            assert set(ids.tolist()) == expected


TestSeen = Seen.TestCase
TestSeen.settings = settings(max_examples=60, stateful_step_count=30)


def test_a_prompt_of_embeddings_alone_holds_no_token():
    roots = [Context(row, Thread(0, None, 0, 1, []), 0) for row in range(2)]
    assert SeenTokens(torch.empty(2, 0, dtype=torch.long)).of(roots).shape == (2, 0)
