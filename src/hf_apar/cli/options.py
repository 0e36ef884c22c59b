"""Options of the command line made of the fields of settings: what a setting is, and is by default, is said there alone."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import Field, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

import typer

from hf_apar.cli.common import finite
from hf_apar.data.described import settings_of


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` an option for each field of the settings among its parameters, in their place.

    >>> from hf_apar.data.settings import TreeLimits
    >>> def extract_command(source: str, limits: TreeLimits) -> None:
    ...     print(source, limits.max_depth)
    >>> with_settings(extract_command)(source="chats.jsonl", max_depth=2)
    chats.jsonl 2
    """
    signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}

    @functools.wraps(command)
    def call(**given: Any) -> None:
        for name, kind in groups.items():
            names = {one.name for one in settings_of(kind)} & given.keys()
            values = {field: given.pop(field) for field in names}
            given[name] = kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
        command(**given)

    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        parameters += _options(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])]
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    vars(call)["__signature__"] = signature.replace(parameters=parameters)
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    return call


def _options(kind: Any) -> list[inspect.Parameter]:
    kinds = get_type_hints(kind)
    return [
        inspect.Parameter(
            one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=_annotated(one, kinds[one.name])
        )
        for one in settings_of(kind)
    ]


def _annotated(one: Field[Any], kind: Any) -> Any:
    words = one.metadata
    name = f"--{one.name.replace('_', '-')}"
    numeric = {int, float} & {kind, *get_args(kind)}
    limits: dict[str, Any] = {"min": words["least"], "max": words["most"]} if numeric else {}
    if float in numeric:
        limits["callback"] = finite
    flags = [name] if one.default is False else []  # a switch that is off has no second name that turns it off
    taken = list[str] if isinstance(one.default, tuple) else kind
    return Annotated[taken, typer.Option(*flags, help=words["says"], **limits)]
