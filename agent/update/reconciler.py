"""Reconciler: brings the device to its desired state; the only writer of `DeploymentState`.

A single task takes typed inputs from a queue. Every input leads to steps (`agent.update.state.transition`). A step is
persisted in one transaction together with the report about it; then memory follows, then the report is handed on, and
only then the effect of the step is started. An effect is a task of its own, so that nothing holds up a removal or a
security stop; its result comes back through the queue, with the serial of the step that started it. After each input
the reconciler settles: violations are enforced, the plan is carried out, and barriers of atomic sets are opened.

Persist, then act: a change that is found after a power cut is taken up as by any other event (INTERRUPTED). A step that
cannot be persisted is not taken; on a full disk it is repeated until there is room again.

A committed item that violates what publishers or the device's owner allow is stopped, or kept where the owner says so.
No network is needed for that: first the item is no longer committed, then the host is asked to stop the instance. If
power fails in between, nothing starts the instance again, and a host that still runs it is asked to stop everything
that is not committed.
"""

import asyncio
import functools
import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, Literal

import msgspec

from agent.update import packages, restore
from agent.update import state as reports
from agent.update.effects import EffectContext, EffectRunner
from agent.update.machine import Effect, Event, State, is_legal
from agent.update.plan import Act, Gate, GateState, Step, may_report_committed, plan, set_gate, swap_set
from agent.update.problems import ReportSink
from agent.update.state import (
    CANCELLED,
    DONE,
    SUPERSEDED,
    ActiveChange,
    Change,
    Committed,
    DeploymentState,
    DeviceContext,
    EffectResult,
    FailedItem,
    Transition,
    Violation,
    failure_of,
    fault,
    item_key,
    reaches_running,
    refused,
    set_failed,
    transition,
)
from agent.update.state_reports import of_committed, of_failure, state_reports
from agent.update.store import Run, Store, StoreError
from fleet.protocol.assignment import Assignment, Item
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.messages import InstanceHealth, Report
from fleet.protocol.names import TargetName

log = logging.getLogger("agent.update.reconciler")

PROGRESS_S: Final = 5.0
STORE_AGAIN_S: Final = 30.0
RETRY_SLACK_S: Final = 1.0
"""Added to the wait for a retry, so that it is due when the timer fires."""
INSPECT_AGAIN_S: Final = 5.0
"""When the host is asked again about an instance that it restarts: with its pauses it runs or is in quarantine soon."""

_SUPERSEDABLE: Final = frozenset({Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING, Phase.STAGED, Phase.PROBATION})

_GATED: Final = frozenset({(Phase.STAGED, Event.DONE), (Phase.PROBATION, Event.WELL)})
"""Events of results that wait at the barrier of an atomic set."""

_NEW_VERSION_RUNS: Final = frozenset({Phase.SWAPPING, Phase.PROBATION, Phase.COMMITTED})
"""Phases in which a stop would also end the next version: a rollback then stops both."""


# Inputs


@dataclass(frozen=True, slots=True)
class AssignmentAccepted:
    """An assignment was verified, accepted and persisted."""

    assignment: Assignment


@dataclass(frozen=True, slots=True)
class ViolationsFound:
    """Committed items were checked; the violations replace those found before."""

    violations: tuple[Violation, ...]


@dataclass(frozen=True, slots=True)
class EffectFinished:
    """The effect that the step `serial` of an instance's change started has ended."""

    instance: str
    serial: int
    result: EffectResult


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """A download went on."""

    instance: str
    serial: int
    percent: int


@dataclass(frozen=True, slots=True)
class GenerationWanted:
    """An effect on its way back has to start the committed item under a new generation; `answer` takes the item."""

    committed: Committed
    answer: asyncio.Future[Committed]


@dataclass(frozen=True, slots=True)
class ImageDamaged:
    """The image of an artifact was found changed on the disk; it is not used."""

    artifact: str
    message: str


@dataclass(frozen=True, slots=True)
class HostInspected:
    """The host was asked what it runs; None while there is no host."""

    figures: tuple[InstanceHealth, ...] | None


@dataclass(frozen=True, slots=True)
class Configured:
    """The instance that runs has the configuration of an item, or needs a change for it."""

    item: Item
    generation: int
    done: bool


