"""Calls of tools, and what may be called, in the one form that chat templates take."""

import json
from collections.abc import Mapping, Sequence

from hf_apar.errors import DataError


def tool_calls(item: Mapping[str, object]) -> list[dict[str, object]]:
    """Return the tool calls of a message, their arguments as objects: so templates take them, while OpenAI writes text."""
    calls = item.get("tool_calls")
    if calls is None and item.get("function_call") is not None:  # OpenAI's form before there were tools
        calls = [{"type": "function", "function": item["function_call"]}]
    read = []
    for call in _objects(calls, "tool calls"):
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError("a tool call names no function")
        arguments = _inner(function.get("arguments"))
        if isinstance(arguments, str):
            arguments = from_json(arguments, "the arguments of a tool call")
        read.append(_plain(call) | {"function": _plain(function) | {"arguments": arguments}})
    return read


def read_tools(tools: object) -> tuple[dict[str, object], ...]:
    """Return what a model may call, as templates take it."""
    return tuple(_plain(tool) for tool in _objects(tools, "tools"))


def _objects(given: object, what: str) -> list[Mapping[str, object]]:
    """Return a list of objects, which may be JSON in a text, as tables write it."""
    items = from_json(given, f"the {what}") if isinstance(given, str) and given.strip() else given or []
    if not isinstance(items, Sequence) or isinstance(items, str) or not all(isinstance(item, Mapping) for item in items):
        raise DataError(f"the {what} are no list of objects")
    return list(items)


def from_json(text: str, what: str) -> object:
    """Return what ``text`` says; ``what`` it is stands in the error."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{what}: no JSON") from error


def _plain(item: Mapping[str, object]) -> dict[str, object]:
    """Leave out what is null, at any depth: tables give every row the fields of all."""
    return {str(name): _inner(value) for name, value in item.items() if value is not None}


def _inner(value: object) -> object:
    if isinstance(value, Mapping):
        return _plain(value)
    return [_inner(item) for item in value] if isinstance(value, list) else value


def shown(items: Sequence[object]) -> str:
    """Return ``items`` as text, "" for none."""
    return json.dumps(items, ensure_ascii=False, default=str) if items else ""
