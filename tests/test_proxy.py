"""The proxy over real HTTP, in front of a real tiny model: what it writes is what `generate` writes."""

import asyncio
import contextlib
import http.client
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import torch
from typer.testing import CliRunner

from hf_apar import AparModelForCausalLM
from hf_apar.checkpoints.export import save_merged
from hf_apar.cli import app
from hf_apar.errors import ConfigurationError, ServerError
from hf_apar.serving.admission import Eager, FixedCap
from hf_apar.serving.proxy.app import ProxySettings
from hf_apar.serving.proxy.asked import parse
from hf_apar.serving.proxy.errors import ApiError
from hf_apar.serving.proxy.server import Upstreams
from tiny_chat_model import tiny_chat_model
from tiny_server import RAW, TinyServer, proxy_before, until

QUESTIONS = ["Why?", "x", "Name three birds.", "é字"]
GREEDY = {"temperature": 0.0, "max_tokens": 120}
UNCUT = {"temperature": 0.0, "max_tokens": 1000}


@pytest.fixture(scope="module")
def tiny():
    return tiny_chat_model()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    tokenizer, model = tiny
    return save_merged(model, tokenizer, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def oracle(tiny, folder):
    model = AparModelForCausalLM.from_pretrained(folder)

    def answer(prompt_ids, **options):
        settings = {"apar": True, "max_new_tokens": 1000, "return_dict_in_generate": True}
        return model.generate(torch.tensor([prompt_ids]), **settings | options).trees[0]

    return answer


@pytest.fixture(scope="module")
def upstream(tiny, folder):
    with TinyServer(*tiny, root=str(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def running(upstream):
    with proxy_before([upstream], None, policy=Eager()) as running:
        yield running


@pytest.fixture
def proxy(running, upstream):
    """A client of the proxy; afterwards nothing may be left behind."""
    upstream.fault, upstream.takes_bias = lambda number, made: None, True
    running.proxy.pool.upstreams[0].dialect.by_words = False
    with httpx2.Client(base_url=running.url, timeout=60) as client:
        yield client
    upstream.fault = lambda number, made: None
    assert until(lambda: not upstream.live and not running.proxy.in_flight), "something was left behind"
    (one,) = running.proxy.pool.upstreams
    assert one.busy == len(one.driver) == len(one._tasks) == len(one.calls) == 0


def chat(question, **options):
    return {"model": "tiny", "messages": [{"role": "user", "content": question}]} | GREEDY | options


def prompt_of(tiny, question):
    chat = [{"role": "user", "content": question}]
    return tiny[0].apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def ask(client, question, **options):
    response = client.post("/v1/chat/completions", json=chat(question, **options))
    assert response.status_code == 200, response.text
    return response.json()


def events(response):
    return [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]


def stream(client, path, body):
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        *chunks, done = events(response)
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


@pytest.fixture(scope="module")
def trees(tiny, oracle):
    """The questions, and what `generate` answers them; some of the answers fork."""
    found = [(question, oracle(prompt_of(tiny, question))) for question in QUESTIONS]
    assert max(len(tree.threads) for _, tree in found) >= 3
    return found


def test_a_chat_is_answered_as_generate_does(proxy, trees, tiny):
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda one: ask(proxy, one[0], max_tokens=None), trees))
    for (question, tree), answer in zip(trees, answers, strict=True):
        (choice,) = answer["choices"]
        assert choice["message"] == {"role": "assistant", "content": tree.text(tiny[0])}
        prompt, made = len(prompt_of(tiny, question)), len(tree.token_ids + tree.closing_ids)
        assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        assert choice["finish_reason"] == "stop" and answer["object"] == "chat.completion" and answer["model"] == "tiny"


def test_a_stream_reads_in_order_as_the_whole_answer_does(proxy):
    most = 0
    for question in QUESTIONS:
        whole = ask(proxy, question, max_tokens=None, logprobs=True, top_logprobs=2)
        chunks = stream(proxy, "/v1/chat/completions", chat(
            question, max_tokens=None, logprobs=True, top_logprobs=2, stream_options={"include_usage": True}
        ))  # fmt: skip
        *pieces, usage = chunks
        assert usage["choices"] == [] and usage["usage"] == whole["usage"]
        choices = [piece["choices"][0] for piece in pieces]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"]["content"] for one in choices) == whole["choices"][0]["message"]["content"]
        assert [one["finish_reason"] for one in choices if one["finish_reason"]] == [whole["choices"][0]["finish_reason"]]
        told = [token for one in choices[1:] for token in one["logprobs"]["content"]]
        assert told == whole["choices"][0]["logprobs"]["content"] and len(told) == whole["usage"]["completion_tokens"]
        assert all(len(token["top_logprobs"]) == 2 for token in told)
        assert len({chunk["id"] for chunk in chunks}) == 1
        most = max(most, len(pieces))
    assert most > 10, "it comes piece by piece"


def test_log_probabilities_are_those_of_generate(proxy, trees, tiny, oracle):
    question, tree = max(trees, key=lambda one: len(one[1].threads))
    tree = oracle(prompt_of(tiny, question), output_scores=True)
    answer = ask(proxy, question, max_tokens=None, logprobs=True)
    wanted = {thread.index: thread for thread in tree.threads}
    first = wanted[0].logprobs[0]
    assert answer["choices"][0]["logprobs"]["content"][0]["logprob"] == pytest.approx(first, abs=1e-3)


def test_texts_and_token_ids_are_gone_on_with(proxy, tiny, oracle):
    texts, ids = ["Tell", "Why"], [tiny[0].encode(text) for text in ("Tell", "Why")]
    for prompt in (texts, ids):
        made = proxy.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "logprobs": 1} | UNCUT).json()
        assert [choice["index"] for choice in made["choices"]] == [0, 1] and made["object"] == "text_completion"
        for one, choice in zip(ids, made["choices"], strict=True):
            assert choice["text"] == oracle(one).text(tiny[0]) and choice["finish_reason"] == "stop"
            assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"])
    one = proxy.post("/v1/completions", json={"model": "tiny", "prompt": ids[0]} | UNCUT).json()
    assert one["choices"][0]["text"] == made["choices"][0]["text"]
    chunks = stream(proxy, "/v1/completions", {"model": "tiny", "prompt": texts} | UNCUT)
    for place in (0, 1):
        text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == place)
        assert text == made["choices"][place]["text"]


