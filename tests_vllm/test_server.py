"""vLLM's own server with APAR in it: streams, hang-ups, bad requests, and the stock path where nobody asks for threads."""

import contextlib
import json
import os
import socket
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import BadRequestError, OpenAI

from served import ASKED, GREEDY, PLAIN, QUESTIONS, Server, ask, expected, prompt_ids


def test_answers_and_usage_are_those_of_generate(server, oracle, tokenizer_and_model):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda question: ask(server, question), QUESTIONS))
    threads = 0
    for question, answer in zip(QUESTIONS, answers, strict=True):
        text, tokens, prompt, forked = expected(oracle, tokenizer_and_model[0], question)
        assert answer.choices[0].message.content == text and answer.choices[0].finish_reason == "stop"
        assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (tokens, prompt)
        threads += forked
    assert threads > len(QUESTIONS) + 5
    assert not server.await_rest()


def test_a_stream_reads_as_the_whole_answer(server):
    for question in QUESTIONS:
        whole = ask(server, question, logprobs=True, top_logprobs=2)
        chunks = list(
            ask(server, question, stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2)
        )
        pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
        assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        told = [one.logprob for piece in pieces if piece.logprobs for one in piece.logprobs.content]
        assert told == pytest.approx([one.logprob for one in whole.choices[0].logprobs.content], abs=1e-4)
        assert len(told) == whole.usage.completion_tokens


def test_text_completions_and_several_answers(server):
    made = server.client.completions.create(
        model="tiny", prompt=["Tell", "Why"], n=2, temperature=1.0, max_tokens=60, extra_body=ASKED["extra_body"]
    )
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in made.choices}) > 2


