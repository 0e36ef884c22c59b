"""The command line says what the library says, and the live view reads as the tree reads."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import hf_apar
from byte_tokenizer import byte_tokenizer
from hf_apar.cli import app, decode
from hf_apar.cli.live import CURSOR, LiveTree, coloured
from hf_apar.config import AparConfig
from hf_apar.data.distillation.distill import TextAnswer, _Limits, in_batches, read_answers
from hf_apar.data.distillation.questions import template_questions
from hf_apar.data.settings import AnswerLimits, Elaboration, Engine, Loading, PromptChoice, Sampling, TreeLimits
from hf_apar.evaluation.answers import answers_in
from hf_apar.evaluation.folder import prompts_of
from hf_apar.evaluation.likelihood import mean_nll
from hf_apar.prepacking import has_mkl
from hf_apar.replay import load_traces, replay_page, trace_of_tree
from hf_apar.text.chat import encode_chat
from hf_apar.text.encoding import encode_answer
from hf_apar.training.recipe import EXAMPLE, Recipe, read_recipe, written
from hf_apar.training.tuning import HeadsTuning, Selection, Tuning
from hf_apar.tree.threads import ParagraphTree, Thread

PROMPT = "Name two rivers."
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}> {% endif %}"


def tiny_pair() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return a random two-layer model and a tokenizer of bytes."""
    letters = ["<eos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny model that has the control tokens."""
    model, tokenizer = tiny_pair()
    hf_apar.add_control_tokens(model, tokenizer)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def untuned(tmp_path_factory):
    """A folder with a tiny model without control tokens."""
    model, tokenizer = tiny_pair()
    folder = tmp_path_factory.mktemp("untuned")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def run_json(*arguments: str) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def encoded(tokenizer) -> torch.Tensor:
    return torch.tensor([tokenizer.encode(f"{PROMPT}\n> ")])


@pytest.mark.skipif(not has_mkl(), reason="PyTorch without MKL has no layout of its own to copy weights into")
@pytest.mark.parametrize(("how", "expected"), [((), True), (("--compare",), True), (("--plain",), False)])
def test_threads_decode_with_prepacked_weights(checkpoint, how, expected):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        result = run("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "4", "--device", "cpu", *how)
    assert result.exit_code == 0, result.output
    assert any(event.name == "mkl::_mkl_linear" for event in seen.events()) == expected


def test_json_is_what_the_library_gives(checkpoint):
    """The oracle is ``model.generate`` on the same checkpoint, with a bias that makes a random model fork."""
    got = run_json("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "24", "--fork-bias", "50")
    model = hf_apar.AparModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    out = model.generate(
        input_ids=encoded(tokenizer), apar=AparConfig(fork_bias=50.0), max_new_tokens=24, return_dict_in_generate=True
    )
    assert len(got["tree"]["threads"]) > 2
    assert got["tree"] == json.loads(json.dumps(out.trees[0].to_dict()))
    assert got["text"] == out.trees[0].text(tokenizer)
    assert got["stats"]["steps"] == out.stats[0].steps
    assert got["stats"]["tokens_per_step"] == out.stats[0].tokens_per_step


def test_plain_json_is_what_plain_generate_gives(checkpoint):
    got = run_json("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "12", "--plain")
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    ids = encoded(tokenizer)
    new = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert got["text"] == tokenizer.decode(new, skip_special_tokens=True)
    assert got["tokens"] == (new != tokenizer.eos_token_id).sum()
    assert "tree" not in got


def test_the_seed_decides_what_is_sampled(checkpoint):
    def text(seed: str) -> str:
        options = ("--temperature", "1.5", "--seed", seed, "--max-new-tokens", "16")
        return str(run_json("generate", PROMPT, "--model", checkpoint, *options)["text"])

    assert text("1") == text("1") != text("2")


def test_compare_gives_both_answers(checkpoint):
    arguments = ("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "12")
    both = run_json(*arguments, "--compare")
    assert both["plain"]["text"] == run_json(*arguments, "--plain")["text"]
    assert both["tree"] == run_json(*arguments)["tree"]


def test_without_a_terminal_the_answer_stands_in_the_output_once(checkpoint):
    arguments = ("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "24", "--fork-bias", "50")
    answer, result = run_json(*arguments), run(*arguments)
    assert result.exit_code == 0
    assert result.stdout == answer["text"] + "\n", "byte for byte"
    assert f"{len(answer['tree']['threads'])} threads, {answer['stats']['tokens']} tokens" in result.stderr


@pytest.mark.parametrize("options", [[], ["--plain"], ["--compare"], ["--no-heads", "--json"]])
def test_a_replay_shows_the_answers_that_were_given(checkpoint, tmp_path, options):
    """The same command with ``--json`` is the oracle; what was saved makes the same page."""
    files = [tmp_path / "answer.html", tmp_path / "answer.json", tmp_path / "again.html"]
    asked = ["generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "24", *options]
    asked += [] if "--plain" in options else ["--fork-bias", "50"]
    result = run(*asked, "--html", str(files[0]), "--trace", str(files[1]))
    assert result.exit_code == 0 and f"{files[0]} plays the answer" in result.stderr
    given = run_json(*[one for one in asked if one != "--json"])
    trace, plain = load_traces(files[1])
    assert trace.text == given["text"] and trace.question == PROMPT
    assert (plain and plain.text) == (given["plain"]["text"] if "--compare" in options else None)
    assert (trace.threads[0].logprobs is None) == ("--plain" in options)
    assert run("replay", str(files[1]), str(files[2])).exit_code == 0
    assert files[0].read_bytes() == files[2].read_bytes() == replay_page(trace, plain).encode()


def test_what_json_wrote_is_replayed_without_a_clock(checkpoint, tmp_path):
    asked = ["generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "24", "--fork-bias", "50"]
    given = run_json(*asked)
    (tmp_path / "answer.json").write_text(json.dumps(given), encoding="utf-8")
    assert run("replay", str(tmp_path / "answer.json"), str(tmp_path / "page.html"), "--model", checkpoint).exit_code == 0
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    wanted = replay_page(trace_of_tree(ParagraphTree.from_dict(given["tree"]), tokenizer, question=PROMPT))
    assert (tmp_path / "page.html").read_bytes() == wanted.encode()


def test_an_answer_is_not_replayed_with_the_tokens_of_another_model(checkpoint, tmp_path):
    """The page showed other words, and nothing said so."""
    given = run_json("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "24")
    (tmp_path / "answer.json").write_text(json.dumps(given | {"text": "what the other wrote"}), encoding="utf-8")
    result = run("replay", str(tmp_path / "answer.json"), str(tmp_path / "page.html"), "--model", checkpoint)
    assert result.exit_code == 2 and "--model" in result.stderr and not (tmp_path / "page.html").exists()


def test_json_controls_no_terminal():
    shown = decode._shown({"text": "a\x9b31m\x7f\x1bé"})
    assert json.loads(shown)["text"] == "a\x9b31m\x7f\x1bé" and not set("\x9b\x7f\x1b") & set(shown)


@pytest.mark.parametrize("content", ["{}", "no JSON", '{"tree": 3}', '{"tree": {"threads": [{"index": 0}]}}'])
def test_what_nobody_saved_is_refused_in_a_sentence(content, checkpoint, tmp_path):
    (tmp_path / "answer.json").write_text(content, encoding="utf-8")
    result = run("replay", str(tmp_path / "answer.json"), str(tmp_path / "page.html"), "--model", checkpoint)
    assert result.exit_code == 2 and "--trace" in result.stderr and not (tmp_path / "page.html").exists()


def test_a_page_in_a_folder_that_is_not_there_is_refused_at_once(checkpoint, tmp_path):
    result = run("generate", PROMPT, "--model", checkpoint, "--html", str(tmp_path / "no" / "page.html"))
    assert result.exit_code == 2 and "--html" in result.stderr and result.stdout == ""


def test_compare_tells_both_speeds_and_the_ratio(checkpoint):
    output = run("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "8", "--compare").stdout
    assert output.count("tokens/s") == 2
    assert "times as fast per token" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", PROMPT, "--plain", "--compare"], "give one of them"),
        (["generate", PROMPT, "--max-threads", "0"], "max-threads"),
        (["generate", PROMPT, "--model", "no/such/folder"], "no/such/folder"),
        (["distill", "-", "answers.jsonl"], "--templates"),
        (["distill", "-", "answers.jsonl", "--templates", "1000000"], "different prompts"),
        (["distill", "no_such_file.jsonl", "answers.jsonl"], "no_such_file.jsonl"),
    ],
)
def test_what_cannot_be_done_is_said_without_a_traceback(arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_model_that_was_not_tuned_is_refused_in_one_line(untuned):
    result = run("generate", PROMPT, "--model", untuned)
    assert result.exit_code == 2
    assert result.stdout == ""
    loading, refused = result.stderr.splitlines()
    assert loading == f"hf-apar: loading {untuned} ..."
    assert refused.startswith("hf-apar: ") and "[Fork]" in refused and "--plain" in refused and "Python" not in refused


def test_a_line_that_is_no_prompt_is_set_aside(untuned, tmp_path):
    path, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "One?"}\n\n{"question": "Two?"}\n{"prompt": null}\n')
    arguments = ("distill", str(path), str(answers), "--model", untuned, "--max-new-tokens", "400")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "2 records set aside: 2 because the record has no text under `prompt`" in result.stderr
    assert [json.loads(line)["line"] for line in (tmp_path / "answers.jsonl.rejected.jsonl").open()] == [3, 4]
    path.write_text('{"question": "Two?"}\n')
    result = run(*arguments)
    assert result.exit_code == 2
    assert "of 1, 1 because the record has no text under `prompt`" in result.stderr and "(first: record 1)" in result.stderr


def test_a_prompt_with_more_to_it_is_set_aside(untuned, tmp_path):
    """Its system message was left out in silence."""
    path, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    turn = {"role": "user", "content": "Hi"}
    more = [
        {"id": 1, "source": "x", "system": "", "tools": None, "messages": []}, {"system": "Answer in French."},
        {"messages": [turn]}, {"messages": [{"role": "system", "content": "Be brief."}, turn]}, {"history": [["a", "b"]]},
        {"input": "x"}, {"tools": "[{}]"},
    ]  # fmt: skip
    path.write_text("".join(json.dumps({"prompt": "Hi", **fields}) + "\n" for fields in more))
    result = run("distill", str(path), str(answers), "--model", untuned, "--max-new-tokens", "400")
    assert result.exit_code == 0, result.output
    aside = [json.loads(line) for line in (tmp_path / "answers.jsonl.rejected.jsonl").open()]
    assert [(one["line"], one["reason"].split("`")[1]) for one in aside] == [
        (2, "system"), (4, "messages"), (5, "history"), (6, "input"), (7, "tools")
    ]  # fmt: skip


def test_prompts_of_the_recipe_in_a_folder_are_refused_in_a_sentence(tmp_path):
    """It said "Is a directory" and no more."""
    result = run("recipe", "--output", str(tmp_path / "out"), "--prompts", str(tmp_path))
    assert result.exit_code == 2
    assert f"{tmp_path} is a folder; give a file of prompts, JSON Lines or one array" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_distill_goes_through_all_prompts_once(untuned, tmp_path):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{number}?"}) + "\n" for number in range(5)))
    options = ("--model", untuned, "--batch-size", "2", "--max-new-tokens", "400")
    arguments = ("distill", str(prompts), str(answers), *options)
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    assert json.loads((tmp_path / "answers.jsonl.done").read_text())["done"] == 5
    finished = read_answers(answers)
    assert {answer.prompt for answer in finished} <= {f"{number}?" for number in range(5)}
    assert f"of 5 answers {len(finished)} kept, {5 - len(finished)} dropped" in first.stdout
    assert run(*arguments).exit_code == 0
    assert read_answers(answers) == finished
    hotter = run(*arguments, "--temperature", "0.9")
    assert hotter.exit_code == 2 and "temperature" in hotter.stderr and read_answers(answers) == finished


def test_distill_says_why_it_drops_all(untuned, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One?"}\n' * 3)
    arguments = (str(tmp_path / "prompts.jsonl"), str(tmp_path / "a.jsonl"), "--model", untuned, "--max-new-tokens", "1")
    result = run("distill", *arguments)
    assert result.exit_code == 2
    assert "dropped        3  cut off at the most new tokens" in result.stdout
    assert "none of 3 answers can be kept; of 3: cut off" in result.stderr


GROUPS = (Loading, Tuning, Selection, HeadsTuning, PromptChoice, Sampling, AnswerLimits, Elaboration, TreeLimits)


def test_the_recipe_of_the_default_model_and_every_key_survive_the_file(tmp_path):
    """The oracle is the recipe itself: what `--example` shows, with all that is commented out, reads as it was."""
    given = read_recipe(EXAMPLE)
    assert (given.answers.max_new_tokens, given.train.compile, given.sampling.engine) == (420, True, Engine.vllm)
    shown = run("recipe", "--example")
    assert shown.exit_code == 0
    file = tmp_path / "recipe.toml"
    file.write_text(shown.stdout, encoding="utf-8")
    assert read_recipe(file) == given
    for recipe in (given, Recipe()):
        whole = re.sub(r'(?m)^#(?!.*= "\.\.\."$)(\w+ = )', r"\1", written(recipe))
        file.write_text(whole, encoding="utf-8")
        assert read_recipe(file) == recipe
        names = {one.name for group in GROUPS for one in fields(group)}
        assert all(f"\n{name} = " in whole or f"\n#{name} = " in whole for name in names)


def test_the_recipe_of_the_docs_is_one(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"(?ms)^```toml\n(.*?)^```$", page)
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.toml").select.min_balance == 0.37


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[train]\nlerning_rate = 1.0", r"\[train\], has the unknown key lerning_rate; did you mean learning_rate\?"),
        ("[trian]\n", r"the unknown key trian; did you mean train\?"),
        ("zzz = 1", r"the unknown key zzz; its keys are model, prompts, "),
        ("[train]\nrank = 1.5", r"\[train\], has rank = 1.5; it is a whole number"),
        ("[select]\nheld_out = 2", r"held_out = 2.0?; it is at least 0 and at most 1"),
        ("[sampling]\nengine = 'gpu'", "engine = 'gpu'; it is one of transformers, vllm"),
        ("train = 3", "train = 3; it is a table"),
        ("bf16 = 1", "bf16 = 1; it is true or false"),
        ("[select]\nheld_out = 1.0", "held_out 1.0"),
        ("seed = ", "is no TOML"),
        ("chat_template_kwargs = 'no'", "chat_template_kwargs = 'no'; it is a table"),
        ("[extract]\nwithout = 'poem'", "without = 'poem'; it is a list of texts"),
        ("[asking]\nlanguages = [1]", r"languages = \[1\]; it is a list of texts"),
    ],
)
def test_a_wrong_recipe_is_refused_in_a_sentence(text, said, tmp_path):
    (tmp_path / "r.toml").write_text(text)
    result = run("recipe", str(tmp_path / "r.toml"), "--output", str(tmp_path / "out"))
    assert result.exit_code == 2 and re.search(said, result.stderr.replace("\n", " ")), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["chat_template_kwargs = {a = false}", "[chat_template_kwargs]\na = false"])
def test_a_recipe_takes_arguments_of_the_chat_template(text, tmp_path):
    """A thinking model could not be taught: every table was refused as no list."""
    (tmp_path / "r.toml").write_text(text)
    assert read_recipe(tmp_path / "r.toml").chat_template_kwargs == {"a": False}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[loading]\nattn_implementation = 'flash_attention_2'", "takes no tree for a mask"),
        ("[extract]\nwithout = ['poems']", "there is no rule called poems"),
        ("[asking]\ntemplates = 5000\nlanguages = ['de']", "templates is 5000: the templates give 312"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_the_model_answers(untuned, text, said, tmp_path):
    (tmp_path / "r.toml").write_text(text)
    result = run("recipe", str(tmp_path / "r.toml"), "--output", str(tmp_path / "out"), "--model", untuned)
    assert result.exit_code == 2 and said in " ".join(result.stderr.split())
    assert not (tmp_path / "out" / "answers.jsonl").exists() and not (tmp_path / "out" / "recipe.json").exists()


def test_prompts_that_no_tokenizer_can_read_are_set_aside(untuned, tmp_path):
    """One half of an emoji ended a run, and every further call, at its batch."""
    lines = [json.dumps({"prompt": prompt}) for prompt in ("0?", "\ud83d", " ", "1?")]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    options = ("--model", untuned, "--max-new-tokens", "400")
    result = run("distill", str(tmp_path / "p.jsonl"), str(tmp_path / "a.jsonl"), *options)
    assert result.exit_code == 0, result.output
    assert "2 records set aside" in result.stderr and "half a surrogate" in result.stderr and "is empty" in result.stderr
    assert "of 2 answers" in result.stdout


def test_heads_are_trained_and_used_and_change_no_text(checkpoint, tmp_path):
    answers, heads = tmp_path / "answers.jsonl", tmp_path / "trained"
    texts = ["- A: a b c d e\n- B: f g h i j\n- C: k l m n o"] * 8 + ["no list"] * 4
    answers.write_text(
        "".join(json.dumps({"prompt": f"{n}?", "response": text}) + "\n" for n, text in enumerate(texts))
    )
    small = ("--inner-size", "16", "--draft-vocabulary", "64", "--length", "2", "--max-steps", "2", "--dtype", "float32")
    result = run("train-medusa", str(answers), str(heads), "--model", checkpoint, *small)
    assert result.exit_code == 0, result.output
    assert "answers (chats repaired: 0) the filters keep" in result.stderr, "what is not trained on was told to nobody"
    options = ("generate", PROMPT, "--model", checkpoint, "--max-new-tokens", "24")
    alone, drafted = run_json(*options), run_json(*options, "--heads", str(heads))
    assert drafted["text"] == alone["text"]
    assert alone["stats"]["drafts"] == 0 < drafted["stats"]["steps"] <= alone["stats"]["steps"]
    missing = run(*options, "--heads", str(tmp_path))
    assert missing.exit_code == 2 and "train-medusa" in missing.stderr


def test_the_recipe_goes_through_all_stages_and_on_from_where_it_stopped(untuned, tmp_path, monkeypatch):
    """From answers that are there already: a random model's own would hold no list. Few prompts: no answer ends."""
    monkeypatch.setattr("hf_apar.cli.recipes.EVALUATED", 6)
    texts = ["- A: a b c d e\n- B: f g h i j\n- C: k l m n o"] * 8 + ["no list"] * 4
    own = [TextAnswer(f"{place}?", text) for place, text in enumerate(texts)]
    limits = _Limits(new_tokens=384, whole_tokens=384, items=None)
    settings = (limits, f"{untuned} transformers float32 0.3 1.0 0")
    list(in_batches(template_questions(3), tmp_path / "answers.jsonl", 3, settings, lambda _: own))
    file = tmp_path / "recipe.toml"
    file.write_text("[asking]\ntemplates = 3\n[train]\nmax_steps = 2\n[heads]\nmax_steps = 2\n")
    asked = ("recipe", str(file), "--output", str(tmp_path), "--model", untuned)
    assert run(*asked, "--until", "answers").exit_code == 0 and not (tmp_path / "longer.trees.jsonl").exists()
    early = run(*asked, "--until", "trees")
    assert early.exit_code == 0, early.output
    assert early.stderr.count("made already") == 1
    assert "8" in early.stdout and "66.7%" in early.stdout, "the share that is structured"
    assert early.stdout.endswith("done, up to trees; without --until the rest is made\n")
    assert not (tmp_path / "adapter").exists()
    first = run(*asked)
    assert first.exit_code == 0, first.output
    assert all(f"{number}. " in first.stderr for number in range(1, 7)) and first.stderr.count("made already") == 3
    asked_of = [answer.prompt for answer in read_answers(tmp_path / "longer.jsonl")]
    assert asked_of == [answer.prompt for answer in read_answers(tmp_path / "answers.jsonl")]
    adapter = tmp_path / "adapter"
    made = {file.name: file.stat().st_mtime for file in adapter.iterdir()}
    lines = {file.name: file.read_bytes() for file in tmp_path.glob("*.jsonl")}
    assert {"adapter_model.safetensors", "metrics.json", "medusa.safetensors"} <= made.keys()
    assert read_recipe(adapter / "recipe.toml") == replace(read_recipe(file), model=untuned)
    evaluation = json.loads((adapter / "evaluation" / "figures.json").read_text())
    assert {arm: sum(one["suites"].values()) for one in [evaluation] for arm in one["arms"]} == {"plain": 6, "apar": 6}
    answers = answers_in(adapter / "evaluation" / "answers.jsonl")
    assert {key for key, _ in answers} == {prompt.key for prompt in prompts_of(["own"], sample=6)} and len(answers) == 12
    for arm, found in evaluation["figures"].items():
        own = [one for (_, name), one in answers.items() if name == arm]
        expected = sum(one.tokens for one in own) / sum(one.counted_steps for one in own)
        assert found["all"]["tokens_per_step"]["value"] == pytest.approx(expected) and f"{expected:.3g} (" in first.stdout
    base, tokenizer = AutoModelForCausalLM.from_pretrained(untuned), AutoTokenizer.from_pretrained(untuned)
    prompts = {prompt.key: encode_chat(tokenizer, [*prompt.messages]) for prompt in prompts_of(["own"], sample=6)}
    nats = [
        mean_nll(base, prompts[key], encode_answer(tokenizer, prompts[key], one.text))
        for (key, arm), one in answers.items()
        if arm == "apar" and one.text.strip()
    ]
    extras = map(json.loads, (adapter / "evaluation" / "extras.jsonl").read_text().splitlines())
    measured = [one["numbers"]["nll"] for one in extras if "nll" in one["numbers"]]
    assert nats and all(pytest.approx(one, rel=1e-4) in measured for one in nats)
    base.save_pretrained(tmp_path / "stranger")
    byte_tokenizer().save_pretrained(tmp_path / "stranger")
    elsewhere = ("--output", str(tmp_path / "elsewhere"))
    stranger = run("evaluate", "--model", str(adapter), "--base", str(tmp_path / "stranger"), *elsewhere)
    assert stranger.exit_code == 2 and "another vocabulary" in stranger.stderr
    again = run(*asked)
    assert again.exit_code == 0 and {file.name: file.read_bytes() for file in tmp_path.glob("*.jsonl")} == lines
    assert {file.name: file.stat().st_mtime for file in adapter.iterdir()} == made
    assert again.stderr.count("made already") == 6
    # FIELD T12: other options are refused by name; test_stages.py has what --restart does
    file.write_text(file.read_text().replace("[train]", "[select]\nmax_forks = 9\n[train]\nlearning_rate = 0.001"))
    other = run(*asked)
    assert other.exit_code == 2 and "--restart" in other.stderr
    assert "max_forks None (now 9), learning_rate 0.0004 (now 0.001)" in other.stderr
    assert {file.name: file.stat().st_mtime for file in adapter.iterdir()} == made
    file.write_text("[asking]\ntemplates = 3\n[train]\nmax_steps = 2\nsave_steps = 7\n[heads]\nmax_steps = 2\n")
    assert run(*asked).stderr.count("made already") == 6, "how often is saved changes nothing"
    (tmp_path / "longer.jsonl").write_text((tmp_path / "answers.jsonl").read_text() + "\n")
    edited = run(*asked)
    assert edited.exit_code == 2 and "the stage trees" in edited.stderr and "longer.jsonl" in edited.stderr
    assert run("generate", PROMPT, "--model", str(adapter), "--max-new-tokens", "8").exit_code == 0


class Letters:
    """Takes token 97 for ``a``, as a tokenizer would."""

    def encode(self, text, **options):
        return list(map(ord, text))

    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens))


def grown(events: str) -> ParagraphTree:
    """Return the tree that events make: ``0a`` is token a of thread 0, ``0>1`` a fork, ``1.`` an end."""
    threads = [Thread(0, None, 0, 1, [])]
    for event in events.split():
        thread = threads[int(event[0])]
        if event[1] == ">":
            threads.append(Thread(int(event[2]), thread.index, len(thread.tokens), thread.depth + 1, []))
        elif event[1] == ".":
            thread.finish_reason = "eos"
        else:
            thread.tokens.append(ord(event[1]))
    return ParagraphTree(threads)


@pytest.mark.parametrize(
    ("events", "text"),
    [
        ("0a 0b", f"ab{CURSOR}"),
        ("0a 0>1 0b 1x", f"ax{CURSOR}b{CURSOR}"),
        ("0a 0>1 0b 1x 1. 0c", f"axbc{CURSOR}"),
        ("0a 0>1 1x 0b 1>2 0>3 2u 1y 3z 2. 1. 3. 0.", "axuybz"),
        ("0a 0. 0>1 1x", f"ax{CURSOR}"),
    ],
)
def test_the_view_shows_every_thread_in_its_place(events, text):
    assert coloured(grown(events), Letters()).plain == text


def test_a_live_thread_has_a_colour_of_its_own_and_a_finished_one_none():
    text = coloured(grown("0a 0>1 0b 1x 1."), Letters())
    assert [(text.plain[span.start : span.end], str(span.style)) for span in text.spans] == [
        ("a", "cyan"), ("b", "cyan"), (CURSOR, "cyan blink"),
    ]  # fmt: skip


def test_the_view_follows_the_first_row():
    live = LiveTree(Letters())
    live.end_step([grown("0a"), grown("0z")])
    assert live.text() == "a"


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40), st.sampled_from(["", "/"]))
def test_the_view_reads_as_the_tree_reads(steps, joint):
    """The oracle is ``ParagraphTree.text``; each step writes a letter in a thread, or forks it."""
    threads = [Thread(0, None, 0, 1, [])]
    for number, (choice, forks) in enumerate(steps):
        thread = threads[choice % len(threads)]
        if forks:
            threads.append(Thread(len(threads), thread.index, len(thread.tokens), thread.depth + 1, []))
        else:
            thread.tokens.append(ord("A") + number)
    tree = ParagraphTree(threads, joint=joint)
    assert coloured(tree, Letters()).plain.replace(CURSOR, "") == tree.text(Letters())
