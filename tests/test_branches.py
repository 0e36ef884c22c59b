"""``branch`` against ``generate`` of prompt + branch alone: the same model, one sequence at a time."""

import copy
from collections import Counter
from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    DynamicCache,
    LogitsProcessor,
    MaxLengthCriteria,
    StoppingCriteria,
    TextStreamer,
)

from conftest import CHILD, EOS, FORK, VOCABULARY, left_padded, random_prompts, tiny_llama
from families import CASES, WINDOW, tiny
from hf_apar import AparStreamer, ConfigurationError, ControlTokenError, branch, enable_apar
from hf_apar.protocol import NoForks
from hf_apar.speculation.medusa import MedusaDrafts, MedusaHeads
from hf_apar.tree.growth import GrowingTree
from letter_tokenizer import letter_tokenizer

BRANCHES = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [5, 6], []]
PROMPTS = random_prompts(3, seed=1)
PAST_WINDOW = {"max_new_tokens": 2 * WINDOW, "eos_token_id": None, "pad_token_id": EOS}


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer()


def alone(model, prompt, ids, **options):
    """What ``generate`` writes after prompt + branch."""
    row = torch.tensor([[*prompt, *ids]])
    return model.generate(row, attention_mask=torch.ones_like(row), **options)[0, row.shape[1] :].tolist()


def all_alone(model, prompts, branches, **options):
    return [[alone(model, prompt, ids, **options) for ids in branches] for prompt in prompts]


def branched(model, prompts=PROMPTS, branches=BRANCHES, **options):
    options = {"max_new_tokens": 40, "return_dict_in_generate": True, **options}
    return branch(model, **left_padded(prompts), branches=branches, **options)


def written(out):
    return [[thread.sampled_ids for thread in threads] for threads in out.threads]


# equality


@pytest.mark.parametrize("max_threads", [None, 1, 2])
def test_each_branch_is_what_generate_gives_of_prompt_and_branch_alone(plain_llama, max_threads):
    out = branched(plain_llama, max_threads=max_threads, max_new_tokens=8)
    assert written(out) == all_alone(plain_llama, PROMPTS, BRANCHES, max_new_tokens=8)
    reasons = {thread.finish_reason for threads in out.threads for thread in threads}
    assert reasons == {"eos", "length"}, "some branches must end themselves and others not"


@cache
def longer_than_the_window(family):
    """Prompts, branches, and what the model writes after each pair alone: once for all attention functions."""
    prompts = random_prompts(3, seed=2, shortest=2 * WINDOW, longest=16)
    branches = [*random_prompts(2, seed=3, shortest=2 * WINDOW, longest=16), [5], []]
    return prompts, branches, all_alone(tiny(family, "eager"), prompts, branches, **PAST_WINDOW)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_every_family_with_prompts_and_branches_longer_than_its_window(family, attention):
    prompts, branches, expected = longer_than_the_window(family)
    assert written(branched(tiny(family, attention), prompts, branches, **PAST_WINDOW)) == expected


def test_sequences_are_prompt_branch_and_what_followed_padded_on_the_right(plain_llama):
    sequences = branched(plain_llama, return_dict_in_generate=False)
    inputs = left_padded(PROMPTS)["input_ids"].tolist()
    rows = [
        [*padded, *ids, *alone(plain_llama, prompt, ids, max_new_tokens=40)]
        for padded, prompt in zip(inputs, PROMPTS, strict=True)
        for ids in BRANCHES
    ]
    width = max(map(len, rows))
    assert sequences.tolist() == [row + [EOS] * (width - len(row)) for row in rows]
    padded = branched(plain_llama, return_dict_in_generate=False, pad_token_id=3)
    assert padded[1].tolist() == rows[1] + [3] * (width - len(rows[1]))


def test_branches_may_differ_from_prompt_to_prompt(plain_llama):
    own = [[[5, 6], [7]], [[8], [9, 10, 11]], [[], [12]]]
    pairs = zip(PROMPTS, own, strict=True)
    expected = [all_alone(plain_llama, [prompt], ids, max_new_tokens=40)[0] for prompt, ids in pairs]
    assert written(branched(plain_llama, branches=own)) == expected
    assert written(branched(plain_llama, branches=[[torch.tensor(ids) for ids in row] for row in own])) == expected


