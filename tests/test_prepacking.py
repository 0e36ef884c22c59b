"""Prepacked weights: the model itself without them is the oracle, and a profile says whether they were used."""

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from hf_apar import prepacked, prepacking
from hf_apar.prepacking import ROWS, has_mkl, prepackable, prepacked_if_possible
from hf_apar.speculation.lookup import PromptLookup
from hf_apar.speculation.medusa import MedusaDrafts, MedusaHeads
from oracle import VOCABULARY, left_padded, nested, random_prompts, tiny_llama

needs_mkl = pytest.mark.skipif(not has_mkl(), reason="PyTorch without MKL has no layout of its own to copy weights into")


def packed_products(model, *given, **options):
    """Return what ``model`` gives, and how many of its products took packed weights; MKL's operator may fall back within."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        out = model(*given, **options)
    names = [event.name for event in seen.events()]
    return out, 0 if "aten::linear" in names else names.count("mkl::_mkl_linear")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama(request):
    return tiny_llama(tie_word_embeddings=request.param)


@needs_mkl
@pytest.mark.parametrize("rows", [1, 3, 4, 8, 17, 48, 49, 70])
def test_logits_are_those_of_the_weights_as_they_lie(llama, rows):
    ids = torch.arange(rows)[None] % VOCABULARY
    expected, none = packed_products(llama, ids)
    with prepacked(llama) as model:
        found, some = packed_products(model, ids)
    assert none == 0 and some == (len(prepackable(llama)) if rows in ROWS else 0)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


@needs_mkl
def test_biases_and_batches_count():
    layer, input = nn.Linear(24, 40), torch.randn(2, 5, 24)
    with prepacked(layer):
        found, some = packed_products(layer, input)
    assert some == 1 and found.shape == (2, 5, 40)
    torch.testing.assert_close(found, layer(input).detach(), rtol=0, atol=1e-5)


@needs_mkl
@pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (577, 1531)])
def test_every_count_of_rows_is_served_with_any_number_of_threads(shape):
    layer, threads = nn.Linear(*shape), torch.get_num_threads()
    try:
        with prepacked(layer), torch.no_grad():
            for rows in ROWS:
                torch.set_num_threads(1 + rows % 2)
                input = torch.randn(rows, shape[0])
                expected = input.double() @ layer.weight.double().T + layer.bias
                torch.testing.assert_close(layer(input).double(), expected, rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


@needs_mkl
@pytest.mark.parametrize(
    "options", [{}, {"proposer": PromptLookup(4)}, {"do_sample": True}], ids=["greedy", "drafts", "sampled"]
)
def test_answers_are_the_same(apar_llama, options):
    inputs = left_padded(random_prompts(3))

    def answers():
        torch.manual_seed(0)
        out = apar_llama.generate(**inputs, apar=True, max_new_tokens=40, return_dict_in_generate=True, **options)
        return [nested(tree) for tree in out.trees]

    expected = answers()
    with prepacked(apar_llama):
        assert answers() == expected
    assert any(len(answer) > 1 for answer in expected)


@needs_mkl
def test_medusa_heads_are_prepacked_where_the_model_is_and_for_the_call_alone(apar_llama):
    left = []  # of their layers, those that lie as ever while the call runs

    class Watched(MedusaDrafts):
        def propose(self, rows, limits):
            left.append(len(prepackable(self.layers)))
            return super().propose(rows, limits)

    drafts = Watched(MedusaHeads(apar_llama.config.hidden_size, 32, torch.arange(VOCABULARY), length=3))
    options = {**left_padded(random_prompts(3)), "apar": True, "max_new_tokens": 40, "proposer": drafts}
    expected = apar_llama.generate(**options)
    assert set(left) == {4}
    left.clear()
    with prepacked(apar_llama):
        assert torch.equal(apar_llama.generate(**options), expected)
        assert set(left) == {0} and len(prepackable(drafts.layers)) == 4


@needs_mkl
def test_the_model_is_as_it_was_also_where_the_block_fails(llama):
    before = {name: dict(vars(module)) for name, module in llama.named_modules()}
    keys, outer = list(llama.state_dict()), len(prepackable(llama))
    with pytest.raises(RuntimeError, match="in the block"), prepacked(llama):
        assert list(llama.state_dict()) == keys and not prepackable(llama)
        raise RuntimeError("in the block")
    assert len(prepackable(llama)) == outer
    assert all(vars(module).keys() == before[name].keys() for name, module in llama.named_modules())


@needs_mkl
def test_a_weight_that_changes_is_read_as_it_is_then():
    layer, other, input = nn.Linear(24, 40), nn.Linear(24, 40), torch.randn(5, 24)
    with prepacked(layer), torch.no_grad():
        first = layer(input)
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(layer(input), other(input), rtol=0, atol=1e-5)
        assert not torch.equal(first, layer(input))
        layer.to(torch.bfloat16)
        assert torch.equal(layer(input.bfloat16()), copy.deepcopy(other).to(torch.bfloat16)(input.bfloat16()))
        layer.to(torch.float32).weight.zero_()
        assert torch.equal(layer(input), layer.bias.expand(5, -1))


@needs_mkl
def test_training_in_the_block_is_training(llama):
    ids = torch.arange(12)[None]
    expected = torch.autograd.grad(llama(ids, labels=ids).loss, list(llama.parameters()))
    with prepacked(llama):
        found = torch.autograd.grad(llama(ids, labels=ids).loss, list(llama.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@needs_mkl
def test_autocast_and_inference_mode_keep_their_meaning(llama):
    ids = torch.arange(12)[None]
    with prepacked(llama) as model:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert llama(ids).logits.dtype == torch.bfloat16
        with torch.inference_mode():
            found = llama(ids).logits
        assert packed_products(model, ids)[1] and model.lm_head.forward.packed is not None
    torch.testing.assert_close(found.clone(), llama(ids).logits.detach(), rtol=0, atol=1e-5)


@needs_mkl
def test_an_adapter_that_wraps_layers_finds_them_prepacked(llama):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(copy.deepcopy(llama), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.arange(12)[None]
    expected, _ = packed_products(wrapped, ids)
    with prepacked(wrapped):
        found, some = packed_products(wrapped, ids)
    assert some == len(prepackable(wrapped)) > len(prepackable(llama))
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


@needs_mkl
def test_a_weight_at_the_address_of_another_is_not_taken_for_it():
    layer, input = nn.Linear(64, 64), torch.randn(5, 64)
    with prepacked(layer), torch.no_grad():
        for _ in range(20):
            other = {"weight": torch.randn(64, 64)}
            expected = input @ other["weight"].T + layer.bias
            torch.testing.assert_close(torch.func.functional_call(layer, other, input), expected, rtol=0, atol=1e-4)
            del other


@needs_mkl
@pytest.mark.parametrize("change", ["input", "bias"])
def test_shapes_that_do_not_fit_are_refused_as_ever(change):
    layer = nn.Linear(24, 40)
    with prepacked(layer), torch.no_grad():
        layer(torch.randn(5, 24))
        if change == "bias":
            layer.bias = nn.Parameter(torch.randn(41))
        with pytest.raises(RuntimeError):
            layer(torch.randn(5, 25 if change == "input" else 24))


@needs_mkl
def test_blocks_within_blocks_and_copies_of_the_model(llama):
    ids = torch.arange(12)[None]
    expected, _ = packed_products(llama, ids)
    with prepacked(llama):
        with prepacked(llama):
            pass
        _, some = packed_products(llama, ids)
        copied = copy.deepcopy(llama)
    found, others = packed_products(copied, ids)
    assert some == others == len(prepackable(llama))
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


@needs_mkl
def test_who_changes_a_layer_within_the_block_keeps_the_change():
    layer = nn.Linear(24, 40)
    with prepacked(layer):
        layer.forward = lambda input: input
    assert layer(1) == 1


@needs_mkl
def test_a_compiled_model_is_compiled_as_without(llama):
    ids = [torch.arange(rows)[None] for rows in (12, 13)]
    with prepacked(copy.deepcopy(llama)) as model, torch.no_grad():
        model.compile(dynamic=True, backend="eager", fullgraph=True)
        for one in ids:
            torch.testing.assert_close(model(one).logits, llama(one).logits, rtol=0, atol=1e-5)


@needs_mkl
@pytest.mark.parametrize("odd", ["sparse", "subclass"])
def test_weights_of_another_kind_are_left_alone(odd):
    class Wrapped(nn.Parameter):
        pass

    layer = nn.Linear(24, 40)
    weight = layer.weight.detach()
    layer.weight = Wrapped(weight) if odd == "subclass" else nn.Parameter(weight.to_sparse_csr(), requires_grad=False)
    assert not prepackable(nn.Sequential(layer))


@needs_mkl
@pytest.mark.parametrize("room", [0, 10**12])
def test_where_memory_has_no_room_the_weights_stay_as_they_lie(llama, room, monkeypatch):
    monkeypatch.setattr(prepacking, "_free_memory", lambda: room)
    with prepacked_if_possible(llama):
        _, some = packed_products(llama, torch.arange(12)[None])
    assert bool(some) == bool(room)


@needs_mkl
def test_the_copies_go_with_the_block_also_after_an_error():
    layer = nn.Linear(24, 40)
    with pytest.raises(RuntimeError) as error, prepacked(layer), torch.no_grad():
        layer(torch.randn(5, 24))
        ours = layer.forward
        assert ours.packed is not None
        layer(torch.randn(5, 25))
    assert error.value and ours.packed is None and "forward" not in vars(layer)
    with torch.no_grad():
        ours(torch.randn(5, 24))
    assert ours.packed is None, "who kept it packs no more"


def test_where_nothing_can_be_prepacked_the_log_says_so_and_the_model_decodes_as_ever(llama, caplog):
    half, ids = copy.deepcopy(llama).to(torch.bfloat16), torch.arange(12)[None]
    expected = half(ids).logits
    with prepacked(half):
        assert torch.equal(half(ids).logits, expected)
    assert "LlamaForCausalLM decodes as ever" in caplog.text
