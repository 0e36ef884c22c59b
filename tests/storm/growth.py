"""How the time to read a text grows with its length: at most twice what the length says per doubling, or it is refused."""

import random
import signal
import time
from collections.abc import Callable
from io import BytesIO

from hf_apar.data.extraction.markdown import extraction
from hf_apar.data.extraction.sentences import sentence_ends
from hf_apar.data.records.chats import chat_answers
from hf_apar.data.records.json_array import array_items
from hf_apar.data.records.rejections import UNUSABLE
from hf_apar.errors import AparError
from hf_apar.text.encoding import encode_text
from storm.mutation import MARKS
from storm.storms import Scenario, Storm
from storm.texts import served

SMALLEST, LARGEST = 1 << 14, 1 << 18  # letters
LEAST = 0.05  # seconds below which a time says nothing
FACTOR = 12.0  # for four times the text: linear is 4, quadratic 16
SLOWEST = 100e-6  # seconds for a letter


def _chat(text: str) -> None:
    for _ in chat_answers({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}):
        pass


def _records(text: str) -> None:
    list(array_items(BytesIO(text.encode("utf-8", "surrogatepass"))))


def _roles(text: str) -> None:
    roles = {"a": "assistant", "u": "user", "s": "system", "t": "tool"}
    turns = [{"role": roles.get(letter, "user"), "content": f"{place} x"} for place, letter in enumerate(text[::32])]
    list(chat_answers({"messages": turns}))


def _encode(text: str) -> None:
    encode_text(served("byte-level").tokenizer, text)


READERS: dict[str, Callable[[str], object]] = {
    "markdown": extraction, "sentences": sentence_ends, "chat": _chat, "array": _records, "roles": _roles, "encode": _encode,
}  # fmt: skip
PATTERNS: tuple[tuple[str, str, str, str], ...] = (
    ("array", "[{", "[" * 400 + "{}", ""), ("array", "[", "[", "{}" * 50), ("array", "[", "{}", ""),
    ("array", "[", '"a\\', ""), ("array", "[", '{"a": 1}, ', ""), ("array", "", "[1, ", ""), ("roles", "", "s", ""),
    ("roles", "", "u", ""), ("roles", "", "ua", ""), ("roles", "", "uat", ""), ("encode", "", "[Fork]", ""),
    ("encode", "", "<|im_end|>a", ""), ("sentences", "", "Aa bb. ", ""), ("sentences", "", "A. ", ""),
    ("sentences", "", ".", ""), ("sentences", "", "a", ""), ("sentences", "", "No! ", ""), ("sentences", "", '"', ""),
    ("sentences", "", "a.b", " C"), ("markdown", "# a\n", "## b\n", ""),
    ("markdown", "", "#\n", ""), ("markdown", "", "# a b\n\nc d e f g h.\n\n", ""),
    ("markdown", "", "**a**\n\nb c d e f\n\n", ""), ("markdown", "", "- **A**: b c d e f\n", ""),
    ("markdown", "", "1. a\n", ""), ("markdown", "", "1. a\n\n", ""), ("markdown", "", "9. a\nb\n", ""),
    ("markdown", "", "- a\n\n  - b\n", ""), ("markdown", "", "> ", "a"), ("markdown", "", "[", ""),
    ("markdown", "", "[](", ""), ("markdown", "", "![", ""), ("markdown", "", "*a **a ", ""),
    ("markdown", "", "*", "a"), ("markdown", "", "**a", ""), ("markdown", "", "a_", ""), ("markdown", "", "`a``", ""),
    ("markdown", "", "<", ""), ("markdown", "", "<a ", ""), ("markdown", "", "<!-", ""),
    ("markdown", "", "|a", "\n|-\n"), ("markdown", "a|b\n-|-\n", "a|b\n", ""), ("markdown", "", "\n", ""),
    ("markdown", "", " ", ""), ("markdown", "", "\t", ""), ("markdown", "", "a", ""), ("markdown", "", "a ", ""),
    ("markdown", "", "a:\n", ""), ("markdown", "", "A: b\n", ""), ("markdown", "", "$a", ""),
    ("markdown", "", "[a]: b\n", ""), ("markdown", "", "[a]", ""), ("markdown", "", "&", ""),
    ("markdown", "", "&#", ""), ("markdown", "", "\\", ""), ("markdown", "", "- ", "a"),
    ("markdown", "", "* a\n  ", ""), ("markdown", "", "- a\n- b\n  ", ""), ("markdown", "", "字", ""),
    ("markdown", "", "First one is here. Second one is too, and so on.\n\n", ""),
    ("markdown", "", "<think>", "</think>"), ("markdown", "", "</think>", ""), ("markdown", "", "```\n", ""),
    ("markdown", "", "~~~a\n", ""), ("markdown", "", '"a."\n\n', ""), ("markdown", "", "a1: b\n", ""),
    ("markdown", "x y\n\n", "1. a\nb\n\n2) c\n", ""), ("markdown", "", "see the ", ""), ("markdown", "", "as a ", ""),
    ("markdown", "", "as a b c above ", ""), ("markdown", "", "1 + ", ""), ("markdown", "", "1 ", ""),
)  # fmt: skip
EVERY = tuple(dict(zip(("reader", "start", "part", "end"), one, strict=True)) for one in PATTERNS)


def _out_of_time(*_: object) -> None:
    raise TimeoutError("it takes too long")


def draw(draw: random.Random) -> Scenario:
    """Return a part that is repeated, of marks, and what stands around it."""
    part = "".join(draw.choice(MARKS) for _ in range(draw.randint(1, 3)))
    return {"reader": draw.choice(list(READERS)), "start": draw.choice(("", draw.choice(MARKS))), "part": part,
            "end": draw.choice(("", draw.choice(MARKS)))}  # fmt: skip


def check(reader: str, start: str, part: str, end: str) -> None:
    """From :data:`SMALLEST` letters on four times the text takes less than :data:`FACTOR` times as long."""
    times: list[float] = []
    size = SMALLEST
    while part and size <= LARGEST:
        text = start + part * (size // len(part)) + end
        began = time.process_time()
        signal.signal(signal.SIGPROF, _out_of_time)
        signal.setitimer(signal.ITIMER_PROF, SLOWEST * size + 1)  # of the processor, whatever else runs
        try:
            READERS[reader](text)
        except (AparError, *UNUSABLE):
            pass
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        times.append(time.process_time() - began)
        if len(times) > 2 and times[-3] > LEAST:
            assert times[-1] < FACTOR * times[-3], (
                f"{reader} takes {times[-3]:.2f} s, and {times[-1]:.2f} s for four times the text"
            )
        size *= 2


STORM = Storm("growth", draw, check, share=1.0, every=EVERY)
