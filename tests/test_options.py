"""Options of ``generate`` beside sampling: prompts in every form, stopping, results, streamers."""

import threading

import numpy
import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

from conftest import CHILD, EOS, FORK, left_padded, random_prompts, tiny_llama
from hf_apar import AparConfig, AparStreamer, ConfigurationError, ParagraphTree, enable_apar
from hf_apar.speculation.medusa import MedusaDrafts, MedusaHeads
from letter_tokenizer import letter_tokenizer

NO_FORK = AparConfig(fork_bias=float("-inf"))
PROMPTS = left_padded(random_prompts(5, seed=7))


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer()


def run(model, inputs=PROMPTS, **options):
    return model.generate(**inputs, **{"apar": True, "max_new_tokens": 300, "return_dict_in_generate": True} | options)


# stopping


@pytest.mark.parametrize("max_threads", [1, 3, 64])
def test_a_stop_string_cuts_the_answer_in_reading_order(apar_llama, tokenizer, max_threads):
    """The whole answers say where each cut must be; a child's text follows on its title's, across the fork."""
    whole = run(apar_llama)
    cuts = 0
    for row, tree in enumerate(whole.trees):
        for place in range(1, len(tree.token_ids) - 1, 2):
            stop = tokenizer.decode(tree.token_ids[place - 1 : place + 1])
            one = {name: value[row : row + 1] for name, value in PROMPTS.items()}
            out = run(apar_llama, one, apar=AparConfig(max_threads=max_threads), stop_strings=stop, tokenizer=tokenizer)
            (got,) = out.trees
            text = tree.text(tokenizer)
            if got.stopped_by is None:  # found nowhere on a path: a detail's end and the next title are on none
                assert got.token_ids == tree.token_ids
                continue
            cuts += 1
            assert text.startswith(got.text(tokenizer)) and got.text(tokenizer).endswith(stop)
            assert got.threads[got.stopped_by].finish_reason == "stop" and not got.closing_ids
            new = out.sequences[0, one["input_ids"].shape[1] :].tolist()
            assert new == got.token_ids
    assert cuts > 20


def test_stop_strings_may_stand_in_a_generation_config(apar_llama, tokenizer):
    tree = run(apar_llama).trees[0]
    stop = tokenizer.decode(tree.token_ids[:2])
    one = {name: value[:1] for name, value in PROMPTS.items()}
    config = GenerationConfig(
        stop_strings=[stop], max_new_tokens=90, eos_token_id=EOS, pad_token_id=EOS,
        apar_config={"fork_token_id": FORK, "child_token_id": CHILD},
    )  # fmt: skip
    new = apar_llama.generate(**one, apar=True, generation_config=config, tokenizer=tokenizer)[
        0, one["input_ids"].shape[1] :
    ]
    assert tokenizer.decode(new) == stop and config.stop_strings == [stop]


@pytest.mark.parametrize("positional", [False, True])
def test_options_may_stand_in_the_models_own_generation_config(tokenizer, positional):
    model = enable_apar(tiny_llama())
    one = {name: value[:1] for name, value in PROMPTS.items()}
    whole = run(model, one)
    model.generation_config.stop_strings = [tokenizer.decode(whole.trees[0].token_ids[:2])]
    model.generation_config.prompt_lookup_num_tokens = 2
    if positional:
        config = GenerationConfig(max_new_tokens=300, return_dict_in_generate=True)
        out = model.generate(one["input_ids"], config, attention_mask=one["attention_mask"], apar=True, tokenizer=tokenizer)
    else:
        out = run(model, one, tokenizer=tokenizer)
    assert out.trees[0].token_ids == whole.trees[0].token_ids[:2]
    assert model.generation_config.prompt_lookup_num_tokens == 2


