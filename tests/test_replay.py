"""What is recorded of an answer is what happened: against the tree that grew, its slots, and the run's own figures."""

import importlib.util
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TextStreamer

from byte_tokenizer import byte_tokenizer
from conftest import CHILD, EOS, FORK, left_padded, random_prompts
from hf_apar import AparConfig, ConfigurationError, DataError, ParagraphTree, Thread
from hf_apar.protocol import ControlTokens
from hf_apar.replay import Recorder, Trace, TracedThread, load_traces, replay_page, save_traces, trace_of_tree
from hf_apar.replay.pieces import answer_pieces
from hf_apar.streaming import Broadcast
from hf_apar.tree.growth import GrowingTree
from letter_tokenizer import letter_tokenizer
from protocols import LetterForks

TOKENIZER = letter_tokenizer()
LETTERS = range(1, 9)
PROTOCOLS = {
    "control tokens": ControlTokens(fork_token_id=FORK, child_token_id=CHILD, eos_token_ids=frozenset({EOS})),
    "letters": LetterForks(trigger=1, opened=FORK, closed=CHILD, letter=2, end=EOS),
}
LAST = {"control tokens": [*LETTERS, FORK, EOS, EOS], "letters": [*LETTERS, EOS, EOS]}  # what may end a step


def write_at_random(row, draw, last_ones, tokens=60):
    """Let ``row`` write step by step, and yield what was written at each step's end.

    It is a triple for each place: the thread's index, the place in its path, had a draft guessed it?
    """
    while row.unfinished:
        wrote = []
        for thread in row.live:
            guessed = draw.choice((0, 0, 1, 2))
            for count in range(guessed + 1):
                if thread.finish_reason is not None:  # cut off by a stop just now
                    break
                last = count == guessed
                token = EOS if last and tokens < 0 else draw.choice(last_ones if last else LETTERS[1:])
                place = len(thread.path_ids)
                row.write(thread, token, stops=last and draw.random() < 0.01)
                tokens -= 1
                if token != EOS:
                    wrote.append((thread.index, place, not last))
                thread.accepted += not last
        yield wrote


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(sorted(PROTOCOLS)), max_threads=st.integers(1, 5))
def test_a_trace_tells_what_happened_in_each_step(seed, kind, max_threads):
    """The oracles are the pool of slots after each step, and a diary of what each thread wrote in it."""
    row = GrowingTree([3, 4, 5], PROTOCOLS[kind], max_threads=max_threads)
    recorder, diary, held, states = Recorder(), {}, [], []
    told = Broadcast(recorder)
    for step, wrote in enumerate(write_at_random(row, random.Random(seed), LAST[kind])):
        diary |= {(index, place): (step, guessed) for index, place, guessed in wrote}
        held.append(row.pool.held)
        states.append(([one.index for one in row.live], [one.index for one in row.waiting]))
        told.update([row.tree])
    trace = recorder.trace(TOKENIZER)
    assert trace.text == row.tree.text(TOKENIZER)
    assert trace.held == held
    for index, (one, thread) in enumerate(zip(trace.threads, row.threads, strict=True)):
        assert [thread.path_ids[place] for place in one.places] == thread.tokens
        sampled = [text for text, place in enumerate(one.places) if (index, place) in diary]
        assert [one.written_in(text) for text in sampled] == [diary[index, one.places[text]][0] for text in sampled]
        assert set(one.accepted) == {text for text in sampled if diary[index, one.places[text]][1]}
    for step, (live, waiting) in enumerate(states):
        unfinished = [index for index, one in enumerate(trace.threads) if one.unfinished_after(step)]
        assert unfinished == sorted([*live, *waiting])
        begun = [index for index in unfinished if index == 0 or trace.threads[index].steps]
        assert [index for index in begun if index == 0 or trace.threads[index].steps[0] <= step] == sorted(live)


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(sorted(PROTOCOLS)))
def test_a_tree_that_nobody_recorded_is_replayed_as_it_would_be_written_without_drafts_and_waiting(seed, kind):
    row, draw = GrowingTree([3, 4, 5], PROTOCOLS[kind], max_threads=99), random.Random(seed)
    recorder = Recorder()
    told = Broadcast(recorder)
    while row.unfinished:
        for thread in row.live:
            row.write(thread, draw.choice(LAST[kind]))
        told.update([row.tree])
    found, recorded = trace_of_tree(ParagraphTree.from_dict(row.tree.to_dict()), TOKENIZER), recorder.trace(TOKENIZER)
    assert replace(found, times=recorded.times, timed=True) == recorded
    assert found.times == tuple(range(1, len(recorded.times) + 1)) and not found.timed


def run(model, prompt, recorder, **options):
    ids = torch.tensor([prompt])
    given = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 60} | options
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=recorder, **given)


