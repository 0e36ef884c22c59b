"""An answer under an engine that writes its threads in any order: what is read is the tree's own text, each token once."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_apar.protocol import ControlTokens
from hf_apar.serving.answer import Answer, IncrementalText, Limits, MadeToken

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
scripts = st.recursive(
    st.builds(Script, st.lists(words, min_size=1, max_size=2)),
    lambda inner: st.builds(Script, st.lists(st.one_of(words, inner), min_size=1, max_size=5)),
    max_leaves=10,
)


class Engine:
    """Writes the scripts of an answer's threads, some tokens at a time, in an order that ``draw`` chooses."""

    def __init__(self, answer, script):
        self.answer, self.scripts, self.done, self.started, self.cancelled = answer, {0: script}, {}, [], []

    def admit(self):
        for thread in self.answer.to_cancel():
            self.cancelled.append(thread.index)
            self.done.pop(thread.index)
        for thread in self.answer.to_start():
            self.started.append(thread.index)
            self.done[thread.index] = 0
            if thread.parent is not None:
                siblings = [one for one in self.answer.tree.threads if one.parent == thread.parent]
                self.scripts[thread.index] = self.scripts[thread.parent].children[siblings.index(thread)]

    def step(self, index, count):
        """Let thread ``index`` write ``count`` tokens."""
        tokens, at = self.scripts[index].tokens, self.done[index]
        self.done[index] = min(len(tokens), at + count)
        new = [MadeToken(token, -float(place), (index, place)) for place, token in enumerate(tokens[at : at + count], at)]
        reason = self.scripts[index].reason if self.done[index] == len(tokens) else None
        if reason:
            del self.done[index]
        self.answer.write(self.answer.tree.threads[index], new, reason=reason)


def run(answer, script, draw):
    engine, pieces = Engine(answer, script), []
    engine.admit()
    while engine.done:
        index = draw(st.sampled_from(sorted(engine.done)))
        engine.step(index, draw(st.integers(0, 4)) or len(engine.scripts[index].tokens))
        if draw(st.booleans()):
            pieces.append(answer.read())
        if draw(st.integers(0, 3)) == 0:
            answer.allow(draw(st.integers(1, 5)))
        engine.admit()
    pieces += [answer.read(), answer.read()]
    assert pieces[-1].text == "" and not pieces[-1].tokens, "nothing reads twice"
    return engine, "".join(piece.text for piece in pieces), [one for piece in pieces for one in piece.tokens]


@given(script=scripts, data=st.data())
def test_any_order_of_writing_reads_as_the_script(script, data):
    answer = Answer(PROMPT, RULES, Limits(None, 10_000), Bytes(), max_threads=64)
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
    rules = ControlTokens(fork_token_id=FORK, child_token_id=CHILD, max_depth=9, joint="/")
    answer = Answer(PROMPT, rules, Limits(None, 10_000), Bytes(), max_threads=64)
    _, text, tokens = run(answer, script, data.draw)
    assert text == answer.tree.text(Bytes()) and text.replace("/", "").encode() == script.text
    assert bytes(one.token for one in tokens if one.token != EOS) == script.text


@given(
    script=scripts, stop=st.lists(st.sampled_from(["a", "b b", "é\n", ".", "字a", "ab"]), min_size=1, max_size=3),
    include=st.booleans(), data=st.data(),
)  # fmt: skip
def test_the_first_stop_string_in_reading_order_cuts_the_answer(script, stop, include, data):
    answer = Answer(PROMPT, RULES, Limits(None, 10_000, tuple(stop), include), Bytes(), max_threads=64)
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
    assert answer.finished and not answer.to_start() and not engine.done, "nothing runs on in vain"


