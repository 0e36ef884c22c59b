"""Text that is typed never becomes a control token, whatever door it comes in by, and whatever tokenizer reads it."""

import random
import sys
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import normalizers

from field_tokenizers import GEMMA, LLAMA, MAKERS, QWEN3, VICUNA, ZEPHYR, byte_level
from hf_apar.config import AparConfig
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.data.records.chats import chat_answers
from hf_apar.data.records.rejections import UNUSABLE
from hf_apar.errors import AparError
from hf_apar.evaluation.judge_prompt import question
from hf_apar.evaluation.suites import Prompt
from hf_apar.evaluation.verdicts import Pair
from hf_apar.serving.proxy.asked import parse
from hf_apar.serving.proxy.errors import ApiError
from hf_apar.serving.proxy.served import Served
from hf_apar.text.chat import encode_chat
from hf_apar.text.encoding import encode_answer, encode_text
from hf_apar.text.spelling import spelt
from hf_apar.tokens import KNOWN_PAIRS
from hf_apar.training.rows.features import TreeFeatures, chat_features, tree_features
from storm.mutation import MARKS, spoilt
from storm.storms import Scenario, Storm

JOINED = "{{ title }}{% for message in messages %}{{ message['content'] }}{% endfor %}"  # letters of two may make a name
UPPER = JOINED.replace("'] }}", "'] | upper }}")
TEMPLATES = {"own": None, "vicuna": VICUNA, "llama": LLAMA, "zephyr": ZEPHYR, "gemma": GEMMA, "qwen3": QWEN3,
             "joined": JOINED, "upper": UPPER}  # fmt: skip


def normalising(template: str = QWEN3) -> Any:
    """Return a tokenizer that makes plain letters of others before it looks for tokens of its own."""
    tokenizer = byte_level(template)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\u200b", "")])
    return tokenizer


TOKENIZERS = {**MAKERS, "normalising": normalising}
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
PIECES = (
    "[Fork]", "[Child]", "[Fo", "rk]", "[", "]", "Fork", "[Fork", "Fork]", "[fork]", "[FORK]", " [Fork] ", "[\u200bFork]",
    "［Fork］", "<FORK>", "<CHILD>", "[SplitMask]", "[SplitSop]", "<s>", "</s>", "<|im_end|>", "<|im_start|>", "▁[Fork]",
    "Ġ[Fork]", "\ufeff",
    "<0x5B>", "a", "\n", " ", "é", "\u0301", "\x00", "</think>", "{{", "{% raw %}", "<unk>", "▁",
)  # fmt: skip


NAMES = [name for pair in KNOWN_PAIRS for name in (pair.fork, pair.child)]


@cache
def _alike() -> dict[str, list[str]]:
    """Return, by letter of the names, the characters that Unicode takes for it, and other ways to write it."""
    found = {letter: [f"<0x{ord(letter):02X}>", f"\u200b{letter}", f"{letter}\u200d"] for letter in "".join(NAMES)}
    for letter in map(chr, range(128, sys.maxunicode)):
        if (plain := unicodedata.normalize("NFKC", letter)) in found:
            found[plain].append(letter)
    return found


def _disguised(draw: random.Random, name: str) -> str:
    """Return ``name`` with letters that look or are normalised alike."""
    return "".join(draw.choice([letter, letter, *_alike()[letter]]) for letter in name)


@cache
def _tokenizer(name: str, template: str, pair: int, special: bool) -> tuple[Any, tuple[int, int]]:
    tokenizer = TOKENIZERS[name]() if TEMPLATES[template] is None else TOKENIZERS[name](TEMPLATES[template])
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
    return _typed(tree_features([1, 2], tree, tokenizer, *ids, tokenizer.eos_token_id), ids)


def _typed(row: TreeFeatures, ids: tuple[int, int]) -> list[int]:
    """Return the tokens of a row without the [Fork] and [Child] of its threads."""
    forks = {place - 1 for place in row.children}
    assert all((row.input_ids[place - 1], row.input_ids[place]) == ids for place in row.children)
    return [token for place, token in enumerate(row.input_ids) if place not in forks.union(row.children)]