@pytest.mark.parametrize("drafts", [{}, {"prompt_lookup_num_tokens": 3}], ids=["alone", "with drafts"])
@pytest.mark.parametrize("max_threads", [2, 64])
def test_a_run_is_recorded_as_its_output_and_its_figures_say(apar_llama, drafts, max_threads):
    for prompt in random_prompts(6):
        recorder = Recorder()
        out = run(apar_llama, prompt, recorder, apar=AparConfig(max_threads=max_threads), **drafts)
        tree, stats, trace = out.trees[0], out.stats[0], recorder.trace(TOKENIZER, question="?")
        assert trace.text == tree.text(TOKENIZER)
        assert len(trace.times) == stats.steps and max(trace.held) <= stats.peak_kv
        assert sum(len(one.texts) for one in trace.threads) == stats.tokens
        assert [one.finish_reason for one in trace.threads] == [one.finish_reason for one in tree.threads]
        for one, thread in zip(trace.threads, tree.threads, strict=True):
            assert one.logprobs == (None if thread.logprobs is None else tuple(_of_tokens(thread)))
            assert len(one.accepted) <= thread.accepted


def test_an_answer_of_a_batch_is_recorded_up_to_its_own_end(apar_llama):
    prompts = random_prompts(4)
    recorders = [Recorder(row=row) for row in range(4)]
    given = {"apar": True, "max_new_tokens": 40, "return_dict_in_generate": True}
    out = apar_llama.generate(**left_padded(prompts), streamer=recorders, **given)
    assert len({stats.steps for stats in out.stats}) > 1
    for recorder, tree, stats in zip(recorders, out.trees, out.stats, strict=True):
        trace = recorder.trace(TOKENIZER)
        assert (trace.text, len(trace.times)) == (tree.text(TOKENIZER), stats.steps)


def _of_tokens(thread):
    """The log probabilities of a thread's tokens, those of control tokens and EOS left out."""
    pairs = zip(thread.sampled_ids, thread.logprobs, strict=True)
    return [value for token, value in pairs if token not in (FORK, EOS)]


def test_a_plain_answer_is_recorded_by_the_same_streamer(plain_llama):
    for prompt in random_prompts(4):
        recorder = Recorder()
        out = run(plain_llama, prompt, recorder)
        new = out.sequences[0, len(prompt) :].tolist()
        trace = recorder.trace(TOKENIZER)
        (root,) = trace.threads
        assert trace.text == TOKENIZER.decode(new, skip_special_tokens=True)
        assert len(trace.times) == len(new) and root.finish_reason == ("eos" if new[-1] == EOS else "length")
        assert trace.held == [len(prompt) + place for place in range(1, len(new))] + [0]


def test_a_recorder_stands_beside_other_streamers_and_frees_the_scores_where_nobody_wants_them(apar_llama, capsys):
    prompt = random_prompts(1)[0]
    kept, freed = Recorder(), Recorder(keep_scores=False)
    out = run(apar_llama, prompt, [kept, TextStreamer(TOKENIZER, skip_prompt=True)], apar=True)
    assert out.trees[0].threads[0].scores is not None and capsys.readouterr().out
    again = run(apar_llama, prompt, freed, apar=True)
    assert all(one.scores is None for one in again.trees[0].threads)
    assert replace(freed.trace(TOKENIZER), times=kept.trace(TOKENIZER).times) == kept.trace(TOKENIZER)


def test_a_recorder_that_heard_nothing_says_so():
    with pytest.raises(ConfigurationError, match="as streamer"):
        Recorder().trace(TOKENIZER)


def thread_of(ids, **changes):
    return Thread(**{"index": 0, "parent": None, "fork_position": 0, "depth": 1, "path_ids": ids, "tokens": ids} | changes)


