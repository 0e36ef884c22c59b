"""Who may start: every policy lets every answer go on, and a share is of the engine and not of an answer."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_apar.errors import ConfigurationError
from hf_apar.protocol import ControlTokens
from hf_apar.serving import admission as module
from hf_apar.serving.admission import Admission, Eager, EqualShare, FixedCap, Load, policy_named
from hf_apar.serving.answer import Answer, Limits
from hf_apar.serving.driver import Driver, Made
from hf_apar.serving.reading import MadeToken
from test_answer import CHILD, EOS, FORK, PROMPT, Bytes

FREE = Load(max_running=64)


def test_alone_an_answer_runs_all_its_threads_and_in_company_an_equal_share():
    share = EqualShare(width=12)
    assert share.allowances([5], 0, FREE) == [5] and share.allowances([20], 0, FREE) == [12]
    assert share.allowances([9, 1, 3], 0, FREE) == [8, 1, 3], "what some do not want the others get"
    assert share.allowances([9, 9, 3], 0, FREE) == [5, 4, 3], "what cannot be shared out goes to the oldest"
    assert share.allowances([5, 1, 3], 5, FREE) == [3, 1, 3], "plain requests have their share too"
    assert share.allowances([5] * 20, 3, FREE) == [1] * 20
    assert share.allowances([9, 9], 0, Load(max_running=6)) == [3, 3]
    assert share.allowances([5, 3], 0, Load(kv_usage=0.95)) == [1, 1]
    assert share.allowances([], 3, FREE) == share.allowances([], 0, FREE) == []


@given(
    wanted=st.lists(st.integers(1, 12), max_size=12), others=st.integers(0, 40), usage=st.floats(0, 1),
    most=st.integers(1, 80), policy=st.sampled_from([Eager(), FixedCap(2), EqualShare(), EqualShare(width=7)]),
)  # fmt: skip
def test_every_policy_lets_every_answer_go_on(wanted, others, usage, most, policy):
    granted = policy.allowances(wanted, others, Load(kv_usage=usage, max_running=most))
    assert len(granted) == len(wanted) and all(one >= 1 for one in granted)
    if isinstance(policy, EqualShare):
        assert sum(granted) + others <= max(policy.width, len(wanted) + others), "no wider than what is worth its time"


@pytest.mark.parametrize("text", ["", "fair", "cap", "cap:0", "cap:-1", "share:x", "eager:2", "tpot:60"])
def test_a_policy_that_is_none_is_refused_with_those_that_are(text):
    with pytest.raises(ConfigurationError, match="eager, cap:N or share:N"):
        policy_named(text)


class Engine:
    """Writes a random answer for each request, a few tokens a step, until everything has been written."""

    def __init__(self, policy, seed, room=0):
        self.draw, self.running, self.most, self.room = random.Random(seed), {}, 0, room
        self.driver = Driver(self, policy)
        self.answers = []

    def start(self, request):
        self.running[request.answer, request.thread.index] = request

    def cancel(self, request):
        assert self.running.pop((request.answer, request.thread.index)) is request

    def load(self):
        return Load(len(self.running), 0, 0.0, 8, self.room, 4)

    def add(self):
        answer = Answer(PROMPT, ControlTokens(fork_token_id=FORK, child_token_id=CHILD), Limits(60, 500), Bytes())
        self.answers.append(answer)
        self.driver.add(answer)

    def step(self):
        self.most = max(self.most, len(self.running))
        for key, request in list(self.running.items()):
            if self.running.get(key) is not request:
                continue  # cancelled by another thread's token
            made = []
            while not made or (made[-1] != EOS and self.draw.random() < 0.4):  # several tokens at once
                never = set(request.banned_after([*request.thread.path_ids[len(request.prompt_ids) :], *made]))
                made.append(self.draw.choice([token for token in (65, 66, 67, EOS, FORK, CHILD) if token not in never]))
            ended = made[-1] == EOS
            if ended:
                del self.running[key]
            yield Made(request, [MadeToken(token) for token in made], "eos" if ended else None)


@pytest.mark.parametrize("room", [0, 1, 200])
@pytest.mark.parametrize("policy", [Eager(), FixedCap(2), EqualShare(8)])
def test_every_answer_ends_and_nothing_stays_behind(policy, room, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    for seed in range(20):
        engine = Engine(policy, seed, room)
        for _ in range(6):
            engine.add()
        engine.driver.run(engine.step)  # an answer that waits for ever would never let it end
        assert all(answer.finished for answer in engine.answers)
        assert not engine.running and len(engine.driver) == len(engine.driver.admission) == engine.driver.threads == 0
        assert engine.most <= 12 or not isinstance(policy, FixedCap)
        for answer in engine.answers:
            assert [one.token for one in answer.read().tokens] == answer.tree.token_ids + answer.tree.closing_ids
            for thread in answer.tree.threads:
                assert CHILD not in thread.sampled_ids and thread.depth <= answer.protocol.max_depth
                assert (FORK, FORK) not in pairwise(thread.path_ids) and (CHILD, FORK) not in pairwise(thread.path_ids)


def write(engine, answer, *tokens, reason=None):
    request = engine.running.pop((answer, 0)) if reason else engine.running[answer, 0]
    engine.driver.made(Made(request, [MadeToken(token) for token in tokens], reason))


def test_an_answer_that_is_given_up_leaves_its_place_to_others():
    engine = Engine(FixedCap(2), 0)
    engine.add()
    engine.add()
    first, second = engine.answers
    write(engine, second, 65, FORK, 66, FORK)
    assert len(engine.running) == 3, "the root and a child of two"
    engine.driver.remove(second)
    assert list(engine.running) == [(first, 0)] and second.finished
    engine.driver.remove(second)
    assert len(engine.driver) == len(engine.driver.admission) == 1


def test_where_the_cache_is_scarce_whole_answers_wait_in_order():
    """Each may write 60 tokens after its prompt, 30 on average, until others have shown how much an answer holds."""
    engine = Engine(Eager(), 0, room=2 * (30 + len(PROMPT)) + 5)
    for _ in range(4):
        engine.add()
    first, second, third, fourth = engine.answers
    assert list(engine.running) == [(first, 0), (second, 0)] and len(engine.driver) == 4
    engine.driver.remove(third)  # hung up before it began
    write(engine, first, 65)
    write(engine, first, EOS, reason="eos")
    assert list(engine.running) == [(second, 0), (fourth, 0)]
    assert third.finished and not third.tree.threads[0].tokens
    for _ in range(9):
        engine.add()
    assert len(engine.running) > 4, "the first answer held little, so more of them fit"


def test_children_that_wait_start_when_the_engine_gets_quiet(monkeypatch):
    """Nothing of the answer itself has changed: only the load has."""
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    engine = Engine(EqualShare(8), 0)
    plain = [8]
    monkeypatch.setattr(engine, "load", lambda: Load(running=plain[0] + len(engine.running)))
    engine.add()
    (answer,) = engine.answers
    write(engine, answer, 65, FORK, 66, FORK, 67)
    assert list(engine.running) == [(answer, 0)]
    plain[0] = 0
    write(engine, answer, 65)
    assert list(engine.running) == [(answer, 0), (answer, 1), (answer, 2)]


def test_an_answer_is_expected_to_hold_its_own_prompt_beside_what_others_wrote():
    admission, load = Admission(Eager()), Load(kv_tokens=1300, block_tokens=1)
    rules = ControlTokens(fork_token_id=FORK, child_token_id=CHILD)
    short, *long = [Answer([1] * size, rules, Limits(None, 10_000), Bytes()) for size in (2, 900, 900)]
    for one in (short, *long):
        admission.add(one)
    assert admission.share(load, 0) == [short, long[0]], "the second long prompt has no room"
    admission.changed(short)
    admission.remove(short)
    assert long[1] not in admission.share(load, 0), "though the answer that ended held next to nothing"
    admission.remove(long[0])
    assert admission.share(load, 0) == [long[1]]
