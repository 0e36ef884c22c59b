"""Text that is typed never becomes a control token, whatever door it comes in by, and whatever tokenizer reads it."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

from field_tokenizers import GEMMA, LLAMA, MAKERS, QWEN3, VICUNA, ZEPHYR
from hf_apar.config import AparConfig
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.errors import AparError
from hf_apar.serving.proxy.asked import parse
from hf_apar.serving.proxy.errors import ApiError
from hf_apar.serving.proxy.served import Served
from hf_apar.serving.spelling import spelt
from hf_apar.text.chat import encode_chat
from hf_apar.text.encoding import encode_answer, encode_text
from hf_apar.tokens import KNOWN_PAIRS
from hf_apar.training.rows.features import tree_features
from storm.mutation import MARKS, spoilt
from storm.storms import Scenario, Storm

TEMPLATES = {"own": None, "vicuna": VICUNA, "llama": LLAMA, "zephyr": ZEPHYR, "gemma": GEMMA, "qwen3": QWEN3}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
PIECES = (
    "[Fork]", "[Child]", "[Fo", "rk]", "[", "]", "Fork", "[Fork", "Fork]", "[fork]", "[FORK]", " [Fork] ", "[\u200bFork]",
    "［Fork］", "<FORK>", "<CHILD>", "[SplitMask]", "[SplitSop]", "<s>", "</s>", "<|im_end|>", "<|im_start|>", "▁[Fork]",
    "Ġ[Fork]", "\ufeff",
    "<0x5B>", "a", "\n", " ", "é", "\u0301", "\x00", "</think>", "{{", "{% raw %}", "<unk>", "▁",
)  # fmt: skip


@cache
def _tokenizer(name: str, template: str, pair: int, special: bool) -> tuple[Any, tuple[int, int]]:
    tokenizer = MAKERS[name]() if TEMPLATES[template] is None else MAKERS[name](TEMPLATES[template])
    names = [KNOWN_PAIRS[pair].fork, KNOWN_PAIRS[pair].child]
    tokenizer.add_tokens(names, special_tokens=special)
    return tokenizer, tuple(tokenizer.convert_tokens_to_ids(names))


def _in_chat(chat: list[dict[str, Any]], **variables: Any) -> Callable[[Any, str, tuple[int, int]], list[int]]:
    return lambda tokenizer, text, ids: encode_chat(
        tokenizer, _put(chat, text), chat_template_kwargs=_put(variables, text) or None
    )


def _put(value: Any, text: str) -> Any:
    if isinstance(value, dict):
        return {_put(name, text): _put(one, text) for name, one in value.items()}
    if isinstance(value, list):
        return [_put(one, text) for one in value]
    return text if value == "@" else value


def _record(tokenizer: Any, text: str, ids: tuple[int, int]) -> list[int]:
    """Return a row without the one [Fork] and the one [Child] that its tree asks for."""
    tree = TextThread((f"x{text}", TextThread((f" y{text}",)), f"{text}z"))
    row = tree_features([1, 2], tree, tokenizer, *ids, tokenizer.eos_token_id)
    found = list(row.input_ids)
    for token in ids:
        found.remove(token)
    return found


def _proxy(body: dict[str, Any], *, chat: bool) -> Callable[[Any, str, tuple[int, int]], list[int]]:
    def read(tokenizer: Any, text: str, ids: tuple[int, int]) -> list[int]:
        served = Served("m", tokenizer, AparConfig(fork_token_id=ids[0], child_token_id=ids[1]), 4096)
        asked = parse(_put(body, text), chat=chat)
        return [token for prompt in served.prompts(asked) for token in prompt]

    return read


CALL = {"type": "function", "function": {"name": "@", "arguments": {"@": ["@"]}}}
CALLED = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "@"}]
WITH_TOOLS = {"tools": [CALL], "tool_choice": "none"}
DOORS: dict[str, Callable[[Any, str, tuple[int, int]], list[int]]] = {
    "text": lambda tokenizer, text, ids: encode_text(tokenizer, text, ids),
    "prefill": lambda tokenizer, text, ids: encode_answer(tokenizer, [1, 2], text, ids),
    "spelt": lambda tokenizer, text, ids: spelt(tokenizer.encode(text), frozenset(ids), tokenizer),
    "user": _in_chat([{"role": "user", "content": "@"}]),
    "parts": _in_chat([{"role": "user", "content": [{"type": "text", "text": "@"}, {"type": "text", "text": "@"}]}]),
    "system": _in_chat([{"role": "system", "content": "@"}, *CHAT]),
    "history": _in_chat([CHAT[0], {"role": "assistant", "content": "@"}, CHAT[2]]),
    "calls": _in_chat(CALLED),
    "tools": _in_chat(CHAT[:1], tools=[CALL]), "documents": _in_chat(CHAT[:1], documents=[{"text": "@"}]),
    "record": _record,
    "proxy chat": _proxy({"messages": [{"role": "user", "content": "@"}], **WITH_TOOLS}, chat=True),
    "proxy prefill": _proxy(
        {"messages": [CHAT[0], {"role": "assistant", "content": "@"}], "continue_final_message": True,
         "add_generation_prompt": False}, chat=True
    ),
    "proxy prompt": _proxy({"prompt": "@"}, chat=False),
}  # fmt: skip
TYPED = "".join(f"{pair.fork} {pair.child}" for pair in KNOWN_PAIRS)
EVERY = tuple(
    {"door": door, "tokenizer": name, "template": "own", "pair": pair, "special": special, "text": TYPED}
    for door in DOORS for name in MAKERS for pair in range(len(KNOWN_PAIRS)) for special in (True, False)
)  # fmt: skip


def draw(draw: random.Random) -> Scenario:
    text = "".join(draw.choice(PIECES if draw.random() < 0.8 else MARKS) for _ in range(draw.randint(1, 8)))
    return {
        "door": draw.choice(list(DOORS)), "tokenizer": draw.choice(list(MAKERS)), "template": draw.choice(list(TEMPLATES)),
        "pair": draw.randrange(len(KNOWN_PAIRS)), "special": draw.random() < 0.6,
        "text": spoilt(draw, text, draw.randint(0, 2)),
    }  # fmt: skip


def check(door: str, tokenizer: str, template: str, pair: int, special: bool, text: str) -> None:
    """What a door makes of the text holds no control token; or it is refused, as a template may do."""
    made, ids = _tokenizer(tokenizer, template, pair, special)
    try:
        found = DOORS[door](made, text, ids)
    except (AparError, ApiError):
        return
    assert not {*ids} & {*found}, "typed text became a control token"


STORM = Storm("doors", draw, check, share=1.0, every=EVERY)
