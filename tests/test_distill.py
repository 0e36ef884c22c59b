"""Self-distillation: what ends is kept whole, what does not is left out, and a stop loses nothing."""

import copy
import itertools
import json
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from byte_tokenizer import byte_tokenizer
from field_tokenizers import DUMMY_PREFIX, MAKERS
from hf_apar.data.distillation import batches
from hf_apar.data.distillation.batches import BatchReport, TextAnswer
from hf_apar.data.distillation.distill import (
    CUT_OFF,
    EMPTY,
    NO_LEAD,
    TOO_FEW,
    TOO_LONG,
    TOO_MANY,
    Question,
    distill,
    first_sentence,
    opened_after,
    read_answers,
)
from hf_apar.data.distillation.questions import OPENINGS, families, open_lists, template_questions
from hf_apar.data.distillation.samplers import LEAD_TOKENS, Continuation, Task, TransformersSampler, _Row, line_ends
from hf_apar.errors import DataError
from hf_apar.text.chat import encode_chat
from hf_apar.text.encoding import encode_text, token_texts
from hf_apar.training.recipe import Recipe


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        model.lm_head.weight[tokenizer.eos_token_id] *= 2.0
    return model


QUESTIONS = [Question(f"Question {number}?", "Here:\n\n1. **" if number % 2 else "") for number in range(12)]


def run(model, tokenizer, path, max_new_tokens=60, **options):
    torch.manual_seed(0)
    sample = TransformersSampler(model, tokenizer, **options)
    return list(distill(sample, tokenizer, QUESTIONS, path, batch_size=4, max_new_tokens=max_new_tokens))


def greedy(model, tokenizer, prompt, limit, penalty):
    options = {"max_new_tokens": limit, "do_sample": False, "repetition_penalty": penalty}
    new = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    ended = tokenizer.eos_token_id in new
    text = tokenizer.decode(new[: new.index(tokenizer.eos_token_id)] if ended else new, skip_special_tokens=True)
    return text, ended


@pytest.mark.parametrize(("penalty", "temperature"), [(1.0, 0.0), (1.0, 1e-4), (1.3, 1e-4)])
def test_an_answer_without_chance_is_what_generate_writes(model, tokenizer, tmp_path, penalty, temperature):
    """Rows end at different times and leave the batch: each answer must still be the model's own, to the byte."""
    path = tmp_path / "answers.jsonl"
    options = {"temperature": temperature, "repetition_penalty": penalty, "straggler_share": 0.0}
    assert run(model, tokenizer, path, **options) == [4, 8, 12]
    expected = []
    for question in QUESTIONS:
        prompt = encode_chat(tokenizer, [{"role": "user", "content": question.prompt}])
        lead = ""
        if question.opening:
            lead = opened_after(first_sentence(greedy(model, tokenizer, prompt, LEAD_TOKENS, penalty)[0]), question.opening)
        text, ended = greedy(model, tokenizer, prompt + tokenizer.encode(lead, add_special_tokens=False), 60, penalty)
        if ended:
            expected.append((question.prompt, lead + text))
    assert [(answer.prompt, answer.response) for answer in read_answers(path)] == expected
    assert 0 < len(expected) < len(QUESTIONS), "some answers must end and some must not"


