"""The loop against its oracle: the model itself, uncached, on each path alone."""

import dataclasses

import pytest
import torch

from conftest import CHILD, EOS, FORK, flat, left_padded, nested, random_prompts, tiny_llama, walk
from hf_apar import AparConfig, AparStreamer, enable_apar
from hf_apar.protocol import ControlTokens, Fork
from hf_apar.speculation.proposer import Draft, Proposer

LIMIT = 120  # tokens of a thread at which the oracle gives up; such prompts are left out of the comparison


def expected_and_got(plain, enabled, prompts, config=None, proposer=None):
    """Both computation paths: the sequential walk of ``plain``, and ``enabled.generate`` over the batch."""
    settings = dataclasses.replace(config or AparConfig(), fork_token_id=FORK, child_token_id=CHILD)
    expected = [walk(plain, prompt, ControlTokens.of(settings), LIMIT) for prompt in prompts]
    out = enabled.generate(
        **left_padded(prompts), apar=settings, max_new_tokens=2000, return_dict_in_generate=True, proposer=proposer
    )
    return expected, out


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 5])
def test_each_thread_writes_what_the_model_writes_on_its_path_alone(batch, depth, attention):
    plain = tiny_llama(attn_implementation=attention)
    enabled = enable_apar(tiny_llama(attn_implementation=attention))
    threads = 0
    for seed in range(2 if batch > 1 else 4):
        prompts = random_prompts(batch, seed)
        expected, out = expected_and_got(plain, enabled, prompts, AparConfig(max_depth=depth))
        for row, (answer, tree) in enumerate(zip(expected, out.trees, strict=True)):
            assert answer is not None, "the oracle model must end by itself"
            assert nested(tree) == answer
            new_ids = out.sequences[row, out.sequences.shape[1] - len(out.sequences[row]) :].tolist()
            assert new_ids[len(left_padded(prompts)["input_ids"][row]) :][: len(flat(answer)) + 1] == [*flat(answer), EOS]
            threads += len(tree.threads)
            assert max(thread.depth for thread in tree.threads) <= depth
    assert threads > 4 * (depth > 1), "the model must fork for this test to mean anything"


@pytest.mark.parametrize("max_threads", [1, 2, 5, 64])
def test_the_text_is_the_same_for_any_number_of_threads(plain_llama, apar_llama, max_threads):
    prompts = random_prompts(5, seed=2)
    expected, out = expected_and_got(plain_llama, apar_llama, prompts, AparConfig(max_threads=max_threads))
    assert [nested(tree) for tree in out.trees] == expected
    assert max(stats.peak_threads for stats in out.stats) <= max_threads
    if max_threads == 64:
        assert max(stats.peak_threads for stats in out.stats) > 4


class Oracle(Proposer):
    """A proposer that knows the greedy continuation of each path, and spoils every ``spoil``-th guess."""

    def __init__(self, model, spoil, length=3):
        self.model, self.spoil, self.length, self.calls = model, spoil, length, 0

    def propose(self, rows, limits):
        return [[Draft(self.draft(thread)) for thread in row.live] for row in rows]

    @torch.no_grad()
    def draft(self, thread):
        path = list(thread.path_ids)
        for _ in range(self.length):
            logits = self.model(input_ids=torch.tensor([path]), use_cache=False).logits[0, -1]
            logits[[CHILD, *([FORK] if path[-1] in (FORK, CHILD) or thread.depth >= 3 else [])]] = -torch.inf
            path.append(int(logits.argmax()))
        self.calls += 1
        if self.spoil and self.calls % self.spoil == 0:
            path[-2] = 1 + path[-2] % 40
        return path[len(thread.path_ids) :]


@pytest.mark.parametrize("spoil", [0, 1, 3])
def test_drafts_change_the_number_of_steps_and_never_the_text(plain_llama, apar_llama, spoil):
    prompts = random_prompts(5, seed=3)
    expected, plain = expected_and_got(plain_llama, apar_llama, prompts)
    _, out = expected_and_got(plain_llama, apar_llama, prompts, proposer=Oracle(plain_llama, spoil))
    assert [nested(tree) for tree in out.trees] == expected
    assert sum(stats.accepted for stats in out.stats) > 0
    assert sum(stats.steps for stats in out.stats) < sum(stats.steps for stats in plain.stats)
    if spoil == 1:
        assert all(stats.accepted < stats.proposed for stats in out.stats if stats.proposed)


