"""Tokenizers of the kinds that chat models in the field have, trained here on a few sentences: no file from outside.

``byte-level`` is a BPE with merges as Qwen's; ``llama-normalizer`` and ``llama-metaspace`` are Llama 2's in the two forms
in which it is published, whose pieces encoded apart begin with a dummy space; ``metaspace-always`` has one after each
special token too, and a decoder of its own; ``gemma`` has none; ``unigram`` is that of XGLM.
"""

import json
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from byte_tokenizer import byte_tokenizer

SENTENCES = (
    "Here are three ways to rest well: sleep, walk and listen to music.",
    "1. **Sleep**: it helps the body to grow. 2. **Walk**: it is free. 3. **Music**: it calms you down.",
    "What is the answer to this question? The answer is that it depends on what you want to do.",
    "USER: How do I rest? ASSISTANT: You sleep. The oak grows slowly, the ash burns well and the elm is rare.",
) * 3

VICUNA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAMA = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# as Qwen3's: earlier thoughts are cut off, an empty one stands before the last answer, or in the prompt where none is wanted
QWEN3 = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% if documents %}{{ '<|im_start|>system\n' + documents[0]['text'] + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% if message['content'] %}{{ message['content'].split('</think>')[-1].lstrip('\n') }}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>\n' + (call['function'] | tojson) + '\n</tool_call>' }}"
    "{% endfor %}{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)

_ALPHABET = "".join(map(chr, range(33, 127)))
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def _merges():
    """Return words and merges of a sentencepiece-like BPE, learnt within words that begin with their space."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trainer = trainers.BpeTrainer(vocab_size=260, initial_alphabet=list(_ALPHABET), show_progress=False)
    learner.train_from_iterator(SENTENCES, trainer)
    learnt = json.loads(learner.to_str())["model"]
    return list(learnt["vocab"]), [tuple(merge) for merge in learnt["merges"]]


def _vocabulary(special):
    words, merges = _merges()
    spaces = ["▁" * 2, "▁" * 4]  # Llama 2 has them, for code
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*special, *_BYTES, *words, *spaces]))}
    return vocabulary, [*merges, ("▁", "▁"), ("▁▁", "▁▁")]


def _llama_decoder():
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _fast(backend, template, **special):
    backend.add_special_tokens(sorted({*special.values()}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    return tokenizer


def _sentencepiece_bpe(special=("<unk>", "<s>", "</s>")):
    vocabulary, merges = _vocabulary(special)
    return Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))


def llama_normalizer(template=VICUNA):
    backend = _sentencepiece_bpe()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = _llama_decoder()
    return _fast(backend, template, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def llama_metaspace(template=LLAMA):
    """What ``LlamaTokenizer`` is in transformers 5; like Llama 2's own, it has no padding token."""
    vocabulary, merges = _vocabulary(("<unk>", "<s>", "</s>"))
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.chat_template = template
    return tokenizer


def metaspace_always(template=ZEPHYR):
    backend = _sentencepiece_bpe()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always", split=True), decoders.Fuse()]
    )
    return _fast(backend, template, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def gemma(template=GEMMA):
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    backend = _sentencepiece_bpe(special)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<end_of_turn>", "pad_token": "<pad>"}
    tokenizer = _fast(backend, template, **names)
    tokenizer.add_tokens(["<start_of_turn>"], special_tokens=True)
    return tokenizer


def unigram(template=ZEPHYR):
    """A Unigram model that knows the letters of its sentences and no other, as XGLM's."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False,
        initial_alphabet=["\n", *_ALPHABET],
    )  # fmt: skip
    backend.train_from_iterator(SENTENCES, trainer)
    return _fast(backend, template, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level(template=QWEN3):
    """A byte-level BPE with merges, as Qwen's: ``<think>`` is a token that is not special."""
    learner = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)| ?[^\s]+|\s+"), "isolated")
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    learner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=350, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    tokenizer = _fast(learner, template, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return tokenizer


MAKERS = {
    "bytes": byte_tokenizer,
    "byte-level": byte_level,
    "llama-normalizer": llama_normalizer,
    "llama-metaspace": llama_metaspace,
    "metaspace-always": metaspace_always,
    "gemma": gemma,
    "unigram": unigram,
}
"""Each kind by its name; a call makes a new tokenizer."""
DUMMY_PREFIX = ("llama-normalizer", "llama-metaspace", "metaspace-always", "unigram")
"""Those that put a space before a text that has none."""
