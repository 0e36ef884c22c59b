"""What upstreams tell of themselves when the proxy or they start: kind, model, whether they take and give token ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

from hf_apar.errors import ConfigurationError, ServerError
from hf_apar.serving.proxy.dialects import DIALECTS, Dialect
from hf_apar.serving.proxy.errors import ApiError
from hf_apar.serving.proxy.served import Served
from hf_apar.serving.vllm.plugin import AS_IT_COMES


@dataclass(frozen=True)
class About:
    """What a server tells.

    Attributes:
        dialect: its kind, ``None`` if it is none that is known.
        model: its model's name in the API.
        root: where it read its model from, if it tells.
        max_length: tokens of its model's context, if it tells.
    """

    dialect: str | None
    model: str
    root: str | None
    max_length: int | None


async def ask(client: httpx2.AsyncClient, url: str, headers: Mapping[str, str]) -> About:
    """Ask the server at ``url`` what it is.

    Raises:
        ServerError: if it does not answer, or with an error.
    """
    response = await _answer(client, "GET", f"{url}/models", headers)
    if response.status_code in (401, 403):
        raise ServerError(f"{url} wants a key; put it into the environment variable HF_APAR_UPSTREAM_KEY")
    try:
        card = response.raise_for_status().json()["data"][0]
        name, owner = str(card["id"]), str(card.get("owned_by"))
    except (httpx2.HTTPError, LookupError, TypeError, ValueError) as error:
        raise ServerError(
            f"{url}/models tells of no model ({error}); give the address of an OpenAI API, with /v1"
        ) from error
    dialect = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}.get(owner)
    length = card.get("max_model_len")
    if dialect == "llama.cpp":
        length = await _context(client, url, headers)
    return About(dialect, name, card.get("root"), length)


async def _context(client: httpx2.AsyncClient, url: str, headers: Mapping[str, str]) -> int | None:
    """Return the tokens that llama.cpp gives each request."""
    response = await _answer(client, "GET", f"{url.removesuffix('/v1')}/props", headers)
    try:
        return int(response.raise_for_status().json()["default_generation_settings"]["n_ctx"])
    except (httpx2.HTTPError, LookupError, TypeError, ValueError):
        return None


async def _answer(
    client: httpx2.AsyncClient, method: str, address: str, headers: Mapping[str, str], body: dict[str, Any] | None = None
) -> httpx2.Response:
    try:
        return await client.request(method, address, headers=headers, json=body)
    except httpx2.HTTPError as error:
        said = f"{type(error).__name__}: {error}"
        raise ServerError(f"nothing answers at {address} ({said}); start the server first") from error


def dialect_for(wish: str, about: About, url: str, served: Served) -> Dialect:
    """Return the dialect that was asked for, or that the server speaks.

    Raises:
        ConfigurationError: if neither is known.
    """
    name = about.dialect if wish == "auto" else wish
    if name is None or name not in DIALECTS:
        known = ", ".join(DIALECTS)
        raise ConfigurationError(f"{url} does not tell what kind of server it is; pass --dialect, one of {known}")
    return DIALECTS[name](served)


async def check_ids(
    client: httpx2.AsyncClient, url: str, dialect: Dialect, about: About, headers: Mapping[str, str]
) -> None:
    """Have the server write one token, [Fork] by a bias: so it takes and gives token ids, and bans none of them itself.

    Raises:
        ServerError: if it does not.
    """
    served = dialect.served
    for bias in (True, False):
        body = _probe(dialect.name, served.fork, about.model, bias)
        path = dialect.path
        address = f"{url.removesuffix('/v1')}{path}" if path.startswith("/") else f"{url}/{path}"
        response = await _answer(client, "POST", address, headers, body)
        if bias and dialect.takes_no_bias(response.status_code, response.text):
            dialect.by_words = True
            continue
        if response.status_code != 200:
            raise ServerError(
                f"{url} takes no token ids as {dialect.name} does ({response.status_code}): {response.text[:300]}"
            )
        try:
            tokens = dialect.read(response.json(), 0).tokens
            token = tokens[0].token
        except (ApiError, LookupError, TypeError, ValueError) as error:
            raise ServerError(
                f"{url} returns no token ids ({error}); it needs vLLM's return_token_ids, llama.cpp's return_tokens or "
                "SGLang's output_ids: take a newer server, or another --dialect"
            ) from error
        if bias and token != served.fork:
            raise ServerError(
                f"{url} writes no [Fork] (token {served.fork} of {served.name}) though it is told to: it serves another "
                "model, or bans forks itself"
            )
        return


def _probe(kind: str, fork: int, model: str, bias: bool) -> dict[str, Any]:
    biases = {str(fork): 100.0} if bias else {}
    if kind == "sglang":
        return {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0, "logit_bias": biases}}
    if kind == "llama.cpp":
        return {
            "prompt": [0], "n_predict": 1, "temperature": 0.0, "return_tokens": True, "logit_bias": [[fork, 100.0]],
        }  # fmt: skip
    body = {"model": model, "prompt": [0], "max_tokens": 1, "temperature": 0.0, "return_token_ids": True}
    body["vllm_xargs"] = {"apar": AS_IT_COMES}
    return body | ({"logit_bias": biases} if biases else {})
