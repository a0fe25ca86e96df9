"""Calls of an instance beside requests: its scheduled task, its health check, and messages of the bus.

A task is due `every_ms` after its last start, or by a cron line in the device's time zone (`wall_clock`).
"""

import asyncio
import time
from typing import Final, Protocol

from agent.host.ipc import worker_api
from agent.host.ipc.host_api import plain
from agent.host.supervisor.bus import Bus, BusMessage, Queue
from agent.host.supervisor.generation import Generation
from agent.host.supervisor.instance_log import InstanceLog
from agent.host.supervisor.wall_clock import CronTimer
from agent.host.supervisor.worker_handle import WorkerGoneError, WorkerHandle
from agent.host.supervisor.worker_set import GRACE_S
from fleet.protocol import manifest
from fleet.protocol.manifest import Health, Http, OnMessage, Schedule

MIN_EVERY_MS: Final = 100


class ScheduleTimer:
    """Timer of a schedule."""

    def __init__(self, schedule: Schedule) -> None:
        """Prepare a timer; raises `BadCronError` for a cron line that is malformed or never due."""
        self._cron = None if schedule.cron is None else CronTimer(manifest.parse(manifest.check(schedule.cron)))
        self._every_s = max(schedule.every_ms or 60_000, MIN_EVERY_MS) / 1000
        self._next_s = time.monotonic() + self._every_s

    async def next(self) -> int:
        """Wait until the schedule is due; return that time in milliseconds since 1970 (UTC)."""
        if self._cron is None:
            await asyncio.sleep(self._next_s - time.monotonic())
            late_s = time.monotonic() - self._next_s
            self._next_s = max(self._next_s, time.monotonic() - self._every_s) + self._every_s
            return int((time.time() - max(0.0, late_s)) * 1000)
        return int(await self._cron.next() * 1000)


HEALTH: Final = "wasmfleet:http/health"
QUESTIONS: Final = 5
"""Minimum number of health checks in a probation: enough for two failures long before its end."""

_PROBLEM_MAX_CHARS: Final = 300  # part of the device's health report, beside every other instance


def pace_s(health: Health, *, probation: bool) -> float | None:
    """Return the seconds between two health checks; None for no more checks."""
    paces_ms: list[float] = [health.interval_ms]
    if probation:
        paces_ms.append(health.probation_ms / QUESTIONS)
    shortest_ms = min((pace for pace in paces_ms if pace > 0), default=None)
    return None if shortest_ms is None or not health.check else max(shortest_ms, MIN_EVERY_MS) / 1000


class HealthEvents(Protocol):
    """Receiver of health checks."""

    def health_answered(self, worker: WorkerHandle, problem: str | None) -> None:
        """Handle a result of the serving generation's health check; None for healthy."""


class InstanceTimers:
    """Timers of the serving generation."""

    def __init__(self, log: InstanceLog, bus: Bus, events: HealthEvents) -> None:
        self._log = log
        self._bus = bus
        self._events = events
        self._generation: Generation | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._question: asyncio.Task[None] | None = None

    def start(self, generation: Generation) -> None:
        """Start the timers of a generation, in place of the running ones."""
        self.stop()
        self._generation = generation
        manifest = generation.run.manifest
        in_turn = asyncio.Lock()
        for schedule in manifest.triggers_of(Schedule):
            work = self._run_tasks(generation, ScheduleTimer(schedule), schedule.args, in_turn)
            self._tasks.append(asyncio.ensure_future(work))
        if (queue := self._bus.subscribe(generation.run, self._log.note)) is not None:
            self._tasks.append(asyncio.ensure_future(self._hand_over_messages(generation, queue)))
        if manifest.health.check:
            self._tasks.append(asyncio.ensure_future(self._check_health(generation)))

    def stop(self) -> None:
        """Stop the running timers."""
        for task in (*self._tasks, *filter(None, [self._question])):
            if task is not asyncio.current_task():
                task.cancel()
        self._generation, self._tasks, self._question = None, [], None

    async def ask(self, wait_s: float | None = None) -> None:
        """Run the health check, or wait for one that is running; return after `wait_s` seconds without a result."""
        generation = self._generation
        if generation is None or not generation.run.manifest.health.check:
            return
        if self._question is None or self._question.done():
            self._question = asyncio.ensure_future(self._ask(generation))
        # Not awaited directly: waiters must continue if the check ends with these timers.
        await asyncio.wait([self._question], timeout=wait_s)

    async def _ask(self, generation: Generation) -> None:
        if workers := generation.alive:
            self._events.health_answered(workers[0], await ask_health(generation, workers[0]))

    async def _run_tasks(
        self, generation: Generation, timer: ScheduleTimer, args: tuple[str, ...], in_turn: asyncio.Lock
    ) -> None:
        while True:
            task = worker_api.Task(scheduled_ms=await timer.next(), args=args)
            async with in_turn:  # tasks of an instance take turns, whichever schedule they are of
                await self._run_task(generation, task)

    async def _run_task(self, generation: Generation, task: worker_api.Task) -> None:
        if not generation.alive:
            return
        worker = generation.alive[0]
        try:
            ran = await worker.request(task, reply=worker_api.Ran, timeout_s=_turn_s(generation))
        except WorkerGoneError:
            return
        except TimeoutError:
            worker.kill("its task did not end in time")
            return
        if ran.problem is not None:
            self._log.note(f"host: its task failed: {ran.problem}")

    async def _hand_over_messages(self, generation: Generation, queue: Queue) -> None:
        while True:
            await queue.due()
            await generation.until_alive()
            await queue.attempt(lambda message: _deliver(generation, message))

    async def _check_health(self, generation: Generation) -> None:
        # Evaluated each time: a commit ends the shorter interval.
        while pause_s := pace_s(generation.run.manifest.health, probation=generation.probation):
            await asyncio.sleep(pause_s)
            await self.ask()


def _turn_s(generation: Generation) -> float:
    """Return the longest time of a call whose worker may have begun one of each other trigger, which ends first."""
    kinds = {type(each) for each in generation.run.manifest.triggers} & {Http, Schedule, OnMessage}
    return max(1, len(kinds)) * generation.run.limits.total_ms / 1000 + GRACE_S


async def _deliver(generation: Generation, message: BusMessage) -> str | None:
    """Run the handler of a generation with a message; None for handled, else why not."""
    if not (alive := generation.alive):
        return generation.lost or "its worker has ended"
    worker = next((each for each in alive if each.is_idle), alive[0])
    order = worker_api.Deliver(
        topic=message.topic, data=message.data, content_type=message.content_type, metadata=message.metadata
    )
    try:
        answer = await worker.request(order, reply=worker_api.Delivered, timeout_s=_turn_s(generation))
    except WorkerGoneError as error:
        return str(error)
    except TimeoutError:
        worker.kill(why := "its message handler did not end in time")
        return why
    return answer.problem


async def ask_health(generation: Generation, worker: WorkerHandle) -> str | None:
    """Run the guest's health check: None for healthy, else a sentence."""
    if HEALTH not in generation.kinds:
        return f"it exports no {HEALTH}, which its manifest promises"
    timeout_s = generation.run.limits.total_ms / 1000 + GRACE_S
    try:
        answer = await worker.request(worker_api.Check(), reply=worker_api.Checked, timeout_s=timeout_s)
    except WorkerGoneError as error:
        return str(error)
    except TimeoutError:
        return "it does not answer its health check"
    if answer.problem is None:
        return None
    return plain(answer.problem, _PROBLEM_MAX_CHARS).replace("\n", " ")
