"""Instance life cycle: start, swap, commit, revert, restart, stop; crash, back-off, quarantine.

    swap      a worker of the new generation is started beside the old one, checked, and given the listener; then the
              old workers end the calls that they have. The old generation stays warm until `commit`
              or `revert`. See `agent.host.supervisor.swap` for the sequence.
    crash     a worker that dies is replaced after a growing, jittered pause; too many consecutive crashes lead to
              quarantine. See `agent.host.supervisor.crash_policy` for the numbers.

Everything here runs on the supervisor's event loop; changes of an instance are serialised by its lock.
"""

import asyncio
import random
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Final, NamedTuple

import msgspec

from agent.host.ipc import helper_api, host_api, worker_api
from agent.host.ipc.host_api import StartError, plain
from agent.host.ipc.stats_page import CallStats, count_of
from agent.host.supervisor import swap
from agent.host.supervisor.agent_server import EventQueue
from agent.host.supervisor.call_watch import CallWatch
from agent.host.supervisor.crash_policy import CrashPolicy, Quarantine, Replace, Restart
from agent.host.supervisor.generation import (
    Generation,
    forget_other_pairs,
    forget_other_schemas,
    remove_tree,
    storage_problem,
)
from agent.host.supervisor.helpers import EgressHandle, RouterHandle
from agent.host.supervisor.instance_log import InstanceLog
from agent.host.supervisor.keyvalue_handle import KeyValueHandle, needs_keyvalue
from agent.host.supervisor.resources import HostResources, NoRoomError, check_room
from agent.host.supervisor.timers import InstanceTimers
from agent.host.supervisor.worker_handle import WorkerGoneError, WorkerHandle
from agent.host.supervisor.worker_pool import WorkerPool
from agent.host.supervisor.worker_set import DRAIN_MS, Autoscaler, WorkerSet
from fleet.component.wasi import METRICS
from fleet.protocol.codes import GUEST_FAULTS, CallOutcome, InstanceState, RejectCode
from fleet.protocol.messages import InstanceHealth, LocalFigures

_FAILED_CHECKS_MAX: Final = 3
"""Consecutive failed health checks after which the worker is replaced."""

_OVERDUE_GRACE_MS: Final = 5000  # for a worker whose own watchdog has failed

_NO_ROOM_PAUSE_S: Final = 2.0
"""Pause before a worker is tried again that the device had no room for: no event says when there is some."""

_REASON_MAX_CHARS: Final = 200

_STOPPED, _RUNNING = InstanceState.STOPPED, InstanceState.RUNNING
_BACKOFF, _QUARANTINED = InstanceState.BACKOFF, InstanceState.QUARANTINED

TRANSITIONS: Final[Mapping[InstanceState, frozenset[InstanceState]]] = {
    _STOPPED: frozenset({_RUNNING}),
    _RUNNING: frozenset({_BACKOFF, _QUARANTINED, _STOPPED}),
    _BACKOFF: frozenset({_RUNNING, _QUARANTINED, _STOPPED}),
    _QUARANTINED: frozenset({_RUNNING, _STOPPED}),
}


class Swapped(NamedTuple):
    """Successful swap.

    Attributes:
        replaced: number of the generation that was replaced; None for none.
        swap_ms: duration of the handover.
    """

    replaced: int | None
    swap_ms: int


class _Reverted(NamedTuple):
    """Numbers of the last revert, to answer a repeated request."""

    left: int
    returned_to: int


