"""The collator under the trainers that people use. The oracle: the same trainer on plain paths, or on one process."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer
from transformers.trainer_utils import get_last_checkpoint

from byte_tokenizer import byte_tokenizer
from hf_apar import AparModelForCausalLM
from hf_apar.training.lora import add_lora, say_bias, token_indices
from hf_apar.training.rows.collator import DataCollatorForApar
from test_docs import TRAIN
from tiny_trainer import CHILD, COLLATOR, EOS, FORK, ROWS, TOKENIZER, arguments, tiny_model

SCRIPT = Path(__file__).parent / "tiny_trainer.py"
PATHS = DataCollatorForApar(EOS, mode="paths")
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def trained_part(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def trained(trainer):
    """Train; return the losses of the steps, and the weights that were trained."""
    before = trained_part(trainer.model)
    trainer.train()
    after = trained_part(trainer.model)
    assert max((after[name] - before[name]).abs().max() for name in after) > 1e-3, "nothing was learnt"
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], after


def assert_equal(ours, theirs, tolerance=2e-5):
    assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
    assert_weights_equal(ours[1], theirs[1], tolerance)


def assert_weights_equal(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance, name


def stock(folder, collator, model=None, **changes):
    options = arguments(output_dir=str(folder), **changes)
    return Trainer(model or tiny_model(), options, data_collator=collator, train_dataset=ROWS)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_stock_trainer(attention, checkpointing, tmp_path):
    def run(collator):
        model = tiny_model(attn_implementation=attention)
        found = trained(stock(tmp_path, collator, model, gradient_checkpointing=checkpointing))
        assert model.model.layers[0].gradient_checkpointing == checkpointing
        return found

    assert_equal(run(COLLATOR), run(PATHS))


@pytest.mark.parametrize("mode", ["dense", "paths"])
@pytest.mark.parametrize(("batch", "accumulation"), [(6, 1), (2, 3), (1, 6)])
def test_a_step_is_the_gradient_of_the_mean_over_all_its_targets(mode, batch, accumulation, tmp_path):
    """However the rows are spread over forward passes, whose numbers of targets differ (``num_items_in_batch``)."""
    model = tiny_model()
    rows = PATHS(ROWS)
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    loss = cross_entropy(logits.flatten(0, 1), rows["shift_labels"].flatten())
    loss.backward()
    expected = {name: (weight - 0.5 * weight.grad).detach() for name, weight in model.named_parameters()}
    changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    losses, weights = trained(stock(tmp_path, DataCollatorForApar(EOS, mode=mode), **changes))
    assert losses == [pytest.approx(float(loss.detach()), abs=1e-5)]
    assert_weights_equal(weights, expected, 1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(tied, checkpointing, tmp_path):
    def run(collator):
        model = add_lora(tiny_model(tie_word_embeddings=tied), (FORK, CHILD), rank=4)
        assert isinstance(model, PeftModel)
        losses, weights = trained(stock(tmp_path, collator, model, gradient_checkpointing=checkpointing))
        assert sum("trainable_tokens" in name for name in weights) == (1 if tied else 2)
        return losses, weights

    assert_equal(run(COLLATOR), run(PATHS))


def test_qlora(tmp_path):
    """Weights in 4 bits on the CPU, LoRA on top, gradient checkpointing as PEFT prepares it."""
    tiny_model().save_pretrained(tmp_path / "base")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)

    def run(collator):
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=bits)
        assert any("4bit" in type(layer).__name__ for layer in base.modules())
        torch.manual_seed(0)
        base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
        model = add_lora(base, (FORK, CHILD), rank=4)
        return trained(stock(tmp_path, collator, model))

    assert_equal(run(COLLATOR), run(PATHS), 1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_trl(lora, tmp_path):
    from trl import SFTConfig, SFTTrainer  # takes seconds to import

    def run(kind, collator):
        options = arguments(
            SFTConfig, output_dir=str(tmp_path), bf16=False, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None
        )
        model = tiny_model()
        rows = token_indices(model, (FORK, CHILD))
        config = LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=rows) if lora else None
        trainer = kind(
            model, options, data_collator=collator, train_dataset=Dataset.from_list(ROWS),
            processing_class=TOKENIZER, peft_config=config,
        )  # fmt: skip
        if lora:
            say_bias(trainer.model)
        return trainer

    ours = trained(run(SFTTrainer, COLLATOR))
    assert_equal(ours, trained(run(SFTTrainer, PATHS)))
    if not lora:
        assert_equal(ours, trained(stock(tmp_path, COLLATOR)))


def environment():
    paths = [str(SCRIPT.parents[1] / "src"), str(SCRIPT.parent), *sys.path]
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


@pytest.mark.parametrize("sharding", [{}, {"fsdp": True, "fsdp_config": FSDP}], ids=["ddp", "fsdp"])
def test_two_processes_train_as_one(sharding, tmp_path):
    """Each with one row of the step's two; their numbers of targets differ."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes = {"output_dir": str(tmp_path), "per_device_train_batch_size": 1} | sharding
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}", str(SCRIPT), json.dumps(changes),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    _, expected = trained(stock(tmp_path / "one", COLLATOR))
    assert_weights_equal(load_file(tmp_path / "model.safetensors"), expected, 2e-5)


def test_a_run_that_was_killed_in_mid_epoch_goes_on_as_if_it_had_not_been(tmp_path):
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 8, "optim": "adamw_torch"}
    changes |= {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    killed = {"output_dir": str(tmp_path / "killed")} | changes
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(killed), "5"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -9, done.stderr[-3000:]
    again = stock(tmp_path / "killed", COLLATOR, **changes)
    checkpoint = get_last_checkpoint(str(tmp_path / "killed"))
    assert checkpoint.endswith("checkpoint-4"), "three steps are an epoch"
    again.train(resume_from_checkpoint=checkpoint)
    _, expected = trained(stock(tmp_path / "whole", COLLATOR, **changes))
    assert_weights_equal(trained_part(again.model), expected, 0.0)


@pytest.mark.parametrize("example", TRAIN, ids=lambda example: example.name)
def test_an_example_writes_what_loads(example, tmp_path, monkeypatch, capsys):
    base, answers, output = tmp_path / "base", tmp_path / "answers.jsonl", tmp_path / "output"
    tokenizer = byte_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lines = [
        {"prompt": "list", "response": "- A: a b c d e\n- B: f g h i j\n- C: k l m n o"},
        {"prompt": "say", "response": "no"},
    ]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines * 4))
    arguments = [str(answers), str(output), "--model", str(base), "--max-steps", "2"]
    monkeypatch.setattr(sys, "argv", [str(example), *arguments])
    runpy.run_path(str(example), run_name="__main__")
    assert str(output) in capsys.readouterr().out
    assert len(example.read_text().splitlines()) < 60
    model = AparModelForCausalLM.from_pretrained(output)
    settings = model.generation_config.apar_config
    assert (settings["fork_token_id"], settings["child_token_id"]) == (FORK, CHILD)
    whole = LlamaForCausalLM.from_pretrained(base)
    learnt = model.model.layers[0].mlp.up_proj.weight - whole.model.layers[0].mlp.up_proj.weight
    assert 1e-6 < learnt.abs().max() < 1.0, "the base's weights, and what two steps add"
