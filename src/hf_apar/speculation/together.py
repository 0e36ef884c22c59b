"""Several proposers at once: their guesses form one tree, and what each is worth is judged by what was written."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hf_apar.errors import ConfigurationError
from hf_apar.speculation.lengths import Acceptance
from hf_apar.speculation.proposer import Draft, Proposer, Run
from hf_apar.tree.growth import GrowingTree
from hf_apar.tree.threads import Thread

_PRIOR, _PRIOR_WEIGHT = 0.3, 8.0  # acceptance of guesses without an estimate of their own, before anything is known


class Together(Proposer):
    """Merges the drafts of ``proposers``, trees and chains alike; a guess that several make is fed once.

    A guess without an estimate of its own worth is worth ``a ** place``: ``a`` is the share of such guesses, fed or not,
    that turned out to be what the thread wrote.

    Args:
        proposers: at least one; none may draw its guesses, as an assistant does when sampling.
        schedule: see :class:`~hf_apar.speculation.proposer.Proposer`.
    """

    estimates = True

    def __init__(self, *proposers: Proposer, schedule: str | None = None) -> None:
        if not proposers:
            raise ConfigurationError("Together needs at least one proposer")
        self.proposers, self.schedule = proposers, schedule
        self.longest = sum(one.longest for one in proposers)
        self.watches = any(one.watches for one in proposers)

    def start(self, run: Run) -> None:
        for one in self.proposers:
            one.start(run)
        self.rates = [Acceptance() for _ in self.proposers]
        self.open: dict[tuple[int, int], list[tuple[int, int, Sequence[int]]]] = {}

    def observe(self, threads: Sequence[tuple[int, Thread]], states: Tensor) -> None:
        for one in self.proposers:
            if one.watches:
                one.observe(threads, states)

    def seconds(self, length: int, threads: int) -> float:
        return sum(one.seconds(min(length, one.longest), threads) for one in self.proposers)

    def propose(self, rows: Sequence[GrowingTree], limits: Sequence[Sequence[int]]) -> Sequence[Sequence[Draft]]:
        self._judge(rows)
        made = [
            one.propose(rows, [[min(limit, one.longest) for limit in lengths] for lengths in limits])
            for one in self.proposers
        ]
        drafts: list[list[Draft]] = []
        for number, row in enumerate(rows):
            drafts.append([])
            for index, thread in enumerate(row.live):
                merged = _Merged()
                for which, found in enumerate(made):
                    self._merge(merged, which, found[number][index], (number, thread.index), len(thread.path_ids))
                drafts[-1].append(merged.draft())
        return drafts

    def _merge(self, merged: "_Merged", which: int, draft: Draft, key: tuple[int, int], length: int) -> None:
        if draft.drawn_from is not None:
            raise ConfigurationError(
                f"{type(self.proposers[which]).__name__} draws its guesses, which must stand alone; pass it as the proposer"
            )
        places = {-1: -1}
        rate = self.rates[which].rate(_PRIOR, _PRIOR_WEIGHT)
        for index, token in enumerate(draft.tokens):
            way = draft.way(index)
            parent = -1 if len(way) == 1 else way[-2]
            worth = rate ** len(way) if draft.worth is None else draft.worth[index]
            places[index] = merged.add(token, places[parent], worth)
        if draft.worth is None and draft.tokens:
            self.open.setdefault(key, []).append((which, length, draft.tokens))

    def _judge(self, rows: Sequence[GrowingTree]) -> None:
        """Compare the chains of the last step with what their threads wrote."""
        for (number, index), chains in self.open.items():
            path = rows[number].tree.threads[index].path_ids
            for which, length, tokens in chains:
                written = path[length:]
                same = next(
                    (place for place, pair in enumerate(zip(tokens, written, strict=False)) if pair[0] != pair[1]),
                    min(len(tokens), len(written)),
                )
                judged = same + (same < min(len(tokens), len(written)))
                self.rates[which].add(judged, same)
        self.open = {}


@dataclass
class _Merged:
    """A tree of guesses that grows, in which the guesses that follow the same one differ."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    worth: list[float] = field(default_factory=list)
    known: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, token: int, parent: int, worth: float) -> int:
        """Add a guess after that of index ``parent``, or find it; return its index. None is worth more than its parent."""
        place = self.known.get((parent, token))
        if place is None:
            place = self.known[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self.worth.append(0.0)
        bound = 1.0 if parent < 0 else self.worth[parent]
        self.worth[place] = min(max(self.worth[place], worth), bound)
        return place

    def draft(self) -> Draft:
        return Draft(self.tokens, self.parents, self.worth)
