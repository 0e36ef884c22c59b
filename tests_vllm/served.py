"""``vllm serve`` with the tiny model, and how the tests ask it."""

import json
import urllib.request

from openai import OpenAI

from hf_apar.serving.vllm.local import LocalServer

GREEDY = {"temperature": 0.0, "max_tokens": 600}
ASKED = {"extra_body": {"vllm_xargs": {"apar": 1}}}
PLAIN = {"extra_body": {"vllm_xargs": {"apar": 0}}}
QUESTIONS = ["Why?", "Name three birds.", "x", "And now, at some length: what is a hedge for?", "Tell me more.", "é字"]


class Server(LocalServer):
    """``vllm serve`` with the tiny model, and a client of it."""

    def __init__(self, folder, *arguments, **environment):
        super().__init__(
            folder, "--dtype", "float32", "--block-size", "32", "--max-model-len", "1024", "--enforce-eager",
            "--served-model-name", "tiny", "--num-gpu-blocks-override", "400", *arguments,
            environment={"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def post(self, path, **body):
        """Return what the server answers, a status above 400 as an error."""
        data = json.dumps({"model": "tiny"} | body).encode()
        asked = urllib.request.Request(f"{self.url}{path}", data=data, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return json.loads(answer.read())

    def chat(self, question, apar, **options):
        """Return the choices, with their token ids; ``apar`` is what the request says of threads, if anything."""
        told = {} if apar is None else {"vllm_xargs": {"apar": apar}}
        body = GREEDY | {"messages": [{"role": "user", "content": question}], "return_token_ids": True} | told | options
        return self.post("/v1/chat/completions", **body)


def ask(server, question, stream=False, model="tiny", **options):
    settings = GREEDY | ASKED | options
    return server.client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], stream=stream, **settings
    )


def prompt_ids(tokenizer, question):
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def expected(oracle, tokenizer, question):
    ids = prompt_ids(tokenizer, question)
    tree = oracle(ids)
    return tree.text(tokenizer), len(tree.token_ids + tree.closing_ids), len(ids), len(tree.threads)
