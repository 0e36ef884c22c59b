"""Text encoded and decoded in parts, with every tokenizer of the field: it reads as it was, and nothing typed is special."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from field_tokenizers import DUMMY_PREFIX, LLAMA, MAKERS, VICUNA, ZEPHYR, byte_level, llama_metaspace, llama_normalizer
from hf_apar.choice.stopping import stop_string_criteria
from hf_apar.cli.live import coloured
from hf_apar.data.distillation.samplers import Continuation, Task, _Row, line_ends
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.errors import DataError
from hf_apar.serving.reading import IncrementalText
from hf_apar.text.chat import encode_chat
from hf_apar.text.encoding import answer_text, decode_text, encode_answer, encode_text, token_texts
from hf_apar.training.rows.features import tree_features
from hf_apar.tree.threads import ParagraphTree, Thread


def with_control(make):
    tokenizer = make()
    tokenizer.add_tokens(["[Fork]", "[Child]"], special_tokens=True)
    return tokenizer


TOKENIZERS = {name: with_control(make) for name, make in MAKERS.items()}
TYPED = ["[Fork]", "[Child]", "</s>", "<s>", "<|im_end|>", "<end_of_turn>", "<0x0A>", "<think>", " ", "  ", "\n2. **Oak**:"]
ANYTHING = st.text(st.characters(codec="utf-8", exclude_characters="▁"), min_size=1)  # the mark of a space, in sentencepiece
KNOWN = st.text([*map(chr, range(32, 127)), "\n"], min_size=1)  # of the Unigram model


def trees(letters):
    text = st.lists(letters | st.sampled_from(TYPED), min_size=1, max_size=3).map("".join)
    return st.recursive(
        st.builds(lambda one: TextThread((one,)), text),
        lambda inner: st.builds(
            lambda parts: TextThread(tuple(piece for pair in parts for piece in pair)),
            st.lists(st.tuples(text, inner), min_size=1, max_size=3),
        ),
        max_leaves=4,
    )


def row_of(tokenizer, prompt, tree):
    """Return the answer's tokens without control tokens."""
    fork, child = tokenizer.convert_tokens_to_ids(["[Fork]", "[Child]"])
    row = tree_features(prompt, tree, tokenizer, fork, child, tokenizer.eos_token_id)
    assert row.input_ids.count(fork) == row.input_ids.count(child) == tree.fork_count, "typed control text is text"
    return [token for token in row.input_ids[len(prompt) :] if token not in (fork, child)]


def check_row(tokenizer, prompt, tree):
    ids = row_of(tokenizer, prompt, tree)
    assert tokenizer.decode(ids, skip_special_tokens=True) == tree.text
    assert not {token for token, one in tokenizer.added_tokens_decoder.items() if one.special} & set(ids)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "unigram"])
@given(tree=trees(ANYTHING), end=st.sampled_from(["ASSISTANT:", "assistant\n", "go: "]))
def test_t2_any_tree_of_any_text_decodes_to_the_very_answer(name, tree, end):
    tokenizer = TOKENIZERS[name]
    check_row(tokenizer, tokenizer.encode(f"Say {end}", add_special_tokens=False), tree)


@given(tree=trees(KNOWN), end=st.sampled_from(["ASSISTANT:", "assistant\n", "go: "]))
def test_t2_a_unigram_model_too_of_the_text_that_it_knows(tree, end):
    tokenizer = TOKENIZERS["unigram"]
    check_row(tokenizer, tokenizer.encode(f"Say {end}", add_special_tokens=False), tree)


LIST = TextThread(("Two:\n\n1. **Oak**:", TextThread((" it grows",)), "\n2. **Ash**:", TextThread((" it burns",))))


@pytest.mark.parametrize("name", MAKERS)
def test_t2_no_space_comes_between_the_pieces_of_a_list(name):
    """FIELD T2: rows read ``**Oak**:  it grows`` and `` \\n2.``."""
    tokenizer = TOKENIZERS[name]
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "Name two."}])
    ids = row_of(tokenizer, prompt, LIST)
    before = tokenizer.decode(prompt)
    lead = " " if name in DUMMY_PREFIX and not before[-1].isspace() else ""
    assert tokenizer.decode(prompt + ids) == before + lead + "Two:\n\n1. **Oak**: it grows\n2. **Ash**: it burns"


@pytest.mark.parametrize("make", [llama_normalizer, llama_metaspace])
@pytest.mark.parametrize("template", [VICUNA, LLAMA, ZEPHYR], ids=["vicuna", "llama", "zephyr"])
def test_t2_an_answer_begins_as_its_template_writes_it(make, template):
    """The oracle is the whole chat in the template, encoded as one text."""
    tokenizer = make(template)
    chat = [{"role": "user", "content": "How do I rest?"}, {"role": "assistant", "content": "You sleep."}]
    prompt, whole = encode_chat(tokenizer, chat[:1]), encode_chat(tokenizer, chat, add_generation_prompt=False)
    ids = encode_answer(tokenizer, prompt, "You sleep.")
    assert whole[: len(prompt) + len(ids)] == prompt + ids


@pytest.mark.parametrize("name", ["bytes", "byte-level", "gemma"])
@given(text=st.text() | st.sampled_from(TYPED))
def test_a_tokenizer_without_dummy_prefix_encodes_and_decodes_as_ever(name, text):
    tokenizer = TOKENIZERS[name]
    plain = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert encode_text(tokenizer, text) == encode_answer(tokenizer, plain, text) == plain
    assert decode_text(tokenizer, plain) == tokenizer.decode(plain, skip_special_tokens=True)
    assert answer_text(tokenizer, text) == text


