"""Who decides to fork: what starts a thread, what each side is fed, what ends one, what may come next, what is no text.

Plain Python, shared by decoding, serving and training. To fork by other rules, write a :class:`ForkProtocol` and pass it:
``model.generate(**inputs, custom_generate=partial(apar_decode, protocol=MyProtocol()))``, or, where APAR is enabled,
``model.generate(**inputs, apar=True, protocol=MyProtocol())``. docs/protocols.md has an example.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

from hf_apar.config import AparConfig


class ThreadView(Protocol):
    """A thread, to be read by protocols and proposers.

    ``index`` names it in its row, ``parent`` is that of the thread that forked it, ``depth`` is 1 for the root. ``path_ids``
    is all that its last token sees, itself included: it begins with the prompt, holds what was injected, and grows; a token
    that is asked about is not in it yet. The first ``start`` of them were given to the thread. ``unread`` are places in
    it of what the path does not read as text.
    """

    @property
    def index(self) -> int: ...
    @property
    def parent(self) -> int | None: ...
    @property
    def depth(self) -> int: ...
    @property
    def path_ids(self) -> Sequence[int]: ...
    @property
    def start(self) -> int: ...
    @property
    def unread(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Fork:
    """What each side is fed before it samples, beside the token that made it fork, which both see.

    Give one of them something at least: threads that were fed the same write the same, or draw from the same.
    """

    parent: tuple[int, ...] = ()
    child: tuple[int, ...] = ()


class ForkProtocol(ABC):
    """Rules of one fork language: when a thread forks, what both sides are fed, what ends a thread, what may not come next.

    Ids must be tokens that the model knows. A stop string is judged where a thread samples, so none ends within what is fed.

    Each method answers by its arguments alone: threads take turns in asking, and drafts ask of tokens that are never
    written. Threads that join again, where one reads what its children wrote, are out of reach: a path only ever grows.

    Attributes:
        joint: text between two segments of an answer where neither has a space.
    """

    joint: str = ""

    @property
    def control_ids(self) -> frozenset[int]:
        """Tokens that are never text: left out of the answer, refused in prompts, freed from ``suppress_tokens``.

        A token that forks or is injected and does not stand here is text, and read as such.
        """
        return frozenset()

    @property
    def bias(self) -> Mapping[int, float]:
        """What is added to the logits of tokens, by id, wherever they may come."""
        return {}

    @property
    def most_injected(self) -> int | None:
        """The most tokens that are injected on one path; ``None`` if nothing bounds them."""
        return None

    @abstractmethod
    def fork(self, thread: ThreadView, token: int) -> Fork | None:
        """Return what both sides are fed if ``thread`` forks by writing ``token``, else ``None``."""

    @abstractmethod
    def ends(self, thread: ThreadView, token: int) -> bool:
        """Does ``thread`` end itself by ``token``, which is then no part of its path?"""

    def banned(self, thread: ThreadView, last: int) -> tuple[int, ...]:
        """Return the tokens that may not follow ``last``, a token that ``thread`` has written or may write."""
        return ()


@dataclass(frozen=True)
class NoForks(ForkProtocol):
    """Nobody forks; each of ``eos_token_ids`` ends its thread. The rules of branches, which the caller names."""

    eos_token_ids: frozenset[int] = frozenset()
    most_injected: int = 0

    def fork(self, thread: ThreadView, token: int) -> Fork | None:
        return None

    def ends(self, thread: ThreadView, token: int) -> bool:
        return token in self.eos_token_ids


@dataclass(frozen=True, kw_only=True)
class ControlTokens(ForkProtocol):
    """The paper's rules (arXiv 2401.06761, section 3.1): [Fork] forks, the child is fed [Child], EOS ends a thread.

    [Child] is never sampled, and neither is [Fork] right after either of them or at ``max_depth``. Both are no text.

    Attributes:
        fork_token_id, child_token_id: ids of the two tokens.
        eos_token_ids: each of them ends its thread.
        max_depth: deepest thread that may exist; the root has depth 1.
        fork_bias: added to the logit of [Fork]; ``-inf`` forbids forks.

    >>> from hf_apar.tree.threads import Thread
    >>> rules = ControlTokens(fork_token_id=8, child_token_id=9, eos_token_ids=frozenset({0}))
    >>> root = Thread(0, None, 0, depth=1, path_ids=[5])
    >>> rules.fork(root, 8), rules.fork(root, 6), rules.ends(root, 0)
    (Fork(parent=(), child=(9,)), None, True)
    >>> rules.banned(root, 5), rules.banned(root, 8)
    ((9,), (9, 8))
    """

    fork_token_id: int
    child_token_id: int
    eos_token_ids: frozenset[int] = frozenset()
    max_depth: int = 3
    fork_bias: float = 0.0
    joint: str = ""

    @cached_property
    def control_ids(self) -> frozenset[int]:
        return frozenset({self.fork_token_id, self.child_token_id})

    @property
    def bias(self) -> Mapping[int, float]:
        return {self.fork_token_id: self.fork_bias} if self.fork_bias else {}

    @property
    def most_injected(self) -> int:
        return self.max_depth - 1

    @classmethod
    def of(cls, config: AparConfig, eos_token_ids: Iterable[int] = ()) -> Self:
        """Return the rules that ``config``, whose ids are known, sets."""
        assert config.control_ids is not None
        given = {name: value for name, value in config.to_dict().items() if name != "max_threads"}
        return cls(eos_token_ids=frozenset(eos_token_ids), **given)  # type: ignore[arg-type]

    def fork(self, thread: ThreadView, token: int) -> Fork | None:
        return Fork(child=(self.child_token_id,)) if token == self.fork_token_id else None

    def ends(self, thread: ThreadView, token: int) -> bool:
        return token in self.eos_token_ids

    def banned(self, thread: ThreadView, last: int) -> tuple[int, ...]:
        may_fork = thread.depth < self.max_depth and last not in self.control_ids and self.fork_bias > -math.inf
        return (self.child_token_id,) if may_fork else (self.child_token_id, self.fork_token_id)
