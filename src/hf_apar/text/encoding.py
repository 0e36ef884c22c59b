"""Text that is encoded or decoded in parts, for tokenizers whose parts are not those of the whole.

A sentencepiece tokenizer with a dummy prefix (Llama 2, Mistral 7B v0.1) puts a space before every text that it encodes and
drops the first one that it decodes. A part of a longer text must have neither. So it is encoded after an anchor, a short
text that does not merge with what follows, and decoded after a token; what is theirs is cut off again. Where a tokenizer
needs no anchor, all this is its own ``encode`` and ``decode``.
"""

import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from transformers import PreTrainedTokenizerBase

from hf_apar.tokens import KNOWN_PAIRS

_ANCHORS = ("\n", "\ue000", "=", "a\n")  # in most vocabularies the first ones are bytes, which merge with nothing
_PROMPT_END = 8  # tokens of a prompt that tell whether it ends with a space


@dataclass(frozen=True)
class _Seam:
    """How a part is put to a longer text.

    Attributes:
        anchors: texts to encode a part after; none where parts are encoded as they are.
        before: tokens to decode a part after.
        strips: the first space of a text is dropped when it is decoded.
    """

    anchors: tuple[str, ...] = ()
    before: tuple[int, ...] = ()
    strips: bool = False


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, never: Collection[int] = ()) -> list[int]:
    """Return the tokens of ``text`` as it stands within a longer text: no space that is not in it, no special token.

    Args:
        never: more tokens that text must not become, such as control tokens of names of their own. Where the tokenizer
            makes one of them all the same, it cannot spell it; the caller has to look.
    """
    ids = _encode(tokenizer, text, split=True)
    unwanted = {*untypable(tokenizer, len(tokenizer)), *never}
    typed = unwanted.intersection(ids)
    names = [name for token in typed if len(name := token_name(tokenizer, token)) > 1 and name in text]
    if names:
        # a tokenizer may know such a name as a word; cut in two, it is none
        within = "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names)
        ids = [token for part in re.split(within, text) for token in _encode(tokenizer, part, split=True)]
    left = unwanted.intersection(ids) - {tokenizer.unk_token_id}  # that one stands for letters without a token, too
    return [piece for token in ids for piece in (_cut(tokenizer, token) if token in left else [token])]


def _cut(tokenizer: PreTrainedTokenizerBase, token: int) -> list[int]:
    """Return the tokens that spell a token which the tokenizer makes of other letters than its own, by normalising them."""
    name = token_name(tokenizer, token)
    return [piece for part in (name[:1], name[1:]) for piece in _encode(tokenizer, part, split=True)]


def encode_template(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a part of a chat template within a longer text; its special tokens are special."""
    return _encode(tokenizer, text, split=False)


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], text: str, never: Collection[int] = ()
) -> list[int]:
    """Return the tokens of an answer's beginning as a model writes them after ``prompt_ids``: they decode to ``text``.

    Where the tokenizer drops the first space that it decodes, they begin with one, unless the prompt ends with a space or a
    line's end: ``ASSISTANT:`` is followed by ``▁Yes`` and ``<|assistant|>\\n`` by ``Yes``. Nothing is added to no text.
    """
    if not text or not _seam(tokenizer).strips:
        return encode_text(tokenizer, text, never)
    ids = encode_text(tokenizer, _lead(tokenizer, prompt_ids) + text, never)
    if tokenizer.decode(ids, skip_special_tokens=True) != text:  # it begins with a space of its own
        spaced = encode_text(tokenizer, f" {text}", never)
        return spaced if tokenizer.decode(spaced, skip_special_tokens=True) == text else ids
    return ids


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of ``ids`` as it stands within a longer text, special tokens left out; its first space stays."""
    before = _seam(tokenizer).before
    skipped = len(_decode(tokenizer, before))
    return _decode(tokenizer, [*before, *ids])[skipped:]


def answer_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return ``text``, which was decoded after its prompt, as ``decode`` gives it alone: at the beginning of an answer."""
    return text.removeprefix(" ") if _seam(tokenizer).strips else text


@lru_cache(maxsize=8)
def token_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the text of every token by itself within a longer text, special tokens in full."""
    before = _seam(tokenizer).before
    skipped = len(tokenizer.decode(list(before)))
    pieces = tokenizer.batch_decode([[*before, token] for token in range(len(tokenizer))])
    return tuple(piece[skipped:] for piece in pieces)


def reads_as(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> bool:
    """Are ``ids`` an answer that reads as ``text``, but for spaces, case, and forms of characters that Unicode holds alike?

    A tokenizer may normalise text: the model then cannot write anything else. What it cannot write at all is another matter.
    """
    written = _decode(tokenizer, ids)
    return written == text or _folded(written) == _folded(text)


def _folded(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text.replace("▁", " ")).casefold().split())  # sentencepiece writes ▁ for it


@lru_cache(maxsize=32)
def untypable(tokenizer: PreTrainedTokenizerBase, size: int) -> frozenset[int]:
    """Return the tokens that text must never become: special ones, and control tokens of known names.

    Args:
        size: the tokenizer's length, since tokens may be added to it.
    """
    special = frozenset(token for token, one in tokenizer.added_tokens_decoder.items() if one.special)
    return special | known_control(tokenizer, size)


@lru_cache(maxsize=32)
def known_control(tokenizer: PreTrainedTokenizerBase, size: int) -> frozenset[int]:
    """Return the control tokens of known names, special or not; ``size`` is as for :func:`untypable`."""
    names = {name for pair in KNOWN_PAIRS for name in (pair.fork, pair.child)}
    return frozenset(token for token, one in tokenizer.added_tokens_decoder.items() if one.content in names)


def token_name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return a special or added token as it is typed; the vocabulary may show it normalised: ``▁[Fork]``."""
    added = tokenizer.added_tokens_decoder.get(token)
    return str(tokenizer.convert_ids_to_tokens(token)) if added is None else str(added.content)


def _lead(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> str:
    end = str(tokenizer.decode(list(prompt_ids[-_PROMPT_END:]), skip_special_tokens=False))
    return "" if end[-1:].isspace() else " "


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, split: bool) -> list[int]:
    for anchor in _seam(tokenizer).anchors:
        head = _plain(tokenizer, anchor, split)
        ids = _plain(tokenizer, anchor + text, split)
        if ids[: len(head)] == head:
            return ids[len(head) :]
    return _plain(tokenizer, text, split)


@lru_cache(maxsize=32)
def _seam(tokenizer: PreTrainedTokenizerBase) -> _Seam:
    """Find out how ``tokenizer`` treats parts by what it makes of a letter."""
    letter = _plain(tokenizer, "a", True)
    alone = _decode(tokenizer, letter)
    if _decode(tokenizer, letter * 2) == "aa":
        return _Seam()
    anchors = []
    for anchor in _ANCHORS:
        head, both = _plain(tokenizer, anchor, True), _plain(tokenizer, f"{anchor}a", True)
        rest = both[len(head) :]
        if both[: len(head)] == head and _decode(tokenizer, letter + rest) == f"{alone}a":
            anchors.append(anchor)
    return _Seam(tuple(anchors), tuple(letter), alone == "a")


def _plain(tokenizer: PreTrainedTokenizerBase, text: str, split: bool) -> list[int]:
    return cast(list[int], tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split))


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
