"""Markdown to a tree: the text survives byte for byte, and only what is safe to split forks."""

from itertools import pairwise
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import multilingual
from hf_apar.data.extraction.markdown import extract, extraction, refusal
from hf_apar.data.extraction.rules import RULES, rules_without
from hf_apar.data.extraction.sentences import first_sentence_end
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.errors import ConfigurationError, DataError

LINES = st.sampled_from(
    [
        "1. **Tea**: it is a drink made of leaves",
        "2. Milk: comes from cows and a few goats",
        "- A - b c d e f g",
        "* x",
        "  - **In:** one two three four five",
        "",
        "   ",
        "\t",
        "# Head",
        "One. Two three four five six seven eight.",
        "> q",
        "```",
        "| a | b |",
        "|---|---|",
        "a\u2028b",
        "3) Note: six words stand in this line",
        "\x0c",
        "\\",
        "Title:",
        "Head\n---",
        "**Bold line**",
        "## Part",
        "In conclusion, it ends. Six more words are to follow.",
        "1. Line title",
        "   indented detail it has",
        "3. **标题**：一二三四五六七八九十。二三四五",
        "- **كلمة**: واحد اثنان ثلاثة أربعة خمسة",
        "甲。乙丙丁戊己庚辛壬癸子丑寅卯。",
    ]
)
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
    assert TextThread.from_json(tree.to_json()) == tree
    assert extract(answer, rules=()).text == answer
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
        ("**It rains.** We stay.", 13),
        ("Am 3. Oktober kam er. Dann ging er.", 21),
        ("Он родился в 1990 г. Потом уехал.", None),  # an abbreviation in one language is doubtful in all
        ("雨です。「はい。」と言う。", 4),
        ("هل هذا صحيح؟ نعم هو كذلك.", 12),
        ("Wait... Then go.", 7),
        ("One sentence alone.", None),
        ("No stop", None),
        ("", None),
    ],
)
def test_first_sentence_end(text, end):
    assert first_sentence_end(text) == end


