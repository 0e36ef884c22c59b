"""A model tuned in sequence: the same answers in the same mixture, each as it reads, and an adapter like any other."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from byte_tokenizer import byte_tokenizer
from hf_apar import AparModelForCausalLM, enable_apar
from hf_apar.checkpoints.loading import load_base
from hf_apar.cli import app
from hf_apar.data.distillation.distill import TextAnswer, _Limits, in_batches
from hf_apar.data.distillation.questions import template_questions
from hf_apar.errors import ControlTokenError, DataError
from hf_apar.text.chat import encode_chat
from hf_apar.tokens import add_control_tokens
from hf_apar.training.mixture import training_mixture
from hf_apar.training.rows.features import IGNORED
from hf_apar.training.tuning import Selection
from tuned import train

torch.set_num_threads(1)

LISTS = [
    "- A: a b c d e\n- B: f g h i j\n- C: k l m n o",
    "- A: say [Fork] now and here\n- B: f g h i j\n- C: k l m n o\n\nBye.",
]
ANSWERS = [TextAnswer(f"list {n:02}", LISTS[n % 2]) for n in range(16)] + [
    TextAnswer(f"say {n:02}", "no list") for n in range(40)
]
SELECTION = Selection(held_out=0.2, unforked_share=0.5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    file = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    file.write_text("".join(json.dumps({"prompt": a.prompt, "response": a.response}) + "\n" for a in ANSWERS))
    return file


@pytest.fixture(scope="module")
def options(base):
    return {"model": str(base), "rank": 8, "learning_rate": 2e-2, "max_length": 256, "save_steps": 10, "max_steps": 20}


@pytest.fixture(scope="module")
def trained(answers, options, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    return output, train(answers, output, SELECTION, sequential=True, repetition_penalty=1.2, **options)


@pytest.fixture(scope="module")
def forking(answers, options, tmp_path_factory):
    output = tmp_path_factory.mktemp("forking")
    train(answers, output, SELECTION, **options | {"max_steps": 1})
    return output


def test_rows_are_the_answers_of_the_forking_run_as_they_read(base):
    """The oracle: the rows of that run without control tokens, and the tokens of each whole answer after its prompt."""
    model, tokenizer = (kind.from_pretrained(base) for kind in (AutoModelForCausalLM, AutoTokenizer))
    plain = training_mixture(ANSWERS, tokenizer, (len(tokenizer), len(tokenizer) + 1), SELECTION, sequential=True)
    control = add_control_tokens(model, tokenizer)
    forked = training_mixture(ANSWERS, tokenizer, control, SELECTION)
    answer_of = {one.prompt: one.response for one in ANSWERS}
    for rows, trees in ((plain.train, forked.train), (plain.held_out, forked.held_out)):
        assert len(rows) == len(trees)
        for row, tree in zip(rows, trees, strict=True):
            text = tokenizer.decode(row.input_ids)
            assert text == tokenizer.decode([token for token in tree.input_ids if token not in control])
            prompt = next(one for one in answer_of if f"{one}<" in text)
            before = encode_chat(tokenizer, [{"role": "user", "content": prompt}])
            answer = tokenizer.encode(answer_of[prompt], add_special_tokens=False, split_special_tokens=True)
            assert row.input_ids == before + answer
            assert row.shift_labels == [IGNORED] * (len(before) - 1) + answer + [tokenizer.eos_token_id]
            assert row.position_ids == list(range(len(row)))
            assert row.visible_until == [len(row)] * len(row)
            assert row.fork_banned == row.children == []
    assert any(control[0] in tree.input_ids for tree in forked.held_out) and plain.max_depth == forked.max_depth == 2


def test_the_adapter_has_no_new_tokens(trained, base):
    output, metrics = trained
    tensors = load_file(output / "adapter_model.safetensors")
    assert tensors and all(".lora_" in name for name in tensors)
    assert len(AutoTokenizer.from_pretrained(output)) == len(AutoTokenizer.from_pretrained(base))
    config = GenerationConfig.from_pretrained(output)
    assert not hasattr(config, "apar_config") and config.suppress_tokens is None
    assert config.repetition_penalty == 1.2
    assert json.loads((output / "made_with.json").read_text())["sequential"] is True
    assert not any("fork" in name for name in metrics) and metrics["eval_loss"] > 0


def test_it_learns_the_answers(trained, answers, options, tmp_path):
    untrained = train(answers, tmp_path, SELECTION, sequential=True, **options | {"learning_rate": 1e-9, "max_steps": 1})
    assert trained[1]["eval_loss"] < 0.5 * untrained["eval_loss"]


def test_all_that_load_adapters_load_it(trained, base):
    output = trained[0]
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output).eval()
    automatic = AutoModelForCausalLM.from_pretrained(output).eval()
    merged, tokenizer = load_base(output)
    ids = torch.arange(5, len(tokenizer)).unsqueeze(0)  # (1, length)
    with torch.no_grad():
        expected = wrapped(ids).logits
        assert not torch.allclose(expected, AutoModelForCausalLM.from_pretrained(base)(ids).logits, atol=1e-2)
        assert torch.equal(automatic(ids).logits, expected)
        assert (merged(ids).logits - expected).abs().max() < 1e-4
    assert type(merged) is LlamaForCausalLM and merged.generation_config.repetition_penalty == 1.2
    assert merged.name_or_path == str(output), "an adapter of it would record its base within"


def test_it_cannot_fork(trained):
    output = trained[0]
    model, tokenizer = load_base(output)
    for load in (lambda: enable_apar(model, tokenizer), lambda: AparModelForCausalLM.from_pretrained(output)):
        with pytest.raises(ControlTokenError, match=r"LlamaForCausalLM has no \[Fork\] and \[Child\] tokens; call"):
            load()


def test_a_run_that_goes_on_ends_like_one_that_never_stopped(trained, answers, options, tmp_path):
    output, metrics = trained
    for name in ("checkpoint-10", "made_with.json"):
        (shutil.copytree if (output / name).is_dir() else shutil.copy)(output / name, tmp_path / name)
    again = train(answers, tmp_path, SELECTION, sequential=True, repetition_penalty=1.2, **options)
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, output))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_does_not_go_on_in_the_other_way(trained, answers, options, tmp_path):
    for name in ("checkpoint-20", "made_with.json"):
        (shutil.copytree if (trained[0] / name).is_dir() else shutil.copy)(trained[0] / name, tmp_path / name)
    with pytest.raises(DataError, match="checkpoint-20 comes from other answers"):
        train(answers, tmp_path, SELECTION, **options)


def test_a_run_starts_from_an_adapter_of_its_kind(trained, forking, answers, options, tmp_path):
    more = train(answers, tmp_path, SELECTION, start=trained[0], sequential=True, **options)
    assert more["eval_loss"] < trained[1]["eval_loss"]
    with pytest.raises(ControlTokenError, match="has learnt to fork, and this model is to answer in sequence"):
        train(answers, tmp_path / "a", SELECTION, start=forking, sequential=True, **options)
    with pytest.raises(ControlTokenError, match="was trained with sequential and has no control tokens"):
        train(answers, tmp_path / "b", SELECTION, start=trained[0], **options)


def test_it_can_be_taught_to_fork(trained, answers, options, tmp_path):
    train(answers, tmp_path, SELECTION, **options | {"model": str(trained[0]), "max_steps": 1})
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(trained[0])
    assert AparModelForCausalLM.from_pretrained(tmp_path).generation_config.apar_config["max_depth"] == 2


def run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_the_commands_train_and_decode_it(base, answers, tmp_path):
    output = tmp_path / "adapter"
    small = ("--rank", 4, "--max-steps", 2, "--max-length", 256, "--held-out", 0.2)
    made = run("train", answers, output, "--model", base, "--sequential", *small)
    assert made.exit_code == 0, made.output
    assert "eval_loss" in made.stdout and "fork" not in made.stdout
    plain = run("generate", "say 01", "--model", output, "--plain", "--max-new-tokens", 4)
    assert plain.exit_code == 0, plain.output
    threads = run("generate", "say 01", "--model", output, "--max-new-tokens", 4)
    assert threads.exit_code == 2 and "was not tuned for APAR" in threads.stderr and "generate --plain" in threads.stderr


def test_a_recipe_ends_with_it(base, tmp_path):
    """From answers that are there already: a random model's own would hold no list."""
    settings = (_Limits(new_tokens=384, whole_tokens=384, items=None), f"{base} transformers float32 0.3 1.0 0")
    list(in_batches(template_questions(3), tmp_path / "answers.jsonl", 3, settings, lambda _: ANSWERS))
    file = tmp_path / "recipe.toml"
    file.write_text(
        "[asking]\ntemplates = 3\n[elaborate]\nmin_detail_tokens = 0\n"
        "[train]\nsequential = true\nmax_steps = 2\nrank = 4\nmax_length = 256\n"
    )
    asked = ("recipe", file, "--output", tmp_path, "--model", base)
    made = run(*asked)
    assert made.exit_code == 0, made.output
    assert "4. the model learns the answers as they read" in made.stderr and "heads" not in made.stderr
    assert made.stdout.strip().endswith(f'done: hf-apar generate --plain --model {tmp_path / "adapter"} "..."')
    assert sorted(json.loads((tmp_path / "recipe.json").read_text())) == ["adapter", "answers", "longer", "trees"]
    assert load_base(tmp_path / "adapter")[0].generation_config.suppress_tokens is None
    file.write_text(file.read_text().replace("sequential = true\n", ""))
    other = run(*asked)
    assert other.exit_code == 2 and "sequential True (now False)" in other.stderr
