"""The stock text-generation pipeline on an enabled model."""

import pytest
import torch
from transformers import TextIteratorStreamer, pipeline

from hf_apar import ControlTokenError, enable_apar, encode_chat
from tiny_chat_model import tiny_chat_model

QUESTIONS = ["Why?", "How many of them are there?", "When was it?"]
OPTIONS = {"max_new_tokens": 60, "do_sample": False}


@pytest.fixture(scope="module")
def both():
    tokenizer, model = tiny_chat_model()
    tokenizer.padding_side = "left"
    return enable_apar(model, tokenizer), tokenizer


@pytest.fixture(scope="module")
def pipe(both):
    return pipeline("text-generation", model=both[0], tokenizer=both[1])


def answer(both, ids, **options):
    """The oracle: generate on the same ids."""
    model, tokenizer = both
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    out = model.generate(**inputs, apar=True, return_dict_in_generate=True, **OPTIONS | options)
    return out.trees[0].text(tokenizer), len(out.trees[0].threads)


def chat(question):
    return [{"role": "user", "content": question}]


def test_a_string_and_a_list_of_strings(both, pipe):
    expected = [answer(both, both[1].encode(question)) for question in QUESTIONS]
    assert max(threads for _, threads in expected) > 1, "the model must fork for this test to mean anything"
    one = pipe(QUESTIONS[0], apar=True, **OPTIONS)[0]["generated_text"]
    assert one == QUESTIONS[0] + expected[0][0]
    for batch_size in (1, 3):
        many = pipe(QUESTIONS, apar=True, return_full_text=False, batch_size=batch_size, **OPTIONS)
        assert [records[0]["generated_text"] for records in many] == [text for text, _ in expected]


def test_a_chat_and_a_batch_of_chats(both, pipe):
    expected = [answer(both, encode_chat(both[1], chat(question)))[0] for question in QUESTIONS]
    one = pipe(chat(QUESTIONS[0]), apar=True, **OPTIONS)[0]["generated_text"]
    assert one[-1] == {"role": "assistant", "content": expected[0]}
    many = pipe([chat(question) for question in QUESTIONS], apar=True, batch_size=2, **OPTIONS)
    assert [records[0]["generated_text"][-1]["content"] for records in many] == expected


def test_apar_may_be_given_once_when_the_pipeline_is_made(both):
    made = pipeline("text-generation", model=both[0], tokenizer=both[1], apar=True)
    text, _ = answer(both, both[1].encode(QUESTIONS[0]))
    assert made(QUESTIONS[0], return_full_text=False, **OPTIONS)[0]["generated_text"] == text
    plain = made(QUESTIONS[0], return_full_text=False, apar=False, **OPTIONS)[0]["generated_text"]
    assert plain != text


def test_several_answers_streaming_and_stop_sequences(both, pipe):
    assert len(pipe(QUESTIONS[0], apar=True, num_return_sequences=3, max_new_tokens=20, do_sample=True)) == 3
    streamer = TextIteratorStreamer(both[1], skip_prompt=True, skip_special_tokens=True, timeout=60)
    out = pipe(QUESTIONS[0], apar=True, return_full_text=False, streamer=streamer, **OPTIONS)
    assert "".join(streamer) == out[0]["generated_text"]
    whole = out[0]["generated_text"]
    stop = whole[2:4]
    cut = pipe(QUESTIONS[0], apar=True, return_full_text=False, stop_strings=stop, tokenizer=both[1], **OPTIONS)[0][
        "generated_text"
    ]
    assert cut == whole[: whole.index(stop) + len(stop)]


def test_typed_control_text_never_forks(both, pipe):
    with pytest.raises(ControlTokenError, match="split_special_tokens=True"):
        pipe(chat("What does [Fork] mean?"), apar=True, **OPTIONS)
    text, _ = answer(both, encode_chat(both[1], chat("What does [Fork] mean?")))
    assert isinstance(text, str)
