"""Which cache slots of a row are free: counts of the paths that hold each slot, and a heap of the free ones."""

from collections.abc import Iterable
from heapq import heappop, heappush


class SlotPool:
    """The cache slots of one row; a slot is free while no path holds it, and the lowest free slot is taken next.

    So an early release shows as a lower high-water mark, and no fragmentation exists by construction.

    >>> pool = SlotPool()
    >>> [pool.take(), pool.take(), pool.take()]
    [0, 1, 2]
    >>> pool.release([1]), pool.take(), pool.high_water
    (None, 1, 3)
    """

    def __init__(self) -> None:
        self._holders: list[int] = []  # the number of paths that hold each slot, up to the highest held one
        self._free: list[int] = []  # a heap; it may hold stale entries, which `peek` drops
        self._held = 0

    @property
    def high_water(self) -> int:
        """One more than the highest held slot: attention reads no slot from here on."""
        return len(self._holders)

    @property
    def held(self) -> int:
        """The number of slots that some path holds."""
        return self._held

    def peek(self) -> int:
        """Return the slot that :meth:`take` would give, and leave it free."""
        while self._free and (self._free[0] >= self.high_water or self._holders[self._free[0]]):
            heappop(self._free)
        return self._free[0] if self._free else self.high_water

    def take(self) -> int:
        """Take the lowest free slot, held by one path from now on."""
        slot = self.peek()
        self._held += 1
        if slot == self.high_water:
            self._holders.append(1)
        else:
            self._holders[slot] = 1
        return slot

    def hold(self, slots: Iterable[int]) -> None:
        """Let one more path hold each of ``slots``."""
        for slot in slots:
            assert self._holders[slot] > 0, f"slot {slot} is free"
            self._holders[slot] += 1

    def release(self, slots: Iterable[int]) -> None:
        """Let one path less hold each of ``slots``; those that none holds are free."""
        for slot in slots:
            assert self._holders[slot] > 0, f"slot {slot} is free already"
            self._holders[slot] -= 1
            if not self._holders[slot]:
                self._held -= 1
                heappush(self._free, slot)
        while self._holders and not self._holders[-1]:
            self._holders.pop()
