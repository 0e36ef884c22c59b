"""Parameters of vLLM's server beside threads: each does what it does in a plain answer, in reading order."""

from collections import Counter

import pytest

from served import QUESTIONS, ask

LONG = QUESTIONS[1:4]


@pytest.fixture(scope="module")
def whole(server):
    """The first choice of the whole answer in threads to each question, and how much it used."""
    answers = {question: server.chat(question, 1) for question in QUESTIONS}
    return {question: answer["choices"][0] | answer["usage"] for question, answer in answers.items()}


def content(choice):
    return choice["message"]["content"]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_ends_the_answer_where_it_reads(server, whole, tokenizer_and_model, include):
    tokenizer, cut = tokenizer_and_model[0], 0
    for question in QUESTIONS:
        ids = whole[question]["token_ids"]
        for stop in {ids[len(ids) // 3], ids[2 * len(ids) // 3]} - {tokenizer.eos_token_id}:
            until = ids.index(stop)
            options = {"stop_token_ids": [stop], "include_stop_str_in_output": include}
            answer = server.chat(question, 1, **options, logprobs=True)
            (choice,) = answer["choices"]
            assert choice["token_ids"] == ids[: until + 1] and answer["usage"]["completion_tokens"] == until + 1
            assert content(choice) == tokenizer.decode(ids[: until + include], skip_special_tokens=True)
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
            assert len(choice["logprobs"]["content"]) == until + 1
            stream = ask(server, question, stream=True, extra_body={"vllm_xargs": {"apar": 1}} | options)
            assert "".join(piece.choices[0].delta.content or "" for piece in stream) == content(choice)
            cut += until + 1 < len(ids)
    assert cut > 4
    assert not server.await_rest()


def test_the_models_own_end_ends_a_thread_though_it_is_named_as_a_stop_token(server, whole, tokenizer_and_model):
    for question in LONG:
        (choice,) = server.chat(question, 1, stop_token_ids=[tokenizer_and_model[0].eos_token_id])["choices"]
        assert content(choice) == content(whole[question]) and choice["token_ids"] == whole[question]["token_ids"]


def test_log_probabilities_end_with_a_stop_string(server, whole):
    for question in LONG:
        text = content(whole[question])
        stop = next(
            text[place : place + 2] for place in range(len(text) // 2, len(text)) if text[place : place + 2].isascii()
        )
        (choice,) = server.chat(question, 1, stop=[stop], logprobs=True)["choices"]
        assert content(choice) == text[: text.index(stop)] and choice["stop_reason"] == stop
        assert choice["token_ids"] == whole[question]["token_ids"][: len(choice["token_ids"])]
        assert [one["token"] for one in choice["logprobs"]["content"]][-1].endswith(stop[-1])
        assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])


def test_what_is_said_of_a_token_holds_in_every_thread(server, whole, tokenizer_and_model):
    for question in LONG:
        letter = Counter(letter for letter in content(whole[question]) if letter.isascii() and letter.isalnum()).most_common(
            1
        )
        (letter, count), *_ = letter
        (token,) = tokenizer_and_model[0].encode(letter)
        for options in ({"bad_words": [letter]}, {"logit_bias": {str(token): -100.0}}):
            (choice,) = server.chat(question, 1, **options)["choices"]
            assert count and letter not in content(choice) and token not in choice["token_ids"]


@pytest.mark.parametrize("options", [
    {"cache_salt": "abc"},
    {"priority": -1},
    {"chat_template_kwargs": {"unknown": 1}},
    {"prompt_logprobs": 2},
    {"tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}], "tool_choice": "auto"},
    {"stream_interval": 5},
    {"skip_special_tokens": False},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_what_concerns_no_token_changes_none(server, whole, options):
    for question in LONG:
        answer = server.chat(question, 1, **options)
        assert answer["choices"][0]["token_ids"] == whole[question]["token_ids"]
        if "prompt_logprobs" in options:
            assert answer["prompt_logprobs"] == server.chat(question, 0, max_tokens=2, **options)["prompt_logprobs"]


def test_a_prompt_is_cut_and_echoed(server, tokenizer_and_model):
    tokenizer = tokenizer_and_model[0]
    ids, asked = tokenizer.encode("And now, at some length: what is a hedge for?"), {"vllm_xargs": {"apar": 1}}
    settings = {"temperature": 0.0, "max_tokens": 300, "repetition_penalty": 1.1} | asked
    cut = server.post("/v1/completions", prompt=ids, truncate_prompt_tokens=9, **settings)
    short = server.post("/v1/completions", prompt=ids[-9:], **settings)
    assert cut["choices"][0]["text"] == short["choices"][0]["text"] and cut["usage"] == short["usage"]
    echoed = server.post("/v1/completions", prompt=ids[-9:], echo=True, logprobs=1, **settings)["choices"][0]
    assert echoed["text"] == tokenizer.decode(ids[-9:]) + short["choices"][0]["text"]
    assert len(echoed["logprobs"]["tokens"]) == 9 + short["usage"]["completion_tokens"]


def test_several_answers_are_drawn_alike_with_the_same_seed(server):
    drawn = [server.chat(LONG[0], 1, n=3, temperature=1.0, seed=7, max_tokens=80)["choices"] for _ in range(2)]
    assert [one["token_ids"] for one in drawn[0]] == [one["token_ids"] for one in drawn[1]]
    assert len({tuple(one["token_ids"]) for one in drawn[0]}) == 3


def test_usage_is_told_as_the_text_comes(server, whole):
    counts = set()
    for question in LONG:
        told = {"include_usage": True, "continuous_usage_stats": True}
        used = [piece.usage.completion_tokens for piece in ask(server, question, stream=True, stream_options=told)]
        assert used == sorted(used) and used[-1] == whole[question]["completion_tokens"]
        counts |= {*used}
    assert len(counts) > 5
