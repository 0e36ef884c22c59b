"""A tree as one row of tokens: depth-first order, positions along the path, and one integer per token for the mask."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from transformers import PreTrainedTokenizerBase

from hf_apar.data.text_tree import TextThread
from hf_apar.errors import ControlTokenError, DataError

IGNORED = -100  # the target that the loss of transformers leaves out


@dataclass(frozen=True)
class TreeFeatures:
    """One or more trees in one row; all lists have the row's length.

    Attributes:
        input_ids: tokens in depth-first reading order; [Child] and a thread's tokens follow their [Fork].
        position_ids: depth along the path to the root: [Child] and the parent's next token share a position.
        visible_until: token ``i`` sees token ``j`` when ``j <= i < visible_until[j]``.
        shift_labels: the target of each token: the next token of its own thread, EOS at its end, -100 for none.
    """

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    visible_until: list[int] = field(default_factory=list)
    shift_labels: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)

    def to_dict(self) -> dict[str, list[int]]:
        """Return the columns that :class:`~hf_apar.data.collator.DataCollatorForApar` takes."""
        return asdict(self)


def tree_features(
    prompt_ids: Sequence[int],
    tree: TextThread,
    tokenizer: PreTrainedTokenizerBase,
    fork_id: int,
    child_id: int,
    eos_id: int,
) -> TreeFeatures:
    """Turn a prompt and the tree that answers it into one row.

    Each piece of text is tokenised on its own and with ``split_special_tokens=True``: control text in it stays text.
    EOS is a target, never an input. Of the prompt, the last token alone has a target.

    Raises:
        DataError: if the prompt or a thread is empty, or a fork follows a fork or [Child] with no token between.
        ControlTokenError: if the tokenizer makes a control token of text.
    """
    if not prompt_ids:
        raise DataError("the prompt has no tokens; the answer's first token needs one before it")
    row = _Row(tokenizer, fork_id, child_id, eos_id)
    row.add_thread(list(prompt_ids), tree, position=0)
    row.features.shift_labels[: len(prompt_ids) - 1] = [IGNORED] * (len(prompt_ids) - 1)
    return row.features


@dataclass(frozen=True)
class _Row:
    tokenizer: PreTrainedTokenizerBase
    fork_id: int
    child_id: int
    eos_id: int
    features: TreeFeatures = field(default_factory=TreeFeatures)

    def add_thread(self, head: Sequence[int], thread: TextThread, position: int) -> None:
        """Append a thread that starts with ``head`` at ``position``, and the threads below it."""
        own = [self._add_token(token, position + offset) for offset, token in enumerate(head)]
        for piece in thread.pieces:
            if isinstance(piece, TextThread):
                if self.features.input_ids[own[-1]] in (self.fork_id, self.child_id):
                    raise DataError(
                        f"a thread forks before {piece.text[:40]!r} with no token since the last [Fork] or [Child]; "
                        "put text between them"
                    )
                own.append(self._add_token(self.fork_id, position + len(own)))
                self.add_thread([self.child_id], piece, position + len(own))
            else:
                own += [self._add_token(token, position + len(own) + i) for i, token in enumerate(self._encode(piece))]
        if len(own) == len(head) and self.features.input_ids[own[-1]] == self.child_id:
            raise DataError(f"a forked thread has no tokens, its text is {thread.text!r}; leave it out")
        self._close(own)

    def _add_token(self, token: int, position: int) -> int:
        self.features.input_ids.append(token)
        self.features.position_ids.append(position)
        self.features.visible_until.append(0)  # until its thread is closed
        self.features.shift_labels.append(IGNORED)
        return len(self.features) - 1

    def _close(self, own: Sequence[int]) -> None:
        """Give a thread's tokens their targets and show them until here, the end of its subtree."""
        ids = self.features.input_ids
        for index, target in zip(own, [*(ids[following] for following in own[1:]), self.eos_id], strict=True):
            self.features.shift_labels[index] = target
            self.features.visible_until[index] = len(ids)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if typed := {self.fork_id, self.child_id, self.eos_id} & set(ids):
            raise ControlTokenError(
                f"{type(self.tokenizer).__name__} made the control tokens {sorted(typed)} of the text {text[:40]!r}; "
                "use a tokenizer that honours split_special_tokens=True"
            )
        return ids
