"""How the time to read a text grows with its length: as the length does, within a factor of two, or it is refused.

``growth`` looks for texts that take longer, up to 256 KB; ``far`` takes those that are listed from 10 KB to 10 MB.
"""

import asyncio
import gc
import json
import random
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from hf_apar.checkpoints.sources import settings_in
from hf_apar.data.extraction.markdown import extraction
from hf_apar.data.extraction.rules import LONGEST_ANSWER
from hf_apar.data.extraction.sentences import sentence_ends
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.data.records.chats import chat_answers
from hf_apar.data.records.files import open_records, record_of
from hf_apar.data.records.json_array import array_items
from hf_apar.data.records.rejections import UNUSABLE
from hf_apar.errors import AparError
from hf_apar.replay.trace import Trace
from hf_apar.serving.proxy.app import _parsed
from hf_apar.serving.proxy.asked import parse
from hf_apar.serving.proxy.connection import lines_of
from hf_apar.text.encoding import encode_text
from hf_apar.training.recipe import read_recipe
from hf_apar.tree.threads import ParagraphTree, Thread
from storm.mutation import MARKS
from storm.storms import Scenario, Storm
from storm.texts import served

SMALLEST, LARGEST = 1 << 14, 1 << 18  # letters
LEAST = 0.05  # seconds below which a time says nothing
FACTOR = 12.0  # for four times the text: linear is 4, quadratic 16
SLOWEST = 100e-6  # seconds for a letter
FAR = (10**4, 10**5, 10**6, 10**7)  # letters
PART = 1 << 10  # bytes of a stream that come at once


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


def _request(text: str) -> None:
    parse(_parsed(json.dumps({"messages": [{"role": "user", "content": text}], "stop": text[:9]}).encode()), chat=True)


def _body(text: str) -> None:
    parse(_parsed(text.encode("utf-8", "surrogatepass")), chat=True)


