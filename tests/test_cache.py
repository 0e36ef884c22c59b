"""``TreeCache`` stands wherever a ``DynamicCache`` stands: both side by side, through any calls, and under a real model."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from conftest import left_padded, make_forks_likely, random_prompts, tiny_llama
from hf_apar import AparConfig, ConfigurationError, enable_apar
from hf_apar.forward.cache import SMALLEST, TreeCache
from hf_apar.releases import GENERATE_CACHE, cache_argument

LAYERS, WINDOW = 2, 4
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}

UPDATES = st.tuples(st.just("update"), st.sampled_from([1, 1, 2, 3, 7, SMALLEST]))
ROWS = st.one_of(
    st.tuples(st.just("batch_repeat_interleave"), st.integers(1, 2)),
    st.tuples(st.just("batch_select_indices"), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
    st.tuples(st.just("reorder_cache"), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
)
CUTS = st.one_of(st.tuples(st.just("crop"), st.integers(-9, 0)), st.tuples(st.just("reset"), st.none()))
COPIES = st.tuples(st.just("copy"), st.none())


def states(batch, width):
    """Keys and values for each layer, which differ in their last dimension."""
    return [(torch.randn(batch, 2, width, 3), torch.randn(batch, 2, width, 5)) for _ in range(LAYERS)]


def call(cache, name, argument, batch, new):
    """Do one thing to ``cache``; return it and, of updates, what attention gets."""
    if name == "update":
        return cache, [cache.update(keys, values, layer) for layer, (keys, values) in enumerate(new)]
    if name == "copy":
        return copy.deepcopy(cache), []
    if name == "reset":  # transformers before 5.18 keeps zeros there, so that a new one stands for it
        return (cache if cache.reset() or type(cache) is TreeCache else type(cache)()), []
    given = torch.tensor([row % batch for row in argument]) if isinstance(argument, list) else argument
    getattr(cache, name)(given)
    return cache, []


def rows_after(name, argument, batch, length):
    if not length or name not in ("batch_repeat_interleave", "batch_select_indices", "reorder_cache"):
        return batch
    return batch * argument if isinstance(argument, int) else len(argument)


@settings(max_examples=80)
@given(calls=st.lists(st.one_of(UPDATES, UPDATES, ROWS, CUTS, COPIES), max_size=12))
def test_any_sequence_of_calls_does_to_both_caches_the_same(calls):
    ours, theirs, batch = TreeCache(), DynamicCache(), 2
    for name, argument in calls:
        new = states(batch, argument) if name == "update" else None
        after = rows_after(name, argument, batch, theirs.get_seq_length())
        if after > 8:
            continue
        (ours, got), (theirs, expected) = (call(cache, name, argument, batch, new) for cache in (ours, theirs))
        batch = after
        for mine, other in zip(got, expected, strict=True):
            assert all(map(torch.equal, mine, other))
        assert isinstance(ours, DynamicCache)
        for layer in range(LAYERS):
            assert ours.get_seq_length(layer) == theirs.get_seq_length(layer)
            assert ours.get_mask_sizes(3, layer) == theirs.get_mask_sizes(3, layer)
        if theirs.get_seq_length():
            assert len(ours) == len(theirs) and ours.is_sliding == theirs.is_sliding
            for mine, other in zip(ours, theirs, strict=True):
                assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1]) and mine[2] is other[2] is None


@settings(max_examples=40)
@given(calls=st.lists(st.one_of(UPDATES, UPDATES, ROWS, COPIES), max_size=9))
def test_of_sliding_layers_it_keeps_all_and_ends_with_what_they_keep(calls):
    config = MistralConfig(**SIZES, sliding_window=WINDOW)
    ours, theirs, batch = TreeCache(), DynamicCache(config=config), 2
    assert theirs.is_sliding == [True] * LAYERS
    for name, argument in calls:
        new = states(batch, argument) if name == "update" else None
        after = rows_after(name, argument, batch, theirs.get_seq_length())
        if after > 8:
            continue
        length, offset = theirs.get_mask_sizes(argument if name == "update" else 1, 0)
        (ours, got), (theirs, expected) = (call(cache, name, argument, batch, new) for cache in (ours, theirs))
        batch = after
        for mine, other in zip(got, expected, strict=True):
            assert mine[0].shape[2] == length + offset and other[0].shape[2] == length
            assert all(torch.equal(one[:, :, offset:], another) for one, another in zip(mine, other, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_what_was_cropped_in_inference_mode_is_gone_on_with_outside():
    ours, theirs = TreeCache(), DynamicCache()
    for cache in (ours, theirs):
        torch.manual_seed(0)
        with torch.inference_mode():
            call(cache, "update", 5, 2, states(2, 5))
            cache.crop(-2)
        call(cache, "update", 1, 2, states(2, 1))
    assert ours.get_seq_length() == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])


def test_a_step_in_another_dtype_is_written_by_place():
    """As under autocast behind a prompt that was read outside of it."""
    cache = TreeCache()
    call(cache, "update", 5, 1, states(1, 5))
    cache.prepare((torch.tensor([0]), torch.tensor([7])), high_water=8, width=1)
    (step, *_) = [(keys.bfloat16(), values.bfloat16()) for keys, values in states(1, 1)]
    keys, values = cache.update(*step, 0)
    assert torch.equal(keys[:, :, 7:8], step[0].float()) and torch.equal(values[:, :, 7:8], step[1].float())


def tiny_mistral():
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "intermediate_size": 64, "max_position_embeddings": 512, "tie_word_embeddings": False}
    ids = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    return make_forks_likely(MistralForCausalLM(MistralConfig(**SIZES, **sizes, **ids, sliding_window=WINDOW)))


WAYS = {
    "greedy": {},
    "sampled, several of each": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},  # reorder_cache
    "in chunks": {"prefill_chunk_size": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},  # crop
    "an assistant": {"assistant_model": tiny_llama(seed=5)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral])
def test_plain_generate_writes_the_same_with_it(make, way):
    model, options, caches = make(), WAYS[way], (DynamicCache(), TreeCache())
    alone = "prompt_lookup_num_tokens" in options or "assistant_model" in options
    inputs, written = left_padded(random_prompts(1 if alone else 3, seed=4, shortest=6)), []
    for cache in caches:
        torch.manual_seed(0)
        written.append(model.generate(**inputs, **options, max_new_tokens=30, **{GENERATE_CACHE: cache}).tolist())
    assert written[0] == written[1]
    assert caches[0].get_seq_length() == caches[1].get_seq_length() > 10
    for mine, other in zip(*caches, strict=True):
        torch.testing.assert_close(mine[:2], other[:2])


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_forward_pass_over_parts_gives_the_logits_of_the_whole(make, attention):
    model, cache = make(), TreeCache()
    model.set_attn_implementation(attention)
    ids = torch.tensor(random_prompts(2, seed=6, shortest=12))
    whole = model(input_ids=ids, use_cache=False).logits
    parts = [model(input_ids=part, **{cache_argument(model): cache}).logits for part in ids.split([5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_a_cache_that_holds_threads_is_put_in_order_before_it_is_cut():
    cache = TreeCache()
    prefix, step = states(2, 3), states(2, 2)
    for layer in range(LAYERS):
        cache.update(*prefix[layer], layer)
    rows, slots = torch.tensor([0, 0, 1, 1]), torch.tensor([4, 3, 0, 5])
    cache.prepare((rows, slots), high_water=6, width=2)
    for layer in range(LAYERS):
        keys, values = cache.update(*step[layer], layer)
        assert keys.shape[2] == values.shape[2] == 6
        assert torch.equal(keys[0, :, [0, 1, 2, 4, 3]], torch.cat([prefix[layer][0], step[layer][0]], dim=2)[0])
        assert torch.equal(values[1, :, [0, 1, 2, 5]], torch.cat([step[layer][1][:, :, :1], prefix[layer][1][:, :, 1:],
                                                                  step[layer][1][:, :, 1:]], dim=2)[1])  # fmt: skip
    with pytest.raises(ConfigurationError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ConfigurationError, match="cannot be continued plainly"):
        cache.update(*step[0], 0)
    held = [(keys.clone(), values.clone()) for keys, values, _ in cache]
    order = torch.tensor([[0, 2, 4, 3], [0, 1, 2, 5]])
    cache.put_in_order(order)
    cache.crop(-1)
    for (keys, values, _), before in zip(cache, held, strict=True):
        for row, kept in enumerate(order[:, :3]):
            assert torch.equal(keys[row], before[0][row][:, kept]) and torch.equal(values[row], before[1][row][:, kept])
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(2)


@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral])
def test_the_cache_of_an_answer_without_forks_goes_on_in_plain_generate(make):
    model, plain = enable_apar(make()), make()
    inputs = {"input_ids": torch.tensor(random_prompts(2, seed=8, shortest=9, longest=9))}
    options = {"max_new_tokens": 9, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(**inputs, apar=AparConfig(fork_bias=float("-inf")), **options)
    assert type(first.cache) is TreeCache
    longer = torch.cat([first.sequences, torch.tensor([[3, 4, 5], [6, 7, 8]])], dim=1)
    expected = plain.generate(input_ids=longer, max_new_tokens=9)
    assert plain.generate(input_ids=longer, max_new_tokens=9, **{GENERATE_CACHE: first.cache}).tolist() == expected.tolist()
