"""Lets Markdown read the package's docstrings: doctests become blocks of code, roles become code, two names stay two."""

import re

from griffe import Extension, Object

_DOCTEST = re.compile(r"^( *)>>> .*\n?(?:\1 *\S.*\n?)*", re.MULTILINE)
_NAMES = re.compile(r"^ +\w+(?:, \w+)+(?=: )", re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth|mod):`~?(?:\w+\.)*(\w+)`")


class Docstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        if obj.docstring is not None:
            fenced = _DOCTEST.sub(_fence, obj.docstring.value)
            told = _NAMES.sub(lambda names: names[0].replace(", ", ",\N{NO-BREAK SPACE}"), fenced)  # a blank begins a type
            obj.docstring.value = _ROLE.sub(r"`\1`", told)


def _fence(doctest: re.Match[str]) -> str:
    return f"{doctest[1]}```pycon\n{doctest[0].rstrip()}\n{doctest[1]}```\n"
