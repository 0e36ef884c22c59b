"""FIELD T10: what a trainer takes has its effect with our collator and trainer, or is refused by name. Oracles by hand."""

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_apar.errors import ConfigurationError, DataError
from hf_apar.training.lora import AdapterTrainer, add_lora, hasten_rows
from hf_apar.training.rows.collator import DataCollatorForApar, pack
from hf_apar.training.rows.features import tree_features, unforked
from tiny_trainer import CHILD, EOS, FORK, ROWS, TOKENIZER, TREES, arguments, tiny_model

COPIES = [
    row.to_dict()
    for row in pack(
        [unforked(tree_features(TOKENIZER.encode("Q:"), tree, TOKENIZER, FORK, CHILD, EOS)) for tree in TREES],
        80,
    )
]
MODES = ["dense", "paths"]
COUNTS = [None, 7]


def logits_and_targets(batch):
    model = tiny_model()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    return model(**inputs).logits.flatten(0, 1), batch["shift_labels"].flatten()


def made(kind, folder, collator, **changes):
    func = changes.pop("compute_loss_func", None)
    options = {"compute_loss_func": func} | ({"token_rate": 1.0, "fork_id": FORK} if kind is AdapterTrainer else {})
    settings = arguments(output_dir=str(folder), **changes)
    return kind(tiny_model(), settings, data_collator=collator, train_dataset=ROWS, **options)


@pytest.mark.parametrize("kind", [Trainer, AdapterTrainer])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("items", COUNTS)
def test_t10_label_smoothing_counts_every_target_once_at_its_place(kind, mode, items, tmp_path):
    collator = DataCollatorForApar(EOS, mode=mode)
    batch, epsilon = collator(ROWS), 0.2
    logits, targets = logits_and_targets(batch)
    there = targets != -100
    scores = logits.log_softmax(-1)[there]
    nll = -scores.gather(1, targets[there, None]).sum()
    smooth = -scores.mean(-1).sum()
    expected = ((1 - epsilon) * nll + epsilon * smooth) / (items or there.sum())
    trainer = made(kind, tmp_path, collator, label_smoothing_factor=epsilon)
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    plain = cross_entropy(logits, targets, reduction="sum") / (items or there.sum())
    assert abs(loss.item() - plain.item()) > 1e-4, "the option has an effect"


@pytest.mark.parametrize("kind", [Trainer, AdapterTrainer])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("items", COUNTS)
def test_t10_a_loss_function_that_shifts_labels_finds_the_targets(kind, mode, items, tmp_path):
    """As every loss of causal language models does; the oracle is the model's own loss, twice of it."""

    def twice(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"]
        return 2 * ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)

    collator = DataCollatorForApar(EOS, mode=mode)
    batch = collator(ROWS)
    logits, targets = logits_and_targets(batch)
    expected = 2 * cross_entropy(logits, targets, reduction="sum") / (items or (targets != -100).sum())
    trainer = made(kind, tmp_path, collator, compute_loss_func=twice)
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_t10_trl_computes_the_same(mode, smoothing, tmp_path):
    from trl import SFTConfig, SFTTrainer  # takes seconds to import

    collator = DataCollatorForApar(EOS, mode=mode)
    options = arguments(
        SFTConfig, output_dir=str(tmp_path), bf16=False, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
        label_smoothing_factor=smoothing,
    )  # fmt: skip
    theirs = SFTTrainer(
        tiny_model(), options, data_collator=collator, train_dataset=Dataset.from_list(ROWS), processing_class=TOKENIZER
    )
    ours = made(AdapterTrainer, tmp_path, collator, label_smoothing_factor=smoothing)
    losses = [
        trainer.compute_loss(trainer.model, dict(collator(ROWS)), num_items_in_batch=11).item() for trainer in (theirs, ours)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"label_smoothing_factor": 0.1}, "label_smoothing_factor"), ({"compute_loss_func": min}, "compute_loss_func")],
)
def test_t10_what_cannot_leave_fork_out_is_refused_by_name(changes, name, tmp_path):
    collator = DataCollatorForApar(EOS, fork_banned=True)
    trainer = made(AdapterTrainer, tmp_path, collator, **changes)
    with pytest.raises(ConfigurationError, match=rf"{name} cannot be combined.*unforked_share=0"):
        trainer.compute_loss(trainer.model, collator(COPIES))


def test_t10_a_stock_trainer_does_not_pass_over_places_without_forks(tmp_path):
    trainer = Trainer(
        tiny_model(), arguments(output_dir=str(tmp_path)), data_collator=DataCollatorForApar(EOS), train_dataset=COPIES
    )
    with pytest.raises(DataError, match="AdapterTrainer alone honours"):
        trainer.train()


