"""How a paragraph tree grows: threads that live, wait and end, and the cache slots that their paths hold."""

from collections.abc import Sequence

from hf_apar.errors import ConfigurationError
from hf_apar.protocol import Fork, ForkProtocol
from hf_apar.tree.slots import SlotPool
from hf_apar.tree.threads import FinishReason, ParagraphTree, Thread


class GrowingTree:
    """The tree of one row while it is written; plain Python, shared by every engine that decodes it.

    Each live or waiting thread holds the cache slots of its path: ``slots(thread)[p]`` is the slot of position ``p``.
    A slot is free again once no path holds it. A fork beyond ``max_threads`` happens, its child waits and starts, in
    reading order, when a thread ends: so the text never depends on timing.

    Args:
        prompt: token ids of the prompt, without padding.
        protocol: decides who forks, and what ends a thread.
        max_threads: how many threads may live at once.
        prompt_slots: slots that the prompt takes, if not one for each of ``prompt``: ids are unknown for embeddings.
        padding: slots below the prompt's that are taken for good.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        protocol: ForkProtocol,
        *,
        max_threads: int,
        prompt_slots: int | None = None,
        padding: int = 0,
    ) -> None:
        self.protocol, self.max_threads = protocol, max_threads
        self.pool = SlotPool()
        self.padding = [self.pool.take() for _ in range(padding)]
        self.prompt_length, self.prompt_slots = len(prompt), len(prompt) if prompt_slots is None else prompt_slots
        root = Thread(0, None, 0, 1, list(prompt), start=self.prompt_length)
        self.tree = ParagraphTree([root], joint=protocol.joint)
        self._slots = {0: [self.pool.take() for _ in range(self.prompt_slots)]}  # of the threads that live or wait
        self._unfed: set[int] = set()  # slots of path tokens that no forward pass was given yet
        self.root_slots: list[int] = []  # where the root's path stood when it ended
        self._beyond = 0  # the first slot above these
        self._order = [root]  # threads that live or wait, by the place in the answer where each goes on
        self._waiting: dict[int, tuple[int, ...]] = {}  # and what they are fed when they start
        self._given = {0: self.prompt_length}  # how much of each thread's path nobody sampled when it began
        self.apart = False  # are the threads answers of their own?

    @property
    def unfinished(self) -> bool:
        """Does any thread live or wait?"""
        return bool(self._order)

    @property
    def threads(self) -> list[Thread]:
        """All threads, also those that ended, in the order of creation."""
        return self.tree.threads

    @property
    def live(self) -> list[Thread]:
        """The threads that write, in reading order of what they write next."""
        return [thread for thread in self._order if thread.index not in self._waiting]

    @property
    def waiting(self) -> list[Thread]:
        """The threads that wait for another one to end, in reading order."""
        return [thread for thread in self._order if thread.index in self._waiting]

    @property
    def free_slot(self) -> int:
        """A slot that a padding query may write to: a free one, and none that holds a whole answer without forks."""
        return self._beyond if self._beyond and len(self.tree.threads) == 1 else self.pool.peek()

    def sampled(self, thread: Thread) -> int:
        """Return how many tokens were sampled on a thread's path, [Fork] and EOS included: a step each."""
        return len(thread.path_ids) - self._given[thread.index] - len(thread.injected) + (thread.eos_token_id is not None)

    def slots(self, thread: Thread) -> list[int]:
        """Return the slots of a live or waiting thread's path, by position."""
        return self._slots[thread.index]

    def feed(self) -> list[tuple[Thread, int]]:
        """Return each live thread, in reading order, with how many of its path's last tokens the next pass has to feed.

        These are its last one, after which it samples, and those before it that were not fed yet. What several paths
        share is fed by one of them. From now on they count as fed.
        """
        live = self.live
        claimed = {self._slots[thread.index][-1] for thread in live}
        counts = {}
        for thread in sorted(live, key=lambda one: one.index):
            slots, count = self._slots[thread.index], 1
            while count < len(slots) and (slot := slots[-1 - count]) in self._unfed and slot not in claimed:
                claimed.add(slot)
                count += 1
            counts[thread.index] = count
        self._unfed -= claimed
        return [(thread, counts[thread.index]) for thread in live]

    def feed_ahead(self, limit: int) -> list[tuple[Thread, int]]:
        """Return ``limit`` tokens of those that live threads have begun with, if the next pass had more than that to feed.

        They are threads and places in their ``path_ids`` counted from the end, a path's earlier ones first, and no path's
        own last one. From now on they count as fed; where one is another path's last, that one feeds it anew to sample.
        """
        live = self.live
        begun = list[tuple[Thread, int]]()  # and where what is not fed yet begins, the thread's own last token apart
        for thread in live:
            slots, place = self._slots[thread.index], -1
            while -place < len(slots) and slots[place - 1] in self._unfed:
                place -= 1
            if place < -1:
                begun.append((thread, place))
        if not begun:
            return []
        lasts = {self._slots[thread.index][-1] for thread in live}  # fed in the step itself, a [Fork] by its parent
        ahead: dict[int, tuple[Thread, int]] = {}  # by slot: what several paths share is fed by one of them
        for thread, place in begun:
            slots = self._slots[thread.index]
            if not lasts.issuperset(slots[place:]):
                for earlier in range(place, -1):
                    ahead.setdefault(slots[earlier], (thread, earlier))
        if len(ahead) + len(live) <= limit:
            return []
        fed = list(ahead)[:limit]
        self._unfed.difference_update(fed)
        return [ahead[slot] for slot in fed]

    def write(self, thread: Thread, token: int, slot: int | None = None, *, stops: bool = False) -> bool:
        """Let ``thread`` write ``token``, into ``slot`` if it is in the cache already, else into the lowest free one.

        Args:
            stops: :meth:`stop` it there, whatever else the token would do.

        Returns:
            Whether it goes on as it was: it has not ended by the token, and not forked.
        """
        if self.protocol.ends(thread, token):
            thread.eos_token_id = token
            self.pool.release([] if slot is None else [slot])  # it is no part of the path
            self.end(thread, "eos")
            return False
        fork = self.protocol.fork(thread, token)
        if fork is not None and not (isinstance(fork, Fork) and (fork.parent or fork.child)):
            raise ConfigurationError(
                f"{type(self.protocol).__name__}.fork returned {fork!r}; return None, or a Fork that feeds one side at "
                "least: threads that were fed the same would write the same"
            )
        self._append(thread, token, slot)
        if stops:
            self.stop(thread)
        elif fork is not None:
            self._fork(thread, fork)
        return fork is None and not stops

    def branch(self, thread: Thread, branches: Sequence[Sequence[int]]) -> None:
        """Let ``thread`` end here, and a child for each of ``branches`` begin with its tokens, in this order.

        From now on each thread is an answer of its own: a stop ends it alone. A branch without tokens goes on from the
        path's end, whose last token it feeds anew to sample after it.
        """
        self.apart = True
        for ids in branches:
            self._add_child(thread, Fork(child=tuple(ids)))
        self.end(thread, "eos")

    def end(self, thread: Thread, reason: FinishReason) -> None:
        """End ``thread``, release what only its path held, and start children that waited for it."""
        thread.finish_reason = reason
        self._order.remove(thread)
        self._waiting.pop(thread.index, None)
        slots = self._slots.pop(thread.index)
        if thread.parent is None:
            self.root_slots, self._beyond = slots, max(slots, default=-1) + 1
        self.pool.release(slots)
        self._start_children()

    def allow(self, max_threads: int) -> None:
        """Let so many threads live at once from now on; none that lives has to wait, and children that may start do."""
        self.max_threads = max_threads
        self._start_children()

    def end_all(self, reason: FinishReason) -> None:
        """End every thread that lives or waits."""
        self._end_from(0, reason)

    def stop(self, thread: Thread) -> None:
        """End ``thread`` and cut the answer there: all threads that write what reads later end too, but for branches."""
        if self.apart:
            self.end(thread, "stop")
            return
        self.tree.stopped_by = thread.index
        self._end_from(self._order.index(thread), "stop")

    def _end_from(self, place: int, reason: FinishReason) -> None:
        for thread in self._order[place:]:
            self._waiting.pop(thread.index, None)  # none of them may start now
        while len(self._order) > place:
            self.end(self._order[-1], reason)

    def _fork(self, parent: Thread, fork: Fork) -> None:
        child = self._add_child(parent, fork)
        if child.path_ids[-1] in self.protocol.control_ids:
            child.unread.append(len(child.path_ids) - 1)  # the answer reads on in the child as if no token had forked
        for token in fork.parent:
            parent.injected.append(len(parent.path_ids))
            self._append(parent, token)
        self._start_children()

    def _add_child(self, parent: Thread, fork: Fork) -> Thread:
        child = Thread(
            len(self.tree.threads), parent.index, len(parent.tokens), parent.depth + 1, list(parent.path_ids),
            unread=list(parent.unread), start=len(parent.path_ids),
        )  # fmt: skip
        self.tree.threads.append(child)
        self._given[child.index] = self._given[parent.index] + len(parent.injected)
        self.pool.hold(self._slots[parent.index])
        self._slots[child.index] = list(self._slots[parent.index])
        self._order.insert(self._order.index(parent), child)
        self._waiting[child.index] = fork.child
        return child

    def _start_children(self) -> None:
        while self._waiting and len(self._order) - len(self._waiting) < self.max_threads:
            child = self.waiting[0]
            for token in self._waiting.pop(child.index):
                if token in self.protocol.control_ids:
                    child.unread.append(len(child.path_ids))
                self._append(child, token)
            self._given[child.index] += len(child.path_ids) - child.start
            child.start = len(child.path_ids)

    def _append(self, thread: Thread, token: int, slot: int | None = None) -> None:
        thread.path_ids.append(token)
        if slot is None:
            slot = self.pool.take()
            self._unfed.add(slot)
        else:
            self._unfed.discard(slot)
        self._slots[thread.index].append(slot)
        if token not in self.protocol.control_ids:
            thread.tokens.append(token)
