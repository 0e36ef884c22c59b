"""Several processes make what one makes: the same answers, the same adapter. The oracle is one process."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from byte_tokenizer import byte_tokenizer
from hf_apar.data.distillation.batches import BatchReport, Dropped, TextAnswer, in_batches
from hf_apar.data.settings import Loading
from hf_apar.errors import ConfigurationError, DataError
from hf_apar.training.together import check_processes
from tiny_chat_model import make_likely
from tiny_trainer import EOS, tiny_model

SCRIPT = Path(__file__).parent / "launched.py"
FSDP = ["--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"]
LIST = "- A: a b c d e\n- B: f g h i j\n- C: k l m n o"


# Answers: items are numbers, and what is drawn for one depends on the batch's seed and its place in the batch.


def written(path, items, *, stops=(), count=1, number=0, settings="s"):
    """Do it as one of ``count`` processes, killed after so many batches each of ``stops``."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count)}

    def answer(batch):
        drawn = [(torch.rand(1).item(), item) for item in batch]
        return [
            Dropped("a third") if item % 3 == 2 else TextAnswer(str(item), str(one))
            for one, item in zip(drawn, batch, strict=True)
        ]

    try:
        for stop in [*stops, None]:
            torch.manual_seed(0)
            steps = in_batches(items, path, 4, settings, answer)
            for step, _ in enumerate(steps, start=1):
                if step == stop:
                    break
            del steps
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]


def content(path):
    return path.read_text(), (path.parent / f"{path.name}.done").read_text(), BatchReport.of(path)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("length", [1, 4, 7, 30, 41])
@pytest.mark.parametrize("before", [0, 8])
def test_processes_make_the_file_that_one_makes(count, length, before, tmp_path):
    items = list(range(length))
    one, several = tmp_path / "one.jsonl", tmp_path / "several.jsonl"
    for path in (one, several):
        written(path, items[:before])
    written(one, items)
    for number in reversed(range(count)):
        written(several, items, stops=(1, 1), count=count, number=number)
        assert (number == 0) == (BatchReport.of(several).asked == length) or before >= length
    assert content(several) == content(one)
    assert sorted(file.name for file in tmp_path.glob("several*")) == [
        f"several.jsonl{end}" for end in ("", ".done", ".report.json")
    ]
    written(several, items, count=count, number=1)
    assert content(several) == content(one), "there is nothing left to do"
    with pytest.raises(DataError, match="other settings"):
        written(several, items, count=count, settings="others")


def test_a_report_that_a_killed_process_did_not_come_to_is_written_where_nothing_is_left_to_do(tmp_path):
    path, items = tmp_path / "answers.jsonl", list(range(8))
    written(path, items)
    whole, report = content(path), tmp_path / "answers.jsonl.report.json"
    BatchReport(4, 3, Counter({"a third": 1})).write(path)
    report.with_name(f"{report.name}.part").write_text("{")
    written(path, items)
    assert content(path) == whole and len(list(tmp_path.iterdir())) == 3


