"""What is counted against a fork, and for an answer."""

import math
from dataclasses import replace

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from conftest import tiny_llama
from field_tokenizers import llama_metaspace, llama_normalizer
from hf_apar.data.distillation.questions import families
from hf_apar.text.chat import encode_chat
from hf_apar.text.encoding import encode_answer
from hf_apar.training.evaluation import EITHER, IN_PARTS, WHOLE, likelihoods, plain_answers
from hf_apar.training.figures import Judged
from hf_apar.training.quality import distinct, false_forks, mean_nll
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
    assert false_forks(tree_of(*details), Letters()) == expected


def test_no_template_asks_what_a_model_is_evaluated_on():
    asked = {prompt for family in families().values() for prompt in family.prompts()}
    assert asked.isdisjoint(IN_PARTS + WHOLE + EITHER)


def test_a_text_that_loops_is_less_varied():
    assert distinct(["one two three four five"]) == 1.0
    assert distinct(["one two one two one two"]) < 0.5
    assert distinct(["", "word"]) == 0.0


def test_the_likelihood_is_that_of_the_answers_tokens_alone():
    model = tiny_llama()
    prompts, answers = [[1, 2, 3], [4, 5]], [[6, 7], [8]]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        for place, token in enumerate(answer):
            logits = model(input_ids=torch.tensor([prompt + answer[:place]])).logits[0, -1].float()
            expected.append(-logits.log_softmax(-1)[token].item())
    assert mean_nll(model, prompts, answers) == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert mean_nll(model, [[1]], [[]]) == 0.0 and not math.isnan(mean_nll(model, [], []))


@pytest.mark.parametrize("make", [byte_tokenizer, llama_metaspace, llama_normalizer])
def test_the_base_judges_three_ways_of_answering_each_answer_alike(make):
    """Against each text alone; its own answers are what it writes greedily, so who writes just these has its figure."""
    tokenizer = make()
    base = tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    prompts = {text: encode_chat(tokenizer, [{"role": "user", "content": text}]) for text in ("Why?", "Name a few trees.")}
    judged = []
    for text, ids in prompts.items():
        own = base.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=20, repetition_penalty=1.1)[0, len(ids) :]
        plain = tokenizer.decode(own, skip_special_tokens=True)
        judged.append(
            Judged(
                prompt=text, text="Oak, ash." * len(judged) + "Elm.", should_fork=None, children=0, ended=True, looped=False,
                false_forks=0, tokens=1, steps=1, plain=plain, plain_ended=True,
            )
        )  # fmt: skip

    def alone(texts):
        answers = [encode_answer(tokenizer, ids, text) for ids, text in zip(prompts.values(), texts, strict=True)]
        return sum(mean_nll(base, [ids], [ours]) for ids, ours in zip(prompts.values(), answers, strict=True)) / 2

    own = plain_answers(base, tokenizer, list(prompts), repetition_penalty=1.1, max_new_tokens=20)
    figures = likelihoods(judged, base, tokenizer, own)
    assert figures["nll"] == pytest.approx(alone([one.text for one in judged]), abs=1e-5)
    assert figures["nll_base"] == figures["nll_plain"] == pytest.approx(alone([one.plain for one in judged]), abs=1e-5)
    said_nothing = [*judged, replace(judged[0], text="", plain="")]  # an answer without tokens is no likely one
    assert likelihoods(said_nothing, base, tokenizer, [*own, ""]) == figures
