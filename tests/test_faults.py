"""Faults strike where they say and nowhere else: on random models that fork and end often."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from conftest import CHILD, EOS, FORK, left_padded, random_prompts, tiny_llama
from hf_apar import AparConfig, apar_decode, enable_apar
from hf_apar.errors import ConfigurationError
from hf_apar.evaluation.arms import arm_named
from hf_apar.evaluation.faults import FAULTS, SHORTEST, Fault, last_item
from hf_apar.evaluation.models import Loaded, Models
from hf_apar.evaluation.suites import Prompt
from hf_apar.evaluation.written import Signs, Written
from hf_apar.protocol import ControlTokens
from scripted_model import CHILD as LETTER_CHILD
from scripted_model import FORK as LETTER_FORK
from scripted_model import ScriptConfig, ScriptedModel

SIGNS = Signs(
    FORK, CHILD, (EOS,), EOS,
    clauses=frozenset(range(1, 9)), words=frozenset(range(9, 30)), lines=frozenset({30, 31}),
)  # fmt: skip
LETTER_SIGNS = Signs(
    LETTER_FORK, LETTER_CHILD, (EOS,), EOS, clauses=frozenset({1, 2, 3}), words=frozenset({4, 5, 6}), lines=frozenset({7})
)
PROMPTS = random_prompts(6)
LENGTH = max(map(len, PROMPTS))
LIMIT = 400


def tiny_answers(model, processors=(), prompts=PROMPTS, **options):
    out = model.generate(
        **left_padded(prompts), apar=True, logits_processor=[*processors], max_new_tokens=LIMIT,
        return_dict_in_generate=True, do_sample=False, **options,
    )  # fmt: skip
    return out.trees


def scripted_answers(processors=(), seeds=range(6), max_depth=3, max_threads=4, **options):
    """Each seed is a model of its own, and has a prompt of its own."""
    ids = {"fork_token_id": LETTER_FORK, "child_token_id": LETTER_CHILD, "eos_token_ids": frozenset({EOS})}
    rules = ControlTokens(**ids, max_depth=max_depth)
    decode = partial(apar_decode, apar=AparConfig(max_threads=max_threads), protocol=rules)
    options = {"max_new_tokens": LIMIT, "return_dict_in_generate": True, "do_sample": False} | options
    return [
        ScriptedModel(ScriptConfig(seed=seed)).generate(
            torch.tensor([[1 + seed % 10, 2, 3]]), custom_generate=decode, logits_processor=[*processors], **options
        ).trees[0]
        for seed in seeds
    ]  # fmt: skip


def told(trees):
    return [[(thread.parent, thread.fork_position, thread.sampled_ids) for thread in tree.threads] for tree in trees]


def letter_fault(kind, p, seed=0, bound=12):
    return Fault(kind, p, seed, LETTER_SIGNS, 3, bound)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_never_strikes_changes_nothing(kind, apar_llama):
    assert told(tiny_answers(apar_llama, [Fault(kind, 0.0, 0, SIGNS, LENGTH)])) == told(tiny_answers(apar_llama))
    assert told(scripted_answers([letter_fault(kind, 0.0)])) == told(scripted_answers())


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_strikes_at_the_same_places_in_any_batch_and_schedule(kind, apar_llama):
    together = tiny_answers(apar_llama, [Fault(kind, 0.5, 3, SIGNS, LENGTH, 20)])
    alone = [tiny_answers(apar_llama, [Fault(kind, 0.5, 3, SIGNS, len(prompt), 20)], [prompt])[0] for prompt in PROMPTS]
    assert any(tree.closing_ids for tree in together)
    one_by_one, at_once = (scripted_answers([letter_fault(kind, 0.5)], max_threads=most) for most in (1, 8))
    assert [tree.token_ids for tree in one_by_one] == [tree.token_ids for tree in at_once]
    assert [tree.token_ids for tree in together if tree.closing_ids] == [
        tree.token_ids for tree, other in zip(alone, together, strict=True) if other.closing_ids
    ]


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_strikes_and_the_seed_says_where(kind):
    first, again, other = (told(scripted_answers([letter_fault(kind, 0.5, seed)], range(20))) for seed in (1, 1, 2))
    assert first == again != other
    assert first != told(scripted_answers(seeds=range(20)))


@pytest.mark.parametrize(
    ("own", "ends"), [([], False), ([4], False), ([3], True), ([4, 3], True), ([9, 3], False), ([9, 4, 3], True)]
)
def test_a_clause_ends_at_a_sign_that_follows_no_number(own, ends):
    signs = replace(LETTER_SIGNS, digits=frozenset({9}))
    assert Written((9,), (1, LETTER_FORK, LETTER_CHILD, *own), signs).ends_clause == ends


@pytest.mark.parametrize("kind", FAULTS)
def test_every_answer_ends(kind):
    for tree in scripted_answers([letter_fault(kind, 0.5)], max_new_tokens=3000):
        assert tree.closing_ids == [EOS]


def test_without_forks_all_is_written_inline():
    assert any(len(tree.threads) > 1 for tree in scripted_answers())
    assert all(len(tree.threads) == 1 for tree in scripted_answers([letter_fault("missed", 1.0)]))


def test_needless_forks_come_after_each_border_where_a_fork_is_allowed():
    forked = 0
    for tree in scripted_answers([letter_fault("missed", 1.0), letter_fault("needless", 1.0)], max_depth=2):
        assert len(tree.threads) == 1, "a fork that is banned is not forced"
    for tree in scripted_answers([letter_fault("needless", 1.0)], max_depth=2):
        root = tree.threads[0].sampled_ids
        for last, token in pairwise(root):
            assert last not in LETTER_SIGNS.clauses or token == LETTER_FORK
            forked += last in LETTER_SIGNS.clauses
        assert all(LETTER_FORK not in thread.sampled_ids for thread in tree.threads[1:])
    assert forked


def test_short_children_end_at_the_first_border_after_their_length():
    plain = {
        tuple(thread.path_ids[: thread.start]): thread for tree in scripted_answers(max_depth=2) for thread in tree.threads
    }
    for tree in scripted_answers([letter_fault("short", 1.0)], max_depth=2):
        for thread in tree.threads[1:]:
            own = thread.sampled_ids
            before = plain.get(tuple(thread.path_ids[: thread.start]))
            assert own[-1] == EOS
            assert all(token not in LETTER_SIGNS.clauses for token in own[SHORTEST - 1 : -2])
            assert before is None or own[:-1] == before.sampled_ids[: len(own) - 1]


@pytest.mark.parametrize(("kind", "strikes_root"), [("endless", False), ("unending", True)])
def test_an_end_is_withheld_up_to_the_bound(kind, strikes_root):
    for tree in scripted_answers([letter_fault(kind, 1.0, bound=12)], range(4), max_new_tokens=3000):
        for thread in tree.threads:
            if (thread.parent is None) == strikes_root:
                assert len(thread.sampled_ids) > 12
    plain, struck = scripted_answers(seeds=[1]), scripted_answers([letter_fault(kind, 1.0, bound=0)], seeds=[1])
    assert told(plain) == told(struck)


def test_each_title_comes_twice():
    repeats = 0
    for tree in scripted_answers([letter_fault("repeated", 1.0)], range(20), max_depth=2):
        root = tuple(tree.threads[0].sampled_ids)
        forks = [place for place, token in enumerate(root) if token == LETTER_FORK]
        items = [last_item(root[:place], LETTER_SIGNS) for place in forks]
        between = [root[one + 1 : other] for one, other in pairwise(forks)]
        fresh = True
        for item, other, text in zip(items, items[1:], between, strict=False):
            if fresh and item:
                assert item == other == text
                repeats += 1
            fresh = not fresh or not item or item != other
    assert repeats


@pytest.mark.parametrize(
    ("own", "item"),
    [((5, 7, 6), (7, 6)), ((6, 4), (6, 4)), ((1, 11, 7, 4), (7, 4)), ((1, 11, 4), (4,)), ((7, 4, 7), (7, 4, 7)), ((), ())],
)
def test_a_title_is_the_last_line(own, item):
    assert last_item(own, LETTER_SIGNS) == item


def test_what_does_not_exist_is_refused():
    with pytest.raises(ConfigurationError, match="there is no fault 'wrong'; take one of missed, needless"):
        Fault("wrong", 0.1, 0, SIGNS, 3)
    with pytest.raises(ConfigurationError, match=r"the fault missed has the probability 1\.5; give one from 0 to 1"):
        Fault("missed", 1.5, 0, SIGNS, 3)


ASKED = Prompt("one", "own", "any", None, ({"role": "user", "content": "which trees grow?"},))


@pytest.fixture(scope="module")
def models():
    """The tiny model with the bytes of ``O`` and ``P`` as control tokens, which no prompt here has."""
    loaded = Loaded("tiny", enable_apar(tiny_llama(vocab_size=260)), byte_tokenizer())
    return Models(checkpoint="tiny", _loaded={("tiny", True): loaded})


def test_signs_are_read_off_a_vocabulary(models):
    loaded = models.apar()
    signs, tokenizer = Signs.of(loaded.model, loaded.tokenizer), loaded.tokenizer
    assert (signs.fork, signs.child, signs.ends, signs.pad) == (FORK, CHILD, (EOS,), EOS)
    assert sorted(tokenizer.decode([token]) for token in signs.clauses) == [",", ".", ":", ";", "?"]  # ! is the EOS here
    assert signs.lines == {*tokenizer("\n")["input_ids"]}
    assert "".join(tokenizer.decode([token]) for token in sorted(signs.digits)) == "0123456789"
    assert signs.words == {*tokenizer(" \n")["input_ids"]}


def test_an_arm_without_changes_answers_as_the_arm_does(models):
    plain = arm_named("apar", models).answer(ASKED, 200)
    assert plain.tree is not None and len(plain.tree["threads"]) > 1
    for text in ("apar!missed=0", "apar!missed=0!short=0"):
        one = arm_named(text, models).answer(ASKED, 200)
        assert (one.arm, one.text, one.tree, one.steps) == (text, plain.text, plain.tree, plain.steps)


def test_an_arm_does_what_its_name_says(models):
    inline = arm_named("apar!missed=1", models).answer(ASKED, 200)
    assert len(inline.tree["threads"]) == 1
    flat = arm_named("apar!max-depth=2!fork-bias=3", models).answer(ASKED, 200)
    assert {thread["depth"] for thread in flat.tree["threads"]} == {1, 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("apar!wrong=1", "there is no change 'wrong'; take one of fork-bias, max-depth, repetition-penalty, missed"),
        ("apar!missed=often", "'missed=often' has no number; give missed=NUMBER"),
        ("apar!missed=2", "the fault missed has the probability 2"),
        ("plain!missed=1", "the arm plain does not write in threads"),
    ],
)
def test_a_name_that_says_nothing_is_refused(models, text, message):
    with pytest.raises(ConfigurationError, match=message):
        arm_named(text, models)
