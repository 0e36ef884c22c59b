"""The page that plays an answer, in a real browser: it shows what was written, obeys, and runs no model's output."""

import base64
import hashlib
import re
from dataclasses import replace
from itertools import accumulate

import pytest

from browser import SHIFT, executable, open_browser
from byte_tokenizer import byte_tokenizer
from hf_apar.protocol import ControlTokens
from hf_apar.replay import Recorder, replay_page, trace_of_tree, write_replay
from hf_apar.streaming import Broadcast
from hf_apar.tree.growth import GrowingTree

TOKENIZER = byte_tokenizer()  # a token is a byte
FORK, CHILD, EOS = 1000, 1001, 1002
PROMPT = [5] * 20
HOSTILE = (
    "</script><script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\"><!-- &lt;b&gt; \u2028"
)
PARTS = ["Trees:\n1. Oak", [": hard é", ["\n   - old"], "."], "\n2. Fir", [f": {HOSTILE}"], "\nThat is all."]
TEXT = f"Trees:\n1. Oak: hard é\n   - old.\n2. Fir: {HOSTILE}\nThat is all."


def ids_of(parts):
    """Return what a thread samples: bytes, and for each part that is a list a [Fork] beside the child's parts."""
    script = []
    for part in parts:
        if isinstance(part, list):
            script.append((FORK, part))
        else:
            script += [
                (token, None) for token in TOKENIZER.encode(part, add_special_tokens=False, split_special_tokens=True)
            ]
    return [*script, (EOS, None)]


def written(parts, *, max_threads=8, stop_in=None):
    """Write ``parts`` step by step, each 0.05 s long; the thread ``stop_in`` stops at its third token."""
    protocol = ControlTokens(fork_token_id=FORK, child_token_id=CHILD, eos_token_ids=frozenset({EOS}))
    row, recorder = GrowingTree(PROMPT, protocol, max_threads=max_threads), Recorder()
    told, scripts = Broadcast(recorder), {0: iter(ids_of(parts))}
    while row.unfinished:
        for thread in row.live:
            if thread.finish_reason is not None:
                continue
            token, child = next(scripts[thread.index])
            thread.logprobs = [*(thread.logprobs or []), -0.25]
            row.write(thread, token, stops=thread.index == stop_in and len(thread.tokens) == 2)
            if child is not None:
                scripts[len(row.threads) - 1] = iter(ids_of(child))
        told.update([row.tree])
    trace = recorder.trace(TOKENIZER, question=f"Which trees? {HOSTILE}")
    assert stop_in is not None or trace.text == TEXT
    return replace(trace, times=tuple(accumulate(0.05 for _ in trace.times))), row.tree


TRACE, TREE = written(PARTS)
PLAIN, _ = written([TEXT])


def test_a_page_runs_its_own_script_alone_and_loads_nothing():
    page = replay_page(TRACE, PLAIN)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; img-src data:;")
    (style,), (script,) = re.findall(r"<style>(.*?)</style>", page, re.S), re.findall(r"<script>(.*?)</script>", page, re.S)
    for one in (style, script):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" in policy
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}  # the name of SVG
    assert page.count("<script") == page.count("</script>") == 2 and "<img" not in page


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if executable() is None:
        pytest.skip("no Chromium here; apt-get install chromium, or set CHROME")
    with open_browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / "answer.html"
    write_replay(path, TRACE)
    return path


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    path = tmp_path_factory.mktemp("compared") / "answer.html"
    write_replay(path, TRACE, PLAIN)
    return path


def seen_after(trace, step):
    """What a reader sees after a step: of each token in reading order whether it was written by then."""
    tokens = ((trace.threads[index], text) for index, texts in trace.tree.reading_order() for text in texts)
    return "".join(thread.texts[text] for thread, text in tokens if thread.written_in(text) <= step)


def clean(page, path):
    """Has it neither complained, nor asked for anything but itself, nor run what the answer holds?"""
    assert page.complaints() == []
    assert set(page.requests()) <= {path.resolve().as_uri(), "data:,"}
    assert page.evaluate("document.title") == TRACE.question
    assert page.evaluate("document.querySelectorAll('img, .text *:not(span, i)').length") == 0