def test_several_answers_are_drawn_each_by_itself_and_again_with_the_same_seed(proxy):
    drawn = [ask(proxy, "x", temperature=1.0, n=3, seed=5, max_tokens=None, apar_max_threads=1) for _ in range(2)]
    texts = [[choice["message"]["content"] for choice in one["choices"]] for one in drawn]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    assert [choice["index"] for choice in drawn[0]["choices"]] == [0, 1, 2]


def borders(tree, tokenizer):
    """Texts that begin in one thread of ``tree`` and end in the next that reads, at their first place in the answer."""
    text, ids = tree.text(tokenizer), []
    for _, segment in tree.reading_order():
        ids += segment
        place = len(tokenizer.decode(ids, skip_special_tokens=True))
        for around in (text[place - 1 : place + 1], text[place - 2 : place + 1], text[place - 1 : place + 2]):
            if len(around) > 1 and "\ufffd" not in around and 0 <= place - text.index(around) <= 2:
                yield around


def test_a_stop_string_cuts_in_reading_order_over_the_borders_of_threads(proxy, trees, tiny):
    _, tree = max(trees, key=lambda one: len(one[1].threads))
    question, text = next(one for one, found in trees if found is tree), tree.text(tiny[0])
    stops = [*borders(tree, tiny[0])]
    assert stops
    for stop in stops[:3]:
        whole = ask(proxy, question, max_tokens=None, stop=stop)["choices"][0]
        assert whole["message"]["content"] == text[: text.index(stop)] and whole["finish_reason"] == "stop"
        assert whole["stop_reason"] == stop
        pieces = stream(proxy, "/v1/chat/completions", chat(question, max_tokens=None, stop=[stop]))
        assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == text[: text.index(stop)]
        kept = ask(proxy, question, max_tokens=None, stop=[stop], include_stop_str_in_output=True)["choices"][0]
        assert kept["message"]["content"] == text[: text.index(stop) + len(stop)]


def test_a_limit_counts_the_tokens_of_all_threads(proxy):
    for limit in (2, 7, 30):
        answer = ask(proxy, QUESTIONS[0], max_completion_tokens=limit)
        assert answer["usage"]["completion_tokens"] <= limit
        if answer["usage"]["completion_tokens"] == limit:
            assert answer["choices"][0]["finish_reason"] == "length"


def test_settings_of_apar_stand_at_the_top_or_among_extra_arguments(proxy, trees, tiny, upstream):
    question, tree = max(trees, key=lambda one: len(one[1].threads))
    for place in ({"apar_max_depth": 1}, {"vllm_xargs": {"apar_max_depth": 1}}, {"apar_fork_bias": "-inf"}):
        before = len(upstream.asked)
        answer = ask(proxy, question, max_tokens=60, **place)
        (asked,) = upstream.asked[before:]  # one thread: it could not fork
        assert asked["vllm_xargs"] == {"apar": "thread"} and not any(name.startswith("apar") for name in asked)
        assert answer["usage"]["completion_tokens"] <= 60
    slow = ask(proxy, question, max_tokens=None, apar_max_threads=1)
    assert slow["choices"][0]["message"]["content"] == tree.text(tiny[0])


def test_what_cannot_fork_goes_upstream_as_it_is_with_both_control_tokens_banned(proxy, tiny, upstream):
    banned = {str(tiny[0].convert_tokens_to_ids(name)): -100.0 for name in ("[Fork]", "[Child]")}
    for options in (
        {"apar": 0}, {"response_format": {"type": "json_object"}}, {"max_tokens": 1}, {"tools": [{"type": "function"}]},
        {"vllm_xargs": {"apar": 0, "other": 3}}, {"echo": True},
    ):  # fmt: skip
        answer = ask(proxy, "x", logit_bias={"5": 1.5}, **options)
        assert answer["id"] == "x", "the answer is the upstream's own"
        got = upstream.asked[-1]
        assert got["logit_bias"] == {"5": 1.5} | banned and got["messages"] == chat("x")["messages"]
        assert got.get("vllm_xargs") == ({"other": 3} if "vllm_xargs" in options else None) and "apar" not in got
        assert got.get("response_format") == options.get("response_format")


