"""Processors and criteria of the caller's own must answer by their arguments alone: one that keeps state is found out.

The threads of an answer call one object in turn, and drafts call it for tokens that are never written. A grammar, a budget
or a counter that goes by its calls would mix up the threads in silence.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hf_apar.errors import ConfigurationError

_STATEFUL_PACKAGES = ("xgrammar", "outlines.backends", "transformers_cfg")
"""Packages whose processors follow one sequence by their calls, in objects that cannot be looked into."""

_LARGEST = 100  # entries of a list, set or dict that is compared


class Pure:
    """Calls ``function``, and refuses it where a call changes what an earlier call left behind.

    The first call may prepare something. Later ones may add to lists, sets and dicts (a record, or what is kept for paths
    seen before), but not change an attribute or entry, a variable of an enclosing function, or a tensor in place. An object
    that does so and yet answers by its arguments alone says so: ``stateless = True``.

    Raises:
        ConfigurationError: when called, and at once for packages whose processors are known to keep state.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.prepared = function, False
        self.trusted = getattr(function, "stateless", False) is True
        package = type(function).__module__
        if not self.trusted and any(package == name or package.startswith(f"{name}.") for name in _STATEFUL_PACKAGES):
            raise ConfigurationError(f"{type(function).__name__} of {package} {_ADVICE}")

    def __call__(self, *args: Any) -> Any:
        before = _state(self.function) if self.prepared and not self.trusted else {}
        result = self.function(*args)
        self.prepared = True
        if before and (changed := _changed(before, _state(self.function))) is not None:
            name = getattr(self.function, "__qualname__", type(self.function).__name__)
            raise ConfigurationError(f"{name} changed its {changed} when it was called: it {_ADVICE}")
        return result


_ADVICE = (
    "keeps state from call to call, which the threads of an answer would share; let what it answers depend on its arguments "
    "alone (and say stateless = True on it if it does), or call generate without apar"
)


def _state(owner: object) -> Mapping[str, object]:
    """Return what ``owner`` remembers, by name: the attributes of an object, the enclosing variables of a function."""
    if inspect.ismethod(owner):
        return _state(owner.__self__)
    if inspect.isfunction(owner):
        return {name: _snapshot(value) for name, value in inspect.getclosurevars(owner).nonlocals.items()}
    return {name: _snapshot(value) for name, value in getattr(owner, "__dict__", {}).items()}


class _Same:
    """Equal for the same object, unchanged where it is a tensor; it holds the object, so that no other gets its id."""

    def __init__(self, value: object) -> None:
        self.value, self.version = value, value._version if isinstance(value, Tensor) else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value and self.version == other.version


def _snapshot(value: object, depth: int = 3) -> object:
    """Return something that equals a later snapshot of ``value`` as long as nothing in it has changed."""
    if isinstance(value, bool | int | float | str | bytes | None):
        return value
    if depth and (inspect.isfunction(value) or inspect.ismethod(value)):
        return {"": _Same(value), **_state(value)}
    if depth and isinstance(value, list | tuple) and len(value) <= _LARGEST:
        return {place: _snapshot(one, depth - 1) for place, one in enumerate(value)}
    if depth and isinstance(value, dict) and len(value) <= _LARGEST:
        return {name: _snapshot(one, depth - 1) for name, one in value.items()}
    return _Same(value)


def _changed(before: Mapping[Any, object], after: Mapping[Any, object]) -> str | None:
    """Return the name of what is not as it was; what is new is no change."""
    for name, value in before.items():
        later = after.get(name, _changed)
        if isinstance(value, Mapping) and isinstance(later, Mapping):
            if _changed(value, later) is not None:
                return str(name)
        elif isinstance(value, Mapping) and isinstance(later, _Same) and isinstance(later.value, list | tuple | dict):
            continue  # it has outgrown what is compared
        elif later != value:
            return str(name)
    return None
