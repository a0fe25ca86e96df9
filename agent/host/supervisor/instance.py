"""Instance life cycle: swap, crash, quarantine; its log.

One instance: its generations, their lanes, and how one generation takes over from another.

    start     a lane for the new generation is raised beside the old, checked, given the listener; then the old lanes
              stop accepting and pass their connections on. The old generation stays warm until `commit` or `revert`.
    crash     a lane that dies is replaced after a growing, jittered pause; too many deaths in a row are a quarantine.

Everything here runs on the supervisor's loop; changes of one instance are serialised by its lock.

What an instance has to tell: its last log lines, and the events that go to whoever is connected.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from agent.host.ipc import host_api, worker_api
from agent.host.ipc.host_api import StartError, plain
from agent.host.ipc.stats_page import CallStats, count_of
from agent.host.ipc.write_quota import QuotaLedger, QuotaStore
from agent.host.supervisor import swap
from agent.host.supervisor.generation import Generation, forget_other_schemas, too_much
from agent.host.supervisor.helpers import EgressHandle
from agent.host.supervisor.resources import Cgroups, CrashCounter, Listeners
from agent.host.supervisor.timers import InstanceTimers, ScheduleTimer, ask_health
from agent.host.supervisor.worker_handle import WorkerGoneError, WorkerHandle
from agent.host.supervisor.worker_pool import ZygotePool
from agent.host.supervisor.worker_set import DRAIN_MS, Autoscaler, Tasks, WorkerSet
from fleet.protocol import bounds
from fleet.protocol.codes import GUEST_FAULTS, CallOutcome, InstanceState, RejectCode
from fleet.protocol.manifest import BadCronError, Http, Schedule
from fleet.protocol.messages import InstanceHealth

_HANDLER: Final = "wasmfleet:http/handler"

_TASK: Final = "wasmfleet:schedule/task"

_FIRST_PAUSE_S: Final = 0.1

_LONGEST_PAUSE_S: Final = 60.0

_MIN_UPTIME_S: Final = 30.0

_CRASHES_MAX: Final = 5

_UNWELL_MAX: Final = 3

_WHY_MAX_CHARS: Final = 200


class Instance:
    """An instance as the supervisor has it."""

    def __init__(
        self,
        name: str,
        *,
        nursery: ZygotePool,
        listeners: Listeners,
        uid: Callable[[str], int | None],
        deaths: CrashCounter,
        daily: QuotaStore,
        data: Path,
        cgroups: Cgroups,
        emit: Callable[[host_api.Event], None],
        route: Callable[..., Awaitable[None]],
        outlet: EgressHandle,
    ) -> None:
        self.name = name
        self.state = InstanceState.STOPPED
        self.error = ""
        self.since: datetime | None = None
        self.restarts = 0
        self.current: Generation | None = None
        self.previous: Generation | None = None
        self.lock = asyncio.Lock()
        self._listeners = listeners
        self._deaths = deaths
        self._account = QuotaLedger(name, daily)
        self._tasks = Tasks()
        self._crew = WorkerSet(
            name,
            nursery=nursery,
            uid=uid,
            data=data,
            cgroups=cgroups,
            tasks=self._tasks,
            account=self._account,
            on_said=self._said,
            on_end=self._lane_ended,
            outlet=outlet,
        )
        self._record = InstanceLog(name, emit)
        self._staffing = Autoscaler(
            self._crew, self._tasks, self.lock, note=self._record.note, is_current=lambda which: which is self.current
        )
        self._route = route
        self._crashes = 0
        self._reverted: tuple[int, int] | None = None
        self._clocks: InstanceTimers | None = None

    # What the agent asks for.

    async def start(
        self,
        run: host_api.Run,
        image_fd: int,
        secrets_fd: int = -1,
        *,
        ready: Callable[[], Awaitable[None]] | None = None,
        probation: bool = False,
    ) -> tuple[int | None, int]:
        """Run this generation; (the one replaced, milliseconds of the handover). The descriptors become this object's.

        `ready` is awaited when it could take over, and may raise `StartError` still. `probation` lasts until `commit`.

        Raises:
            StartError: nothing changed.
        """
        new = Generation(run, image_fd, secrets_fd, probation=probation)
        try:
            await self._prepare(new)
            if ready is not None:
                await ready()
            began = time.monotonic()
            await self._carry(self.current, new)
            await self._offer(self.current, new)
        except BaseException:
            self._crew.drop(new)
            raise
        old, warm = self.current, self.previous
        await self._switch(old, new)
        self.previous = old
        if warm is not None:
            self._crew.drop(warm)
        return (None if old is None else old.number), int((time.monotonic() - began) * 1000)

    async def commit(self, number: int) -> None:
        """End the probation of the generation with this number, and drop the one kept warm."""
        if self.current is None or self.current.number != number:
            return
        self.current.probation = False
        if self.previous is not None:
            warm, self.previous = self.previous, None
            self._crew.drop(warm)
            await forget_other_schemas(self.current.data)

    async def revert(self, number: int) -> int:
        """Back to the generation kept warm, whether `number` names the one to leave or the one to return to.

        Raises:
            StartError: HOST_GONE: there is none any more.
        """
        current, warm = self.current, self.previous
        if warm is None and current is not None and self._reverted is not None and number in self._reverted:
            return 0
        if current is None or warm is None or number not in {current.number, warm.number}:
            raise StartError(RejectCode.HOST_GONE, f"{self.name}: the previous generation is not there any more")
        began = time.monotonic()
        self._listen(warm)
        if not warm.alive:
            await self._crew.raise_lane(warm, serve=False)
        await self._end_tasks(current)
        if problem := await swap.carry_back(current, warm):
            self._record.note(f"host: {problem}")
        await self._offer(current, warm)
        await self._switch(current, warm)
        self.previous = None
        self._reverted = (current.number, warm.number)
        self._crew.drop(current)
        return int((time.monotonic() - began) * 1000)

    async def restart(self) -> None:
        """Start the running generation anew."""
        if self.current is None:
            return
        generation = self.current
        old = list(generation.lanes)
        self._crashes = 0
        self._listen(generation)
        lane = await self._crew.raise_lane(generation)
        await self._end_tasks(generation)
        await self._crew.hand_over(old, [lane])
        for each in old:
            self._crew.retire(generation, each)
        self.restarts += 1
        self._set(InstanceState.RUNNING)
        self._begin_clocks(generation)

    async def stop(self) -> None:
        """Drain, then end everything."""
        self._end_clocks()
        if self.current is not None:
            await self._crew.hand_over(self.current.alive, [], wait_s=DRAIN_MS / 1000)
        for generation in (self.current, self.previous):
            if generation is not None:
                self._crew.drop(generation, drained=True)
        self.current = self.previous = None
        await self._tell_router()
        self._tasks.cancel()
        self._listeners.close(self.name)
        await self._crew.gone()
        self._account.written()
        self.state = InstanceState.STOPPED

    # Figures.

    def lines(self) -> tuple[str, ...]:
        """The last log lines, oldest first."""
        return self._record.lines()

    def told(self, number: int) -> host_api.Lines:
        """Its last lines as an answer."""
        return host_api.Lines(id=number, lines=self.lines(), count=self._record.count)

    def running(self) -> host_api.Running:
        """What the host tells of it in a welcome."""
        assert self.current is not None
        return host_api.Running(
            instance=self.name,
            generation=self.current.number,
            target=self.current.run.target,
            state=self.state,
            previous=None if self.previous is None else self.previous.number,
        )

    def health(self) -> InstanceHealth:
        """Its figures since this generation started."""
        assert self.current is not None
        figures = self.current.figures()
        return InstanceHealth(
            instance=self.name,
            target=self.current.run.target,
            generation=self.current.number,
            state=self.state,
            since=self.since,
            restarts=self.restarts,
            calls=figures.calls,
            errors=figures.errors,
            denials=figures.denials,
            dropped_lines=figures.dropped_lines,
            written_bytes=count_of(self._account.written()),
            outgoing=figures.outgoing,
            latencies=figures.spread(),
            cpu_ms=figures.cpu_ns // 1_000_000,
            p50_us=figures.percentile_us(0.5),
            p99_us=figures.percentile_us(0.99),
            memory_bytes=sum(lane.private_bytes() for lane in self.current.lanes),
            lanes=len(self.current.alive),
            shared_lane=next((lane.shared.name for lane in self.current.alive if lane.shared is not None), ""),
            manifest_sha256=self.current.run.manifest.digest(),
            error=plain(self.error, _WHY_MAX_CHARS * 2),
            checks=self.current.checks(),
        )

    async def ask_health(self, wait_s: float) -> None:
        """Ask its health check now, where it has one, and wait up to `wait_s` seconds for the answer."""
        if self._clocks is not None:
            await self._clocks.ask(wait_s)

    def watch(self) -> None:
        """What is looked after from time to time: overdue calls, spare lanes, crashes that are long past."""
        current = self.current
        if current is not None and current.alive and self._crashes and self._steady(current):
            self._crashes = 0
            self._deaths.note(self.name, current.run.target, 0)
        if current is not None and current.alive:
            if current.data and (why := too_much(current.data, current.run.limits.storage_bytes)):
                self._quarantine(current, why)
            self._account.written()
            self._staffing.watch(current)
        self._end_overdue()

    def _steady(self, generation: Generation) -> bool:
        """Whether every lane has been up for so long that earlier deaths say nothing any more."""
        return time.monotonic() - max(lane.since_s for lane in generation.alive) > _MIN_UPTIME_S

    def _end_overdue(self) -> None:
        """End lanes whose call is past any time it may take, should their own watch have failed."""
        for generation in (self.current, self.previous):
            if generation is None:
                continue
            limits = generation.run.limits
            longest_ms = max(limits.total_ms, limits.start_ms) + 5000
            for lane in generation.lanes:
                began_ns = lane.page.began_ns()
                taken_ms = (time.monotonic_ns() - began_ns) // 1_000_000
                if lane.alive and began_ns and taken_ms > longest_ms:
                    self._overdue(generation, lane, f"a call was still there after {taken_ms} ms, past all its time")

    # Raising and dropping.

    async def _prepare(self, new: Generation) -> None:
        trigger = new.run.manifest.trigger
        if isinstance(trigger, Schedule):
            try:
                ScheduleTimer(trigger)
            except BadCronError as error:
                raise StartError(RejectCode.START_FAILED, f"{self.name}: {error}") from error
        await self._crew.prepare_data(new, self.current)
        if new.alone:
            self._record.note(f"host: it has a lane of its own: {new.alone}")
        lane = await self._crew.raise_lane(new, serve=False)
        needed = _HANDLER if isinstance(trigger, Http) else _TASK if isinstance(trigger, Schedule) else ""
        if needed not in new.kinds:
            what = f"it exports no {needed}" if needed else f"this host has no {type(trigger).__name__} trigger"
            raise StartError(RejectCode.START_FAILED, f"{self.name}: {what}")
        if new.run.manifest.health.check:
            problem = await ask_health(new, lane)
            if problem is not None:
                raise StartError(RejectCode.HEALTH_FAILED, f"{self.name} is not well: {problem}")
        self._listen(new)

    def _listen(self, generation: Generation) -> None:
        """Give it the listener of its port: open still, or opened again. Raises `StartError` (PORT_IN_USE)."""
        if not isinstance(generation.run.manifest.trigger, Http):
            return
        port = generation.run.port
        try:
            generation.listener = self._listeners.open(self.name, port)
        except OSError as error:
            raise StartError(
                RejectCode.PORT_IN_USE, f"{self.name}: cannot listen on port {port}: {error.strerror}"
            ) from error

    async def _end_tasks(self, generation: Generation | None) -> None:
        """No task begins any more, and the one in flight has ended: two generations never run one at once."""
        self._end_clocks()
        if generation is not None and isinstance(generation.run.manifest.trigger, Schedule):
            await self._crew.settle(generation)

    async def _carry(self, old: Generation | None, new: Generation) -> None:
        """Memory from `old` to `new`, where both are made for that. Raises `StartError`, and `old` goes on."""
        swap.check(new)
        if old is None or not swap.carries(old, new):
            return
        await self._end_tasks(old)
        try:
            await swap.transfer_state(old, new)
        except StartError:
            self._begin_clocks(old)
            raise

    async def _offer(self, old: Generation | None, new: Generation) -> None:
        """Let `new` accept, which is ready. Raises `StartError`, and `old` goes on."""
        await self._end_tasks(old)
        try:
            self._crew.offer(new)
        except WorkerGoneError as error:
            if old is not None:
                swap.go_on(old)
                self._begin_clocks(old)
            raise StartError(RejectCode.START_FAILED, str(error)) from error

    async def _switch(self, old: Generation | None, new: Generation) -> None:
        """Traffic from `old` to `new`, which accepts."""
        if old is not None:
            await self._crew.hand_over(old.alive, new.alive)
            if old.listener is not None and old.listener is not new.listener:
                old.listener.sock.close()
        self.current = new
        self._crashes = min(self._deaths.of(self.name, new.run.target), _CRASHES_MAX - 1)
        new.unwell = 0
        self.since = datetime.now(UTC)
        self._set(InstanceState.RUNNING)
        self._begin_clocks(new)
        if not new.alive:
            self._died(new, new.lost, 0.0)
        await self._tell_router()

    # What lanes say, and how they end.

    def _said(self, generation: Generation, lane: WorkerHandle, message: worker_api.FromWorker) -> None:
        match message:
            case worker_api.Line(text=text, dropped=dropped):
                if dropped:
                    self._record.note(f"host: {dropped} lines were dropped: it logs too much")
                self._record.note(text)
            case worker_api.Fault(message=text):
                self._record.fault(generation, RejectCode.TRAPPED, text)
            case worker_api.Refused(message=text):
                self._record.note(f"host: {text}")
            case worker_api.Overdue(call=call, why=why):
                if lane.page.number() == call:  # else it has ended meanwhile, and its lane has counted it
                    self._overdue(generation, lane, why)
            case worker_api.Busy():
                if generation is self.current:
                    self._staffing.busy(generation)
            case _:
                pass

    def _overdue(self, generation: Generation, lane: WorkerHandle, why: str) -> None:
        timed_out = CallStats(calls={CallOutcome.GUEST_TIMEOUT.value: 1}, errors=1)
        generation.past = generation.past.plus(timed_out)
        lane.kill(why[:_WHY_MAX_CHARS], at_fault=True)

    def _lane_ended(self, generation: Generation, lane: WorkerHandle, uptime_s: float) -> None:
        if lane not in generation.lanes:
            return
        generation.lanes.remove(lane)
        generation.past = generation.past.plus(lane.page.read())
        why = lane.describe_end()
        lane.close()
        if generation.dropped or generation is not self.current:
            generation.lost = why
            return
        if lane.bystander_of:
            self._record.note(f"host: {why}")
            if not generation.alive:
                self._set(InstanceState.BACKOFF, why)
            self._tasks.spawn(self._replace(generation))
            return
        if lane.blamed:
            generation.alone = f"a lane that it shared was ended on its account: {why}"
        self._died(generation, why, uptime_s)

    def _died(self, generation: Generation, why: str, uptime_s: float) -> None:
        """The running generation has lost a lane by its own doing, after `uptime_s`: another, or quarantine."""
        self.restarts += 1
        self._crashes = 1 if uptime_s > _MIN_UPTIME_S else self._crashes + 1
        self._deaths.note(self.name, generation.run.target, self._crashes)
        self.error = why
        self._record.fault(generation, RejectCode.RESTARTED, why)
        if self._crashes >= _CRASHES_MAX:
            self._quarantine(generation, f"{self._crashes} deaths in a row; the last: {why}")
            return
        if not generation.alive:
            self._set(InstanceState.BACKOFF, why)
        self._tasks.spawn(self._replace(generation))

    def _quarantine(self, generation: Generation, why: str) -> None:
        self.error = why
        for lane in list(generation.lanes):
            self._crew.retire(generation, lane)
        self._end_clocks()
        if generation.listener is not None and generation.listener.port is not None:
            generation.listener.sock.close()  # nobody should wait there; behind the router, it says 503
        self._set(InstanceState.QUARANTINED, why)

    async def _replace(self, generation: Generation) -> None:
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 4 ** (self._crashes - 1))
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
        async with self.lock:
            if generation.dropped or generation is not self.current or self.state is InstanceState.QUARANTINED:
                return
            try:
                await self._crew.raise_lane(generation)
            except (StartError, WorkerGoneError) as error:
                self._crashes += 1
                self._deaths.note(self.name, generation.run.target, self._crashes)
                self.error = str(error)
                if self._crashes >= _CRASHES_MAX:
                    self._quarantine(generation, f"{self._crashes} deaths in a row; the last: {error}")
                else:
                    self._tasks.spawn(self._replace(generation))
                return
            if self.state is InstanceState.BACKOFF:
                self._set(InstanceState.RUNNING)

    def _set(self, state: InstanceState, message: str = "") -> None:
        if state is self.state:
            return
        before, self.state = self.state, state
        if state is InstanceState.RUNNING:
            self.error = ""
        tell = state in {InstanceState.BACKOFF, InstanceState.QUARANTINED} or before in {
            InstanceState.BACKOFF,
            InstanceState.QUARANTINED,
        }
        if tell and self.current is not None:
            self._record.changed(self.current, state, message)
            self._tasks.spawn(self._tell_router())

    async def _tell_router(self) -> None:
        """Whether it answers behind the router; a first, short pause is not worth a 503."""
        behind = self.current is not None and self.current.listener is not None and self.current.listener.port is None
        brief = self.state is InstanceState.BACKOFF and self._crashes <= 1
        up = self.state is InstanceState.RUNNING or brief
        spread = self.current is not None and self.current.run.limits.concurrency > 1
        await self._route(self.name, up=up if behind else None, spread=spread)

    # Clocks.

    def _begin_clocks(self, generation: Generation) -> None:
        self._end_clocks()
        self._clocks = InstanceTimers(generation, note=self._record.note, health=self._health_said)

    def _end_clocks(self) -> None:
        if self._clocks is not None:
            self._clocks.end()
            self._clocks = None

    def _health_said(self, lane: WorkerHandle, problem: str | None) -> None:
        generation = self.current
        assert generation is not None
        generation.count_check(well=problem is None)
        if problem is None:
            self.error = "" if self.state is InstanceState.RUNNING else self.error
            return
        self.error = f"it is not well: {problem}"
        self._record.fault(generation, RejectCode.HEALTH_FAILED, self.error)
        if generation.unwell % _UNWELL_MAX == 0 and lane.alive:
            lane.end(f"{self.error}, {_UNWELL_MAX} times in a row")


_LINE_MAX_CHARS: Final = 1100


class InstanceLog:
    """The log of one instance, and the way to tell of its faults and changes."""

    def __init__(self, name: str, emit: Callable[[host_api.Event], None]) -> None:
        self._name = name
        self._emit = emit
        self._log: deque[str] = deque(maxlen=bounds.LOG_LINES)
        self.count = 0

    def note(self, text: str) -> None:
        """A line for the log."""
        self._log.append(plain(text, _LINE_MAX_CHARS).replace("\n", " "))
        self.count += 1

    def lines(self) -> tuple[str, ...]:
        """The last log lines, oldest first, within the cap on bytes."""
        kept: list[str] = []
        size = 0
        for line in reversed(self._log):
            size += len(line.encode()) + 1
            if size > bounds.LOG_MAX_BYTES:
                break
            kept.append(line)
        return tuple(reversed(kept))

    def fault(self, generation: Generation, code: RejectCode, message: str) -> None:
        """A guest's fault: into the log, and told with it."""
        generation.faults += 1
        first = message.splitlines()[0] if message else ""
        self.note(f"host: {first}")
        counted = sum(generation.figures().calls.get(outcome, 0) for outcome in GUEST_FAULTS)
        if not generation.dropped:
            self._emit(
                host_api.Trapped(
                    instance=self._name,
                    generation=generation.number,
                    code=code,
                    message=plain(message),
                    faults=count_of(max(generation.faults, counted)),
                    log=self.lines(),
                )
            )

    def changed(self, generation: Generation, state: InstanceState, message: str) -> None:
        """Its state is another."""
        event = host_api.Changed(
            instance=self._name, generation=generation.number, state=state, message=plain(message), log=self.lines()
        )
        self._emit(event)