def test_an_answer_plays_to_its_end_by_itself(browser, file):
    with browser.page(file, motion="no-preference") as page:
        page.until("player.time > 0.2 && player.time < player.duration")
        assert 0 < len(page.text(".text")) < len(TEXT)
        page.until("!player.playing", seconds=60)
        assert page.text(".text") == TEXT == TREE.text(TOKENIZER)
        assert page.text("h1").split() == TRACE.question.split()
        assert page.text("#clock") == f"{TRACE.times[-1]:.2f} s of {TRACE.times[-1]:.2f} s"
        assert (
            "4 threads" in page.text(".figures") and page.evaluate("document.querySelectorAll('.answer.done').length") == 1
        )
        clean(page, file)


def test_each_step_shows_what_was_written_by_then_forwards_and_backwards(browser, file):
    steps = len(TRACE.times)
    with browser.page(file) as page:
        assert page.text(".text") == "" and not page.evaluate("player.playing")  # whoever wants no motion presses play
        for step in [*range(steps), *range(steps - 2, -1, -1)]:
            page.evaluate(f"player.moveTo(player.stops[{step + 1}])")
            assert page.text(".text").strip() == seen_after(TRACE, step).strip()
            slots, growing = page.text("#charts b"), page.evaluate("document.querySelectorAll('.cursor.on').length")
            assert slots == (str(TRACE.held[step]) if step < steps - 1 else f"at most {max(TRACE.held)}")
            assert growing == (0 if step == steps - 1 else sum(one.unfinished_after(step) for one in TRACE.threads))
        clean(page, file)


def test_keys_move_the_clock(browser, file):
    with browser.page(file) as page:
        times = [0, *TRACE.times]

        def pressed(key, modifiers=0):
            page.press(key, modifiers)
            return page.evaluate("player.time")

        assert [pressed("ArrowRight") for _ in range(3)] == pytest.approx(times[1:4])
        assert pressed("ArrowLeft") == pytest.approx(times[2])
        assert pressed("ArrowRight", SHIFT) == pytest.approx(times[12])
        assert pressed("End") == pytest.approx(times[-1]) and page.text(".text") == TEXT
        assert pressed("ArrowRight") == pytest.approx(times[-1])
        assert pressed("Home") == 0 == pressed("ArrowLeft")
        page.press(" ")
        page.until("player.playing && player.time > 0.1")
        page.press(" ")
        assert not page.evaluate("player.playing")
        stopped = page.evaluate("player.time")
        page.evaluate("player.seek.focus()")
        assert pressed("ArrowRight") == pytest.approx(min(time for time in times if time > stopped))  # and no more than that
        page.evaluate("player.button.focus()")
        page.press(" ")
        assert page.evaluate("player.playing")  # once, not twice
        clean(page, file)


def test_the_mouse_moves_the_clock_and_tells_of_a_token(browser, file):
    with browser.page(file) as page:
        page.press("End")
        chart, button = page.box(".chart svg"), page.box("#play")
        page.point(chart["x"] + chart["width"] / 2, chart["y"] + 10, click=True)
        assert page.evaluate("player.time") == pytest.approx(TRACE.times[-1] / 2, abs=0.02)
        page.point(button["x"] + 5, button["y"] + 5, click=True)
        page.until("player.playing")
        page.press("End")
        seek = page.box("#seek")
        page.point(seek["x"] + 2, seek["y"] + seek["height"] / 2, click=True)
        assert page.evaluate("player.time") < TRACE.times[-1] / 10
        page.press("End")
        token = page.box(".segment[class*=c1] .token")  # the colon that the first child wrote
        page.point(token["x"] + token["width"] / 2, token["y"] + token["height"] / 2)
        first = TRACE.threads[1]
        for words in ("thread 1", f"position {first.places[0]}, step {first.written_in(0) + 1}", "log probability -0.250"):
            assert words in page.text("#tip")
        assert "77.9 %" in page.text("#tip") and page.evaluate("document.querySelectorAll('.row.focus').length") == 1
        clean(page, file)


def test_an_accepted_draft_is_told_of(browser, tmp_path):
    root = replace(TRACE.threads[0], accepted=(1,), logprobs=None)
    write_replay(tmp_path / "drafts.html", replace(TRACE, threads=(root, *TRACE.threads[1:])))
    with browser.page(tmp_path / "drafts.html") as page:
        page.press("End")
        token = page.box(".token.guessed")
        page.point(token["x"] + token["width"] / 2, token["y"] + token["height"] / 2)
        assert "accepted draft" in page.text("#tip") and "probability" not in page.text("#tip")
        assert "accepted" in page.text(".legend")