def launched(launcher, *arguments, kill="", module=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"],
        "fsdp": [
            "accelerate.commands.launch", *FSDP, "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
            "--dynamo_backend=no", f"--main_process_port={port}",
        ],
    }  # fmt: skip
    paths = [str(SCRIPT.parents[1] / "src"), str(SCRIPT.parent), *sys.path]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, paths))
    }  # fmt: skip
    if kill:
        environment["HF_APAR_KILL"] = kill
    code = ["-m", module] if module else [str(SCRIPT)]
    command = [sys.executable, *(["-m", *start[launcher]] if launcher else []), *code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a base and answers, each of which fills a row; one record is broken."""
    folder, tokenizer = tmp_path_factory.mktemp("work"), byte_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    make_likely(tiny_model(vocab_size=len(tokenizer)), ord("a"), EOS, 2.0).save_pretrained(folder / "ends")
    for name in ("base", "ends"):
        tokenizer.save_pretrained(folder / name)
    answers = [{"prompt": f"list {n:02}", "response": LIST} for n in range(9)]
    lines = "".join(json.dumps(answer) + "\n" for answer in [{"prompt": "nothing else"}, *answers])
    (folder / "answers.jsonl").write_text(lines)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(7)))
    return folder


TRAIN = [
    "--rank",
    4,
    "--learning-rate",
    0.01,
    "--max-length",
    96,
    "--unforked-share",
    0.25,
    "--max-steps",
    8,
    "--save-steps",
    2,
]


@pytest.fixture(scope="module")
def alone(work):
    """The adapter of one process, whose batches are those of two together."""
    options = [work / "answers.jsonl", work / "alone", "--model", work / "base", *TRAIN, "--batch-size", 2]
    done = launched("", "train", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(work / "alone" / "adapter_model.safetensors")


@pytest.mark.parametrize("launcher", ["torchrun", "fsdp"])
def test_two_processes_train_as_one_though_one_of_them_was_killed(launcher, work, alone):
    output = work / launcher
    options = [work / "answers.jsonl", output, "--model", work / "base", *TRAIN]
    killed = launched(launcher, "train", *options, kill="1 5")
    assert killed.returncode != 0 and str(-signal.SIGKILL) in killed.stderr, killed.stderr[-3000:]
    assert sorted(folder.name for folder in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    done = launched(launcher, "train", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = load_file(output / "adapter_model.safetensors")
    assert ours.keys() == alone.keys()
    for name in ours:
        assert (ours[name] - alone[name]).abs().max() < 1e-4, name
    assert len((output / "rejected.jsonl").read_text().splitlines()) == 1
    assert json.loads((output / "metrics.json").read_text())["steps"][-1]["step"] == 8
    assert done.stdout.count("eval_fork_recall ") == 1, "one process talks"
    assert done.stderr.count("hf-apar: loading") == 1


def test_two_processes_write_the_answers_that_one_writes(work):
    for launcher, name in (("", "one"), ("torchrun", "two")):
        options = ["--model", work / "ends", "--batch-size", 2, "--max-new-tokens", 48, "--temperature", 1.0]
        done = launched(launcher, "distill", work / "prompts.jsonl", work / f"{name}.jsonl", *options, module="hf_apar.cli")
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("of 7 answers") == 1
    assert (work / "two.jsonl").read_text() == (work / "one.jsonl").read_text() != ""
    assert not [*work.glob("two.jsonl.*-of-*")]


@pytest.mark.parametrize(
    ("environment", "loading", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            Loading(device_map="auto"),
            "device_map is 'auto', and each of 2 processes has a GPU of its own",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, Loading(load_in_4bit=True), "load_in_4bit packs them"),
        ({"ACCELERATE_USE_FSDP": "true"}, Loading(), "pass --fsdp_version 2"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(environment, loading, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=message):
        check_processes(loading)


def test_what_one_process_does_is_refused_in_several(work):
    for command in (["recipe", "--output", work / "recipe"], ["extract", work / "answers.jsonl", work / "trees.jsonl"]):
        os.environ |= {"WORLD_SIZE": "2"}
        try:
            done = launched("", *command, module="hf_apar.cli")
        finally:
            del os.environ["WORLD_SIZE"]
        assert done.returncode == 2 and f"hf-apar {command[0]} runs in one process, and 2 are started" in done.stderr


ENDS = """
import atexit, os, sys
from hf_apar.cli import main

class Late:
    def __del__(self, write=os.write):
        write(1, b"finalized")

late = Late()
try:
    main(sys.argv[1:])
finally:
    atexit.register(print, "asked at exit")
"""


@pytest.mark.parametrize(("count", "arguments", "code", "finalized"), [
    ("1", ["--version"], 0, True), ("2", ["--version"], 0, False), ("2", ["recipe", "--output", "nowhere"], 2, True),
])  # fmt: skip
def test_one_of_several_processes_that_is_done_does_not_wait_for_the_interpreters_end(count, arguments, code, finalized):
    environment = os.environ | {"WORLD_SIZE": count, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", ENDS, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    assert ("finalized" in done.stdout) == finalized and "asked at exit" in done.stdout