def test_options_go_with_every_thread(proxy, upstream):
    before = len(upstream.asked)
    options = {"top_k": 1, "user": "me", "priority": 3, "min_tokens": 2, "frequency_penalty": 0.0, "logit_bias": {"5": 2}}
    ask(proxy, QUESTIONS[0], seed=4, **options)
    first, *others = upstream.asked[before:]
    for place, body in enumerate([first, *others]):
        assert (body["top_k"], body["user"], body["priority"], body["frequency_penalty"]) == (1, "me", 3, 0.0)
        assert body["logit_bias"]["5"] == 2 and body["stream"] and body["return_token_ids"] and "messages" not in body
        assert ("min_tokens" in body) == (place == 0)
    assert first["seed"] == 4 and all(body["seed"] >= 4 for body in others)


def test_control_text_that_a_user_typed_is_text(proxy, tiny, oracle):
    tokenizer = tiny[0]
    spelt = [one for text in ("[Fork]", "[Child]") for one in tokenizer.encode(text, split_special_tokens=True)]
    before, after = tokenizer.encode("<|im_start|>user\n"), tokenizer.encode(" x<|im_end|>\n<|im_start|>assistant\n")
    tree = oracle([*before, *spelt, *after])
    answer = ask(proxy, "[Fork][Child] x", max_tokens=None)
    assert answer["choices"][0]["message"]["content"] == tree.text(tokenizer)
    typed = proxy.post("/v1/completions", json={"model": "tiny", "prompt": "[Fork] x"} | GREEDY).json()
    assert typed["usage"]["prompt_tokens"] == len("[Fork] x")


def test_a_final_message_is_continued(proxy, tiny, oracle):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Well"}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False} | GREEDY
    answer = proxy.post("/v1/chat/completions", json=body).json()
    assert answer["usage"]["prompt_tokens"] == len([*prompt_of(tiny, "x"), *b"Well"])


def test_bad_requests_are_told_which_field_is_wrong(proxy, upstream):
    before = len(upstream.asked)
    for options, field in (
        ({"n": 0}, "n"), ({"max_tokens": -3}, "max_tokens"), ({"stop": 7}, "stop"), ({"stop": [""]}, "stop"),
        ({"stream": "yes"}, "stream"), ({"seed": 1.5}, "seed"), ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"), ({"apar_max_threads": 0}, "apar_max_threads"),
        ({"apar_fork_bias": "much"}, "apar_fork_bias"), ({"messages": "none"}, "messages"), ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages"), ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages"), ({"model": 5}, "model"), ({"apar": []}, "apar"),
        ({"apar_max_threads": 2.5}, "apar_max_threads"), ({"apar_max_depth": True}, "apar_max_depth"),
        ({"logit_bias": {"5": "nan"}}, "logit_bias"),
        ({"stop": False}, "stop"), ({"stop_token_ids": False}, "stop_token_ids"), ({"bad_words": "no"}, "bad_words"),
        ({"vllm_xargs": 5}, "vllm_xargs"), ({"stream_options": {"include_usage": "no"}}, "include_usage"),
        ({"max_tokens": [], "max_completion_tokens": 9, "apar": 0}, "max_tokens"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": "long " * 300}]}, "messages"),
    ):  # fmt: skip
        for streamed in (False, True):
            response = proxy.post("/v1/chat/completions", json={"stream": streamed} | chat("x", **options))
            assert response.status_code == 400 and response.json()["error"]["param"] == field, (options, response.text)
            assert response.json()["error"]["type"] == "invalid_request_error"
    for prompt in (None, "", [], [5.5], [99999], ["a", 5]):
        response = proxy.post("/v1/completions", json={"prompt": prompt} | GREEDY)
        assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"
    assert proxy.post("/v1/chat/completions", content=b"{").status_code == 400
    assert len(upstream.asked) == before


def test_an_error_of_the_upstream_is_passed_on(proxy, upstream):
    for streamed in (False, True):
        response = proxy.post("/v1/chat/completions", json=chat("x", stream=streamed) | {"temperature": -1})
        assert response.status_code == 400
        assert response.json() == {"error": {"message": "temperature is negative", "param": "temperature", "code": 400}}
        upstream.refuse_next = [429]
        response = proxy.post("/v1/chat/completions", json=chat("x", stream=streamed))
        assert (response.status_code, response.headers["retry-after"], response.json()["error"]["code"]) == (429, "7", 429)


def test_a_client_s_own_words_in_an_error_change_nothing_for_others(proxy, tiny, upstream):
    """vLLM's 400 repeats what it was sent; every fork bias was refused after one such request."""
    assert proxy.post("/v1/chat/completions", json=chat("x", temperature="logit_bias")).status_code == 400
    assert ask(proxy, "x", apar_fork_bias=0.5) and "logit_bias" in upstream.asked[-1]
    assert proxy.post("/v1/responses", json={"input": "x"}).status_code == 201


def test_an_answer_that_has_begun_waits_where_another_of_its_call_finds_no_place(proxy, upstream):
    """The second of two answers was refused when the first had begun, and both were lost."""
    whole = {"n": 2, "max_tokens": None}  # which tokens of its threads a bound cuts off is a question of time
    expected, begun = ask(proxy, QUESTIONS[0], **whole)["choices"], threading.Event()
    upstream.fault = lambda number, made: begun.set() if made else None
    upstream.refuse_next, upstream.refuses_when = [429], begun
    try:
        assert ask(proxy, QUESTIONS[0], **whole)["choices"] == expected and not upstream.refuse_next and begun.is_set()
    finally:
        upstream.refuses_when = None