def says(tokenizer, chain):
    """A model whose next token is a function of its last one: each token of ``chain`` is followed by the next."""
    assert len(set(chain)) == len(chain)
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size + size % 2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:] = torch.eye(size, config.hidden_size)
        model.lm_head.weight.zero_()
        for last, following in itertools.pairwise(chain):
            model.lm_head.weight[following, last] = 1.0
    return model


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "bytes"])
def test_t2_what_is_written_after_an_opening_keeps_its_spaces(name, tmp_path):
    tokenizer, path = MAKERS[name](), tmp_path / "answers.jsonl"
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "How?"}])
    texts = token_texts(tokenizer)
    grow, well, dot = (texts.index(text) for text in (" grow", " well", "."))
    own = [prompt[-1], grow, dot, tokenizer.eos_token_id]
    (*_, opened) = encode_text(tokenizer, "**Oak**")
    model = says(tokenizer, own)
    with torch.no_grad():
        model.lm_head.weight[well, opened] = model.lm_head.weight[tokenizer.eos_token_id, well] = 1.0
    sample = TransformersSampler(model, tokenizer, temperature=0.0)
    questions = [Question("How?"), Question("How?", "**Oak**")]
    list(distill(sample, tokenizer, questions, path))
    first = "grow." if name in DUMMY_PREFIX else " grow."  # a decoder with a dummy prefix drops the first space
    lead = "grow. " if name in DUMMY_PREFIX else ""  # a sentence must begin with a letter
    assert [answer.response for answer in read_answers(path)] == [first, f"{lead}**Oak** well"]


class Told:
    """Writes what it is told, keeping to the stop and the limit (in letters) of each task."""

    def __init__(self, lead, text):
        self.lead, self.text, self.tasks = lead, text, []

    def __call__(self, tasks):
        self.tasks += tasks
        return [self._write(task) for task in tasks]

    def _write(self, task):
        text = self.lead if task.max_new_tokens == LEAD_TOKENS else self.text
        before, stop, _ = text.partition(task.stop) if task.stop else (text, "", "")
        return Continuation(before[: task.max_new_tokens], bool(stop) or len(before) <= task.max_new_tokens)


ITEMS = "".join(f"A{number}**: it helps\n{number + 1}. **" for number in range(1, 12))


@pytest.mark.parametrize(
    ("prompt", "lead", "items"),
    [
        ("How do I rest?", " ways to rest:\n", 4),
        ("How do I rest?", " three ways to rest:\n", 3),
        ("Give me 2 ways to rest.", " ways to rest:\n", 2),
        ("List five ways to rest.", " ways to rest:\n", 5),  # more than are allowed, and asked for
        ("How do I rest?", " ten ways to rest:\n", None),  # more than are allowed, of its own accord
        ("How do I rest?", " ways. And no list", None),  # no words for the gap
    ],
)
def test_a_list_ends_where_it_should(tokenizer, tmp_path, prompt, lead, items):
    path, sample = tmp_path / "answers.jsonl", Told(lead, ITEMS)
    question = Question(prompt, "Here are ...:\n\n1. **")
    list(distill(sample, tokenizer, [question], path, max_new_tokens=10**6, max_items=4))
    answers = read_answers(path)
    if items is None:
        assert answers == [] and len(sample.tasks) == 1
    else:
        start = f"Here are{lead.rstrip()}\n\n1. **"
        assert [answer.response for answer in answers] == [(start + ITEMS).partition(f"\n{items + 1}.")[0]]


def test_a_list_of_fewer_items_than_announced_is_dropped(tokenizer, tmp_path):
    sample = Told(" three ways:\n", "A**: it helps\n2. **B**: it does too")
    question = Question("How do I rest?", "Here are ...:\n\n1. **")
    list(distill(sample, tokenizer, [question], tmp_path / "few.jsonl", max_items=4))
    list(distill(sample, tokenizer, [question], tmp_path / "any.jsonl"))
    assert [len(read_answers(tmp_path / name)) for name in ("few.jsonl", "any.jsonl")] == [0, 1]


