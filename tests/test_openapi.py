"""What the proxy says of itself is what it does: requests made of its description, right ones and wrong ones."""

import subprocess
import sys

import httpx2
import pytest

from hf_apar.checkpoints.export import save_merged
from hf_apar.serving.vllm.plugin import SETTINGS
from storm.proxied import LIMITS, Babbler
from tiny_chat_model import tiny_chat_model
from tiny_server import proxy_before


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    tokenizer, model = tiny_chat_model()
    folder = save_merged(model, tokenizer, tmp_path_factory.mktemp("tiny") / "model")
    with Babbler(tokenizer, model, root=str(folder)) as upstream, proxy_before([upstream], folder, LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def description(running):
    return httpx2.get(f"{running.url}/openapi.json").json()


def test_every_path_of_the_proxy_is_described(running, description):
    routes = {(route.path, "post" if "POST" in route.methods else "get") for route in running.proxy.app().routes}
    routes -= {("/openapi.json", "get"), ("/v1/{path:path}", "post")}  # itself, and what is passed on as it came
    described = {(path, method) for path, methods in description["paths"].items() for method in methods}
    assert described == routes | {("/v1/models", "get")}
    for name, schema in description["components"]["schemas"].items():
        assert name not in ("Chat", "Text") or {"apar", *SETTINGS} <= schema["properties"].keys()


def test_what_is_described_is_what_happens(running, tmp_path):
    """Statuses, media types and bodies as described, status 4xx for what breaks the schema and 405 for other methods.

    That everything within the schema is taken is not asked: a schema knows no template and no vocabulary.
    """
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json", "--seed=1", "--max-examples=15",
        "--phases=coverage,fuzzing", "--exclude-checks=positive_data_acceptance", "--continue-on-failure", "--no-color",
        "--generation-database=none", "--request-timeout=120",
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr
    assert "5 selected / 5 total" in found.stdout
