"""How many lanes an instance has, and where: one more while calls wait, one fewer when they no longer do.

One that shares moves to a fuller lane when it can, so that its own may become empty and end. Whatever is moved, the
clients' connections go along, and nobody is lost. What an instance keeps in its memory is not moved.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from agent.host.crew import Crew, Tasks
from agent.host.generation import Generation, StartError
from agent.host.handle import LaneGoneError

_SPARE_S: Final = 60.0


class Staffing:
    """The lanes of one instance, by what there is to do."""

    def __init__(
        self,
        crew: Crew,
        tasks: Tasks,
        lock: asyncio.Lock,
        *,
        note: Callable[[str], None],
        is_current: Callable[[Generation], bool],
    ) -> None:
        """`lock` is the instance's, `note(text)` takes a line for its log."""
        self._crew = crew
        self._tasks = tasks
        self._lock = lock
        self._note = note
        self._is_current = is_current
        self._raising = False
        self._busy_s = 0.0

    def busy(self, generation: Generation) -> None:
        """A call of the current generation takes its time: another lane would be of use, if it may have one."""
        self._busy_s = time.monotonic()
        few = len(generation.lanes) < generation.run.limits.concurrency
        if few and not self._raising and not self._lock.locked():
            self._raising = True
            self._tasks.spawn(self._raise_another(generation))

    def watch(self, generation: Generation) -> None:
        """Look after the current generation, from time to time."""
        if self._lock.locked():
            return
        if len(generation.alive) > 1 and time.monotonic() - self._busy_s > _SPARE_S:
            self._tasks.spawn(self._fewer(generation))
        elif self._crew.fuller(generation):
            self._tasks.spawn(self._move(generation))

    async def _raise_another(self, generation: Generation) -> None:
        try:
            async with self._lock:
                if self._is_current(generation) and not generation.dropped:
                    await self._crew.raise_lane(generation)
        except (StartError, LaneGoneError) as error:
            self._note(f"host: no further lane: {error}")
        finally:
            self._raising = False

    async def _fewer(self, generation: Generation) -> None:
        """Let the youngest lane go; its connections move to another."""
        async with self._lock:
            alive = generation.alive
            if self._is_current(generation) and len(alive) > 1:
                await self._crew.hand_over([alive[-1]], alive[:-1])
                self._crew.retire(generation, alive[-1])

    async def _move(self, generation: Generation) -> None:
        """To a shared lane with more seats taken."""
        async with self._lock:
            old = generation.alive
            if not self._is_current(generation) or not self._crew.fuller(generation):
                return
            try:
                lane = await self._crew.raise_lane(generation)
            except (StartError, LaneGoneError) as error:
                self._note(f"host: it stays in its lane: {error}")
                return
            await self._crew.hand_over(old, [lane])
            for each in old:
                self._crew.retire(generation, each)
