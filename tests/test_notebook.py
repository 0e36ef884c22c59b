"""What shows itself in a notebook, and the notebook of the examples, run by a kernel."""

import re
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import nbformat
import torch
from nbclient import NotebookClient

from conftest import random_prompts
from hf_apar.notebook import NotebookStreamer
from hf_apar.results import AparOutput, AparStats
from hf_apar.tree.display import CURSOR, tree_html
from hf_apar.tree.threads import ParagraphTree, Thread

EXAMPLE = Path(__file__).parents[1] / "examples" / "notebook.ipynb"
TINT = 'style="background:hsl(137 70% 50% / .18)"'


class Letters:
    """Takes token 97 for ``a``, as a tokenizer would."""

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(map(chr, tokens))


def thread(index, parent, position, text, reason="eos"):
    return Thread(index, parent, position, 1, [], tokens=list(map(ord, text)), finish_reason=reason)


def visible(html):
    return unescape(re.sub(r"<[^>]*>", "", html.split("<details")[0]))


def test_a_tree_is_shown_in_reading_order_and_its_text_stays_text():
    tree = ParagraphTree([thread(0, None, 0, "a<b>&c"), thread(1, 0, 4, '"x"</div>', None)])
    assert tree_html(tree, Letters()) == (
        '<div class="mathjax_ignore tex2jax_ignore"><div style="white-space:pre-wrap">'
        '<span title="thread 0: 6 tokens, eos">a&lt;b&gt;'
        f'<span title="thread 1: 9 tokens, unfinished" {TINT}>&quot;x&quot;&lt;/div&gt;{CURSOR}</span>&amp;c</span></div>'
        '<details><summary style="opacity:.7">2 threads, 15 tokens</summary><ul>'
        f'<li><span>thread 0: 6 tokens, eos</span><ul><li><span {TINT}>thread 1: 9 tokens, unfinished</span></li></ul></li>'
        "</ul></details></div>"
    )


def test_a_tree_without_a_tokenizer_shows_its_threads_and_says_how_to_see_more():
    html = ParagraphTree([thread(0, None, 0, "ab")])._repr_html_()
    assert "<details open>" in html and "1 thread, 2 tokens; with tokenizer=tokenizer" in html and visible(html) == ""


def test_what_a_stop_string_cut_off_is_not_shown():
    tree = ParagraphTree([thread(0, None, 0, "abz"), thread(1, 0, 2, "x")], stopped_by=1)
    html = tree_html(tree, Letters())
    assert visible(html) == "abx" and html.count("<span") == html.count("</span>")


def test_an_output_shows_each_answer_with_what_it_cost():
    trees = [ParagraphTree([thread(0, None, 0, text)]) for text in "ab"]
    for tree in trees:
        tree.tokenizer = Letters()
    html = AparOutput(trees=trees, stats=[AparStats(steps=2, tokens=1, seconds=0.5)] * 2)._repr_html_()
    assert html.count("1 thread, 1 tokens in 2 steps, 0.50 a step, 0.50 s") == 2
    assert [visible(f"<{part}") for part in html.split("<div class=")[1:]] == ["a", "b"]
    assert AparOutput()._repr_html_() == ""


def test_generate_gives_the_trees_the_tokenizer_and_the_streamer_ends_with_what_they_show(apar_llama):
    prompts = random_prompts(1, seed=34)
    pictures = []
    streamer = NotebookStreamer(Letters(), refresh_seconds=0.0)
    streamer._place = SimpleNamespace(update=lambda html: pictures.append(html.data))  # only a kernel gives one
    out = apar_llama.generate(
        input_ids=torch.tensor(prompts), apar=True, max_new_tokens=40, tokenizer=Letters(), streamer=streamer,
        return_dict_in_generate=True,
    )
    assert len(pictures) > 2 and len(out.trees[0].threads) > 2
    assert pictures[-1] == out.trees[0]._repr_html_() and visible(pictures[-1]) == out.trees[0].text(Letters())


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "site-packages" not in EXAMPLE.read_text(encoding="utf-8"), "what warns belongs to a machine"
    notebook = nbformat.read(EXAMPLE, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", ()) if "data" in one]
    shown = [one["data"]["text/html"] for one in outputs]
    assert len(shown) == 4 and visible(shown[0]) == visible(shown[1])
    assert not any("<script" in html for html in shown)
