"""FIELD T8: what of a chat reaches its template, what the template refuses, and that nothing typed becomes special."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from field_tokenizers import (
    GEMMA,
    LLAMA,
    MAKERS,
    QWEN3,
    VICUNA,
    ZEPHYR,
    byte_level,
    gemma,
    llama_metaspace,
    llama_normalizer,
)
from hf_apar import DataError, encode_chat
from hf_apar.cli.common import template_arguments
from hf_apar.data.distillation.distill import Question, TextAnswer, distill
from hf_apar.data.distillation.elaborate import elaborate
from hf_apar.data.distillation.samplers import Continuation
from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.errors import ConfigurationError
from hf_apar.training.mixture import training_mixture
from hf_apar.training.rows.features import chat_features
from hf_apar.training.tuning import Selection

NO_THOUGHT = {"enable_thinking": False}
LIST = "1. **Oak**: it grows very well indeed.\n2. **Ash**: it burns so well indeed.\n3. **Elm**: it stands here all day."
USER = {"role": "user", "content": "How do I rest?"}


def prepared(make, template):
    tokenizer = make(template)
    tokenizer.add_tokens(["[Fork]", "[Child]"], special_tokens=True)
    return tokenizer


TEMPLATES = {"vicuna": VICUNA, "llama": LLAMA, "zephyr": ZEPHYR, "gemma": GEMMA, "qwen3": QWEN3}
SETUPS = {
    f"{name}, {template}": prepared(make, text) for name, make in MAKERS.items() for template, text in TEMPLATES.items()
}


def rendered(tokenizer, chat, **options):
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **options)


def special_count(tokenizer, ids):
    special = {token for token, one in tokenizer.added_tokens_decoder.items() if one.special}
    return sum(token in special for token in ids)


@pytest.mark.parametrize("name", SETUPS)
def test_a_chat_without_typed_tokens_is_what_the_template_gives(name):
    tokenizer = SETUPS[name]
    chat = [USER, {"role": "assistant", "content": "1. **Sleep**"}, {"role": "user", "content": " And then?\n"}]
    assert encode_chat(tokenizer, chat) == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("name", SETUPS)
def test_t2_typed_special_tokens_stay_text_and_the_rest_reads_as_rendered(name):
    tokenizer = SETUPS[name]
    typed = f"x {tokenizer.eos_token} [Fork][Child]{tokenizer.bos_token} it grows"
    chat = [USER, {"role": "assistant", "content": typed}, {"role": "user", "content": typed}]
    plain = [message | {"content": message["content"].replace(tokenizer.eos_token, "")} for message in chat]
    plain = [message | {"content": message["content"].replace("[Fork][Child]", "")} for message in plain]
    plain = [message | {"content": message["content"].replace(tokenizer.bos_token, "")} for message in plain]
    ids = encode_chat(tokenizer, chat)
    text = tokenizer.decode(ids)
    wanted = rendered(tokenizer, chat)
    if tokenizer.decode(encode_chat(tokenizer, plain)) == rendered(tokenizer, plain):
        assert text == wanted  # else the tokenizer puts spaces after its special tokens
    assert "".join(text.split()) == "".join(wanted.split())
    assert special_count(tokenizer, ids) == special_count(tokenizer, encode_chat(tokenizer, plain))


def test_typed_tokens_stay_text_in_every_field():
    tokenizer = SETUPS["byte-level, qwen3"]
    typed = "a<|im_end|>[Fork]"
    call = {"type": "function", "function": {"name": typed, "arguments": {typed: [typed, 1, None]}}}
    chat = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": typed}]
    options = {"tools": [{"type": "function", "function": {"name": typed}}], "documents": [{"text": typed}]}
    ids = encode_chat(tokenizer, chat, chat_template_kwargs=options)
    assert tokenizer.decode(ids) == rendered(tokenizer, chat, **options)
    assert tokenizer.decode(ids).count("[Fork]") == 6
    assert tokenizer.convert_tokens_to_ids("[Fork]") not in ids
    assert ids.count(tokenizer.eos_token_id) == 5  # one for each turn, of tools and documents too


@given(st.lists(st.sampled_from(["a", " ", "\n", "[Fork]", "[Fo", "rk]", "<|im_end|>", "<|im_", "end|>", "é", "</think>"])))
def test_no_mixture_of_typed_parts_becomes_special(parts):
    tokenizer = SETUPS["byte-level, qwen3"]
    chat = [{"role": "user", "content": "".join(parts)}]
    ids = encode_chat(tokenizer, chat)
    assert tokenizer.decode(ids) == rendered(tokenizer, chat)
    assert special_count(tokenizer, ids) == 3


def test_variables_reach_the_template():
    tokenizer = byte_level()
    assert tokenizer.decode(encode_chat(tokenizer, [USER])).endswith("<|im_start|>assistant\n")
    without = encode_chat(tokenizer, [USER], chat_template_kwargs=NO_THOUGHT)
    assert tokenizer.decode(without).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    told = encode_chat(tokenizer, [USER], chat_template_kwargs={"tools": tools, "documents": [{"text": "Oaks grow."}]})
    assert told == tokenizer.apply_chat_template(
        [USER], tools=tools, documents=[{"text": "Oaks grow."}], add_generation_prompt=True, return_dict=False
    )
    own = encode_chat(tokenizer, [USER], chat_template_kwargs={"chat_template": "{{ messages[0].content }}"})
    assert tokenizer.decode(own) == USER["content"]


@pytest.mark.parametrize("name", ["tokenize", "messages", "return_dict", "add_generation_prompt"])
def test_what_is_no_variable_is_refused(name):
    with pytest.raises(DataError, match=f"chat_template_kwargs has {name}"):
        encode_chat(byte_level(), [USER], chat_template_kwargs={name: True})


def test_content_parts_reach_a_template_that_knows_them_and_others_get_their_text():
    parts = [{"type": "text", "text": "Oak"}, {"type": "text", "text": "and [Fork]"}]
    chat = [{"role": "user", "content": parts}]
    plain = prepared(byte_level, "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert plain.decode(encode_chat(plain, chat)) == "Oak\nand [Fork]"
    adding = prepared(llama_normalizer, VICUNA)
    assert adding.decode(encode_chat(adding, chat)).replace("<s> ", "<s>") == "<s>USER: Oak\nand [Fork] ASSISTANT:"
    knowing = prepared(byte_level, "{% for part in messages[0].content %}({{ part.text }}){% endfor %}")
    assert knowing.decode(encode_chat(knowing, chat)) == "(Oak)(and [Fork])"
    with pytest.raises(DataError, match="a part that is no text but 'image', and the chat template takes text alone"):
        encode_chat(plain, [{"role": "user", "content": [*parts, {"type": "image", "url": "x"}]}])


SHOWN = "{% for m in messages %}{{ m.content @ }}{% endfor %}"
ONLY_TEXT = "{% for p in messages[0].content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
EITHER = "{% set c = messages[0].content %}{% if c is string %}{{ c }}{% else %}" + ONLY_TEXT + "{% endif %}"


@pytest.mark.parametrize(
    ("template", "kind", "expected"),
    [
        *((SHOWN.replace("@", how), kind, "A'\nB") for how in ("", "| trim", "| string") for kind in ("text", "input_text")),
        (SHOWN.replace("@", "| tojson"), "text", json.dumps("A'\nB")),
        (EITHER, "text", "A'B"),
        (EITHER, "input_text", "A'\nB"),
    ],
)
def test_parts_never_reach_a_model_as_a_list_is_written(template, kind, expected):
    """FIELD T8: parts of another type than text were written as Python's lists are, and others were left out."""
    tokenizer = prepared(byte_level, template)
    chat = [{"role": "user", "content": [{"type": kind, "text": text} for text in ("A'", "B")]}]
    assert tokenizer.decode(encode_chat(tokenizer, chat)) == expected


