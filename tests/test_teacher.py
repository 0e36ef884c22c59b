"""The teacher reads answers in order: its distribution at each text token is the base's own on the plain text."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from byte_tokenizer import byte_tokenizer
from hf_apar.data.collator import DataCollatorForApar, pack
from hf_apar.data.features import IGNORED, tree_features, truncate, unforked
from hf_apar.data.samplers import line_ends
from hf_apar.data.text_tree import TextThread
from hf_apar.errors import ConfigurationError
from hf_apar.tokens import add_control_tokens
from hf_apar.training.lora import AdapterTrainer, add_lora
from hf_apar.training.teacher import reading

torch.set_num_threads(1)

NESTED = TextThread(
    ("a: ", TextThread(("b\nc", TextThread((" d",)), " e", TextThread(("f",)))), " g: ", TextThread((" hi",)), " j")
)
OPEN = TextThread(("k: ", TextThread(("lm",)), " n: ", TextThread(("o",))))  # it ends with a fork
WHOLE = TextThread(("p q",))


@pytest.fixture(scope="module")
def tuned():
    """A tiny tuned model in float64 that is far from its base, its control tokens' ids, and rows of trees."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, initializer_range=0.2,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    ids = add_control_tokens(base, tokenizer)
    model = add_lora(base, ids, rank=4).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                weight.normal_(0, 0.3)
    prompt = tokenizer.encode("? ", add_special_tokens=False)
    trees = [tree_features(prompt, tree, tokenizer, *ids, tokenizer.eos_token_id) for tree in (NESTED, OPEN, WHOLE)]
    trees += [truncate(trees[0], len(trees[0]) - 2, ids[1]), unforked(trees[0], *ids)]
    structural = [*line_ends(tokenizer), *ids]
    assert tokenizer.decode(structural[:1]) == "\n" and tokenizer.eos_token_id in structural
    assert len(trees[3]) < len(trees[0]) and trees[4].fork_banned
    return model, ids, tokenizer, structural, [row.to_dict() for row in pack(trees, 40)]


def in_order(row, ids, structural):
    """For every text target of a forked thread, by walking the trees: its place, and the tokens that read before it."""
    starts = [index for index, position in enumerate(row["position_ids"]) if position == 0] + [len(row["input_ids"])]
    for start, end in pairwise(starts):
        for place in range(start, end):
            target, token = row["shift_labels"][place], row["input_ids"][place]
            if target == IGNORED or target in structural:
                continue
            forked = [
                c for c in range(start, place + 1) if row["input_ids"][c] == ids[1] and row["visible_until"][c] > place
            ]
            if not forked:
                continue
            at = place + 1
            if token == ids[0] and row["input_ids"][at] == ids[1]:
                at = row["visible_until"][at]
            assert row["input_ids"][at] == target
            read = [one for one in row["input_ids"][start:at] if one not in ids]
            yield place, read


def test_the_teacher_reads_the_plain_text(tuned):
    model, ids, tokenizer, structural, rows = tuned
    batch = DataCollatorForApar(tokenizer.eos_token_id, dtype=torch.float64, pad_to_multiple_of=50)(rows)
    how = reading(batch, ids, torch.tensor(structural))
    wanted = [(number, place, read) for number, row in enumerate(rows) for place, read in in_order(row, ids, structural)]
    assert [(number, place) for number, place, _ in wanted] == list(zip(how.rows.tolist(), how.places.tolist(), strict=True))
    with torch.no_grad(), model.disable_adapter():
        logits = model(batch["input_ids"], attention_mask=how.attention_mask, position_ids=how.position_ids).logits
        for index, (number, _, read) in enumerate(wanted):
            alone = model(torch.tensor([read])).logits[0, -1]
            torch.testing.assert_close(logits[number, how.told_at[index]], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("weight", "items"), [(0.0, None), (0.3, None), (1.0, 7)])
def test_the_loss_is_the_divergence_at_text_and_the_cross_entropy_elsewhere(tuned, tmp_path, weight, items):
    model, ids, tokenizer, structural, rows = tuned
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False)
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        token_rate=1.0,
        control_ids=ids,
        teacher_weight=weight,
        structural_ids=line_ends(tokenizer),
    )
    collate = DataCollatorForApar(tokenizer.eos_token_id, dtype=torch.float64)
    total, by_text, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        batch = collate([row])
        own = model(**{name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}).logits[0].clone()
        own[row["fork_banned"], ids[0]] = -torch.inf
        told = {place: read for place, read in in_order(row, ids, structural)}
        for place, target in enumerate(row["shift_labels"]):
            if target == IGNORED:
                continue
            plain = cross_entropy(own[place], torch.tensor(target))
            by_text = by_text + plain
            if place in told:
                with torch.no_grad(), model.disable_adapter():
                    teacher = model(torch.tensor([told[place]])).logits[0, -1]
                text = torch.tensor([token not in structural for token in range(len(teacher))])
                p, q = teacher[text].log_softmax(0), own[place].log_softmax(0)[text]
                plain = (1 - weight) * plain + weight * kl_div(q, p, log_target=True, reduction="sum")
            total, count = total + plain, count + 1
    model.train()
    loss = trainer.compute_loss(model, collate(rows), num_items_in_batch=items)
    assert loss.item() == pytest.approx(total.item() / (items or count), rel=1e-5)
    model.eval()
    judged = trainer.compute_loss(model, collate(rows), num_items_in_batch=items)
    assert judged.item() == pytest.approx(by_text.item() / (items or count), rel=1e-5), "an evaluation is by the text alone"


def test_what_a_teacher_cannot_read_is_refused(tuned):
    model, ids, _, structural, rows = tuned
    with pytest.raises(ConfigurationError, match="structural_ids"):
        AdapterTrainer(model=model, token_rate=1.0, control_ids=ids, teacher_weight=0.5)
    with pytest.raises(ConfigurationError, match="'dense'"):
        reading(DataCollatorForApar(0, mode="paths")(rows), ids, torch.tensor(structural))


def test_the_teacher_speaks_without_its_dropout(tuned, tmp_path):
    model, ids, tokenizer, _, rows = tuned
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False)
    trainer = AdapterTrainer(
        model=model, args=arguments, token_rate=1.0, control_ids=ids, teacher_weight=1.0, structural_ids=line_ends(tokenizer)
    )
    batch = DataCollatorForApar(tokenizer.eos_token_id, dtype=torch.float64)(rows)
    logits = model(**{name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}).logits
    model.train()
    without = trainer._from_teacher(model, logits, batch)
    layers = [layer.self_attn for layer in model.get_base_model().model.layers]
    for layer in layers:
        layer.attention_dropout = 0.5
    assert torch.equal(trainer._from_teacher(model, logits, batch), without) and model.training
    for layer in layers:
        layer.attention_dropout = 0.0