def test_texts_are_encoded_and_what_was_written_is_decoded(plain_llama, tokenizer):
    texts = [tokenizer.decode(ids) for ids in BRANCHES]
    out = branched(plain_llama, branches=texts, tokenizer=tokenizer)
    expected = all_alone(plain_llama, PROMPTS, BRANCHES, max_new_tokens=40)
    assert written(out) == expected
    assert out.texts(tokenizer) == [[tokenizer.decode(ids, skip_special_tokens=True) for ids in row] for row in expected]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("max_threads", [None, 2])
def test_long_branches_are_fed_in_passes_of_a_bounded_width(plain_llama, chunk, max_threads):
    branches = [*random_prompts(3, seed=4, shortest=9, longest=14), [], [5]]
    widths = []
    hook = plain_llama.get_input_embeddings().register_forward_pre_hook(lambda layer, ids: widths.append(ids[0].numel()))
    out = branched(plain_llama, PROMPTS[:1], branches, prefill_chunk_size=chunk, max_threads=max_threads)
    hook.remove()
    assert max(widths) <= max(chunk, len(branches))
    assert written(out) == all_alone(plain_llama, PROMPTS[:1], branches, max_new_tokens=40)
    batch = branched(plain_llama, PROMPTS, branches, prefill_chunk_size=chunk, max_threads=max_threads)
    assert written(batch) == all_alone(plain_llama, PROMPTS, branches, max_new_tokens=40)


# bounds


def test_max_length_counts_prompt_and_branch(plain_llama):
    expected = all_alone(plain_llama, PROMPTS, BRANCHES, max_length=30)
    assert written(branched(plain_llama, max_new_tokens=None, max_length=30)) == expected
    model = copy.deepcopy(plain_llama)
    model.generation_config.max_length = 30
    assert written(branched(model, max_new_tokens=None)) == expected
    config = copy.deepcopy(plain_llama.generation_config)
    config.max_length = 30
    assert written(branched(plain_llama, max_new_tokens=None, generation_config=config)) == expected


def test_without_a_bound_a_branch_writes_as_much_as_generate(plain_llama):
    assert written(branched(plain_llama, max_new_tokens=None)) == all_alone(plain_llama, PROMPTS, BRANCHES)


def test_a_stop_string_ends_its_own_branch(plain_llama, tokenizer):
    stop = [tokenizer.decode([token]) for token in (3, 17, 30)]
    options = {"stop_strings": stop, "tokenizer": tokenizer, "max_new_tokens": 40}
    out = branched(plain_llama, **options)
    assert written(out) == all_alone(plain_llama, PROMPTS, BRANCHES, **options)
    assert len({thread.finish_reason for threads in out.threads for thread in threads}) > 1


def test_a_stopping_criterion_ends_its_own_branch(plain_llama):
    class Sevens(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 7 == 0

    options = {"stopping_criteria": [Sevens()], "max_new_tokens": 40}
    assert written(branched(plain_llama, **options)) == all_alone(plain_llama, PROMPTS, BRANCHES, **options)


def test_max_time_ends_all_branches(plain_llama):
    out = branched(plain_llama, eos_token_id=None, pad_token_id=0, max_time=1e-9, max_threads=2)
    assert {thread.finish_reason for threads in out.threads for thread in threads} == {"length"}
    assert [[len(ids) for ids in row] for row in written(out)] == [[1, 1, 0, 0, 0]] * len(PROMPTS)


# choice


class Odd(LogitsProcessor):
    """Prefers tokens whose id is odd where the path's sum is even: it reads the whole path."""

    def __call__(self, input_ids, scores):
        even = (input_ids.sum(dim=1) % 2 == 0).float()[:, None]
        return scores + even * 5 * (torch.arange(scores.shape[1]) % 2)


PROCESSORS = (
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5, 6], [7]]},
    {"sequence_bias": [[[9], 4.0]]},
    {"suppress_tokens": [4, 5, 6]},
    {"logits_processor": [Odd()]},
)


@pytest.mark.parametrize("options", PROCESSORS, ids=lambda options: next(iter(options)))
def test_processors_read_the_path_of_each_branch(plain_llama, options):
    expected = all_alone(plain_llama, PROMPTS, BRANCHES, max_new_tokens=24, **options)
    plain = all_alone(plain_llama, PROMPTS, BRANCHES, max_new_tokens=24)
    # prompt by prompt: on the lowest release a penalty takes the padding of a batch for text, in generate's own batches too
    found = [written(branched(plain_llama, [prompt], max_new_tokens=24, **options))[0] for prompt in PROMPTS]
    assert found == expected != plain