@pytest.mark.parametrize(
    ("make", "chat", "words"),
    [
        (gemma, [{"role": "system", "content": "Be brief."}, USER], "System role not supported"),
        (llama_metaspace, [USER, USER], "Conversation roles must alternate"),
    ],
)
def test_what_a_template_refuses_is_said_in_its_words(make, chat, words):
    with pytest.raises(DataError, match=f"the chat template refuses this chat: {words}"):
        encode_chat(make(), chat)


def test_a_base_without_a_template_is_told_what_to_do():
    tokenizer = llama_normalizer(None)
    with pytest.raises(DataError, match=r"has no chat template.*set tokenizer.chat_template"):
        encode_chat(tokenizer, [USER])
    own = encode_chat(tokenizer, [USER], chat_template_kwargs={"chat_template": VICUNA})
    assert own == encode_chat(llama_normalizer(VICUNA), [USER])


def test_what_is_trained_after_a_thinking_template_is_what_is_decoded():
    """Earlier thoughts are cut off as the template does it; the answer follows the very prompt of decoding."""
    tokenizer = SETUPS["byte-level, qwen3"]
    fork, child = tokenizer.convert_tokens_to_ids(["[Fork]", "[Child]"])
    chat = [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYou sleep."},
        USER,
        {"role": "assistant", "content": TextThread(("Two:", TextThread((" it grows",)), "\nBye."))},
    ]
    for variables in (None, NO_THOUGHT):
        (row,) = chat_features(chat, tokenizer, fork, child, tokenizer.eos_token_id, chat_template_kwargs=variables)
        prompt = encode_chat(tokenizer, chat[:3], chat_template_kwargs=variables)
        assert row.input_ids[: len(prompt)] == prompt
        text = tokenizer.decode(prompt)
        assert "hm" not in text and "You sleep." in text
        assert tokenizer.decode(row.input_ids[len(prompt) :]) == "Two:[Fork][Child] it grows\nBye."
        assert ("<think>" in text) is (variables is not None)
    mixture = training_mixture(
        [TextAnswer(f"{number}?", LIST) for number in range(4)], tokenizer, (fork, child),
        Selection(max_repetition=1.0, held_out=0.3), chat_template_kwargs=NO_THOUGHT,
    )  # fmt: skip
    assert all("<think>\n\n</think>\n\n1. **Oak" in tokenizer.decode(row.input_ids) for row in mixture.held_out)


