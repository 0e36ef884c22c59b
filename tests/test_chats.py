"""Records of any form become chats that any template takes, or a reason why not; nothing else ever comes of them."""

import io
import json
import tracemalloc

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from byte_tokenizer import byte_tokenizer
from hf_apar.cli import app
from hf_apar.data.convert import extract_file
from hf_apar.data.distillation.distill import read_answers
from hf_apar.data.extraction.markdown import extract
from hf_apar.data.records.chats import JOINED, LED, UNANSWERED, ChatAnswer, chat_answers, read_chat
from hf_apar.data.records.files import open_records, record_of
from hf_apar.data.records.json_array import array_items
from hf_apar.errors import DataError
from hf_apar.text.chat import encode_chat
from hf_apar.training.mixture import read_examples

LIST = "- Oak: it grows very slowly indeed\n- Ash: it burns well even green\n- Elm: it is rare these days"
STRICT = (
    "{% for message in messages %}{% set place = loop.index0 - (1 if messages[0]['role'] == 'system' else 0) %}"
    "{% if place >= 0 and (message['role'] == 'user') != (place % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if place < 0 and message['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    "{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
)


def turns(*texts, system=None):
    """Return messages of the user and the assistant in turns."""
    first = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant") * len(texts)
    return [*first, *({"role": role, "content": text} for role, text in zip(roles, texts, strict=False))]


def sharegpt(*messages, **more):
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in messages], **more}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Q", "response": "A"}, turns("Q", "A")),
        ({"prompt": "Q", "completion": "A", "messages": None}, turns("Q", "A")),
        ({"question": "Q", "answer": "A", "prompt": None, "response": None}, turns("Q", "A")),
        ({"system_prompt": "S", "question": "Q", "response": "A"}, turns("Q", "A", system="S")),
        ({"instruction": "Q", "input": "", "output": "A"}, turns("Q", "A")),
        ({"instruction": "Q", "input": "I", "output": "A", "system": "S"}, turns("Q\n\nI", "A", system="S")),
        ({"instruction": "Q", "context": "I", "response": "A"}, turns("Q\n\nI", "A")),
        ({"instruction": "Q", "output": "A", "history": [["q", "a"], ["r", "b"]]}, turns("q", "a", "r", "b", "Q", "A")),
        ({"prompt": turns("Q", system="S"), "completion": turns("Q", "A")[1:]}, turns("Q", "A", system="S")),
        ({"prompt": turns("Q", system="S"), "completion": "A"}, turns("Q", "A", system="S")),
        ({"prompt": "Q", "completion": turns("Q", "A")[1:]}, turns("Q", "A")),
        ({"messages": turns("Q", "A", system="S")}, turns("Q", "A", system="S")),
        ({"messages": turns("Q", "A", system="S"), "system": "S"}, turns("Q", "A", system="S")),
        ({"prompt": "Q", "response": "A", "system": "S", "system_prompt": "S"}, turns("Q", "A", system="S")),
        ({"conversation": turns("Q", "A")}, turns("Q", "A")),
        (sharegpt(("human", "Q"), ("gpt", "A")), turns("Q", "A")),
        (sharegpt(("user", "Q"), ("bing", "A"), ("Human", "R"), ("bard", "B")), turns("Q", "A", "R", "B")),
        (sharegpt(("system", "S"), ("human", "Q"), ("chatgpt", "A")), turns("Q", "A", system="S")),
        (sharegpt(("human", "Q"), ("gpt", "A"), system="S"), turns("Q", "A", system="S")),
        (sharegpt(("human", "Q"), ("gpt", "A"), system=""), turns("Q", "A")),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "R"}]},
                          {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]},
            turns("Q\nR", "A"),
        ),
        ({"messages": [{"role": "developer", "content": "S"}, *turns("Q", "A")]}, turns("Q", "A", system="S")),
    ],
)  # fmt: skip
def test_t4_every_form_gives_the_same_messages(record, expected):
    chat = read_chat(record)
    assert list(chat.messages) == expected
    assert chat.repairs == ()


