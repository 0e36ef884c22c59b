"""What is trained on: chats of any form, what the template takes of them, and no prompt on both sides."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byte_tokenizer import TEMPLATE, byte_tokenizer
from hf_apar.data.convert import extract_file
from hf_apar.data.distillation.batches import TextAnswer
from hf_apar.data.extraction.markdown import extract
from hf_apar.data.records.chats import ChatAnswer
from hf_apar.data.records.rejections import Rejections
from hf_apar.errors import DataError
from hf_apar.training.held_out import held_out_places, prompt_key
from hf_apar.training.mixture import packed_rows, read_examples, training_mixture
from hf_apar.training.tuning import Selection

LIST = "- A: a b c d e\n- B: f g h i j\n- C: k l m n o"
REFUSE = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def chat(*texts, system=None):
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *({"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, texts, strict=False))]


def write(path, records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


def tokenizer(template=TEMPLATE):
    made = byte_tokenizer(template)
    made.add_special_tokens({"extra_special_tokens": ["[Fork]", "[Child]"]})
    ids = tuple(made.convert_tokens_to_ids(["[Fork]", "[Child]"]))
    return made, ids


def as_sharegpt(messages):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return {"conversations": [{"from": names[one["role"]], "value": one["content"]} for one in messages]}


CHAT = chat("Q", LIST, "R", "No list.", system="S")


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"messages": CHAT}),
        json.dumps(as_sharegpt(CHAT)),
        json.dumps([as_sharegpt(CHAT)], indent=1),
        json.dumps({"instruction": "R", "output": "No list.", "history": [["Q", LIST]], "system": "S"}),
    ],
    ids=["messages", "conversations", "array", "alpaca"],
)
def test_t13_plain_chats_are_extracted_as_they_are_read(text, tmp_path):
    """FIELD T13: they were refused, while a prompt and its response were extracted."""
    source = tmp_path / "in.json"
    source.write_text(text)
    extract_file(source, tmp_path / "out.jsonl")
    expected = [ChatAnswer(tuple(CHAT[:2]), extract(LIST)), ChatAnswer(tuple(CHAT[:4]), extract("No list."))]
    assert read_examples(source) == read_examples(tmp_path / "out.jsonl") == expected


def test_t7_a_record_without_an_answer_is_set_aside_with_its_number(tmp_path, caplog):
    """FIELD T7: it gave 109 lines of traceback."""
    good = {"prompt": "Q", "response": LIST}
    null, number = ({"prompt": "x", "response": response} for response in (None, 1))
    deep = json.dumps({"messages": chat("Q", "A")}).replace('"A"', f'"A", "tree": {"[" * 900}"A"{"]" * 900}')
    source = write(tmp_path / "in.jsonl", [good, null, "{", good, number, deep])
    rejected = Rejections(source, tmp_path / "out" / "rejected.jsonl")
    assert [example.record for example in read_examples(source, rejected)] == [1, 4]
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").open()]
    assert [(line["line"], line["reason"]) for line in lines] == [
        (2, "the response is no text"), (3, "the line or record is no JSON in UTF-8"), (5, "the response is no text"),
        (6, "it is nested too deeply"),
    ]  # fmt: skip
    assert not caplog.records, "whoever takes them tells of them"
    read_examples(source)
    assert "4 records set aside: 2 because the response is no text (first: record 2); 1 because the line" in caplog.text
    write(source, ['{"prompt": "x", "response": null}'])
    with pytest.raises(DataError, match=r"of 1, 1 because the response is no text \(first: record 1\); wanted chats"):
        read_examples(source)


def test_t4_what_the_template_refuses_is_set_aside_and_not_an_error(tmp_path, caplog):
    """FIELD T4: Gemma's template, for one, refuses the role system: it raised a TemplateError without a record's number."""
    strict, ids = tokenizer(REFUSE + TEMPLATE)
    records = [{"messages": chat(f"Q {number}", LIST, system="S" if number % 4 == 1 else None)} for number in range(12)]
    source = write(tmp_path / "in.jsonl", records)
    rejected = Rejections(source, tmp_path / "rejected.jsonl")
    mixture = training_mixture(read_examples(source, rejected), strict, ids, Selection(unforked_share=0), rejected=rejected)
    assert len(mixture.train) + len(mixture.held_out) == 9
    reason = "the chat template refuses this chat: System role not supported"
    assert rejected.reasons == {reason: 3}
    assert [json.loads(line)["line"] for line in (tmp_path / "rejected.jsonl").open()] == [2, 6, 10]
    assert f"3 records set aside: 3 because {reason} (first: record 2); they are in" in caplog.text
    assert len(packed_rows(source, strict, ids)) > 0
    write(source, records[1::4])
    for refused in (lambda: training_mixture(read_examples(source), strict, ids), lambda: packed_rows(source, strict, ids)):
        with pytest.raises(DataError, match="of 3, 3 because the chat template refuses this chat: System"):
            refused()


CALL = {"type": "function", "function": {"name": "find", "arguments": {"a": 1}}}
CALLING = [
    *chat("Q", system="S"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"},
    {"role": "assistant", "content": LIST},
]  # fmt: skip
EACH = "{% for m in messages %}{% if m.role != 'tool' and m.role != 'system' %}{{ m.content }}{% endif %}%s{% endfor %}"
TELL = {
    "the tool call of message 3": "{% for c in m.tool_calls or [] %}{{ c.function.name | trim }}{% endfor %}",
    "the system message (message 1)": "{% if m.role == 'system' %}{{ m.content | trim }}{% endif %}",
    "the tool message (message 4)": "{% if m.role == 'tool' %}<{{ m.content | trim }}>{% endif %}",
    "the tools": "{% if loop.first %}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% endif %}",
}


@pytest.mark.parametrize("missing", [None, *TELL])
def test_t4_what_a_template_leaves_out_sets_the_record_aside(missing, tmp_path):
    """FIELD T4: system messages and calls of tools vanished where the template does not write them, in silence."""
    template = EACH.replace("%s", "".join(text for what, text in TELL.items() if what != missing))
    plain, ids = tokenizer(template)
    whole = [{"messages": chat(f"Q {number}", LIST, system="")} for number in range(3)]
    record = {"messages": CALLING, "tools": [{"type": "function", "function": {"name": "find"}}]}
    source = write(tmp_path / "in.jsonl", [*whole, record])
    rejected = Rejections(source)
    mixture = training_mixture(read_examples(source, rejected), plain, ids, Selection(unforked_share=0), rejected=rejected)
    assert len(mixture.train) + len(mixture.held_out) == 3 + (missing is None)
    reason = f"the chat template leaves out {missing}; give a template that writes it, or leave the record out"
    assert rejected.reasons == ({} if missing is None else {reason: 1})


def test_t11_one_question_about_many_documents_is_many_prompts(caplog):
    """They were one prompt, and refused, where the documents stand in the system's message."""
    plain, ids = tokenizer()
    answers = [ChatAnswer(tuple(chat("Summarise it.", system=f"Document {number}")), extract(LIST)) for number in range(20)]
    mixture = training_mixture(answers, plain, ids, Selection(unforked_share=0, held_out=0.1))
    assert (len(mixture.train), len(mixture.held_out)) == (18, 2)
    assert not caplog.records