def test_without_forks_stopping_is_that_of_generate(plain_llama, apar_llama, tokenizer):
    class Third(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 3 == 0

    for options in ({"stop_strings": ["a", "kb", "M"], "tokenizer": tokenizer}, {"stopping_criteria": [Third()]}):
        for index in range(5):
            one = {name: value[index : index + 1] for name, value in PROMPTS.items()}
            expected = plain_llama.generate(**one, max_new_tokens=40, **options)
            assert apar_llama.generate(**one, max_new_tokens=40, apar=NO_FORK, **options).tolist() == expected.tolist()


class Answers(StoppingCriteria):
    """A criterion that stops all rows at one length, and says so in the form that ``form`` makes of its bools."""

    def __init__(self, form, length):
        self.form, self.length = form, length

    def __call__(self, input_ids, scores, **kwargs):
        return self.form([input_ids.shape[1] >= self.length] * len(input_ids))


FORMS = {
    "a tensor of the rows": torch.tensor,
    "an array of the rows": numpy.array,
    "a Python bool": lambda rows: rows[0],
    "a numpy bool": lambda rows: numpy.bool_(rows[0]),
    "a tensor of no dimension": lambda rows: torch.tensor(rows[0]),
    "a tensor of one row": lambda rows: torch.tensor(rows[:1]),
    "ones and zeros": lambda rows: torch.tensor(rows).long(),
}


REFUSED_FORMS = ("a numpy bool",)  # by plain generate too


def outcome(call):
    """What a call gives, or the kind of its error."""
    try:
        return call().tolist()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("form", FORMS)
def test_l5_a_criterion_may_answer_in_every_form_that_generate_takes(plain_llama, apar_llama, form):
    """FIELD L5: what plain ``generate`` takes is taken, what it refuses is refused."""
    width = PROMPTS["input_ids"].shape[1]
    for length in (width + 1, width + 6):
        options = {"max_new_tokens": 20, "eos_token_id": None, "stopping_criteria": [Answers(FORMS[form], length)]}
        expected = outcome(lambda options=options: plain_llama.generate(**PROMPTS, **options))
        got = outcome(lambda options=options: apar_llama.generate(**PROMPTS, apar=NO_FORK, **options))
        assert got == expected
        assert form in REFUSED_FORMS or len(expected[0]) == length
    if form in REFUSED_FORMS:
        return
    forked = run(apar_llama, stopping_criteria=[Answers(FORMS[form], width + 6)])
    usual = run(apar_llama, stopping_criteria=[Answers(torch.tensor, width + 6)])
    assert forked.sequences.tolist() == usual.sequences.tolist()


def test_max_time_ends_every_thread(apar_llama):
    out = run(apar_llama, max_time=1e-9)
    assert {thread.finish_reason for tree in out.trees for thread in tree.threads} <= {"length", "eos"}
    assert any(thread.finish_reason == "length" for tree in out.trees for thread in tree.threads)
    assert all(stats.steps == 1 for stats in out.stats)


# results


def test_scores_logits_and_logprobs_belong_to_what_each_thread_sampled(plain_llama, apar_llama):
    """Both paths: what the tree carries, and a plain uncached forward pass over each path."""
    out = run(apar_llama, output_scores=True, output_logits=True, temperature=0.7, do_sample=True, max_new_tokens=200)
    compared = 0
    for tree in out.trees:
        for thread in tree.threads:
            assert (
                len(thread.sampled_ids) == len(thread.logprobs or ()) == len(thread.scores or ()) == len(thread.logits or ())
            )
            for index, token in enumerate(thread.sampled_ids):
                path = thread.path_ids[: thread.start + index]
                logits = plain_llama(input_ids=torch.tensor([path]), use_cache=False).logits[0, -1].float()
                torch.testing.assert_close(thread.logits[index], logits, atol=1e-4, rtol=1e-4)
                expected = thread.scores[index].log_softmax(-1)[token].item()
                assert thread.logprobs[index] == pytest.approx(expected)
                assert thread.scores[index][CHILD] == -torch.inf
                compared += 1
    assert compared > 40


def test_without_forks_scores_are_those_of_generate(plain_llama, apar_llama):
    one = {name: value[:1] for name, value in PROMPTS.items()}
    options = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 12}
    expected = plain_llama.generate(**one, **options)
    (thread,) = apar_llama.generate(**one, apar=NO_FORK, **options).trees[0].threads
    allowed = [index for index in range(48) if index not in (FORK, CHILD)]
    for ours, theirs in ((thread.scores, expected.scores), (thread.logits, expected.logits)):
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine[allowed], other[0, allowed])


def test_a_tree_with_logprobs_and_a_cut_goes_to_json_and_back(apar_llama, tokenizer):
    import json

    tree = run(apar_llama).trees[0]
    stop = tokenizer.decode(tree.token_ids[3:5])
    cut = run(apar_llama, stop_strings=stop, tokenizer=tokenizer, output_scores=True).trees[0]
    again = ParagraphTree.from_dict(json.loads(json.dumps(cut.to_dict())))
    assert (again.token_ids, again.stopped_by) == (cut.token_ids, cut.stopped_by)
    assert [one.logprobs for one in again.threads] == [one.logprobs for one in cut.threads]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("drafts", [False, True])