class Instance:
    """Instance with its generations; receives its workers' reports."""

    def __init__(
        self,
        name: str,
        resources: HostResources,
        pool: WorkerPool,
        *,
        egress: EgressHandle,
        keyvalue: KeyValueHandle,
        router: RouterHandle | None,
        events: EventQueue,
    ) -> None:
        self.name = name
        self.state = InstanceState.STOPPED
        self.error = ""
        self.since: datetime | None = None
        self.restarts = 0
        self._swaps = self._swap_ms = 0
        self.current: Generation | None = None
        self.previous: Generation | None = None
        self.lock = asyncio.Lock()
        self._resources = resources
        self._router = router
        self._events = events
        self._log = InstanceLog(resources.logs.open(name))
        self._crashes = CrashPolicy()
        self._workers = WorkerSet(name, resources, pool, egress=egress, keyvalue=keyvalue, router=router, events=self)
        self._timers = InstanceTimers(self._log, resources.messages.bus, self)
        self._autoscaler = Autoscaler(self._workers, self.lock, self._log)
        self._parts = swap.SwapParts(name, self._workers, self._timers, resources.listeners, self._log)
        self._reverted: _Reverted | None = None
        self._watches: dict[WorkerHandle, CallWatch] = {}

    # Requests of the agent; the caller holds the lock.

    async def start(
        self,
        run: host_api.Run,
        image_fd: int,
        secrets_fd: int = -1,
        *,
        place: swap.BarrierPlace | None = None,
        probation: bool = False,
    ) -> Swapped:
        """Run this generation in place of the current one. This object owns the descriptors.

        `place`: at the barrier of an atomic set, to wait for the other members. `probation` lasts until `commit`.

        Raises:
            StartError: nothing changed.
        """
        new = Generation(run, image_fd, secrets_fd, probation=probation)
        old, warm = self.current, self.previous
        try:
            began_s = await swap.take_over(self._parts, old, new, place)
        except StartError as error:
            self._release_hardware()
            self._start_if_down(error)
            raise
        await self._switch(old, new)
        self.previous = old
        if warm is not None:
            self._workers.drop(warm)
        self._release_hardware()
        return Swapped(None if old is None else old.number, self._swapped(began_s) if old else _ms_since(began_s))

    async def commit(self, number: int) -> None:
        """End the probation of the generation with this number, and drop the previous one."""
        if self.current is None or self.current.number != number:
            return
        self.current.probation = False
        if self.previous is not None:
            warm, self.previous = self.previous, None
            self._workers.drop(warm)
            self._release_hardware()
            await forget_other_schemas(self.current.data)
            if needs_keyvalue(self.current.run.grants):
                home = self._resources.pairs / self.name
                await forget_other_pairs(home, self.current.run.manifest.data_schema)

    async def revert(self, number: int) -> int:
        """Roll back to the generation kept warm; `number` names the generation to leave or the one to return to.

        Returns:
            Milliseconds of the handover; 0 for a revert that has been done already.

        Raises:
            StartError: HOST_GONE: no generation is kept warm.
        """
        current, warm = self.current, self.previous
        if warm is None and current is not None and self._reverted is not None and number in self._reverted:
            return 0
        if current is None or warm is None or number not in {current.number, warm.number}:
            raise StartError(RejectCode.HOST_GONE, f"{self.name}: the previous generation is no longer kept")
        try:
            began_s = await swap.go_back(self._parts, current, warm)
        except StartError as error:
            self._start_if_down(error)
            raise
        await self._switch(current, warm)
        self.previous = None
        self._reverted = _Reverted(current.number, warm.number)
        self._workers.drop(current)
        self._release_hardware()
        return self._swapped(began_s)

    async def restart(self) -> None:
        """Restart the running generation with new workers; the old ones keep running if this raises `StartError`."""
        generation = self.current
        if generation is None:
            return
        old = list(generation.workers)
        self._crashes.on_request()
        if generation.is_exclusive:
            await self._restart_in_place(generation)
            return
        async with AsyncExitStack() as undo:
            swap.open_listener(self._parts, generation, undo)
            await self._workers.start_worker(generation)
            undo.pop_all()
        self._timers.stop()
        await swap.finish_task(self._parts, generation)
        await self._workers.replace(generation, old)
        self.restarts += 1
        self._set_state(InstanceState.RUNNING)
        self._timers.start(generation)

    def _swapped(self, began_s: float) -> int:
        """Count a change of the generation whose handover began at a time; return its milliseconds."""
        took_ms = _ms_since(began_s)
        self._swaps += 1
        self._swap_ms += took_ms
        return took_ms

    def _start_if_down(self, error: StartError) -> None:
        """Start a worker after a pause, if a swap by replacement has left the generation without one."""
        generation = self.current
        if generation is not None and generation.is_serving and not generation.workers:
            self._not_started(generation, error)

    async def _restart_in_place(self, generation: Generation) -> None:
        """Stop its workers, then start one."""
        check_room(self.name)
        self._timers.stop()
        await swap.finish_task(self._parts, generation)
        await self._workers.halt(generation)
        try:
            await self._workers.start_worker(generation)
        except (StartError, WorkerGoneError) as error:
            self._not_started(generation, error)
            raise
        self.restarts += 1
        self._set_state(InstanceState.RUNNING)
        self._timers.start(generation)

    async def configure(self, number: int, config: dict[str, str]) -> None:
        """Give the generation that runs another configuration; raises `StartError`, and then nothing has changed."""
        generation = self.current
        if generation is None or generation.number != number or self.previous is not None:
            raise StartError(RejectCode.HOST_GONE, f"{self.name}: generation {number} does not run alone")
        await self._workers.configure(generation, config)

    async def stop(self) -> None:
        """Drain, then end every worker."""
        self._timers.stop()
        if self.current is not None:
            await self._workers.end_service(self.current)
            await self._workers.hand_over(self.current.alive, wait_s=DRAIN_MS / 1000)
        for generation in (self.current, self.previous):
            if generation is not None:
                self._workers.drop(generation, drained=True)
        self.current = self.previous = None
        await self._update_router()
        self._workers.stop_listening()
        self._workers.tasks.cancel()
        self._resources.listeners.close(self.name)
        self._resources.messages.bus.unsubscribe(self.name)
        await self._workers.wait_ended()
        self._release_hardware()
        self._workers.bytes_today()
        self._log.flush()
        self.state = InstanceState.STOPPED

    async def forget_data(self) -> None:
        """Remove the files and pairs of an instance that does not run."""
        if self.current is None:
            await self._workers.wait_ended()
            for parent in (self._resources.data, self._resources.pairs):
                await remove_tree(parent / self.name)

    def _release_hardware(self) -> None:
        """Give up the hardware of versions that nothing can go back to."""
        kept = [each.run.grants.devices for each in (self.current, self.previous) if each is not None]
        self._resources.hardware.release(self.name, *kept)
        if self.current is not None:
            self._resources.hardware.put_back(self.name, self.current.run.grants.devices)

    # Figures.

    def lines(self) -> tuple[str, ...]:
        """Return the last log lines, oldest first."""
        return self._log.lines()

    def logs(self, request_id: int) -> host_api.Lines:
        """Return the last log lines as a reply; all lines so far are on the disk, as far as they can be."""
        self._log.flush()
        return host_api.Lines(id=request_id, lines=self.lines(), count=self._log.count)

    def running(self) -> host_api.Running:
        """Return the entry of this instance in a welcome."""
        assert self.current is not None
        return host_api.Running(
            instance=self.name,
            generation=self.current.number,
            target=self.current.run.target,
            state=self.state,
            previous=None if self.previous is None else self.previous.number,
        )

    def health(self) -> InstanceHealth:
        """Return the figures of the current generation since its start."""
        assert self.current is not None
        figures = self.current.figures()
        alive = self.current.alive
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
            written_bytes=count_of(self._workers.bytes_today()),
            outgoing=figures.outgoing,
            keyvalue_reads=figures.pairs.reads,
            keyvalue_writes=figures.pairs.writes,
            keyvalue_bytes=figures.pairs.bytes,
            latencies=figures.spread(),
            cpu_ms=figures.cpu_ns // 1_000_000,
            p50_us=figures.percentile_us(0.5),
            p99_us=figures.percentile_us(0.99),
            memory_bytes=sum(worker.private_bytes() for worker in self.current.workers),
            workers=len(alive),
            shared_worker=next((worker.shared_name for worker in alive if worker.shared_name), ""),
            manifest_sha256=self.current.run.manifest.digest(),
            error=plain(self.error, _REASON_MAX_CHARS * 2),
            checks=self.current.checks(),
            messages=self._resources.messages.bus.health(self.name),
            metrics=self.current.metrics() if self.current.run.grants.allows(METRICS) else msgspec.UNSET,
            local=LocalFigures(
                durations=figures.durations,
                durations_us=figures.durations_us,
                swaps=self._swaps,
                swap_ms=self._swap_ms,
            ),
        )

    async def ask_health(self, wait_s: float) -> None:
        """Run the health check now, if there is one, and wait up to `wait_s` seconds for its result."""
        await self._timers.ask(wait_s)

    def tick(self) -> None:
        """Do the housekeeping: reset the crash counter, enforce storage, scale workers, kill overdue calls, log."""
        self._log.flush()
        current = self.current
        if current is not None and current.alive:
            now_s = time.monotonic()
            if self._crashes.on_steady(now_s - max(worker.since_s for worker in current.alive)):
                self._resources.crashes.remember(self.name, current.run.target, 0)
            if current.data:
                self._workers.tasks.spawn(self._enforce_storage(current))
            self._workers.bytes_today()
            self._autoscaler.tick(current)
        for generation in (self.current, self.previous):
            if generation is not None:
                self._kill_overdue(generation)

    async def _enforce_storage(self, generation: Generation) -> None:
        """Quarantine an instance whose data takes more than it may; in turn, as a change under way starts workers."""
        async with self.lock:
            if generation.is_serving and (
                reason := storage_problem(generation.data, generation.run.limits.storage_bytes)
            ):
                self._quarantine(generation, reason)

    def _kill_overdue(self, generation: Generation) -> None:
        """Kill workers whose call exceeds all limits, in case their own watchdog has failed."""
        limits = generation.run.limits
        longest_ms = max(limits.total_ms, limits.start_ms) + _OVERDUE_GRACE_MS
        for worker in generation.workers:
            began_ns = worker.began_ns()
            taken_ms = (time.monotonic_ns() - began_ns) // 1_000_000
            if worker.alive and began_ns and taken_ms > longest_ms:
                reason = f"a call was still there after {taken_ms} ms, past all its time"
                self._kill_for_call(generation, worker, reason)

    async def _switch(self, old: Generation | None, new: Generation) -> None:
        """Move route and timers from `old` to `new`, which already serves."""
        if old is not None:
            if old.service is not None:
                self._workers.tasks.spawn(self._workers.end_service(old))
            await self._workers.hand_over(old.alive)
            if old.listener is not None and old.listener is not new.listener:
                old.listener.sock.close()
            old.is_serving = False
        self.current = new
        self._resources.hardware.rest(self.name, new.run.grants.devices)
        new.is_serving = True
        new.checks_failing = 0
        self._crashes.on_start(self._resources.crashes.count(self.name, new.run.target))
        self.since = datetime.now(UTC)
        self._set_state(InstanceState.RUNNING)
        self._timers.start(new)
        if not new.workers:  # of a worker that ended just now the report is still to come
            self._replace(new, new.lost, 0.0, at_fault=new.lost_at_fault)
        await self._update_router()

    # Reports of workers.

    def worker_message(self, worker: WorkerHandle, message: worker_api.FromWorker) -> None:
        """Handle a message that is not a reply."""
        generation = self._workers.generation_of(worker)
        match message:
            case worker_api.Line():
                self._note(message)
            case worker_api.Fault(message=text):
                self._report_fault(generation, RejectCode.TRAPPED, text)
            case worker_api.Refused(message=text):
                self._log.note(f"host: {text}")
            case worker_api.ServiceEnded() if not worker.service_ended:
                self._service_ended(generation, worker, message)
            case worker_api.Overdue(call=call, why=reason):
                if worker.page.number() == call:  # otherwise the call has ended, and its worker has counted it
                    self._kill_for_call(generation, worker, reason)
            case worker_api.Busy():
                if generation.is_serving:
                    self._autoscaler.busy(generation)
            case _:
                pass

    def _service_ended(self, generation: Generation, worker: WorkerHandle, message: worker_api.ServiceEnded) -> None:
        """Count the end of a service's run as a fault, unless it was asked for; the worker ends after it."""
        worker.service_ended = message.how or "its run ended"
        if not message.fault or worker not in generation.workers:
            self._log.note(f"host: {message.how}")
            return
        fault = CallStats(calls={CallOutcome.GUEST_TRAP.value: 1}, errors=1)
        generation.past = generation.past.plus(fault)
        self._report_fault(generation, RejectCode.TRAPPED, message.fault)

    def _note(self, line: worker_api.Line) -> None:
        if line.dropped:
            self._log.note(f"host: {line.dropped} lines were dropped: it logs too much (limits.log_lines_per_minute)")
        self._log.note(line.text)

    def router_report(self, worker: WorkerHandle, message: helper_api.ChannelReport) -> None:
        """Handle what the router says of a worker's channel."""
        generation = self._workers.generation_of(worker)
        match message:
            case helper_api.ChannelNote(text=text):
                self._log.note(text)
            case helper_api.ChannelBroken(why=why):
                worker.kill(f"its router read no frame in its channel: {why}"[:_REASON_MAX_CHARS], at_fault=True)
            case helper_api.LongCall(call=call) | helper_api.CallAbandoned(call=call):
                if generation.is_serving and generation.run.limits.concurrency > 1:
                    self._autoscaler.busy(generation)
                self._watch(generation, worker, call, abandoned=isinstance(message, helper_api.CallAbandoned))

    def _watch(self, generation: Generation, worker: WorkerHandle, call: int, *, abandoned: bool) -> None:
        """Watch a call; `abandoned`: end it now. A shared worker watches its calls itself."""
        if not worker.alive or worker.process.is_shared:
            return
        watch = self._watches.get(worker)
        if watch is None or watch.call != call:
            if watch is not None:
                watch.close()
            else:
                worker.ended.add_done_callback(lambda _: self._watches.pop(worker, None))
            watch = self._watches[worker] = CallWatch(worker, call, generation.run.limits, self)
        if abandoned:
            watch.abandon()

    def call_must_end(self, worker: WorkerHandle, reason: str, *, at_fault: bool) -> None:
        """End a worker whose call has not ended otherwise."""
        if at_fault:
            self._kill_for_call(self._workers.generation_of(worker), worker, reason)
        else:
            worker.excused = True
            worker.kill(reason)

    def worker_exited(self, worker: WorkerHandle, uptime_s: float) -> None:
        """Replace a worker that ended, unless it was ended on purpose."""
        generation = self._workers.generation_of(worker)
        if worker not in generation.workers:
            return
        generation.workers.remove(worker)
        generation.keep_figures(worker)
        reason = worker.describe_end()
        generation.service_ended = worker.service_ended
        worker.close()
        is_excused = worker.excused or worker.ended.result() == worker_api.RENEW
        at_fault = not (is_excused or worker.bystander_of)
        if not generation.is_serving:
            generation.lost, generation.lost_at_fault = reason, at_fault
            return
        if worker.blamed:
            generation.unshared_reason = f"a worker that it shared was ended on its account: {reason}"
        if worker.bystander_of and not is_excused:
            self._log.note(f"host: {reason}")
        self._replace(generation, reason, uptime_s, at_fault=at_fault)

    def health_answered(self, worker: WorkerHandle, problem: str | None) -> None:
        """Count a result of the health check; kill a worker after too many consecutive failures."""
        generation = self._workers.generation_of(worker)
        generation.count_check(well=problem is None)
        if problem is None:
            self.error = "" if self.state is InstanceState.RUNNING else self.error
            return
        self.error = f"it is not well: {problem}"
        self._report_fault(generation, RejectCode.HEALTH_FAILED, self.error)
        if generation.checks_failing % _FAILED_CHECKS_MAX == 0 and worker.alive:
            worker.end(f"{self.error}, {_FAILED_CHECKS_MAX} times in a row")

    def _report_fault(self, generation: Generation, code: RejectCode, message: str) -> None:
        """Count a fault of the guest, log it, and report it to the agent."""
        generation.faults += 1
        first = message.splitlines()[0] if message else ""
        self._log.note(f"host: {first}")
        if generation.dropped:
            return
        counted = sum(generation.figures().calls.get(outcome, 0) for outcome in GUEST_FAULTS)
        trapped = host_api.Trapped(
            instance=self.name,
            generation=generation.number,
            code=code,
            message=plain(message),
            faults=count_of(max(generation.faults, counted)),
            log=self.lines(),
        )
        self._events.put_nowait(trapped)

    def _kill_for_call(self, generation: Generation, worker: WorkerHandle, reason: str) -> None:
        timed_out = CallStats(calls={CallOutcome.GUEST_TIMEOUT.value: 1}, errors=1)
        generation.past = generation.past.plus(timed_out)
        worker.kill(reason[:_REASON_MAX_CHARS], at_fault=True)

    # Crash, back-off, quarantine.

    def _replace(self, generation: Generation, reason: str, uptime_s: float, *, at_fault: bool) -> None:
        """Replace a worker of the serving generation, which has ended; `at_fault`: count that as a crash."""
        if at_fault:
            self._crashed(generation, reason, uptime_s)
        else:
            self._carry_out(generation, self._crashes.on_exit(uptime_s, at_fault=False), reason)

    def _crashed(self, generation: Generation, reason: str, uptime_s: float) -> None:
        """Handle a crash of a worker of the serving generation."""
        self.restarts += 1
        if reason != generation.service_ended:
            self._report_fault(generation, RejectCode.RESTARTED, reason)
        self._decide(generation, reason, uptime_s)

    def _decide(self, generation: Generation, reason: str, uptime_s: float) -> None:
        decision = self._crashes.on_exit(uptime_s, at_fault=True)
        self._resources.crashes.remember(self.name, generation.run.target, self._crashes.count)
        self.error = reason
        self._carry_out(generation, decision, reason)

    def _carry_out(self, generation: Generation, decision: Restart | Replace | Quarantine, reason: str) -> None:
        if isinstance(decision, Quarantine):
            self._quarantine(generation, f"{decision.reason}; the last: {reason}")
            return
        if not generation.alive:
            self._set_state(InstanceState.BACKOFF, reason)
        self._workers.tasks.spawn(self._start_after(generation, decision.after_s))

    def _quarantine(self, generation: Generation, reason: str) -> None:
        self.error = reason
        for worker in list(generation.workers):
            self._workers.retire(generation, worker)
        self._timers.stop()
        self._resources.messages.bus.stall(self.name)
        if generation.listener is not None and generation.listener.port is not None:
            self._workers.stop_listening()
            generation.listener.sock.close()  # clients must not wait there; behind the router, they get 503
        self._set_state(InstanceState.QUARANTINED, reason)
        self._workers.tasks.spawn(self._rest_hardware())

    async def _rest_hardware(self) -> None:
        """Set the lines of an instance in quarantine to their safe levels, once no worker can set them."""
        await self._workers.wait_ended()
        if self.state is InstanceState.QUARANTINED:
            self._resources.hardware.rest(self.name)

    async def _start_after(self, generation: Generation, after_s: float) -> None:
        await asyncio.sleep(after_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
        router = None if generation.listener is None else self._router
        pid = 0 if router is None else await router.await_process()  # without one, a worker would end at once
        async with self.lock:
            if not generation.is_serving or self.state is InstanceState.QUARANTINED:
                return
            try:
                await self._workers.start_worker(generation)
            except (StartError, WorkerGoneError) as error:
                if router is not None and not (router.running and router.pid == pid):  # ended with its router
                    self._replace(generation, str(error), 0.0, at_fault=False)
                else:
                    self._not_started(generation, error)
                return
            if self.state is InstanceState.BACKOFF:
                self._set_state(InstanceState.RUNNING)

    def _not_started(self, generation: Generation, error: StartError | WorkerGoneError) -> None:
        """Try again later to start a worker; a lack of room on the device is no crash."""
        if not isinstance(error, NoRoomError):
            self._decide(generation, str(error), 0.0)
            return
        if self.error != str(error):  # said once
            self._log.note(f"host: no worker: {error}")
        if not generation.alive:
            self._set_state(InstanceState.BACKOFF, str(error))
        self.error = str(error)
        self._workers.tasks.spawn(self._start_after(generation, _NO_ROOM_PAUSE_S))

    def _set_state(self, state: InstanceState, message: str = "") -> None:
        if state is self.state:
            return
        assert state in TRANSITIONS[self.state], (self.state, state)
        before, self.state = self.state, state
        if state is InstanceState.RUNNING:
            self.error = ""
        if {before, state} & {InstanceState.BACKOFF, InstanceState.QUARANTINED} and self.current is not None:
            changed = host_api.Changed(
                instance=self.name,
                generation=self.current.number,
                state=state,
                message=plain(message),
                log=self.lines(),
            )
            self._events.put_nowait(changed)
            self._workers.tasks.spawn(self._update_router())

    async def _update_router(self) -> None:
        """Tell the router whether the instance answers; during a first, short pause, clients wait instead of a 503."""
        if self._router is None:
            return
        current = self.current
        behind = current is not None and current.listener is not None and current.listener.port is None
        brief = self.state is InstanceState.BACKOFF and self._crashes.is_first
        up = self.state is InstanceState.RUNNING or brief
        await self._router.update(self.name, up=up if behind else None)


def _ms_since(began_s: float) -> int:
    return int((time.monotonic() - began_s) * 1000)
