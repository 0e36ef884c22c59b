"""A file of chats becomes one of trees, whatever its form; what cannot be used is written aside and counted."""

import json

import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet
from typer.testing import CliRunner

from byte_tokenizer import byte_tokenizer
from hf_apar.cli import app
from hf_apar.data.convert import CHUNK, extract_file
from hf_apar.data.extraction.markdown import extract
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.data.records.chats import ChatAnswer, read_chat, without_tree
from hf_apar.errors import ConfigurationError, DataError
from hf_apar.training.mixture import read_examples, training_mixture
from hf_apar.training.tuning import Selection

ITEMS = (
    "- **Oak**: it grows very slowly indeed",
    "- **Ash**: it burns well even green",
    "- **Élan**: it is rare\u2028these days",
)
LIST = "\n".join(("Trees:\n", *ITEMS))
PAIRS = [{"prompt": f"List {number}", "response": LIST} for number in range(3)] + [{"prompt": "Hi", "response": "Hello."}]
CHATS = [[{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["response"]}] for pair in PAIRS]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def with_trees(chat):
    return [
        message | ({"tree": extract(message["content"]).to_json()} if message["role"] == "assistant" else {})
        for message in chat
    ]


EXPECTED = [{"messages": with_trees(chat)} for chat in CHATS]


def as_conversations(chat):
    names = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[message["role"]], "value": message["content"]} for message in chat]}


def written(kind, folder):
    """Write the chats in the form called ``kind``."""
    if kind == "pairs":
        return write_lines(folder / "in.jsonl", PAIRS)
    if kind == "messages":
        return write_lines(folder / "in.jsonl", [{"messages": chat, "id": 7} for chat in CHATS])
    if kind == "conversations":
        return write_lines(folder / "in.jsonl", map(as_conversations, CHATS))
    data = Dataset.from_list(PAIRS if kind == "parquet" else [{"messages": chat} for chat in CHATS])
    path = folder / f"in.{kind}"
    if kind == "parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["pairs", "messages", "conversations", "parquet", "folder"])
def test_every_form_gives_the_same_file_and_report(kind, tmp_path):
    source, output = written(kind, tmp_path), tmp_path / "out.jsonl"
    report = extract_file(source, output)
    assert read_lines(output) == EXPECTED
    assert (report.records, report.answers, report.structured, report.threads) == (4, 4, 3, 13)
    assert not (tmp_path / "out.jsonl.rejected.jsonl").exists()
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text()) == report.to_dict()


def test_the_ideal_ratio_counts_words_along_the_longest_path(tmp_path):
    report = extract_file(write_lines(tmp_path / "in.jsonl", PAIRS[:1]), tmp_path / "out.jsonl").to_dict()
    # "Trees:" and three times "- **Title**:", then the last detail; of the others none ends later
    assert (report["words"], report["path_words"], report["ideal_ratio"]) == (22, 12, round(22 / 12, 4))


def test_every_answer_of_a_chat_has_its_tree(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, *CHATS[0], *CHATS[3]]
    extract_file(write_lines(tmp_path / "in.jsonl", [{"messages": chat}]), tmp_path / "out.jsonl")
    assert read_lines(tmp_path / "out.jsonl") == [{"messages": with_trees(chat)}]


def test_several_processes_write_what_one_does(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [*PAIRS * CHUNK, {"prompt": "no response"}])
    outputs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    reports = [extract_file(source, output, workers=workers) for output, workers in zip(outputs, (1, 2), strict=True)]
    for suffix in ("", ".rejected.jsonl"):
        first, second = (output.with_name(output.name + suffix).read_bytes() for output in outputs)
        assert first == second != b""
    for report in reports:
        report.seconds = 0.0
    assert reports[0] == reports[1]


BAD = {
    b"{not json": "the line or record is no JSON in UTF-8",
    b'{"prompt": "\xff", "response": "a"}': "the line or record is no JSON in UTF-8",
    b"[" * 100_000: "it is nested too deeply",
    b"[1]": "the record is no object",
    b'{"prompt": "a"}': "the record has neither messages nor conversations nor a prompt and a response",
    b'{"prompt": "a", "response": 1}': "the response is no text",
    b'{"prompt": "a", "response": " "}': "an answer is empty",
    b'{"prompt": "a", "response": "\\ud800"}': "a message holds half a surrogate pair, or bytes that are no UTF-8",
    b'{"messages": "a"}': "the messages are no list of objects",
    b'{"messages": [{"role": "user", "content": "a"}]}': "the record has no answer of the assistant",
    b'{"conversations": [{"from": "\\ud800", "value": "a"}]}': "a message has the unknown from '\\ud800'",
}