def _chat_record(tokenizer: Any, text: str, ids: tuple[int, int]) -> list[int]:
    answer = "\n".join(f"{number}. **Oak{number}**: it grows very slowly, {text} as told" for number in range(1, 4))
    turns = [("system", text), ("user", text), ("assistant", text), ("user", f"Why {text}?"), ("assistant", answer)]
    found = []
    for one in chat_answers({"messages": [{"role": role, "content": content} for role, content in turns], "tools": None}):
        chat = [*map(dict, one.before), {"role": "assistant", "content": one.tree}]
        for row in chat_features(chat, tokenizer, *ids, tokenizer.eos_token_id):
            found += _typed(row, ids)
    return found


def _letters(tokenizer: Any, text: str, ids: tuple[int, int]) -> list[int]:
    """Return a chat of which each message is a letter: what joins them must not make a name."""
    turns = zip(("user", "assistant") * len(text), text, strict=False)
    return encode_chat(tokenizer, [{"role": role, "content": letter} for role, letter in turns])


def _going_on(tokenizer: Any, text: str, ids: tuple[int, int]) -> list[int]:
    prompt = Prompt("a", "own", "b", None, ({"role": "user", "content": "c"},), after="d")
    return encode_chat(tokenizer, prompt.going_on(text).messages)


def _judged(tokenizer: Any, text: str, ids: tuple[int, int]) -> list[int]:
    asked = question(Pair(text, f"a {text}", f"{text} b"))
    assert asked.count(text) >= 3 or not text, "a judge is to see what was written"
    return encode_chat(tokenizer, [{"role": "user", "content": asked}])


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
    "arguments": _in_chat(CHAT[:1], title="@", more={"@": ["@"]}),
    "letters": _letters, "record": _record, "chat record": _chat_record, "going on": _going_on, "judged": _judged,
    "proxy chat": _proxy({"messages": [{"role": "user", "content": "@"}], **WITH_TOOLS}, chat=True),
    "proxy prefill": _proxy(
        {"messages": [CHAT[0], {"role": "assistant", "content": "@"}], "continue_final_message": True,
         "add_generation_prompt": False}, chat=True
    ),
    "proxy history": _proxy(
        {"messages": [CHAT[0], {"role": "assistant", "content": "@"}, CHAT[2]], "chat_template_kwargs": {"title": "@"}},
        chat=True,
    ),
    "proxy prompt": _proxy({"prompt": "@"}, chat=False),
}  # fmt: skip
TYPED = "".join(f"{pair.fork} {pair.child}" for pair in KNOWN_PAIRS)
EVERY = tuple(
    {"door": door, "tokenizer": name, "template": "own", "pair": pair, "special": special, "text": TYPED}
    for door in DOORS for name in TOKENIZERS for pair in range(len(KNOWN_PAIRS)) for special in (True, False)
)  # fmt: skip


def piece(draw: random.Random) -> str:
    """Return a part of a text that may be taken for a control token."""
    if draw.random() < 0.3:
        return _disguised(draw, draw.choice(NAMES))
    return draw.choice(PIECES if draw.random() < 0.8 else MARKS)


def draw(draw: random.Random) -> Scenario:
    text = "".join(piece(draw) for _ in range(draw.randint(1, 8)))
    return {
        "door": draw.choice(list(DOORS)), "tokenizer": draw.choice(list(TOKENIZERS)),
        "template": draw.choice(list(TEMPLATES)), "pair": draw.randrange(len(KNOWN_PAIRS)), "special": draw.random() < 0.6,
        "text": spoilt(draw, text, draw.randint(0, 2)),
    }  # fmt: skip


def check(door: str, tokenizer: str, template: str, pair: int, special: bool, text: str) -> None:
    """What a door makes of the text holds no control token; or it is refused, as a template may do."""
    made, ids = _tokenizer(tokenizer, template, pair, special)
    try:
        found = DOORS[door](made, text, ids)
    except (AparError, ApiError, *UNUSABLE):
        return
    assert not {*ids} & {*found}, "typed text became a control token"


STORM = Storm("doors", draw, check, share=1.0, every=EVERY)