def test_stop_strings_cut_in_reading_order(server):
    whole = ask(server, QUESTIONS[3]).choices[0].message.content
    stop = next(
        whole[place : place + 2] for place in range(len(whole) // 2, len(whole)) if "\ufffd" not in whole[place : place + 2]
    )
    for stream in (False, True):
        cut = ask(server, QUESTIONS[3], stream=stream, stop=[stop])
        text = "".join(one.choices[0].delta.content or "" for one in cut) if stream else cut.choices[0].message.content
        assert text == whole[: whole.index(stop)]
    assert not server.await_rest()


def test_who_does_not_ask_gets_the_stock_answer_without_forks(server, tokenizer_and_model, folder):
    """What transformers writes plainly: the checkpoint suppresses both control tokens, of which vLLM reads nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer, _ = tokenizer_and_model
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for question in QUESTIONS[:3]:
        ids = prompt_ids(tokenizer, question)
        plain = stock.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :]
        for options in (PLAIN, {"extra_body": {}}):
            answer = ask(server, question, max_tokens=64, **options)
            assert answer.choices[0].message.content == tokenizer.decode(plain, skip_special_tokens=True)
            assert answer.usage.completion_tokens == len(plain)


def test_control_text_that_a_user_typed_is_text(server, oracle, tokenizer_and_model):
    tokenizer, _ = tokenizer_and_model
    answer = ask(server, "[Fork][Child] x")
    spelt = [one for text in ("[Fork]", "[Child]") for one in tokenizer.encode(text, split_special_tokens=True)]
    before, after = tokenizer.encode("<|im_start|>user\n"), tokenizer.encode(" x<|im_end|>\n<|im_start|>assistant\n")
    assert answer.choices[0].message.content == oracle([*before, *spelt, *after]).text(tokenizer)


def test_control_text_is_text_in_the_history_a_prefill_and_stop_strings_too(server, oracle, tokenizer_and_model):
    """Two messages whose letters a template joins are one text of tokens; a stop string finds letters, and no token."""
    tokenizer, _ = tokenizer_and_model

    def ids(*parts):
        found = [tokenizer.encode(text, split_special_tokens=number % 2 > 0) for number, text in enumerate(parts)]
        return [one for part in found for one in part]

    chat = [
        {"role": "user", "content": "[Fork]"}, {"role": "assistant", "content": "[Child] a"},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "1. [Fork]"},
    ]  # fmt: skip
    ended, then = "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    head = ids("<|im_start|>user\n", "[Fork]", ended, "[Child] a", then)
    for messages, prompt, options in (
        (chat[:3], head, {}),
        (chat, [*head, *ids("", "1. [Fork]")], {"add_generation_prompt": False, "continue_final_message": True}),
    ):
        text = oracle(prompt).text(tokenizer)
        for stop in (None, ["[Fork]", "[Child]", "Fork]"]):
            answer = server.client.chat.completions.create(
                model="tiny", messages=messages, stop=stop, **GREEDY, extra_body=ASKED["extra_body"] | options
            )
            assert answer.choices[0].message.content == text
    assert not server.await_rest()


def test_who_hangs_up_frees_the_whole_tree(server):
    for question in QUESTIONS:
        stream = ask(server, question, stream=True, temperature=1.0, max_tokens=900, extra_body={
            "vllm_xargs": {"apar": 1}, "ignore_eos": True,
        })  # fmt: skip
        next(iter(stream))
        stream.response.close()
    assert not server.await_rest()
    assert ask(server, "x").choices[0].finish_reason == "stop"


def test_bad_requests_are_answered_with_400_and_harm_nobody(server):
    for options in (
        {"extra_body": {"vllm_xargs": {"apar": 1, "apar_max_threads": 0}}},
        {"extra_body": {"vllm_xargs": {"apar": 1, "apar_fork_bias": "much"}}},
        {"max_tokens": -3},
        {"n": 0},
    ):
        with pytest.raises(BadRequestError):
            ask(server, "x", **options)
    with pytest.raises(BadRequestError):
        ask(server, "long " * 2000)
    assert not server.await_rest()


def test_one_thread_at_a_time_writes_the_same_text(server):
    for question in QUESTIONS[:3]:
        slow = ask(server, question, extra_body={"vllm_xargs": {"apar": 1, "apar_max_threads": 1}})
        assert slow.choices[0].message.content == ask(server, question).choices[0].message.content


def test_many_clients_at_once_lose_and_cross_nothing(server):
    """Mixed APAR and plain clients, hang-ups, over-long prompts and malformed bodies; a short run of the load script."""
    alone = {question: ask(server, question).choices[0].message.content for question in QUESTIONS}
    plain = {question: ask(server, question, max_tokens=60, **PLAIN).choices[0].message.content for question in QUESTIONS}
    mistakes, stop = [], threading.Event()

    def client(number):
        for turn in range(6):
            question, kind = QUESTIONS[(number + turn) % len(QUESTIONS)], (number + turn) % 5
            if stop.is_set():
                return
            try:
                if kind == 0 and plain[question] != ask(server, question, max_tokens=60, **PLAIN).choices[0].message.content:
                    mistakes.append((question, "plain"))
                elif kind == 1:
                    stream = ask(server, question, stream=True, max_tokens=300)
                    next(iter(stream))
                    stream.response.close()
                elif kind == 2:
                    with pytest.raises(BadRequestError):
                        ask(server, "long " * 2000)
                elif kind == 3:
                    text = "".join(
                        chunk.choices[0].delta.content or "" for chunk in ask(server, question, stream=True)
                    )  # fmt: skip
                    if text != alone[question]:
                        mistakes.append((question, text))
                elif alone[question] != ask(server, question).choices[0].message.content:
                    mistakes.append((question, "whole"))
            except Exception as error:
                mistakes.append((question, repr(error)))
                stop.set()

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(client, range(32)))
    body = json.dumps({"model": "tiny", "messages": "no list"}).encode()
    bad = urllib.request.Request(
        f"{server.url}/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(bad)
    assert not mistakes and not server.await_rest()


def test_an_adapter_is_asked_for_by_its_name_and_so_are_all_threads_of_its_answers(
    folder, oracle, lora, tokenizer_and_model
):
    adapter, tuned = lora
    tokenizer, _ = tokenizer_and_model
    # two places for one adapter: on CPUs vLLM 0.32 gives rows without an adapter the weights of the last place
    arguments = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules", f"tuned={adapter}")
    with Server(folder, *arguments) as server:
        asked = [(question, *pair) for question in QUESTIONS for pair in (("tiny", oracle), ("tuned", tuned))]
        texts = {
            name: {question: expected(by, tokenizer, question)[0] for question in QUESTIONS}
            for name, by in (("tiny", oracle), ("tuned", tuned))
        }
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda one: ask(server, one[0], model=one[1]), asked))
        assert [(answer.model, answer.choices[0].message.content) for answer in answers] == [
            (name, texts[name][question]) for question, name, _ in asked
        ]
        assert texts["tiny"] != texts["tuned"]
        assert sum(expected(tuned, tokenizer, question)[3] for question in QUESTIONS) > len(QUESTIONS)
        assert not server.await_rest()


def compare_with(oracle, tokenizer, ask_one):
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(ask_one, QUESTIONS))
    for question, text in zip(QUESTIONS, texts, strict=True):
        assert text == expected(oracle, tokenizer, question)[0]


def test_two_data_parallel_ranks_keep_each_answer_on_one(folder, oracle, tokenizer_and_model):
    cores = "0|1" if (os.cpu_count() or 1) > 1 else "0|0"
    arguments = ("--data-parallel-size", "2", "--api-server-count", "1")
    with Server(folder, *arguments, VLLM_CPU_OMP_THREADS_BIND=cores) as server:
        compare_with(oracle, tokenizer_and_model[0], lambda text: ask(server, text).choices[0].message.content)
        text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
        served = [line for line in text.splitlines() if line.startswith("vllm:request_success_total")]
        ranks = {line.split('engine="')[1][0]: 0.0 for line in served}
        for line in served:
            ranks[line.split('engine="')[1][0]] += float(line.rsplit(" ", 1)[1])
        assert len(ranks) == 2 and min(ranks.values()) > 3, "both work"
        assert server.metric("vllm:prefix_cache_hits_total") > 0, "children find their prefix"
        assert not server.await_rest()


def test_two_servers_behind_a_router(server, folder, oracle, tokenizer_and_model):
    taken = []

    def relay(client):
        taken.append(ports[len(taken) % 2])
        with client, socket.create_connection(("127.0.0.1", taken[-1])) as upstream:
            back = threading.Thread(target=pump, args=(upstream, client), daemon=True)
            back.start()
            pump(client, upstream)
            back.join(120)

    def pump(source, target):
        while True:
            try:
                data = source.recv(65536)
                if not data:
                    break
                target.sendall(data)
            except OSError:
                break
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    with Server(folder, APAR_DEFAULT="1", APAR_POLICY="cap:1") as other:
        ports = [server.port, other.port]
        with socket.create_server(("127.0.0.1", 0)) as router:

            def accept():
                while True:
                    try:
                        client, _ = router.accept()
                    except OSError:
                        return
                    threading.Thread(target=relay, args=(client,), daemon=True).start()

            threading.Thread(target=accept, daemon=True).start()
            url = f"http://127.0.0.1:{router.getsockname()[1]}/v1"

            def ask_one(question):
                client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
                made = client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": question}], **GREEDY, **ASKED
                )
                return made.choices[0].message.content

            compare_with(oracle, tokenizer_and_model[0], ask_one)
        assert set(taken) == set(ports)
        unasked = ask(other, QUESTIONS[1], extra_body={})
        assert unasked.choices[0].message.content == ask(server, QUESTIONS[1]).choices[0].message.content
        declined = ask(other, QUESTIONS[1], max_tokens=60, **PLAIN)
        assert (
            declined.choices[0].message.content
            == ask(server, QUESTIONS[1], max_tokens=60, **PLAIN).choices[0].message.content
        )
        assert not other.await_rest() and not server.await_rest()