def test_t11_far_more_than_asked_for_is_told(caplog):
    assert held_out_places(["a"] * 9 + ["b"] * 7, 1) == list(range(9, 16))
    assert "7 of 16 answers are held out, where 1 were asked for" in caplog.text
    caplog.clear()
    assert held_out_places(["a"] * 9 + ["b"] * 7 + ["c"], 1) == [16]
    assert not caplog.records


KEYS = st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40).filter(lambda keys: len(set(keys)) > 1)


@given(KEYS, st.integers(1, 40))
def test_t11_no_key_stands_on_both_sides(keys, count):
    """FIELD T11: held-out figures were optimistic where a prompt was answered more than once."""
    aside = held_out_places(keys, count)
    assert aside == sorted(set(aside))
    inside = [key for place, key in enumerate(keys) if place not in aside]
    assert {keys[place] for place in aside}.isdisjoint(inside)
    smallest = min(map(keys.count, keys))
    assert 0 < len(aside) < len(keys) or count >= len(keys)
    assert len(aside) <= max(count, smallest)


def test_t11_answers_that_share_nothing_are_split_as_ever():
    assert held_out_places([str(number) for number in range(20)], 3) == [0, 1, 2]


def test_t11_answers_to_a_prompt_and_turns_of_a_chat_are_held_out_together():
    plain, ids = tokenizer()
    answers = [
        *(TextAnswer(f"Prompt {name} {number}", f"{LIST} {number}.") for number in range(20) for name in ("X", "  x")),
        *(ChatAnswer(tuple(chat(*[f"chat {number}", "A"] * turn, f"chat {number}" if not turn else "go on")), extract(LIST))
          for number in range(20) for turn in (0, 1, 2)),
    ]  # fmt: skip
    for seed in range(5):
        mixture = training_mixture(answers, plain, ids, Selection(held_out=0.2, unforked_share=0.3), seed=seed)
        assert len(mixture.held_out) in (19, 20)
        sides = [
            {prompt_key([{"role": "user", "content": plain.decode(tree.input_ids).split("\n")[1].split("<|im_end|>")[0]}])
             for tree in trees}
            for trees in (mixture.train, mixture.held_out)
        ]  # fmt: skip
        assert len(sides[0] | sides[1]) == 40 and sides[0].isdisjoint(sides[1])