def test_of_rows_that_end_one_after_the_other_the_cache_is_that_of_generate(attention, drafts):
    plain = tiny_llama(attn_implementation=attention)
    model = enable_apar(tiny_llama(attn_implementation=attention))
    heads = MedusaHeads(32, 16, torch.arange(CHILD), 2)
    proposer = MedusaDrafts(heads) if drafts else None
    inputs = left_padded(random_prompts(4, seed=11))
    ours = run(model, inputs, apar=NO_FORK, max_new_tokens=40, proposer=proposer)
    theirs = plain.generate(**inputs, max_new_tokens=40, return_dict_in_generate=True)
    width = inputs["input_ids"].shape[1]
    lengths = [width + stats.tokens for stats in ours.stats]
    assert len(set(lengths)) > 2
    for mine, other in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        for row, (length, mask) in enumerate(zip(lengths, inputs["attention_mask"], strict=True)):
            real = slice(width - int(mask.sum()), length - 1)
            torch.testing.assert_close(mine.keys[row, :, real], other.keys[row, :, real])
            torch.testing.assert_close(mine.values[row, :, real], other.values[row, :, real])


def test_the_cache_is_returned_where_nothing_forked_and_serves_the_next_turn(plain_llama, apar_llama):
    first = {name: value[:1] for name, value in PROMPTS.items()}
    ours = run(apar_llama, first, apar=NO_FORK, max_new_tokens=8, eos_token_id=None)
    theirs = plain_llama.generate(**first, max_new_tokens=8, return_dict_in_generate=True, eos_token_id=None)
    for mine, other in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys)
        torch.testing.assert_close(mine.values, other.values)
    for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_llama(seed=5)}):
        drafted = run(apar_llama, first, apar=NO_FORK, max_new_tokens=8, eos_token_id=None, **drafts)
        assert drafted.stats[0].proposed > 0
        for mine, other in zip(drafted.past_key_values.layers, theirs.past_key_values.layers, strict=True):
            torch.testing.assert_close(mine.keys, other.keys)
    longer = torch.cat([ours.sequences, torch.tensor([[3, 4, 5]])], dim=1)
    mask = torch.cat([first["attention_mask"], torch.ones(1, 11, dtype=torch.long)], dim=1)
    fresh = run(apar_llama, {"input_ids": longer, "attention_mask": mask})
    reused = run(apar_llama, {"input_ids": longer, "attention_mask": mask}, past_key_values=ours.past_key_values)
    assert reused.sequences.tolist() == fresh.sequences.tolist()
    forked = run(apar_llama)
    assert max(len(tree.threads) for tree in forked.trees) > 1 and forked.past_key_values is None


# prompts


def test_a_prefix_prefilled_once_serves_a_batch(plain_llama, apar_llama):
    system = random_prompts(1, seed=1)[0]
    questions = [question[:4] for question in random_prompts(3, seed=2, shortest=4)]
    whole = {"input_ids": torch.tensor([system + question for question in questions])}
    cache = DynamicCache()
    plain_llama(input_ids=torch.tensor([system]), past_key_values=cache)
    cache.batch_repeat_interleave(3)
    expected, got = run(apar_llama, whole), run(apar_llama, whole, past_key_values=cache)
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert cache.get_seq_length() == len(system), "the prefix is copied, so it serves again"
    assert [stats.peak_kv for stats in got.stats] == [stats.peak_kv for stats in expected.stats]
    only_new = {"input_ids": torch.tensor(questions), "attention_mask": torch.ones_like(whole["input_ids"])}
    got = run(apar_llama, only_new, past_key_values=cache)
    assert [tree.token_ids for tree in got.trees] == [tree.token_ids for tree in expected.trees]
    for count, message in ((2, "2 rows"), (3, "goes on after the prefix")):
        wrong = DynamicCache()
        plain_llama(input_ids=whole["input_ids"][:count], past_key_values=wrong)
        with pytest.raises(ConfigurationError, match=message):
            run(apar_llama, whole, past_key_values=wrong)


def test_embeddings_do_for_ids(apar_llama):
    ids = torch.tensor(random_prompts(1, seed=4))
    embeds = apar_llama.get_input_embeddings()(ids)
    expected, got = run(apar_llama, {"input_ids": ids}), run(apar_llama, {"inputs_embeds": embeds})
    assert got.trees[0].token_ids == expected.trees[0].token_ids
    assert got.sequences[0].tolist() == expected.sequences[0, ids.shape[1] :].tolist()
    both = run(apar_llama, {"input_ids": ids, "inputs_embeds": embeds})
    assert both.sequences.tolist() == expected.sequences.tolist()
    padded = apar_llama.get_input_embeddings()(PROMPTS["input_ids"])
    batch = run(apar_llama, {"inputs_embeds": padded, "attention_mask": PROMPTS["attention_mask"]})
    assert [tree.token_ids for tree in batch.trees] == [tree.token_ids for tree in run(apar_llama).trees]


