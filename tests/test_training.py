"""The recipe on a tiny model: it learns to fork, goes on from a checkpoint as if never stopped, and its adapter loads."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from byte_tokenizer import byte_tokenizer
from hf_apar.checkpoints.adapters import load_adapter
from hf_apar.data.distillation.distill import TextAnswer
from hf_apar.data.extraction.markdown import extract
from hf_apar.errors import ConfigurationError, ControlTokenError, DataError
from hf_apar.text.chat import encode_chat
from hf_apar.tokens import FORK_TOKEN, add_control_tokens
from hf_apar.training.lora import AdapterTrainer
from hf_apar.training.metrics import fork_metrics
from hf_apar.training.mixture import training_mixture
from hf_apar.training.rows.collator import DataCollatorForApar, pack
from hf_apar.training.rows.features import IGNORED
from hf_apar.training.tuning import Selection
from tuned import train

torch.set_num_threads(1)

LIST = "- A: a b c d e\n- B: f g h i j\n- C: k l m n o"
ANSWERS = [TextAnswer(f"list {n:02}", LIST) for n in range(16)] + [TextAnswer(f"say {n:02}", "no list") for n in range(40)]


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


HELD_OUT = Selection(held_out=0.2)


@pytest.fixture(scope="module")
def trained(base, answers, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    options = {"model": str(base), "rank": 8, "learning_rate": 2e-2, "token_rate": 2.0, "max_length": 256, "save_steps": 40}
    metrics = train(answers, output, HELD_OUT, max_steps=80, fork_bias=0.5, repetition_penalty=1.2, **options)
    return output, options, metrics


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_it_learns_where_to_fork(trained):
    output, _, metrics = trained
    assert metrics["eval_fork_recall"] > 0.9 and metrics["eval_fork_precision"] > 0.9
    report = json.loads((output / "metrics.json").read_text())
    assert report["final"]["eval_fork_recall"] == metrics["eval_fork_recall"]


def test_the_output_holds_all_that_decoding_needs(trained, base):
    output = trained[0]
    tensors = load_file(output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    rows = [tensor for name, tensor in tensors.items() if "trainable_tokens" in name]
    assert [tuple(tensor.shape) for tensor in rows] == [(2, 32)]
    assert not any("embed_tokens.weight" in name or "lm_head" in name for name in tensors)
    fork, child = AutoTokenizer.from_pretrained(output).convert_tokens_to_ids(["[Fork]", "[Child]"])
    config = GenerationConfig.from_pretrained(output)
    assert config.apar_config == {"fork_token_id": fork, "child_token_id": child, "max_depth": 2, "fork_bias": 0.5}
    assert config.repetition_penalty == 1.2
    assert config.suppress_tokens == [fork, child]
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_a_run_that_goes_on_ends_like_one_that_never_stopped(trained, answers, tmp_path):
    output, options, metrics = trained
    shutil.copytree(output / "checkpoint-40", tmp_path / "checkpoint-40")
    shutil.copy(output / "made_with.json", tmp_path)
    again = train(answers, tmp_path, HELD_OUT, max_steps=80, fork_bias=0.5, repetition_penalty=1.2, **options)
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, output))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    ("selection", "seed"),
    [(Selection(held_out=0.1), 0), (Selection(held_out=0.2, unforked_share=0.9), 0), (HELD_OUT, 1), (HELD_OUT, 0)],
)
def test_a_run_does_not_go_on_with_other_answers(trained, answers, tmp_path, selection, seed):
    output, options, _ = trained
    shutil.copytree(output / "checkpoint-40", tmp_path / "checkpoint-40")
    shutil.copy(output / "made_with.json", tmp_path)
    if (selection, seed) == (HELD_OUT, 0):
        text = answers.read_text()
        answers = tmp_path / "answers.jsonl"
        answers.write_text(text.replace("no list", "none"))
    with pytest.raises(DataError, match="checkpoint-40 comes from other answers"):
        train(answers, tmp_path, selection, max_steps=80, seed=seed, **options)
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("limit", [{"max_steps": 6}, {"epochs": 1.0}], ids=["steps", "epochs"])
def test_t3_an_end_that_failed_is_repeated_without_training_again(base, answers, tmp_path, limit):
    """Here a folder stands where the adapter is to be written; what had been trained is in the last checkpoint."""
    options = {"model": str(base), "rank": 8, "max_length": 256, "save_steps": 100, "eval_steps": 100, **limit}
    (tmp_path / "adapter_model.safetensors").mkdir()
    with pytest.raises(OSError, match="adapter_model"):
        train(answers, tmp_path, HELD_OUT, **options)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    before = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    (tmp_path / "adapter_model.safetensors").rmdir()
    metrics = train(answers, tmp_path, HELD_OUT, **options)
    assert list(tmp_path.glob("checkpoint-*")) == [checkpoint]
    assert {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()} == before
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, checkpoint))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in ours)
    whole = train(answers, tmp_path / "whole", HELD_OUT, **options)
    assert metrics["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6)
    adapters = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "whole"))
    assert all(map(torch.equal, *(adapter.values() for adapter in adapters)))


def test_t3_what_cannot_be_written_fails_before_the_first_step(base, answers, tmp_path):
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(OSError, match="generation_config"):
        train(answers, tmp_path, HELD_OUT, model=str(base), rank=8, max_length=256, max_steps=1)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 4}, r"rank 8 \(now 4\)"),
        ({"learning_rate": 0.5, "bf16": True}, r"learning_rate 0\.02 \(now 0\.5\), bf16 False \(now True\)"),
    ],
)
def test_t12_a_run_does_not_go_on_with_other_options(trained, answers, tmp_path, changes, said):
    output, options, _ = trained
    shutil.copytree(output / "checkpoint-40", tmp_path / "checkpoint-40")
    shutil.copy(output / "made_with.json", tmp_path)
    with pytest.raises(DataError, match=f"checkpoint-40 was trained with {said}; go on with that"):
        train(answers, tmp_path, HELD_OUT, max_steps=80, **options | changes)
    assert not (tmp_path / "metrics.json").exists()


def test_a_run_starts_from_an_adapter(trained, base, answers, tmp_path):
    output, options, metrics = trained
    hardly = options | {"rank": 4, "learning_rate": 1e-9}
    again = train(answers, tmp_path, HELD_OUT, start=output, max_steps=1, **hardly)
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=0.05)  # the adapter was saved in bfloat16
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, output))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    moved = train(answers, tmp_path / "moved", HELD_OUT, start=output, max_steps=2, **options)
    after = load_file(tmp_path / "moved" / "adapter_model.safetensors")
    assert moved["eval_loss"] != metrics["eval_loss"]
    assert not any(torch.equal(after[name], theirs[name]) for name in theirs)


def test_a_run_that_starts_from_an_adapter_keeps_how_it_decodes(trained, base, answers, tmp_path):
    output, options, _ = trained
    first, own = tmp_path / "first", {"max_steps": 1}
    train(answers, first, HELD_OUT, start=output, **options | own | {"fork_bias": 1.5, "repetition_penalty": 1.08})
    settings = json.loads((first / "generation_config.json").read_text())
    settings["apar_config"]["max_depth"] = 5
    (first / "generation_config.json").write_text(json.dumps(settings))
    told = [{}, {"fork_bias": 0.0, "repetition_penalty": 1.0}]
    for number, (more, expected) in enumerate(zip(told, [(1.5, 1.08), (0.0, 1.0)], strict=True)):
        train(answers, tmp_path / str(number), HELD_OUT, start=first, **options | own | more)
        found = json.loads((tmp_path / str(number) / "generation_config.json").read_text())
        assert (found["apar_config"]["fork_bias"], found["repetition_penalty"]) == expected
        assert found["apar_config"]["max_depth"] == 5, "it has learnt to fork deeper than these answers do"


def test_a_run_starts_from_no_other_folder(base, answers, tmp_path):
    with pytest.raises(ConfigurationError, match=r"no adapter_config\.json"):
        train(answers, tmp_path / "out", HELD_OUT, model=str(base), start=tmp_path)


def test_a_loaded_adapter_is_the_wrapped_model_merged(trained, base):
    output = trained[0]
    model, tokenizer = loaded(base)
    merged = load_adapter(model, tokenizer, output)
    other, other_tokenizer = loaded(base)
    add_control_tokens(other, other_tokenizer)
    wrapped = PeftModel.from_pretrained(other, output).eval()
    ids = torch.arange(5, len(tokenizer)).unsqueeze(0)  # (1, length), [Fork] and [Child] among them
    with torch.no_grad():
        difference = merged(ids).logits - wrapped(ids).logits
    assert difference.abs().max() < 1e-4
    assert type(merged) is LlamaForCausalLM
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert merged.generation_config.suppress_tokens == list(add_control_tokens(merged, tokenizer))


def test_adapters_that_do_not_fit_are_refused(trained, base, tmp_path):
    with pytest.raises(ConfigurationError, match=r"no adapter_config\.json"):
        load_adapter(*loaded(base), tmp_path)
    model, tokenizer = loaded(base)
    tokenizer.add_tokens(["another"])
    with pytest.raises(ControlTokenError, match="was trained with the"):
        load_adapter(model, tokenizer, trained[0])


def test_the_mixture_keeps_its_share_and_holds_some_out(base):
    model, tokenizer = loaded(base)
    ids = add_control_tokens(model, tokenizer)
    selection = Selection(structured_share=0.5, unforked_share=0.0, held_out=0.25)
    mixture = training_mixture(ANSWERS, tokenizer, ids, selection)
    trees = mixture.train + mixture.held_out
    assert (len(mixture.train), len(mixture.held_out), mixture.max_depth) == (24, 8, 2)
    assert sum(ids[0] in tree.input_ids for tree in trees) == 16
    assert mixture == training_mixture(ANSWERS, tokenizer, ids, selection)


def test_some_structured_answers_come_once_more_as_they_read(base):
    model, tokenizer = loaded(base)
    ids = add_control_tokens(model, tokenizer)
    options = {"structured_share": 0.5, "held_out": 0.25}
    selections = (Selection(unforked_share=share, **options) for share in (0.0, 0.5))
    without, mixture = (training_mixture(ANSWERS, tokenizer, ids, selection) for selection in selections)
    assert mixture.held_out == without.held_out
    forked = [tree for tree in without.train if ids[0] in tree.input_ids]
    whole = [tree for tree in mixture.train if ids[0] not in tree.input_ids]
    assert len(mixture.train) == len(without.train) + round(0.5 * len(forked))
    lists = [tree for tree in whole if LIST in tokenizer.decode(tree.input_ids)]
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "list 00"}])
    ignored = len(prompt) - 1
    assert len(lists) == round(0.5 * len(forked))
    assert all(tree.shift_labels[-1] == tokenizer.eos_token_id for tree in lists)
    assert all(ids[0] not in tree.shift_labels and tree.shift_labels.count(IGNORED) == ignored for tree in lists)


@pytest.mark.parametrize(("items", "processes"), [(None, 1), (7, 1), (7, 2)])
def test_the_loss_leaves_fork_out_of_the_choice_where_a_copy_reads_on(base, tmp_path, monkeypatch, items, processes):
    """Against the logits with [Fork] taken out by hand at each place of a copy where its tree forks, and nowhere else."""
    model, tokenizer = loaded(base)
    fork, child = add_control_tokens(model, tokenizer)
    selection = Selection(structured_share=0.5, unforked_share=0.5, held_out=0.25)
    mixture = training_mixture(ANSWERS, tokenizer, (fork, child), selection)
    batch = DataCollatorForApar(0, fork_banned=True)([row.to_dict() for row in pack(mixture.train, 300)])
    with torch.no_grad():  # tied: [Fork] is likelier than any other token where it is banned
        rows, plain = model.get_input_embeddings().weight, {k: v for k, v in batch.items() if k != "fork_banned"}
        rows[fork] = 3 * rows[model(**plain).logits[batch["fork_banned"]].mean(0).argmax()]
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False)
    trainer = AdapterTrainer(model=model, args=arguments, token_rate=1.0, fork_id=fork)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", processes)  # the mean over them undoes the factor
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    banned = batch.pop("fork_banned")
    copies = [tree for tree in mixture.train if tree.fork_banned]
    assert banned.sum() == sum(len(tree.fork_banned) for tree in copies) == 3 * len(copies) > 0
    colon = tokenizer.encode(":", add_special_tokens=False)[0]
    assert set(batch["input_ids"][banned].tolist()) == {colon}, "a detail follows its title"
    logits = model(**batch).logits.clone()
    logits[..., fork][banned] = -torch.inf
    expected = cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="sum")
    count = items or int((batch["shift_labels"] != IGNORED).sum())
    assert loss.item() == pytest.approx(processes * expected.item() / count, rel=1e-5)
    assert loss.item() < trainer.compute_loss(model, dict(batch), num_items_in_batch=items).item() - 1e-3


@pytest.mark.parametrize(
    "share",
    [
        {"unforked_share": 1.5},
        {"structured_share": 0.0},
        {"structured_share": 1.1},
        {"held_out": 0.0},
        {"held_out": 1.0},
    ],
)
def test_a_share_is_between_0_and_1(share):
    ((name, value),) = share.items()
    with pytest.raises(ConfigurationError, match=f"{name} (is )?{value}"):
        Selection(**share)


@pytest.mark.parametrize(
    ("answers", "options", "message"),
    [
        (ANSWERS[-3:], {}, "none of the 3 answers has a structure"),
        (ANSWERS[:1], {}, "too few to hold some out"),
        (ANSWERS, {"max_length": 8}, "0 answers of at most 8 tokens"),
    ],
)
def test_answers_that_cannot_be_trained_on(base, answers, options, message):
    model, tokenizer = loaded(base)
    with pytest.raises(DataError, match=message):
        training_mixture(answers, tokenizer, add_control_tokens(model, tokenizer), **options)


def test_what_repeats_itself_is_left_out(base):
    model, tokenizer = loaded(base)
    ids = add_control_tokens(model, tokenizer)
    loop = TextAnswer("loop", "It goes on and on and then. " * 9)
    twice = TextAnswer("twice", LIST.replace("B:", "A:"))
    selection = Selection(structured_share=0.1, unforked_share=0.0, held_out=0.1)
    kept = training_mixture([*ANSWERS, loop, twice], tokenizer, ids, selection)
    assert len(kept.train) + len(kept.held_out) == len(ANSWERS)
    everything = training_mixture([*ANSWERS, loop, twice], tokenizer, ids, replace(selection, max_repetition=1.0))
    assert len(everything.train) + len(everything.held_out) == len(ANSWERS) + 2


def test_titles_that_differ_in_a_number_are_two(base):
    """An itinerary, a plan by weeks or a timeline says nothing twice."""
    model, tokenizer = loaded(base)
    ids = add_control_tokens(model, tokenizer)
    lines = ("- **Day {}**: {}", "- **19{}4**: {}", "* **Week {}**: {}", "1. **Step {}**: {}")
    words = ("We walk along the river all day.", "They build another house there.", "You learn to swim well.")
    plans = ["\n".join(line.format(n, text) for n, text in enumerate(words, 1)) for line in lines]
    assert all(extract(plan).fork_count == 3 for plan in plans)
    selection = Selection(structured_share=0.1, unforked_share=0.0, held_out=0.1)
    given = [*ANSWERS, *(TextAnswer(f"{place}", plan) for place, plan in enumerate(plans))]
    kept = training_mixture(given, tokenizer, ids, selection)
    assert len(kept.train) + len(kept.held_out) == len(given)


@pytest.mark.parametrize(
    "response",
    ["- A: a b c d e\n- B: a b c d e\n- C: k l m n o", "1. **Oak**\n2. **Ash**\n3. **Elm**"],
    ids=["a thread says what its sibling says", "bold titles that do not fork"],
)
def test_what_teaches_a_bad_habit_is_left_out(base, response):
    model, tokenizer = loaded(base)
    ids = add_control_tokens(model, tokenizer)
    selection = Selection(structured_share=0.1, held_out=0.1)
    given = [*ANSWERS, TextAnswer("habit", response)]
    assert training_mixture(given, tokenizer, ids, selection) == training_mixture(ANSWERS, tokenizer, ids, selection)


def test_a_compiled_run_ends_like_one_that_is_not(trained, base, answers, tmp_path):
    """Every row is padded to one length there: padding must change nothing."""
    _, options, _ = trained
    few = options | {"max_steps": 3, "max_length": 128}
    eager, compiled = (
        train(answers, tmp_path / str(compile), HELD_OUT, compile=compile, **few)["eval_loss"] for compile in (False, True)
    )
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_what_forks_too_often_or_gains_too_little_is_left_out(base):
    model, tokenizer = loaded(base)
    ids = add_control_tokens(model, tokenizer)
    longer = TextAnswer("longer", LIST + "\n- D: p q r s t")
    uneven = TextAnswer("uneven", "- A: a b c d e\n- B: " + "f g h i j " * 20 + "\n- C: k l m n o")
    given = [*ANSWERS, longer, uneven]
    options = {"structured_share": 0.1, "unforked_share": 0.0, "held_out": 0.1, "max_repetition": 1.0}

    def count(**more):
        kept = training_mixture(given, tokenizer, ids, Selection(**options, **more))
        return len(kept.train) + len(kept.held_out)

    assert count() == len(given)
    assert count(max_forks=3) == count(min_balance=0.33) == len(given) - 1
    assert count(max_forks=3, min_balance=0.33) == len(given) - 2
    with pytest.raises(DataError, match="fork too often or gain too little"):
        count(min_balance=1.0)


def test_metrics_of_nothing_are_zero():
    nothing = torch.tensor([-100]).numpy()
    assert set(fork_metrics(nothing, nothing, 1).values()) == {0.0}


def test_a_second_call_adds_nothing_and_the_tokens_survive_saving(base, tmp_path):
    model, tokenizer = loaded(base)
    ids = add_control_tokens(model, tokenizer)
    before = model.get_input_embeddings().weight.clone()
    pieces = tokenizer.encode(FORK_TOKEN, split_special_tokens=True)
    assert torch.allclose(before[ids[0]], before[pieces].mean(dim=0))
    assert add_control_tokens(model, tokenizer) == ids
    assert torch.equal(model.get_input_embeddings().weight, before)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert add_control_tokens(*loaded(tmp_path)) == ids