def test_bad_records_are_written_aside_with_line_and_reason_and_the_others_kept(tmp_path):
    good = json.dumps(PAIRS[0]).encode()
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n" + b"\n".join(BAD) + b"\n" + good)
    report = extract_file(source, output)
    assert read_lines(output) == EXPECTED[:1] * 2
    aside = read_lines(tmp_path / "out.jsonl.rejected.jsonl")
    assert [record["line"] for record in aside] == list(range(3, 3 + len(BAD)))
    assert [record["reason"] for record in aside] == list(BAD.values())
    assert [record["record"] for record in aside] == [line.decode("utf-8", "replace") for line in BAD]
    assert (report.records, report.rejected.total()) == (len(BAD) + 2, len(BAD))


def test_rules_and_bounds_reach_the_extraction(tmp_path):
    source, output = (
        write_lines(tmp_path / "in.jsonl", [{"prompt": "a", "response": f"{LIST}\n\n```\nx\n```"}]),
        tmp_path / "o",
    )
    assert extract_file(source, output).refused == {"code": 1}
    assert extract_file(source, output, without=["code"]).structured == 1
    assert extract_file(source, output, without=["code"], max_forks=2).refused == {"forks": 1}
    assert extract_file(source, output, without=["code"], max_depth=1).structured == 0
    with pytest.raises(ConfigurationError, match="no rule called verse"):
        extract_file(source, output, without=["verse"])


def test_what_cannot_be_read_is_refused_before_anything_is_written(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", PAIRS)
    with pytest.raises(DataError, match="is the file that is read"):
        extract_file(source, source)
    assert read_lines(source) == PAIRS
    DatasetDict({"train": Dataset.from_list(PAIRS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"holds the splits train; give the folder of one"):
        extract_file(tmp_path / "splits", tmp_path / "out.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is no dataset that save_to_disk wrote"):
        extract_file(tmp_path / "empty", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_training_reads_the_trees_back(name, tmp_path):
    output = tmp_path / name
    extract_file(write_lines(tmp_path / "in.jsonl", [{"messages": [*CHATS[0], *CHATS[1]]}]), output)
    first, second = read_examples(output)
    assert first == ChatAnswer(tuple(CHATS[0][:1]), extract(LIST))
    assert second == ChatAnswer((*CHATS[0], *CHATS[1][:1]), extract(LIST))


def test_trees_and_plain_answers_give_the_same_mixture(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", PAIRS * 4)
    extract_file(source, tmp_path / "out.jsonl")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    plain, extracted = read_examples(source), read_examples(tmp_path / "out.jsonl")
    selection = Selection(held_out=0.25)
    assert training_mixture(plain, tokenizer, (1, 2), selection) == training_mixture(extracted, tokenizer, (1, 2), selection)


def test_a_tree_of_another_text_is_refused(tmp_path, caplog):
    record = EXPECTED[0]
    changed = [record["messages"][0], record["messages"][1] | {"tree": TextThread(("other",)).to_json()}]
    path = write_lines(tmp_path / "trees.jsonl", [record, {"messages": changed}])
    assert read_examples(path) == [ChatAnswer(tuple(CHATS[0][:1]), extract(LIST))]
    assert "1 because a tree is not that of its answer; extract it again (first: record 2)" in caplog.text


def test_parquet_has_the_same_trees_as_text(tmp_path):
    extract_file(write_lines(tmp_path / "in.jsonl", PAIRS), tmp_path / "out.parquet")
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [[without_tree(message) for message in read_chat(row).messages] for row in rows] == CHATS
    assert [json.loads(row["messages"][1]["tree"]) for row in rows] == [record["messages"][1]["tree"] for record in EXPECTED]
    assert [row["messages"][0]["tree"] for row in rows] == [None] * 4


def test_the_command_tells_the_report(tmp_path):
    source, output = write_lines(tmp_path / "in.jsonl", [*PAIRS, {}]), tmp_path / "out.jsonl"
    result = CliRunner().invoke(app, ["extract", str(source), str(output), "--workers", "1", "--without", "forks"])
    assert result.exit_code == 0
    assert "5 records, 1 of them rejected; 4 answers, 75.0% structured, 3.25 threads an answer" in result.stdout
    assert "left whole        1  structure" in result.stdout
    assert read_lines(output) == EXPECTED
    failed = CliRunner().invoke(app, ["extract", str(source), str(output), "--without", "verse"])
    assert failed.exit_code == 2
    assert "there is no rule called verse" in failed.stderr