SECTION = "A body of five words."
PARAGRAPH = "Tea grows here. Many people drink it each day."
# for each rule an answer that it leaves unforked, and one that looks much the same and forks
JUDGED = {
    "code": (listed(*ITEMS) + "\n\n```\nx\n```", listed(*ITEMS) + "\n\n`x`"),
    "html": ("- A: a b c d <i>e</i>\n- B: a b c d e\n- C: a b c d e", "- A: a b c d < e\n- B: a b c d e\n- C: a b c d e"),
    "table": (listed(*ITEMS) + "\n\n|a|\n|-|\n", listed(*ITEMS) + "\n\n|a|\n"),
    "formula": (listed(*ITEMS) + "\n\nSo $x$.", listed(*ITEMS) + "\n\nSo $x."),
    "link": (listed(*ITEMS) + "\n\n[a](b)", listed(*ITEMS) + "\n\n[a] (b)"),
    "quote": (listed(*ITEMS) + "\n\n> - a", listed(*ITEMS) + "\n\n> a"),
    "calculation": (listed(*ITEMS, "- D: 7 + 5 makes twelve of them"), listed(*ITEMS, "- D: 7 or 5, at 24/7, makes it")),
    "poem": (
        "\n\n".join(["**O**: the rose\nso red it grows\nwith thorns and leaves and buds"] * 3),
        "\n\n".join(["**O**: the rose so red it grows with thorns and leaves and buds"] * 3),
    ),
    "letter": (
        "\n\n".join(["Dear Ann,", PARAGRAPH, PARAGRAPH, PARAGRAPH]),
        "\n\n".join(["Dear me.", PARAGRAPH, PARAGRAPH, PARAGRAPH]),
    ),
    "dialogue": (
        "\n\n".join(f"**{name}:** {PARAGRAPH}" for name in ("Ann", "Bob") * 2),
        "\n\n".join(f"**{name}:** {PARAGRAPH}" for name in ("Ann", "Bob", "Eve", "Joe")),
    ),
    "reference": (listed(*ITEMS, "- D: do as in step 2"), listed(*ITEMS, "- Step 2: do it in 2 steps")),
    "sequence": (listed(*ITEMS, "- D: then do what is left"), listed(*ITEMS, "- D: do now and then what is")),
    "forks": (listed(*[ITEMS[0]] * 17), listed(*[ITEMS[0]] * 16)),
    "introduction": ("\n\n".join([PARAGRAPH, "One.", PARAGRAPH]), "\n\n".join(["One.", PARAGRAPH, PARAGRAPH])),
    "conclusion": (
        "\n\n".join(["One.", PARAGRAPH, f"In summary, {PARAGRAPH}"]),
        "\n\n".join(["One.", PARAGRAPH, f"In summer, {PARAGRAPH}"]),
    ),
    "leaning": ("\n\n".join(["One.", PARAGRAPH, f"But {PARAGRAPH}"]), "\n\n".join(["One.", PARAGRAPH, f"Butt {PARAGRAPH}"])),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_keeps_its_answer_whole_until_it_is_switched_off_and_lets_another_fork(rule):
    kept, forked = JUDGED[rule.name]
    refused_by = extraction(kept).refused_by
    assert refused_by is not None
    assert refused_by.name == rule.name
    assert extract(kept, rules=rules_without([rule.name])).is_structured
    assert refusal(forked) is None


@pytest.mark.parametrize(
    "salutation",
    [
        "Dear [Parent's Name],", "Dear Sir or Madam:", "*Dear Ann,*", "Sehr geehrte Damen und Herren,", "Lieber Herr Ott,",
        "Chère Anne,", "Madame, Monsieur,", "Estimada señora:", "Querido amigo:", "Gentile signora,",
        "Cara Anna,", "Prezados senhores,",
    ],
)  # fmt: skip
def test_a_letter_is_known_by_its_salutation_and_may_hold_a_list(salutation):
    letter = "\n\n".join(["Of course!", salutation, PARAGRAPH, PARAGRAPH, PARAGRAPH])
    assert refusal(letter) == "it is a letter"
    assert extract("\n\n".join(["Of course!", salutation, PARAGRAPH, listed(*ITEMS)])).fork_count == 3


def test_an_unknown_rule_is_named():
    with pytest.raises(ConfigurationError, match="no rule called verse; the rules are calculation, code"):
        rules_without(["poem", "verse"])


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (f"## A\n{SECTION}\n\n## B\n\n{SECTION}\n## C\n{SECTION}", ()),
        ("# Title\n\n" + "\n\n".join(f"### {name}\n{SECTION}" for name in "ABC"), ()),
        ("\n\n".join(f"**{name}**\n\n{SECTION}" for name in "ABC") + f"\n\nOverall, {SECTION}", ()),
        ("\n\n".join(f"## {name}\n{SECTION}" for name in ("A", "B", "C", "Conclusion")), ("conclusion",)),
    ],
)
def test_sections_fork_after_their_headings_and_a_conclusion_stays(answer, kept):
    found = extraction(answer)
    assert [child.text for child in found.tree.children] == [SECTION] * 3
    assert tuple(rule.name for rule in found.kept_by) == kept


def test_a_list_in_a_section_forks_in_the_section():
    section = "Here are the three of them:\n\n" + listed(*ITEMS)
    tree = extract("\n\n".join(f"## {name}\n{section}" for name in "ABC"))
    assert [len(child.children) for child in tree.children] == [3, 3, 3]


def test_items_whose_title_is_a_line_fork_at_the_lines_below():
    answer = "".join(f"{n}. Point {n}\n   a b c d e\n   f g\n" for n in "123")
    assert shown(extract(answer)) == "".join(f"{n}. Point {n}\n⟦   a b c d e\n   f g⟧\n" for n in "123")


@pytest.mark.parametrize("marked", [*multilingual.LISTS.values(), *multilingual.PARAGRAPHS.values()])
def test_answers_in_many_languages_fork_at_the_right_place(marked):
    assert shown(extract(marked.replace("⟦", "").replace("⟧", ""))) == marked


@pytest.mark.parametrize("name", multilingual.WHOLE)
def test_answers_in_many_languages_stay_whole_by_the_right_rule(name):
    refused_by = extraction(multilingual.WHOLE[name]).refused_by
    assert refused_by is not None
    assert refused_by.name == name.split(": ")[1]


@pytest.mark.parametrize("pieces", [None, "text", {"a": 1}, ["text", [1]], [None]])
def test_json_that_is_no_tree_is_refused(pieces):
    with pytest.raises(DataError, match="a tree is a list of strings"):
        TextThread.from_json(pieces)


@pytest.mark.parametrize(
    "text", ["- a" + " " * 20_000 + "b", "**a**" + " " * 20_000 + "b", "**a" * 5_000, "- " + "a " * 20_000]
)
def test_no_text_takes_quadratic_time(text):
    start = process_time()
    assert extract(text).text == text
    assert process_time() - start < 1
