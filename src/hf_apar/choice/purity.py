"""Processors and criteria of the caller's own must answer by their arguments alone: one that keeps state is found out.

The threads of an answer call one object in turn, and drafts call it for tokens that are never written. A grammar, a budget
or a counter that goes by its calls would mix up the threads in silence.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from itertools import count
from types import FunctionType
from typing import Any

from torch import Tensor

from hf_apar.errors import ConfigurationError

_STATEFUL_PACKAGES = ("xgrammar", "outlines.backends", "transformers_cfg")
"""Packages whose processors follow one sequence by their calls, in objects that cannot be looked into."""

_PLAIN = (bool, int, float, str, bytes)
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")  # whose objects are compared as such, not looked into
_HOLDERS = (list, tuple, deque, set, dict)
_LARGEST = 100  # entries of a list, set or dict that is compared


class Pure:
    """Calls ``function``, and refuses it where a call changes what an earlier call left behind.

    The first call may prepare something. Later ones may add to lists, sets and dicts (a record, or what is kept for paths
    seen before), but not change an attribute or entry, a variable of an enclosing function, or a tensor in place, nor may
    the objects that they hold, three deep; what native code and iterators keep cannot be seen. An object that does so and
    yet answers by its arguments alone says so: ``stateless = True``.

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
    """Return what ``owner`` remembers, by name: an object's attributes, a function's variables from around it."""
    if isinstance(owner, partial):
        return {"func": _snapshot(owner.func), "args": _snapshot(owner.args), "keywords": _snapshot(owner.keywords)}
    if inspect.ismethod(owner):
        return _state(owner.__self__)
    found = _variables(owner) if inspect.isfunction(owner) else _attributes(owner)
    return {name: _snapshot(value) for name, value in found.items()}


def _variables(function: FunctionType) -> Mapping[str, object]:
    """Return the enclosing variables of ``function``, its defaults, and the numbers and texts among its globals."""
    found: dict[str, object] = {"defaults": (function.__defaults__, function.__kwdefaults__)}
    known = function.__globals__
    found |= {name: known[name] for name in function.__code__.co_names if isinstance(known.get(name), _PLAIN)}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it has no value yet
            found[name] = cell.cell_contents
    return found


def _attributes(owner: object) -> Mapping[str, object]:
    slots = [name for one in type(owner).__mro__ for name in _as_names(vars(one).get("__slots__", ()))]
    return {name: getattr(owner, name) for name in slots if hasattr(owner, name)} | getattr(owner, "__dict__", {})


def _as_names(slots: str | Iterable[str]) -> Iterable[str]:
    """Return the names that a class gives as ``__slots__``: one text stands for one name."""
    return (slots,) if isinstance(slots, str) else slots


def _version(tensor: Tensor) -> object:
    """Return what differs once ``tensor`` was changed; inference mode counts no versions, so there small ones are read."""
    if not tensor.is_inference():
        return tensor._version
    return tensor.tolist() if tensor.numel() <= _LARGEST else 0


class _Same:
    """Equal for the same object, unchanged where it is a tensor; it holds the object, so that no other gets its id."""

    def __init__(self, value: object) -> None:
        self.value, self.version = value, _version(value) if isinstance(value, Tensor) else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value and self.version == other.version


def _snapshot(value: object, depth: int = 3) -> object:
    """Return something that equals a later snapshot of ``value`` as long as nothing in it has changed."""
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, count):
        return repr(value)
    if not depth or getattr(value, "stateless", False) is True:
        return _Same(value)
    if inspect.isfunction(value) or inspect.ismethod(value) or isinstance(value, partial):
        return {"": _Same(value), **_state(value)}
    if isinstance(value, list | tuple | deque | set) and len(value) <= _LARGEST:
        places = ((one, True) for one in value) if isinstance(value, set) else enumerate(value)
        return {place: _snapshot(one, depth - 1) for place, one in places}
    if isinstance(value, dict) and len(value) <= _LARGEST:
        return {name: _snapshot(one, depth - 1) for name, one in value.items()}
    if type(value).__module__.partition(".")[0] in _LIBRARIES:
        return _Same(value)
    own = _attributes(value)
    return {"": _Same(value), **{name: _snapshot(one, depth - 1) for name, one in own.items()}} if own else _Same(value)


def _changed(before: Mapping[Any, object], after: Mapping[Any, object]) -> str | None:
    """Return the name of what is not as it was; what is new is no change."""
    for name, value in before.items():
        later = after.get(name, _changed)
        if isinstance(value, Mapping) and isinstance(later, Mapping):
            if _changed(value, later) is not None:
                return str(name)
        elif isinstance(value, Mapping) and isinstance(later, _Same) and isinstance(later.value, _HOLDERS):
            continue  # it has outgrown what is compared
        elif later != value:
            return str(name)
    return None
