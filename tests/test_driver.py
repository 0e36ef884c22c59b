"""The driver with engines that choose by themselves: they write what ``generate`` and a naive reference write."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import CHILD, EOS, FORK, random_prompts
from hf_apar import AparConfig
from hf_apar.protocol import ControlTokens
from hf_apar.serving.admission import Eager, EqualShare, FixedCap, Load
from hf_apar.serving.answer import Answer, Limits
from hf_apar.serving.driver import Driver, Made, ThreadRequest
from hf_apar.serving.reading import MadeToken
from letter_tokenizer import letter_tokenizer
from reference import Reference
from scripted_model import LETTERS, follow
from test_docs import ROOT, padded_code
from test_scripted import RULES

POLICIES = [Eager(), FixedCap(1), EqualShare(5)]


class Letters:
    """A tokenizer with a letter for each token."""

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(chr(96 + token) for token in token_ids)


class Engine:
    """Makes several tokens a step, whatever a fork brings; obeys all bans if ``obedient``, else those of single tokens."""

    def __init__(self, seed, obedient, chunks):
        self.seed, self.obedient, self.chunks, self.running = seed, obedient, chunks, {}

    def start(self, request):
        self.running[request] = []

    def cancel(self, request):
        del self.running[request]

    def load(self):
        return Load(running=len(self.running))

    def step(self):
        for place, request in enumerate([*self.running]):
            if request in self.running:
                yield self.made_by(request, self.chunks[place % len(self.chunks)])

    def made_by(self, request, count):
        made = self.running[request]
        before = len(made)
        while len(made) < min(before + count, request.max_tokens):
            logits = follow(self.seed, [*request.prompt_ids, *made])
            runs = request.banned_after(made) if self.obedient else [run[0] for run in request.banned if len(run) == 1]
            for token in runs:
                logits[token] = -1.0
            made.append(max(range(13), key=logits.__getitem__))
        reason = "length" if len(made) == request.max_tokens else None
        if reason:
            del self.running[request]
        return Made(request, [MadeToken(token) for token in made[before:]], reason)


@RULES
@given(
    seed=st.integers(0, 10**6), max_depth=st.integers(1, 3), obedient=st.booleans(), policy=st.sampled_from(POLICIES),
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=3),
)  # fmt: skip
def test_any_protocol_is_followed_by_an_engine_that_knows_none(rules, seed, max_depth, obedient, policy, chunks):
    """A token that is banned where it stands, or does not know what a fork injected, counts for nothing."""
    draw = torch.Generator().manual_seed(seed)
    prompts = [(1 + torch.randint(len(LETTERS), (length,), generator=draw)).tolist() for length in (1, 4)]
    reference = Reference(seed, rules(max_depth), 0)
    engine = Engine(seed, obedient, chunks)
    driver = Driver(engine, policy)
    answers = [Answer(prompt, reference.rules, Limits(None, 10_000), Letters()) for prompt in prompts]
    for answer in answers:
        driver.add(answer)
    driver.run(engine.step)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = [token for token, _, _, _ in reference.write(prompt, prompt, 1, len(prompt))]
        assert answer.tree.token_ids == expected and answer.finish_reason == "eos"
        assert [one.token for one in answer.read().tokens] == [*expected, EOS]
        assert answer.text == Letters().decode(expected, skip_special_tokens=True)
    assert not engine.running and len(driver) == driver.threads == 0


@RULES
@given(
    seed=st.integers(0, 10**6), stop=st.integers(1, 12), include=st.booleans(), obedient=st.booleans(),
    policy=st.sampled_from(POLICIES), chunks=st.lists(st.integers(1, 6), min_size=1, max_size=3),
)  # fmt: skip
def test_a_stop_token_ends_the_answer_where_it_reads(rules, seed, stop, include, obedient, policy, chunks):
    """Whoever writes it first: a thread that reads earlier goes on, and what reads later is no part of the answer."""
    reference = Reference(seed, rules(3), 0)
    engine, prompt = Engine(seed, obedient, chunks), [1 + seed % len(LETTERS)]
    driver = Driver(engine, policy)
    answer = Answer(prompt, reference.rules, Limits(None, 10_000, (), include, {stop}), Letters())
    driver.add(answer)
    driver.run(engine.step)
    whole = [token for token, _, _, _ in reference.write(prompt, prompt, 1, len(prompt))]
    until = whole.index(stop) if stop in whole else len(whole)
    assert [one.token for one in answer.read().tokens] == (whole[: until + 1] if stop in whole else [*whole, EOS])
    assert answer.text == Letters().decode(whole[: until + include], skip_special_tokens=True)
    assert (answer.finish_reason, answer.stop_reason) == (("stop", stop) if stop in whole else ("eos", None))
    assert not engine.running and len(driver) == driver.threads == 0


def test_a_seed_is_drawn_of_what_a_thread_sees_and_has_64_bits():
    answer = Answer([1, 2], ControlTokens(fork_token_id=FORK, child_token_id=CHILD), Limits(None, 100), Letters())
    root = ThreadRequest(0, answer, answer.tree.threads[0], (1, 2), (), {}, 10)
    child, sibling = (ThreadRequest(0, answer, answer.tree.threads[0], path, (), {}, 10) for path in ((1, 2, 3), (1, 2, 4)))
    assert root.seed(7) == 7 and len({one.seed(7, n) for one in (root, child, sibling) for n in (0, 1)}) == 6
    for one in (root, child, sibling):
        assert all(-(2**63) <= one.seed(given, n) < 2**63 for given in (2**63 - 1, -(2**63), 0) for n in (0, 127))


@pytest.fixture(scope="module")
def whole_paths():
    """The engine that `docs/engines.md` shows."""
    namespace = {}
    exec(padded_code(ROOT / "docs" / "engines.md")[0], namespace)
    return namespace["WholePaths"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("settings", [{}, {"max_depth": 2}, {"fork_bias": 3.0}, {"fork_bias": -torch.inf}])
def test_an_engine_of_thirty_lines_writes_what_generate_writes(whole_paths, apar_llama, policy, settings):
    prompts, forks = random_prompts(3, seed=2), 0
    engine = whole_paths(apar_llama)
    driver = Driver(engine, policy)
    rules = ControlTokens(fork_token_id=FORK, child_token_id=CHILD, eos_token_ids=frozenset({EOS}), **settings)
    answers = [Answer(prompt, rules, Limits(None, 500), letter_tokenizer()) for prompt in prompts]
    for answer in answers:
        driver.add(answer)
    driver.run(engine.step)
    for prompt, answer in zip(prompts, answers, strict=True):
        tree = apar_llama.generate(
            torch.tensor([prompt]), apar=AparConfig(**settings), max_new_tokens=2000, return_dict_in_generate=True
        ).trees[0]
        assert answer.tree.token_ids == tree.token_ids and answer.tree.closing_ids == tree.closing_ids
        assert sorted(one.path_ids for one in answer.tree.threads) == sorted(one.path_ids for one in tree.threads)
        forks += len(tree.threads) - 1
    assert forks > 1 or settings.get("fork_bias") == -torch.inf
    assert not engine.running and len(driver) == driver.threads == 0
