"""The page that plays a trace: one HTML file, with data, style and script in it, that asks nothing of the network."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from hf_apar.errors import ConfigurationError
from hf_apar.replay.trace import Trace, TracedThread
from hf_apar.tree.threads import ParagraphTree

_SCRIPTS = ("recording.js", "answer.js", "charts.js", "player.js")  # each uses what stands before it


def write_replay(path: str | Path, trace: Trace, plain: Trace | None = None) -> None:
    """Write a page that plays ``trace``, beside ``plain``, the same question answered without threads, if there is one.

    Raises:
        ConfigurationError: if one of both has a clock and the other has none.
    """
    Path(path).write_bytes(replay_page(trace, plain).encode(errors="xmlcharrefreplace"))


def replay_page(trace: Trace, plain: Trace | None = None) -> str:
    """Return the HTML that :func:`write_replay` writes.

    What the model wrote is data: it stands in a JSON element without any ``<``, and the script inserts it as text. By the
    page's policy a browser runs this one script, and loads nothing.
    """
    if plain is not None and plain.timed != trace.timed:
        raise ConfigurationError("one of the two traces has a clock and the other counts steps; record both")
    title = trace.question or "An answer, and how it was written"
    answers = [_answer(trace, "In threads" if len(trace.threads) > 1 else "In one thread", "threads")]
    if plain is not None:
        answers.insert(0, _answer(plain, "Plain decoding", "plain"))
    style, script = _file("page.css"), "\n".join(map(_file, _SCRIPTS))
    parts = {
        "title": html.escape(title), "text": html.escape(trace.text), "data": _in_html(answers), "style": style,
        "script": script, "style-hash": _digest(style), "script-hash": _digest(script),
    }  # fmt: skip
    return re.sub(r"\{\{([a-z-]+)\}\}", lambda found: parts[found[1]], _file("page.html"))


def _answer(trace: Trace, name: str, kind: str) -> dict[str, object]:
    """Return what the script is told of an answer; a number of a step is an index of ``times``."""
    cut = None if trace.stopped_by is None else trace.threads[trace.stopped_by].ended
    return {
        "name": name, "kind": kind, "timed": trace.timed, "times": trace.times, "held": trace.held,
        "prompt": trace.threads[0].inherited, "cut": cut, "segments": list(_segments(trace)),
        "threads": [
            {"parent": one.parent, "born": one.born, "started": _started(one), "ended": one.ended} for one in trace.threads
        ],
    }  # fmt: skip


def _segments(trace: Trace) -> Iterator[dict[str, object]]:
    """Yield the answer's segments in reading order, those behind a cut too: when each began to grow, and ceased."""
    read = len(list(trace.tree.segments()))
    begins = dict(enumerate(map(_started, trace.threads)))
    forks = {one.index: iter(trace.tree.children(one)) for one in trace.tree.threads}
    for number, (thread, texts, last) in enumerate(ParagraphTree(trace.tree.threads).segments()):
        one = trace.threads[thread.index]
        until = one.ended if last else trace.threads[next(forks[thread.index]).index].born
        tokens = [_token(one, text) for text in texts]
        yield {"thread": thread.index, "from": begins[thread.index], "until": until, "cut": number >= read, "tokens": tokens}
        begins[thread.index] = until


def _token(thread: TracedThread, text: int) -> dict[str, object]:
    return {
        "text": thread.texts[text], "step": thread.written_in(text), "place": thread.places[text],
        "logprob": None if thread.logprobs is None else thread.logprobs[text], "guessed": text in thread.accepted,
    }  # fmt: skip


def _started(thread: TracedThread) -> int | None:
    """Return the step after which a thread was at work, ``None`` if it waited to its end."""
    if thread.parent is None:
        return -1
    return thread.steps[0] if thread.steps else None


def _in_html(values: object) -> str:
    """Return JSON that ends no script element: letters beyond ASCII and ``<`` are escaped."""
    return json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _file(name: str) -> str:
    return files(__package__ or "hf_apar.replay").joinpath(name).read_text(encoding="utf-8")