def test_both_clocks_stop_where_their_answer_ended(browser, compared):
    with browser.page(compared) as page:
        page.evaluate(f"player.moveTo({TRACE.times[-1] + 1})")
        times = page.evaluate("[...document.querySelectorAll('.answer .time')].map(one => one.textContent)")
        assert times == [f"{TRACE.times[-1] + 1:.2f} s", f"{TRACE.times[-1]:.2f} s"]
        assert page.evaluate("document.querySelectorAll('.answer.done').length") == 1
        page.press("End")
        assert page.evaluate("[...document.querySelectorAll('.text')].map(one => one.innerText)") == [TEXT, TEXT]
        assert page.text(".answer.plain .time") == f"{PLAIN.times[-1]:.2f} s"
        clean(page, compared)


def test_waiting_threads_are_drawn_and_what_a_stop_cut_off_vanishes(browser, tmp_path):
    waiting, _ = written(PARTS, max_threads=2)
    cut, tree = written(PARTS, stop_in=1)
    write_replay(tmp_path / "waiting.html", waiting)
    write_replay(tmp_path / "cut.html", cut)
    with browser.page(tmp_path / "waiting.html") as page:
        waited = [one for one in waiting.threads if one.parent is not None and one.steps[0] > one.born]
        assert page.evaluate("document.querySelectorAll('.bar.waits').length") == len(waited) > 0
    with browser.page(tmp_path / "cut.html") as page:
        page.press("End")
        assert page.text(".text") == tree.text(TOKENIZER) == "Trees:\n1. Oak: h"
        assert sum(len(one.tokens) for one in tree.threads) > len("Trees:\n1. Oak: h")  # what was cut off


def test_a_tree_without_a_clock_plays_in_steps(browser, tmp_path):
    trace = trace_of_tree(TREE, TOKENIZER)
    write_replay(tmp_path / "steps.html", trace)
    with browser.page(tmp_path / "steps.html") as page:
        page.press("End")
        assert page.text(".text") == TEXT and page.text("#clock") == f"{len(trace.times)} steps of {len(trace.times)} steps"
        assert page.text("h1") == "An answer, and how it was written"


@pytest.mark.parametrize("width", [320, 700, 1280, 2200])
def test_nothing_hangs_over_the_edge(browser, compared, width):
    with browser.page(compared, width=width) as page:
        page.press("End")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.querySelector('#controls').getBoundingClientRect().right") <= width


def test_print_has_the_whole_answer_and_no_controls(browser, file, tmp_path):
    with browser.page(file) as page:
        page.media(kind="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.text(".text") == TEXT
        assert page.evaluate("getComputedStyle(document.querySelector('#controls')).display") == "none"
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.evaluate("player.time") == 0
        page.pdf(tmp_path / "answer.pdf")
        assert page.evaluate("player.time") == 0 and (tmp_path / "answer.pdf").read_bytes().startswith(b"%PDF")
        clean(page, file)


CONTRASTS = """(() => {
  const drawn = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = (name) => {
    drawn.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name);
    drawn.fillRect(0, 0, 1, 1);
    const parts = [...drawn.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255);
    const [red, green, blue] = parts.map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05;
  };
  const pairs = [["--fore", "--fresh"]];
  for (const back of ["--back", "--panel"]) {
    for (const fore of ["fore", "muted", "plain"]) pairs.push([`--${fore}`, back]);
    for (const thread of "01234567") pairs.push([`--c${thread}`, back]);
  }
  const ratio = (one, other) => Math.max(one, other) / Math.min(one, other);
  return pairs.map(([one, other]) => [one, other, ratio(light(one), light(other))]);
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_in_dark_and_in_light(browser, file, scheme):
    """4.5 is what WCAG 2 asks for at level AA."""
    with browser.page(file, scheme=scheme) as page:
        dark = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--back')") == "#14161a"
        assert dark == (scheme == "dark")
        assert [pair for pair in page.evaluate(CONTRASTS) if pair[2] < 4.5] == []
