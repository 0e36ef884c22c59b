"""A tree as one row of tokens: depth-first order, positions along the path, and one integer per token for the mask."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, compress

from transformers import PreTrainedTokenizerBase

from hf_apar.data.extraction.text_tree import TextThread
from hf_apar.errors import ControlTokenError, DataError
from hf_apar.text.chat import encode_chat
from hf_apar.text.encoding import decode_text, encode_answer, encode_text, reads_as

IGNORED = -100  # the target that the loss of transformers leaves out


@dataclass(frozen=True)
class TreeFeatures:
    """One or more trees in one row; all lists but the last two have the row's length.

    Attributes:
        input_ids: tokens in depth-first reading order; [Child] and a thread's tokens follow their [Fork].
        position_ids: depth along the path to the root: [Child] and the parent's next token share a position.
        visible_until: token ``i`` sees token ``j`` when ``j <= i < visible_until[j]``.
        shift_labels: the target of each token: the next token of its own thread, EOS at its end, -100 for none.
        fork_banned: the places, in ascending order, whose target is the next token given that [Fork] is banned.
        children: the places, in ascending order, at which forked threads begin, with what is injected there.
    """

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    visible_until: list[int] = field(default_factory=list)
    shift_labels: list[int] = field(default_factory=list)
    fork_banned: list[int] = field(default_factory=list)
    children: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)

    def to_dict(self) -> dict[str, list[int]]:
        """Return the columns that :class:`~hf_apar.training.rows.collator.DataCollatorForApar` takes."""
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

    Each piece of text is tokenised as it stands within the answer (:mod:`hf_apar.text.encoding`), and special tokens typed
    in it stay text: without control tokens the row decodes to the answer's text. EOS is a target, never an input. Of
    the prompt, the last token alone has a target.

    Raises:
        DataError: if the prompt or a thread is empty, a fork follows a fork or [Child] with no token between, or the
            tokenizer cannot write the answer, spaces, case and forms of characters aside.
        ControlTokenError: if the tokenizer makes a control token of text.
    """
    if not prompt_ids:
        raise DataError("the prompt has no tokens; the answer's first token needs one before it")
    row = _Row(tokenizer, prompt_ids, fork_id, child_id, eos_id)
    row.add_thread(list(prompt_ids), tree, position=0)
    answer = [token for token in row.features.input_ids[len(prompt_ids) :] if token not in (fork_id, child_id)]
    if not reads_as(tokenizer, answer, tree.text):
        raise DataError(
            f"{type(tokenizer).__name__} cannot write the answer {tree.text[:40]!r}, its tokens read "
            f"{decode_text(tokenizer, answer)[:40]!r}; leave it out, or use a tokenizer that knows its characters"
        )
    row.features.shift_labels[: len(prompt_ids) - 1] = [IGNORED] * (len(prompt_ids) - 1)
    return row.features


