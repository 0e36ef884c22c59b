"""The code that readers copy runs: README's and docs' Python blocks, and every example. A block marked py needs a server."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# a fenced block, or the last cell of a row in a table of lines of code
CODE = re.compile(
    r"^```python\n(?P<block>.*?)^```$|^\|[^\n]*\| `(?P<line>[^\n`]*[(\[][^\n`]*)` \|$", re.MULTILINE | re.DOTALL
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAIN = sorted((ROOT / "examples").glob("train_*.py"))  # run on a tiny model in test_trainers.py
SERVE = ROOT / "examples" / "serve.py"  # run where vLLM is, by `make serve-demo`
EXAMPLES = sorted({*(ROOT / "examples").glob("*.py")} - {*TRAIN, SERVE})


def padded_code(page: Path) -> list[str]:
    """Return the code, each piece after as many empty lines as stand before it: tracebacks then name the page's lines."""
    text = page.read_text(encoding="utf-8")
    pieces = []
    for match in CODE.finditer(text):
        kind = "block" if match["block"] is not None else "line"
        pieces.append("\n" * text.count("\n", 0, match.start(kind)) + match[kind])
    return pieces


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for piece in padded_code(page):
        exec(compile(piece, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_fence_is_one_that_the_web_site_knows(page):
    fences = re.findall(r"^```.*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert all(re.fullmatch(r"```\w*", fence) for fence in fences[::2]), "a word alone: the rest of the page would be code"
    assert set(fences[1::2]) <= {"```"}


def test_every_line_of_the_options_table_is_run():
    pieces = padded_code(ROOT / "docs" / "generation.md")
    assert sum("generate(" in piece for piece in pieces) > 25


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_runs(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()