@given(st.text(), st.data())
def test_pieces_join_to_the_text_wherever_a_letter_is_cut(text, data):
    """Bytes are tokens here, so that a letter has up to four, and a thread may fork between two of them."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    place, end = data.draw(st.integers(0, len(ids))), data.draw(st.integers(0, len(ids)))
    place, end = sorted((place, end))
    root = thread_of(ids[:place] + ids[end:])
    child = thread_of(ids[place:end], index=1, parent=0, fork_position=place, depth=2)
    whole = all("\ufffd" not in tokenizer.decode(part) for part in (ids[:place], ids[place:end], ids[end:]))
    for stopped_by in (None, 1):
        for joint in ("", "\n") if whole else ("",):  # nobody puts a joint into a letter
            tree = ParagraphTree([root, child], stopped_by, joint)
            pieces = answer_pieces(tree, tokenizer)
            assert list(map(len, pieces)) == [len(root.tokens), len(child.tokens)]
            first, behind = pieces[0][:place], pieces[0][place:]
            assert "".join([*first, *pieces[1], *(behind if stopped_by is None else [])]) == tree.text(tokenizer)


ROOT = {
    "parent": None, "fork_position": 0, "inherited": 2, "born": -1, "ended": 2, "finish_reason": "eos",
    "steps": [0, 1, 2], "places": [2, 4], "texts": ["Oak", "."], "logprobs": [-0.5, None], "accepted": [1],
}  # fmt: skip
TWIG = {
    "parent": 0, "fork_position": 1, "inherited": 4, "born": 1, "ended": None, "finish_reason": None,
    "steps": [1, 2], "places": [5], "texts": [": hard"], "logprobs": None, "accepted": [],
}  # fmt: skip
TRACE = {"threads": [ROOT, TWIG], "times": [0.5, 0.75, 1], "question": "Which?", "timed": True, "stopped_by": None}


def test_a_saved_trace_comes_back(tmp_path):
    trace, plain = Trace.from_dict(TRACE), Trace((TracedThread(**{**ROOT, "steps": (0, 1, 2)}),), (1, 2, 3), timed=False)
    assert trace.to_dict() == json.loads(json.dumps(TRACE), object_hook=_tuples) and trace.text == "Oak: hard."
    for beside in (None, plain):
        save_traces(tmp_path / "trace.json", trace, beside)
        assert load_traces(tmp_path / "trace.json") == (trace, beside and Trace.from_dict(beside.to_dict()))


def _tuples(values):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"times": [0.5, 0.2, 1]}, "times"),
        ({"times": [0.5, float("nan"), 1]}, "times"),
        ({"times": "now"}, "times"),
        ({"question": 5}, "question"),
        ({"threads": []}, "no threads"),
        ({"threads": 3}, "list"),
        ({"threads": [ROOT, 3]}, "TracedThread"),
        ({"colour": "red"}, "no Trace"),
        ({"stopped_by": 2}, "stopped_by"),
        *(
            ({"threads": [ROOT | root, TWIG | twig]}, says)
            for root, twig, says in [
                ({"texts": ["Oak", 3]}, {}, "texts"),
                ({"texts": ["Oak"]}, {}, "places"),
                ({"places": [2, 9]}, {}, "places"),
                ({"places": [2, 2]}, {}, "places"),
                ({"steps": [0, 2, 1]}, {}, "steps"),
                ({"steps": [0, 1, 3]}, {}, "steps"),
                ({"steps": None}, {}, "steps"),
                ({"ended": 1}, {}, "ended"),
                ({"finish_reason": "bored"}, {}, "finish_reason"),
                ({"logprobs": [0.1]}, {}, "logprobs"),
                ({"logprobs": [float("inf"), 0]}, {}, "logprobs"),
                ({"accepted": [2]}, {}, "accepted"),
                ({"parent": 0}, {}, "parent"),
                ({}, {"parent": 1}, "parent"),
                ({}, {"parent": None}, "parent"),
                ({}, {"fork_position": 3}, "fork_position"),
                ({}, {"born": -2}, "born"),
                ({}, {"born": True}, "born"),
                ({}, {"inherited": 1, "places": [2]}, "inherit"),
                ({}, {"inherited": 9, "places": [10]}, "inherit"),
            ]
        ),
    ],
)
def test_what_cannot_have_happened_is_refused(change, says):
    with pytest.raises(DataError, match=says):
        Trace.from_dict(TRACE | change)


@pytest.mark.parametrize("content", ["", "[]", "{}", "\xff", '{"trace": 3}'])
def test_a_file_that_holds_no_trace_is_refused(content, tmp_path):
    (tmp_path / "trace.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"(?i)trace"):
        load_traces(tmp_path / "trace.json")


def test_a_page_is_not_made_of_two_clocks():
    with pytest.raises(ConfigurationError, match="clock"):
        replay_page(Trace.from_dict(TRACE), Trace.from_dict(TRACE | {"timed": False}))


@pytest.fixture(scope="module")
def picture():
    """The script that draws README's picture."""
    spec = importlib.util.spec_from_file_location("picture", Path(__file__).parents[1] / "benchmarks" / "picture.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["picture"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


def drawn_texts(picture, drawn):
    """Return what stands in the left and in the right column, without white space."""
    texts = [one for one in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text") if one.get("textLength")]
    places = [(float(one.get("x")) >= picture.SECOND, int(one.get("y")), float(one.get("x")), one.text) for one in texts]
    return ["".join("".join(text for right, *_, text in sorted(places) if right == side).split()) for side in (False, True)]


def test_a_picture_holds_both_answers_line_by_line_and_nothing_that_runs_or_loads(picture):
    long = ROOT | {"texts": ["Oak " * 40 + "<b>&", "."], "logprobs": None}
    trace, plain = Trace.from_dict(TRACE | {"threads": [long, TWIG]}), Trace.from_dict(TRACE | {"threads": [ROOT]})
    drawn = picture.draw(trace, plain, "here & there")
    assert drawn_texts(picture, drawn) == ["".join(one.text.split()) for one in (plain, trace)]
    assert not re.search(r"<(script|image|foreignObject)|href|url\(|@import", drawn)
    widest = max(len(line) for line in picture.lines_of(trace))
    assert widest <= picture.LETTERS + 1  # a space may stand behind a line


def test_the_picture_that_is_shown_is_that_of_the_recorded_answers(picture):
    trace, plain = load_traces(picture.ANSWERS)
    drawn = picture.PICTURE.read_text(encoding="utf-8")
    assert drawn == picture.draw(trace, plain, json.loads(picture.ANSWERS.read_text(encoding="utf-8"))["where"])
    assert len(drawn) < 1e6 and drawn_texts(picture, drawn) == ["".join(one.text.split()) for one in (plain, trace)]