def test_scores_and_logprobs_are_those_of_generate_alone(plain_llama):
    options = {"output_scores": True, "repetition_penalty": 1.2, "max_new_tokens": 12}
    for prompt in PROMPTS:
        out = branched(plain_llama, [prompt], **options)
        for ids, thread, logprobs in zip(BRANCHES, out.threads[0], out.logprobs[0], strict=True):
            inputs = torch.tensor([[*prompt, *ids]])
            single = plain_llama.generate(inputs, return_dict_in_generate=True, **options)
            expected = plain_llama.compute_transition_scores(single.sequences, single.scores, normalize_logits=True)
            torch.testing.assert_close(torch.tensor(logprobs), expected[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(torch.stack(thread.scores), torch.cat(single.scores), atol=1e-4, rtol=1e-4)
    assert branched(plain_llama).logprobs == [[[]] * len(BRANCHES)] * len(PROMPTS)


def test_one_sampled_branch_is_that_of_generate_with_the_same_seed(plain_llama):
    options = {"do_sample": True, "temperature": 1.5, "top_k": 20, "max_new_tokens": 40}
    for seed in range(5):
        torch.manual_seed(seed)
        expected = alone(plain_llama, PROMPTS[0], BRANCHES[2], **options)
        torch.manual_seed(seed)
        assert written(branched(plain_llama, PROMPTS[:1], BRANCHES[2:3], **options)) == [[expected]]


def test_sampled_branches_are_distributed_as_alone_and_a_seed_repeats_them(plain_llama):
    options = {"do_sample": True, "top_k": 4, "temperature": 6.0, "max_new_tokens": 1}
    torch.manual_seed(0)
    out = branched(plain_llama, PROMPTS[:1], num_return_sequences=600, **options)
    torch.manual_seed(0)
    assert written(branched(plain_llama, PROMPTS[:1], num_return_sequences=600, **options)) == written(out)
    for index, ids in enumerate(BRANCHES):
        drawn = Counter(row[index][0] for row in written(out))
        single = plain_llama.generate(
            torch.tensor([[*PROMPTS[0], *ids]]), output_scores=True, return_dict_in_generate=True, **options
        )
        chances = single.scores[0][0].softmax(-1)
        assert set(drawn) <= set(chances.nonzero()[:, 0].tolist())
        expected = {token: 600 * chance for token, chance in enumerate(chances.tolist()) if chance}
        chi = sum((drawn[token] - count) ** 2 / count for token, count in expected.items())
        assert chi < 21.1  # of 3 degrees of freedom: once in 10,000


def test_return_sequences_stand_together_as_prompts_do(plain_llama):
    out = branched(plain_llama, PROMPTS[:2], num_return_sequences=2, do_sample=True, top_k=1)
    expected = all_alone(plain_llama, PROMPTS[:2], BRANCHES, max_new_tokens=40)
    assert written(out) == [expected[0], expected[0], expected[1], expected[1]]
    assert len(out.sequences) == 4 * len(BRANCHES) and out.sequences[: len(BRANCHES)].equal(out.sequences[5:10])


# drafts, streamers, models


def drafts(plain_llama):
    heads = MedusaHeads(plain_llama.config.hidden_size, 8, torch.arange(CHILD), 2)
    return {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": tiny_llama(seed=0)},
        "stranger": {"assistant_model": tiny_llama(seed=5)},
        "heads": {"proposer": MedusaDrafts(heads)},
    }


@pytest.mark.parametrize("kind", ["lookup", "assistant", "stranger", "heads"])
@pytest.mark.parametrize("max_threads", [None, 2])
def test_drafts_change_nothing_but_the_number_of_steps(plain_llama, kind, max_threads):
    expected = all_alone(plain_llama, PROMPTS, BRANCHES, max_new_tokens=40)
    out = branched(plain_llama, max_threads=max_threads, **drafts(plain_llama)[kind])
    assert written(out) == expected
    assert sum(one.proposed for one in out.stats) > 5
    plain = branched(plain_llama, max_threads=max_threads)
    if kind == "assistant":
        assert sum(one.steps for one in out.stats) < sum(one.steps for one in plain.stats)


class Record(AparStreamer):
    def __init__(self):
        self.tokens, self.ended, self.over = {}, {}, 0

    def begin_thread(self, row, thread, parent):
        assert parent is None if thread == 0 else parent == 0
        self.tokens[row, thread] = []

    def put_token(self, row, thread, parent, token):
        self.tokens[row, thread].append(token)

    def end_thread(self, row, thread, finish_reason):
        self.ended[row, thread] = finish_reason

    def end(self):
        self.over += 1


def test_a_streamer_gets_each_branch_as_a_thread(plain_llama):
    streamer = Record()
    out = branched(plain_llama, streamer=streamer, max_threads=3)
    expected = {(row, one.index): one.tokens for row, threads in enumerate(out.threads) for one in threads}
    assert {key: tokens for key, tokens in streamer.tokens.items() if key[1]} == expected
    assert all(not streamer.tokens[row, 0] for row in range(len(PROMPTS)))
    assert streamer.over == 1 and set(streamer.ended) == set(streamer.tokens)


def test_a_plain_streamer_gets_one_branch_after_the_other(plain_llama, tokenizer, capsys):
    out = branched(plain_llama, PROMPTS[:1], streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out.strip() == "".join(tokenizer.decode(thread.tokens) for thread in out.threads[0])


def test_an_error_ends_the_streamer(plain_llama):
    streamer = Record()
    with pytest.raises(ConfigurationError):
        branched(plain_llama, branches=[[VOCABULARY]], streamer=streamer)
    assert streamer.over == 1


def test_a_model_that_peft_wraps(plain_llama):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = get_peft_model(tiny_llama(), lora).eval()
    merged = copy.deepcopy(tuned).merge_and_unload()
    expected = all_alone(merged, PROMPTS, BRANCHES, max_new_tokens=40)
    assert expected != all_alone(plain_llama, PROMPTS, BRANCHES, max_new_tokens=40)
    assert written(branched(tuned)) == expected
    assert written(branched(enable_apar(tuned))) == expected


def test_a_model_with_apar_enabled_writes_no_control_token(apar_llama):
    out = branched(apar_llama)
    assert written(out) == all_alone(apar_llama, PROMPTS, BRANCHES, max_new_tokens=40)
    assert not {FORK, CHILD} & {token for row in written(out) for ids in row for token in ids}


def test_a_model_without_control_tokens_needs_none():
    model = tiny_llama()
    del model.generation_config.apar_config
    model.generation_config.suppress_tokens = None
    with pytest.raises(ControlTokenError):
        enable_apar(model)
    out = branched(model)
    assert written(out) == all_alone(model, PROMPTS, BRANCHES, max_new_tokens=40)
    assert FORK in {token for row in written(out) for ids in row for token in ids}, "here it is a token like any other"


@pytest.mark.parametrize("held", [3, 8])
def test_a_prefix_that_is_cached_already(plain_llama, held):
    prompt = random_prompts(1, seed=5, shortest=9, longest=9)[0]
    prefix = DynamicCache()
    with torch.no_grad():
        plain_llama(torch.tensor([prompt[:held]]), past_key_values=prefix)
    out = branched(plain_llama, [prompt], past_key_values=prefix)
    assert written(out) == all_alone(plain_llama, [prompt], BRANCHES, max_new_tokens=40)
    assert prefix.get_seq_length() == held
    out = branched(plain_llama, [prompt], past_key_values=prefix, max_new_tokens=None, max_length=30)
    assert written(out) == all_alone(plain_llama, [prompt], BRANCHES, max_length=30)


# what it costs


def test_the_prompt_is_held_once(plain_llama):
    (prompt,) = random_prompts(1, seed=6, shortest=100, longest=100)
    branches = [[5 + index, 6] for index in range(20)]
    out = branched(plain_llama, [prompt], branches, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
    (stats,) = out.stats
    assert stats.peak_kv == 100 + 20 * (2 + 5) - 20 and stats.peak_threads == 20  # each branch's last token is never fed
    assert stats.steps == 1 + 5
    assert stats.tokens == 20 * 5 and stats.critical_path == 5 and stats.tokens_per_step == 100 / 6
    assert stats.kv_if_sequential == 20 * (100 + 2 + 4)
    assert stats.attended_if_sequential == 20 * sum(range(101, 107)) == stats.attended
    fewer = branched(plain_llama, [prompt], branches, max_new_tokens=5, eos_token_id=None, pad_token_id=0, max_threads=4)
    assert fewer.stats[0].peak_kv <= 100 + 4 * (2 + 5) and fewer.stats[0].peak_threads == 4
    assert written(fewer) == written(out)


def test_the_prompts_slots_are_released_with_the_last_branch():
    row = GrowingTree(range(10), NoForks(frozenset({EOS})), max_threads=1, padding=2)
    row.branch(row.live[0], [[1, 2], [3]])
    for _ in range(2):
        assert row.pool.held >= 12
        row.write(row.live[0], EOS)
    assert not row.unfinished and row.pool.held == 2  # the padding's


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"output_attentions": True}, "output_attentions"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"min_new_tokens": 3}, "min_new_tokens counts from the end of the prompt"),
        ({"begin_suppress_tokens": [3]}, "begin_suppress_tokens counts"),
        ({"forced_eos_token_id": 3}, "forced_eos_token_id counts"),
        ({"forced_bos_token_id": 3}, "forced_bos_token_id counts"),
        ({"exponential_decay_length_penalty": (3, 1.1)}, "exponential_decay_length_penalty counts"),
        ({"encoder_repetition_penalty": 1.1}, "encoder_repetition_penalty counts"),
        ({"encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size counts"),
        ({"stopping_criteria": [MaxLengthCriteria(20)]}, "MaxLengthCriteria counts the prompt"),
        ({"max_new_tokens": None, "max_length": 16}, "max_length is 16, and a prompt with its branch has 1"),
        ({"apar": True}, "apar cannot be combined"),
        ({"protocol": NoForks()}, "protocol cannot be combined"),
        ({"custom_generate": "some/loop"}, "custom_generate cannot be combined"),
        ({"inputs_embeds": torch.zeros(3, 4, 32)}, "inputs_embeds cannot be combined"),
        ({"streamer": TextStreamer(letter_tokenizer())}, "takes one prompt, got 3"),
        ({"stop_strings": "a"}, "pass tokenizer=tokenizer"),
        ({"max_threads": 0}, "max_threads is 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_that_branches_cannot_follow_is_refused_by_its_name(plain_llama, options, message):
    with pytest.raises(ConfigurationError, match=message):
        branched(plain_llama, **options)


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ([], "a list of one at least"),
        ("Name:", "a list of one at least"),
        ({"name": [5]}, "a list of one at least"),
        (iter([[5]]), "a list of one at least"),
        ([[5.0, 6.0]], "2-D|there are branches for 1 prompts|give a text"),
        (["abc"], "pass tokenizer=tokenizer"),
        ([5, 6], "a branch is 5"),
        ([[5], 6], "a branch is 6"),
        ([[5], None], "a branch is None"),
        ([torch.ones(1, 2, dtype=torch.long)], "one-dimensional tensor"),
        ([torch.ones(2)], "one-dimensional tensor"),
        ([[5], [VOCABULARY]], "token id 48, and the model's vocabulary 48"),
        ([[5], [-1]], "token id -1"),
        ([[[5], [6]], [[7]], [[8], [9]]], r"\[1, 2\] for each"),
        ([[[5], [6]], [[7], [8]]], "for 2 prompts"),
    ],
)
def test_bad_branches_are_told(plain_llama, branches, message):
    with pytest.raises(ConfigurationError, match=message):
        branched(plain_llama, branches=branches)


@pytest.mark.parametrize("input_ids", [torch.tensor([1, 2]), [[1, 2]], torch.ones(1, 2), torch.ones(0, 2, dtype=torch.long)])
def test_bad_prompts_are_told(plain_llama, input_ids):
    with pytest.raises(ConfigurationError, match="pass a tensor of token ids of shape"):
        branch(plain_llama, input_ids, BRANCHES)


def test_another_object_than_a_model_is_told():
    with pytest.raises(ConfigurationError, match="pass a model of transformers"):
        branch("model", torch.tensor([[1]]), BRANCHES)


def test_branches_beyond_the_positions_that_the_model_knows_are_refused():
    model = tiny_llama(max_position_embeddings=16)
    with pytest.raises(ConfigurationError, match="knows 16"):
        branched(model, [[1, 2, 3]], [[5] * 14])


def test_rotary_positions_that_change_bound_prompt_branch_and_what_follows():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_llama(rope_parameters=rope, max_position_embeddings=64)
    branches = [*BRANCHES, [7] * 30]
    expected = all_alone(model, PROMPTS, branches, max_length=65)
    assert written(branched(model, branches=branches, max_new_tokens=None, max_length=65)) == expected
    with pytest.raises(ConfigurationError, match="change beyond 64 positions"):
        branched(model, branches=branches, max_new_tokens=None, max_length=66)
