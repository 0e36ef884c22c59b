"""Which guesses are fed, and how drawn ones are kept: against what the formulas say, by counting."""

import time

import pytest
import torch
from transformers import LogitsProcessorList

from conftest import CHILD, FORK, VOCABULARY, left_padded, random_prompts, tiny_llama
from hf_apar import ConfigurationError
from hf_apar.choice.paths import Context
from hf_apar.choice.sampling import Sampler
from hf_apar.protocol import ControlTokens
from hf_apar.speculation import calibration
from hf_apar.speculation.assistant import AssistantDrafts
from hf_apar.speculation.calibration import StepTimes, step_times
from hf_apar.speculation.lengths import DraftLengths
from hf_apar.speculation.lookup import PromptLookup
from hf_apar.speculation.medusa import MedusaDrafts, MedusaHeads
from hf_apar.speculation.proposer import Draft, Proposer, Run
from hf_apar.speculation.together import Together
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import Thread


def test_drawn_guesses_are_kept_as_often_as_may_be_and_the_choice_has_the_models_distribution():
    torch.manual_seed(0)
    count, vocabulary = 40_000, 6
    logits = torch.randn(vocabulary)
    logits[4] = -torch.inf  # [Child], as the sampler bans it
    ours, theirs = logits.softmax(-1), torch.randn(vocabulary).mul(1.5).softmax(-1)
    theirs[4] = 0.0
    theirs /= theirs.sum()
    guesses = torch.multinomial(theirs, count, replacement=True).tolist()
    config = ControlTokens(fork_token_id=3, child_token_id=4)
    sampler = Sampler(LogitsProcessorList(), config, torch.zeros(1, 1, dtype=torch.long), pad_token_id=0, do_sample=True)
    root = Thread(0, None, 0, 1, [1])
    contexts = [Context(0, root, 0, banned=(4,), guess=guess, drawn_from=theirs) for guess in guesses]
    chosen = torch.tensor(sampler(logits.repeat(count, 1), contexts).tokens)
    kept = (chosen == torch.tensor(guesses)).double().mean()
    assert abs(kept - torch.minimum(ours, theirs).sum()) < 4 * 0.5 / count**0.5
    found = torch.bincount(chosen, minlength=vocabulary).double()
    expected = ours.double() * count
    seen = expected > 0
    assert found[~seen].sum() == 0
    chi_square = ((found - expected) ** 2 / expected)[seen].sum()
    assert chi_square < 4 + 4 * (2 * 4) ** 0.5, "four degrees of freedom, four standard deviations"


def thread(index=0):
    return Thread(index, None, 0, 1, [1])


def lengths(step, schedule=None, longest=4, making=lambda length, threads: 0.0, estimates=False):
    return DraftLengths(longest, schedule, step, making, estimates)


FLAT, LINEAR = StepTimes([1, 64], [1.0, 1.0]), StepTimes([1, 64], [1.0, 64.0])


def test_drafts_are_long_where_a_wide_step_is_free_and_absent_where_it_costs_as_much_as_more_steps():
    assert lengths(FLAT).limits([[thread(), thread(1)]]) == [[4, 4]]
    assert lengths(LINEAR).limits([[thread(), thread(1)]]) == [[0, 0]]
    assert lengths(FLAT, making=lambda length, threads: 10.0 * length).limits([[thread()]]) == [[0]]


def test_a_thread_whose_guesses_are_kept_gets_more_of_them():
    some = lengths(StepTimes([1, 9, 64], [1.0, 2.0, 40.0]))
    good, bad = thread(0), thread(1)
    for _ in range(20):
        some.judged(0, good, Draft([1, 1, 1]), 3)
        some.judged(0, bad, Draft([1, 1, 1]), 0)
    ((of_good, of_bad),) = some.limits([[good, bad]])
    assert of_good == 4 and of_bad == 0
    many = [[thread(index) for index in range(60)]]
    assert sum(some.limits(many)[0]) < 60, "many threads leave less room each"


def test_schedules_of_transformers():
    constant, heuristic = lengths(LINEAR, "constant"), lengths(LINEAR, "heuristic")
    for some in (constant, heuristic):
        some.judged(0, thread(0), Draft([1, 1, 1, 1]), 4)
        some.judged(0, thread(1), Draft([1, 1, 1, 1]), 2)
    threads = [[thread(0), thread(1)]]
    assert constant.limits(threads) == [[4, 4]]
    assert heuristic.limits(threads) == [[6, 3]]
    with pytest.raises(ConfigurationError, match="num_assistant_tokens_schedule"):
        lengths(FLAT, "linear")


