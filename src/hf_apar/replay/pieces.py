"""What each token of an answer adds to its text: all pieces together are the text, whatever the tokenizer does."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from transformers import PreTrainedTokenizerBase

from hf_apar.text.encoding import decode_text
from hf_apar.tree.threads import ParagraphTree, joined


def answer_pieces(tree: ParagraphTree, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """Return, by thread, a text for each of its tokens; in reading order they join to ``tree.text(tokenizer)``.

    What was written behind the place where the answer was cut has texts too.
    """
    segments = [(thread.index, tokens) for thread, tokens, _ in ParagraphTree(tree.threads).segments()]
    read = [tokens for _, tokens, _ in tree.segments()]
    pieces = [*_segment_pieces(read, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), tree.joint)]
    behind = [tokens for _, tokens in segments[len(read) :]]
    pieces += _segment_pieces(behind, lambda ids: decode_text(tokenizer, ids), tree.joint)
    found: list[list[str]] = [[] for _ in tree.threads]
    for (index, _), texts in zip(segments, pieces, strict=True):
        found[index] += texts
    return found


def _segment_pieces(segments: Sequence[list[int]], decode: Callable[[list[int]], str], joint: str) -> Iterator[list[str]]:
    pieces = iter(pieces_of([token for tokens in segments for token in tokens], decode))
    text = ""
    for tokens in segments:
        texts = list(islice(pieces, len(tokens)))
        first = next((place for place, one in enumerate(texts) if one), None)
        if joint and first is not None:
            texts[first] = joined(text, texts[first], joint)
        text += "".join(texts)
        yield texts


def pieces_of(ids: list[int], decode: Callable[[list[int]], str]) -> list[str]:
    """Return what each of ``ids`` adds to ``decode(ids)``.

    A token belongs where the text up to it agrees with the whole: half a character adds nothing, and what completes it all.

    >>> pieces_of([0xC3, 0xA9, 0x74], lambda ids: bytes(ids).decode(errors="replace"))
    ['', 'é', 't']
    """
    whole, ends = decode(ids), [0]
    for count in range(1, len(ids)):
        part = decode(ids[:count])
        differs = (place for place, letters in enumerate(zip(part, whole, strict=False)) if letters[0] != letters[1])
        agreed = len(part) if whole.startswith(part) else next(differs, len(whole))
        ends.append(max(ends[-1], agreed))
    return [whole[start:end] for start, end in zip(ends, [*ends[1:], len(whole)], strict=True)] if ids else []
