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
from fleet.protocol.manifest import Health, Schedule

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
        self._question: asyncio.Task[None] | None = None
        manifest = generation.run.manifest
        if isinstance(manifest.trigger, Schedule):
            self._tasks.append(asyncio.ensure_future(self._tick(Clock(manifest.trigger))))
        if manifest.health.check:
            self._tasks.append(asyncio.ensure_future(self._visit()))

    def end(self) -> None:
        """Stop them."""
        for task in (*self._tasks, *filter(None, [self._question])):
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
