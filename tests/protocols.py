"""A fork protocol of the tests' own: another trigger, which is text, two tokens for the child and one for the parent."""

from dataclasses import dataclass

from hf_apar.protocol import Fork, ForkProtocol


@dataclass(frozen=True)
class Writing:
    """As much of a thread as a protocol may read."""

    depth: int
    path_ids: list


@dataclass(frozen=True)
class LetterForks(ForkProtocol):
    """``trigger``, a letter, forks above ``max_depth``; the child is fed ``opened`` and a letter, the parent ``closed``."""

    trigger: int
    opened: int
    closed: int
    letter: int
    end: int
    max_depth: int = 3

    @property
    def control_ids(self):
        return frozenset({self.opened, self.closed})

    def fork(self, thread, token):
        if token != self.trigger or thread.depth >= self.max_depth:
            return None
        return Fork(parent=(self.closed,), child=(self.opened, self.letter))

    def ends(self, thread, token):
        return token == self.end

    def banned(self, thread, last):
        return (self.opened, self.closed)
