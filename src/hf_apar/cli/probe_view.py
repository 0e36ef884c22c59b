"""A probe's report on one screen of a terminal (needs ``rich``)."""

from collections.abc import Iterator

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from hf_apar.cli.live import standard_output
from hf_apar.probing.probed import Probed
from hf_apar.probing.report import ProbeReport
from hf_apar.probing.timeline import Span

_REASONS = 5  # that are shown
_THREADS = 5  # of an example that are drawn
_BAR = 28  # letters


def show_probe(report: ProbeReport, console: Console | None = None) -> None:
    """Write ``report`` to ``console``; no text of a prompt or an answer commands the terminal."""
    (console or standard_output()).print(Group(*_parts(report)))


def _parts(report: ProbeReport) -> Iterator[Text | Table]:
    yield Text(_line(report.title), style="bold")
    figures = _grid()
    for one in report.figures:
        figures.add_row(Text(str(one), style="bold"), Text(one.interval), Text(one.says))
    yield figures
    if report.whole:
        yield Text("Why answers stay whole", style="bold")
        reasons = _grid()
        for whole in report.whole[:_REASONS]:
            reasons.add_row(Text(str(whole.count)), Text(whole.rule.why), _cut(whole.example.answer.prompt, "dim"))
        if others := sum(whole.count for whole in report.whole[_REASONS:]):
            reasons.add_row(Text(str(others)), Text("for other reasons"), Text())
        yield reasons
    for example in report.examples:
        told = f"{len(example.spans)} threads, {example.total} in {example.steps} steps: "
        yield Text(f"{told}{example.total / example.steps:.2f} a step", style="bold")
        yield _drawn(example)
    for sentence in report.leaves_out:
        yield Text(f"- {_line(sentence)}", style="dim")
    words, command = report.next_step
    yield Text(f"{words}: ").append(_line(command), style="bold")


def _drawn(example: Probed) -> Table:
    """Return the threads of an answer by their titles, each with a bar from its first step to its last."""
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    grid.add_column(no_wrap=True, width=_BAR)
    for span in example.spans[:_THREADS]:
        title = Text("  " * span.depth + ("└ " if span.depth else ""))
        grid.add_row(title.append(_line(span.title or example.answer.prompt)), _bar(span, example.steps))
    if (more := len(example.spans) - _THREADS) > 0:
        grid.add_row(Text(f"  {more} more", style="dim"), Text())
    return grid


def _bar(span: Span, steps: int) -> Text:
    start, end = round(_BAR * span.start / steps), round(_BAR * span.end / steps)
    return Text(" " * start).append("█" * max(end - start, 1), style="cyan")


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_column()
    return grid


def _cut(text: str, style: str) -> Text:
    return Text(_line(text)[:60], style=style, no_wrap=True, overflow="ellipsis")


def _line(text: str) -> str:
    """Return ``text`` in one line, without what a terminal takes for a command or turns the direction of writing."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