def test_a_list_that_a_model_begins_by_itself_ends_too(tokenizer, tmp_path):
    """What a larger model does unasked; prose and bullets are left alone."""
    ten = "Here are ten ways:\n\n1. **" + ITEMS
    cases = {
        ("How do I rest?", "Rest:\n\n1. **" + ITEMS): ("Rest:\n\n1. **" + ITEMS).partition("\n5.")[0],
        ("How do I rest?", "1. **" + ITEMS): ("1. **" + ITEMS).partition("\n5.")[0],
        ("Give me two ways.", "Rest:\n\n1. **" + ITEMS): ("Rest:\n\n1. **" + ITEMS).partition("\n3.")[0],
        ("How do I rest?", ten): TOO_MANY,
        ("How do I rest?", "Here are two ways:\n\n1. **" + ITEMS): TOO_LONG,
        ("How do I rest?", "Four ways:\n\n1. **A**: b\n2. **C**: d"): TOO_FEW,
        ("Give me nine ways.", "- **A**: b\n- **C**: d"): "- **A**: b\n- **C**: d",
        ("Give me nine ways.", "Sleep well."): "Sleep well.",
    }
    for number, ((prompt, text), expected) in enumerate(cases.items()):
        path = tmp_path / f"{number}.jsonl"
        list(distill(Told("", text), tokenizer, [Question(prompt)], path, max_new_tokens=10**6, max_items=4))
        got = [answer.response for answer in read_answers(path)] or [*BatchReport.of(path).dropped]
        assert got == [expected], (prompt, text)


def test_what_is_dropped_is_counted_by_reason_over_all_calls(tokenizer, tmp_path):
    """`distill` dropped two thirds of the answers without a word."""
    path, opening = tmp_path / "answers.jsonl", "Here are ...:\n\n1. **"
    questions = [
        (Question("How?", opening), Told(" three ways:\n", "A**: it helps\n2. **B**: it does\n3. **C**: so"), None),
        (Question("How?", opening), Told(" three ways:\n", "A**: it helps\n2. **B**: it does too"), TOO_FEW),
        (Question("How?", opening), Told(" nine ways:\n", ITEMS), TOO_MANY),
        (Question("How?", opening), Told(" ways. And no list", ITEMS), NO_LEAD),
        (Question("Why?"), Told("", "x" * 61), CUT_OFF),
        (Question("Who?"), Told("", ""), EMPTY),
        (Question("Where?"), Told("", "x" * 61), CUT_OFF),
    ]
    for number in range(1, 1 + len(questions)):
        sample, asked = questions[number - 1][1], [question for question, _, _ in questions[:number]]
        list(distill(sample, tokenizer, asked, path, max_new_tokens=60, max_items=4))
    reasons = [reason for _, _, reason in questions if reason is not None]
    assert BatchReport.of(path) == BatchReport(7, 1, Counter(reasons))
    assert len(read_answers(path)) == 1
    report = json.loads((tmp_path / "answers.jsonl.report.json").read_text())
    assert report == {"asked": 7, "answers": 1, "dropped": dict(Counter(reasons))}


def test_a_prompt_that_the_chat_template_refuses_ends_no_run(tokenizer, tmp_path):
    template = tokenizer.chat_template
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% if 'no' in messages[0].content %}{{ raise_exception('not this') }}{% endif %}" + template
    path, questions = tmp_path / "a.jsonl", [Question(text) for text in ("yes?", "no?", "and?")]
    list(distill(Told("", "good"), tokenizer, questions, path))
    assert [answer.prompt for answer in read_answers(path)] == ["yes?", "and?"]
    assert any("not this" in reason for reason in BatchReport.of(path).dropped)


def test_a_tokenizer_may_have_more_tokens_than_the_model_has_rows(model, tokenizer):
    """As that of Gemma 3 1B: a banned token beyond the rows ended `elaborate`."""
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"unk_token": "<image>"})
    rows = model.get_output_embeddings().weight.shape[0]
    assert max(line_ends(larger)) >= rows
    task = Task(tokenizer.encode("Tea"), 9, sentence_after=8)
    one, other = (TransformersSampler(model, each, temperature=0.0)([task]) for each in (tokenizer, larger))
    assert one == other


def test_whole_answers_have_a_limit_of_their_own(tokenizer, tmp_path):
    sample = Told(" ways:\n", "x" * 60)
    questions = [Question("Why?"), Question("How?", "Here are ...:\n\n- **")]
    list(distill(sample, tokenizer, questions, tmp_path / "answers.jsonl", max_new_tokens=100, max_whole_tokens=50))
    assert [answer.prompt for answer in read_answers(tmp_path / "answers.jsonl")] == ["How?"]