@pytest.mark.parametrize(
    ("given", "expected", "repairs"),
    [
        ([("gpt", "Hello"), ("human", "Q"), ("gpt", "A")], turns("Q", "A"), (LED,)),
        ([("system", "S"), ("gpt", "Hello"), ("human", "Q"), ("gpt", "A")], turns("Q", "A", system="S"), (LED,)),
        ([("human", "Q"), ("human", "R"), ("gpt", "A")], turns("Q\n\nR", "A"), (JOINED,)),
        ([("system", "S"), ("system", "T"), ("human", "Q"), ("gpt", "A")], turns("Q", "A", system="S\n\nT"), (JOINED,)),
        ([("human", "Q"), ("gpt", "A"), ("human", "R")], turns("Q", "A"), (UNANSWERED,)),
        ([("gpt", "Hello"), ("human", "Q"), ("human", "R"), ("gpt", "A"), ("human", "T")], turns("Q\n\nR", "A"),
         (LED, JOINED, UNANSWERED)),
    ],
)  # fmt: skip
def test_t4_what_strict_templates_refuse_is_put_in_order_and_told(given, expected, repairs):
    chat = read_chat(sharegpt(*given))
    assert (list(chat.messages), chat.repairs) == (expected, repairs)


IMAGE = [{"type": "text", "text": "Q"}, {"type": "image_url", "image_url": {"url": "x"}}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (sharegpt(("human", "Q"), ("gpt", "A"), ("gpt", "B")), "the role assistant follows one of the role assistant"),
        (sharegpt(("human", "Q"), ("gpt", "A"), ("system", "S"), ("gpt", "B")), "the role system follows one of the role"),
        (sharegpt(("human", "Q")), "the record has no answer of the assistant"),
        (sharegpt(("gpt", "A")), "the record has no answer of the assistant"),
        (sharegpt(), "the record has no answer of the assistant"),
        (sharegpt(("human", "Q"), ("gpt", "A"), ("human", "R"), ("gpt", " ")), "an answer is empty"),
        (sharegpt(("human", "Q"), ("parrot", "A")), "a message has the unknown from 'parrot'"),
        (sharegpt(("human", None), ("gpt", "A")), "a message has no text under 'value'"),
        ({"messages": [{"role": "user", "content": IMAGE}, *turns("Q", "A")[1:]]}, "a part that is no text but 'image_url'"),
        ({"messages": [*turns("Q"), {"role": "assistant", "content": "A", "reasoning_content": "h"}]}, "a field of its own"),
        *(({"messages": [*turns("Q"), {"role": "assistant", "content": "A", name: "h"}]}, f"of its own, {name}; write")
          for name in ("reasoning_content", "reasoning", "thinking")),
        ({"messages": [*turns("Q"), {"role": "assistant", "tool_calls": [CALL]}]}, "the record has no answer of the"),
        ({"messages": [*turns("Q"), {"role": "assistant", "tool_calls": [{}]}]}, "a tool call names no function"),
        ({"prompt": "x", "response": None}, "the response is no text"),  # T7
        ({"prompt": None, "response": "x"}, "the prompt is no text"),
        ({"messages": {"role": "user"}}, "the messages are no list of objects"),
        ({"messages": turns("Q", "A"), "tools": "[{"}, "the tools: no JSON"),
        ({"prompt": "x", "response": "y", "history": [["a"]]}, "the history is no list of pairs of texts"),
        ([], "the record is no object"),
        ({}, "the record has neither messages nor conversations nor a prompt and a response"),
    ],
)  # fmt: skip
def test_t4_t7_what_cannot_be_used_has_a_reason(record, reason):
    with pytest.raises(DataError) as error:
        read_chat(record)
    assert reason in str(error.value)


ROLE = st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool", "function", "parrot", None, 3])
NAMES = st.sampled_from(
    ["role", "from", "content", "value", "type", "text", "tool_calls", "function", "name", "arguments", "tree", "weight",
     "messages", "conversations", "prompt", "response", "instruction", "input", "output", "history", "system", "tools",
     "function_call", "reasoning_content", "tool_call_id"]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=4) | ROLE | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=25,
)
CHATS = st.lists(st.tuples(ROLE, st.sampled_from(["a", "b c", "", LIST, None]))).map(
    lambda messages: {"conversations": [{"from": role, "value": text} for role, text in messages]}
)


@given(JSON | st.builds(dict, messages=st.lists(st.dictionaries(NAMES, JSON | ROLE, max_size=4))))
def test_any_json_is_a_chat_or_a_data_error(value):
    try:
        read_chat(value)
        list(chat_answers(value))
    except DataError as error:
        assert str(error)


