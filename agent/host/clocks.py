"""What happens to a running generation by the clock: its scheduled task, and the question how it is."""

import asyncio
from collections.abc import Callable
from typing import Final

from agent.host import control
from agent.host.crew import GRACE_S
from agent.host.generation import Generation
from agent.host.handle import Lane, LaneGoneError
from agent.host.record import plain
from agent.host.schedule import MIN_EVERY_MS, Clock
from fleet.protocol.manifest import Schedule

HEALTH: Final = "wasmfleet:http/health"
_PROBLEM_MAX_CHARS: Final = 300  # it goes into the health of the board, beside that of every other instance


class Clocks:
    """The clocks of one generation, from `__init__` to `end`.

    `note(text)` takes a line for the log; `health(lane, problem)` what the guest said of itself.
    """

    def __init__(
        self, generation: Generation, *, note: Callable[[str], None], health: Callable[[Lane, str | None], None]
    ) -> None:
        self._generation = generation
        self._note = note
        self._health = health
        self._tasks: list[asyncio.Task[None]] = []
        manifest = generation.run.manifest
        if isinstance(manifest.trigger, Schedule):
            self._tasks.append(asyncio.ensure_future(self._tick(Clock(manifest.trigger))))
        if manifest.health.check and manifest.health.interval_ms > 0:
            interval_ms = max(manifest.health.interval_ms, MIN_EVERY_MS)
            self._tasks.append(asyncio.ensure_future(self._visit(interval_ms / 1000)))

    def end(self) -> None:
        """Stop them."""
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def _tick(self, clock: Clock) -> None:
        generation = self._generation
        timeout_s = generation.run.limits.total_ms / 1000 + GRACE_S
        while True:
            due_ms = await clock.next()
            if not generation.alive:
                continue
            lane = generation.alive[0]
            try:
                ran = await lane.ask(control.Task(scheduled_ms=due_ms), answer=control.Ran, timeout_s=timeout_s)
            except LaneGoneError:
                continue
            except TimeoutError:
                lane.kill("its task did not end in time")
                continue
            if isinstance(ran, control.Ran) and ran.problem is not None:
                self._note(f"host: its task failed: {ran.problem}")

    async def _visit(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            lanes = self._generation.alive
            if lanes:
                self._health(lanes[0], await ask_health(self._generation, lanes[0]))


async def ask_health(generation: Generation, lane: Lane) -> str | None:
    """The guest's own word on its health: None for well, else a sentence."""
    if HEALTH not in generation.kinds:
        return f"it exports no {HEALTH}, which its manifest promises"
    timeout_s = generation.run.limits.total_ms / 1000 + GRACE_S
    try:
        answer = await lane.ask(control.Check(), answer=control.Checked, timeout_s=timeout_s)
    except LaneGoneError as error:
        return str(error)
    except TimeoutError:
        return "it does not answer its health check"
    if not isinstance(answer, control.Checked) or answer.problem is None:
        return None
    return plain(answer.problem, _PROBLEM_MAX_CHARS).replace("\n", " ")
