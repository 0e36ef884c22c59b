"""Packed rows train as separate paths do: the same loss, each token counted once, and the same gradients."""

import pickle
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import flex_attention
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.errors import ConfigurationError, DataError
from hf_apar.forward.masks import additive, visible_until_mask
from hf_apar.training.rows.block_mask import TreeBlockMask, visible_until_function
from hf_apar.training.rows.collator import DataCollatorForApar, pack, path_rows
from hf_apar.training.rows.features import TreeFeatures, truncate, unforked
from test_features import CHILD, EOS, FORK, TOKENIZER, features_of, tree_paths
from test_features import TREES as ANY_TREE

torch.set_num_threads(1)

TREES = [
    TextThread(("ab", TextThread(("cd", TextThread(("e",)), "f")), "g", TextThread(("hij",)), "k")),
    TextThread(("whole",)),
    TextThread(("x", TextThread(("y",)))),
]


def double_llama(attention, hidden_size=16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=CHILD + 1, hidden_size=hidden_size, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
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


def loss_and_gradients(model, rows, mode):
    """In float64, and as transformers computes the loss; the gradients are of the first."""
    batch = DataCollatorForApar(EOS, dtype=torch.float64, mode=mode)([row.to_dict() for row in rows])
    output = model(**batch)
    loss = cross_entropy(output.logits.flatten(0, 1), batch["shift_labels"].flatten())
    return loss, output.loss, gradients(model, loss)


def random_tree(draw, depth=1):
    """Of up to four levels, with forks in the middle and at the end of threads."""
    pieces = [draw.choice("abc") * draw.randint(1, 6)]
    for _ in range(draw.randint(0, 3) if depth < 4 else 0):
        pieces += [random_tree(draw, depth + 1), draw.choice("xyz") * draw.randint(1, 4)]
    return TextThread(tuple(pieces[:-1] if len(pieces) > 1 and draw.random() < 0.3 else pieces))


@pytest.mark.parametrize("seed", range(6))
def test_any_rows_packed_and_truncated_equal_their_paths(seed, all_double):
    """Packed: a token stands in a row once, under the tree's mask. Paths: plain causal rows, the targets counted once."""
    draw, model = random.Random(seed), double_llama("sdpa")
    trees = [features_of(random_tree(draw)) for _ in range(6)]
    max_length = max(len(tree) for tree in trees) - draw.randint(0, 40)
    rows = pack([truncate(tree, max_length) for tree in trees], max_length)
    (packed, as_reported, ours), (paths, also_reported, theirs) = (
        loss_and_gradients(model, rows, mode) for mode in ("dense", "paths")
    )
    assert abs(packed - paths) < 1e-12
    assert abs(as_reported - also_reported) < 1e-6 and abs(as_reported - packed) < 1e-6
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 1e-9


@given(st.lists(ANY_TREE, min_size=1, max_size=3))
def test_a_rows_paths_are_those_of_its_trees(trees):
    """A path that another one begins with has no row of its own: what its last token learns stands in the longer one."""
    (row,) = pack([features_of(tree) for tree in trees], 10**6)
    expected = [path for tree in trees for path, _ in tree_paths(tree)]
    given_paths = [path["input_ids"] for path in path_rows(row.to_dict())]
    longest = [path for path in expected if not any(other[: len(path)] == path != other for other in expected)]
    assert {tuple(path) for path in longest} <= {tuple(path) for path in given_paths} <= {tuple(path) for path in expected}
    targets = [target for path in path_rows(row.to_dict()) for target in path["shift_labels"]]
    assert sorted(t for t in targets if t != -100) == sorted(t for t in row.shift_labels if t != -100)
    for path in path_rows(row.to_dict()):
        assert path["position_ids"] == list(range(len(path["input_ids"])))


@given(st.lists(ANY_TREE, min_size=1, max_size=4))
def test_the_places_without_forks_stay_with_their_tokens(trees):
    """Where the text goes on without a fork is marked, in packed rows and in paths, and nothing else is."""
    forked = [features_of(tree) for tree in trees]
    copies = [unforked(tree) for tree in forked]
    rows = [row.to_dict() for row in pack([each for pair in zip(forked, copies, strict=True) for each in pair], 10**6)]
    forks = sum(tree.shift_labels.count(FORK) for tree in forked)
    for mode in ("dense", "paths"):
        if forks:
            with pytest.raises(DataError, match=r"AdapterTrainer alone.*unforked_share=0"):
                DataCollatorForApar(EOS, mode=mode)(rows)
        batch = DataCollatorForApar(EOS, mode=mode, fork_banned=True)(rows)
        if not forks:
            assert "fork_banned" not in batch
            continue
        marked = [
            (int(position), int(target))
            for position, target in zip(
                batch["position_ids"][batch["fork_banned"]], batch["shift_labels"][batch["fork_banned"]], strict=True
            )
        ]
        expected = [(copy.position_ids[i], copy.shift_labels[i]) for copy in copies for i in copy.fork_banned]
        assert sorted(marked) == sorted(expected) and len(marked) == forks
        assert FORK not in {target for _, target in marked}


def test_paths_as_a_literal_table():
    row = TreeFeatures([5, 8, 9, 6, 7], [0, 1, 2, 3, 2], [5, 5, 4, 4, 5], [8, 7, 6, 2, 2])
    batch = DataCollatorForApar(0, mode="paths")([row.to_dict()])
    assert {name: column.tolist() for name, column in batch.items()} == {
        "input_ids": [[5, 8, 9, 6, 0], [5, 8, 7, 0, 0]],
        "position_ids": [[0, 1, 2, 3, 0], [0, 1, 2, 0, 0]],
        "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]],
        "labels": [[-100, 8, 7, 6, 2], [-100, -100, -100, 2, -100]],
        "shift_labels": [[8, 7, 6, 2, -100], [-100, -100, 2, -100, -100]],
    }


@pytest.mark.parametrize("mode", ["dense", "flex", "paths"])
@pytest.mark.parametrize(("multiple", "length"), [(None, 20), (1, 20), (8, 24), (19, 38), (20, 20)])
def test_padding_to_a_multiple(mode, multiple, length):
    row = {name: column[:19] for name, column in features_of(TextThread(("x" * 40,))).to_dict().items()}
    row["visible_until"] = [19] * 19
    batch = DataCollatorForApar(EOS, mode=mode, pad_to_multiple_of=multiple)([row])
    assert batch["input_ids"].shape == batch["shift_labels"].shape == (1, length)
    assert batch["attention_mask"].shape[-1] == length


def batch_of(mode, max_length=20):
    rows = pack([features_of(tree) for tree in TREES], max_length)
    return DataCollatorForApar(EOS, mode=mode)([row.to_dict() for row in rows])


def test_the_block_mask_is_the_dense_mask(tmp_path):
    dense, block = (batch_of(mode)["attention_mask"] for mode in ("dense", "flex"))
    batch, _, length, _ = dense.shape
    index = torch.arange(length)
    sees = visible_until_function(block.visible_until)(
        torch.arange(batch)[:, None, None], torch.zeros(()), index[:, None], index
    )
    assert torch.equal(additive(sees, torch.float32)[:, None], dense)
    wide = torch.arange(1, 513)[None].clone()  # only tokens that see themselves: blocks off the diagonal are left out
    assert torch.equal(TreeBlockMask(wide).to_dense()[0, 0], torch.eye(4, dtype=torch.int32))


def test_a_block_mask_moves_and_pickles_with_what_its_function_reads():
    block = batch_of("flex")["attention_mask"]
    again = pickle.loads(pickle.dumps(block))
    assert torch.equal(again.visible_until, block.visible_until)
    assert torch.equal(again.to_dense(), block.to_dense())
    moved = block.to("meta")
    assert moved.visible_until.device.type == moved.kv_indices.device.type == "meta"
    assert int(block.sum()) == batch_of("dense")["input_ids"].numel()


def test_flex_attention_computes_what_the_dense_mask_gives(monkeypatch):
    """Its definition in PyTorch, not its kernels: on a CPU these have no backward, and a check forbids even to ask."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex_attention, "_warn_once", lambda *args, **options: None)  # that the definition is slow
    model = double_llama("sdpa").float()
    dense, flex = batch_of("dense"), batch_of("flex")
    with torch.compiler.set_stance("force_eager"):
        expected = model(**dense)
        model.set_attn_implementation("flex_attention")
        found = model(**flex)
        assert (found.logits - expected.logits).abs().max() < 1e-5
        assert abs(found.loss - expected.loss) < 1e-6
        for ours, theirs in zip(gradients(model, found.loss), gradients(model, expected.loss), strict=True):
            assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has a backward pass on GPUs alone")
def test_the_kernels_of_flex_attention_compute_what_the_dense_mask_gives():
    model = double_llama("sdpa", hidden_size=64).float().cuda()  # the kernels take heads of 16 numbers and more
    dense, flex = ({name: column.to("cuda") for name, column in batch_of(mode).items()} for mode in ("dense", "flex"))
    expected = model(**dense)
    model.set_attn_implementation("flex_attention")
    found = model(**flex)
    assert abs(found.loss - expected.loss) < 1e-4
    for ours, theirs in zip(gradients(model, found.loss), gradients(model, expected.loss), strict=True):
        assert (ours - theirs).abs().max() < 1e-2 * theirs.abs().max()  # a plain causal mask changes each by a quarter


def test_both_ways_of_counting_targets_agree():
    batch = DataCollatorForApar(EOS)([row.to_dict() for row in pack([features_of(tree) for tree in TREES], 20)])
    counts = [batch["shift_labels"].ne(-100), batch["labels"].ne(-100), batch["labels"][..., 1:].ne(-100)]
    assert len({int(count.sum()) for count in counts}) == 1


@given(st.lists(ANY_TREE, min_size=1, max_size=4), st.sampled_from(["dense", "paths"]))
def test_t10_labels_shifted_by_whoever_shifts_them_are_the_targets(trees, mode):
    """FIELD T10: label smoothing and loss functions shift ``labels``; the last target must not be lost by it."""
    rows = [features_of(tree).to_dict() for tree in trees]
    batch = DataCollatorForApar(EOS, mode=mode)(rows)
    assert torch.equal(batch["labels"][:, 1:], batch["shift_labels"][:, :-1])
    assert set(batch["shift_labels"][:, -1].tolist()) == set(batch["labels"][:, 0].tolist()) == {-100}
    targets = sorted(target for row in rows for target in row["shift_labels"] if target != -100)
    assert sorted(batch["shift_labels"][batch["shift_labels"] != -100].tolist()) == targets


def test_padding_sees_itself_alone():
    rows = [TreeFeatures([1, 2], [0, 1], [2, 2], [-100, 3]), TreeFeatures([1], [0], [1], [-100])]
    batch = DataCollatorForApar(EOS)([row.to_dict() for row in rows])
    low = torch.finfo(torch.float32).min
    assert batch["attention_mask"].tolist() == [
        [[[0, low, low], [0, 0, low], [low, low, 0]]],
        [[[0, low, low], [low, 0, low], [low, low, 0]]],
    ]
    assert batch["input_ids"].tolist() == [[1, 2, EOS], [1, EOS, EOS]]
    assert batch["shift_labels"].tolist() == [[-100, 3, -100], [-100, -100, -100]]


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
        ({**features_of(TREES[0]).to_dict(), "fork_banned": [19]}, r"fork_banned holds \[19\]"),
        ({**features_of(TREES[0]).to_dict(), "fork_banned": [0]}, r"fork_banned holds \[0\]"),
        ({"input_ids": [1], "position_ids": [0], "visible_until": [1], "shift_labels": []}, "differ in length"),
        (features_of(TREES[0]).to_dict(), "a row has 19 tokens, at most 9 fit"),
    ],
)
def test_rows_that_cannot_be_batched(row, message):
    with pytest.raises(DataError, match=message):
        DataCollatorForApar(TOKENIZER.pad_token_id, max_length=9)([row])


@pytest.mark.parametrize(
    ("options", "message"), [({"mode": "fast"}, "mode is 'fast'"), ({"pad_to_multiple_of": 0}, "of is 0")]
)
def test_settings_that_mean_nothing(options, message):
    with pytest.raises(ConfigurationError, match=message):
        DataCollatorForApar(EOS, **options)
