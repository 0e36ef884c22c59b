"""What each query of a step sees, against sets of slots; and its logits, against the model on the query's path alone."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from conftest import random_prompts, tiny_llama
from hf_apar.forward.attention import tree_attention_for
from hf_apar.forward.cache import TreeCache
from hf_apar.forward.layout import StepLayout
from hf_apar.forward.lines import PathLines, Query
from hf_apar.tree.slots import SlotPool

WINDOWS = {"full": None, "two": 2, "five": 5}


class Lines(RuleBasedStateMachine):
    """Paths that grow, fork, are cut and end in any order, and steps that feed some of them, drafts and all."""

    @initialize(prompt=st.integers(1, 9))
    def start(self, prompt):
        self.pool, self.lines = SlotPool(), PathLines(WINDOWS, torch.float32, torch.device("cpu"))
        self.paths = [[self.pool.take() for _ in range(prompt)]]

    def path(self, pick):
        return self.paths[pick % len(self.paths)]

    @precondition(lambda self: self.paths)
    @rule(pick=st.integers(0, 9), count=st.integers(1, 4))
    def grow(self, pick, count):
        self.path(pick).extend(self.pool.take() for _ in range(count))

    @precondition(lambda self: 0 < len(self.paths) < 9)
    @rule(pick=st.integers(0, 9))
    def fork(self, pick):
        self.pool.hold(self.path(pick))
        self.paths.append([*self.path(pick), self.pool.take()])

    @precondition(lambda self: self.paths)
    @rule(pick=st.integers(0, 9), length=st.integers(1, 40))
    def cut(self, pick, length):
        path = self.path(pick)
        self.lines.cut(path, length)
        self.pool.release(path[length:])
        del path[length:]

    @precondition(lambda self: len(self.paths) > 1)
    @rule(pick=st.integers(0, 9))
    def end(self, pick):
        self.pool.release(self.paths.pop(pick % len(self.paths)))

    @precondition(lambda self: self.paths)
    @rule(data=st.data())
    def step(self, data):
        queries, drafts = [Query(0, (), 0, [self.pool.peek()])], []
        for path in self.paths:
            for length in range(len(path), max(len(path) - data.draw(st.integers(0, 3)), 0), -1):
                queries.append(Query(0, path, length))
            if data.draw(st.booleans()):
                drafts += (draft := [self.pool.take() for _ in range(data.draw(st.integers(1, 6)))])
                queries += [Query(0, path, len(path), draft[: end + 1]) for end in range(len(draft))]
                queries.append(Query(0, path, len(path), [draft[0], draft[-1]]))
        queries = data.draw(st.permutations(queries))
        slots = self.pool.high_water + 1
        for (kind, window), mask in zip(WINDOWS.items(), self.lines.masks(queries, slots).values(), strict=True):
            seen = [[*query.path[: query.length], *query.drafted] for query in queries]
            seen = [set(one if window is None else one[-window:]) for one in seen]
            expected = [[0 if slot in one else torch.finfo(torch.float32).min for slot in range(slots)] for one in seen]
            assert mask.tolist() == expected, kind
        self.pool.release(drafts)


TestLines = Lines.TestCase
TestLines.settings = settings(max_examples=60, stateful_step_count=30)


def fed_by_head(model):
    """A list that gets the shape of whatever the output layer is fed."""
    shapes = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    return shapes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("rows", "shape"), [(1, (1, 3)), (2, (1, 4))])
@torch.no_grad()
def test_several_tokens_of_a_thread_in_one_step(attention, rows, shape):
    """Two branches of a prompt are fed three tokens and two: only the last one's logits are wanted, and a draft's."""
    model = tiny_llama(attn_implementation=attention)
    prompts = random_prompts(rows, seed=3, shortest=6, longest=6)
    cache, layout = TreeCache(), StepLayout.of(model, torch.device("cpu"))
    model(input_ids=torch.tensor(prompts), past_key_values=cache)
    plan, paths = [], []
    for row, prompt in enumerate(prompts):
        pool = SlotPool()
        path = [pool.take() for _ in prompt]
        queries = []
        for branch in ([5, 6, 7], [8, 9]) if row == 0 else ([4, 3],):
            slots = [*path, *(pool.take() for _ in branch)]
            queries += [
                Query(token, slots, len(path) + place + 1, wanted=place == len(branch) - 1)
                for place, token in enumerate(branch)
            ]
            paths.append([*prompt, *branch])
        if row == 0:  # a draft of one token for the last branch
            queries.append(Query(2, slots, len(slots), [pool.take()]))
            paths.append([*paths[-1], 2])
        plan.append(queries)
    shapes = fed_by_head(model)
    with tree_attention_for(model) as packs:
        inputs = layout.lay_out(plan, [20] * rows, pack=packs)
        logits = inputs.in_plan_order(inputs.run(model, cache))
    for path, got in zip(paths, logits, strict=True):
        torch.testing.assert_close(got, model(input_ids=torch.tensor([path])).logits[0, -1], rtol=1e-4, atol=1e-4)
    assert shapes[0] == (shape if packs or rows == 1 else (2, 4)), "no logits of a token in a prompt's branch"
    whole = StepLayout(layout.lines.windows, dtype=model.dtype, device=layout.device, keeps=False)
    with tree_attention_for(model) as packs:
        inputs = whole.lay_out(plan, [20] * rows, pack=packs)
        torch.testing.assert_close(inputs.in_plan_order(inputs.run(model, cache)), logits)