@dataclass(frozen=True, slots=True)
class DataRemoved:
    """The host has removed the data of instances that an assignment neither lists nor keeps."""

    version: int


@dataclass(frozen=True, slots=True)
class TimerFired:
    """Time to settle again: a failed item may be tried again, or the disk may have room."""


Input = (
    AssignmentAccepted
    | ViolationsFound
    | EffectFinished
    | DownloadProgress
    | GenerationWanted
    | ImageDamaged
    | HostInspected
    | Configured
    | DataRemoved
    | TimerFired
)


class Reconciler:
    """Owner of the deployment state; `post` gives it inputs, `run` is its task."""

    name = "reconciler"

    def __init__(
        self,
        *,
        device: DeviceContext,
        store: Store,
        worker: Run,
        carrier: EffectRunner,
        sink: ReportSink,
        on_revoked: Literal["stop", "keep"] = "stop",
        state: DeploymentState | None = None,
    ) -> None:
        """Make a reconciler.

        Args:
            device: this device.
            store: used on `worker` only.
            worker: the thread for SQLite.
            carrier: carries out effects.
            sink: notified of stored reports.
            on_revoked: the owner's policy for a committed item with a violation.
            state: filled by `recover`, and written by this object only; others may read it.
        """
        self._device = device
        self._store = store
        self._db = worker
        self._effects = carrier
        self._sink = sink
        self._on_revoked = on_revoked
        self.inbox: asyncio.Queue[Input] = asyncio.Queue()
        self.state = DeploymentState() if state is None else state
        self._recovered = False
        self._is_handling = False
        self._serials = itertools.count(1)
        self._steps = 0
        self._noted_version = 0
        self._reported_violations: tuple[Violation, ...] = ()
        self._reported_version = 0
        self._stops: dict[str, asyncio.Task[EffectResult]] = {}
        self._inspection: asyncio.Task[tuple[InstanceHealth, ...] | None] | None = None
        self._is_state_wanted = False
        self._adopting: set[str] = set()
        self._configuring: dict[str, asyncio.Task[bool]] = {}
        self._needs_change: set[tuple[str, str]] = set()
        self._kept_version = 0
        self._keeping: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._delayed: set[asyncio.TimerHandle] = set()

    # Interface

    def post(self, item: Input) -> None:
        """Hand over an input; on the event loop's thread."""
        self.inbox.put_nowait(item)

    async def desire(self, assignment: Assignment) -> None:
        """Bring the device to this state; the assignment has been verified, accepted and persisted."""
        self.post(AssignmentAccepted(assignment))

    async def hold(self, violations: Iterable[Violation]) -> None:
        """Enforce these violations, in place of those found before."""
        self.post(ViolationsFound(tuple(violations)))

    def report_states(self) -> None:
        """Report the state of each instance, once the host was asked what it runs."""
        self._is_state_wanted = True
        self._inspect()

    @property
    def is_idle(self) -> bool:
        """True if no input waits, no change is under way, and neither a stop nor a question to the host."""
        asked = self._inspection is not None or self._configuring or (self._keeping and not self._keeping.done())
        return self.inbox.empty() and not (self._is_handling or self.state.active or self._stops or asked)

    # Life

    async def recover(self) -> None:
        """Recover the state of the agent's last run; `run` does so unless it has been done."""
        self._recovered = True
        self.state.committed = {each.item.instance: each for each in await self._db(self._store.committed)}
        self.state.failed = {each.failure_key: each for each in await self._db(self._store.failed)}
        self._reported_violations = await self._db(self._store.doubts)
        for stored in await self._db(self._store.changes):
            change = stored
            if change.boot_id != self._device.boot_id:
                entered = replace(change.state, entered=self._device.clock())
                change = msgspec.structs.replace(change, state=entered, boot_id=self._device.boot_id)
            log.info("%s: found %s", change.instance, change.phase)
            self._add(change, Event.INTERRUPTED)

    async def run(self) -> None:
        """Handle inputs until cancelled; the stored state then stays for `recover`."""
        try:
            if not self._recovered:
                await self.recover()
            while True:
                item = await self.inbox.get()
                self._is_handling = True
                await self._handle(item)
                if not isinstance(item, DownloadProgress):
                    await self._settle()
                self._is_handling = False
                self.inbox.task_done()
        finally:
            await self.close()

    async def close(self) -> None:
        """Cancel effects and timers, and wait for the effects."""
        for timer in [*self._delayed, *filter(None, [self._timer])]:
            timer.cancel()
        active = [each.task for each in self.state.active.values() if each.task is not None]
        tasks = [
            *active,
            *self._stops.values(),
            *self._configuring.values(),
            *filter(None, [self._inspection, self._keeping]),
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _handle(self, item: Input) -> None:
        try:
            await self._dispatch(item)
        except StoreError as error:
            log.error("retry in %.0f s: %s", STORE_AGAIN_S, error)  # noqa: TRY400 - the message contains the error
            if not isinstance(item, DownloadProgress | ImageDamaged):
                self._post_later(item)

    async def _dispatch(self, item: Input) -> None:
        match item:
            case AssignmentAccepted(assignment):
                self.state.desired = assignment
                self._needs_change.clear()
            case ViolationsFound(violations):
                self.state.violations = violations
            case EffectFinished(instance, serial, result):
                active = self.state.active.get(instance)
                if active is not None and active.serial == serial:
                    await self._finish(active, result)
            case DownloadProgress():
                await self._report_progress(item)
            case GenerationWanted(committed, answer):
                await self._renew(committed, answer)
            case ImageDamaged(artifact, message):
                await self._report_damage(artifact, message)
            case HostInspected() | Configured() | DataRemoved():
                await self._answered(item)
            case TimerFired():
                self._ask_again()

    def _post_later(self, item: Input) -> None:
        """Repeat an input that could not be persisted."""

        def due() -> None:
            self._delayed.discard(timer)
            self.post(item)

        timer = asyncio.get_running_loop().call_later(STORE_AGAIN_S, due)
        self._delayed.add(timer)

    # Changes

    def _add(self, change: Change, event: Event) -> None:
        """Begin or resume a change."""
        active = self.state.active[change.instance] = ActiveChange(change, serial=next(self._serials))
        self.post(EffectFinished(change.instance, active.serial, EffectResult(event=event)))

    async def _finish(self, active: ActiveChange, result: EffectResult) -> None:
        """Continue a change whose effect has ended."""
        active.task = None
        phase = active.change.phase
        if result.event is None:
            reason = self._reason_of_cancel(active)
            if reason is None:  # the effect is no longer prevented
                assert active.effect is not None
                self._start(active, active.effect)
                return
            result = reason
        elif not is_legal(phase, result.event):
            log.error("%s: %s cannot happen in %s", active.change.instance, result.event, phase)
            result = fault(f"{result.event} cannot happen in {phase}: see the agent's journal")
        if (phase, result.event) in _GATED:
            await self._hold_at_gate(active, result)
        else:
            await self._advance(active, result)

    def _reason_of_cancel(self, active: ActiveChange) -> EffectResult | None:
        phase = active.change.phase
        if active.superseded and phase in _SUPERSEDABLE:
            return SUPERSEDED
        gate = self._gate(active.change)
        return set_failed(phase, gate.sibling) if phase is Phase.PROBATION and gate.gate is Gate.FAILED else None

    async def _hold_at_gate(self, active: ActiveChange, result: EffectResult) -> None:
        """Keep a result until the atomic set is decided.

        That a member is well is persisted before any member commits: a member found after a power cut with all others
        well or committed commits too, and is not judged again.
        """
        change = active.change
        if change.phase is Phase.PROBATION and change.atomic and not change.well:
            await self._apply(Transition(change=msgspec.structs.replace(change, well=True)))
        active.held = result

    async def _advance(self, active: ActiveChange, result: EffectResult) -> None:
        """Take steps until an effect runs, a barrier is reached, or the change is over."""
        instance = active.change.instance
        while True:
            active.log = result.log or active.log
            step = transition(
                active.change,
                replace(result, log=active.log),
                device=self._device,
                now=self._device.clock(),
                at=datetime.now(UTC),
                committed=self.state.committed.get(instance),
                known=self._known(active.change),
            )
            try:
                step = await self._apply(self._bound(active.change, step))
            except StoreError as error:
                log.error("%s: retry in %.0f s: %s", instance, STORE_AGAIN_S, error)  # noqa: TRY400 - the message contains the error
                self._post_later(EffectFinished(instance, active.serial, result))
                return
            active.serial, active.effect = next(self._serials), step.effect
            if step.removed or step.effect is Effect.COMMIT:
                await self._write_runset()
            if step.committed is not None and step.committed.manifest.is_data:
                await self._retry_without_data()
            if step.effect is Effect.CLOSE:
                return
            if active.superseded and active.change.phase in _SUPERSEDABLE:
                result = SUPERSEDED
            elif step.effect is Effect.REMEMBER:
                result = DONE
            elif step.effect is Effect.STAGE:
                active.held = DONE
                return
            else:
                assert step.effect is not None
                self._start(active, step.effect, after_fault=result.event is Event.FAULT)
                return

    async def _retry_without_data(self) -> None:
        """Let items that failed for want of data be tried again at once."""
        for each in list(self.state.failed.values()):
            if each.code is RejectCode.DATA_MISSING:
                await self._apply(Transition(failure=msgspec.structs.replace(each, retry_at=0.0)))

    def _known(self, change: Change) -> FailedItem | None:
        if change.item is None:
            return None
        return self.state.failed.get((change.instance, change.key, change.item.attempt))

    def _bound(self, before: Change, step: Transition) -> Transition:
        """Add to a step that begins a swap the data with which the instance starts."""
        change = step.change
        begins = change is not None and change.phase is Phase.SWAPPING and before.phase is Phase.STAGED
        if not begins or change is None or change.item is None or change.manifest is None or change.rebinds:
            return step
        bound = self.state.bind(change.item, change.manifest)
        return step if isinstance(bound, str) else replace(step, change=msgspec.structs.replace(change, data=bound))

    def _start(self, active: ActiveChange, effect: Effect, *, after_fault: bool = False) -> None:
        change, serial = active.change, active.serial
        if effect is Effect.WATCH and change.is_data:
            return  # judged by the instances that read it, when settling
        context = EffectContext(
            progress=lambda percent: self.post(DownloadProgress(change.instance, serial, percent)),
            together=swap_set(self.state.members(change)),
            committed=self.state.committed.get(change.instance),
            renew=self._ask_for_generation,
            after_fault=after_fault,
            in_use=frozenset(packages.in_use(self.state)),
        )
        active.task = asyncio.get_running_loop().create_task(self._effects.run(effect, change, context))
        active.task.add_done_callback(functools.partial(self._effect_ended, change.instance, serial, effect))

    def _effect_ended(self, instance: str, serial: int, effect: Effect, task: asyncio.Task[EffectResult]) -> None:
        self.post(EffectFinished(instance, serial, _result_of(instance, effect, task)))

    async def _ask_for_generation(self, committed: Committed) -> Committed:
        answer: asyncio.Future[Committed] = asyncio.get_running_loop().create_future()
        self.post(GenerationWanted(committed, answer))
        return await answer

    async def _renew(self, committed: Committed, answer: asyncio.Future[Committed]) -> None:
        if answer.done():
            return  # the effect that asked has been cancelled
        step = await self._apply(Transition(committed=committed, new_generation=True))
        assert step.committed is not None
        if not answer.done():
            answer.set_result(step.committed)

    # Persisting

    async def _apply(self, step: Transition) -> Transition:
        """Persist a step, then take it over in memory, then hand on its report.

        Raises:
            StoreError: nothing has changed.
        """
        stored, _, forgotten = await self._db(self._store.apply, step)
        self.state.apply(stored)
        if forgotten is not None:
            self.state.failed.pop(forgotten, None)
        self._steps += 1
        if stored.report is not None:
            self._reported_version = max(self._reported_version, stored.report.assignment)
            if stored.report.progress is None:
                reports.log_report(stored.report)
            self._sink.saved(stored.report)
        return stored

    async def _write_runset(self) -> None:
        items = [self.state.committed[instance] for instance in sorted(self.state.committed)]
        try:
            facts = await self._db(self._store.facts)
            await self._db(restore.write_runset, self._device.places.runset, items, facts, self._device.mac_key)
        except (OSError, StoreError) as error:
            log.warning("cannot write the second record of the committed items: %s", error)

    async def _report_progress(self, item: DownloadProgress) -> None:
        """Report a download's progress, at most every few seconds; the store keeps the newest only."""
        active, now = self.state.active.get(item.instance), self._device.clock()
        if active is None or active.serial != item.serial or now - active.progress_at < PROGRESS_S:
            return
        active.progress_at = now
        report = msgspec.structs.replace(self._report(active), progress=item.percent)
        await self._apply(Transition(report=report))

    async def _report_damage(self, artifact: str, message: str) -> None:
        for each in list(self.state.committed.values()):
            if each.item.sha256 == artifact:
                await self._report_running(each, RejectCode.IMAGE_DAMAGED, message)

    async def _report_running(self, committed: Committed, code: RejectCode, message: str) -> None:
        """Report what is wrong with a committed item that goes on running."""
        item = committed.item
        report = reports.about(
            self._device,
            assignment=committed.assignment,
            phase=Phase.IDLE,
            item=item,
            running=item.target,
            code=code,
            message=message,
        )
        await self._apply(Transition(report=report))

    def _running(self, instance: str) -> str:
        have = self.state.committed.get(instance)
        return have.item.target if have is not None else ""

    def _report(self, active: ActiveChange) -> Report:
        change = active.change
        return reports.of_change(self._device, change, before=self._running(change.instance), log=active.log)

    # Settling

    async def _settle(self) -> None:
        """Enforce violations, carry out the plan and open barriers, until none of them leads to a further step."""
        try:
            steps, now = -1, datetime.now(UTC).timestamp()
            while steps != self._steps:
                steps = self._steps
                await self._enforce_violations()
                await self._carry_out_plan(now)
                await self._judge_packages(now)
                await self._open_gates()
            await self._note_committed()
            await self._forget_data()
        except StoreError as error:
            log.error("cannot begin a change now, retry in %.0f s: %s", STORE_AGAIN_S, error)  # noqa: TRY400 - the message contains the error
            self._settle_later(STORE_AGAIN_S)
        else:
            self._settle_when_due(now)

    def _settle_when_due(self, now: float) -> None:
        """Settle again when a failed item may be tried again that the plan of `now` had to leave."""
        times = [each.retry_at - now for each in self.state.failed.values() if each.retry_at is not None]
        due = min((seconds for seconds in times if seconds > 0), default=None)
        if due is not None:
            self._settle_later(due + RETRY_SLACK_S)

    def _settle_later(self, seconds: float) -> None:
        """Settle again after so many seconds, or at the earlier time for which that is planned already."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            if loop.time() < self._timer.when() <= loop.time() + seconds:
                return
            self._timer.cancel()
        self._timer = loop.call_later(seconds, self.post, TimerFired())

    async def _note_committed(self) -> None:
        desired = self.state.desired
        if desired is None or desired.version == self._noted_version:
            return
        if may_report_committed(*self.state.planned()):
            is_news = await self._db(self._store.counter, "committed") < desired.version
            await self._db(self._store.set_counter, "committed", desired.version)
            self._noted_version = desired.version
            if is_news and not self._is_told(desired.version):
                report = reports.about(self._device, assignment=desired.version, phase=Phase.COMMITTED)
                await self._apply(Transition(report=report))

    async def _forget_data(self) -> None:
        """Have the host remove what the assignment neither lists nor keeps, once no such instance is left.

        Asked again after a start, unless it has been done: a power cut in between leaves nothing behind.
        """
        desired = self.state.desired
        if desired is None or desired.version == self._kept_version:
            return
        listed = {item.instance for item in desired.items}
        if (self.state.committed.keys() | self.state.active.keys()) - listed:
            return
        version = self._kept_version = desired.version
        if self._keeping is not None:
            self._keeping.cancel()
        if await self._db(self._store.counter, "kept") < version:
            self._keeping = asyncio.get_running_loop().create_task(self._remove_data(version, desired))

    async def _remove_data(self, version: int, desired: Assignment) -> None:
        kept = {*(item.instance for item in desired.items), *desired.keep_data}
        spaces = {TargetName.from_path(item.target).namespace for item in desired.items}
        # Nobody knows any more which buckets an instance shared that is gone, and whose data is kept.
        namespaces = None if desired.keep_data else tuple(sorted(spaces))
        if await self._effects.keep_data(tuple(sorted(kept)), namespaces):
            self.post(DataRemoved(version))

    def _is_told(self, version: int) -> bool:
        """Tell whether a step of a change has told of this assignment, before a restart too, or will do so."""
        brought = any(each.assignment == version for each in self.state.committed.values())
        return brought or bool(self._adopting) or self._reported_version >= version

    async def _judge_packages(self, now: float) -> None:
        """Judge each switch of a data package by the instances that read it."""
        for active in list(self.state.active.values()):
            change = active.change
            if change.phase is not Phase.PROBATION or not change.is_data or active.held is not None:
                continue
            result = SUPERSEDED if active.superseded else packages.judge(self.state, change, now)
            if result is None:
                continue
            if result.event is Event.WELL:
                await self._hold_at_gate(active, result)
            else:
                await self._advance(active, result)

    async def _open_gates(self) -> None:
        for active in list(self.state.active.values()):
            if active.held is not None:
                await self._open_gate(active, active.held)
            elif active.change.phase is Phase.PROBATION and self._gate(active.change).gate is Gate.FAILED:
                _cancel(active)

    async def _open_gate(self, active: ActiveChange, held: EffectResult) -> None:
        phase, (gate, sibling) = active.change.phase, self._gate(active.change)
        if phase is Phase.STAGED and (waits := self._waits_for_data(active.change)):
            held = refused(RejectCode.DATA_MISSING, waits)
            if active.superseded:
                held = SUPERSEDED
            elif self.state.is_data_coming(active.change):
                return
            gate = Gate.READY
        if gate is Gate.FAILED:
            held = set_failed(phase, sibling)
        elif gate is Gate.WAITING and active.superseded and phase in _SUPERSEDABLE:
            held = SUPERSEDED
        elif gate is Gate.WAITING:
            return
        active.held = None
        await self._advance(active, held)

    def _waits_for_data(self, change: Change) -> str:
        """Say which data a staged change waits for; empty for none."""
        if change.item is None or change.manifest is None or change.rebinds:
            return ""
        bound = self.state.bind(change.item, change.manifest)
        return f"{change.instance} {bound}" if isinstance(bound, str) else ""

    def _gate(self, change: Change) -> GateState:
        """Look at the barrier of a change; until an assignment names the members of its set, it waits."""
        if change.atomic and self.state.desired is None:
            return GateState(Gate.WAITING)
        return set_gate(change.phase, self.state.members(change))

    # The plan

    async def _carry_out_plan(self, now: float) -> None:
        desired = self.state.desired
        if desired is None:
            return
        steps = plan(
            *self.state.planned(),
            {key: failure_of(each) for key, each in self.state.failed.items()},
            now,
        )
        if steps:
            await self._db(self._store.set_counter, "deployed", desired.version)
        for step in steps:
            await self._take(step, desired.version, self.state.wanted().get(step.instance))

    async def _take(self, step: Step, version: int, item: Item | None) -> None:
        """Take a step of the plan; `item` is the desired one of its instance."""
        active = self.state.active.get(step.instance)
        match step.act:
            case Act.REMOVE | Act.START if step.instance in self._stops:
                pass  # the plan is made again once the instance has been stopped
            case Act.START if item is not None and self._is_configured_live(item):
                self._configure(item)
            case Act.REMOVE | Act.START:
                event = Event.REMOVE if item is None else Event.BEGIN
                self._add(self._new_change(step.instance, version, item), event)
            case Act.SUPERSEDE:
                assert active is not None
                await self._supersede(active)
            case Act.RELABEL:
                assert active is not None
                change = msgspec.structs.replace(active.change, item=item, assignment=version)
                relabelled = reports.of_change(
                    self._device, change, before=self._running(step.instance), log=active.log
                )
                await self._apply(Transition(change=change, report=relabelled))
            case Act.ADOPT:
                if step.instance not in self._adopting:
                    self._adopting.add(step.instance)
                    self._inspect()
            case Act.REFUSE:
                assert item is not None
                await self._refuse_again(item, version)

    def _new_change(self, instance: str, version: int, item: Item | None) -> Change:
        """Make a change towards an item; of one that is committed already, to other data."""
        change = Change(instance=instance, assignment=version, state=State(), item=item)
        data, rebinds = self.state.rebinding().get(instance, ((), ""))
        if item is None or not rebinds:
            return change
        return msgspec.structs.replace(change, item=self.state.committed[instance].item, data=data, rebinds=rebinds)

    async def _supersede(self, active: ActiveChange) -> None:
        """End a change as soon as it may; one whose effect runs ends when the effect has been cancelled."""
        active.superseded = True
        if active.change.phase not in _SUPERSEDABLE:
            return
        if active.held is not None:
            active.held = None
            await self._advance(active, SUPERSEDED)
        else:
            _cancel(active)

    def _inspect(self) -> None:
        """Ask the host what it runs; the answer comes as an input."""
        if self._inspection is None:
            self._inspection = asyncio.get_running_loop().create_task(self._effects.figures())
            self._inspection.add_done_callback(self._inspection_ended)

    def _ask_again(self) -> None:
        """Ask the host again where it did not answer; settling, which follows, does so for items to be adopted."""
        self._adopting.clear()
        if self._is_state_wanted:
            self._inspect()

    def _inspection_ended(self, task: asyncio.Task[tuple[InstanceHealth, ...] | None]) -> None:
        self._inspection = None
        if not task.cancelled():
            self.post(HostInspected(task.result()))

    async def _answered(self, item: HostInspected | Configured | DataRemoved) -> None:
        """Take an answer of the host."""
        if isinstance(item, Configured):
            await self._configured(item)
        elif isinstance(item, DataRemoved):
            await self._db(self._store.set_counter, "kept", item.version)
        else:
            await self._inspected(item.figures)

    async def _inspected(self, figures: tuple[InstanceHealth, ...] | None) -> None:
        """Report what the host was asked for: committed items that a rollout asks for anew, and the whole state."""
        if figures is None:
            self._settle_later(STORE_AGAIN_S)
            return
        wanted, self._is_state_wanted = self._is_state_wanted, False
        by_name = {each.instance: each for each in figures}
        try:
            for instance in sorted(self._adopting):
                await self._adopt(instance, by_name.get(instance))
            if wanted:
                for report in state_reports(self._device, self.state, by_name):
                    await self._apply(Transition(report=report))
        except StoreError:
            self._is_state_wanted = self._is_state_wanted or wanted  # the input comes again
            raise

    async def _adopt(self, instance: str, figure: InstanceHealth | None) -> None:
        """Keep the new label of an item that is committed, and report its state to the rollout that asks now.

        A raised attempt starts an instance in quarantine once more, with a probation of its own.
        """
        desired, item, have = self.state.desired, self.state.wanted().get(instance), self.state.committed.get(instance)
        is_same = item is not None and have is not None and item_key(have.item) == item_key(item)
        if desired is None or item is None or have is None or not is_same or instance in self.state.active:
            self._adopting.discard(instance)
            return
        report = of_committed(self._device, item, desired.version, figure, is_data=have.manifest.is_data)
        if report is None:
            self._settle_later(INSPECT_AGAIN_S)
            return
        self._adopting.discard(instance)
        if report.phase is Phase.FAILED and item.attempt > have.item.attempt:
            change = Change(instance=instance, assignment=desired.version, state=State(), item=item)
            self._add(change, Event.BEGIN)
            return
        committed = msgspec.structs.replace(have, item=item, assignment=desired.version)
        await self._apply(Transition(committed=committed, report=report))

    # Configuration without a restart

    def _is_configured_live(self, item: Item) -> bool:
        """Tell whether the instance that runs can be given an item's configuration, as far as is known."""
        have = self.state.committed.get(item.instance)
        known = (item.instance, item_key(item)) in self._needs_change
        return have is not None and not known and reaches_running(have, item)

    def _configure(self, item: Item) -> None:
        """Ask the host to configure the instance; the answer comes as an input, and persists it."""
        if item.instance in self._configuring:
            return  # the plan is made again after it
        have = self.state.committed[item.instance]
        task = asyncio.get_running_loop().create_task(self._effects.configure(have, item))
        self._configuring[item.instance] = task
        task.add_done_callback(functools.partial(self._configure_ended, item, have.generation))

    def _configure_ended(self, item: Item, generation: int, task: asyncio.Task[bool]) -> None:
        del self._configuring[item.instance]
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            log.error("%s: configure failed with an internal error", item.instance, exc_info=error)
        self.post(Configured(item, generation, error is None and task.result()))

    async def _configured(self, answer: Configured) -> None:
        """Persist the item that an instance has been configured with, and report its state if it is still wanted.

        Another one may be wanted by now: the plan can only undo what is on record. After a power cut before this, the
        item is asked for again, which changes nothing.
        """
        item, instance, desired = answer.item, answer.item.instance, self.state.desired
        wanted, have = self.state.wanted().get(instance), self.state.committed.get(instance)
        if not answer.done:
            self._needs_change.add((instance, item_key(item)))
            return
        if have is None or have.generation != answer.generation or not reaches_running(have, item):
            return
        is_wanted = wanted is not None and item_key(wanted) == item_key(item) and instance not in self.state.active
        version = desired.version if is_wanted and desired is not None else have.assignment
        await self._apply(Transition(committed=msgspec.structs.replace(have, item=item, assignment=version)))
        await self._write_runset()
        if is_wanted:
            self._adopting.add(instance)
            self._inspect()

    async def _refuse_again(self, item: Item, version: int) -> None:
        """Report to the rollout that asks now that the item failed before and is not tried again."""
        known = self.state.known_failure(item)
        assert known is not None
        report = of_failure(self._device, item, version, known, self._running(item.instance))
        relabelled = msgspec.structs.replace(known, rollout=item.rollout)
        await self._apply(Transition(failure=relabelled, report=report))

    # Violations

    async def _enforce_violations(self) -> None:
        """Stop every item with a violation, or report once that it goes on running."""
        for each in self.state.violations:
            committed = self.state.in_force(each)
            if committed is None:
                continue
            if self._on_revoked == "stop":
                await self._stop(each, committed)
            elif each not in self._reported_violations:
                message = f"goes on running, as this device's policy says: {each.message}"
                await self._report_running(committed, each.code, message)
        kept = tuple(each for each in self.state.violations if self.state.in_force(each) is not None)
        if kept != self._reported_violations:
            await self._db(self._store.set_doubts, kept)
            self._reported_violations = kept

    async def _stop(self, violation: Violation, committed: Committed) -> None:
        active = self.state.active.get(violation.instance)
        phase = Phase.IDLE if active is None else active.change.phase
        if phase is Phase.ROLLING_BACK or (active is not None and violation.code is RejectCode.SECURITY_EPOCH):
            return  # looked at again when that change has ended
        item = committed.item
        report = reports.about(
            self._device,
            assignment=committed.assignment,
            phase=Phase.FAILED,
            item=item,
            code=violation.code,
            message=f"stopped: {violation.message}",
        )
        failure = FailedItem(
            instance=violation.instance,
            key=violation.key,
            attempt=item.attempt,
            target=item.target,
            code=violation.code,
            message=f"ran and was stopped: {violation.message}",
            at=datetime.now(UTC),
            rollout=item.rollout,
        )
        await self._apply(Transition(removed=violation.instance, failure=failure, report=report))
        await self._write_runset()
        if phase not in _NEW_VERSION_RUNS:
            self._stop_instance(violation.instance, committed.assignment)

    def _stop_instance(self, instance: str, assignment: int) -> None:
        """Have the host stop an instance, beside everything else."""
        change = Change(instance=instance, assignment=assignment, state=State())
        task = self._stops[instance] = asyncio.get_running_loop().create_task(self._effects.stop(change))
        task.add_done_callback(functools.partial(self._stopped, instance))

    def _stopped(self, instance: str, task: asyncio.Task[EffectResult]) -> None:
        _result_of(instance, Effect.STOP, task)
        self._stops.pop(instance, None)
        self.post(TimerFired())


def _cancel(active: ActiveChange) -> None:
    """Cancel the running effect once; its result then continues the change."""
    if active.task is not None and not active.task.cancelling():
        active.task.cancel()


def _result_of(instance: str, effect: Effect, task: asyncio.Task[EffectResult]) -> EffectResult:
    """Return the result of an ended task; an exception is a bug in the agent, and is logged with its traceback."""
    if task.cancelled():
        return CANCELLED
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, StoreError):
        log.error("%s: %s: %s", instance, effect, error)
        return fault(str(error))
    log.error("%s: %s failed with an internal error", instance, effect, exc_info=error)
    return fault(f"{effect} failed with an internal error of the agent: see its journal")
