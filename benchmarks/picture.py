"""Draw two answers to one question side by side, plain and in threads, as an SVG that plays both on one clock.

It draws what ``benchmarks/answers.json`` holds; ``--record`` writes that first, with the default model, and nothing else
should run meanwhile.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from hf_apar.replay import Trace, load_traces

ROOT = Path(__file__).parents[1]
ANSWERS, PICTURE = ROOT / "benchmarks" / "answers.json", ROOT / "docs" / "answers.svg"
QUESTION = "What are the benefits of learning a second language?"

LETTERS = 56  # of a line
SIZE, LETTER, LINE = 12, 7.2, 17  # pixels: of the font, a letter's width, a line's height
MARGIN, HEAD, FOOT, GAP = 20, 84, 46, 30
SECOND = MARGIN + LETTERS * LETTER + GAP  # where the second column begins
FRAME, TICK = 0.05, 0.1  # seconds: how exactly a token appears, and how often the clock changes
HOLD = 4.0  # seconds that the finished picture stands

STYLE = """\
:root { --back: #ffffff; --edge: #d5d8dd; --fore: #1b1c20; --muted: #5f636d; --good: #0a7a4c;
  --c0: #0b63be; --c1: #b04a00; --c2: #0a7a4c; --c3: #a3247d; --c4: #6a45c9; --c5: #007683; --c6: #846000; --c7: #bd2438 }
@media (prefers-color-scheme: dark) { :root {
  --back: #14161a; --edge: #363b45; --fore: #e4e6eb; --muted: #a0a6b1; --good: #56d39a;
  --c0: #6cb6ff; --c1: #f0975a; --c2: #56d39a; --c3: #f07cc0; --c4: #b5a0ff; --c5: #4fd0d9; --c6: #e0b84a; --c7: #ff8b8b } }
svg { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: var(--fore) }
.back { fill: var(--back); stroke: var(--edge) }
.edge { stroke: var(--edge) }
.title { font: 600 15px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
.clock { font: 600 22px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; text-anchor: end }
.note { font: 12px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--muted) }
.end { fill: var(--good) }
.tick { visibility: hidden }
@media (prefers-reduced-motion: reduce) { * { animation: none !important } }
"""


@dataclass(frozen=True)
class Run:
    """Letters of one line that one thread wrote in one step."""

    line: int
    column: int
    text: str
    thread: int
    time: float


def record(question: str, dtype: str) -> None:
    """Answer ``question`` both ways with the default model, each warm, and keep both traces and where they were made."""
    import torch

    import hf_apar
    from hf_apar.replay import Recorder, save_traces

    model, tokenizer = hf_apar.load_default_model(dtype=dtype)
    ids = torch.tensor([hf_apar.encode_chat(tokenizer, [{"role": "user", "content": question}])])
    traces = []
    for options in ({"apar": True}, {}):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **options)
        recorder = Recorder()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=768, streamer=recorder, **options)
        traces.append(recorder.trace(tokenizer, question=question))
    save_traces(ANSWERS, *traces)
    cores = torch.get_num_threads()
    where = f"SmolLM2-135M-Instruct tuned with hf_apar, {dtype}, {cores} {'core' if cores == 1 else 'cores'} of a CPU"
    values = json.loads(ANSWERS.read_text(encoding="utf-8"))
    ANSWERS.write_text(json.dumps(values | {"where": where}, separators=(",", ":")), encoding="utf-8")


def letters(trace: Trace) -> Iterator[tuple[str, int, float]]:
    """Yield the answer's letters in reading order, each with its thread and when it was written."""
    for index, texts in trace.tree.reading_order():
        thread = trace.threads[index]
        for text in texts:
            for letter in thread.texts[text]:
                yield letter, index, trace.times[thread.written_in(text)]


def lines_of(trace: Trace) -> list[list[tuple[str, int, float]]]:
    """Break the answer into lines of so many letters at most, between words."""
    lines: list[list[tuple[str, int, float]]] = [[]]
    for one in letters(trace):
        if one[0] == "\n":
            lines.append([])
            continue
        lines[-1].append(one)
        if len(lines[-1]) > LETTERS:
            space = max((place for place, (letter, *_) in enumerate(lines[-1]) if letter == " "), default=LETTERS - 1)
            lines[-1], rest = lines[-1][: space + 1], lines[-1][space + 1 :]
            lines.append(rest)
    return lines


def runs_of(trace: Trace) -> Iterator[Run]:
    """Yield what of the answer lies side by side and appears at once."""
    for number, line in enumerate(lines_of(trace)):
        start = 0
        for end in range(1, len(line) + 1):
            if end == len(line) or line[end][1:] != line[start][1:]:
                text = "".join(letter for letter, *_ in line[start:end])
                if text.strip():
                    yield Run(number, start + len(text) - len(text.lstrip()), text.strip(), *line[start][1:])
                start = end


class Animation:
    """The picture's key frames, by when they come; the whole of it takes ``period`` seconds and begins anew."""

    def __init__(self, period: float) -> None:
        self.period, self.rules = period, dict[str, str]()

    def _share(self, time: float) -> str:
        return f"{100 * time / self.period:.2f}%"

    def _add(self, name: str, frames: str) -> str:
        rule = f".{name}{{animation:{name} {self.period:g}s step-end infinite}}@keyframes {name}{{{frames}}}"
        self.rules.setdefault(name, rule)
        return name

    def appears(self, time: float) -> str:
        """Return the class of what is seen from ``time`` on."""
        frame = round(time / FRAME)
        return self._add(f"a{frame}", f"0%{{visibility:hidden}}{self._share(frame * FRAME)}{{visibility:visible}}")

    def flashes(self, tick: int) -> str:
        """Return the class of what is seen for one tick of the clock."""
        start, end = self._share(tick * TICK), self._share((tick + 1) * TICK)
        return self._add(f"f{tick}", f"{start}{{visibility:visible}}{end}{{visibility:hidden}}")

    def coloured(self, thread: int, end: float) -> str:
        """Return the class of what has its thread's colour until the thread ends."""
        frames = f"0%{{fill:var(--c{thread % 8})}}{self._share(end)}{{fill:var(--fore)}}"
        return self._add(f"t{thread}", frames)


def draw_answer(trace: Trace, title: str, x: float, animation: Animation) -> Iterator[str]:
    """Yield the elements of one column: its head, its clock, its text."""
    right, end, several = x + LETTERS * LETTER, trace.times[-1], len(trace.threads) > 1
    tokens = sum(len(one.texts) for one in trace.threads)
    seen = animation.appears(end)
    yield f'<text class="title" x="{x}" y="{MARGIN + 18}">{title}</text>'
    for tick in range(int(end / TICK)):
        yield f'<text class="clock tick {animation.flashes(tick)}" x="{right}" y="{MARGIN + 20}">{tick * TICK:.1f} s</text>'
    yield f'<text class="clock end {seen}" x="{right}" y="{MARGIN + 20}">{end:.1f} s</text>'
    threads = f", {len(trace.threads)} threads" if several else ""
    yield f'<text class="note {seen}" x="{x}" y="{MARGIN + 40}">{tokens} tokens{threads}, {tokens / end:.0f} tokens a second</text>'
    yield f'<path class="edge" d="M{x} {MARGIN + 50}H{right}"/>'
    runs = sorted(runs_of(trace), key=lambda run: run.thread)
    for index, mine in groupby(runs, key=lambda run: run.thread):
        ended = trace.threads[index].ended
        until = end if ended is None else trace.times[ended]
        yield f'<g class="{animation.coloured(index, until)}">' if several else "<g>"
        for run in mine:
            place = f'x="{x + run.column * LETTER:.1f}" y="{HEAD + (run.line + 1) * LINE}"'
            length = f'textLength="{len(run.text) * LETTER:.1f}"'
            yield f'<text class="{animation.appears(run.time)}" {place} {length}>{escape(run.text, quote=False)}</text>'
        yield "</g>"


def draw(trace: Trace, plain: Trace, where: str) -> str:
    """Return the picture: both answers on one clock."""
    animation = Animation(round(max(trace.times[-1], plain.times[-1]) + HOLD, 1))
    width = round(2 * (MARGIN + LETTERS * LETTER) + GAP)
    height = HEAD + LINE * max(len(lines_of(trace)), len(lines_of(plain))) + FOOT
    body = [
        *draw_answer(plain, "Plain decoding", MARGIN, animation),
        *draw_answer(trace, "The same model in threads", SECOND, animation),
        f'<text class="note" x="{MARGIN}" y="{height - 16}">{escape(where)}</text>',
    ]
    label = f"{trace.question} Plain: {plain.times[-1]:.1f} s. In {len(trace.threads)} threads: {trace.times[-1]:.1f} s."
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(label)}">',
        f"<style>{STYLE}{chr(10).join(animation.rules.values())}</style>",
        f'<rect class="back" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>',
        *body,
        "</svg>\n",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="answer the question anew, which takes half a minute")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    if options.record:
        record(options.question, options.dtype)
    trace, plain = load_traces(ANSWERS)
    assert plain is not None
    picture = draw(trace, plain, json.loads(ANSWERS.read_text(encoding="utf-8"))["where"])
    PICTURE.write_text(picture, encoding="utf-8")
    print(f"{PICTURE.relative_to(ROOT)}: {len(picture.encode()) / 1024:.0f} kB")


if __name__ == "__main__":
    main()