def test_of_trees_of_guesses_the_worthiest_are_fed():
    some = lengths(StepTimes([1, 2, 3, 4], [1.0, 1.2, 1.4, 9.0]), estimates=True)
    tree = Draft([5, 6, 7], parents=[-1, -1, 0], worth=[0.5, 0.05, 0.4])
    ((kept,),) = some.trimmed([[tree]])
    assert (kept.tokens, kept.parents, kept.worth) == ([5, 7], [-1, 0], [0.5, 0.4])
    for _ in range(50):
        some.judged(0, thread(), tree, 0)  # it promised half a token and gave none
    assert some.trimmed([[tree]])[0][0].tokens == []
    assert some.limits([[thread()]]) == [[0]], "where nothing paid, nothing is tried for a while"


def test_the_time_of_a_step_is_measured_once_for_each_model(monkeypatch):
    model = tiny_llama()
    measured = step_times(model)
    assert all(low <= high for low, high in zip(measured.seconds, measured.seconds[1:], strict=False))
    assert 0 < measured(1) <= measured(500)
    monkeypatch.setattr(calibration, "_measured", lambda model, device: time.sleep(99))
    assert step_times(model) is measured


def test_a_draft_that_is_a_tree_knows_its_ways():
    draft = Draft([FORK, 3, 4, 5], parents=[-1, -1, 1, 1], worth=[0.4, 0.3, 0.2, 0.1])
    assert [draft.way(place) for place in range(-1, 4)] == [[], [0], [1], [1, 2], [1, 3]]
    assert (
        draft.after(-1, 3) == 1 and draft.after(1, 5) == 3 and draft.after(0, 5) is None and draft.after(-1, CHILD) is None
    )
    assert draft.keep([1, 3]).parents == [-1, 0]
    chain = Draft([7, 8], drawn_from=torch.eye(VOCABULARY)[:2])
    assert chain.after(-1, 7) == 0 and chain.after(0, 8) == 1 and chain.after(-1, 8) is None
    assert chain.keep(range(1)).drawn_from.shape == (1, VOCABULARY)


class Fixed(Proposer):
    """Proposes the same draft for every thread."""

    def __init__(self, draft):
        self.draft, self.longest = draft, len(draft.tokens)

    def propose(self, rows, limits):
        return [[self.draft for _ in row.live] for row in rows]


def test_together_their_guesses_are_one_tree_and_the_text_tells_what_they_are_worth(apar_llama):
    tree = Draft([5, 6, 7], parents=[-1, -1, 0], worth=[0.5, 0.2, 0.4])
    both = Together(Fixed(tree), Fixed(Draft([5, 7, 9])))
    assert both.longest == 6
    config = ControlTokens(fork_token_id=FORK, child_token_id=CHILD)
    sampler = Sampler(LogitsProcessorList(), config, torch.zeros(1, 1, dtype=torch.long), pad_token_id=0, do_sample=False)
    both.start(Run(apar_llama, sampler, config, torch.device("cpu")))
    row = GrowingTree([1, 2], ControlTokens(fork_token_id=FORK, child_token_id=CHILD), max_threads=4)
    (root,) = row.live
    ((first,),) = both.propose([row], [[6]])
    assert (first.tokens, first.parents) == ([5, 6, 7, 9], [-1, -1, 0, 2])
    assert first.worth[:3] == [0.5, 0.2, 0.4] and 0 < first.worth[3] < 0.1
    for _ in range(40):
        for token in (5, 7, 9, 3):  # the chain is right each time
            row.write(root, token)
        ((later,),) = both.propose([row], [[6]])
    assert later.worth[0] > 0.8 and later.worth[0] >= later.worth[2] >= later.worth[3] > 0.6
    with pytest.raises(ConfigurationError, match="at least one"):
        Together()
    drawn = Together(Fixed(Draft([5], drawn_from=torch.ones(1, 48) / 48)))
    drawn.start(Run(apar_llama, sampler, config, torch.device("cpu")))
    with pytest.raises(ConfigurationError, match="stand alone"):
        drawn.propose([row], [[6]])


def test_heads_and_lookup_together_change_no_text(apar_llama):
    inputs = left_padded(random_prompts(4, seed=3))
    options = {"apar": True, "max_new_tokens": 300, "return_dict_in_generate": True}
    alone = apar_llama.generate(**inputs, **options)
    heads = MedusaHeads(32, 16, torch.arange(CHILD), 2)
    for schedule in ("constant", None):
        both = Together(MedusaDrafts(heads), PromptLookup(3), schedule=schedule)
        out = apar_llama.generate(**inputs, **options, proposer=both)
        assert [tree.token_ids for tree in out.trees] == [tree.token_ids for tree in alone.trees]
    with pytest.raises(ConfigurationError, match="stand alone"):
        assistant = AssistantDrafts(tiny_llama(), apar_llama, (FORK, CHILD), num_tokens=2, schedule="constant")
        apar_llama.generate(**inputs, **options, do_sample=True, proposer=Together(assistant, schedule="constant"))
