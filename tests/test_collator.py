"""Packed rows train as separate paths do: the same loss, each token counted once, and the same gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from hf_apar.data.collator import DataCollatorForApar, pack
from hf_apar.data.features import TreeFeatures
from hf_apar.data.text_tree import TextThread
from hf_apar.errors import DataError
from hf_apar.masks import visible_until_mask
from test_features import CHILD, EOS, TOKENIZER, features_of, tree_paths

torch.set_num_threads(1)

TREES = [
    TextThread(("ab", TextThread(("cd", TextThread(("e",)), "f")), "g", TextThread(("hij",)), "k")),
    TextThread(("whole",)),
    TextThread(("x", TextThread(("y",)))),
]


def double_llama(attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=CHILD + 1, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=attention, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


@pytest.fixture
def all_double(monkeypatch):
    """Llama's norms, and the softmax of eager attention, compute in float32 whatever the model's dtype: 1e-9 of noise."""

    def norm(self, states):
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim))


def loss_of_paths(model, trees):
    """The oracle: each thread's path alone, a plain causal mask, the targets that the thread owns."""
    pairs = [pair for tree in trees for pair in tree_paths(tree)]
    losses = [
        cross_entropy(model(torch.tensor([path])).logits[0], torch.tensor(targets), reduction="sum")
        for path, targets in pairs
    ]
    return sum(losses) / sum(target != -100 for _, targets in pairs for target in targets)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("max_length", [20, 200])  # several padded rows; all trees in one row
def test_packed_trees_have_the_loss_and_gradients_of_their_paths(attention, max_length, all_double):
    model = double_llama(attention)
    rows = pack([features_of(tree) for tree in TREES], max_length)
    assert len(rows) == (2 if max_length == 20 else 1)
    batch = DataCollatorForApar(EOS, max_length, dtype=torch.float64)([row.to_dict() for row in rows])
    output = model(**batch)
    expected = loss_of_paths(model, TREES)
    packed = cross_entropy(output.logits.flatten(0, 1), batch["shift_labels"].flatten())
    assert abs(output.loss - expected) < 1e-6  # transformers computes its loss in float32
    assert abs(packed - expected) < 1e-12
    for ours, theirs in zip(gradients(model, packed), gradients(model, expected), strict=True):
        assert (ours - theirs).abs().max() < 1e-9


def test_both_ways_of_counting_targets_agree():
    batch = DataCollatorForApar(EOS)([row.to_dict() for row in pack([features_of(tree) for tree in TREES], 20)])
    counts = [batch["shift_labels"].ne(-100), batch["labels"].ne(-100), batch["labels"][..., 1:].ne(-100)]
    assert len({int(count.sum()) for count in counts}) == 1


def test_padding_sees_itself_alone():
    rows = [TreeFeatures([1, 2], [0, 1], [2, 2], [-100, 3]), TreeFeatures([1], [0], [1], [-100])]
    batch = DataCollatorForApar(EOS)([row.to_dict() for row in rows])
    low = torch.finfo(torch.float32).min
    assert batch["attention_mask"].tolist() == [[[[0, low], [0, 0]]], [[[0, low], [low, 0]]]]
    assert batch["input_ids"].tolist() == [[1, 2], [1, EOS]]
    assert batch["shift_labels"].tolist() == [[-100, 3], [-100, -100]]


def test_the_mask_against_its_definition():
    row = features_of(TREES[0])
    mask = visible_until_mask(torch.tensor([row.visible_until]))[0]
    size = range(len(row))
    assert mask.tolist() == [[j <= i < row.visible_until[j] for j in size] for i in size]


def blanks(sizes):
    return [TreeFeatures([n] * n, list(range(n)), [n] * n, [-100] * n) for n in sizes]


def test_the_fullest_row_with_room_takes_a_tree(caplog):
    rows = pack(blanks([6, 5, 4, 3, 11, 2]), 10)
    assert [row.input_ids for row in rows] == [[6] * 6 + [4] * 4, [5] * 5 + [3] * 3 + [2] * 2]
    assert rows[1].visible_until == [5] * 5 + [8] * 3 + [10] * 2
    assert "1 of 6 trees left out, longer than 10" in caplog.text


@given(st.lists(st.integers(1, 10), max_size=30))
def test_packing_keeps_every_tree_and_wastes_no_row(sizes):
    rows = pack(blanks(sizes), 10)
    assert sorted(token for row in rows for token in row.input_ids) == sorted(n for n in sizes for _ in range(n))
    assert all(len(row) <= 10 for row in rows)
    assert sum(len(row) <= 5 for row in rows) <= 1, "two half-empty rows would have been one"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1], "position_ids": [0], "visible_until": [1]}, "a row has no shift_labels"),
        ({"input_ids": [1], "position_ids": [0], "visible_until": [1], "shift_labels": []}, "differ in length"),
        (features_of(TREES[0]).to_dict(), "a row has 19 tokens, at most 9 fit"),
    ],
)
def test_rows_that_cannot_be_batched(row, message):
    with pytest.raises(DataError, match=message):
        DataCollatorForApar(TOKENIZER.pad_token_id, max_length=9)([row])
