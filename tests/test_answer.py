"""An answer under an engine that writes its threads in any order: what is read is the tree's own text, each token once."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_apar.protocol import ControlTokens
from hf_apar.serving.admission import Eager, FixedCap, Load
from hf_apar.serving.answer import Answer, Limits
from hf_apar.serving.driver import Driver, Made
from hf_apar.serving.reading import IncrementalText, MadeToken, Reader
from hf_apar.tree.threads import ParagraphTree, Thread

FORK, CHILD, EOS = 256, 257, 258
RULES = ControlTokens(fork_token_id=FORK, child_token_id=CHILD, max_depth=9)
PROMPT = list(b"Say: ")


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, token_ids, *, skip_special_tokens):
        return bytes(token for token in token_ids if token < 256).decode("utf-8", errors="replace")


@dataclass
class Script:
    """What a thread is going to write: bytes, and other scripts where it forks."""

    pieces: list = field(default_factory=list)
    reason: str = "eos"

    @property
    def text(self):
        return b"".join(piece if isinstance(piece, bytes) else piece.text for piece in self.pieces)

    @property
    def tokens(self):
        found = []
        for piece in self.pieces:
            found += list(piece) if isinstance(piece, bytes) else [FORK]
        return found + ([EOS] if self.reason == "eos" else [])

    @property
    def children(self):
        return [piece for piece in self.pieces if isinstance(piece, Script)]


words = st.text(alphabet="ab .é字\n", min_size=1, max_size=6).map(lambda text: text.encode())


def joined(pairs):
    return Script([piece for pair in pairs for piece in pair if piece is not None])


# two forks never stand side by side, and no child begins with one; a root may
threads = st.recursive(
    st.builds(Script, st.lists(words, min_size=1, max_size=2)),
    lambda inner: st.builds(joined, st.lists(st.tuples(words, st.none() | inner), min_size=1, max_size=4)),
    max_leaves=10,
)
scripts = st.builds(lambda first, rest: Script([*first, *rest.pieces]), st.lists(threads, max_size=1), threads)


class Engine:
    """Writes the scripts of an answer's threads, some tokens at a time, in the order in which it is told to."""

    def __init__(self, answer, script, policy=None):
        self.answer, self.scripts, self.requests, self.done = answer, {0: script}, {}, {}
        self.started, self.cancelled = [], []
        self.driver = Driver(self, policy)
        self.driver.add(answer, "as given")

    def start(self, request):
        thread = request.thread
        assert request.answer is self.answer and request.options == "as given"
        self.started.append(thread.index)
        self.requests[thread.index], self.done[thread.index] = request, 0
        assert list(request.prompt_ids) == thread.path_ids
        if thread.parent is not None:
            siblings = [one for one in self.answer.tree.threads if one.parent == thread.parent]
            self.scripts[thread.index] = self.scripts[thread.parent].children[siblings.index(thread)]

    def cancel(self, request):
        self.cancelled.append(request.thread.index)
        assert self.requests.pop(request.thread.index) is request

    def load(self):
        return Load(running=len(self.requests))

    def step(self, index, count):
        """Let thread ``index`` write ``count`` tokens."""
        tokens, at = self.scripts[index].tokens, self.done[index]
        self.done[index] = min(len(tokens), at + count)
        new = [MadeToken(token, -float(place), (index, place)) for place, token in enumerate(tokens[at : at + count], at)]
        reason = self.scripts[index].reason if self.done[index] == len(tokens) else None
        request = self.requests.pop(index) if reason else self.requests[index]
        self.driver.made(Made(request, new, reason))


@dataclass
class Drawn:
    """Allows what ``draw`` says."""

    draw: Callable

    def allowances(self, wanted, others, load):
        assert others == 0
        return [self.draw(st.integers(1, 5)) for _ in wanted]


def run(answer, script, draw):
    engine, pieces = Engine(answer, script, draw(st.sampled_from([Eager(), Drawn(draw)]))), []
    while engine.requests:
        index = draw(st.sampled_from(sorted(engine.requests)))
        engine.step(index, draw(st.integers(0, 4)) or len(engine.scripts[index].tokens))
        if draw(st.booleans()):
            pieces.append(answer.read())
    pieces += [answer.read(), answer.read()]
    assert pieces[-1].text == "" and not pieces[-1].tokens, "nothing reads twice"
    assert len(engine.driver) == engine.driver.threads == 0, "nothing stays behind"
    text = "".join(piece.text for piece in pieces)
    assert answer.text == text
    return engine, text, [one for piece in pieces for one in piece.tokens]


