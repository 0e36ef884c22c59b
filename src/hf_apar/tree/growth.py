"""How a paragraph tree grows: threads that live, wait and end, and the cache slots that their paths hold."""

from collections.abc import Sequence

from hf_apar.tree.slots import SlotPool
from hf_apar.tree.threads import FinishReason, ParagraphTree, Thread


class GrowingTree:
    """The tree of one row while it is written; plain Python, shared by every engine that decodes it.

    Each live or waiting thread holds the cache slots of its path: ``slots(thread)[p]`` is the slot of position ``p``.
    A slot is free again once no path holds it. A fork beyond ``max_threads`` happens, its child waits and starts, in
    reading order, when a thread ends: so the text never depends on timing.

    Args:
        prompt: token ids of the prompt, without padding.
        prompt_slots: slots that the prompt takes, if not one for each of ``prompt``: ids are unknown for embeddings.
        padding: slots below the prompt's that are taken for good.
        max_threads: how many threads may live at once.
        fork_token_id: id of [Fork].
        child_token_id: id of [Child].
        joint: of the tree's text.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        prompt_slots: int | None = None,
        padding: int = 0,
        max_threads: int,
        fork_token_id: int,
        child_token_id: int,
        joint: str = "",
    ) -> None:
        self.max_threads, self.fork_token_id, self.child_token_id = max_threads, fork_token_id, child_token_id
        self.pool = SlotPool()
        self.padding = [self.pool.take() for _ in range(padding)]
        self.prompt_length, self.prompt_slots = len(prompt), len(prompt) if prompt_slots is None else prompt_slots
        root = Thread(0, None, 0, 1, list(prompt), start=self.prompt_length)
        self.tree = ParagraphTree([root], joint=joint)
        self._slots = {0: [self.pool.take() for _ in range(self.prompt_slots)]}  # of the threads that live or wait
        self.root_slots: list[int] = []  # where the root's path stood when it ended
        self._order = [root]  # threads that live or wait, by the place in the answer where each goes on
        self._waiting: set[int] = set()

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
    def scratch(self) -> int:
        """A slot that a padding query may write to: a free one, and none that holds a whole answer without forks."""
        whole = self.root_slots if len(self.tree.threads) == 1 else ()
        return max(whole) + 1 if whole else self.pool.peek()

    def slots(self, thread: Thread) -> list[int]:
        """Return the slots of a live or waiting thread's path, by position."""
        return self._slots[thread.index]

    def newborn(self, thread: Thread) -> Thread | None:
        """Return the child of the [Fork] that ``thread`` wrote last. Only ``thread`` will feed that [Fork] to the model."""
        if thread.path_ids[-1] != self.fork_token_id:
            return None
        return max((one for one in self._order if one.parent == thread.index), key=lambda one: one.index, default=None)

    def append(self, thread: Thread, token: int, slot: int | None = None) -> None:
        """Let ``thread`` write ``token``, into ``slot`` if it is in the cache already, else into the lowest free one."""
        thread.path_ids.append(token)
        self._slots[thread.index].append(self.pool.take() if slot is None else slot)
        if token == self.fork_token_id:
            self._fork(thread)
        else:
            thread.tokens.append(token)

    def end(self, thread: Thread, reason: FinishReason) -> None:
        """End ``thread``, release what only its path held, and start children that waited for it."""
        thread.finish_reason = reason
        self._order.remove(thread)
        self._waiting.discard(thread.index)
        slots = self._slots.pop(thread.index)
        if thread.parent is None:
            self.root_slots = slots
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
        """End ``thread`` and cut the answer there: all threads that write what reads later end too."""
        self.tree.stopped_by = thread.index
        self._end_from(self._order.index(thread), "stop")

    def _end_from(self, place: int, reason: FinishReason) -> None:
        self._waiting -= {thread.index for thread in self._order[place:]}  # none of them may start now
        while len(self._order) > place:
            self.end(self._order[-1], reason)

    def _fork(self, parent: Thread) -> None:
        child = Thread(len(self.tree.threads), parent.index, len(parent.tokens), parent.depth + 1, list(parent.path_ids))
        child.start = len(child.path_ids)  # and one more once it starts with [Child]
        self.tree.threads.append(child)
        self.pool.hold(self._slots[parent.index])
        self._slots[child.index] = list(self._slots[parent.index])
        self._order.insert(self._order.index(parent), child)
        self._waiting.add(child.index)
        self._start_children()

    def _start_children(self) -> None:
        while self._waiting and len(self._order) - len(self._waiting) < self.max_threads:
            child = self.waiting[0]
            self._waiting.remove(child.index)
            assert child.path_ids[-1] == self.fork_token_id
            child.path_ids.append(self.child_token_id)
            child.start = len(child.path_ids)
            self._slots[child.index].append(self.pool.take())