@given(CHATS)
def test_t4_what_is_read_renders_in_a_strict_template(record):
    """Vicuna's, Llama 2's and Gemma's templates raise where turns do not alternate."""
    try:
        chat = read_chat(record)
    except DataError:
        return
    if all(message["role"] != "tool" for message in chat.messages):
        tokenizer = byte_tokenizer(STRICT)
        shown = "".join(f"{message['role']}: {message['content']}\n" for message in chat.messages)
        assert tokenizer.decode(encode_chat(tokenizer, chat.messages)) == shown
        assert chat.messages[-1]["role"] == "assistant"


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
WITH_TOOLS = [
    *turns("What is a?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "content": "1", "tool_call_id": "1", "name": "f"},
    {"role": "assistant", "content": "It is 1."},
]
CALLED = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
READ = [
    *turns("What is a?"),
    {"role": "assistant", "content": "", "tool_calls": [CALLED]},
    {"role": "tool", "content": "1", "tool_call_id": "1", "name": "f"},
    {"role": "assistant", "content": "It is 1."},
]
WITH_CALLS = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}{{ '\n' }}{% endfor %}"
)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_t4_calls_of_tools_survive_and_are_what_a_template_renders(kind, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / f"out.{kind}"
    source.write_text(json.dumps({"messages": WITH_TOOLS, "tools": json.dumps(TOOLS)}) + "\n")
    assert extract_file(source, output).answers == 1, "a call is context alone"
    (answer,) = (answer for number, row in open_records(output).rows for answer in chat_answers(record_of(row), number))
    assert answer == ChatAnswer(tuple(READ[:-1]), extract("It is 1."), tuple(TOOLS))
    tokenizer = byte_tokenizer(WITH_CALLS)
    told = tokenizer.decode(encode_chat(tokenizer, answer.before))
    assert told == 'user: What is a?\nassistant: f({"a": 1})\ntool: 1\n'


def test_t4_what_a_table_fills_with_nulls_is_left_out_at_any_depth():
    """Columns of Parquet have the fields of all rows: a tool had parameters that it has not."""
    full = {"a": {"type": "string", "enum": None}, "b": None}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": full}}}]
    function = {"name": "f", "arguments": {"a": [{"c": 1, "d": None}], "b": None}}
    call = {"role": "assistant", "tool_calls": [{"id": None, "type": "function", "function": function}]}
    chat = read_chat({"messages": [*turns("Q"), call, *WITH_TOOLS[2:]], "tools": tools})
    assert chat.tools[0]["function"] == {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}
    stripped = {"name": "f", "arguments": {"a": [{"c": 1}]}}
    assert chat.messages[1]["tool_calls"] == [{"type": "function", "function": stripped}]


def test_t4_calls_before_there_were_tools_are_read_too():
    old = [*turns("Q"), {"role": "assistant", "content": None, "function_call": CALL["function"]},
           {"role": "function", "name": "f", "content": "1"}, {"role": "assistant", "content": "A"}]  # fmt: skip
    called, result = read_chat({"messages": old}).messages[1:3]
    assert called["tool_calls"] == [{"type": "function", "function": CALLED["function"]}]
    assert result == {"role": "tool", "name": "f", "content": "1"}


def test_an_answer_of_no_weight_is_context_alone(tmp_path):
    """OpenAI's ``weight``: the answer must not be learnt, and what follows it still sees it."""
    chat = turns("Q", "bad", "R", LIST)
    chat[1]["weight"] = 0
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"messages": chat}) + "\n")
    extract_file(source, output)
    for path in (source, output):
        (answer,) = chat_answers(json.loads(path.read_text()))
        assert answer == ChatAnswer(tuple(turns("Q", "bad", "R")), extract(LIST))


DIRTY = [
    sharegpt(("human", "List"), ("gpt", LIST)),
    sharegpt(("gpt", "Hello"), ("human", "List"), ("gpt", LIST)),
    sharegpt(("human", "Q"), ("gpt", "A"), ("gpt", "B")),
    {"nothing": 1},
    sharegpt(("human", "Élan"), ("gpt", "A"), system="S"),
]


