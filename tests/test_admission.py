"""Who may start: every policy lets every answer go on, and the fair one weighs an answer against all requests."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_apar.protocol import ControlTokens
from hf_apar.serving import admission as module
from hf_apar.serving.admission import Admission, Admitted, Eager, FixedCap, Load, ProportionalFair, StepTimes
from hf_apar.serving.answer import Answer, Limits, MadeToken
from test_answer import CHILD, EOS, FORK, PROMPT, Bytes

FREE = Load(max_running=64)
STEEP = Load(max_running=64, step_seconds=lambda width: 0.01 * width)
LINE = Load(max_running=64, step_seconds=lambda width: 0.012 + 0.001 * width)


def test_an_idle_engine_grants_everything_and_a_full_one_a_thread_each():
    assert ProportionalFair().allowances([5, 1, 3], 0, FREE) == [5, 1, 3]
    assert ProportionalFair().allowances([9, 9], 0, Load(max_running=6)) == [3, 3]
    assert ProportionalFair().allowances([5, 3], 0, Load(max_running=64, kv_usage=0.95)) == [1, 1]
    assert ProportionalFair().allowances([], 3, FREE) == []


def test_where_a_step_costs_as_much_as_it_is_wide_a_thread_gains_nothing():
    assert ProportionalFair().allowances([8, 8], 0, STEEP) == [1, 1]


def test_plain_requests_hold_children_back_and_forking_answers_do_not():
    among_plain = ProportionalFair().allowances([8] * 4, 28, LINE)
    among_themselves = ProportionalFair().allowances([8] * 4, 0, LINE)
    assert sum(among_plain) < sum(among_themselves) and min(among_plain) >= 1


@given(
    wanted=st.lists(st.integers(1, 12), max_size=12), others=st.integers(0, 40), base=st.floats(0.001, 1),
    slope=st.floats(0, 0.1), most=st.integers(1, 80),
)  # fmt: skip
def test_what_is_granted_is_a_best_share(wanted, others, base, slope, most):
    """No single thread more would raise the sum of the logarithms of all rates."""
    load = Load(max_running=most, step_seconds=lambda width: base + slope * width)
    granted = ProportionalFair().allowances(wanted, others, load)
    assert all(1 <= one <= max(1, most) and one <= want for one, want in zip(granted, wanted, strict=True))

    def value(threads):
        seconds = load.step_seconds(sum(threads) + others)
        return sum(math.log(one / seconds) for one in threads) + others * math.log(1 / seconds)

    if sum(granted) + others < most:
        for place, want in enumerate(wanted):
            if granted[place] < want:
                more = [one + (index == place) for index, one in enumerate(granted)]
                assert value(more) <= value(granted) + 1e-9


def test_the_line_follows_what_is_measured_and_needs_two_widths():
    times = StepTimes()
    assert times(1) == times(100)
    for _ in range(5):
        times.add(4, 0.02)
    assert times(1) == times(100) == pytest.approx(0.02)
    for _ in range(300):
        times.add(16, 0.032)
        times.add(4, 0.02)
    assert times(64) == pytest.approx(0.08, rel=0.02)


class Engine:
    """Writes a random answer for each request, a few tokens a step, until everything has been written."""

    def __init__(self, policy, seed, room=0):
        self.draw, self.running, self.most = random.Random(seed), {}, 0
        self.admission = Admission(
            policy, lambda: Load(len(self.running), 0, 0.0, 8, lambda width: 0.012 + 0.001 * width, room, 4)
        )
        self.families = []

    def add(self):
        answer = Answer(PROMPT, ControlTokens(fork_token_id=FORK, child_token_id=CHILD), Limits(60, 500), Bytes())
        family = Admitted(
            answer, lambda thread: self.running.update({(family, thread.index): thread}),
            lambda thread: self.running.pop((family, thread.index), None),
        )  # fmt: skip
        self.families.append(family)
        self.admission.add(family)

    def step(self):
        self.most = max(self.most, len(self.running))
        for (family, index), thread in list(self.running.items()):
            if (family, index) not in self.running:
                continue  # cancelled by another thread's token
            path, written = list(thread.path_ids), []
            while not written or (written[-1].token != EOS and self.draw.random() < 0.4):  # several tokens at once
                may_fork = path[-1] not in (FORK, CHILD) and thread.depth < 3
                path.append(self.draw.choice([65, 66, 67, EOS] + [FORK] * may_fork))
                written.append(MadeToken(path[-1]))
            ended = path[-1] == EOS
            if ended:
                del self.running[family, index]
            family.answer.write(thread, written, reason="eos" if ended else None)
            if family.answer.finished:
                self.admission.remove(family)
            else:
                self.admission.changed(family)


@pytest.mark.parametrize("room", [0, 1, 200])
@pytest.mark.parametrize("policy", [Eager(), FixedCap(2), ProportionalFair()])
def test_every_answer_ends_and_nothing_stays_behind(policy, room, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    for seed in range(20):
        engine = Engine(policy, seed, room)
        for _ in range(6):
            engine.add()
        for _ in range(2000):
            if not engine.running:
                break
            engine.step()
        assert all(family.answer.finished for family in engine.families), "an answer must never wait for ever"
        assert not engine.running and len(engine.admission) == 0
        assert engine.most <= 12 or not isinstance(policy, FixedCap)
        for family in engine.families:
            read = [one.token for one in family.answer.read().tokens]
            assert read == family.answer.tree.token_ids + family.answer.tree.closing_ids


def test_an_answer_that_is_given_up_leaves_its_place_to_others():
    engine = Engine(FixedCap(2), 0)
    engine.add()
    engine.add()
    first, second = engine.families
    root = second.answer.tree.threads[0]
    second.answer.write(root, [MadeToken(65), MadeToken(FORK), MadeToken(66), MadeToken(FORK)])
    engine.admission.changed(second)
    assert len(engine.running) == 3, "the root and a child of two"
    engine.admission.remove(second)
    assert list(engine.running) == [(first, 0)] and second.answer.finished
    engine.admission.remove(second)
    assert len(engine.admission) == 1


def test_where_the_cache_is_scarce_whole_answers_wait_in_order():
    """Each may write 60 tokens after its prompt, 30 on average, until others have shown how much an answer holds."""
    engine = Engine(Eager(), 0, room=2 * (30 + len(PROMPT)) + 5)
    for _ in range(4):
        engine.add()
    first, second, third, fourth = engine.families
    assert list(engine.running) == [(first, 0), (second, 0)] and len(engine.admission) == 4
    engine.admission.remove(third)  # hung up before it began
    first.answer.write(first.answer.tree.threads[0], [MadeToken(65), MadeToken(EOS)], reason="eos")
    del engine.running[first, 0]
    engine.admission.changed(first)
    engine.admission.remove(first)
    assert list(engine.running) == [(second, 0), (fourth, 0)]
    assert third.answer.finished and not third.answer.tree.threads[0].tokens
    for _ in range(9):
        engine.add()
    assert len(engine.running) > 4, "the first answer held little, so more of them fit"
