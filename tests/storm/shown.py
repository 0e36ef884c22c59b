"""Text that a model wrote stays text wherever it is shown, streamed, searched for stops, or kept and read back."""

import json
import random
import tempfile
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList

from byte_tokenizer import byte_tokenizer
from hf_apar.choice.paths import Context
from hf_apar.choice.stopping import Stopper, stop_string_criteria
from hf_apar.cli.live import coloured
from hf_apar.evaluation.answers import Answered, answers_in
from hf_apar.evaluation.judge_prompt import preference_in
from hf_apar.evaluation.lines import opened_for_more, write_line
from hf_apar.evaluation.verdicts import Pair, Preference, Verdict, read_verdicts, verdict_key, write_verdict
from hf_apar.protocol import ControlTokens
from hf_apar.replay.page import replay_page
from hf_apar.replay.recorder import trace_of_tree
from hf_apar.serving.reading import IncrementalText, Reader
from hf_apar.text.encoding import encode_text
from hf_apar.tree.display import tree_html
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import ParagraphTree, Thread
from storm.doors import piece
from storm.mutation import spoilt
from storm.storms import Scenario, Storm

MARKUP = (
    "<script>", "</script>", "<!--", "-->", "]]>", "</div>", "</span>", "<b", "&lt;", "&", '"', "'", ">", "{{title}}",
    "{{data}}", "\x1b[2J", "\x1b]0;a\x07", "\x9b", "\r", "\b", "$a$", "[[A]]", "[[B]]", "[[C]]", "<think>", "</think>",
    "\u2028", "\\", "javascript:", "data: [DONE]\n\n", "\u202e",
)  # fmt: skip
PROMPT = [5, 5]


@cache
def _tokenizer() -> tuple[Any, ControlTokens]:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["[Fork]", "[Child]"], special_tokens=True)
    fork, child = tokenizer.convert_tokens_to_ids(["[Fork]", "[Child]"])
    ends = frozenset({tokenizer.eos_token_id})
    return tokenizer, ControlTokens(fork_token_id=fork, child_token_id=child, eos_token_ids=ends)


def _written(text: str) -> ParagraphTree:
    """Return an answer of two threads, each of which writes ``text``, the root once more after the fork."""
    tokenizer, protocol = _tokenizer()
    ids = encode_text(tokenizer, f"a{text}")
    row = GrowingTree(PROMPT, protocol, max_threads=8)
    (root,) = row.live
    for token in [*ids, protocol.fork_token_id]:
        row.write(root, token)
    for thread in row.live:
        for token in [*ids, tokenizer.eos_token_id]:
            row.write(thread, token)
    return row.tree


class _Seen(HTMLParser):
    """What a browser makes of a page: its elements, and its text by the element that it stands in."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[Any] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, [name for name, _ in attrs]))

    def handle_comment(self, data: str) -> None:
        self.elements.append("a comment")

    def handle_data(self, data: str) -> None:
        self.texts.append((str(self.elements[-1:]), data))


def _page(text: str) -> str:
    return replay_page(trace_of_tree(_written(text), _tokenizer()[0], question=text))


def notebook(text: str) -> None:
    shown, plain = (_Seen(tree_html(_written(one), _tokenizer()[0])) for one in (text, "b"))
    assert shown.elements == plain.elements, "text became markup"
    told = "".join(one for _, one in shown.texts)
    assert told.startswith(f"a{text}a{text}a{text}")


def page(text: str) -> None:
    shown, plain = _Seen(_page(text)), _Seen(_page("b"))
    assert shown.elements == plain.elements, "text became markup"
    held = [one for element, one in shown.texts if "script" in element]
    (answer,) = json.loads(held[0])
    said = "".join(token["text"] for one in answer["segments"] for token in one["tokens"])
    assert said == 3 * f"a{text}" and held[1] == [one for element, one in plain.texts if "script" in element][1]


def terminal(text: str) -> None:
    tree, tokenizer = _written(text), _tokenizer()[0]
    shown = coloured(tree, tokenizer)
    controls = {*map(chr, range(9)), *map(chr, range(11, 32)), *map(chr, range(127, 160))}
    assert not controls & {*shown.plain}, "a terminal would obey"
    assert tree.text(tokenizer) == 3 * f"a{text}"


def stream(text: str) -> None:
    tokenizer, _ = _tokenizer()
    tree = _written(text)
    reader = Reader(tree, IncrementalText(tokenizer, PROMPT))
    reader.advance({})
    assert reader.piece().text == tree.text(tokenizer) == 3 * f"a{text}"


def stops(text: str) -> None:
    """A stop string ends a thread where its own text holds it, after a fork as before: names of tokens are no text."""
    tokenizer, protocol = _tokenizer()
    middle = len(text) // 2
    for stop in {text, text[:middle], text[middle:], "]", f"]{text[:1]}", f"k]{text[:2]}"} - {""}:
        criteria = StoppingCriteriaList(stop_string_criteria([stop], tokenizer))
        stopper = Stopper(criteria, protocol.control_ids, torch.tensor([PROMPT]), pad_token_id=0)
        ids = encode_text(tokenizer, text)
        for before in ([], [protocol.fork_token_id], [protocol.fork_token_id, protocol.child_token_id]):
            for end in range(len(ids)):
                path = Thread(0, None, 0, 1, [*PROMPT, *before, *ids[:end]])
                (stopped,) = stopper([Context(0, path, len(PROMPT))], [ids[end]])
                said = tokenizer.decode(ids[: end + 1], skip_special_tokens=True).encode()
                assert stopped == said.endswith(stop.encode()), f"{stop!r} after {before}"


def kept(text: str) -> None:
    """Answers and verdicts are read back as they were written, one a line."""
    with tempfile.TemporaryDirectory() as folder:
        answers, verdicts = Path(folder) / "answers", Path(folder) / "verdicts"
        one = Answered(key=text, arm="a", text=text, ended=True)
        pair = Pair(text, f"{text}a", text)
        verdict = Verdict(verdict_key(pair, "j"), preference_in(f"{text}\n[[B]]"), text)
        assert verdict.preference in (Preference.second, None), "what is judged has judged"
        with opened_for_more(answers) as file:
            write_line(file, vars(one))
            write_line(file, vars(one) | {"arm": "b"})
        with opened_for_more(verdicts) as file:
            write_verdict(file, verdict)
        assert answers_in(answers)[text, "a"] == one and len(answers_in(answers)) == 2
        assert read_verdicts(verdicts) == {verdict.key: verdict}


PLACES: dict[str, Callable[[str], None]] = {
    one.__name__: one for one in (notebook, page, terminal, stream, stops, kept)
}  # fmt: skip
EVERY = tuple({"place": place, "text": text} for place in PLACES for text in ("".join(MARKUP), "[Fork] ]", "[[A]]", ""))


def draw(draw: random.Random) -> Scenario:
    text = "".join(draw.choice(MARKUP) if draw.random() < 0.5 else piece(draw) for _ in range(draw.randint(1, 8)))
    return {"place": draw.choice(list(PLACES)), "text": spoilt(draw, text, draw.randint(0, 2))}


def check(place: str, text: str) -> None:
    PLACES[place](text)


STORM = Storm("shown", draw, check, every=EVERY)