def test_the_budget_bounds_all_sampled_tokens_and_the_last_go_in_reading_order(plain_llama, apar_llama):
    prompts = random_prompts(5, seed=3)
    for budget in (1, 2, 7, 20):
        out = apar_llama.generate(
            **left_padded(prompts), apar=True, max_new_tokens=budget, return_dict_in_generate=True, eos_token_id=None
        )
        for tree in out.trees:
            forks = len(tree.threads) - 1
            assert sum(len(thread.tokens) for thread in tree.threads) + forks == budget  # [Fork] is sampled, [Child] is not
            assert all(thread.finish_reason == "length" for thread in tree.threads)
        assert out.sequences.shape[1] <= left_padded(prompts)["input_ids"].shape[1] + budget


def test_slots_are_released_and_used_again(plain_llama, apar_llama):
    """Several threads, one after the other, stand in the slots of those that ended."""
    prompts = random_prompts(5, seed=2)
    expected, wide = expected_and_got(plain_llama, apar_llama, prompts, AparConfig(max_threads=64))
    _, narrow = expected_and_got(plain_llama, apar_llama, prompts, AparConfig(max_threads=2))
    for answer, tree, few, many in zip(expected, narrow.trees, narrow.stats, wide.stats, strict=True):
        assert nested(tree) == answer
        everything = few.kv_if_sequential + 2 * (len(tree.threads) - 1)  # each fork feeds [Fork] and [Child] too
        assert max(few.peak_kv, many.peak_kv) <= everything
        if len(tree.threads) > 6:
            assert few.peak_kv < everything - 5


def test_stats_of_an_answer_without_forks_are_those_of_plain_decoding(plain_llama, apar_llama):
    prompt = random_prompts(1, seed=5)[0]
    out = apar_llama.generate(
        torch.tensor([prompt]),
        apar=AparConfig(max_depth=1),
        max_new_tokens=9,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    stats = out.stats[0]
    assert (stats.tokens, stats.steps, stats.peak_threads, stats.critical_path) == (9, 9, 1, 9)
    assert stats.peak_kv == stats.kv_if_sequential == len(prompt) + 8
    assert stats.attended == stats.attended_if_sequential == sum(range(len(prompt) + 1, len(prompt) + 9))


class Recorder(AparStreamer):
    """Rebuilds each row's answer from the events alone: a list of thread ids and tokens in reading order."""

    def __init__(self):
        self.rows, self.ended, self.closed = {}, {}, 0

    def begin_thread(self, row, thread, parent):
        answer = self.rows.setdefault(row, [])
        place = answer.index(("end", parent)) if parent is not None else 0
        answer.insert(place, ("end", thread))

    def put_token(self, row, thread, parent, token):
        assert thread not in self.ended.get(row, {})
        self.rows[row].insert(self.rows[row].index(("end", thread)), token)

    def end_thread(self, row, thread, finish_reason):
        self.ended.setdefault(row, {})[thread] = finish_reason

    def end(self):
        self.closed += 1


def test_an_apar_streamer_can_rebuild_every_answer(apar_llama):
    recorder, prompts = Recorder(), random_prompts(5, seed=3)
    out = apar_llama.generate(
        **left_padded(prompts), apar=True, max_new_tokens=400, return_dict_in_generate=True, streamer=recorder
    )
    for row, tree in enumerate(out.trees):
        assert [part for part in recorder.rows[row] if not isinstance(part, tuple)] == tree.token_ids
        assert recorder.ended[row] == {thread.index: thread.finish_reason for thread in tree.threads}
    assert recorder.closed == 1


@dataclasses.dataclass(frozen=True)
class LongForks(ControlTokens):
    """[Fork] feeds its child, or the thread that forked, many tokens."""

    to_child: bool = True

    def fork(self, thread, token):
        many = (self.child_token_id, *[5] * 40)
        return (Fork(child=many) if self.to_child else Fork(parent=many)) if token == self.fork_token_id else None


@pytest.mark.parametrize("to_child", [True, False])
def test_what_a_fork_injects_is_fed_in_passes_of_a_bounded_width(plain_llama, apar_llama, to_child):
    rules = LongForks(fork_token_id=FORK, child_token_id=CHILD, eos_token_ids=frozenset({EOS}), to_child=to_child)
    options = {"apar": AparConfig(max_threads=3), "protocol": rules, "max_new_tokens": 60, "return_dict_in_generate": True}
    inputs = left_padded(random_prompts(1, seed=2))
    expected = apar_llama.generate(**inputs, **options)
    widths = []
    hook = apar_llama.get_input_embeddings().register_forward_pre_hook(lambda layer, ids: widths.append(ids[0].numel()))
    out = apar_llama.generate(**inputs, **options, prefill_chunk_size=8)
    hook.remove()
    assert [nested(tree) for tree in out.trees] == [nested(tree) for tree in expected.trees]
    assert len(out.trees[0].threads) > 1 and max(widths) <= 8