def test_an_answer_that_has_begun_does_not_wait_for_ever(folder, upstream):
    def full(number, made):
        upstream.refuse_next = [503] * 999

    upstream.fault = full
    try:
        with client_of([upstream], folder, policy=Eager(), timeout=1.0) as client:
            start = time.monotonic()
            answer = client.post("/v1/chat/completions", json=chat(QUESTIONS[0], apar_fork_bias=50.0, max_tokens=None))
            assert answer.status_code == 503 and 1 <= time.monotonic() - start < 20
    finally:
        upstream.fault, upstream.refuse_next = lambda number, made: None, []


def test_cookies_are_the_clients_own(proxy):
    """The proxy kept one client's, and sent it with every other's requests."""
    assert "session" in proxy.get("/v1/models").headers["set-cookie"]
    proxy.cookies.clear()
    assert "cookie" not in dict(proxy.post("/v1/echo/x").json()["headers"])
    assert ["cookie", "mine=1"] in proxy.post("/v1/echo/x", headers={"cookie": "mine=1"}).json()["headers"]


def test_nothing_is_said_upstream_that_a_client_did_not_say(running):
    """A client that takes no compression got compressed bytes."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port)) as bare:
        bare.putrequest("POST", "/v1/echo/x", skip_accept_encoding=True)
        bare.putheader("content-length", "0")
        bare.endheaders()
        got = dict(json.loads(bare.getresponse().read())["headers"])
    assert got["accept-encoding"] == "identity" and not {"user-agent", "accept"} & got.keys()


def test_every_answer_has_one_date(proxy):
    for answer in (proxy.get("/health"), proxy.get("/v1/models"), proxy.post("/v1/chat/completions", content=b"{")):
        names = [name.lower() for name, _ in answer.headers.raw]
        assert names.count(b"date") == 1 and names.count(b"server") <= 1


def test_pages_of_allowed_origins_may_ask_from_a_browser(folder, upstream):
    origin = {"origin": "https://chat.example"}
    preflight = origin | {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    with client_of([upstream], folder, ProxySettings(allowed_origins=["https://chat.example"])) as client:
        assert client.options("/v1/chat/completions", headers=preflight).status_code == 200
        for path, body in (("chat/completions", chat("x")), ("chat/completions", chat("x", apar=0)), ("echo/x", {})):
            answer = client.post(f"/v1/{path}", json=body, headers=origin)
            assert answer.headers.get_list("access-control-allow-origin") == ["https://chat.example"]
        other = client.post("/v1/chat/completions", json=chat("x"), headers={"origin": "https://else.example"})
        assert "access-control-allow-origin" not in other.headers


def test_no_fork_ends_a_thread_whatever_ends_it_for_the_client(proxy, trees, tiny):
    question, tree = max(trees, key=lambda one: len(one[1].threads))
    stops = [tiny[0].convert_tokens_to_ids(name) for name in ("[Fork]", "[Child]")]
    answer = ask(proxy, question, max_tokens=None, stop_token_ids=stops)
    assert answer["choices"][0]["message"]["content"] == tree.text(tiny[0])


def test_tokens_are_named_by_their_ids_where_that_is_asked_for(proxy, tiny):
    options = {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True}
    (choice,) = ask(proxy, "x", **options)["choices"]
    names = [one["token"] for one in choice["logprobs"]["content"]]
    assert names == [f"token_id:{token}" for token in choice["token_ids"]] and names


def test_a_child_that_a_full_queue_refuses_is_asked_again(proxy, trees, tiny, upstream):
    question, tree = max(trees, key=lambda one: len(one[1].threads))

    def fault(number, made):
        upstream.refuse_next = [503] if number == first and made == 0 else upstream.refuse_next

    first = len(upstream.asked) + 1
    upstream.fault = fault
    assert ask(proxy, question, max_tokens=None)["choices"][0]["message"]["content"] == tree.text(tiny[0])
    assert not upstream.refuse_next


def test_tokens_that_a_stream_does_not_name_are_asked_for_until_the_server_has_time(trees, tiny, folder):
    with (
        TinyServer(*tiny, root=str(folder)) as other,
        client_of([other], folder, dialect="llama.cpp", policy=Eager()) as client,
    ):
        question, tree = max(trees, key=lambda one: len(one[1].token_ids))
        other.refuse_whole = [503, 429]
        assert ask(client, question, max_tokens=None)["choices"][0]["message"]["content"] == tree.text(tiny[0])
        assert not other.refuse_whole


def test_a_server_that_is_busy_leaves_an_answer_to_another(tiny, folder, upstream):
    with (
        TinyServer(*tiny, root=str(folder)) as other,
        client_of([upstream, other], folder) as client,
    ):
        for options in ({"max_tokens": None}, {"max_tokens": None, "apar": 0}):
            upstream.refuse_next = [429]
            texts = [ask(client, "x", **options)["choices"][0]["message"]["content"] for _ in range(2)]
            assert texts[0] == texts[1] and not upstream.refuse_next
            upstream.refuse_next, other.refuse_next = [429], [503]
            refused = client.post("/v1/chat/completions", json=chat("x", **options))
            assert refused.status_code in (429, 503) and refused.headers["retry-after"] == "7"
            assert refused.json()["error"]["code"] == refused.status_code
            assert not upstream.refuse_next and not other.refuse_next


@pytest.mark.parametrize("fault", ["die", "half", "garbage", "error", "end"])
def test_an_upstream_that_fails_in_the_midst_ends_the_answer_with_an_error(proxy, trees, upstream, fault):
    question, _ = max(trees, key=lambda one: len(one[1].threads[0].tokens))
    upstream.fault = lambda number, made: fault if made == 8 else None
    response = proxy.post("/v1/chat/completions", json=chat(question))
    status = 500 if fault == "error" else 502
    assert response.status_code == status and response.json()["error"]["message"]
    with proxy.stream("POST", "/v1/chat/completions", json=chat(question, stream=True)) as answer:
        assert answer.status_code == 200
        *chunks, last, done = events(answer)
    assert done == "[DONE]" and json.loads(last)["error"]["code"] == status and len(chunks) > 1
    assert not any(choice["finish_reason"] for chunk in chunks for choice in json.loads(chunk)["choices"])


@pytest.mark.parametrize("fault", ["die", "half"])
def test_an_answer_without_threads_that_breaks_off_is_no_whole_one(proxy, upstream, caplog, fault):
    logger = logging.getLogger("uvicorn.error")
    caplog.set_level(logging.INFO, logger.name)
    logger.addHandler(caplog.handler)
    upstream.fault = lambda number, made: fault if made == 3 else None
    try:
        asked = chat("x", apar=0, stream=True, ignore_eos=True)
        with proxy.stream("POST", "/v1/chat/completions", json=asked) as answer:
            told = pytest.raises(httpx2.RemoteProtocolError) if fault == "die" else contextlib.nullcontext()
            with told:  # what came is passed on as it came
                assert "[DONE]" not in events(answer)
    finally:
        logger.removeHandler(caplog.handler)
    unforeseen = [one for one in caplog.records if one.exc_info and isinstance(one.exc_info[1], httpx2.HTTPError)]
    assert not unforeseen and ("broke off" in caplog.text) == (fault == "die")


def test_an_upstream_that_says_nothing_is_given_up(folder, upstream):
    upstream.fault = lambda number, made: "stall" if made == 1 else None
    with client_of([upstream], folder, timeout=1.0) as client:
        response = client.post("/v1/chat/completions", json=chat("x"))
        assert response.status_code == 504 and "nothing" in response.json()["error"]["message"]
    upstream.fault = lambda number, made: None
    assert until(lambda: not upstream.live)


def test_who_hangs_up_ends_all_threads(proxy, upstream):
    for question in QUESTIONS:
        asked = chat(question, stream=True, ignore_eos=True, max_tokens=800)
        with proxy.stream("POST", "/v1/chat/completions", json=asked) as one:
            lines = one.iter_lines()  # once it is gone the connection is, too
            next(lines)
            assert upstream.live
        assert until(lambda: not upstream.live)
    body = json.dumps(chat("x", ignore_eos=True, max_tokens=800)).encode()
    for streamed in (b"false", b"true"):  # before a word was said
        host, port = str(proxy.base_url.host), proxy.base_url.port
        with socket.create_connection((host, port)) as raw:
            sent = body[:-1] + b', "stream": ' + streamed + b"}"
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(sent) + sent)
            assert until(lambda: upstream.live)
        assert until(lambda: not upstream.live)


def test_other_paths_are_passed_on_untouched(proxy):
    answer = proxy.post("/v1/embeddings?a=1&b=%20c", content=b"\x00anything", headers={"authorization": "Bearer s"})
    assert answer.status_code == 201 and answer.json()["got"] == "\x00anything"
    assert answer.json()["target"] == "/v1/embeddings?a=1&b=%20c"
    models = proxy.get("/v1/models")
    assert models.json()["data"][0]["id"] == "tiny" and models.headers["x-own"] == "yes"
    assert proxy.get("/v1/chat/completions").status_code == 405, "what asks for no text is the server's to refuse"
    assert proxy.get("/v1/no-such").status_code == 404 and proxy.get("/elsewhere").status_code == 404


@pytest.mark.parametrize("target", [
    b"/v1/echo/a%2Fb?", b"/v1/echo/%252e/x?", b"/v1/echo/%e9%FF/%7e~?q=%2B+&%zz", b"/v1/echo/a;b=c/'(x)'/\"<>|^?{}?",
    b"/v1/echo/./x//y/?", b"/v1/echo/%?",
])  # fmt: skip
def test_a_path_reaches_the_server_as_it_came(proxy, target):
    answer = proxy.post("/", extensions={"target": target})
    assert answer.status_code == 201, answer.text
    assert answer.json()["target"].encode("latin-1") == target


def test_no_path_leads_out_of_the_api(proxy, upstream):
    for target in (b"/v1/../x", b"/v1/echo/%2e%2e/x", b"/v1/echo/..%2Fx", b"/v1/echo/%252e%252e/%252e%252e/x"):
        assert proxy.post("/", extensions={"target": target}).status_code == 404


@pytest.mark.parametrize(("path", "query"), [(b"/v1/\xc3\xa9", b""), (b"/v1/models", b"a=\xff")])
def test_bytes_beyond_ascii_in_an_address_are_a_client_error(proxy, running, path, query):
    host, port = str(proxy.base_url.host), proxy.base_url.port
    with socket.create_connection((host, port)) as raw:
        raw.sendall(b"GET " + path + b"?" + query + b" HTTP/1.1\r\nhost: x\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    (begin, body) = answered(running, path, query, {"type": "http.request"})  # and from a web server that takes them
    assert begin["status"] == 400 and b"write them as %XX" in body["body"]


def answered(running, path, query, *messages, method="GET"):
    """What the application itself says to these messages of a web server, after which nothing comes."""
    said, left = [], iter(messages)

    async def receive():
        return next(left, None) or await asyncio.Event().wait()

    async def send(message):
        said.append(message)

    scope = {
        "type": "http", "method": method, "scheme": "http", "path": path.decode("latin-1"), "raw_path": path,
        "query_string": query, "headers": [],
    }  # fmt: skip
    asyncio.run(running.proxy.app()(scope, receive, send))
    return said


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/embeddings"])
def test_who_hangs_up_while_writing_is_no_error_of_the_proxy(running, path):
    part = {"type": "http.request", "body": b"{", "more_body": True}
    begin, _ = answered(running, path, b"", part, {"type": "http.disconnect"}, method="POST")
    assert begin["status"] == 499


def test_headers_go_through_byte_for_byte_both_ways(proxy, upstream):
    answer = proxy.post("/v1/echo/x", headers=[(b"X-Raw", RAW), (b"x-twice", b"a"), (b"x-twice", b"b")])
    headers = [(name, value.encode("latin-1")) for name, value in answer.json()["headers"]]
    assert (b"x-raw", RAW) in [(name.encode(), value) for name, value in headers]
    assert [value for name, value in headers if name == "x-twice"] == [b"a", b"b"]
    assert (b"x-raw", RAW) in answer.headers.raw
    key = b"Bearer " + RAW
    for apar in (0, 1):
        answer = proxy.post("/v1/chat/completions", json=chat("x", apar=apar), headers=[(b"authorization", key)])
        assert answer.status_code == 200 and upstream.keys[-1].encode("latin-1") == key


def test_headers_that_a_connection_names_are_its_own(proxy, upstream):
    own = {"connection": "keep-alive, X-Hop,x-two", "x-hop": "1", "x-two": "2", "te": "trailers", "x-own": "3"}
    answer = proxy.post("/v1/echo/x", headers=own)
    got = {name: value for name, value in answer.json()["headers"]}
    assert got["x-own"] == "3" and not {"x-hop", "x-two", "te"} & got.keys() and got["host"] in upstream.url
    assert "x-raw" in answer.headers and not {"connection", "x-hop", "x-two"} & answer.headers.keys()
    key = {"connection": "authorization", "authorization": "Bearer of this connection"}
    assert proxy.post("/v1/chat/completions", json=chat("x"), headers=key).status_code == 200
    assert upstream.keys[-1] is None


def test_text_that_is_no_completion_is_asked_for_with_bans_or_refused(proxy, tiny, upstream):
    banned = {str(tiny[0].convert_tokens_to_ids(name)): -100.0 for name in ("[Fork]", "[Child]")}
    for path in ("responses", "chat/completions/batch", "%72esponses"):
        answer = proxy.post(f"/v1/{path}", json={"input": "x", "logit_bias": {"5": 1}})
        assert json.loads(answer.json()["got"]) == {"input": "x", "logit_bias": {"5": 1} | banned}
    assert json.loads(proxy.post("/v1/messages/count_tokens", json={"a": 1}).json()["got"]) == {"a": 1}, "no text is made"
    for body in (b"{", b"[]", b'{"input": "x", "logit_bias": 5}'):
        assert proxy.post("/v1/responses", content=body).status_code == 400
    assert proxy.get("/v1/responses/5").status_code == 404
    upstream.takes_bias = False
    ask(proxy, "x")  # so it is known
    for path in ("responses", "messages", "messages/"):
        refused = proxy.post(f"/v1/{path}", json={"input": "x"})
        assert refused.status_code == 400 and "ask /v1/chat/completions" in refused.json()["error"]["message"]


def test_a_long_prompt_keeps_nobody_waiting(proxy, running):
    encoding = running.proxy._encoding
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(proxy.post, "/v1/chat/completions", json=chat("long " * 20_000))
        assert until(encoding.locked)
        assert proxy.get("/health").status_code == 200 and encoding.locked(), "answered while the prompt is encoded"
        assert long.result().status_code == 400 and long.result().json()["error"]["param"] == "messages"


def test_keys_go_upstream_and_nowhere_else(proxy, upstream, caplog):
    before = len(upstream.keys)
    proxy.post("/v1/chat/completions", json=chat(QUESTIONS[0]), headers={"authorization": "Bearer secret-key"})
    proxy.post("/v1/chat/completions", json=chat("x", apar=0), headers={"authorization": "Bearer secret-key"})
    assert set(upstream.keys[before:]) == {"Bearer secret-key"} and "secret-key" not in caplog.text
    assert b"secret-key" not in proxy.get("/metrics").content


def test_numbers_tell_what_was_done(proxy, trees, tiny):
    def numbers():
        page = proxy.get("/metrics").text.splitlines()
        lines = [line.rsplit(" ", 1) for line in page if line.startswith("hf_apar_proxy_")]
        return {name.removeprefix("hf_apar_proxy_").split("{")[0]: float(value) for name, value in lines}

    question, tree = max(trees, key=lambda one: len(one[1].threads))
    before = numbers()
    ask(proxy, question, max_tokens=None)
    after = numbers()
    gained = {name: after[f"{name}_total"] - before.get(f"{name}_total", 0.0) for name in ("threads", "tokens", "steps")}
    assert gained["threads"] == len(tree.threads) and gained["tokens"] == len(tree.token_ids)
    given = [len(prompt_of(tiny, question)) + thread.depth - 1 for thread in tree.threads]  # [Child] is not sampled
    paths = [len(thread.path_ids) + (thread.eos_token_id is not None) for thread in tree.threads]
    assert gained["steps"] == max(path - start for path, start in zip(paths, given, strict=True))
    assert after["upstream_up"] == 1 and proxy.get("/health").json()["status"] == "ok"


def test_a_server_that_takes_no_biases_is_told_the_bans_as_words(proxy, trees, tiny, upstream):
    """As a vLLM with a draft of its own; here it changes while the proxy runs."""
    upstream.takes_bias = False
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda one: ask(proxy, one[0], max_tokens=None), trees))
    assert [one["choices"][0]["message"]["content"] for one in answers] == [tree.text(tiny[0]) for _, tree in trees]
    assert "[Child]" in upstream.asked[-1]["bad_words"] and "logit_bias" not in upstream.asked[-1]
    ask(proxy, "x", apar=0, bad_words=["no"])
    assert upstream.asked[-1]["bad_words"] == ["no", *sorted(["[Fork]", "[Child]"], key=tiny[0].convert_tokens_to_ids)]
    refused = proxy.post("/v1/chat/completions", json=chat("x", apar_fork_bias=1.0))
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "apar_fork_bias"


@contextlib.contextmanager
def client_of(upstreams, folder, settings=None, **options):
    with (
        proxy_before(upstreams, folder, settings, **options) as running,
        httpx2.Client(base_url=running.url, timeout=60) as client,
    ):
        yield client


def test_too_many_answers_are_refused_for_now_and_too_long_ones_for_good(folder, upstream):
    with client_of([upstream], folder, ProxySettings(max_answers=2, max_body=5000)) as client:
        assert client.post("/v1/chat/completions", json=chat("x", n=3)).status_code == 400, "these never fit in"
        long = chat("x", n=2, stream=True, ignore_eos=True, max_tokens=900)
        with client.stream("POST", "/v1/chat/completions", json=long) as one:
            lines = one.iter_lines()
            next(lines)
            refused = client.post("/v1/chat/completions", json=chat("x"))
            assert refused.status_code == 503 and refused.headers["retry-after"]
        assert until(lambda: client.post("/v1/chat/completions", json=chat("x", max_tokens=3)).status_code == 200)
        assert client.post("/v1/chat/completions", json=chat("x" * 5000)).status_code == 413
        assert client.post("/v1/embeddings", content=b"x" * 6000).status_code == 413
        page = client.get("/metrics").text.splitlines()
        assert float(next(line for line in page if line.startswith("hf_apar_proxy_refused_total")).split()[1]) >= 1
    assert until(lambda: not upstream.live)


@pytest.mark.parametrize("body", [
    b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "logit_bias": {"5": 1' + b"0" * 400 + b"}}",
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "bad_words": 5, "apar": 0}',
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": [1]}',
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": "x"}}',
    b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1/0 }}"}',
    b'{"model": "m", "messages": [{"role": "user"}]}',
])  # fmt: skip
def test_what_makes_no_sense_is_a_client_error(proxy, upstream, body):
    before = len(upstream.asked)
    told = proxy.post("/v1/chat/completions", content=body)
    assert told.status_code == 400 and told.json()["error"]["message"] and len(upstream.asked) == before


def test_an_answer_without_a_limit_has_as_many_tokens_as_the_context_has_room_for(tiny, folder, upstream):
    forks = {str(tiny[0].convert_tokens_to_ids("[Fork]")): 100.0}
    with client_of([upstream], folder, max_length=120) as client:
        told = ask(client, "x", max_tokens=None, logit_bias=forks, ignore_eos=True)
    assert told["usage"]["total_tokens"] <= 120 and told["choices"][0]["finish_reason"] == "length"


def test_threads_may_be_for_those_who_ask(folder, upstream):
    with client_of([upstream], folder, ProxySettings(default=False)) as client:
        assert ask(client, "x", max_tokens=20)["id"] == "x" and ask(client, "x", max_tokens=20, apar=1)["id"] != "x"


def test_an_answer_stays_where_it_began_and_a_server_that_is_down_is_passed_over(trees, tiny, folder, upstream):
    texts = [tree.text(tiny[0]) for _, tree in trees]
    with TinyServer(*tiny, root=str(folder)) as other:
        begun = [len(one.asked) for one in (upstream, other)]
        with client_of([upstream, other], folder, policy=FixedCap(2)) as client:

            def text_for(question):
                return ask(client, question, max_tokens=None)["choices"][0]["message"]["content"]

            with ThreadPoolExecutor(4) as pool:
                assert list(pool.map(text_for, [question for question, _ in trees])) == texts
            asked = [one.asked[start + 1 :] for one, start in zip((upstream, other), begun, strict=True)]  # after the check
            for question, _ in trees:
                begins = prompt_of(tiny, question)
                assert sum(any(body["prompt"][: len(begins)] == begins for body in bodies) for bodies in asked) == 1
            assert all(asked), "both work"
            other.stop()
            assert [text_for(question) for question, _ in trees] == texts
            assert list(client.get("/health").json()["upstreams"].values()) == [True, False]
    assert until(lambda: not upstream.live)


def test_a_server_that_comes_back_shows_anew_what_it_is(trees, tiny, folder, upstream, monkeypatch, caplog):
    monkeypatch.setattr("hf_apar.serving.proxy.pool._PAUSE", 0.05)
    question, tree = trees[1]
    with TinyServer(*tiny, root=str(folder)) as other:
        pass
    with proxy_before([upstream, other], folder) as running, httpx2.Client(base_url=running.url, timeout=60) as client:
        second = running.proxy.pool.upstreams[1]
        assert not second.up, "it was down when the proxy began"
        strange = TinyServer(*tiny, port=other.port)
        strange.gives_ids = False  # before it can be asked
        with strange:
            assert until(lambda: len(strange.asked) > 2) and not second.up
        assert sum("returns no token ids" in line for line in caplog.messages) == 1, "it is not told again and again"
        for takes_bias in (True, False):
            back = TinyServer(*tiny, port=other.port)
            back.takes_bias = takes_bias
            with back:
                assert until(lambda: second.up) and second.dialect.by_words is not takes_bias
                texts = [ask(client, question, max_tokens=None)["choices"][0]["message"]["content"] for _ in range(2)]
                assert texts == [tree.text(tiny[0])] * 2 and len(back.asked) > 1, "both write"
            for _ in range(2):
                assert ask(client, "x", max_tokens=3)
            assert not second.up


def test_what_cannot_be_an_upstream_is_said_at_the_start(tiny, folder):
    with TinyServer(*tiny, root="/nowhere/at/all") as other:
        with pytest.raises(ConfigurationError, match="pass --model"), proxy_before([other], None):
            pass
        other.gives_ids = False
        with pytest.raises(ServerError, match="returns no token ids"), proxy_before([other], folder):
            pass
    with pytest.raises(ServerError, match="nothing answers"), proxy_before([other], folder):
        pass
    for wrong in ({"urls": []}, {"urls": ["localhost:8000"]}, {"urls": ["http://a/v1"], "dialect": "klingon"}):
        with pytest.raises(ConfigurationError):
            Upstreams(**wrong)


def test_an_upstream_that_bans_forks_itself_is_refused(tiny, folder):
    with TinyServer(*tiny, root=str(folder)) as other:
        scores, fork = other.scores, tiny[0].convert_tokens_to_ids("[Fork]")

        def banned(path):
            found = scores(path)
            found[fork] = -torch.inf
            return found

        other.scores = banned
        with pytest.raises(ServerError, match="serves another model"), proxy_before([other], folder):
            pass


def test_many_clients_at_once_lose_and_cross_nothing(proxy, trees, tiny, upstream):
    wanted = dict(trees)
    mistakes = []

    def client(number):
        for turn in range(3):
            question, kind = QUESTIONS[(number + turn) % len(QUESTIONS)], (number + turn) % 3
            if kind == 0:
                with proxy.stream("POST", "/v1/chat/completions", json=chat(question, stream=True)) as one:
                    next(one.iter_lines())
                continue
            if kind == 1:
                text = ask(proxy, question, max_tokens=None)["choices"][0]["message"]["content"]
            else:
                pieces = stream(proxy, "/v1/chat/completions", chat(question, max_tokens=None))
                text = "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)
            if text != wanted[question].text(tiny[0]):
                mistakes.append((question, text))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(120)
    assert not mistakes


def test_the_command_serves_until_it_is_told_to_stop(upstream):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hf_apar.cli", "proxy", "--base-url", f"{upstream.url}/v1", "--port", str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
    ) as process:  # fmt: skip
        try:
            assert until(lambda: answers(f"http://127.0.0.1:{port}/health"), 60)
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                body = chat("x", n=2) | {"max_tokens": 1000}
                choices = client.post("/v1/chat/completions", json=body).json()["choices"]
                assert choices[0]["message"] == choices[1]["message"] and choices[0]["message"]["content"]
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stdout.read().splitlines()[-1] == "hf-apar: stopped"


@pytest.mark.parametrize(("arguments", "said"), [
    (["--base-url", "http://127.0.0.1:9/v1"], "nothing answers at http://127.0.0.1:9/v1"),
    (["--base-url", "127.0.0.1"], "the address of an upstream is '127.0.0.1'"),
    (["--base-url", "http://127.0.0.1:9/v1", "--policy", "some"], "give eager, cap:N or share:N"),
    ([], "Missing option '--base-url'"),
])  # fmt: skip
def test_the_command_says_what_is_wrong_in_one_line(arguments, said):
    result = CliRunner().invoke(app, ["proxy", *arguments])
    assert result.exit_code == 2 and said in result.output.splitlines()[-1]


def answers(url):
    try:
        return httpx2.get(url).status_code == 200
    except httpx2.HTTPError:
        return False


def test_a_request_is_taken_apart():
    asked = parse({"model": "m", "prompt": "x", "stop": "a", "vllm_xargs": {"apar": 1, "b": 2}, "top_k": 3}, chat=False)
    assert (asked.threads, asked.max_tokens, asked.stop, asked.logprobs) == (True, 16, ("a",), None)
    assert asked.options == {"model": "m", "top_k": 3, "vllm_xargs": {"b": 2}} and asked.cannot_fork is None
    with pytest.raises(ApiError, match="send a JSON object"):
        parse([], chat=False)
