"""A tree of text as one row of tokens: each thread, read through the mask, is its path and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from byte_tokenizer import byte_tokenizer
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.errors import ControlTokenError, DataError
from hf_apar.text.chat import encode_chat
from hf_apar.training.rows.features import IGNORED, TreeFeatures, chat_features, tree_features, truncate

TOKENIZER = byte_tokenizer()
TOKENIZER.add_tokens(["[Fork]", "[Child]"], special_tokens=True)
FORK, CHILD, EOS = (TOKENIZER.convert_tokens_to_ids(token) for token in ("[Fork]", "[Child]", "<|im_end|>"))
PROMPT = TOKENIZER.encode("Q:")

WORDS = st.text("ab[Fork]Child<|im_end|>\n é", min_size=1, max_size=8)


def threads(children):
    """Threads that start with text and never fork twice in one place; some end in a fork."""
    parts = st.lists(st.tuples(WORDS, children), max_size=3)
    return st.builds(
        lambda first, parts, last: TextThread((first, *(x for word, child in parts for x in (child, word)), *last)),
        WORDS, parts, st.one_of(st.just(()), st.tuples(children)),
    )  # fmt: skip


TREES = st.recursive(st.builds(lambda text: TextThread((text,)), WORDS), threads, max_leaves=6)


def features_of(tree):
    return tree_features(PROMPT, tree, TOKENIZER, FORK, CHILD, EOS)


def tree_paths(tree, path=tuple(PROMPT), first=True):
    """Oracle, from the text alone: (path, targets) of each thread in reading order, -100 for what others own."""
    own, below = list(path), []
    for piece in tree.pieces:
        if isinstance(piece, TextThread):
            own.append(FORK)
            below.append((piece, (*own, CHILD)))
        else:
            own += TOKENIZER.encode(piece, split_special_tokens=True)
    start = len(path) - 1
    yield own, [-100] * start + own[start + 1 :] + [EOS]
    for child, prefix in below:
        yield from tree_paths(child, prefix, first=False)


def row_paths(row):
    """The same, read from a row: what the last token of each thread sees, and the targets of the thread's own tokens."""
    starts = [0, *(i for i, token in enumerate(row.input_ids) if token == CHILD)]
    for start in starts:
        end = row.visible_until[start]
        own = [i for i in range(start, end) if row.visible_until[i] == end and not _in_child(row, start, i)]
        seen = [j for j in range(own[-1] + 1) if j <= own[-1] < row.visible_until[j]]
        targets = [row.shift_labels[j] if j in own else -100 for j in seen]
        assert [row.position_ids[j] for j in seen] == list(range(len(seen)))
        yield [row.input_ids[j] for j in seen], targets


def _in_child(row, start, index):
    """Is ``index`` in a thread that starts within this one? (A last child ends where its parent does.)"""
    return any(row.input_ids[c] == CHILD and index < row.visible_until[c] for c in range(start + 1, index + 1))


@given(TREES)
def test_a_row_holds_each_thread_as_its_path_alone(tree):
    assert sorted(row_paths(features_of(tree))) == sorted(tree_paths(tree))


@given(TREES)
def test_each_token_of_the_answer_is_a_target_once(tree):
    row = features_of(tree)
    fed = [token for token in row.input_ids[len(PROMPT) :] if token != CHILD]
    ends = [EOS] * (1 + tree.fork_count)
    assert sorted(label for label in row.shift_labels if label != -100) == sorted([*fed, *ends])


def test_a_row_as_a_literal_table():
    a, b, c, d = TOKENIZER.encode("abcd")
    row = features_of(TextThread(("a", TextThread(("bc",)), "d")))
    assert row.to_dict() == {
        "input_ids": [*PROMPT, a, FORK, CHILD, b, c, d],
        "position_ids": [0, 1, 2, 3, 4, 5, 6, 4],
        "visible_until": [8, 8, 8, 8, 7, 7, 7, 8],
        "shift_labels": [-100, a, FORK, d, b, c, EOS, EOS],
        "fork_banned": [],
        "children": [4],
    }


def test_a_parent_that_ends_in_a_fork_has_eos_as_the_forks_target():
    row = features_of(TextThread(("a", TextThread(("b",)))))
    assert row.shift_labels[3] == EOS and row.input_ids[3] == FORK


@pytest.mark.parametrize(
    ("prompt", "tree", "message"),
    [
        ([], TextThread(("a",)), "the prompt has no tokens"),
        (PROMPT, TextThread(("a", TextThread(()))), "a forked thread has no tokens"),
        (PROMPT, TextThread(("a", TextThread(("b",)), TextThread(("c",)))), "forks before 'c' with no token"),
        (PROMPT, TextThread(("a", TextThread((TextThread(("b",)),)))), "forks before 'b' with no token"),
    ],
)
def test_trees_that_the_protocol_forbids(prompt, tree, message):
    with pytest.raises(DataError, match=message):
        tree_features(prompt, tree, TOKENIZER, FORK, CHILD, EOS)


def test_text_that_a_tokenizer_normalises_to_a_control_token_is_spelt():
    careless = byte_tokenizer()
    careless.backend_tokenizer.normalizer = normalizers.Lowercase()
    careless.add_tokens([AddedToken("[fork]", normalized=True)])  # not special, and found in [FORK] too
    fork = careless.convert_tokens_to_ids("[fork]")
    for text in ("[fork]", "[FORK]"):
        row = tree_features(PROMPT, TextThread((text,)), careless, fork, CHILD + 1, EOS)
        written = [token for token in row.input_ids[len(PROMPT) :] if token != EOS]
        assert fork not in written and careless.decode(written) == "[fork]"


