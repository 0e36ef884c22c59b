"""Who does not ask for threads loses nothing: no path of vLLM's server writes a control token, nor anything else anew."""

import base64
import io
import re
from urllib.error import HTTPError

import pytest
import torch

from served import QUESTIONS, Server, prompt_ids

A_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}}, "required": ["a"]}

# What may be asked of a chat, by what cannot be answered in threads and what can.
CANNOT_FORK = {
    "one token": {"max_tokens": 1},
    "a JSON object": {"response_format": {"type": "json_object"}, "max_tokens": 60},
    "a schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "one", "schema": SCHEMA}}},
    "a choice": {"structured_outputs": {"choice": ["[Fork]", "[Child]"]}},
    "a regular expression": {"structured_outputs": {"regex": r"(\[Fork\]){2,3}x{9}"}},
    "a grammar": {"structured_outputs": {"grammar": 'root ::= "[Child] " [a-c] [a-c] "[Fork]"'}},
    "a tool that must be called": {"tools": [A_TOOL], "tool_choice": "required", "max_tokens": 80},
    "beams": {"use_beam_search": True, "n": 3, "max_tokens": 12},
}
CAN_FORK = {
    "nothing": {},
    "a tool that may be called": {"tools": [A_TOOL], "tool_choice": "auto"},
    "several": {"n": 3, "temperature": 1.0, "max_tokens": 60},
    "no end": {"ignore_eos": True, "min_tokens": 30, "max_tokens": 60},
    "words that are bad": {"bad_words": ["a", "b"], "max_tokens": 60},
    "log probabilities": {"logprobs": True, "top_logprobs": 5, "prompt_logprobs": 1, "max_tokens": 60},
    "special tokens": {"skip_special_tokens": False, "max_tokens": 60},
    "a penalty": {"repetition_penalty": 1.3, "max_tokens": 60},
}


def tokens_of(answer):
    return [token for choice in answer["choices"] for token in choice["token_ids"]]


@pytest.mark.parametrize("asked", [None, 0, 1])
def test_no_answer_holds_a_control_token(server, control, asked):
    """Beside threads, which it is about too: their control tokens are no part of the answer."""
    fork, child = sorted(control)
    biased = {"logit_bias": {str(fork): 100.0, str(child): 100.0}, "max_tokens": 40}
    allowed = {"allowed_token_ids": [fork, child, 65, 66], "max_tokens": 20}
    for name, options in (CANNOT_FORK | CAN_FORK | {"bias": biased, "allowed": allowed}).items():
        if asked == 1 and name == "bias":
            continue  # a thread that must fork does so at every step
        for question in QUESTIONS[:2]:
            answer = server.chat(question, asked, **options)
            assert tokens_of(answer) and not control & {*tokens_of(answer)}, name
    assert control & {*tokens_of(server.chat(QUESTIONS[0], "thread"))}, "left alone the model forks"
    assert not server.await_rest()


def test_a_grammar_gets_its_text_though_that_spells_a_control_token(server):
    for name, shape in (
        ("a choice", r"\[(Fork|Child)\]"), ("a regular expression", r"(\[Fork\]){2,3}x{9}"),
        ("a grammar", r"\[Child\] [a-c][a-c]\[Fork\]"),
    ):  # fmt: skip
        assert re.fullmatch(shape, server.chat("x", 0, **CANNOT_FORK[name])["choices"][0]["message"]["content"])


def test_completions_hold_none_either(server, control, tokenizer_and_model):
    tokenizer, model = tokenizer_and_model
    ids = prompt_ids(tokenizer, QUESTIONS[1])
    text = tokenizer.decode(ids)
    whole = {"max_tokens": 60, "temperature": 0.0, "return_token_ids": True, "repetition_penalty": 1.1}
    plain = server.post("/v1/completions", prompt=text, **whole)
    file = io.BytesIO()
    torch.save(model.get_input_embeddings()(torch.tensor(ids)).detach(), file)
    embedded = server.post("/v1/completions", prompt_embeds=base64.b64encode(file.getvalue()).decode(), **whole)
    for answer in (plain, embedded):
        assert not control & {*tokens_of(answer)}
        assert answer["choices"][0]["token_ids"] == plain["choices"][0]["token_ids"]
    echoed = server.post("/v1/completions", prompt=text, echo=True, logprobs=2, **whole | {"return_token_ids": False})
    (choice,) = echoed["choices"]
    assert choice["text"] == text + plain["choices"][0]["text"]
    assert not {"[Fork]", "[Child]"} & {*choice["logprobs"]["tokens"]}


def test_other_doors_of_the_server_give_the_plain_answer(server):
    question, told = QUESTIONS[1], {"vllm_xargs": {"apar": 0}, "temperature": 0.0}
    text = server.chat(question, 0, max_tokens=40)["choices"][0]["message"]["content"]
    response = server.post("/v1/responses", input=question, max_output_tokens=40, **told)
    assert response["output"][-1]["content"][0]["text"] == text
    messages = [{"role": "user", "content": question}]
    assert server.post("/v1/messages", messages=messages, max_tokens=40, **told)["content"][0]["text"] == text
    tokens = server.post("/tokenize", prompt="[Fork] x", add_special_tokens=False)["tokens"]
    assert server.post("/detokenize", tokens=tokens)["prompt"] == "[Fork] x"


@pytest.fixture(scope="module")
def stock(folder):
    """The same model behind vLLM alone."""
    with Server(folder, VLLM_PLUGINS="") as server:
        yield server


def test_up_to_a_control_token_a_plain_answer_is_that_of_vllm_alone(server, stock, control):
    """Log probabilities too: they are those of the model before any ban, by vLLM's default."""
    options = {"logprobs": True, "top_logprobs": 3, "prompt_logprobs": 2, "max_tokens": 60}
    written = []
    for question in QUESTIONS:
        alone, beside = stock.chat(question, None, **options), server.chat(question, None, **options)
        ids, ours = alone["choices"][0]["token_ids"], beside["choices"][0]["token_ids"]
        until = next((place for place, token in enumerate(ids) if token in control), len(ids))
        written.append(until)
        assert ours[:until] == ids[:until] and alone["prompt_logprobs"] == beside["prompt_logprobs"]
        first, second = (one["choices"][0]["logprobs"]["content"] for one in (alone, beside))
        assert first[:until] == second[:until]
        for step, same in zip(first[: until + 1], second, strict=False):
            assert [one for one in step["top_logprobs"] if one not in same["top_logprobs"]] == []
        thread = server.chat(question, "thread", **options)
        assert [thread["choices"], thread["prompt_logprobs"]] == [alone["choices"], alone["prompt_logprobs"]]
    assert max(written) > 3 and min(written) < 60


def test_more_bad_words_than_fit_are_refused(server):
    with pytest.raises(HTTPError) as caught:
        server.chat("x", 0, bad_words=[chr(letter) for letter in range(300, 430)])
    assert caught.value.code == 400
    assert server.chat("x", 0, bad_words=["a"], max_tokens=4)["choices"], "the engine lives"