def test_t10_the_model_is_as_before_after_a_loss_without_forks(tmp_path):
    """The Trainer gets the model itself, not a function in its place; nothing stays on it, not even after an error."""
    collator = DataCollatorForApar(EOS, fork_banned=True)
    trainer = made(AdapterTrainer, tmp_path, collator)
    with torch.no_grad():
        first, outputs = trainer.compute_loss(trainer.model, collator(COPIES), return_outputs=True)
        again = trainer.compute_loss(trainer.model, collator(COPIES))
        plain = trainer.model(**{name: column for name, column in collator(COPIES).items() if name != "fork_banned"}).loss
    assert first == again == outputs["loss"] and first < plain
    broken = collator(COPIES)
    broken["input_ids"] = broken["input_ids"] + 10_000
    with pytest.raises(IndexError):
        trainer.compute_loss(trainer.model, broken)
    assert not trainer.model._forward_hooks


def adapter_trainer(folder, **changes):
    options = {
        "token_rate": changes.pop("token_rate", 12.0),
        "fork_id": FORK,
        "optimizers": changes.pop("optimizers", (None, None)),
    }
    model = add_lora(tiny_model(), (FORK, CHILD), rank=2)
    return AdapterTrainer(
        model=model, args=arguments(output_dir=str(folder), **changes), data_collator=DataCollatorForApar(EOS),
        train_dataset=ROWS, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kind", "wanted"),
    [
        ({"optim": "adamw_torch", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}, "AdamW",
         {"betas": (0.8, 0.9), "eps": 1e-6}),
        ({"optim": "adamw_torch_fused"}, "AdamW", {"fused": True}),
        ({"optim": "sgd", "optim_args": "momentum=0.5"}, "SGD", {"momentum": 0.5}),
        ({"optim": "adafactor"}, "Adafactor", {"relative_step": False}),
        ({"optim": "rmsprop"}, "RMSprop", {}),
    ],
    ids=lambda value: str(value.get("optim", "")) if isinstance(value, dict) else value,
)  # fmt: skip
def test_t10_the_optimizer_is_the_one_that_is_asked_for(changes, kind, wanted, tmp_path):
    trainer = adapter_trainer(tmp_path, learning_rate=0.25, weight_decay=0.125, **changes)
    optimizer = trainer.create_optimizer()
    assert type(optimizer).__name__ == kind
    rows = {weight for name, weight in trainer.model.named_parameters() if "trainable_tokens" in name}
    trained = {weight for weight in trainer.model.parameters() if weight.requires_grad}
    assert len(rows) == 2
    assert {weight for group in optimizer.param_groups for weight in group["params"]} == trained
    for group in optimizer.param_groups:
        assert wanted.items() <= {name: group.get(name) for name in wanted}.items()
        for weight in group["params"]:
            assert group["lr"] == (3.0 if weight in rows else 0.25)
            assert group["weight_decay"] == 0.125, "LoRA and the rows have no biases and no norms, which are spared"


def test_t10_a_step_is_what_its_options_say(tmp_path):
    """Plain gradient descent with decay, by hand: the rows at their own rate, everything decayed by what it weighs."""
    trainer = adapter_trainer(tmp_path, token_rate=3.0, learning_rate=0.1, weight_decay=0.5, max_steps=1, num_train_epochs=1,
                              per_device_train_batch_size=len(ROWS), optim_args="momentum=0")  # fmt: skip
    batch = DataCollatorForApar(EOS)(ROWS)
    reference = add_lora(tiny_model(), (FORK, CHILD), rank=2)
    reference.load_state_dict(trainer.model.state_dict())
    reference(**batch).loss.backward()
    expected = {
        name: (weight - 0.1 * (3.0 if "trainable_tokens" in name else 1.0) * (weight.grad + 0.5 * weight)).detach()
        for name, weight in reference.named_parameters()
        if weight.requires_grad
    }
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            assert (weight - expected[name]).abs().max() < 1e-6, name


def test_t10_an_optimizer_of_your_own_and_a_rate_for_the_rows_are_not_both_dropped(tmp_path):
    model = add_lora(tiny_model(), (FORK, CHILD), rank=2)
    own = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    with pytest.raises(ConfigurationError, match="the optimizer is made already"):
        adapter_trainer(tmp_path, optimizers=(own, None))
    hasten_rows(own, model, 5.0)
    assert sorted({group["lr"] for group in own.param_groups}) == [0.1, 0.5]
    assert adapter_trainer(tmp_path, optimizers=(own, None), token_rate=1.0).create_optimizer() is own
    stranger = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigurationError, match="SGD takes no learning rate for the rows"):
        hasten_rows(stranger, model, 5.0)
