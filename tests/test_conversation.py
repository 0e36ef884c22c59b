"""``hf-apar chat``: at a terminal of its own and in a pipe; the library on the same chat is the oracle."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import hf_apar
from hf_apar.checkpoints.loading import load_tokenizer
from hf_apar.cli import app
from hf_apar.cli import chat as chat_module
from hf_apar.cli.answers import Answering
from hf_apar.cli.common import Dtype
from hf_apar.cli.compare import Interrupted, Method
from hf_apar.cli.conversation import Conversation, Way
from hf_apar.config import AparConfig
from hf_apar.data.records.chats import read_chat
from test_first_hour import command, environment, save

FIRST, SECOND = "Name two rivers.", "Is [Fork] one of them?"
LIMITS = ("--max-new-tokens", "24", "--fork-bias", "50")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("checkpoint"), control_tokens=True)
    config = Path(folder, "config.json")
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["max_position_embeddings"] = 2**20  # a fast machine writes thousands of tokens before Ctrl-C comes
    config.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def run(*arguments, stdin):
    return CliRunner().invoke(app, ["chat", *arguments], input=stdin)


def expected(checkpoint, *questions, system=None):
    """Return the messages of a chat as the library makes them, turn by turn."""
    model = hf_apar.AparModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = torch.tensor([hf_apar.encode_chat(tokenizer, messages)])
        options = {"apar": hf_apar.AparConfig(fork_bias=50.0), "max_new_tokens": 24, "return_dict_in_generate": True}
        tree = model.generate(input_ids=ids, **options).trees[0]
        assert len(tree.threads) > 2
        messages.append({"role": "assistant", "content": tree.text(tokenizer)})
    return messages


def expected_plain(checkpoint):
    model, tokenizer = hf_apar.AparModelForCausalLM.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    ids = torch.tensor([hf_apar.encode_chat(tokenizer, [{"role": "user", "content": FIRST}])])
    return tokenizer.decode(model.generate(ids, max_new_tokens=24)[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_pipe_gives_a_line_a_turn_and_takes_the_answers_alone(checkpoint, tmp_path):
    """What was typed is no control token: the prompt of the second turn would be refused with one."""
    chat = expected(checkpoint, FIRST, SECOND, system="Be brief.")
    lines = [FIRST, "", SECOND, f"/save {tmp_path / 'chat.jsonl'}"]
    result = run("--model", checkpoint, "--system", "Be brief.", *LIMITS, stdin="\n".join(lines))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{chat[2]['content']}\n\n{chat[4]['content']}\n"
    assert json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8")) == {"messages": chat}


def test_a_chat_is_added_to_a_file_and_another_ones_stays(checkpoint, tmp_path):
    """The second session's /save took the place of the first one's chat."""
    file = tmp_path / "chats.jsonl"
    for question in (FIRST, SECOND):
        lines = [question, f"/save {file}", FIRST, f"/save {file}"]
        assert run("--model", checkpoint, *LIMITS, stdin="\n".join(lines)).exit_code == 0
    chats = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert [[one["content"] for one in chat[::2]] for chat in chats] == [[FIRST, FIRST], [SECOND, FIRST]]


def test_ctrl_c_before_the_second_answer_of_a_comparison_keeps_the_first(checkpoint, monkeypatch):
    def stopped(self, config):
        raise Interrupted("", None)

    method = Answering(max_new_tokens=24).loaded(checkpoint, None, None, "cpu", Dtype.auto)
    monkeypatch.setattr(Method, "apar", stopped)
    monkeypatch.setattr(Method, "warm_up", lambda *_: None)
    chat = Conversation(method, AparConfig(), way=Way.compare)
    with pytest.raises(KeyboardInterrupt):
        chat.ask(FIRST)
    assert chat.messages[1]["content"] == expected_plain(checkpoint)
    assert len(chat.recorded) == 1


def test_ways_of_writing_and_the_page_of_the_last_answer(checkpoint, tmp_path):
    """Greedy and without forks, both ways give one text; the page shows the answers that there are, plain first."""
    pages = [tmp_path / f"{number}.html" for number in range(2)]
    lines = ["/plain", FIRST, f"/html {pages[0]}", "/compare", SECOND, f"/html {pages[1]}", "/quit", "never asked"]
    result = run("--model", checkpoint, *LIMITS, stdin="\n".join(lines))
    assert result.exit_code == 0, result.output
    assert result.stdout.count("tokens/s") == 2 and "times as fast per token" in result.stdout
    kinds = [re.findall(r'"kind":"(\w+)"', page.read_text(encoding="utf-8")) for page in pages]
    assert kinds == [["threads"], ["plain", "threads"]]
    assert SECOND in pages[1].read_text(encoding="utf-8") and "never asked" not in result.output


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("/sing", "there is no /sing; /help"),
        ("/save", "/save needs the name of a file"),
        ("/save chat.jsonl", "nothing was said yet"),
        ("/html page.html", "there is no answer yet"),
    ],
)
def test_a_line_of_a_pipe_that_cannot_be_done_ends_it_with_a_sentence(checkpoint, lines, message):
    result = run("--model", checkpoint, stdin=lines)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


def test_a_chat_without_apar_stays_without(checkpoint):
    result = run("--model", checkpoint, "--plain", "--max-new-tokens", "4", stdin=f"{FIRST}\n/apar")
    assert result.exit_code == 2 and "began with --plain" in result.stderr and result.stdout.count("\n") == 1


def test_a_model_without_a_chat_template_is_refused_before_anything_is_typed(tmp_path):
    result = run("--model", save(tmp_path, control_tokens=True, template=None), stdin=FIRST)
    assert result.exit_code == 2 and "has no chat template" in result.stderr


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_that_nobody_foresaw_ends_a_turn_and_not_the_chat(checkpoint, debug, monkeypatch):
    """At a terminal all that was said was lost with it."""

    def broken(self, question):
        raise RuntimeError("probability tensor contains inf")

    monkeypatch.setattr(Conversation, "ask", broken)
    monkeypatch.setattr(chat_module, "_typed", lambda: iter([FIRST, "/help"]))
    terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True), stdout=None)
    monkeypatch.setattr(chat_module, "sys", terminal)
    result = CliRunner().invoke(app, ["chat", "--model", checkpoint, *(["--debug"] if debug else [])])
    assert result.exit_code == 0, result.output
    assert "probability tensor contains inf" in result.stderr and "/quit" in result.stderr
    assert ("Traceback" in result.stderr) is debug


class Terminal:
    """A chat at a terminal of its own."""

    def __init__(self, *arguments):
        self.screen, terminal = pty.openpty()
        self.process = subprocess.Popen(
            command("chat", *arguments), stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
            env=environment(TERM="xterm", OMP_NUM_THREADS="1", COLUMNS="60"),
            preexec_fn=self.own_terminal,
        )  # fmt: skip
        os.close(terminal)
        self.seen = ""

    @staticmethod
    def own_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.screen)

    def type(self, text):
        os.write(self.screen, text.encode())

    def wait_for(self, pattern):
        """Read on until ``pattern`` has been seen; return what came up to its end."""
        deadline = time.monotonic() + 120
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < deadline, self.seen
            if select.select([self.screen], [], [], 1)[0]:
                self.seen += os.read(self.screen, 65536).decode(errors="replace")
        read, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return read


def test_a_chat_at_a_terminal_goes_on_after_ctrl_c_and_keeps_what_was_written(checkpoint, tmp_path):
    """Also the history of lines: the arrow brings the first question again."""
    with Terminal("--model", checkpoint, "--max-new-tokens", "100000", "--no-heads") as chat:
        chat.wait_for(r"Ctrl-D ends.*> ")
        chat.type("half a line")
        chat.wait_for("half a line")
        while not select.select([chat.screen], [], [], 2)[0]:
            chat.type("\x03")  # one that comes before input() waits is only seen with the next
        chat.wait_for(r"> ")
        chat.type("/sing\n")
        chat.wait_for(r"there is no /sing.*> ")
        chat.type(f"{FIRST}\n")
        chat.wait_for(r"(\x1b\[2K.*){20}")  # pictures have been drawn
        chat.type("\x03")
        assert "\x1b[?25h" in chat.wait_for(r"stopped; what was written stays in the chat.*> "), "the cursor is back"
        chat.type("\x1b[A\n")
        assert FIRST in chat.wait_for(r"(\x1b\[2K.*){20}")
        chat.type("\x03")
        chat.wait_for(r"stopped.*> ")
        chat.type(f"/save {tmp_path}/chat.jsonl\n/html {tmp_path}/page.html\n/html {tmp_path}/no/page.html\n/help\n")
        seen = chat.wait_for(r"/quit.*> ")
        assert "No such file or directory" in seen and "Traceback" not in seen
        chat.type("\x04")
        assert chat.process.wait(60) == 0
    record = json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8"))
    messages = record["messages"]
    assert [*read_chat(record).messages] == messages, "extract and train take it"
    assert [one["role"] for one in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == messages[2]["content"] == FIRST
    assert all(one["content"] for one in messages[1::2])
    assert FIRST in (tmp_path / "page.html").read_text(encoding="utf-8")
