"""The proxy in front of vLLM's own server, in which our plug-in is not loaded: threads are ordinary completions to it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import BadRequestError, InternalServerError, OpenAI

from hf_apar.serving.vllm.local import LocalServer
from tiny_server import proxy_before, until

QUESTIONS = ["Why?", "Name three birds.", "x", "And now, at some length: what is a hedge for?", "Tell me more.", "é字"]
GREEDY = {"temperature": 0.0, "max_tokens": 600}
NGRAM = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}'


class Server(LocalServer):
    """``vllm serve`` with the tiny model and without plug-ins."""

    def __init__(self, folder, *arguments):
        super().__init__(
            folder, "--dtype", "float32", "--block-size", "32", "--max-model-len", "1024", "--enforce-eager",
            "--served-model-name", "tiny", "--num-gpu-blocks-override", "400", *arguments,
            environment={"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_PLUGINS": "none"},
        )  # fmt: skip


@pytest.fixture(scope="module")
def server(folder):
    with Server(folder) as server:
        yield server


@pytest.fixture(scope="module")
def proxy(server):
    """The proxy, which asks vLLM for the model's place."""
    with proxy_before([server], None) as running:
        running.client = OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=120)
        yield running


def ask(proxy, question, **options):
    return proxy.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": question}], **GREEDY | options
    )


def expected(oracle, tokenizer, question):
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    tree = oracle(ids)
    return tree.text(tokenizer), len(tree.token_ids + tree.closing_ids), len(ids), len(tree.threads)


def test_answers_and_usage_are_those_of_generate(proxy, server, oracle, tokenizer_and_model):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda question: ask(proxy, question), QUESTIONS))
    threads = 0
    for question, answer in zip(QUESTIONS, answers, strict=True):
        text, tokens, prompt, forked = expected(oracle, tokenizer_and_model[0], question)
        assert answer.choices[0].message.content == text and answer.choices[0].finish_reason == "stop"
        assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (tokens, prompt)
        threads += forked
    assert threads > len(QUESTIONS) + 5
    assert not server.await_rest()


def test_a_stream_reads_as_the_whole_answer(proxy):
    for question in QUESTIONS[:4]:
        options = {"logprobs": True, "top_logprobs": 2}
        whole = ask(proxy, question, **options)
        chunks = list(ask(proxy, question, stream=True, stream_options={"include_usage": True}, **options))
        pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
        assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        told = [one.logprob for piece in pieces if piece.logprobs for one in piece.logprobs.content]
        assert told == pytest.approx([one.logprob for one in whole.choices[0].logprobs.content], abs=1e-4)
        assert len(told) == whole.usage.completion_tokens


def test_what_cannot_fork_is_vllms_own_answer_without_forks(proxy, server, tokenizer_and_model):
    direct = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
    fork, child = tokenizer_and_model[0].convert_tokens_to_ids(["[Fork]", "[Child]"])
    asked = {"model": "tiny", "messages": [{"role": "user", "content": QUESTIONS[1]}], "temperature": 0.0, "max_tokens": 60}
    plain = direct.chat.completions.create(**asked, logit_bias={str(fork): -100, str(child): -100})
    answer = proxy.client.chat.completions.create(**asked, extra_body={"apar": 0})
    assert answer.choices[0].message.content == plain.choices[0].message.content and answer.usage == plain.usage
    shaped = ask(proxy, "x", max_tokens=40, response_format={"type": "json_object"})
    assert shaped.choices[0].message.content


def test_responses_have_the_bans_and_messages_are_refused(proxy, server, tokenizer_and_model):
    direct = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
    bans = {str(token): -100 for token in tokenizer_and_model[0].convert_tokens_to_ids(["[Fork]", "[Child]"])}

    def texts(client, **extra):
        asked = {"model": "tiny", "temperature": 0.0, "max_output_tokens": 60, "extra_body": extra}
        return [client.responses.create(input=question, **asked).output_text for question in QUESTIONS]

    assert texts(proxy.client) == texts(direct, logit_bias=bans) != texts(direct)
    with pytest.raises(BadRequestError, match="ask /v1/chat/completions"):
        proxy.client.post("/messages", body={"model": "tiny", "max_tokens": 9, "messages": []}, cast_to=object)


def test_texts_in_several_answers_and_an_error_of_vllms(proxy):
    made = proxy.client.completions.create(model="tiny", prompt=["Tell", "Why"], n=2, temperature=1.0, max_tokens=60)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in made.choices}) > 2
    with pytest.raises(BadRequestError, match="temperature"):
        ask(proxy, "x", temperature=-1.0)
    with pytest.raises(BadRequestError, match="context"):
        ask(proxy, "long " * 2000)


def test_who_hangs_up_frees_the_whole_tree(proxy, server):
    for question in QUESTIONS[:3]:
        stream = ask(proxy, question, stream=True, temperature=1.0, max_tokens=900, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.response.close()
    assert not server.await_rest()
    assert until(lambda: not proxy.proxy.in_flight)
    assert ask(proxy, "x").choices[0].finish_reason == "stop"


def test_a_server_that_drafts_for_itself_takes_bans_as_words(folder, oracle, tokenizer_and_model):
    with Server(folder, "--speculative-config", NGRAM) as server, proxy_before([server], folder) as running:
        running.client = OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=120)
        (upstream,) = running.proxy.pool.upstreams
        assert upstream.dialect.by_words
        for question in QUESTIONS[:3]:
            text, *_ = expected(oracle, tokenizer_and_model[0], question)
            assert ask(running, question).choices[0].message.content == text
        assert not server.await_rest()
        server.stop()
        with pytest.raises(InternalServerError):
            ask(running, "x")
