"""Markdown to a tree: the text survives byte for byte, and only what is safe to split forks."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_apar.data.markdown import extract, refusal
from hf_apar.data.sentences import first_sentence_end
from hf_apar.data.text_tree import TextThread

LINES = st.sampled_from(
    ["1. **Tea**: it is a drink made of leaves", "2. Milk: comes from cows and a few goats", "- A - b c d e f g", "* x",
     "  - **In:** one two three four five", "", "   ", "\t", "# Head", "One. Two three four five six seven eight.", "> q",
     "```", "| a | b |", "|---|---|", "a\u2028b", "3) Note: six words stand in this line", "\x0c", "\\", "Title:"]
)  # fmt: skip
MARKDOWN = st.lists(st.tuples(LINES, st.sampled_from(["\n", "\n\n", "\r\n", "\r", ""]))).map(
    lambda lines: "".join(line + end for line, end in lines)
)


def shown(thread):
    """The text, with each forked thread in brackets."""
    return "".join(piece if isinstance(piece, str) else f"⟦{shown(piece)}⟧" for piece in thread.pieces)


def listed(*items, between="\n"):
    return between.join(items)


@given(st.one_of(st.text(), MARKDOWN))
def test_the_tree_gives_the_text_back_and_its_threads_are_well_formed(answer):
    tree = extract(answer)
    assert tree.text == answer
    assert tree.is_structured == (refusal(answer) is None)
    assert tree.depth <= 3
    for thread in list(tree.walk())[1:]:
        assert thread.text and thread.text[0] not in "\r\n" and thread.text[-1] not in "\r\n"
    for thread in tree.walk():
        assert all(piece != "" for piece in thread.pieces)
        starts = [isinstance(piece, TextThread) for piece in thread.pieces]
        assert not any(this and following for this, following in pairwise(starts))
        assert not (thread is not tree and starts[0])  # no [Fork] right after [Child]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "Tips:\n\n1. **Rest**: Sleep eight hours a night.\n2. **Eat:** Have more greens each day.\n"
            "3. Walk: Half an hour after each meal.\n4. **Talk** - Call one friend every single day.\n\nGood luck.\n",
            "Tips:\n\n1. **Rest**:⟦ Sleep eight hours a night.⟧\n2. **Eat:**⟦ Have more greens each day.⟧\n"
            "3. Walk:⟦ Half an hour after each meal.⟧\n4. **Talk** -⟦ Call one friend every single day.⟧\n\nGood luck.\n",
        ),
        (  # details of several lines and blocks; the blank lines between items are the parent's
            "- A:\n  one two three four five\n\n  and more\n\n- B: one two\n  three four five\n\n"
            "- C: one two three four five\n",
            "- A:\n⟦  one two three four five\n\n  and more⟧\n\n- B:⟦ one two\n  three four five⟧\n\n"
            "- C:⟦ one two three four five⟧\n",
        ),
        (  # a list within an item is its detail, and forks in turn where it can
            "1) A: see the list below here\n   - x: a b c d e\n   - y: a b c d e\n   - z: a b c d e\n"
            "2) B: a b c d e\n3) C: a b c d e",
            "1) A:⟦ see the list below here\n   - x:⟦ a b c d e⟧\n   - y:⟦ a b c d e⟧\n   - z:⟦ a b c d e⟧⟧\n"
            "2) B:⟦ a b c d e⟧\n3) C:⟦ a b c d e⟧",
        ),
        (  # an item without a title stays; three others are enough
            "- A: a b c d e\n- plain\n- B: a b c d e\n- C: a b c d e",
            "- A:⟦ a b c d e⟧\n- plain\n- B:⟦ a b c d e⟧\n- C:⟦ a b c d e⟧",
        ),
        (  # the first paragraph introduces
            "First here. It has five more words now.\n\nOnly one sentence.\n\nThird here.\nIt goes on for six words.\n\n"
            "Fourth one. It has five more words now.",
            "First here. It has five more words now.\n\nOnly one sentence.\n\nThird here.\n⟦It goes on for six words.⟧\n\n"
            "Fourth one.⟦ It has five more words now.⟧",
        ),
    ],
)
def test_threads_of_lists_and_paragraphs(answer, expected):
    assert shown(extract(answer)) == expected


ITEMS = ("- A: a b c d e", "- B: a b c d e", "- C: a b c d e")


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("", None),
        ("It costs $5 here and $10 there.", None),
        ("Call `len` on it.", None),
        ("```\ncode\n```", "it holds code"),
        ("x\n\n    indented = code", "it holds code"),
        ("| a | b |\n|---|---|\n| 1 | 2 |", "it holds a table"),
        ("So $x^2$ is large.", "it holds a formula"),
        (r"So \(x\) is large.", "it holds a formula"),
        ("Hence y = 3.", "it holds a formula"),
        ("<b>bold</b>", "it holds HTML"),
        ("See [here](https://example.org).", "it holds a link"),
        ("See www.example.org.", "it holds a link"),
    ],
)
def test_what_keeps_an_answer_whole(extra, reason):
    answer = listed(*ITEMS) + "\n\n" + extra
    assert refusal(answer) == reason
    assert extract(answer).fork_count == (3 if reason is None else 0)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        listed(*ITEMS[:2]),
        listed("- A: a b", "- B: a b", "- C: a b"),  # details too short
        listed(*(f"- {'word ' * 13}: a b c d e" for _ in range(3))),  # titles too long
        listed(*ITEMS).replace("- ", "> - "),  # quoted: the marker does not start the line
        "One. Two three four five six seven.\n\nTwo.\n\nThree.",  # one fork alone
    ],
)
def test_too_little_structure_stays_whole(answer):
    assert extract(answer).fork_count == 0


def test_max_depth_bounds_the_tree():
    answer = listed(*(f"- T{i}: here is what\n  - A: a b c d e\n  - B: a b c d e\n  - C: a b c d e" for i in range(3)))
    assert [extract(answer, max_depth=depth).depth for depth in (1, 2, 3)] == [1, 2, 3]
    assert [extract(answer, max_depth=depth).fork_count for depth in (1, 2, 3)] == [0, 3, 12]


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("It rains. We stay.", 9),
        ("Really?! Yes.", 8),
        ('He said "no." Then he left.', 13),
        ("See e.g. Paris. Then go.", 15),
        ("Dr. Who met Mr. T. Then he left.", None),  # "T." could be an initial
        ("The U.S. Army left.", None),
        ("It is 3.5 metres. High enough.", 17),
        ("Version 2. Then more.", None),  # a number and a full stop could be a list marker
        ("It ends. but not here", None),
        ("Wait... Then go.", 7),
        ("One sentence alone.", None),
        ("No stop", None),
        ("", None),
    ],
)
def test_first_sentence_end(text, end):
    assert first_sentence_end(text) == end