def _in_file(read: Callable[[Path], object], name: str) -> Callable[[str], None]:
    def reads(text: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
            read(path)

    return reads


def _lines(path: Path) -> None:
    for _, row in open_records(path).rows:
        with suppress(*UNUSABLE):
            record_of(row)


def _stream(text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")

    async def parts() -> AsyncIterator[bytes]:
        for start in range(0, len(data), PART):
            yield data[start : start + PART]

    async def read() -> None:
        async for _ in lines_of(parts()):
            pass

    asyncio.run(read())


def _tree(text: str) -> None:
    """Read a tree of a thread for each 100 letters: ``d`` forks the one before, any other letter the root."""
    threads = [Thread(0, None, 0, 1, [1], [])]
    for index, letter in enumerate(text[::100], start=1):
        threads.append(Thread(index, index - 1 if letter == "d" else 0, 0, 1, [1], []))
    read = ParagraphTree.from_dict(ParagraphTree(threads).to_dict())
    assert list(read.reading_order()) == []


def _trace(text: str) -> None:
    root = {"parent": None, "fork_position": 0, "inherited": 1, "born": -1, "ended": 0, "finish_reason": "eos", "steps": [0],
            "places": [1], "texts": ["a"], "logprobs": None, "accepted": []}  # fmt: skip
    child = root | {"parent": 0, "inherited": 2, "born": 0, "steps": [], "places": [], "texts": []}
    Trace.from_dict({"threads": [root] + [child] * (len(text) // 100), "times": [1.0]})


def _text_tree(text: str) -> None:
    TextThread.from_json(["a"] + [[letter] for letter in text[::8]]).to_json()


READERS: dict[str, Callable[[str], object]] = {
    "markdown": extraction, "sentences": sentence_ends, "chat": _chat, "array": _records, "roles": _roles, "encode": _encode,
    "lines": _in_file(_lines, "x.jsonl"), "recipe": _in_file(read_recipe, "x.toml"), "settings": _in_file(settings_in, "x"),
    "request": _request, "body": _body, "stream": _stream, "tree": _tree, "trace": _trace, "text tree": _text_tree,
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
    ("chat", "", "- **A**: b c d e f\n", ""), ("chat", "", "é", ""), ("lines", "", '{"a": 1}\n', ""), ("lines", "", "[", ""),
    ("lines", '{"a": "', "a\\n", '"}'), ("recipe", "", "a = 1\n", ""), ("recipe", "a = ", "[", ""),
    ("recipe", "a = ", "9", ""),
    ("recipe", "", "[a]\n", ""), ("recipe", 'a = "', "\\n", '"'), ("recipe", "", "a.", ""), ("recipe", "", "# a\n", ""),
    ("settings", "[", "1, ", "1]"), ("settings", "", "[", ""), ("settings", "", '{"a": ', ""), ("request", "", "a", ""),
    ("request", "", '"\\', ""), ("request", "", "é", ""), ("body", "", "[", ""), ("body", "", "9", ""),
    ("body", '{"stop": [', '"a", ', '"a"]}'), ("body", '{"a": "', "\\u00e9", '"}'),
    ("body", '{"logit_bias": {', '"5": 1, ', '"6": 1}}'),
    ("stream", "", "data: {}\n\n", ""), ("stream", "", "a", ""), ("stream", "", "\n", ""), ("tree", "", "d", ""),
    ("tree", "", "r", ""), ("trace", "", "a", ""), ("text tree", "", "a", ""),
)  # fmt: skip
EVERY = tuple(dict(zip(("reader", "start", "part", "end"), one, strict=True)) for one in PATTERNS)


def _out_of_time(*_: object) -> None:
    raise TimeoutError("it takes too long")


def draw(draw: random.Random) -> Scenario:
    """Return a part that is repeated, of marks, and what stands around it."""
    part = "".join(draw.choice(MARKS) for _ in range(draw.randint(1, 3)))
    return {"reader": draw.choice(list(READERS)), "start": draw.choice(("", draw.choice(MARKS))), "part": part,
            "end": draw.choice(("", draw.choice(MARKS)))}  # fmt: skip


def _seconds(reader: str, text: str) -> float:
    """Return the processor's time for a text, whatever else runs; the collector's passes come at sizes of their own."""
    gc.collect()
    gc.disable()
    began = time.process_time()
    signal.signal(signal.SIGPROF, _out_of_time)
    signal.setitimer(signal.ITIMER_PROF, SLOWEST * len(text) + 1)
    try:
        READERS[reader](text)
    except (AparError, *UNUSABLE):
        pass
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        gc.enable()
    return time.process_time() - began


def check(reader: str, start: str, part: str, end: str) -> None:
    """From :data:`SMALLEST` letters on four times the text takes less than :data:`FACTOR` times as long."""
    times: list[float] = []
    size = SMALLEST
    while part and size <= LARGEST:
        times.append(_seconds(reader, start + part * (size // len(part)) + end))
        if len(times) > 2 and times[-3] > LEAST:
            assert times[-1] < FACTOR * times[-3], (
                f"{reader} takes {times[-3]:.2f} s, and {times[-1]:.2f} s for four times the text"
            )
        size *= 2


def check_far(reader: str, start: str, part: str, end: str) -> None:
    """Each ten times as long a text takes at most twenty times as long, the best of three; or it is refused."""
    known = 0.0
    for size in FAR:
        if reader in ("markdown", "sentences") and size > LONGEST_ANSWER:  # longer answers stay whole
            size = LONGEST_ANSWER + 1 if reader == "markdown" else 0
        text = start + part * (size // len(part)) + end
        best = min(_seconds(reader, text) for _ in range(1 if known > 0.3 else 3))
        assert known < LEAST or best < 20 * known, f"{reader} takes {known:.2f} s, and {best:.2f} s for {size} letters"
        known = best


STORM = Storm("growth", draw, check, share=1.0, every=EVERY)
FAR_STORM = Storm("far", draw, check_far, share=0.5, every=EVERY)