def test_t11_answers_to_one_prompt_cannot_be_held_out():
    plain, ids = tokenizer()
    with pytest.raises(DataError, match="all 9 answers are to one prompt"):
        training_mixture([TextAnswer("Q", LIST)] * 9, plain, ids)


def test_what_is_not_trained_on_is_counted(tmp_path, caplog):
    """The commands said nothing of answers that are too long, filtered, not drawn or of repaired chats."""
    caplog.set_level("INFO", "hf_apar.training.mixture")
    strict, ids = tokenizer(REFUSE + TEMPLATE)
    chats = [
        *(chat(f"Q {number}", LIST) for number in range(4)), *(chat(f"R {number}", "No list.") for number in range(5)),
        chat("Long", LIST + "".join(f" q{number}" for number in range(99))),
        chat("Twice", "one two three four five. " * 9), chat("System", LIST, system="S"),
        [*chat("Led", LIST), *chat("Thanks")],
    ]  # fmt: skip
    source = write(tmp_path / "in.jsonl", [{"messages": messages} for messages in chats])
    training_mixture(read_examples(source), strict, ids, max_length=300)
    counts = "of 13 answers (chats repaired: 1) the filters keep 12 and the template 11; 10 of these have at most 300 tokens"
    assert counts in caplog.text
    assert "5 answers that fork and 2 others are drawn of 10, and 1 of all are held out" in caplog.text


def test_t8_thoughts_may_repeat_what_the_answer_says():
    """The answer is judged for repetition, not what is thought before it."""
    plain, ids = tokenizer()
    words = "It grows slowly and it burns well and it is rare these days."
    answers = [TextAnswer(str(number), f"<think>{words} {words}</think>\n\n{LIST}") for number in range(9)]
    mixture = training_mixture(answers, plain, ids, Selection(unforked_share=0))
    assert len(mixture.train) + len(mixture.held_out) == 9


def test_t4_the_tools_of_a_record_reach_the_template(tmp_path):
    listing = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    plain, ids = tokenizer(listing + TEMPLATE)
    tool = {"type": "function", "function": {"name": "find"}}
    record = {"messages": chat("Q", LIST), "tools": [tool]}
    source = write(tmp_path / "in.jsonl", [record])
    (row,) = packed_rows(source, plain, ids)
    (without,) = packed_rows(write(source, [record | {"tools": None}]), plain, ids)
    assert plain.decode(row["input_ids"]) == "find " + plain.decode(without["input_ids"])
