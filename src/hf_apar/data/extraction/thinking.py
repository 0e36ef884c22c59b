"""What a reasoning model thinks before it answers: a part of the text of the main thread, and no part of the answer."""

TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))


def thinking_end(text: str) -> int:
    """Return where the thoughts end that ``text`` begins with, 0 where it begins with none.

    A template may have written the tag that opens them. Thoughts that are never closed are no thoughts.

    >>> thinking_end("<think>\\n\\n</think>\\n\\nTea."), thinking_end("Hot or cold?</think>Tea."), thinking_end("Tea.")
    (17, 20, 0)
    """
    for opening, closing in TAGS:
        thoughts, tag, _ = text.partition(closing)
        if tag and (thoughts.lstrip().startswith(opening) or opening not in thoughts):
            return len(thoughts) + len(tag)
    return 0
