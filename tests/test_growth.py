"""Threads and slots against a naive model that keeps a full copy of each path."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_apar.forward.lines import PathLines, Query
from hf_apar.protocol import ControlTokens
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.slots import SlotPool
from protocols import LetterForks, Writing

FORK, CHILD = 98, 99


class Growth(RuleBasedStateMachine):
    """Any sequence of append, fork and end, with drafts that take slots and give them back in between."""

    protocol = ControlTokens(fork_token_id=FORK, child_token_id=CHILD)

    @initialize(prompt=st.integers(1, 5), padding=st.integers(0, 3), max_threads=st.integers(1, 4))
    def start(self, prompt, padding, max_threads):
        self.row = GrowingTree(range(prompt), self.protocol, padding=padding, max_threads=max_threads)
        windows = {"full": None, "sliding": 3}
        self.lines = PathLines(windows, torch.float16, torch.device("cpu"))  # kept through all that happens
        self.padding, self.max_threads, self.prompt = padding, max_threads, prompt
        self.paths = {0: list(range(prompt))}  # thread -> its full path; the naive model
        self.steps = {0: 0}  # thread -> how many tokens were sampled on its path
        self.waits = []  # threads that wait, in reading order
        self.fed = set()  # prefixes of paths that are in the cache
        self.order = [0]  # unfinished threads in reading order
        self.written = {}  # (row, slot) -> the path prefix whose last token stands in the slot

    def live(self):
        return [thread for thread in self.order if thread not in self.waits]

    def start_waiting(self):
        while self.waits and len(self.live()) < self.max_threads:
            child = self.waits.pop(0)
            self.paths[child] += self.protocol.fork(Writing(1, []), FORK).child

    @precondition(lambda self: self.order)
    @rule(pick=st.integers(0, 10), token=st.integers(1, 9))
    def append(self, pick, token):
        thread = self.live()[pick % len(self.live())]
        self.row.write(self.row.tree.threads[thread], token)
        self.paths[thread].append(token)
        self.steps[thread] += 1

    @precondition(lambda self: self.order)
    @rule(pick=st.integers(0, 10), length=st.integers(1, 3), kept=st.integers(0, 3))
    def draft(self, pick, length, kept):
        self.feed()  # a draft follows what is in the cache
        thread = self.live()[pick % len(self.live())]
        slots = [self.row.pool.take() for _ in range(length)]
        for slot in slots[:kept]:
            self.row.write(self.row.tree.threads[thread], 5, slot)
            self.paths[thread].append(5)
            self.steps[thread] += 1
            self.fed.add(tuple(self.paths[thread]))
        self.row.pool.release(slots[kept:])

    @precondition(lambda self: self.order and len(self.paths) < 12)
    @rule(pick=st.integers(0, 10))
    def fork(self, pick):
        thread = self.live()[pick % len(self.live())]
        self.row.write(self.row.tree.threads[thread], FORK)
        self.paths[thread].append(FORK)
        child = len(self.paths)
        self.steps[child] = self.steps[thread] = self.steps[thread] + 1
        self.paths[child] = list(self.paths[thread])
        self.paths[thread] += self.protocol.fork(Writing(1, []), FORK).parent
        self.order.insert(self.order.index(thread), child)
        self.waits = [other for other in self.order if other in [*self.waits, child]]
        self.start_waiting()

    @precondition(lambda self: self.order)
    @rule(pick=st.integers(0, 10))
    def end(self, pick):
        thread = self.live()[pick % len(self.live())]
        self.row.end(self.row.tree.threads[thread], "eos")
        self.order.remove(thread)
        self.start_waiting()

    @precondition(lambda self: self.order)
    @rule()
    def feed(self):
        given = [(thread.index, count) for thread, count in self.row.feed()]
        assert [index for index, _ in given] == self.live()
        slots = []
        for index, count in given:
            path = self.paths[index]
            assert count == 1 or tuple(path[: 1 - count]) not in self.fed, "nothing is fed twice but a thread's last token"
            slots += self.row.slots(self.row.tree.threads[index])[-count:]
        assert len(slots) == len(set(slots)), "what paths share is fed by one of them"
        for index, count in given:
            self.fed |= {tuple(self.paths[index][: len(self.paths[index]) - place]) for place in range(count)}
        for index in self.live():
            path = self.paths[index]
            assert all(tuple(path[:end]) in self.fed for end in range(self.prompt + 1, len(path) + 1))

    @precondition(lambda self: self.order)
    @rule(limit=st.integers(1, 4))
    def feed_ahead(self, limit):
        while ahead := self.row.feed_ahead(limit):
            assert len(ahead) <= limit
            for thread, place in ahead:
                assert place < -1, "a thread samples after its last token"
                path = self.paths[thread.index][: len(thread.path_ids) + place + 1]
                assert tuple(path) not in self.fed
                assert all(tuple(path[:end]) in self.fed for end in range(self.prompt + 1, len(path)))
                self.fed.add(tuple(path))

    @precondition(lambda self: not self.order)
    @rule()
    def finished(self):
        assert not self.row.unfinished and self.row.pool.held == self.padding

    @invariant()
    def threads_follow_the_naive_model(self):
        assert [thread.index for thread in self.row.live] == self.live()
        assert [thread.index for thread in self.row.waiting] == self.waits
        for thread in self.row.tree.threads:
            assert thread.path_ids == self.paths[thread.index]
            assert self.row.sampled(thread) == self.steps[thread.index]

    @invariant()
    def no_slot_is_lost_or_owned_twice(self):
        owners = {slot: ("padding", slot) for slot in range(self.padding)}
        held = set(owners)
        for index in self.order:
            slots = self.row.slots(self.row.tree.threads[index])
            assert len(slots) == len(self.paths[index])
            for position, slot in enumerate(slots):
                key = tuple(slots[: position + 1])  # a slot stands for one prefix of a path, shared by all that inherit it
                assert owners.setdefault(slot, key) == key
                held.add(slot)
        assert self.row.pool.held == len(held)
        assert self.row.pool.high_water == max(held, default=-1) + 1
        assert self.row.pool.peek() == next(slot for slot in range(len(held) + 1) if slot not in held)

    @invariant()
    def a_slot_is_held_for_each_token_that_an_unfinished_path_sees(self):
        """No less would do: two paths share what they inherited, and of a thread that ended nothing is kept but that."""
        seen = {tuple(self.paths[thread][: end + 1]) for thread in self.order for end in range(len(self.paths[thread]))}
        assert self.row.pool.held == self.padding + len(seen)

    @invariant()
    def masks_show_each_thread_its_path(self):
        paths = [self.row.slots(self.row.tree.threads[index]) for index in self.live()]
        if paths:
            slots, queries = self.row.pool.high_water, [Query(0, path, len(path)) for path in paths]
            masks = self.lines.masks(queries, slots)
            low = torch.finfo(torch.float16).min
            for kind, sees in ("full", paths), ("sliding", [path[-3:] for path in paths]):
                assert masks[kind].tolist() == [[0 if slot in path else low for slot in range(slots)] for path in sees]


class GrowthByLetters(Growth):
    """The same by rules that feed the parent too."""

    protocol = LetterForks(trigger=FORK, opened=CHILD, closed=97, letter=7, end=0, max_depth=99)


TestGrowth, TestGrowthByLetters = Growth.TestCase, GrowthByLetters.TestCase
TestGrowth.settings = TestGrowthByLetters.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_guess_that_ends_its_thread_gives_its_slot_back():
    rules = ControlTokens(fork_token_id=FORK, child_token_id=CHILD, eos_token_ids=frozenset({0}))
    row = GrowingTree([1, 2], rules, padding=1, max_threads=1)
    row.feed()
    row.write(row.live[0], 0, row.pool.take())
    assert not row.unfinished and row.pool.held == 1  # the padding's


@given(st.lists(st.tuples(st.sampled_from(["take", "hold", "release"]), st.integers(0, 99)), max_size=80))
def test_a_pool_reaches_no_further_than_what_was_held_at_once(deeds):
    pool, held, most = SlotPool(), [], 0
    for deed, pick in deeds:
        if deed == "take":
            held.append(pool.take())
            assert held.count(held[-1]) == 1
        elif held and deed == "hold":
            held.append(held[pick % len(held)])
            pool.hold(held[-1:])
        elif held:
            pool.release([held.pop(pick % len(held))])
        most = max(most, len(set(held)))
        assert pool.held == len(set(held)) and pool.high_water <= most


def test_released_slots_are_used_again_lowest_first():
    pool = SlotPool()
    slots = [pool.take() for _ in range(6)]
    pool.release([4, 1])
    assert [pool.take(), pool.take(), pool.take()] == [1, 4, 6]
    pool.release([5, 6])
    assert pool.high_water == 5
    pool.release(slots[:5])
    assert pool.high_water == pool.held == 0