def test_transformers_stops_where_it_is_told_to(model, tokenizer):
    sample = TransformersSampler(model, tokenizer, temperature=1e-4, straggler_share=0.0)
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": question.prompt}]) for question in QUESTIONS]
    free = sample([Task(prompt, 40) for prompt in prompts])
    prompt, free = max(zip(prompts, free, strict=True), key=lambda pair: len(pair[1].text))
    stop = free.text[5:7]
    short, other = sample([Task(prompt, 40, stop), Task(prompt, 3)])
    assert (short.text, short.ended) == (free.text.partition(stop)[0], True)
    assert not other.ended and free.text.startswith(other.text) and other.text


def test_what_must_stay_in_its_line_ends_with_a_sentence_there(model, tokenizer):
    """Beside rows that may end as they like: what is banned is the row's own affair."""
    banned = ["\n", tokenizer.bos_token, tokenizer.eos_token]
    assert [tokenizer.decode([token]) for token in line_ends(tokenizer)] == banned
    prompt, likely = (tokenizer.encode(text, add_special_tokens=False) for text in ("Rest", "\n. abcdefgh"))
    dice = copy.deepcopy(model)
    with torch.no_grad():
        eos = dice.lm_head.weight[tokenizer.eos_token_id].clone()
        for parameter in dice.model.layers.parameters():
            parameter.zero_()
        dice.model.embed_tokens.weight[:] = eos  # the same state everywhere: the likely ones are so at every step
        dice.lm_head.weight[:] = -9 * eos
        dice.lm_head.weight[[*likely, tokenizer.eos_token_id]] = eos
    (other_end,) = tokenizer.encode("h", add_special_tokens=False)
    dice.generation_config.eos_token_id = [tokenizer.eos_token_id, other_end]  # a detail must not end there
    torch.manual_seed(0)
    tasks = [Task(prompt, 60, sentence_after=20 * (number % 2)) for number in range(128)]
    written = TransformersSampler(dice, tokenizer)(tasks)
    assert any(one.ended for one in written[::2]) and any("\n" in one.text for one in written[::2])
    in_line = written[1::2]
    assert 0 < sum(one.ended for one in in_line) < len(in_line), "some must end and some must not"
    for one in in_line:
        assert "\n" not in one.text and ". " not in one.text[19:]
        assert 20 <= len(one.text) < 60 and one.text.endswith(".") if one.ended else len(one.text) == 60


def test_the_settings_of_a_checkpoint_have_no_part_in_it_and_stay(model, tokenizer):
    """They are for who talks to it; they stay even where what goes on with the prompt raises."""
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "How?"}])
    sample = TransformersSampler(model, tokenizer, temperature=0.0, straggler_share=0.0)
    expected = sample([Task(prompt, 20)])
    odd = copy.deepcopy(model)
    likely = tokenizer.encode(expected[0].text, add_special_tokens=False)
    odd.generation_config.update(repetition_penalty=9.0, suppress_tokens=likely, min_new_tokens=15, top_p=0.1)
    before = copy.deepcopy(vars(odd.generation_config))
    assert TransformersSampler(odd, tokenizer, temperature=0.0, straggler_share=0.0)([Task(prompt, 20)]) == expected
    odd.forward = None
    with pytest.raises(TypeError):
        TransformersSampler(odd, tokenizer)([Task(prompt, 20)])
    assert vars(odd.generation_config) == before


