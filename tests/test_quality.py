"""What is counted against a fork, and for an answer."""

import pytest
import torch

from conftest import tiny_llama
from hf_apar.data.distillation.questions import families
from hf_apar.evaluation.answers import Answered
from hf_apar.evaluation.likelihood import mean_nll
from hf_apar.evaluation.rows import Row
from hf_apar.evaluation.suites import Prompt, own
from hf_apar.tree.threads import ParagraphTree, Thread


class Letters:
    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(map(chr, token_ids))


def tree_of(*details):
    threads = [Thread(0, None, 0, 1, [], tokens=list(b"1. Water:\n2. Money:\n3. Time:"))]
    threads += [Thread(number, 0, 9, 2, [], tokens=list(map(ord, text))) for number, text in enumerate(details, start=1)]
    return ParagraphTree(threads)


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        (["It saves a lot of it.", "It costs less than before.", "Nobody waits."], 0),
        (["It saves a lot of it.", "It saves a lot of it.", "Nobody waits."], 1),
        (["It saves a lot of it, day by day.", "", "  \n"], 2),
        (["Yes.", "yes", "No."], 1),
        ([], 0),
    ],
)
def test_empty_children_and_those_that_repeat_a_sibling_are_false_forks(details, expected):
    prompt = Prompt("1", "own", "any", None, ({"role": "user", "content": "?"},))
    answered = Answered(key="1", arm="apar", text="", ended=True, tree=tree_of(*details).to_dict())
    assert Row(prompt, answered, Letters()).false_forks == expected


def test_no_template_asks_what_a_model_is_evaluated_on():
    asked = {prompt for family in families().values() for prompt in family.prompts()}
    assert asked.isdisjoint(prompt.text for prompt in own())


def test_the_likelihood_is_that_of_the_answers_tokens_alone():
    model, prompt, answer = tiny_llama(), [1, 2, 3], [6, 7, 8]
    expected = []
    for place, token in enumerate(answer):
        logits = model(input_ids=torch.tensor([prompt + answer[:place]])).logits[0, -1].float()
        expected.append(-logits.log_softmax(-1)[token].item())
    assert mean_nll(model, prompt, answer) == pytest.approx(sum(expected) / 3, abs=1e-5)