@pytest.mark.parametrize(
    "text",
    [json.dumps(DIRTY), json.dumps(DIRTY, indent=2), "\ufeff\n " + json.dumps(DIRTY, ensure_ascii=False) + "\n", 
     "".join(json.dumps(record) + "\n" for record in DIRTY)],
    ids=["one line", "pretty", "mark", "lines"],
)  # fmt: skip
def test_t4_an_array_gives_what_lines_give(text, tmp_path):
    """FIELD T4: ShareGPT as it is published gave 0 answers and exit code 0."""
    source, output = tmp_path / "sharegpt.json", tmp_path / "out.jsonl"
    source.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, ["extract", str(source), str(output)])
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["messages"][-1]["content"] for line in output.open()] == [LIST, LIST, "A"]
    aside = [json.loads(line) for line in (tmp_path / "out.jsonl.rejected.jsonl").open()]
    assert [(item["line"], item["record"] if isinstance(item["record"], dict) else json.loads(item["record"]))
            for item in aside] == [(3, DIRTY[2]), (4, DIRTY[3])]  # fmt: skip
    assert f"    repaired        1  {LED}" in result.stdout
    assert "5 records, 2 of them rejected; 3 answers" in result.stdout


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.lists(VALUES), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_t4_an_array_is_read_as_json_does_whatever_its_chunks(values, chunk, indent, ascii):
    data = json.dumps(values, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    got = list(array_items(io.BytesIO(b"\xef\xbb\xbf " + data + b"\n"), chunk))
    lone = data.decode("utf-8", "surrogateescape")  # what is no UTF-8 comes as it is
    assert got == json.loads(lone)


@pytest.mark.parametrize(
    ("text", "values", "reason"),
    [
        ("[1, 2", [1, 2], "breaks off"),
        ("[1, 2,", [1, 2], "breaks off"),
        ('[1, {"a": "b', [1], "breaks off"),
        ("[1 2]", [1], "no JSON here"),
        ("[1, nul, 3]", [1], "no JSON here"),
        ("[", [], "breaks off"),
        ("[1]\n[2]\n", [1], "more follows the array"),
        ("[1, " + "[" * 200_000, [1], "nothing from byte 4 on"),
        ('[1, "é", {"a": 1, {"b": 2}]', [1, "é"], "nothing from byte 10 on"),
    ],
)
def test_t4_what_breaks_an_array_off_is_told_and_what_came_before_is_kept(text, values, reason):
    *got, error = array_items(io.BytesIO(text.encode()), 8 if len(text) < 100 else 1 << 20)
    assert got == values
    assert isinstance(error, DataError) and reason in str(error)


BAD = {
    "an escape that JSON lacks": r'{"prompt": "C:\dir }]", "response": "A"}',
    "no comma": '{"prompt": "Q" "response": ["A"]}',
    "a bracket left open": '{"prompt": ["Q", "response": "A"}',
    "a number": '{"prompt": nul, "response": "A"}',
    "nested too deeply": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a number of too many digits": '{"a": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_record_that_is_no_json_spoils_itself_alone(kind, chunk):
    """One with an invalid escape lost all records after it, and extract ended with 0."""
    good = {"prompt": "Q", "response": "A"}
    text = "[" + ", ".join([json.dumps(good), BAD[kind], *[json.dumps(good)] * 100]) + "]"
    items = list(array_items(io.BytesIO(text.encode()), chunk))
    assert items == [good, BAD[kind].encode(), *[good] * 100]


@pytest.mark.parametrize("form", ["array", "lines"])
def test_bad_records_of_an_array_and_of_lines_are_set_aside_alike(form, tmp_path):
    records = [json.dumps(DIRTY[0]), BAD["no comma"], '{"prompt": "a\tb", "response": "A"}', *[json.dumps(DIRTY[4])] * 3]
    source, output = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text("[" + ",\n".join(records) + "]" if form == "array" else "\n".join(records))
    result = CliRunner().invoke(app, ["extract", str(source), str(output)])
    assert result.exit_code == 0
    assert "6 records, 1 of them rejected; 5 answers" in result.stdout
    (aside,) = map(json.loads, (tmp_path / "out.jsonl.rejected.jsonl").open())
    assert aside == {"line": 2, "reason": "the line or record is no JSON in UTF-8", "record": BAD["no comma"]}


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_left_unread_is_told_and_no_success(workers, tmp_path):
    """A file that breaks off passed for one that was read."""
    source, output = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text("[" + json.dumps(DIRTY[0]) + ', {"prompt": "Q", ')
    result = CliRunner().invoke(app, ["extract", str(source), str(output), "--workers", str(workers)])
    assert result.exit_code == 2 and "is not read to its end" in " ".join(result.stderr.split())
    assert len(output.read_text().splitlines()) == 1
    (aside,) = map(json.loads, (tmp_path / "out.jsonl.rejected.jsonl").open())
    assert f"nothing from byte {source.read_text().rindex(', {') + 2} on has been read" in aside["reason"]


@pytest.mark.parametrize("read", [read_answers, read_examples])
def test_what_is_trained_on_is_a_whole_file(read, tmp_path):
    """Half of a download was taken for all of it, with one word among others."""
    source = tmp_path / "in.json"
    source.write_text("[" + json.dumps({"prompt": "Q", "response": "A"}) + ', {"prompt": "Q", ')
    with pytest.raises(DataError, match=r"in\.json: the array breaks off.*copy it again"):
        read(source)


@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_a_deep_record_of_an_array_fares_the_same_in_other_processes(depth, tmp_path):
    """At 900 a worker's file ended in a RecursionError of pickle, while one process read it."""
    deep = json.dumps(DIRTY[0])[:-1] + ', "more": ' + "[" * depth + "]" * depth + "}"
    (tmp_path / "in.json").write_text("[" + ", ".join([json.dumps(DIRTY[0]), deep, json.dumps(DIRTY[4])]) + "]")
    one, two = (
        extract_file(tmp_path / "in.json", tmp_path / f"{workers}.jsonl", workers=workers) for workers in (1, 2)
    )
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert (one.answers, one.rejected) == (two.answers, two.rejected)
    assert one.answers == (3 if depth < 1000 else 2)


def test_bytes_that_are_no_utf_8_spoil_their_record_alone(tmp_path):
    good = json.dumps(DIRTY[0]).encode()
    (tmp_path / "in.json").write_bytes(b"[" + good + b', {"prompt": "\xff", "response": "A"}, ' + good + b"]")
    report = extract_file(tmp_path / "in.json", tmp_path / "out.jsonl")
    assert report.answers == 2
    assert dict(report.rejected) == {"a message holds half a surrogate pair, or bytes that are no UTF-8": 1}


def test_t4_an_array_is_streamed(tmp_path):
    """Forty megabytes in one line, and in many: the most that is held is a few chunks, not the file."""
    record = json.dumps(sharegpt(("human", "List"), ("gpt", "word " * 2000)))
    path = tmp_path / "sharegpt.json"
    for separator in (", ", ",\n"):
        path.write_text("[" + separator.join([record] * 4000) + "]")
        assert path.stat().st_size > 40_000_000
        tracemalloc.start()
        count = sum(1 for _ in open_records(path).rows)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 4000
        assert peak < 8_000_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no records"),
        ("\n\n", "holds no records"),
        ("[]", "holds no records"),
        ("{}\n{}\n[1]\n", "of 3, 2 because the record has neither messages nor"),
        ('{\n "messages": []\n}', "because the line or record is no JSON in UTF-8 (first: record 1)"),
        ('[{"prompt": "x", "response": null}]', "of 1, 1 because the response is no text (first: record 1)"),
    ],
)
def test_t4_nothing_usable_is_an_error_that_names_the_reason(text, said, tmp_path):
    source, output = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text(text)
    result = CliRunner().invoke(app, ["extract", str(source), str(output)])
    assert result.exit_code == 2
    assert said in result.stderr and "wanted chats with `messages`" in result.stderr
    written = {path.name for path in tmp_path.iterdir()} - {"out.jsonl.rejected.jsonl"}
    assert written == {"in.json", "out.jsonl.report.json"}


def test_a_table_with_the_columns_of_all_forms_is_read(tmp_path):
    pair, chat = {"prompt": "Q", "response": "A", "messages": None}, {"prompt": None, "messages": turns("R", "B")}
    Dataset.from_list([pair, chat | {"response": None}]).to_parquet(tmp_path / "in.parquet")
    chats = [read_chat(row) for _, row in open_records(tmp_path / "in.parquet").rows]
    assert [list(chat.messages) for chat in chats] == [turns("Q", "A"), turns("R", "B")]


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "in.parquet"
    path.write_text("no parquet")
    with pytest.raises(DataError, match=r"in\.parquet is no Parquet file"):
        open_records(path)
