"""The proxy in front of llama.cpp's own server, where there is one: LLAMA_SERVER=PATH, or the package xllamacpp."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import torch

from hf_apar import AparModelForCausalLM
from hf_apar.checkpoints.export import save_merged
from hf_apar.errors import ConfigurationError
from llama_server import MISSING, LlamaServer, write_gguf
from test_proxy import QUESTIONS, ask, chat, prompt_of, stream
from tiny_chat_model import tiny_chat_model
from tiny_server import proxy_before, until

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def tiny():
    return tiny_chat_model()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return save_merged(tiny[1], tiny[0], tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def answers(tiny, folder):
    """What `generate` answers; many characters are of several tokens, which this server's streams do not name."""
    model = AparModelForCausalLM.from_pretrained(folder)
    settings = {"apar": True, "max_new_tokens": 1000, "return_dict_in_generate": True}
    found = {one: model.generate(torch.tensor([prompt_of(tiny, one)]), **settings).trees[0] for one in QUESTIONS}
    assert sum(len(tree.threads) for tree in found.values()) > len(found) + 2
    return found


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny[1], tiny[0], file)
    with LlamaServer(file) as server:
        yield server


@pytest.fixture(scope="module")
def running(server, folder):
    with proxy_before([server], folder) as running:
        yield running


@pytest.fixture
def proxy(running, server):
    with httpx2.Client(base_url=running.url, timeout=60) as client:
        yield client
    assert until(lambda: not server.busy() and not running.proxy.in_flight)


def test_the_model_is_not_told(server):
    with pytest.raises(ConfigurationError, match="pass --model"), proxy_before([server], None):
        pass


def test_it_writes_what_generate_writes(proxy, running, tiny, answers):
    (upstream,) = running.proxy.pool.upstreams
    assert upstream.dialect.name == "llama.cpp" and upstream.max_length == 1024
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda question: ask(proxy, question, max_tokens=None), answers))
    for (question, tree), answer in zip(answers.items(), made, strict=True):
        (choice,) = answer["choices"]
        assert choice["message"]["content"] == tree.text(tiny[0]) and choice["finish_reason"] == "stop"
        prompt, tokens = len(prompt_of(tiny, question)), len(tree.token_ids + tree.closing_ids)
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (prompt, tokens)


def test_a_stream_reads_as_the_whole_answer(proxy, tiny, answers):
    for question, tree in answers.items():
        pieces = stream(proxy, "/v1/chat/completions", chat(question, max_tokens=None))
        assert "".join(piece["choices"][0]["delta"]["content"] for piece in pieces) == tree.text(tiny[0])


def test_what_cannot_fork_goes_there_as_it_is(proxy):
    answer = ask(proxy, "x", apar=0, max_tokens=30)
    assert "timings" in answer, "llama.cpp's own answer"
    assert answer["usage"]["completion_tokens"] <= 30


def test_options_are_said_in_its_words(proxy):
    drawn = [ask(proxy, "x", temperature=1.0, seed=3, max_tokens=20, repetition_penalty=1.2, n=2) for _ in range(2)]
    texts = [[choice["message"]["content"] for choice in one["choices"]] for one in drawn]
    assert len({text for one in texts for text in one}) > 1
    told = ask(proxy, "x", max_tokens=None, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert any(one["logprob"] < 0 for one in told)


def test_who_hangs_up_ends_all_threads(proxy, server):
    asked = chat(QUESTIONS[2], stream=True, ignore_eos=True, max_tokens=800)
    with proxy.stream("POST", "/v1/chat/completions", json=asked) as one:
        json.loads(next(one.iter_lines()).removeprefix("data: "))
    assert until(lambda: not server.busy())