def test_the_last_that_write_are_not_waited_for(tokenizer):
    """Nine of ten end at once; the tenth, which would write for ever, counts as cut off."""
    prompts = [tokenizer.encode(letter, add_special_tokens=False) for letter in "aaaaaaaaab"]
    (a,), (b,) = prompts[0], prompts[-1]
    model = says(tokenizer, [a, tokenizer.eos_token_id])
    with torch.no_grad():
        model.lm_head.weight[b, b] = 1.0
    written = TransformersSampler(model, tokenizer, temperature=0.0)([Task(prompt, 60) for prompt in prompts])
    assert [one.ended for one in written] == [True] * 9 + [False] and len(written[-1].text) == 1
    waiting = TransformersSampler(model, tokenizer, temperature=0.0, straggler_share=0.0)
    assert len(waiting([Task(prompt, 60) for prompt in prompts])[-1].text) == 60


def test_an_opened_answer_begins_with_a_sentence_of_its_own():
    assert (
        opened_after(first_sentence("Trees help. Very much so."), "Here is how:\n\n- **")
        == "Trees help. Here is how:\n\n- **"
    )
    assert (
        opened_after(first_sentence("Trees help in many ways:\n- **A"), "In short:\n\n- **")
        == "Trees help in many ways:\n\n- **"
    )
    for text in ("", "1. **Shade**: it is cool.", "no end", "**Bold** start. More."):
        assert opened_after(first_sentence(text), "In short:\n\n- **") == "In short:\n\n- **"


def test_a_second_call_goes_on_where_the_first_one_stopped(model, tokenizer, tmp_path):
    path = tmp_path / "answers.jsonl"
    steps = distill(TransformersSampler(model, tokenizer), tokenizer, QUESTIONS, path, batch_size=4, max_new_tokens=30)
    assert next(steps) == 4
    steps.close()
    before = path.read_text(encoding="utf-8")
    assert run(model, tokenizer, path, max_new_tokens=30) == [8, 12]
    assert path.read_text(encoding="utf-8").startswith(before)


@pytest.mark.parametrize("change", ["questions", "settings", "sampler"])
def test_what_was_made_otherwise_is_not_gone_on_with(model, tokenizer, tmp_path, change):
    path = tmp_path / "answers.jsonl"
    sample = TransformersSampler(model, tokenizer)
    assert next(distill(sample, tokenizer, QUESTIONS, path, batch_size=4, max_new_tokens=30, made_with="A")) == 4
    before = path.read_text(encoding="utf-8")
    questions = QUESTIONS[1:] if change == "questions" else QUESTIONS
    with pytest.raises(DataError, match="other records or with other settings"):
        options = {"max_new_tokens": 40 if change == "settings" else 30, "made_with": "B" if change == "sampler" else "A"}
        next(distill(sample, tokenizer, questions, path, batch_size=4, **options))
    assert path.read_text(encoding="utf-8") == before
    progress = tmp_path / "answers.jsonl.done"
    kept = progress.read_text()
    progress.write_text("4")  # as an earlier release wrote it
    with pytest.raises(DataError, match="other records or with other settings"):
        next(distill(sample, tokenizer, QUESTIONS, path, batch_size=4, max_new_tokens=30, made_with="A"))
    progress.write_text(kept)
    more = [*QUESTIONS, Question("One more?")]
    assert list(distill(sample, tokenizer, more, path, batch_size=9, max_new_tokens=30, made_with="A")) == [13]


@pytest.mark.parametrize("place", ["appended", "torn", "noted"])
def test_a_run_that_is_killed_between_two_writes_doubles_nothing(tokenizer, tmp_path, monkeypatch, place):
    """The oracle is a run that was never stopped: the same bytes, the same report."""
    questions, sample = [Question(f"{number}?") for number in range(6)], Told("", "Yes.")
    whole, path = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    list(distill(sample, tokenizer, questions, whole, batch_size=2))

    class Killed(BaseException):
        pass

    calls = itertools.count()

    def kill(*args):
        if next(calls) == (1 if place == "noted" else 2):  # one before the first batch
            if place == "torn":
                path.write_bytes(path.read_bytes()[:-3])
            raise Killed
        write(*args)

    kind = BatchReport if place == "noted" else batches._Progress
    write = kind.write
    monkeypatch.setattr(kind, "write", kill)
    with pytest.raises(Killed):
        list(distill(sample, tokenizer, questions, path, batch_size=2))
    monkeypatch.setattr(kind, "write", write)
    assert path.stat().st_size > 0
    list(distill(sample, tokenizer, questions, path, batch_size=2))
    assert path.read_bytes() == whole.read_bytes() and BatchReport.of(path) == BatchReport.of(whole) == BatchReport(6, 6)


