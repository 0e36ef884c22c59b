"""Prompts that hold control tokens, spelt: what somebody typed is text, and forks nothing."""

from collections.abc import Sequence, Set
from typing import Any

from hf_apar.errors import ControlTokenError
from hf_apar.text.encoding import encode_text, known_control, token_name


def spelt(prompt_ids: Sequence[int], control: Set[int], tokenizer: Any) -> list[int]:
    """Return ``prompt_ids`` with the ``control`` tokens that somebody typed as the words that they look like."""
    if control.isdisjoint(prompt_ids):
        return list(prompt_ids)
    words = {token: encode_text(tokenizer, token_name(tokenizer, token), control) for token in control}
    if any(control & set(ids) for ids in words.values()):
        raise ControlTokenError(
            f"the prompt holds a control token and {type(tokenizer).__name__} cannot spell it; remove it from the prompt"
        )
    return [piece for token in prompt_ids for piece in words.get(token, [token])]


def without_known(prompt_ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Return ``prompt_ids`` with control tokens of known names spelt, see :func:`spelt`: no prompt has any of its own."""
    return spelt(prompt_ids, known_control(tokenizer, len(tokenizer)), tokenizer)
