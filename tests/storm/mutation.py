"""Bad input from good input: values of JSON and texts, changed at random places."""

import copy
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**70, -(2**70), 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "0", "nan",
    "[Fork]", "<|im_end|>", "\ud800", "\x00", "é🌳", "user", "x" * 300, [], {}, [[]], [None], {"": None}, {"role": "user"},
    {"type": "text", "text": "a"}, {"type": "image_url"}, [[["a"]]], [0], ["a"], [-1], [True], [2**40],
)  # fmt: skip
MARKS = (
    "- ", "1. ", "**", "__", "# ", "```", "> ", "\n", "\n\n", "\r", "\t", "    ", "|", "[", "](", "<", "&#", "\\", ":",
    "<think>", "</think>", "{", "}", "[[", "]]", '"', "'''", '"""', "=", ",", "\\u", "\\ud800", "1e999", "NaN", "\x00",
    "\u2028", "\ufeff",
    "[Fork]", "[Child]", "é", "字", "。", "word", "a b c d e f g", "0", "-1", "9" * 30, "true", "null",
)  # fmt: skip


def mutated(draw: random.Random, value: Any, changes: int) -> Any:
    """Return ``value`` with so many odd things in it."""
    value = copy.deepcopy(value)
    for _ in range(changes):
        value = _changed(draw, value)
    return value


def _changed(draw: random.Random, value: Any) -> Any:
    inner = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    if not inner or draw.random() < 0.15:
        if isinstance(value, str) and draw.random() < 0.5:
            return spoilt(draw, value, 1)
        return copy.deepcopy(draw.choice(ODD))
    key, one = draw.choice(inner)
    what = draw.random()
    if what < 0.7:
        value[key] = _changed(draw, one)
    elif what < 0.85:
        del value[key]
    elif isinstance(value, list):
        value.insert(draw.randrange(len(value) + 1), copy.deepcopy(draw.choice([one, *ODD])))
    else:
        value[draw.choice(["", "content", "tree", "weight", str(key) + "x"])] = copy.deepcopy(draw.choice([one, *ODD]))
    return value


def spoilt(draw: random.Random, text: str, changes: int) -> str:
    """Return ``text`` with parts of it left out, doubled, or with marks among them."""
    for _ in range(changes):
        start = draw.randrange(len(text) + 1)
        end = min(len(text), start + draw.choice((0, 1, 2, 5, 20)))
        put = draw.choice((draw.choice(MARKS), draw.choice(MARKS) * draw.randint(2, 9), text[start:end] * 2, ""))
        text = text[:start] + put + text[end:]
    return text
