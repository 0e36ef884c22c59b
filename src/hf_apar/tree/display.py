"""A paragraph tree as HTML, for notebooks: text is escaped, styles stand in place, nothing runs."""

from collections.abc import Iterator
from html import escape

from hf_apar.tree.threads import Decodes, ParagraphTree, Thread, segment_texts

CURSOR = "▌"
_HUE_STEP = 137  # degrees: neighbours differ, and so do those that come next


def tree_html(tree: ParagraphTree, tokenizer: Decodes | None, note: str = "") -> str:
    """Return the answer in reading order, each thread on a tint of its own, and below it who forked whom.

    A thread that lives or waits has a cursor where it goes on. Without ``tokenizer`` there is no text, but the threads.

    Args:
        note: what is said below the answer; by default how many threads and tokens there are.
    """
    tokens = sum(len(thread.tokens) for thread in tree.threads)
    note = note or f"{counted(len(tree.threads), 'thread')}, {counted(tokens, 'token')}"
    if tokenizer is None:
        note += "; with tokenizer=tokenizer, generate lets a tree show its text"
    text = "" if tokenizer is None else f'<div style="white-space:pre-wrap">{"".join(_spans(tree, tokenizer))}</div>'
    threads = "".join(_list(tree, tree.threads[0]))
    return (
        f'<div class="mathjax_ignore tex2jax_ignore">{text}<details{" open" if tokenizer is None else ""}>'  # $ is a sign
        f'<summary style="opacity:.7">{escape(note)}</summary><ul>{threads}</ul></details></div>'
    )


def _spans(tree: ParagraphTree, tokenizer: Decodes) -> Iterator[str]:
    """Yield the text, a span for each thread: those that it forked stand within it."""
    segments = list(tree.segments())
    texts = segment_texts((tokens for _, tokens, _ in segments), tokenizer, tree.joint)
    seen, ended = set[int](), 0
    for (thread, _, is_last), text in zip(segments, texts, strict=True):
        if thread.index not in seen:
            seen.add(thread.index)
            yield f'<span title="{escape(_described(thread))}"{_tint(thread)}>'
        yield escape(text)
        if is_last:
            ended += 1
            yield f"{'' if thread.finish_reason else CURSOR}</span>"
    yield "</span>" * (len(seen) - ended)  # a stop string cuts the answer within these


def _tint(thread: Thread) -> str:
    hue = thread.index * _HUE_STEP % 360
    return "" if thread.parent is None else f' style="background:hsl({hue} 70% 50% / .18)"'


def _list(tree: ParagraphTree, thread: Thread) -> Iterator[str]:
    children = "".join(part for child in tree.children(thread) for part in _list(tree, child))
    yield f"<li><span{_tint(thread)}>{escape(_described(thread))}</span>{f'<ul>{children}</ul>' if children else ''}</li>"


def _described(thread: Thread) -> str:
    guessed = f", {thread.accepted} of {thread.proposed} guesses kept" if thread.proposed else ""
    return f"thread {thread.index}: {counted(len(thread.tokens), 'token')}, {thread.finish_reason or 'unfinished'}{guessed}"


def counted(number: int, noun: str) -> str:
    """Say how many.

    >>> counted(1, "thread"), counted(2, "thread")
    ('1 thread', '2 threads')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
