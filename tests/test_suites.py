"""The prompts that answers are measured on: our own ones are balanced and checkable, files of others are read or refused."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from hf_apar.data.distillation.questions import families
from hf_apar.errors import ConfigurationError, DataError
from hf_apar.evaluation import suites
from hf_apar.evaluation.suites import SUITES, Prompt, own, read_chats, read_fastchat, read_suite, suite_named

OWN = own()


def user(text):
    return {"role": "user", "content": text}


def write(path, *lines):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def words(text):
    return re.findall(r"\w+", text.casefold())


def runs(text, length):
    """All runs of ``length`` words; a shorter text is one run."""
    found = words(text)
    return {tuple(found[start : start + length]) for start in range(max(len(found) - length, 0) + 1)}


# The package's own prompts


def test_each_suite_expects_what_it_is_for():
    assert Counter((prompt.suite, prompt.expected) for prompt in OWN) == {
        ("parts", "parts"): 80, ("whole", "whole"): 80, ("either", "either"): 20, ("languages", "parts"): 15,
        ("languages", "whole"): 10, ("formats", "parts"): 10, ("formats", "whole"): 13, ("formats", "either"): 2,
        ("nested", "parts"): 20, ("dialogue", "parts"): 5, ("dialogue", "whole"): 5,
    }  # fmt: skip


def test_each_language_has_three_in_parts_and_two_whole():
    others = Counter((prompt.language, prompt.expected) for prompt in OWN if prompt.language != "en")
    assert others == {(name, kind): n for name in ("de", "fr", "es", "it", "pt") for kind, n in (("parts", 3), ("whole", 2))}
    assert {prompt.suite for prompt in OWN if prompt.language != "en"} == {"languages"}


def test_the_categories_of_the_two_large_suites():
    assert {name: Counter(prompt.category for prompt in own(name)) for name in ("parts", "whole")} == {
        "parts": {
            "advice": 10, "causes": 8, "effects": 8, "comparison": 9, "history": 6, "skills": 6, "pros and cons": 8,
            "plans": 7, "explanation": 10, "ideas": 8,
        },
        "whole": {
            "code": 16, "maths": 16, "fact": 10, "yes or no": 4, "given text": 16, "letter": 6, "poem": 3, "story": 1,
            "role play": 4, "one sentence": 4,
        },
    }  # fmt: skip


def test_a_quarter_of_those_in_parts_say_how_many():
    assert Counter(prompt.items for prompt in own("parts")) == {None: 58, 3: 6, 4: 6, 5: 5, 7: 2, 8: 3}


def test_keys_count_through_each_suite_and_no_text_occurs_twice():
    assert [prompt.key for prompt in OWN] == [f"{name}-{n:02d}" for name in SUITES for n in range(1, len(own(name)) + 1)]
    assert Counter(" ".join(words(prompt.text)) for prompt in OWN).most_common(1)[0][1] == 1


def test_the_roles_are_those_of_a_chat_that_waits_for_an_answer():
    roles = Counter((prompt.suite, *(message["role"] for message in prompt.messages)) for prompt in OWN)
    assert {key: count for key, count in roles.items() if key[1:] != ("user",)} == {
        ("whole", "system", "user"): 2, ("dialogue", "user", "assistant", "user"): 10,
    }  # fmt: skip


def test_no_prompt_shares_eight_words_in_a_row_with_what_the_recipe_trains_on():
    trained = {run for family in families().values() for prompt in family.prompts() for run in runs(prompt, 8)}
    assert [prompt.key for prompt in OWN if runs(prompt.text, 8) & trained] == []


LISTED = "**{}**: a sentence that says what it is.\n\n"
SECTIONS = {  # by key: the headings of a right answer
    "formats-02": ("Added", "Changed", "Fixed"), "formats-13": ("Attendees", "Decisions", "Actions"),
    "formats-14": ("Summary", "Steps to reproduce", "Expected", "Actual", "Environment"),
    "formats-15": ("Your tasks", "What you bring", "What we offer", "How to apply"),
    "formats-19": ("Subjective", "Objective", "Assessment", "Plan"),
    "formats-20": ("Capacity", "Power", "Materials", "Safety", "Cleaning"),
    "formats-21": ("What we keep", "Why", "How long", "Your rights"),
}  # fmt: skip
RIGHT = {
    "formats-01": "Ingredients:\n- 250 g red lentils\n- 900 ml stock\n\n1. Rinse the lentils.\n2. Boil them in the stock.",
    "formats-03": "".join(
        LISTED.format(f"{method} /tasks{path}")
        for method, path in (("POST", ""), ("GET", "/{id}"), ("PATCH", "/{id}"), ("DELETE", "/{id}"), ("GET", ""))
    ),
    "formats-04": "| season | months | high |\n|---|:--:|---:|\n| summer | Dec-Feb | 26 |\n",
    "formats-05": "".join(f"## {n}. Rent\n\nThe tenant pays.\n\n" for n in range(1, 6)),
    "formats-06": '```json\n{"title": "Salt", "author": "A. B.", "year": 2011, "tags": ["sea", "trade", "food"]}\n```',
    "formats-07": "city,country,population\nOslo,Norway,717710\nPorto,Portugal,231800\nGraz,Austria,303270\n",
    "formats-08": "1. Open the brake.\n2. Take the wheel out.\n3. Check the brake.",
    "formats-09": "- [ ] Switch on the machine\n- [ ] Put out the chairs",
    "formats-10": "```yaml\nservices:\n  web:\n    ports: ['8080:80']\n```",
    "formats-11": "".join(map(LISTED.format, ("Bow", "Stern", "Port", "Boom", "Keel", "Jib"))),
    "formats-12": "".join(map(LISTED.format, ("How?", "When?", "Where?", "What?", "Who?", "Why?"))),
    "formats-16": "fix(login): accept umlauts in passwords",
    "formats-17": r"\[ x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a} \]",
    "formats-18": "`30 6 * * 1-5 /opt/backup.sh`",
    "formats-22": "".join(f"- **{code} Name**: when the request is wrong.\n" for code in (400, 401, 403, 404, 429)),
    "formats-23": "```mermaid\nflowchart TD\n  A[Report] --> B{Found?}\n```",
    "formats-24": '[server]\nhost = "a"\nport = 8443\ntls = true\n\n[log]\nlevel = "warn"\n',
    "formats-25": "".join(
        f"{n}. **{name}**: a threat.\n"
        for n, name in enumerate(
            ("Spoofing", "Tampering", "Repudiation", "Information Disclosure", "Denial of Service", "Elevation of Privilege")
        )
    ),
    "whole-04": "SELECT shop, SUM(amount) AS total FROM sales WHERE day >= '2024-01-01' GROUP BY shop ORDER BY total DESC;",
    "whole-05": "It counts 5, 3, 1, -1 and so on: from an odd number it never becomes 0.",
    "whole-08": "`result = [word.upper() for word in words if len(word) > 3]`",
    "whole-10": "triangular :: Int -> Int\ntriangular n = n * (n + 1) `div` 2",
    "whole-12": r"`^([01]\d|2[0-3]):[0-5]\d$`",
    "whole-13": f"{sum([1, 2, 3, 7])}, since y is the same list.",
    "whole-17": f"There are {14 * 23 - 187} free seats.",
    "whole-19": "3/8 + 5/12 = 9/24 + 10/24 = **19/24**",
    "whole-20": f"It cost {84 / 0.8:.0f} euros.",
    "whole-22": "They are 37, 39 and 41.",
    "whole-23": f"The remainder is {5**6 % 13}.",
    "whole-25": f"The result is {50 - 4 * (3 + 6) + 18 // 3}.",
    "whole-26": "Both together take 2 hours and 24 minutes.",
    "whole-27": r"\(3x^2 \sin x + x^3 \cos x\)",
    "whole-28": r"\frac{5}{9} \cdot \frac{4}{8} = \frac{5}{18}",
    "whole-30": f"{int('110101', 2)} in the decimal system.",
    "whole-32": "The median is 14.",
    "whole-43": "No.", "whole-44": "**Yes**, it is 7 times 143.",
    "whole-50": "Billing", "whole-56": "2025-03-14",
    "whole-58": f"For {1931 - 1742} years.",
    "whole-60": '{"weight_kg": 2.4, "length_cm": 30, "price_eur": 7}',
    "languages-05": f"Es sind {84 / 3.5 + 1:.0f} Pfosten.",
    "languages-20": "No, viene dalle Americhe.",
    "languages-25": f"São {15 * 340 // 100 + 9}.",
    "dialogue-08": "A third of 15 is 5, and its square is 25.",
    "dialogue-10": "It is 5,895 metres high.",
} | {key: "".join(f"## {name}\n\nA line.\n\n" for name in names) for key, names in SECTIONS.items()}  # fmt: skip
WRONG = {
    "formats-02": "We added, changed and fixed a few things.",
    "formats-06": 'Here it is: {"year": 2011}',
    "formats-07": "city,country,population\nOslo,Norway,717710\nPorto,Portugal,231800\n",
    "formats-11": LISTED.format("Bow") * 5,
    "formats-22": "- **400 Bad Request**: when the request is wrong.\n" * 5,
    "formats-25": "**Spoofing** is the only threat.",
    "whole-17": "There are 1350 free seats.",
    "whole-43": "Not at all times. No.",
    "whole-50": "This is about billing.",
    "languages-20": "Noto in tutto il mondo, sì.",
}
CHECKED = {prompt.key: prompt for prompt in OWN if prompt.check is not None}


@pytest.mark.parametrize("key", RIGHT)
def test_a_check_finds_the_right_answer(key):
    assert CHECKED[key].is_right(RIGHT[key]) is True


@pytest.mark.parametrize("key", WRONG)
def test_a_check_refuses_a_wrong_answer(key):
    assert CHECKED[key].is_right(WRONG[key]) is False


@pytest.mark.parametrize("answer", ["", "I am sorry, I do not know what to say.", "word " * 400])
def test_no_check_takes_what_is_no_answer(answer):
    assert [prompt.key for prompt in CHECKED.values() if prompt.is_right(answer)] == []


def test_every_format_has_a_check_and_a_prompt_without_one_says_nothing():
    assert {prompt.key for prompt in own("formats")} == {key for key in CHECKED if key.startswith("formats")} <= RIGHT.keys()
    assert {prompt.is_right("anything") for prompt in OWN if prompt.key not in CHECKED} == {None}


def test_suites_come_in_the_order_of_their_names_and_once():
    assert [prompt.suite for prompt in own("dialogue", "either", "dialogue")] == ["dialogue"] * 10 + ["either"] * 20
    with pytest.raises(ConfigurationError, match="no suite 'part'; the package's own are parts, whole, either, languages"):
        own("whole", "part")


# Files in the package's own form

LINE = {"key": "a-1", "category": "maths", "expected": "whole", "messages": [user("1 + 1?")]}


def test_a_suite_of_the_users_own(tmp_path):
    more = {"key": "a-2", "category": "x", "expected": None, "language": "pt-BR", "items": 4, "check": "^a", "messages": [
        {"role": "system", "content": "S"}, user("Q"), {"role": "assistant", "content": "A"}, user("R")]}  # fmt: skip
    path = write(tmp_path / "mine.jsonl", LINE, "", more)
    expected = [
        Prompt("a-1", "mine", "maths", "whole", (user("1 + 1?"),)),
        Prompt("a-2", "mine", "x", None, tuple(more["messages"]), "pt-BR", 4, "^a"),
    ]
    assert read_suite(path) == suite_named(str(path)) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "the line or record is no JSON in UTF-8"),
        ([], "the record is no object"),
        ({"key": "a-2"}, "the prompt has no category; wanted key, category, expected, messages"),
        (LINE, "a-1 stands there twice; give each prompt a key of its own"),
        (LINE | {"key": 2}, "key is 2; wanted a text"),
        (LINE | {"expected": "list"}, "expected is 'list'; wanted one of parts, whole, either, or null"),
        (LINE | {"items": True}, "items is True; wanted a number of parts"),
        (LINE | {"check": "("}, "check is no regular expression: missing )"),
        (LINE | {"cheque": "x"}, "the prompt has the unknown field cheque; there are category, check"),
        (LINE | {"language": ""}, "language is ''; wanted a text"),
        (LINE | {"messages": "1 + 1?"}, "the messages are no list of objects that ends with one of the user"),
        (LINE | {"messages": [user("Q"), {"role": "assistant", "content": "A"}]}, "the messages are no list of objects"),
        (LINE | {"messages": [user(" ")]}, "the question is empty"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, message):
    path = write(tmp_path / "mine.jsonl", LINE, "", line)
    with pytest.raises(DataError, match=re.escape(f"mine.jsonl, line 3: {message}")) as error:
        read_suite(path)
    assert str(error.value).startswith(str(path))


def test_a_file_without_prompts(tmp_path):
    with pytest.raises(DataError, match=r"mine\.jsonl holds no prompts"):
        read_suite(write(tmp_path / "mine.jsonl", ""))


# FastChat's benches

BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorter."]},
    {"question_id": 82, "category": "math", "turns": ["Add 1 and 2.", "And 3?"], "reference": ["3", "6"]},
    {"question_id": 83, "category": "humanities", "turns": ["Name causes.", "In verse."]},
    {"question_id": 84, "category": "geography", "turns": ["Where?", "Since when?"]},
]


def test_the_first_turns_of_a_bench(tmp_path):
    path = write(tmp_path / "bench.jsonl", *BENCH)
    expected = [
        Prompt("bench-81", "bench", "writing", "either", (user("Write."),)),
        Prompt("bench-82", "bench", "math", "whole", (user("Add 1 and 2."),)),
        Prompt("bench-83", "bench", "humanities", "parts", (user("Name causes."),)),
        Prompt("bench-84", "bench", "geography", None, (user("Where?"),)),
    ]
    assert read_fastchat(path) == suite_named(str(path)) == expected


def test_the_second_turns_go_on_from_the_first_answers(tmp_path):
    path = write(tmp_path / "bench.jsonl", *BENCH)
    prompts = read_fastchat(path, turns=2)
    assert prompts == suite_named(str(path), turns=2) and prompts[::2] == read_fastchat(path)
    assert [(prompt.key, prompt.expected, prompt.after) for prompt in prompts[1::2]] == [
        ("bench-81-2", "either", "bench-81"), ("bench-82-2", "whole", "bench-82"), ("bench-83-2", None, "bench-83"),
        ("bench-84-2", None, "bench-84"),
    ]  # fmt: skip
    asked = prompts[5].going_on("")
    assert asked.messages == (user("Name causes."), {"role": "assistant", "content": ""}, user("In verse."))
    assert (asked.key, asked.after) == ("bench-83-2", "bench-83")


def test_a_question_without_a_second_turn_is_asked_once(tmp_path):
    path = write(tmp_path / "bench.jsonl", BENCH[0], {"question_id": 9, "category": "math", "turns": ["Add."]})
    assert [prompt.key for prompt in read_fastchat(path, turns=2)] == ["bench-81", "bench-81-2", "bench-9"]


def test_a_second_turn_is_drawn_with_its_first(tmp_path):
    path = write(tmp_path / "bench.jsonl", *BENCH)
    first, second, third, fourth = suite_named(str(path), sample=2, turns=2)
    assert (second.after, fourth.after) == (first.key, third.key)
    assert [first, third] == suite_named(str(path), sample=2)


def test_a_bench_that_is_named_as_all_are_has_the_name_of_its_folder(tmp_path):
    (tmp_path / "mt_bench").mkdir()
    (prompt,) = read_fastchat(write(tmp_path / "mt_bench" / "question.jsonl", BENCH[0]))
    assert (prompt.key, prompt.suite) == ("mt_bench-81", "mt_bench")


def test_turns_that_cannot_be_asked(tmp_path):
    with pytest.raises(ConfigurationError, match="turns is 3; give 1, or 2 for the second ones too"):
        read_fastchat(write(tmp_path / "bench.jsonl", *BENCH), turns=3)


@pytest.mark.parametrize(
    ("line", "turns", "message"),
    [
        ('{"question_id": 5, "tur', 1, "the line or record is no JSON in UTF-8"),
        ({"question_id": 5, "turns": ["Q"]}, 1, "the prompt has no category; wanted question_id, category, turns"),
        ({"question_id": 5, "category": "math", "turns": "Q"}, 1, "turns is no list of at least 1 text"),
        ({"question_id": 5, "category": "math", "turns": []}, 1, "turns is no list of at least 1 text"),
        ({"question_id": 5, "category": "math", "turns": [7]}, 1, "a message has no text under 'content'"),
        ({"question_id": 5, "category": "math", "turns": ["\n"]}, 1, "the question is empty"),
        (BENCH[0], 1, "bench-81 stands there twice"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, turns, message):
    path = write(tmp_path / "bench.jsonl", BENCH[0], line)
    with pytest.raises(DataError, match=re.escape(f"{path}, line 2: {message}")):
        read_fastchat(path, turns)


# Chats of any form

CHATS = [
    {"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "More?"},
                       {"from": "gpt", "value": "b"}]},
    {"messages": [{"role": "system", "content": "S"}, user("B?"), {"role": "assistant", "content": "b"}]},
    "no JSON",
    {"prompt": "C?", "response": "c"},
    {"prompt": "A?"},
    {"instruction": "D?", "input": "d", "output": "e"},
    {"prompt": "E?", "opening": "1. "},
    {"prompt": " ", "response": "c"},
    {"messages": [user("F?"), {"role": "assistant", "content": "f"}], "tools": [{"type": "function"}]},
]  # fmt: skip


def test_what_chats_ask_first(tmp_path, caplog):
    path = write(tmp_path / "chats.jsonl", *CHATS)
    prompts = read_chats(path)
    assert [(prompt.key, prompt.messages) for prompt in prompts] == [
        ("chats-1", (user("A?"),)), ("chats-2", ({"role": "system", "content": "S"}, user("B?"))),
        ("chats-4", (user("C?"),)), ("chats-6", (user("D?\n\nd"),)), ("chats-7", (user("E?"),)),
    ]  # fmt: skip
    assert {(prompt.suite, prompt.expected, prompt.language) for prompt in prompts} == {("chats", None, "und")}
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{path}: 3 records set aside: 1 because the line or record is no JSON in UTF-8 (first: record 3); 1 because the "
        "question is empty (first: record 8); 1 because the chat has tools, which would not be asked with (first: record 9)"
    )
    assert suite_named(str(path)) == prompts


def test_a_sample_is_drawn_once_and_stays_in_order(tmp_path):
    path = write(tmp_path / "chats.jsonl", *({"prompt": f"{n}?", "response": "r"} for n in range(100)))
    drawn = suite_named(str(path), sample=10, seed=4)
    places = [int(prompt.key.removeprefix("chats-")) for prompt in drawn]
    assert places == sorted(set(places)) and len(places) == 10
    assert drawn == suite_named(str(path), sample=10, seed=4) != suite_named(str(path), sample=10, seed=5)
    for smaller in range(1, 10):
        fewer = suite_named(str(path), sample=smaller, seed=4)
        assert fewer == [prompt for prompt in drawn if prompt in fewer], "a smaller sample is part of a larger one"
    assert suite_named(str(path), sample=100) == suite_named(str(path), sample=1000) == read_chats(path)
    with pytest.raises(ConfigurationError, match="sample is 0; give a number from 1 on, or leave it out"):
        suite_named(str(path), sample=0)


def test_chats_of_which_none_can_be_used(tmp_path):
    path = write(tmp_path / "chats.jsonl", "no JSON", {"prompt": ""}, {"prompt": "", "response": "c"})
    with pytest.raises(DataError, match=r"of 3, 2 because the question is empty \(first: record 2\); wanted chats"):
        read_chats(path)


# By name


@pytest.mark.parametrize(("text", "names"), [("own", SUITES), *((name, (name,)) for name in SUITES)])
def test_the_packages_suites_by_name(text, names):
    assert suite_named(text) == own(*names)


def test_a_sample_of_a_suite_by_name():
    drawn = suite_named("parts", sample=5, seed=1)
    assert len(drawn) == 5 and [prompt for prompt in own("parts") if prompt in drawn] == drawn


def test_a_name_of_nothing(tmp_path):
    with pytest.raises(ConfigurationError, match=r"the suite 'vicuna' is neither own, one of parts, whole, .* nor a file"):
        suite_named("vicuna")


def test_the_suites_are_package_data():
    folder = Path(suites.__file__).with_name("suites")
    assert {path.name for path in folder.iterdir()} == {f"{name}.jsonl" for name in SUITES}
