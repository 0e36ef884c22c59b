"""Which guesses are fed, and how drawn ones are kept: against what the formulas say, by counting."""

import pytest
import torch
from transformers import LogitsProcessorList

from conftest import CHILD, FORK, VOCABULARY
from hf_apar import ConfigurationError
from hf_apar.choice.paths import Context
from hf_apar.choice.sampling import Sampler
from hf_apar.protocol import ControlTokens
from hf_apar.speculation.drafting import Drafting, Outcome
from hf_apar.speculation.proposer import Draft, Proposer, Run
from hf_apar.tree.budget import BranchBudget, RowBudget
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


def test_a_draft_that_is_a_tree_knows_its_ways():
    draft = Draft([FORK, 3, 4, 5], parents=[-1, -1, 1, 1])
    assert [draft.way(place) for place in range(-1, 4)] == [[], [0], [1], [1, 2], [1, 3]]
    assert (
        draft.after(-1, 3) == 1 and draft.after(1, 5) == 3 and draft.after(0, 5) is None and draft.after(-1, CHILD) is None
    )
    assert (draft.first(3).tokens, draft.first(3).parents) == ([FORK, 3, 4], [-1, -1, 1]) and draft.first(9) is draft
    chain = Draft([7, 8], drawn_from=torch.eye(VOCABULARY)[:2])
    assert chain.after(-1, 7) == 0 and chain.after(0, 8) == 1 and chain.after(-1, 8) is None
    assert chain.first(1).drawn_from.shape == (1, VOCABULARY)


class Fixed(Proposer):
    """Proposes the same draft for every thread, and notes what it was asked for."""

    def __init__(self, draft, longest=5, schedule="constant"):
        self.draft, self.longest, self.schedule, self.asked = draft, longest, schedule, []

    def propose(self, rows, limits):
        self.asked.append([list(lengths) for lengths in limits])
        return [[self.draft for _ in row.live] for row in rows]


def drafting_of(model, proposer):
    config = ControlTokens(fork_token_id=FORK, child_token_id=CHILD)
    sampler = Sampler(LogitsProcessorList(), config, torch.zeros(1, 1, dtype=torch.long), pad_token_id=0, do_sample=False)
    return Drafting(proposer, Run(model, sampler, config, torch.device("cpu")))


def rows_of(*threads):
    """Rows with so many live threads each."""
    rows = [GrowingTree([1, 2], ControlTokens(fork_token_id=FORK, child_token_id=CHILD), max_threads=64) for _ in threads]
    for row, count in zip(rows, threads, strict=True):
        for token in [5, FORK] * (count - 1):
            row.write(row.live[-1], token)
    return rows


def sizes(drafts):
    return [[len(draft.tokens) for draft in row] for row in drafts]


@pytest.mark.parametrize(
    ("threads", "shares"),
    [
        ((1,), [[5]]),
        ((5,), [[5] * 5]),
        ((6, 1), [[4] * 4 + [3] * 2, [3]]),  # 25 of 32 tokens are left
        ((24, 4), [[1] * 4 + [0] * 20, [0] * 4]),
        ((40,), [[0] * 40]),
    ],
)
def test_a_step_has_room_for_so_many_guesses_shared_evenly_in_reading_order(apar_llama, threads, shares):
    proposer, rows = Fixed(Draft([7] * 9)), rows_of(*threads)
    drafts = drafting_of(apar_llama, proposer).propose(rows, [RowBudget(1000)] * len(rows))
    assert proposer.asked == [shares] and sizes(drafts) == shares


def test_no_draft_goes_beyond_what_a_row_may_write_or_a_model_can_choose(apar_llama):
    def fed(draft, budget):
        return sizes(drafting_of(apar_llama, Fixed(draft)).propose(rows_of(2), [RowBudget(budget)]))

    assert fed(Draft([7, 8, 9]), 7) == [[3, 0]] and fed(Draft([7, 8, 9]), 2) == fed(Draft([7, 8, 9]), 1) == [[0, 0]]
    assert fed(Draft([7, FORK, 9]), 99) == [[2, 2]] and fed(Draft([VOCABULARY]), 99) == [[0, 0]]
    drawn = Draft([7, CHILD, 9], drawn_from=torch.eye(VOCABULARY)[[7, CHILD, 9]])
    assert fed(drawn, 99) == [[3, 3]], "what was drawn is judged by its chance"


def test_nothing_is_asked_for_beyond_what_a_row_or_a_branch_may_write(apar_llama):
    """An assistant would read positions that it does not have."""
    rows = rows_of(3)
    for budget, asked in ((RowBudget(9), [5, 1, 0]), (RowBudget(2), [0, 0, 0]), (RowBudget(99), [5, 5, 5])):
        proposer = Fixed(Draft([7] * 5))
        drafting_of(apar_llama, proposer).propose(rows, [budget])
        assert proposer.asked == [[asked]]
    ((first, *_),) = (row.live for row in rows)
    written, held = len(first.path_ids) - first.start, len(rows[0].slots(first))
    for budget, asked in ((BranchBudget(written + 3), 2), (BranchBudget(1, held + 4), 3), (BranchBudget(written + 1), 0)):
        proposer = Fixed(Draft([7] * 5))
        drafting_of(apar_llama, proposer).propose(rows, [budget])
        assert proposer.asked[0][0][0] == asked


def test_without_a_proposer_there_are_empty_drafts(apar_llama):
    assert sizes(drafting_of(apar_llama, None).propose(rows_of(2, 1), [RowBudget(9)] * 2)) == [[0, 0], [0]]


def test_schedules_of_transformers(apar_llama):
    kept = {"constant": [[4, 4]], "heuristic": [[6, 3]]}
    for schedule, lengths in kept.items():
        proposer, rows = Fixed(Draft([7] * 4), longest=4, schedule=schedule), rows_of(2)
        drafting = drafting_of(apar_llama, proposer)
        ((first, second),) = drafting.propose(rows, [RowBudget(99)])
        one, other = rows[0].live
        drafting.judged([Outcome(0, one, first, 4, 0), Outcome(0, other, second, 2, 0)], lambda states: states)
        drafting.propose(rows, [RowBudget(99)])
        assert proposer.asked == [[[4, 4]], lengths]
        assert [(it.drafts, it.proposed, it.accepted) for it in (one, other)] == [(1, 4, 4), (1, 4, 2)]
    for schedule in ("linear", None):
        with pytest.raises(ConfigurationError, match=f"num_assistant_tokens_schedule is {schedule!r}"):
            drafting_of(apar_llama, Fixed(Draft(), schedule=schedule))


def test_what_is_no_tree_of_guesses_is_refused():
    """A guess that follows itself would never end."""
    for parents, drawn_from in (([1, 0], None), ([-1], None), ([-2, 0], None), ([-1, 0], torch.eye(VOCABULARY)[:2])):
        with pytest.raises(ConfigurationError, match=r"2 tokens .* earlier one or -1, and drawn_from to chains"):
            Draft([5, 6], parents, drawn_from)


@pytest.mark.parametrize("made", [None, [], [[]], [[Draft()]], [[[7], [7]]], [Draft()]], ids=repr)
def test_a_proposer_that_returns_another_shape_is_told_so(apar_llama, made):
    class Off(Proposer):
        def propose(self, rows, limits):
            return made

    with pytest.raises(ConfigurationError, match=r"Off.propose gave .* a Draft for each live thread: \[2\]"):
        drafting_of(apar_llama, Off()).propose(rows_of(2), [RowBudget(9)])
