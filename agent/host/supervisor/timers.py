"""Schedules and health probes.

What happens to a running generation by the clock: its scheduled task, and the question how it is.

When a scheduled task is due: `every_ms` after the last start, or by a cron line in the board's own time zone.

A time that the clock skips is not made up, and a time that comes twice is run once.
"""

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from typing import Final

from agent.host.ipc import worker_api
from agent.host.ipc.host_api import plain
from agent.host.supervisor.generation import Generation
from agent.host.supervisor.worker_handle import WorkerGoneError, WorkerHandle
from agent.host.supervisor.worker_set import GRACE_S
from fleet.protocol import manifest
from fleet.protocol.manifest import Health, Schedule

MIN_EVERY_MS: Final = 100

_LONGEST_SLEEP_S: Final = 60.0


class ScheduleTimer:
    """Waits for the next time a schedule is due."""

    def __init__(self, schedule: Schedule) -> None:
        """Raises `cron.BadCronError` for a cron line that is none, or never comes due."""
        self._cron = None if schedule.cron is None else manifest.parse(manifest.check(schedule.cron))
        self._every_s = max(schedule.every_ms or 60_000, MIN_EVERY_MS) / 1000
        self._next_s = time.monotonic() + self._every_s

    async def next(self) -> int:
        """Wait until it is due; when it was due, in milliseconds since 1970 (UTC)."""
        if self._cron is None:
            await asyncio.sleep(self._next_s - time.monotonic())
            late_s = time.monotonic() - self._next_s
            self._next_s = max(self._next_s, time.monotonic() - self._every_s) + self._every_s
            return int((time.time() - max(0.0, late_s)) * 1000)
        coming = self._cron.next_after(datetime.now())  # noqa: DTZ005 - the board's own zone is meant
        assert coming is not None, "checked when it was read"
        due = coming.timestamp()
        # In short sleeps, since the clock may be set meanwhile.
        while (left_s := due - time.time()) > 0:  # noqa: ASYNC110 - what is waited for is the clock
            await asyncio.sleep(min(left_s, _LONGEST_SLEEP_S))
        return int(due * 1000)


HEALTH: Final = "wasmfleet:http/health"

QUESTIONS: Final = 5
"""Questions in a probation, at least: enough for a second bad answer long before its end."""

_PROBLEM_MAX_CHARS: Final = 300  # it goes into the health of the board, beside that of every other instance


def pace_s(health: Health, *, probation: bool) -> float | None:
    """Seconds between two questions of the health check; None for no more questions."""
    paces_ms: list[float] = [health.interval_ms]
    if probation:
        paces_ms.append(health.probation_ms / QUESTIONS)
    shortest_ms = min((pace for pace in paces_ms if pace > 0), default=None)
    return None if shortest_ms is None or not health.check else max(shortest_ms, MIN_EVERY_MS) / 1000


class InstanceTimers:
    """The clocks of one generation, from `__init__` to `end`.

    `note(text)` takes a line for the log; `health(lane, problem)` what the guest said of itself.
    """

    def __init__(
        self, generation: Generation, *, note: Callable[[str], None], health: Callable[[WorkerHandle, str | None], None]
    ) -> None:
        self._generation = generation
        self._note = note
        self._health = health
        self._tasks: list[asyncio.Task[None]] = []
        self._question: asyncio.Task[None] | None = None
        manifest = generation.run.manifest
        if isinstance(manifest.trigger, Schedule):
            self._tasks.append(asyncio.ensure_future(self._tick(ScheduleTimer(manifest.trigger))))
        if manifest.health.check:
            self._tasks.append(asyncio.ensure_future(self._visit()))

    def end(self) -> None:
        """Stop them."""
        for task in (*self._tasks, *filter(None, [self._question])):
            if task is not asyncio.current_task():
                task.cancel()

    async def _tick(self, clock: ScheduleTimer) -> None:
        generation = self._generation
        timeout_s = generation.run.limits.total_ms / 1000 + GRACE_S
        while True:
            due_ms = await clock.next()
            if not generation.alive:
                continue
            lane = generation.alive[0]
            try:
                ran = await lane.ask(worker_api.Task(scheduled_ms=due_ms), answer=worker_api.Ran, timeout_s=timeout_s)
            except WorkerGoneError:
                continue
            except TimeoutError:
                lane.kill("its task did not end in time")
                continue
            if isinstance(ran, worker_api.Ran) and ran.problem is not None:
                self._note(f"host: its task failed: {ran.problem}")

    async def ask(self, wait_s: float | None = None) -> None:
        """Ask the health check, or join whoever is asking it; return after `wait_s` seconds without an answer."""
        if not self._generation.run.manifest.health.check:
            return
        if self._question is None or self._question.done():
            self._question = asyncio.ensure_future(self._put_question())
        # Not awaited itself: whoever waits goes on when the question ends with these clocks.
        await asyncio.wait([self._question], timeout=wait_s)

    async def _put_question(self) -> None:
        lanes = self._generation.alive
        if lanes:
            self._health(lanes[0], await ask_health(self._generation, lanes[0]))

    async def _visit(self) -> None:
        # Looked up anew each time: a commit ends the shorter pace.
        while pause_s := pace_s(self._generation.run.manifest.health, probation=self._generation.probation):
            await asyncio.sleep(pause_s)
            await self.ask()


async def ask_health(generation: Generation, lane: WorkerHandle) -> str | None:
    """The guest's own word on its health: None for well, else a sentence."""
    if HEALTH not in generation.kinds:
        return f"it exports no {HEALTH}, which its manifest promises"
    timeout_s = generation.run.limits.total_ms / 1000 + GRACE_S
    try:
        answer = await lane.ask(worker_api.Check(), answer=worker_api.Checked, timeout_s=timeout_s)
    except WorkerGoneError as error:
        return str(error)
    except TimeoutError:
        return "it does not answer its health check"
    if not isinstance(answer, worker_api.Checked) or answer.problem is None:
        return None
    return plain(answer.problem, _PROBLEM_MAX_CHARS).replace("\n", " ")