@given(script=scripts, limit=st.integers(1, 12), data=st.data())
def test_a_bound_on_tokens_holds_for_all_threads_together(script, limit, data):
    answer = Answer(PROMPT, RULES, Limits(limit, 10_000), Bytes(), max_threads=64)
    engine, text, tokens = run(answer, script, data.draw)
    written = [one for one in tokens if one.token != EOS]
    assert len(written) == min(limit, len(script.text))
    assert text == Bytes().decode([one.token for one in written], skip_special_tokens=True)
    if limit != len(script.text):  # EOS may still come, or not
        assert answer.finish_reason == ("length" if limit < len(script.text) else "eos")
    assert not engine.done and answer.finished
    for thread in answer.tree.threads:
        assert engine.scripts.get(thread.index, Script([b"?"])).tokens[: len(thread.sampled_ids)] == thread.sampled_ids


def test_a_child_waits_until_it_is_allowed_and_a_family_is_served_in_order():
    script = Script([b"1:", Script([b"one"]), b"2:", Script([b"two"]), b"3"])
    answer = Answer(PROMPT, RULES, Limits(None, 1000), Bytes(), max_threads=64)
    answer.allow(1)
    engine = Engine(answer, script)
    engine.admit()
    engine.step(0, 6)
    engine.admit()
    assert engine.started == [0] and len(answer.row.waiting) == 2
    answer.allow(2)
    engine.admit()
    assert engine.started == [0, 1]
    engine.step(0, 99)
    engine.admit()
    assert engine.started == [0, 1, 2], "the root's end leaves its place to the next child"
    assert answer.read().text == "1:"
    engine.step(2, 99)
    engine.step(1, 99)
    assert answer.read().text == "one2:two3"


def test_a_path_that_fills_the_context_has_no_room_for_a_child():
    answer = Answer(PROMPT, RULES, Limits(None, len(PROMPT) + 4), Bytes(), max_threads=64)
    engine = Engine(answer, Script([b"12", Script([b"no"]), b"3"], reason="length"))
    engine.admit()
    engine.step(0, 4)
    engine.admit()
    assert engine.started == [0] and answer.finished
    assert answer.read().text == "123" and answer.finish_reason == "length"


def test_what_the_engine_gives_up_ends_the_answer():
    answer = Answer(PROMPT, RULES, Limits(None, 1000), Bytes(), max_threads=64)
    engine = Engine(answer, Script([b"1:", Script([b"one"]), b"2"]))
    engine.admit()
    engine.step(0, 3)
    engine.admit()
    answer.fail("abort")
    assert [thread.index for thread in answer.to_cancel()] == [0, 1] and answer.finished
    answer.write(answer.tree.threads[1], [MadeToken(65)])
    assert answer.read().text == "1:", "and what comes late is left out"


@pytest.mark.parametrize("text", ["plain", "é字", "a\u200b\u200b", "😀 and 😀"])
def test_text_comes_in_whole_characters(text):
    decoder = IncrementalText(Bytes(), PROMPT)
    pieces = [decoder.step(token) for token in text.encode()]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert decoder.step("é".encode()[0]) == "" and decoder.flush() == "\ufffd"


def test_a_child_that_forks_at_once_is_asked_again_for_one_other_token():
    """No engine's parameters ban [Fork] right after [Child]: what was made there is dropped, and counts for nothing."""

    class Letters:
        def decode(self, token_ids, *, skip_special_tokens):
            return "".join(map(chr, token_ids))

    answer = Answer([1], ControlTokens(fork_token_id=98, child_token_id=99), Limits(None, 100), Letters())
    (root,) = answer.to_start()
    answer.write(root, [MadeToken(65), MadeToken(98)])
    (child,) = answer.to_start()
    answer.write(child, [MadeToken(98), MadeToken(66)])
    assert answer.must_not_fork(child) and answer.to_cancel() == [child] and answer.to_start() == [child]
    answer.write(child, [MadeToken(67)], reason="length")  # it was asked for one token
    assert not answer.must_not_fork(child) and child.finish_reason is None and answer.to_start() == [child]
    answer.write(child, [MadeToken(0)], reason="eos")
    answer.write(root, [MadeToken(0)], reason="eos")
    assert answer.finished and answer.read().text == "AC" and len(answer.tree.threads) == 2