def chat_features(
    messages: Sequence[Mapping[str, object]],
    tokenizer: PreTrainedTokenizerBase,
    fork_id: int,
    child_id: int,
    eos_id: int,
    *,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> list[TreeFeatures]:
    """Turn a chat of one or more turns into one tree for each answer that is a :class:`TextThread`.

    The prompt of each is the chat before it as the template renders it, earlier answers as the plain text that they read
    as: the very tokens that the model meets in that turn, whatever the template does to earlier ones. An answer that is a
    string is context alone.

    Args:
        messages: as for :func:`~hf_apar.text.chat.encode_chat`; the content of an assistant's message may be a tree.
        chat_template_kwargs: as for :func:`~hf_apar.text.chat.encode_chat`.

    Raises:
        DataError: if no answer is a tree, another role's message is one, an answer cannot be tokenised, or the template
            refuses the chat.
        ControlTokenError: if the tokenizer makes a control token of text.
    """
    answers = [(place, message.get("content")) for place, message in enumerate(messages)]
    trees = [(place, content) for place, content in answers if isinstance(content, TextThread)]
    if wrong := sorted({str(messages[place]["role"]) for place, _ in trees} - {"assistant"}):
        raise DataError(f"a message of the role {wrong[0]!r} is a tree; only an assistant's may be one")
    if not trees:
        raise DataError(
            "no answer of the chat is a TextThread, so there is nothing to learn; make one with "
            "hf_apar.data.extraction.markdown.extract(text), or TextThread((text,)) for an answer without forks"
        )
    plain = [{name: _plain(value) for name, value in message.items()} for message in messages]
    before = [encode_chat(tokenizer, plain[:place], chat_template_kwargs=chat_template_kwargs) for place, _ in trees]
    return [
        tree_features(prompt, tree, tokenizer, fork_id, child_id, eos_id)
        for prompt, (_, tree) in zip(before, trees, strict=True)
    ]


def _plain(content: object) -> object:
    return content.text if isinstance(content, TextThread) else content


def truncate(tree: TreeFeatures, max_tokens: int) -> TreeFeatures:
    """Leave out whole threads, the deepest first and of these the last, until at most ``max_tokens`` tokens are left.

    A thread goes with its [Child]. The [Fork] before it stays, and stays a target: what is left keeps its positions, its
    targets and what it sees, so truncation takes terms out of the loss and changes none. The root is never cut: where it
    alone is longer, the result is too, and :func:`hf_apar.training.rows.collator.pack` leaves it out.

    >>> tree = TreeFeatures([5, 8, 9, 6, 7], [0, 1, 2, 3, 2], [5, 5, 4, 4, 5], [8, 7, 6, 2, 2], children=[2])
    >>> cut = truncate(tree, 4)
    >>> cut.input_ids, cut.position_ids, cut.visible_until, cut.shift_labels
    ([5, 8, 7], [0, 1, 2], [3, 3, 3], [8, 7, 2])
    """
    ends, starts = tree.visible_until, tree.children
    depth = {start: sum(start < ends[above] for above in starts if above <= start) for start in starts}
    kept = [True] * len(tree)
    for start in sorted(starts, key=lambda start: (depth[start], start), reverse=True):
        if sum(kept) <= max_tokens:
            break
        kept[start : ends[start]] = [False] * (ends[start] - start)
    before = [0, *accumulate(kept)]  # how many are kept before each place
    return TreeFeatures(
        list(compress(tree.input_ids, kept)),
        list(compress(tree.position_ids, kept)),
        [before[end] for end in compress(ends, kept)],
        list(compress(tree.shift_labels, kept)),
        [before[place] for place in tree.fork_banned if kept[place]],
        [before[place] for place in starts if kept[place]],
    )


def unforked(tree: TreeFeatures) -> TreeFeatures:
    """Return the tokens of one whole tree as they read without forks: one thread, for plain decoding.

    Where the tree forks the target is what reads next, and the place is one of ``fork_banned``: the same words are followed
    by [Fork] in other rows, so that only what comes next without it is to be learnt here. A model trained without any
    target there goes on with the next title where [Fork] is banned, its details lost.

    >>> tree = TreeFeatures([5, 8, 9, 6, 7], [0, 1, 2, 3, 2], [5, 5, 4, 4, 5], [8, 7, 6, 2, 2], children=[2])
    >>> plain = unforked(tree)
    >>> plain.input_ids, plain.shift_labels, plain.fork_banned
    ([5, 6, 7], [6, 7, 2], [0])
    """
    forks = {place - 1 for place in tree.children}  # what is injected follows its fork, and that a token of the same thread
    left_out = forks.union(tree.children)
    kept = [index for index in range(len(tree)) if index not in left_out]
    ids = [tree.input_ids[index] for index in kept]
    following = [*ids[1:], next(label for label in reversed(tree.shift_labels) if label != IGNORED)]
    targets = [
        IGNORED if tree.shift_labels[index] == IGNORED else target for index, target in zip(kept, following, strict=True)
    ]
    banned = [place for place, index in enumerate(kept) if index + 1 in forks]
    return TreeFeatures(ids, list(range(len(ids))), [len(ids)] * len(ids), targets, banned)


def successors(visible_until: Sequence[int], children: Sequence[int]) -> list[int]:
    """Return where each token's thread goes on in a row of trees in depth-first order, -1 at its end.

    >>> successors([5, 5, 4, 4, 5], children=[2])  # a token, its fork, a thread of two, and what the first goes on with
    [1, 4, 3, -1, -1]
    """
    begun, following = set(children), []
    for index, until in enumerate(visible_until):
        after = index + 1
        if after < until and after in begun:
            after = visible_until[after]
        following.append(after if after < until else -1)
    return following


@dataclass
class _Row:
    tokenizer: PreTrainedTokenizerBase
    prompt_ids: Sequence[int]
    fork_id: int
    child_id: int
    eos_id: int
    features: TreeFeatures = field(default_factory=TreeFeatures)
    begun: bool = False  # does any text of the answer stand in the row?

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
                self.features.children.append(len(self.features))
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
        control = {self.fork_id, self.child_id, self.eos_id}
        if self.begun:
            ids = encode_text(self.tokenizer, text, control)
        else:
            ids = encode_answer(self.tokenizer, self.prompt_ids, text, control)
            self.begun = bool(ids)
        if typed := control & set(ids):
            raise ControlTokenError(
                f"{type(self.tokenizer).__name__} made the control tokens {sorted(typed)} of the text {text[:40]!r}; "
                "use a tokenizer that honours split_special_tokens=True"
            )
        return ids
