"""What the proxy is asked and answers, in the words of OpenAPI 3.1: ``GET /openapi.json``.

It says what the proxy itself checks. Other fields go to the server behind it, which knows what they may be.
"""

from collections.abc import Mapping
from typing import Any

from hf_apar import __version__
from hf_apar.serving.proxy.asked import MOST_CHOICES, MOST_LOGPROBS, MOST_TOKENS

Json = dict[str, Any]


def description(max_body: int) -> Json:
    """Return the description of a proxy that takes bodies of ``max_body`` bytes."""
    refused: dict[str, Json] = {
        "400": _error("a field is wrong; `param` names it"),
        "413": _error(f"the body is longer than {max_body} bytes"),
        "502": _error("the server behind broke off, or sent nonsense"),
        "503": _error("too many answers are in flight, or no server takes requests; try again"),
        "504": _error("the server behind said nothing for too long"),
        "default": _error("what the server behind answered, with its own status"),
    }
    models = _answer("the models", {"type": "object", "required": ["data"]})
    health = {"200": _answer("one at least does", _ref("Health")), "503": _answer("none does", _ref("Health"))}
    numbers = {"description": "its text", "content": {"text/plain": {}}}
    told = {"200": models, **refused}
    paths = {
        "/v1/chat/completions": {"post": _completion("Answer a chat", "Chat", "ChatAnswer", refused)},
        "/v1/completions": {"post": _completion("Go on from a text, or from several", "Text", "TextAnswer", refused)},
        "/v1/models": _get("models", "What the server behind serves, as it tells it", told),
        "/health": _get("health", "Does any server behind take requests?", health),
        "/metrics": _get("metrics", "What was counted, for Prometheus", {"200": numbers}),
    }
    key = {"type": "http", "scheme": "bearer", "description": "Goes to the server behind, which checks it."}
    says = "OpenAI's API, its answers written in threads. Any other path under /v1 is passed on as it came."
    return {
        "openapi": "3.1.0",
        "info": {"title": "hf-apar proxy", "version": __version__, "description": says},
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {"securitySchemes": {"key": key}, "schemas": _SCHEMAS},
    }


def _get(name: str, summary: str, responses: Mapping[str, Json]) -> Json:
    return {"get": {"operationId": name, "summary": summary, "responses": responses}}


def _completion(summary: str, asked: str, answered: str, refused: Mapping[str, Json]) -> Json:
    told = _answer("the answer, or with `stream` its events", _ref(answered))
    told["content"]["text/event-stream"] = {}
    return {
        "operationId": asked.lower(),
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(asked)}}},
        "responses": {"200": told, **refused},
    }


def _answer(says: str, schema: Json) -> Json:
    return {"description": says, "content": {"application/json": {"schema": schema}}}


def _error(says: str) -> Json:
    return _answer(says, _ref("Error"))


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _field(kind: str, says: str = "", **more: Any) -> Json:
    return {"type": [kind, "null"]} | ({"description": says} if says else {}) | more


def _object(properties: Mapping[str, Json], *required: str) -> Json:
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


def _choices(name: str, text: Json) -> Json:
    told = {"index": {"type": "integer"}, "finish_reason": _field("string"), name: text}
    choices = {"type": "array", "items": _object(told, "index", name)}
    return _object({"choices": choices, "usage": _field("object")}, "choices")


_WORD = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPTS = {"type": "array", "items": {"anyOf": [_WORD, _IDS]}, "minItems": 1}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
_MESSAGE = _object({"role": {"type": "string"}, "content": _CONTENT}, "role")
_COUNT = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^[1-9][0-9]{0,5}$"}, {"type": "null"}]}
_NUMBER = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": "^-?[0-9]{1,5}$"}, {"type": "null"}]}
_FIELDS: Mapping[str, Json] = {
    "apar": {
        "type": ["boolean", "number", "string", "null"],
        "description": "1 to answer in threads, 0 not to; `--default` of the proxy decides where nothing is said",
    },
    "apar_max_threads": _COUNT | {"description": "threads of an answer at once, in place of the checkpoint's"},
    "apar_max_depth": _COUNT | {"description": "depth of the deepest thread, the root's being 1"},
    "apar_fork_bias": _NUMBER | {"description": "added to the logit of [Fork]"},
    "model": _field("string"),
    "n": _field("integer", "answers to each prompt", minimum=1, maximum=MOST_CHOICES),
    "max_tokens": _field("integer", "of all threads of an answer together", minimum=0, maximum=MOST_TOKENS),
    "stop": {"anyOf": [_WORD, {"type": "array", "items": _WORD}, {"type": "null"}]},
    "stop_token_ids": _field("array", items={"type": "integer"}),
    "seed": _field("integer", minimum=-(2**63), maximum=2**63 - 1),
    "stream": _field("boolean", "events in reading order, as the answer is written"),
    "stream_options": _field("object", properties={"include_usage": _field("boolean")}),
    "logit_bias": _field("object", propertyNames={"pattern": "^[0-9]{1,6}$"}, additionalProperties={"type": "number"}),
    "vllm_xargs": _field("object", "the settings of APAR may stand here, too"),
}
_ERROR = _object({"message": {"type": "string"}, "param": _field("string")}, "message")
_SCHEMAS: Mapping[str, Json] = {
    "Chat": _object({
        "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
        "max_completion_tokens": _field("integer", "`max_tokens` by its newer name", minimum=0, maximum=MOST_TOKENS),
        "logprobs": _field("boolean"),
        "top_logprobs": _field("integer", minimum=0, maximum=MOST_LOGPROBS),
        **_FIELDS,
    }, "messages"),
    "Text": _object({
        "prompt": {"anyOf": [_WORD, _IDS, _PROMPTS, {"type": "null"}]},
        "logprobs": _field("integer", minimum=0, maximum=MOST_LOGPROBS),
        **_FIELDS,
    }),
    "ChatAnswer": _choices("message", _object({"role": {"type": "string"}, "content": _field("string")}, "role")),
    "TextAnswer": _choices("text", {"type": "string"}),
    "Health": _object({"status": {"enum": ["ok", "down"]}, "upstreams": {"type": "object"}}, "status", "upstreams"),
    "Error": _object({"error": _ERROR}, "error"),
}  # fmt: skip
