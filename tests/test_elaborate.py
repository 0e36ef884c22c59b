"""Answers in parts, evened out: every detail reaches its length, nothing else changes, and the parts stay the same."""

import json
import random

import pytest

from byte_tokenizer import byte_tokenizer
from field_tokenizers import MAKERS
from hf_apar.data.distillation.distill import TextAnswer, read_answers
from hf_apar.data.distillation.elaborate import CLOSING_TOKENS, MORE_TOKENS, elaborate
from hf_apar.data.distillation.languages import LANGUAGES
from hf_apar.data.distillation.samplers import Continuation, Task
from hf_apar.data.extraction.markdown import extract
from hf_apar.errors import DataError
from hf_apar.text.chat import encode_chat

LEAST = 60  # bytes are tokens here
SHORT = "Go to bed early each night."
LONG = "Take a walk in the park every day. It clears your mind and is free. It is good for dogs."
CLOSING = random.Random("How do I rest?").choice(LANGUAGES["en"].closings)
LIST = f"Rest:\n\n1. **Sleep**: {SHORT}\n2. **Walks**: {LONG}\n3. **Music**: {SHORT}"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


class Says:
    """Goes on in a line with ``more``, and with ``closing`` where it may end, both cut where the task says."""

    def __init__(self, more, closing=" rest well."):
        self.more, self.closing, self.tasks = more, closing, []

    def __call__(self, tasks):
        self.tasks += tasks
        return [self._in_line(task) if task.sentence_after else self._closed(task) for task in tasks]

    def _in_line(self, task):
        ends = [end for end in range(task.sentence_after, task.max_new_tokens) if self.more[:end].endswith((".", "!"))]
        return Continuation(self.more[: ends[0] if ends else task.max_new_tokens], bool(ends))

    def _closed(self, task):
        return Continuation(self.closing[: task.max_new_tokens], len(self.closing) <= task.max_new_tokens)


def run(tokenizer, path, sample, *responses, **options):
    answers = [TextAnswer("How do I rest?", response) for response in responses]
    list(elaborate(sample, tokenizer, answers, path, min_detail_tokens=LEAST, **options))
    return [answer.response for answer in read_answers(path)]


def test_details_end_with_the_sentence_that_makes_them_long_enough(tokenizer, tmp_path):
    sample = Says(" It helps. You will see that it does so very soon. And then")
    (text,) = run(tokenizer, tmp_path / "a.jsonl", sample, LIST)
    grown = f"{SHORT} It helps. You will see that it does so very soon."
    cut = "Take a walk in the park every day. It clears your mind and is free."
    assert text == f"Rest:\n\n1. **Sleep**: {grown}\n2. **Walks**: {cut}\n3. **Music**: {grown}\n\n{CLOSING} rest well."
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "How do I rest?"}])
    missing = LEAST - len(f" {SHORT}")

    def ids(text):
        return [*prompt, *tokenizer.encode(text, add_special_tokens=False)]

    first, third, closing = sample.tasks
    assert first == Task(ids(LIST.partition("\n2.")[0]), missing + MORE_TOKENS, sentence_after=missing)
    assert third == Task(ids(LIST), missing + MORE_TOKENS, sentence_after=missing)
    assert closing == Task(ids(f"{LIST}\n\n{CLOSING}"), CLOSING_TOKENS, stop="\n")


@pytest.mark.parametrize("name", MAKERS)
def test_t2_what_is_gone_on_with_reads_as_it_was(name, tmp_path):
    tokenizer, sample = MAKERS[name](), Says(" It helps. You will see that it does so very soon. And then")
    (text,) = run(tokenizer, tmp_path / "a.jsonl", sample, LIST)
    assert f"1. **Sleep**: {SHORT} It helps. You" in text and "  " not in text
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "How do I rest?"}])
    begun = [LIST.partition("\n2.")[0], LIST, f"{LIST}\n\n{CLOSING}"]
    read = [tokenizer.decode(task.prompt[len(prompt) :]) for task in sample.tasks]
    assert [one for one in begun if one in read] == begun and set(read) <= {*begun, LIST.partition("\n3.")[0]}


def test_each_detail_that_is_too_short_is_gone_on_with_for_what_it_lacks(tokenizer, tmp_path):
    sample = Says(" It helps. You will see that it does so very soon. And then")
    details = [SHORT, LONG, "I do as I do."]
    items = [f"{number}. **Way {number}**: {detail}" for number, detail in enumerate(details, start=1)]
    (text,) = run(tokenizer, tmp_path / "a.jsonl", sample, "Rest:\n\n" + "\n".join(items), closing=False)
    asked = [one for one in details if len(f" {one}") < LEAST]
    assert [task.sentence_after for task in sample.tasks] == [LEAST - len(f" {one}") for one in asked]
    assert all(len(child.text) >= LEAST for child in extract(text).children)


@pytest.mark.parametrize(
    ("more", "grown"),
    [
        (" no sentence of it ends before the limit is reached, so", ""),
        (" It helps. 2. **Walks**: You should go. Do. Go. Walk.", " It helps."),  # what goes on to the next item
        (" It helps. Very much **so**. Indeed. And then", " It helps."),
        (" It helps. - One. Two is more than one. Three.", " It helps."),
    ],
)
def test_what_is_no_sentence_of_the_detail_is_left_out(tokenizer, tmp_path, more, grown):
    (text,) = run(tokenizer, tmp_path / "a.jsonl", Says(more), LIST, closing=False)
    assert text.startswith(f"Rest:\n\n1. **Sleep**: {SHORT}{grown}\n2. **Walks**")


@pytest.mark.parametrize(
    "response",
    [
        "Sleep. It is good for you.",
        "1. **Sleep**:\n   - Early: go to bed at nine.\n   - Long: eight hours.\n2. **Walks**:\n   - Far: ten miles or so.\n"
        "   - Fast: run if you can.\n3. **Music**:\n   - Soft: no drums in the evening.\n   - Slow: waltz at home.\n\nBye.",
    ],
    ids=["what does not fork", "details of several lines"],
)
def test_other_answers_stay_as_they_are(tokenizer, tmp_path, response):
    assert run(tokenizer, tmp_path / "a.jsonl", Says(" It helps. You see. It does so indeed. So"), response) == [response]


def test_an_answer_keeps_its_parts_or_stays_as_it_was(tokenizer, tmp_path):
    sample = Says(" As in step 2, you will see that it helps very soon. And then", " **no** sentence.")
    assert extract(LIST).fork_count == 3
    assert run(tokenizer, tmp_path / "a.jsonl", sample, LIST) == [LIST]


def test_a_second_call_goes_on_where_the_first_one_stopped(tokenizer, tmp_path):
    path, sample = tmp_path / "a.jsonl", Says(" It helps. You will see that it does so very soon. And then")
    answers = [TextAnswer(f"How do I rest {number} times?", LIST) for number in range(5)]
    steps = elaborate(sample, tokenizer, answers, path, min_detail_tokens=LEAST, batch_size=2)
    assert next(steps) == 2
    steps.close()
    with pytest.raises(DataError, match="other settings"):
        next(elaborate(sample, tokenizer, answers, path, min_detail_tokens=LEAST, batch_size=2, made_with="another"))
    assert list(elaborate(sample, tokenizer, answers, path, min_detail_tokens=LEAST, batch_size=2)) == [4, 5]
    prompts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert prompts == [answer.prompt for answer in answers]
