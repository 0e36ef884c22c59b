"""Settings that say what they are: the fields of dataclasses, for help texts, for recipe files and for what is noted."""

import json
import sys
from collections.abc import Mapping
from dataclasses import Field, field, fields, is_dataclass, replace
from difflib import get_close_matches
from enum import Enum
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from hf_apar.errors import ConfigurationError

Default = TypeVar("Default")
Settings = TypeVar("Settings")


def setting(
    default: Default, says: str, *, least: float | None = None, most: float | None = None, free: bool = False
) -> Default:
    """Return a field of a dataclass that says what it is.

    Args:
        says: what it is, in a sentence.
        least, most: its limits.
        free: what is made does not depend on it, so that it may change between two calls.
    """
    words = {"says": says, "least": least, "most": most, "free": free}
    return field(default=default, metadata=words)


def settings_of(settings: object) -> tuple[Field[object], ...]:
    """Return the fields of a dataclass, or of one of its objects."""
    return fields(cast(Any, settings))


def not_free(settings: object) -> dict[str, object]:
    """Return the values of ``settings`` that what is made depends on, by name."""
    return {one.name: getattr(settings, one.name) for one in settings_of(settings) if not one.metadata.get("free")}


def with_table(default: Settings, table: Mapping[str, object], where: str) -> Settings:
    """Return ``default`` with the values of a TOML ``table``; a field that holds settings takes a table of its own.

    ``where`` is what errors call the table.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Oven:
    ...     degrees: int = setting(180, "How hot it is.", least=0, most=300)
    >>> with_table(Oven(), {"degrees": 200}, "oven.toml").degrees
    200

    Raises:
        ConfigurationError: if a name is unknown, or a value is of another kind or out of its limits.
    """
    known = {one.name: one for one in settings_of(default)}
    for name in table:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(known)}"
            raise ConfigurationError(f"{where} has the unknown key {name:.80}; {hint}")
    kinds = get_type_hints(type(default))
    values = {name: _value(known[name], kinds[name], getattr(default, name), table[name], where) for name in table}
    try:
        return cast(Settings, replace(cast(Any, default), **values))
    except ConfigurationError as error:  # values that do not go together
        raise ConfigurationError(f"{where.rstrip(',')}: {error}") from error


def as_toml(settings: object, default: object, name: str = "") -> str:
    """Return ``settings`` as a TOML file with every key and what it says; what is as in ``default`` stays a comment."""
    lines, tables = [f"[{name}]"] if name else [], []
    for one in settings_of(settings):
        value, usual = getattr(settings, one.name), getattr(default, one.name)
        if is_dataclass(value):
            tables.append(as_toml(value, usual, one.name))
        else:
            lines += [f"# {one.metadata['says']}", f"{'#' if value == usual else ''}{one.name} = {_toml(value)}"]
    return "\n".join([*lines, "", *tables])


def _value(one: Field[object], kind: Any, default: object, given: object, where: str) -> object:
    """Return what ``given`` means for a field of that ``kind``."""
    choices = get_args(kind) if NoneType in get_args(kind) else (kind,)
    full = next(each for each in choices if each is not NoneType)
    wanted = get_origin(full) or full
    if is_dataclass(default) and isinstance(given, dict):
        return with_table(default, given, f"{where}, [{one.name}],")
    if wanted is tuple and isinstance(given, list) and all(type(part) is get_args(full)[0] for part in given):
        return tuple(given)
    if isinstance(wanted, type) and issubclass(wanted, Enum) and given in list(wanted):
        return wanted(given)
    if wanted is float and type(given) is int and abs(given) < sys.float_info.max:
        given = float(given)
    if type(given) is not wanted:
        raise ConfigurationError(f"{where} has {one.name} = {given!r:.80}; it is {_in_words(wanted, default)}")
    least, most = one.metadata["least"], one.metadata["most"]
    if (least is not None and not given >= least) or (most is not None and not given <= most):
        limits = " and ".join(f"at {word} {end:g}" for word, end in (("least", least), ("most", most)) if end is not None)
        raise ConfigurationError(f"{where} has {one.name} = {given!r:.80}; it is {limits}")
    return given


def _in_words(kind: Any, default: object) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(map(str, kind))}"
    if is_dataclass(default) or kind is dict:
        return "a table"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes"}
    return words.get(kind, 'a list of texts in quotes, ["..."]')


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(name)} = {_toml(one)}" for name, one in value.items()) + "}"
    if value is None:
        return '"..."'
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