@pytest.mark.parametrize("name", MAKERS)
@given(parts=st.lists(KNOWN, min_size=1, max_size=4))
def test_parts_decode_as_they_stand_in_the_whole(name, parts):
    tokenizer = TOKENIZERS[name]
    ids = [encode_text(tokenizer, part) for part in parts]
    assert [decode_text(tokenizer, one) for one in ids] == parts
    assert decode_text(tokenizer, [token for one in ids for token in one]) == "".join(parts)


@pytest.mark.parametrize("name", MAKERS)
def test_tokens_by_themselves_keep_their_space(name):
    tokenizer = TOKENIZERS[name]
    texts = token_texts(tokenizer)
    assert " " in texts and (name == "bytes" or " grow" in texts)
    special = {token for token, one in tokenizer.added_tokens_decoder.items() if one.special}
    assert all(decode_text(tokenizer, [token]) == text for token, text in enumerate(texts) if token not in special)
    ends = [token_texts(tokenizer)[token] for token in line_ends(tokenizer) if token not in tokenizer.all_special_ids]
    assert ends and all("\n" in text for text in ends)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "unigram"])
@given(prompt=ANYTHING, text=st.text("a \n字é🌳.", min_size=1, max_size=60))
def test_t2_a_stream_reads_as_the_whole(name, prompt, text):
    """Long rows of letters that are bytes, too: a window that began within one would lose them all."""
    tokenizer = TOKENIZERS[name]
    before = encode_text(tokenizer, prompt)
    ids = encode_text(tokenizer, text)
    stream = IncrementalText(tokenizer, before)
    assert "".join([*map(stream.step, ids), stream.flush()]) == text


@pytest.mark.parametrize("name", MAKERS)
def test_t2_a_live_view_keeps_the_spaces_between_segments(name):
    tokenizer = TOKENIZERS[name]
    root = Thread(0, None, 0, 1, [], finish_reason="eos")
    tree = ParagraphTree([root])
    prompt = tokenizer.encode("Say: ", add_special_tokens=False)
    for place, piece in enumerate(LIST.pieces):
        ids = encode_answer(tokenizer, prompt, piece) if not place else encode_text(tokenizer, getattr(piece, "text", piece))
        if isinstance(piece, str):
            root.tokens += ids
        else:
            number = len(tree.threads)
            tree.threads.append(Thread(number, 0, len(root.tokens), 2, [], tokens=ids, finish_reason="eos"))
    assert str(coloured(tree, tokenizer)) == LIST.text == tokenizer.decode(tree.token_ids)


@pytest.mark.parametrize("name", MAKERS)
def test_t2_a_sampled_text_goes_on_after_its_prompt_and_stops_where_it_should(name):
    tokenizer = TOKENIZERS[name]
    eos = {tokenizer.eos_token_id}
    row = _Row(tokenizer, Task([1], 60, stop="\n2."), eos)
    for token in encode_text(tokenizer, " it grows\n2. **Ash**"):
        row.append(token)
    assert row.written == Continuation(" it grows", True)
    least = len(encode_text(tokenizer, " it grows."))
    row = _Row(tokenizer, Task([1], 90, sentence_after=least + 1), eos)
    for token in encode_text(tokenizer, " it grows. It is a tree. And so on"):
        row.append(token)
    assert row.written == Continuation(" it grows. It is a tree.", True)


@pytest.mark.parametrize("stop", ["\n2.", ": it", "grows\n"])
@pytest.mark.parametrize("name", MAKERS)
def test_t2_a_stop_string_is_found_across_pieces(name, stop):
    """What ``generate`` stops by: at the token that completes it in the text of all."""
    tokenizer = TOKENIZERS[name]
    ids = row_of(tokenizer, tokenizer.encode("Say:"), LIST)
    texts = [tokenizer.decode(ids[:end]) for end in range(1, len(ids) + 1)]
    (criterion,) = stop_string_criteria(stop, tokenizer)
    found = [bool(criterion(torch.tensor([ids[:end]]), None)[0]) for end in range(1, len(ids) + 1)]
    assert found.index(True) == [stop in text for text in texts].index(True)


def test_a_stop_within_letters_that_are_bytes_is_found():
    tokenizer = TOKENIZERS["llama-normalizer"]
    row = _Row(tokenizer, Task([1], 90, sentence_after=2), {tokenizer.eos_token_id})
    for token in encode_text(tokenizer, "茶は体によい。水もよい。"):
        row.append(token)
    assert row.written == Continuation("茶は体によい。", True)


def test_what_a_tokenizer_cannot_write_is_refused_and_what_it_normalises_is_taken():
    fork, child = TOKENIZERS["unigram"].convert_tokens_to_ids(["[Fork]", "[Child]"])
    with pytest.raises(DataError, match="cannot write the answer '茶'"):
        tree_features([5], TextThread(("茶",)), TOKENIZERS["unigram"], fork, child, TOKENIZERS["unigram"].eos_token_id)
    normal = byte_level()
    normal.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    row = tree_features([5], TextThread(("Ｏａｋ ﬁne",)), normal, 1000, 1001, 1002)
    assert normal.decode(row.input_ids[1:]) == "oak fine"