@given(script=scripts, data=st.data())
def test_any_order_of_writing_reads_as_the_script(script, data):
    answer = Answer(PROMPT, RULES, Limits(None, 10_000), Bytes())
    engine, text, tokens = run(answer, script, data.draw)
    assert answer.finished and answer.finish_reason == "eos"
    assert text.encode() == script.text
    assert [one.token for one in tokens] == [*script.text, EOS] == answer.tree.token_ids + answer.tree.closing_ids
    assert all(engine.scripts[index].tokens[place] == one.token for one in tokens for index, place in [one.note])
    assert sorted(engine.started) == list(range(len(answer.tree.threads))) and not engine.cancelled
    for thread in answer.tree.threads:
        assert thread.sampled_ids == engine.scripts[thread.index].tokens
        assert thread.logprobs == [-float(place) for place in range(len(thread.sampled_ids))]


@given(script=scripts, data=st.data())
def test_what_joins_segments_is_text_and_no_token(script, data):
    rules = replace(RULES, joint="/")
    answer = Answer(PROMPT, rules, Limits(None, 10_000), Bytes())
    _, text, tokens = run(answer, script, data.draw)
    assert text == answer.tree.text(Bytes()) and text.replace("/", "").encode() == script.text
    assert bytes(one.token for one in tokens if one.token != EOS) == script.text


@given(
    script=scripts, stop=st.lists(st.sampled_from(["a", "b b", "é\n", ".", "字a", "ab"]), min_size=1, max_size=3),
    include=st.booleans(), data=st.data(),
)  # fmt: skip
def test_the_first_stop_string_in_reading_order_cuts_the_answer(script, stop, include, data):
    answer = Answer(PROMPT, RULES, Limits(None, 10_000, tuple(stop), include), Bytes())
    engine, text, tokens = run(answer, script, data.draw)
    whole = script.text.decode()
    hits = [(whole.find(one) + len(one), number, one) for number, one in enumerate(stop) if one in whole]
    if not hits:
        assert text == whole and answer.finish_reason == "eos" and answer.stop_reason is None
        return
    end, _, found = min(hits)
    assert text == whole[: end if include else end - len(found)]
    assert (answer.stop_reason, answer.finish_reason) == (found, "stop")
    assert bytes(one.token for one in tokens) == whole[:end].encode()
    assert answer.finished and not answer.to_start() and not engine.requests, "nothing runs on in vain"


@given(script=scripts, limit=st.integers(1, 12), data=st.data())
def test_a_bound_on_tokens_holds_for_all_threads_together(script, limit, data):
    answer = Answer(PROMPT, RULES, Limits(limit, 10_000), Bytes())
    engine, text, tokens = run(answer, script, data.draw)
    written = [one for one in tokens if one.token != EOS]
    assert len(written) == min(limit, len(script.text))
    assert text == Bytes().decode([one.token for one in written], skip_special_tokens=True)
    if limit != len(script.text):  # EOS may still come, or not
        assert answer.finish_reason == ("length" if limit < len(script.text) else "eos")
    assert not engine.requests and answer.finished
    for thread in answer.tree.threads:
        assert engine.scripts.get(thread.index, Script([b"?"])).tokens[: len(thread.sampled_ids)] == thread.sampled_ids


def test_a_child_waits_until_it_is_allowed_and_a_family_is_served_in_order():
    script = Script([b"1:", Script([b"one"]), b"2:", Script([b"two"]), b"3"])
    answer = Answer(PROMPT, RULES, Limits(None, 1000), Bytes())
    engine = Engine(answer, script, FixedCap(1))
    engine.step(0, 3)
    engine.step(0, 3)
    assert engine.started == [0] and len(answer.row.waiting) == 2
    engine.driver.admission.policy = FixedCap(2)
    engine.step(0, 99)
    assert engine.started == [0, 1, 2], "the root's end leaves its place to the next child"
    assert answer.read().text == "1:"
    engine.step(2, 99)
    engine.step(1, 99)
    assert answer.read().text == "one2:two3"


def test_a_path_that_fills_the_context_has_no_room_for_a_child():
    answer = Answer(PROMPT, RULES, Limits(None, len(PROMPT) + 4), Bytes())
    engine = Engine(answer, Script([b"12", Script([b"no"]), b"3"], reason="length"))
    assert engine.requests[0].max_tokens == 4
    engine.step(0, 4)
    assert engine.started == [0] and answer.finished
    assert answer.read().text == "123" and answer.finish_reason == "length"


def test_what_the_engine_gives_up_ends_the_answer():
    answer = Answer(PROMPT, RULES, Limits(None, 1000), Bytes())
    engine = Engine(answer, Script([b"1:", Script([b"one"]), b"2"]))
    engine.step(0, 3)
    root, child = engine.requests.values()
    engine.driver.made(Made(root, failure="error"))
    assert engine.cancelled == [1] and answer.finished and answer.failure == "error"
    engine.driver.made(Made(child, [MadeToken(65)]))
    assert answer.read().text == "1:", "and what comes late is left out"


