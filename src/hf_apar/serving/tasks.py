"""The common part of engines that are asked over a network or a queue: in asyncio, a task for each request of a driver."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Collection

from hf_apar.serving.answer import Answer
from hf_apar.serving.driver import ThreadRequest

_PATIENCE = 1.0  # seconds that a request which has ended may take to close


class TaskEngine(ABC):
    """Starts and cancels the tasks; a subclass says how a request is followed, and how busy the engine is."""

    def __init__(self) -> None:
        self._tasks: dict[ThreadRequest, asyncio.Task[None]] = {}

    @abstractmethod
    async def follow(self, request: ThreadRequest) -> None:
        """Write ``request`` and tell the driver what it makes, until it has ended; errors are this method's to tell."""

    def start(self, request: ThreadRequest) -> None:
        """Begin to follow a request."""
        task = self._tasks[request] = asyncio.create_task(self.follow(request))
        task.add_done_callback(lambda _: self._tasks.pop(request))

    def cancel(self, request: ThreadRequest) -> None:
        """Follow a request no longer."""
        if (task := self._tasks.get(request)) is not None:  # else it has met an error
            task.cancel()

    async def settled(self, answers: Collection[Answer]) -> None:
        """Return once nothing runs for ``answers``, which the driver has let go."""
        if tasks := [task for request, task in self._tasks.items() if request.answer in answers]:
            _, late = await asyncio.wait(tasks, timeout=_PATIENCE)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
