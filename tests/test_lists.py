"""Lists as models write them fork as one by the book does; where it is doubtful what belongs to an item, they do not."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_apar.data.extraction.indentation import indented
from hf_apar.data.extraction.markdown import extract, extraction, refusal
from hf_apar.data.extraction.thinking import thinking_end

DETAIL = "it has five or six words."
NAMES = ("Oak", "Ash", "Elm", "Fir")
CLOSING = "That was all of them for now."


def shown(thread):
    return "".join(piece if isinstance(piece, str) else f"⟦{shown(piece)}⟧" for piece in thread.pieces)


def items(form, between="\n", names=NAMES, start=1):
    return between.join(form.format(n=start + place, t=name, d=DETAIL) for place, name in enumerate(names))


T9 = {
    "not indented": items("{n}. **{t}**\n⟦{d}⟧"),
    "a colon, not indented": items("{n}. **{t}**:\n⟦{d}⟧"),
    "blank lines, not indented": items("{n}. **{t}**\n\n⟦{d}⟧", "\n\n"),
    "a blank line after titles alone": items("{n}. **{t}**\n\n⟦{d}⟧"),
    "a colon in the title": items("{n}. **{t}:**\n\n⟦{d}⟧", "\n\n"),
    "no colon": items("{n}. **{t}**⟦ {d}⟧"),
    "no colon, blank lines": items("{n}. **{t}**⟦ {d}⟧", "\n\n"),
    "no colon, bullets": items("- **{t}**⟦ {d}⟧"),
    "parentheses": items("{n}) **{t}**\n\n⟦{d}⟧", "\n\n"),
    "bullets and paragraphs": items("- **{t}**\n\n⟦{d}⟧", "\n\n"),
    "stars, not indented": items("* **{t}**\n⟦{d}⟧"),
    "titles without marks": items("{n}. {t} trees\n\n⟦{d}⟧", "\n\n"),
    "line ends of Windows": items("{n}. **{t}**\r\n\r\n⟦{d}⟧", "\r\n\r\n"),
    "all numbers are one": items("1. **{t}**\n\n⟦{d}⟧", "\n\n"),
    "lists that are not indented": items("{n}. **{t}**\n⟦- {d}\n- {d}⟧"),
    "lists after blank lines": items("{n}. **{t}**\n\n⟦- {d}\n- {d}⟧", "\n\n"),
    "lists after a text": items("{n}. **{t}**:⟦ {d}\n\n- {d}\n- {d}⟧", "\n\n"),
    "two digits": items("{n}. **{t}**\n\n⟦   {d}⟧", "\n\n", NAMES * 3),
    "two digits, no blank lines": items("{n}. **{t}**\n⟦   - {d}\n   - {d}⟧", names=NAMES * 3),
    "two digits, more below": items("{n}. **{t}**:⟦ {d}\n\n   {d}⟧", names=NAMES * 3),
    "three digits": items("{n}. **{t}**\n\n⟦   {d}⟧", "\n\n", start=98),
    "as many blocks as the others": items("{n}. **{t}**\n\n⟦{d}\n\n{d}⟧", "\n\n") + f"\n\n{CLOSING}",
    "a conclusion": items("{n}. **{t}**\n\n⟦{d}⟧", "\n\n") + f"\n\nIn conclusion, {DETAIL}",
    "an introduction": "Here are some trees.\n\n" + items("{n}. **{t}**\n\n⟦{d}⟧", "\n\n"),
    "sections with lists": "\n\n".join(f"## {name}\n\n⟦{items('{n}. **{t}**⟦ {d}⟧')}⟧" for name in "ABC"),
    # what is doubtful stays
    "the last item, where the others differ": f"1. **A**\n\n⟦{DETAIL}⟧\n\n2. **B**\n\n⟦{DETAIL}\n\n{DETAIL}⟧\n\n"
    f"3. **C**\n\n⟦{DETAIL}⟧\n\n4. **D**\n\n{DETAIL}\n\n{CLOSING}",
    "a conclusion in place of a detail": items("{n}. **{t}**\n\n⟦{d}⟧", "\n\n", NAMES[:3])
    + f"\n\n4. **Fir**\n\nIn conclusion, {DETAIL}",
    "what leads on to other items": items("{n}. **{t}**: {d}", names=NAMES[:2]) + "\n\nNow small ones:\n\n"
    + items("{n}. **{t}**: {d}", names=NAMES[:2], start=3),
    "a paragraph between items that have their details": items("{n}. **{t}**: {d}", names=NAMES[:2]) + f"\n\n{CLOSING}\n\n"
    + items("{n}. **{t}**: {d}", names=NAMES[:2], start=3),
    "bold words that are no titles": f"- **Take** {DETAIL}\n- Eat less **sugar** and {DETAIL}\n- **Walk** and {DETAIL}",
    "plain bullets and paragraphs": items("- {t}\n\n{d}", "\n\n"),
    "numbers that do not count": f"3. **A**\n\n{DETAIL}\n\n7. **B**\n\n{DETAIL}\n\n5. **C**\n\n{DETAIL}",
}  # fmt: skip


@pytest.mark.parametrize("name", T9)
def test_t9_lists_as_models_write_them_fork(name):
    """FIELD T9: 0 of 4 items forked, and of twelve the last three did not."""
    answer = re.sub("[⟦⟧]", "", T9[name])
    assert shown(extract(answer)) == T9[name]


LINES = st.sampled_from(
    ["1. **Oak**", "2. **Ash**", "3. **Elm**", "10. **Fir**", "11. Yew", "12) Box", "1. Oak: it grows very slowly indeed",
     "- **A**", "- b", "   - c d e f g", "  two blanks it has here", "   three blanks it has here", "No blanks it has here.",
     "\ttab", "", "", "In conclusion, that is all.", "## Head", "**Bold**", "---", "```", "> q", "| a |", "<think>",
     "</think>"]
)  # fmt: skip
ANSWERS = st.lists(st.tuples(LINES, st.sampled_from(["\n", "\n\n", "\r\n", "\r"])), max_size=24).map(
    lambda lines: "".join(line + end for line, end in lines)
)


@given(ANSWERS)
def test_t9_blanks_before_lines_are_all_that_is_put_in(answer):
    before, after = answer.splitlines(keepends=True), indented(answer).splitlines(keepends=True)
    assert [line.lstrip(" ") for line in after] == [line.lstrip(" ") for line in before]
    assert all(len(new) >= len(line) for line, new in zip(before, after, strict=True))


@given(ANSWERS)
def test_t9_t8_the_tree_gives_the_text_back(answer):
    tree = extract(answer)
    assert tree.text == answer
    assert not tree.pieces or isinstance(tree.pieces[0], str)
    assert len(tree.pieces[0] if tree.pieces else "") >= thinking_end(answer)


LIST = items("- {t}:⟦ {d}⟧")
PLAIN = re.sub("[⟦⟧]", "", LIST)


@pytest.mark.parametrize(
    "thoughts",
    [
        "<think>\n\n</think>\n\n",
        "<think></think>",
        "\n<think>\nHm, x = 1. <b>Lists</b>:\n\n- a: one two three four five\n- b: c\n</think>\n\n",
        "What is a tree? See https://example.org.\n</think>\n\n",  # the template opened them
        "<thinking>\n```\ncode\n```\n</thinking>\n",
        "[THINK]Hm.[/THINK]\n",
    ],
)
def test_t8_thoughts_stay_whole_in_the_main_thread_and_what_follows_forks(thoughts):
    """FIELD T8: an empty block of Qwen3 counted as HTML, so that nothing forked."""
    assert shown(extract(thoughts + PLAIN)) == thoughts + LIST
    assert refusal(thoughts + "No list.") == refusal("No list.")
    found = extraction(thoughts + PLAIN + "\n\n```\ncode\n```")
    assert found.refused_by is not None and found.refused_by.name == "code"
    assert found.tree.pieces == (thoughts + PLAIN + "\n\n```\ncode\n```",)


@pytest.mark.parametrize("text", [f"<think>\n{PLAIN}", f"So <think>hm</think>\n\n{PLAIN}", f"{PLAIN}\n\n<b>x</b>"])
def test_t8_tags_that_enclose_no_thoughts_are_html_as_ever(text):
    assert refusal(text) == "it holds HTML"