def test_what_nobody_waits_for_any_more_is_cancelled():
    answer = Answer(PROMPT, RULES, Limits(None, 1000), Bytes())
    engine = Engine(answer, Script([b"1:", Script([b"one"]), b"2"]))
    engine.step(0, 3)
    engine.driver.remove(answer)
    engine.driver.remove(answer)
    assert engine.cancelled == [0, 1] and (answer.finished, answer.failure) == (True, "abort")
    assert len(engine.driver) == engine.driver.threads == 0


def test_requests_say_the_rules_of_the_control_tokens():
    """[Child] never, [Fork] not after [Fork], not at the greatest depth; a bias where it may come."""
    rules = replace(RULES, max_depth=2, fork_bias=1.5)
    answer = Answer(PROMPT, rules, Limits(10, 1000), Bytes())
    engine = Engine(answer, Script([b"1:", Script([b"one"]), b"2"]))
    root = engine.requests[0]
    assert (root.banned, root.bias, root.max_tokens) == (((CHILD,), (FORK, FORK)), {FORK: 1.5}, 21)
    engine.step(0, 3)
    child = engine.requests[1]
    assert (child.banned, child.bias, child.max_tokens) == (((CHILD,), (FORK,)), {}, 17)
    assert [root.banned_after(made) for made in ([], [FORK], [FORK, 65], [65, FORK])] == [
        [CHILD], [CHILD, FORK], [CHILD], [CHILD, FORK],
    ]  # fmt: skip
    never = Answer(PROMPT, replace(rules, fork_bias=-math.inf), Limits(None, 1000), Bytes())
    assert Engine(never, Script()).requests[0].banned == ((CHILD,), (FORK,))


@pytest.mark.parametrize("text", ["plain", "é字", "a\u200b\u200b", "😀 and 😀"])
def test_text_comes_in_whole_characters(text):
    decoder = IncrementalText(Bytes(), PROMPT)
    pieces = [decoder.step(token) for token in text.encode()]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert decoder.step("é".encode()[0]) == "" and decoder.flush() == "\ufffd"


def test_a_long_row_of_what_is_no_letter_takes_no_longer_than_others():
    """A window of such tokens cannot be cut where a letter ends; it grew, and was decoded anew for each."""

    class Counting(Bytes):
        seen = 0

        def decode(self, token_ids, *, skip_special_tokens):
            self.seen += len(token_ids)
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    tokenizer = Counting()
    decoder = IncrementalText(tokenizer, PROMPT)
    for token in "\ufffd".encode() * 1000:
        decoder.step(token)
    assert tokenizer.seen < 3000 * 300


def test_a_child_that_forks_at_once_is_asked_again_for_one_other_token():
    """vLLM's parameters cannot ban [Fork] right after [Child]: what was made there is dropped, and counts for nothing."""

    class Letters:
        def decode(self, token_ids, *, skip_special_tokens):
            return "".join(map(chr, token_ids))

    class Asked:
        def __init__(self):
            self.requests, self.cancelled, self.driver = [], [], Driver(self)

        def start(self, request):
            self.requests.append(request)

        def cancel(self, request):
            self.cancelled.append(request)

        def load(self):
            return Load()

        def write(self, *tokens, reason=None):
            self.driver.made(Made(self.requests[-1], tokens, reason))

    answer = Answer([1], ControlTokens(fork_token_id=98, child_token_id=99), Limits(None, 100), Letters())
    engine = Asked()
    engine.driver.add(answer)
    engine.write(MadeToken(65), MadeToken(98))
    root, child = engine.requests
    assert root.banned == child.banned == ((99,), (98, 98)) and child.max_tokens > 1
    engine.write(MadeToken(98), MadeToken(66))
    again = engine.requests[2]
    assert engine.cancelled == [child]
    assert (again.thread, again.banned, again.max_tokens) == (child.thread, ((99,), (98,)), 1)
    engine.driver.made(Made(child, [MadeToken(68)]))  # comes late
    engine.write(MadeToken(67), reason="length")  # it was asked for one token
    assert child.thread.finish_reason is None and engine.requests[3].banned == child.banned
    engine.write(MadeToken(0), reason="eos")
    engine.driver.made(Made(root, [MadeToken(0)], "eos"))
    assert answer.finished and answer.read().text == "AC" and len(answer.tree.threads) == 2


def test_a_child_that_writes_nothing_is_a_seam_as_in_the_tree():
    threads = [Thread(0, None, 0, 1, [], tokens=[97, 98, 99, 100]), Thread(1, 0, 2, 2, [])]
    for thread in threads:
        thread.finish_reason = "eos"
    tree = ParagraphTree(threads, joint="/")
    reader = Reader(tree, IncrementalText(Bytes(), PROMPT))
    reader.advance({})
    assert reader.piece().text == tree.text(Bytes()) == "ab/cd"