class Writes:
    def __init__(self):
        self.prompts = []

    def __call__(self, tasks):
        self.prompts += [task.prompt for task in tasks]
        return [Continuation("it does.", True) for _ in tasks]


def test_distilling_and_elaborating_take_variables_and_remember_them(tmp_path):
    tokenizer, sample, path = byte_level(), Writes(), tmp_path / "answers.jsonl"
    questions = [Question("Why?"), Question("How?")]
    list(distill(sample, tokenizer, questions, path, chat_template_kwargs=NO_THOUGHT))
    answers = [TextAnswer("Why?", LIST)]
    longer = tmp_path / "longer.jsonl"
    list(elaborate(sample, tokenizer, answers, longer, chat_template_kwargs=NO_THOUGHT))
    assert len(sample.prompts) > 2
    assert all("assistant\n<think>\n\n</think>\n\n" in tokenizer.decode(prompt) for prompt in sample.prompts)
    with pytest.raises(DataError, match="other settings"):
        next(distill(sample, tokenizer, questions, path))
    with pytest.raises(DataError, match="other settings"):
        next(elaborate(sample, tokenizer, answers, longer, chat_template_kwargs={"enable_thinking": True}))


def test_the_command_line_takes_a_json_object():
    assert template_arguments(None) is None and template_arguments("{}") == {}
    assert template_arguments(json.dumps(NO_THOUGHT)) == NO_THOUGHT
    for wrong in ("enable_thinking=false", "[1]", "false"):
        with pytest.raises(ConfigurationError, match="takes a JSON object such as"):
            template_arguments(wrong)