def test_a_control_token_that_no_text_can_spell_is_refused():
    careless = byte_tokenizer()
    careless.add_tokens([AddedToken("¤", normalized=False)])  # one letter cannot be cut in two
    fork = careless.convert_tokens_to_ids("¤")
    with pytest.raises(ControlTokenError, match="made the control tokens"):
        tree_features(PROMPT, TextThread(("¤",)), careless, fork, CHILD + 1, EOS)


def depths(row):
    starts = [i for i, token in enumerate(row.input_ids) if token == CHILD]
    return sorted(sum(start < row.visible_until[above] for above in starts if above <= start) for start in starts)


@given(TREES, st.integers(1, 60))
def test_truncation_leaves_whole_threads_as_they_were(tree, limit):
    row = features_of(tree)
    cut = truncate(row, limit)
    whole, left = sorted(row_paths(row)), sorted(row_paths(cut))
    assert all(left.count(path) <= whole.count(path) for path in left)
    assert next(row_paths(cut)) == next(row_paths(row)), "the root stays"
    assert depths(cut) == depths(row)[: len(depths(cut))], "the deepest go first"
    assert len(cut) <= limit or CHILD not in cut.input_ids
    assert cut == row or len(truncate(row, len(cut))) == len(cut)
    assert (cut == row) == (len(row) <= limit or CHILD not in row.input_ids), "no thread goes without need"


def test_truncation_keeps_the_marks_of_the_places_that_stay():
    row = TreeFeatures([5, 8, 9, 6, 7], [0, 1, 2, 3, 2], [5, 5, 4, 4, 5], [8, 7, 6, 2, 2], [0, 3, 4], [2])
    assert truncate(row, 4).fork_banned == [0, 2]


def test_the_last_of_the_deepest_threads_goes_first():
    def detail(text, *pieces):
        return TextThread((text, *pieces))

    tree = TextThread(("a", detail("b", detail("c")), "d", detail("e", detail("f")), "g", detail("h")))
    row = features_of(tree)
    texts = []
    for limit in range(len(row), len(PROMPT), -1):
        text = TOKENIZER.decode([t for t in truncate(row, limit).input_ids[len(PROMPT) :] if t not in (FORK, CHILD)])
        texts += [text] if text not in texts else []
    assert texts == ["abcdefgh", "abcdegh", "abdegh", "abdeg", "abdg", "adg"]


def test_each_answer_of_a_chat_follows_the_plain_chat_before_it():
    first = TextThread(("one:", TextThread((" [Fork]",)), "\ntwo"))
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "[Child]?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "More."},
        {"role": "assistant", "content": "context alone"},
        {"role": "user", "content": "And?<|im_end|>"},
        {"role": "assistant", "content": TextThread(("no list",))},
    ]
    rows = chat_features(chat, TOKENIZER, FORK, CHILD, EOS)
    plain = [message | {"content": getattr(message["content"], "text", message["content"])} for message in chat]
    assert len(rows) == 2
    for row, place in zip(rows, (2, 6), strict=True):
        prompt = encode_chat(TOKENIZER, plain[:place])
        assert row == tree_features(prompt, chat[place]["content"], TOKENIZER, FORK, CHILD, EOS)
        assert row.shift_labels[: len(prompt) - 1] == [IGNORED] * (len(prompt) - 1)
        rendered = TOKENIZER.apply_chat_template(plain[:place], tokenize=False, add_generation_prompt=True)
        assert TOKENIZER.decode(row.input_ids[: len(prompt)], clean_up_tokenization_spaces=False) == rendered
        assert FORK not in prompt and CHILD not in prompt, "typed control text is text, in earlier answers too"


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([{"role": "user", "content": TextThread(("a",))}], "a message of the role 'user' is a tree"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "no answer of the chat is a TextThread"),
    ],
)
def test_chats_that_cannot_be_learnt_from(chat, message):
    with pytest.raises(DataError, match=message):
        chat_features(chat, TOKENIZER, FORK, CHILD, EOS)


CHATS = st.lists(st.builds(lambda text: {"role": "user", "content": text}, st.text("ab \n[Fork]<|im_end|>é")), min_size=1)


@given(CHATS)
def test_a_chat_is_what_the_template_gives_with_typed_control_text_as_text(chat):
    ids = encode_chat(TOKENIZER, chat)
    text = TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text
    assert FORK not in ids and CHILD not in ids
    assert ids.count(EOS) == len(chat)


def test_a_plain_chat_equals_apply_chat_template():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!\n"}]
    for prompt in (True, False):
        expected = TOKENIZER.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
        assert encode_chat(TOKENIZER, chat, add_generation_prompt=prompt) == expected


def test_templates_that_trim_are_followed_and_others_refused():
    chat = [{"role": "user", "content": " [Fork]\n"}]
    trimming = byte_tokenizer("{{ messages[0]['content'] | trim }}<|im_end|>")
    trimming.add_tokens(["[Fork]"], special_tokens=True)
    assert trimming.decode(encode_chat(trimming, chat)) == "[Fork]<|im_end|>"
    assert trimming.convert_tokens_to_ids("[Fork]") not in encode_chat(trimming, chat)
    shouting = byte_tokenizer("{{ messages[0]['content'] | replace('F', 'f') }}")
    shouting.add_tokens(["[Fork]"], special_tokens=True)
    with pytest.raises(DataError, match="cannot be followed"):
        encode_chat(shouting, chat)
    with pytest.raises(DataError, match="it must be a string"):
        encode_chat(shouting, [{"role": "user", "content": None}])