def test_very_unlike_lengths_in_a_batch_and_prefill_in_chunks(apar_llama):
    prompts = [random_prompts(1, seed, length, length)[0] for seed, length in enumerate((1, 150, 40, 3))]
    alone = [run(apar_llama, {"input_ids": torch.tensor([prompt])}).trees[0].token_ids for prompt in prompts]
    for options in ({}, {"prefill_chunk_size": 7}, {"prefill_chunk_size": 1000}):
        assert [tree.token_ids for tree in run(apar_llama, left_padded(prompts), **options).trees] == alone


def test_an_empty_batch_gives_an_empty_answer(apar_llama):
    ids = torch.zeros(0, 4, dtype=torch.long)
    out = run(apar_llama, {"input_ids": ids, "attention_mask": ids})
    assert out.sequences.shape == (0, 4) and out.trees == [] and out.stats == []


def test_a_prompt_beyond_the_positions_is_an_error(apar_llama):
    padded = {"input_ids": torch.ones(1, 600, dtype=torch.long), "attention_mask": torch.tensor([[0] * 500 + [1] * 100])}
    assert run(apar_llama, padded, max_new_tokens=2).trees, "padding is no position"
    with pytest.raises(ConfigurationError, match="513 positions and LlamaForCausalLM knows 512"):
        run(apar_llama, {"input_ids": torch.ones(1, 513, dtype=torch.long)})


def test_several_answers_to_each_prompt(plain_llama, apar_llama):
    options = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 30}
    torch.manual_seed(5)
    expected = plain_llama.generate(**PROMPTS, **options)
    torch.manual_seed(5)
    assert apar_llama.generate(**PROMPTS, apar=NO_FORK, **options).tolist() == expected.tolist()
    assert len(run(apar_llama, **options).trees) == 15


def test_several_answers_are_held_to_what_their_prompt_allows(plain_llama, apar_llama):
    """transformers asks with the number of the prompt; ours was that of the answer."""
    options = {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 12}
    options["prefix_allowed_tokens_fn"] = lambda row, ids: range(3 * row, 3 * row + 4)
    torch.manual_seed(5)
    expected = plain_llama.generate(**PROMPTS, **options)
    torch.manual_seed(5)
    assert apar_llama.generate(**PROMPTS, apar=NO_FORK, **options).tolist() == expected.tolist()


# streaming


def test_two_consumers_at_once_and_the_first_unfinished_thread_is_live(apar_llama, tokenizer):
    class Order(AparStreamer):
        def __init__(self):
            self.tokens = []

        def put_token(self, row, thread, parent, token):
            self.tokens.append((thread, token))

    class Live(TextStreamer):
        def __init__(self, other):
            super().__init__(tokenizer, skip_prompt=True)
            self.other, self.parts = other, []

        def put(self, value):
            self.parts.append((value.tolist(), len(self.other.tokens)))

        def end(self):
            pass

    order = Order()
    live = Live(order)
    ids = torch.tensor(random_prompts(1, seed=3))
    out = run(apar_llama, {"input_ids": ids}, streamer=[live, order])
    (prompt, _), *parts = live.parts
    assert prompt == ids.tolist()
    assert [token for part, _ in parts for token in part] == [*out.trees[0].token_ids, EOS]
    assert sorted(token for _, token in order.tokens) == sorted(out.trees[0].token_ids)
    assert parts[0][1] <= 1, "the root's first token is live, not held back to the end"


def test_an_iterator_streamer_gives_the_text_in_reading_order(apar_llama, tokenizer):
    ids = torch.tensor(random_prompts(1, seed=3))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    worker = threading.Thread(target=run, args=(apar_llama, {"input_ids": ids}), kwargs={"streamer": streamer})
    worker.start()
    text = "".join(streamer)
    worker.join()
    assert text == run(apar_llama, {"input_ids": ids}).trees[0].text(tokenizer)


# one process, several users


def test_two_threads_of_one_process_generate_at_once(apar_llama):
    batches = [left_padded(random_prompts(3, seed)) for seed in range(4)]
    expected = [run(apar_llama, batch).sequences.tolist() for batch in batches]
    got = [None] * 4

    def work(index):
        got[index] = run(apar_llama, batches[index]).sequences.tolist()

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert got == expected
