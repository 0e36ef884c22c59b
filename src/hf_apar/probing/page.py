"""A probe's report as one page of HTML: it asks no network for anything, and what was written in it does nothing."""

from collections.abc import Iterator
from html import escape

from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.probing.probed import Probed
from hf_apar.probing.report import ProbeReport

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --thread: #2a7ab0; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } h3 { font-size: 1rem; margin-bottom: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); }
td.number { white-space: nowrap; font-variant-numeric: tabular-nums; } td.value { font-weight: 700; }
.bars { display: grid; grid-template-columns: minmax(7rem, 2fr) 3fr; gap: .15rem .6rem; font-size: .85rem; }
.bars > span { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.track { background: var(--soft); } .bar { background: var(--thread); height: 1.1em; }
.thread { border-left: 3px solid var(--thread); margin: .2rem 0 .2rem .4rem; padding-left: .6rem; }
.text { white-space: pre-wrap; }
code { background: var(--soft); padding: .1rem .3rem; }
"""


def page(report: ProbeReport) -> str:
    """Return ``report`` as HTML; every text of a prompt or an answer is escaped."""
    body = "\n".join(_body(report))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>What threads could save</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>What threads could save</h1>
<p dir="auto">{escape(report.title)}</p>
{body}
</body>
</html>
"""


def _body(report: ProbeReport) -> Iterator[str]:
    yield _table(
        ("", "95 % interval", ""),
        [_row(_cell(str(one), "number value"), _cell(one.interval, "number"), _cell(one.says)) for one in report.figures],
    )
    if report.whole:
        yield "<h2>Why answers stay whole</h2>"
        yield _table(
            ("answers", "reason", "one of them"),
            [
                _row(_cell(str(one.count), "number"), _cell(one.rule.why), f"<td>{_answer(one.example)}</td>")
                for one in report.whole
            ],
        )
    if report.kept:
        yield "<h2>Why parts stay in their parents</h2>"
        rows = [_row(_cell(str(count), "number"), _cell(why)) for why, count in report.kept]
        yield _table(("parts", "reason"), rows)
    if report.examples:
        yield "<h2>Examples of those that fork</h2>"
        yield "<p>From one that gains little to one that gains much; a bar is a thread, from its first step to its last.</p>"
        yield from map(_example, report.examples)
    yield "<h2>What these figures leave out</h2><ul>"
    yield from (f'<li dir="auto">{escape(sentence)}</li>' for sentence in report.leaves_out)
    yield "</ul>"
    words, command = report.next_step
    yield f"<h2>Next</h2><p>{escape(words)}: <code>{escape(command)}</code></p>"


def _example(one: Probed) -> str:
    bars = "\n".join(
        f'<span dir="auto" style="padding-left:{span.depth}em">{escape(span.title or "the main thread")}</span>'
        f'<div class="track"><div class="bar" style="margin-left:{100 * span.start / one.steps:.2f}%;'
        f'width:{100 * (span.end - span.start) / one.steps:.2f}%"></div></div>'
        for span in one.spans
    )
    told = f"{len(one.spans)} threads, {one.total} in {one.steps} steps: {one.total / one.steps:.2f} a step"
    return (
        f'<h3 dir="auto">{escape(_shortened(one.answer.prompt))}</h3>\n<p>{told}</p>\n<div class="bars">{bars}</div>\n'
        f"<details><summary>the answer</summary>{_tree(one.found.tree)}</details>"
    )


def _tree(thread: TextThread) -> str:
    pieces = (
        f'<span class="text" dir="auto">{escape(piece)}</span>' if isinstance(piece, str) else _tree(piece)
        for piece in thread.pieces
    )
    return f'<div class="thread">{"".join(pieces)}</div>'


def _answer(one: Probed) -> str:
    return (
        f'<details><summary dir="auto">{escape(_shortened(one.answer.prompt))}</summary>'
        f'<div class="text" dir="auto">{escape(one.answer.response)}</div></details>'
    )


def _table(heads: tuple[str, ...], rows: list[str]) -> str:
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    return "\n".join([f'<div class="wide"><table><tr>{head}</tr>', *rows, "</table></div>"])


def _row(*cells: str) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def _cell(text: str, kind: str = "") -> str:
    return f'<td class="{kind}" dir="auto">{escape(text)}</td>'


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:160]} ..."