def test_a_file_without_a_note_of_progress_is_appended_to(tokenizer, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"prompt": "mine", "response": "!"}) + "\n")
    list(distill(Told("", "Yes."), tokenizer, [Question("Why?")], path))
    assert [answer.prompt for answer in read_answers(path)] == ["mine", "Why?"]


TWO_TURNS = {"messages": [{"role": role, "content": role} for role in ("user", "assistant") * 2]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": []}', "the record has no answer of the assistant"),
        ('{"prompt": "?", "response": null}', "the response is no text"),
        ('{"prompt": "?", "resp', "the line or record is no JSON in UTF-8"),  # a run that was killed as it wrote
        (json.dumps(TWO_TURNS), "the record is not one prompt and one response to it"),
    ],
)
def test_t7_a_line_that_is_no_answer_is_set_aside(tmp_path, caplog, line, reason):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"prompt": "?", "response": "!"}) + f"\n{line}\n")
    assert read_answers(path) == [TextAnswer("?", "!")]
    assert f"1 record set aside: 1 because {reason} (first: record 2)" in caplog.text
    path.write_text(line)
    with pytest.raises(DataError, match=r"of 1, 1 because .* \(first: record 1\); wanted"):
        read_answers(path)


def test_a_mark_of_several_tokens_ends_a_sentence(tokenizer):
    row = _Row(tokenizer, Task([1], 60, sentence_after=2), {tokenizer.eos_token_id})
    for token in tokenizer.encode("茶は体によい。水もよい。", add_special_tokens=False):
        row.append(token)
    assert row.written == Continuation("茶は体によい。", True)


def test_unusual_line_ends_in_an_answer_survive_the_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    record = {"prompt": "a\u2028b", "response": "c\u0085d\ne"}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    (answer,) = read_answers(path)
    assert (answer.prompt, answer.response) == (record["prompt"], record["response"])


def test_template_questions_are_different_and_mostly_opened():
    questions = template_questions(400, seed=3)
    assert len({question.prompt for question in questions}) == 400
    opened = [question for question in questions if question.opening]
    assert {one.opening for one in opened} <= set(OPENINGS).union(*(family.openings for family in families().values()))
    assert 0.8 < len(opened) / 400 < 0.95
    assert 0.35 < sum(bool(one.opening) for one in template_questions(400, opened_share=0.5, seed=3)) / 400 < 0.5
    with pytest.raises(ValueError, match="different prompts"):
        template_questions(100_000)


def test_every_template_has_a_place_for_each_slot():
    prompts = [prompt for family in families().values() for prompt in family.prompts()]
    assert len(prompts) == len(set(prompts)) == Recipe().asking.templates
    for name, family in families().items():
        places = {template.count("{}") for template in family.templates}
        assert places == {len(family.slots)}, name
        assert family.in_parts or family.openings == OPENINGS, name
        assert all(opening.count("...") == 1 and opening.endswith("1. **") for opening in family.openings), name


def test_lists_are_opened_for_a_share_of_the_questions_that_have_no_opening():
    questions = [Question(str(number), "mine" if number % 4 == 0 else "") for number in range(400)]
    opened = open_lists(questions, 0.5, seed=1)
    assert [one.prompt for one in opened] == [one.prompt for one in questions]
    assert all(one.opening == "mine" for one in opened[::4])
    assert 100 < sum(one.opening in OPENINGS for one in opened) < 200
    assert open_lists(questions, 0.0) == questions and opened == open_lists(questions, 0.5, seed=1)
