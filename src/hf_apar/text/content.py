"""The content of a message as one text, wherever parts of it must become one."""

from collections.abc import Mapping, Sequence

from hf_apar.errors import DataError

_TEXT_PARTS = ("text", "input_text", "output_text", None)


def is_text(part: object) -> bool:
    """Is it a part with text?"""
    return isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)


def flat(parts: Sequence[object]) -> str:
    r"""Return the text of content parts, with line breaks between them as vLLM joins them.

    >>> flat([{"type": "text", "text": "Oak"}, {"type": "input_text", "text": "Ash"}])
    'Oak\nAsh'

    Raises:
        DataError: if a part is no text.
    """
    for part in parts:
        if not is_text(part):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"a message has a part that is no text but {str(kind)[:40]!r}")
    return "\n".join(str(part["text"]) for part in parts if isinstance(part, Mapping))
