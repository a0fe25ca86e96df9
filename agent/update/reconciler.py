"""Reconciler: single inbox, single owner of deployment state; violations; atomic sets.

Brings the board to its desired state: makes the plan, and walks each change through the update machine.

Persist, then act: every step is one transaction with the report that tells of it, and only then is its effect carried
out (`agent.update.effects`). One change per instance is in flight; each has a task of its own, so that nothing holds
up a removal. The plan is made anew whenever something ended.

Takes what may not run any more off the board, or lets it run on, as the board's owner decided.

It needs no network and waits for nothing: a download or a compilation of the version that shall replace it goes on
beside it. That it is not committed any more is persisted first, with the report that says so; then the host is told. If
power goes in between, nothing starts it again, and a host that still runs it is told to stop what belongs to nothing.

Atomic sets: instances that the operator declared to be swapped as one. All of a set is committed, or none of it.

Each member walks the update machine by itself; here it is held back before the swap until all are staged, and before
the commit until all are well, and it goes back when one of them does. That a member is well is persisted before any of
them commits: whoever is found with all others well or committed after a power cut commits too, and is not judged again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec

from agent.update import restore, state
from agent.update.effects import EffectRunner
from agent.update.machine import Effect, Event, Happened, Phase, State, advance
from agent.update.plan import Act, may_report_committed, plan
from agent.update.state import (
    ActiveChange,
    Change,
    Committed,
    DeploymentState,
    DeviceContext,
    EffectResult,
    FailedItem,
    Violation,
    failed_item,
    failure_of,
    item_key,
)
from agent.update.store import Database, Store, StoreError
from fleet.protocol.assignment import Assignment, Item
from fleet.protocol.codes import Phase as WirePhase
from fleet.protocol.codes import RejectCode
from fleet.protocol.messages import Report
from fleet.protocol.names import TargetName

log = logging.getLogger("agent.update.reconciler")

PROGRESS_S: Final = 5.0

STORE_AGAIN_S: Final = 30.0

_SUPERSEDABLE: Final = frozenset({Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING, Phase.STAGED, Phase.PROBATION})

_QUIET: Final = frozenset({Phase.IDLE, Phase.VERIFYING, Phase.STAGED, Phase.ROLLING_BACK})
"""Phases that pass at once: no report of their own."""


class Reconciler:
    """Carries out assignments."""

    def __init__(
        self,
        *,
        board: DeviceContext,
        store: Store,
        worker: Database,
        carrier: EffectRunner,
        on_report: Callable[[], None],
        on_revoked: Literal["stop", "keep"] = "stop",
    ) -> None:
        """A deployer; call `recover` once, then `desire` for each accepted assignment.

        Args:
            board: the board.
            store: used on `worker` only.
            worker: the thread for SQLite.
            carrier: carries out effects.
            on_report: called when there is a new report to send.
            on_revoked: what becomes of a committed item that something speaks against.
        """
        self._board = board
        self._store = store
        self._worker = worker
        self._carrier = carrier
        self._on_report = on_report
        self._tasks: set[asyncio.Task[None]] = set()
        self._planning = asyncio.Lock()
        self._later: asyncio.TimerHandle | None = None
        self.standing = DeploymentState()
        self._sets = Sets(self.standing, self._keep_well)
        self.withdrawals = Withdrawals(
            board=board,
            store=store,
            worker=worker,
            carrier=carrier,
            standing=self.standing,
            policy=on_revoked,
            on_report=on_report,
            write_runset=self._write_runset,
        )

    async def recover(self) -> None:
        """Take up what the last run of the agent left: each stored state names its recovery."""
        self.standing.committed = {each.item.instance: each for each in await self._worker(self._store.committed)}
        for change in await self._worker(self._store.changes):
            found = change
            if found.boot_id != self._board.boot_id:
                state = replace(found.state, entered=self._board.clock())
                found = msgspec.structs.replace(found, state=state, boot_id=self._board.boot_id)
            log.info("%s: found %s", found.instance, found.phase)
            self._launch(ActiveChange(found), Happened(Event.INTERRUPTED))

    async def desire(self, assignment: Assignment) -> None:
        """Bring the board to this state; it has been verified, accepted and persisted."""
        self.standing.assignment = assignment
        await self._sets.moved()
        await self.replan()

    async def hold(self, doubts: Iterable[Violation]) -> None:
        """Something speaks against these committed items: nothing holds up that they are stopped."""
        self.withdrawals.hold(doubts)
        await self.replan()

    async def replan(self) -> None:
        """Compare what is wanted with what is, and start what is missing."""
        try:
            async with self._planning:
                await self.withdrawals.carry_out()
                if self.standing.assignment is not None:
                    await self._plan_and_start(self.standing.assignment)
        except StoreError as error:
            log.error("what is wanted cannot be begun now: %s", error)  # noqa: TRY400 - said in the message
            self._call_later(STORE_AGAIN_S)

    async def _plan_and_start(self, assignment: Assignment) -> None:
        failures = await self._worker(self._store.failed)
        self.standing.failed = {(each.instance, each.key, each.attempt) for each in failures}
        steps = plan(
            *self.standing.planned(),
            {(each.instance, each.key, each.attempt): failure_of(each) for each in failures},
            datetime.now(UTC).timestamp(),
        )
        if steps:
            await self._worker(self._store.set_counter, "deployed", assignment.version)
        for step in steps:
            await self._take(step.act, step.instance, assignment, failures)
        self._replan_later(failures)
        if may_report_committed(*self.standing.planned()):
            await self._worker(self._store.set_counter, "committed", assignment.version)

    def _replan_later(self, failures: tuple[FailedItem, ...]) -> None:
        """When what failed in passing may be tried again, the plan is made anew."""
        times = [each.retry_at for each in failures if each.retry_at is not None]
        wait_s = [at - datetime.now(UTC).timestamp() for at in times]
        due = min((seconds for seconds in wait_s if seconds > 0), default=None)
        if due is not None:
            self._call_later(due + 1)

    def _call_later(self, seconds: float) -> None:
        if self._later is not None:
            self._later.cancel()
        self._later = asyncio.get_running_loop().call_later(seconds, self._replan_now)

    def _replan_now(self) -> None:
        task = asyncio.get_running_loop().create_task(self.replan())
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _take(
        self,
        act: Act,
        instance: str,
        assignment: Assignment,
        failures: tuple[FailedItem, ...],
    ) -> None:
        items = self.standing.wanted()
        flight = self.standing.flights.get(instance)
        match act:
            case Act.REMOVE:
                change = Change(instance=instance, assignment=assignment.version, state=State())
                self._launch(ActiveChange(change), Happened(Event.REMOVE))
            case Act.START:
                change = Change(instance=instance, assignment=assignment.version, state=State(), item=items[instance])
                self._launch(ActiveChange(change), Happened(Event.BEGIN))
            case Act.SUPERSEDE | Act.RELABEL if flight is None:
                pass  # it came to its end while the plan was made, and plans anew itself
            case Act.SUPERSEDE if flight is not None:
                flight.superseded = True
                if flight.work is not None and flight.change.phase in _SUPERSEDABLE:
                    flight.work.cancel()
            case Act.RELABEL if flight is not None:
                await self._relabel(flight, items[instance], assignment.version)
            case Act.ADOPT:
                await self._adopt(items[instance], assignment.version)
            case Act.REFUSE:
                key, attempt = item_key(items[instance]), items[instance].attempt
                known = next(e for e in failures if (e.instance, e.key, e.attempt) == (instance, key, attempt))
                await self._refuse_again(items[instance], known, assignment.version)

    async def _relabel(self, flight: ActiveChange, item: Item, version: int) -> None:
        """It is under way already, and somebody else asks for it now."""
        async with flight.lock:
            if flight.over:
                return  # what is planned after its end says so
            flight.change = msgspec.structs.replace(flight.change, item=item, assignment=version)
            await self._save(flight.change, report=self._report(flight))

    async def _adopt(self, item: Item, version: int) -> None:
        """It runs already: keep the new label, and say so to whoever asks now."""
        before = self.standing.committed[item.instance]
        now = msgspec.structs.replace(before, item=item, assignment=version)
        self.standing.committed[item.instance] = now
        report = state.about(self._board, assignment=version, phase=WirePhase.COMMITTED, item=item, running=item.target)
        await self._worker(self._store.save, committed=now, report=report)
        self._on_report()

    async def _refuse_again(self, item: Item, known: FailedItem, version: int) -> None:
        """It failed before and is not tried again: say so to whoever asks now."""
        report = state.about(
            self._board,
            assignment=version,
            phase=WirePhase.FAILED,
            item=item,
            running=self._before(item.instance),
            code=known.code,
            message=f"it failed before and is not tried again until it is told to (fleet retry): {known.message}",
        )
        relabelled = msgspec.structs.replace(known, rollout=item.rollout)
        await self._worker(self._store.save, failure=relabelled, report=report)
        self._on_report()

    # One change

    def _launch(self, flight: ActiveChange, happened: Happened) -> None:
        self.standing.flights[flight.change.instance] = flight
        task = asyncio.get_running_loop().create_task(self._drive(flight, happened))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a deployment stopped by a fault of the agent's own", exc_info=error)

    async def _drive(self, flight: ActiveChange, happened: Happened) -> None:
        outcome = EffectResult(happened)
        while (effect := await self._step_when_possible(flight, outcome)) is not Effect.CLOSE:
            if effect is Effect.WATCH:
                await self.replan()  # something newer may have been wanted during the swap
            outcome = await self._carry_out(flight, effect)
        del self.standing.flights[flight.change.instance]
        await self._sets.moved()
        await self.replan()

    async def _carry_out(self, flight: ActiveChange, effect: Effect) -> EffectResult:
        if flight.superseded and flight.change.phase in _SUPERSEDABLE:
            return _superseded()
        flight.work = asyncio.get_running_loop().create_task(self._effect(flight, effect))
        try:
            return await asyncio.shield(flight.work)
        except asyncio.CancelledError:
            if flight.superseded and flight.work.cancelled() and flight.change.phase in _SUPERSEDABLE:
                return _superseded()
            flight.work.cancel()
            raise
        finally:
            flight.work = None

    async def _effect(self, flight: ActiveChange, effect: Effect) -> EffectResult:
        change = flight.change
        try:
            return await self._dispatch(flight, effect)
        except Exception:
            log.exception("%s: %s failed by a fault of the agent's own", change.instance, effect)
            message = f"{effect} failed by a fault of the agent's own: see its journal"
            return EffectResult(Happened(Event.FAULT, RejectCode.INTERNAL.value, message))

    def _dispatch(  # noqa: C901, PLR0911 - one case for each effect, and nothing in any
        self, flight: ActiveChange, effect: Effect
    ) -> Awaitable[EffectResult]:
        change, carrier = flight.change, self._carrier
        match effect:
            case Effect.FETCH:
                return carrier.fetch(change, lambda percent: self._progress(flight, percent))
            case Effect.RETRY:
                return carrier.retry(change, lambda percent: self._progress(flight, percent))
            case Effect.VERIFY:
                return carrier.verify(change)
            case Effect.COMPILE:
                return carrier.compile(change)
            case Effect.STAGE:
                return self._sets.staged(flight)
            case Effect.SWAP:
                return carrier.swap(change, self._sets.together(change))
            case Effect.STOP:
                return carrier.stop(change)
            case Effect.WATCH:
                return self._sets.watched(flight, lambda: carrier.watch(change), lambda: carrier.runs(change))
            case Effect.COMMIT:
                return self._commit(change)
            case Effect.REVERT:
                return carrier.revert(change, self.standing.committed.get(change.instance), self._renew)
            case Effect.REMEMBER | Effect.CLOSE:
                return _done()

    async def _commit(self, change: Change) -> EffectResult:
        await self._write_runset()
        return await self._carrier.commit(change)

    async def _write_runset(self) -> None:
        try:
            items = await self._worker(self._store.committed)
            await self._worker(restore.write_runset, self._board.places.runset, items, self._board.mac_key)
        except OSError as error:
            log.warning("cannot write the second record of what runs: %s", error)

    async def _renew(self, before: Committed) -> Committed:
        generation = await self._worker(self._store.next_generation)
        renewed = msgspec.structs.replace(before, generation=generation)
        await self._worker(self._store.save, committed=renewed)
        self.standing.committed[before.item.instance] = renewed
        return renewed

    # Persisting

    async def _step_when_possible(self, flight: ActiveChange, outcome: EffectResult) -> Effect:
        """A step that cannot be persisted is not taken; on a disk that is full it waits until there is room again."""
        while True:
            try:
                return await self._step(flight, outcome)
            except StoreError as error:
                log.error("%s: %s; it waits", flight.change.instance, error)  # noqa: TRY400 - said in the message
            await asyncio.sleep(STORE_AGAIN_S)

    async def _step(self, flight: ActiveChange, outcome: EffectResult) -> Effect:
        """Advance, persist the new state with its report, and only then return what is to be done."""
        async with flight.lock:
            before, now = flight.change, self._board.clock()
            state, effect = advance(before.state, outcome.happened, now)
            change = msgspec.structs.replace(
                before,
                state=state,
                timings_ms=_timed(before, state.phase, now),
                boot_id=self._board.boot_id,
                **outcome.fields,
            )
            if state.phase is Phase.SWAPPING and change.generation == 0 and change.item is not None:
                change = msgspec.structs.replace(change, generation=await self._worker(self._store.next_generation))
            flight.change, flight.log = change, outcome.log or flight.log
            try:
                if effect is Effect.CLOSE:
                    await self._close(flight, before)
                elif state.phase is before.phase and outcome.happened.event not in {Event.DELAYED, Event.FAULT}:
                    await self._save(change)
                else:
                    await self._persist(flight, before.phase)
            except StoreError:
                flight.change = before
                raise
        await self._sets.moved()
        return effect

    async def _close(self, flight: ActiveChange, before: Change) -> None:
        """It is over. A superseded change ends in FAILED without having been anything else: that is reported."""
        change = flight.change
        report = None
        if change.phase is Phase.FAILED and before.phase is not Phase.FAILED:
            report = self._report(flight)
        await self._worker(self._store.save, closed=change.instance, report=report)
        flight.over = True
        if report is not None:
            self._told(report)

    async def _persist(self, flight: ActiveChange, left: Phase) -> None:
        change = flight.change
        committed, removed, failure, facts = None, "", None, None
        if change.phase is Phase.COMMITTED and change.item is not None:
            assert change.manifest is not None
            committed = Committed(
                item=change.item,
                manifest=change.manifest,
                generation=change.generation,
                assignment=change.assignment,
                at=datetime.now(UTC),
            )
            facts = (await self._worker(self._store.facts)).with_committed(
                TargetName.from_path(change.item.target).component, change.manifest.security_epoch
            )
            facts = facts.with_secrets(change.instance, {ref.name: ref.version for ref in change.item.secrets})
        elif change.item is None and left is Phase.IDLE:
            removed = change.instance
        elif change.phase in {Phase.FAILED, Phase.ROLLED_BACK}:
            failure = await self._failed_item(change)
            if failure is not None:
                self.standing.failed.add((failure.instance, failure.key, failure.attempt))
        quiet = change.phase in _QUIET
        report = None if quiet else self._report(flight)
        await self._save(change, report=report, committed=committed, removed=removed, failure=failure, facts=facts)
        if committed is not None:
            self.standing.committed[change.instance] = committed
        if removed:
            self.standing.committed.pop(removed, None)
            await self._write_runset()

    async def _save(self, change: Change, *, report: Report | None = None, **also: object) -> None:
        await self._worker(self._store.save, change, report=report, **also)  # type: ignore[arg-type]
        if report is not None:
            self._told(report)

    def _told(self, report: Report) -> None:
        state.tell(report)
        self._on_report()

    async def _keep_well(self, flight: ActiveChange) -> None:
        async with flight.lock:
            flight.change = msgspec.structs.replace(flight.change, well=True)
            await self._save(flight.change)

    async def _failed_item(self, change: Change) -> FailedItem | None:
        return failed_item(change, await self._worker(self._store.failed), datetime.now(UTC))

    def _progress(self, flight: ActiveChange, percent: int) -> None:
        """A download went on: said at most every few seconds, and only the newest is kept."""
        now = self._board.clock()
        if now - flight.progress_at < PROGRESS_S:
            return
        flight.progress_at = now
        report = msgspec.structs.replace(self._report(flight), progress=percent)
        task = asyncio.get_running_loop().create_task(self._post(report))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _post(self, report: Report) -> None:
        await self._worker(self._store.save, report=report)
        self._on_report()

    def _before(self, instance: str) -> str:
        have = self.standing.committed.get(instance)
        return have.item.target if have is not None else ""

    def _report(self, flight: ActiveChange) -> Report:
        change = flight.change
        return state.of_change(self._board, change, before=self._before(change.instance), log=flight.log)

    async def close(self) -> None:
        """Leave everything as it stands, for `recover`."""
        if self._later is not None:
            self._later.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _timed(change: Change, entered: Phase, now: float) -> dict[str, int]:
    """How long each phase took, the one that is being left included."""
    left = change.phase
    if left in {entered, Phase.IDLE}:
        return change.timings_ms
    spent_ms = int(1000 * max(0.0, now - change.state.entered))
    return {**change.timings_ms, left.value: change.timings_ms.get(left.value, 0) + spent_ms}


async def _done() -> EffectResult:
    return EffectResult(Happened(Event.DONE))


def _superseded() -> EffectResult:
    return EffectResult(Happened(Event.SUPERSEDED, RejectCode.SUPERSEDED.value, "something else is wanted now"))


_NEW_ONE_THERE: Final = frozenset({Phase.SWAPPING, Phase.PROBATION, Phase.COMMITTED})
"""Phases in which the host has the next version too, which a stop would take along: going back then stops both."""


class Withdrawals:
    """What was found to speak against committed items, and what becomes of them."""

    def __init__(
        self,
        *,
        board: DeviceContext,
        store: Store,
        worker: Database,
        carrier: EffectRunner,
        standing: DeploymentState,
        policy: Literal["stop", "keep"],
        on_report: Callable[[], None],
        write_runset: Callable[[], Awaitable[None]],
    ) -> None:
        """On what this board has; `policy` is its owner's word, `write_runset` records what is committed."""
        self._board, self._store, self._worker, self._carrier = board, store, worker, carrier
        self._standing, self._policy = standing, policy
        self._on_report, self._write_runset = on_report, write_runset
        self._doubts: tuple[Violation, ...] = ()

    def hold(self, doubts: Iterable[Violation]) -> None:
        """What was found now, in place of what was found before."""
        self._doubts = tuple(doubts)

    @property
    def problems(self) -> list[str]:
        """What runs on although something speaks against it, as sentences."""
        return [
            f"{each.instance} goes on running, as this board's policy says ({each.code}): {each.message}"
            for each in self._doubts
            if self._concerned(each) is not None
        ]

    async def carry_out(self) -> None:
        """Stop what is in doubt, or say that it goes on; raises `StoreError` where that cannot be persisted."""
        known = await self._worker(self._store.doubts)
        if not known and not self._doubts:
            return
        for doubt in self._doubts:
            committed = self._concerned(doubt)
            if committed is None:
                continue
            if self._policy == "stop":
                await self._stop(doubt, committed)
            elif doubt not in known:
                await self._say_kept(doubt, committed)
        kept = [each for each in self._doubts if self._concerned(each) is not None]
        await self._worker(self._store.set_doubts, kept)

    def _concerned(self, doubt: Violation) -> Committed | None:
        """What is committed under that name, unless it is something else by now."""
        committed = self._standing.committed.get(doubt.instance)
        return committed if committed is not None and item_key(committed.item) == doubt.key else None

    async def _stop(self, doubt: Violation, committed: Committed) -> None:
        flight = self._standing.flights.get(doubt.instance)
        phase = Phase.IDLE if flight is None else flight.change.phase
        if phase is Phase.ROLLING_BACK or (flight is not None and doubt.code is RejectCode.SECURITY_EPOCH):
            return  # it is looked at again when that has ended
        item = committed.item
        report = state.about(
            self._board,
            assignment=committed.assignment,
            phase=WirePhase.FAILED,
            item=item,
            code=doubt.code,
            message=f"it was stopped: {doubt.message}",
        )
        failure = FailedItem(
            instance=doubt.instance,
            key=doubt.key,
            attempt=item.attempt,
            target=item.target,
            code=doubt.code,
            message=f"it ran and was stopped: {doubt.message}",
            at=datetime.now(UTC),
            rollout=item.rollout,
        )
        state.tell(report)
        await self._worker(self._store.save, removed=doubt.instance, failure=failure, report=report)
        self._standing.committed.pop(doubt.instance, None)
        await self._write_runset()
        self._on_report()
        if phase not in _NEW_ONE_THERE:
            await self._carrier.stop(Change(instance=doubt.instance, assignment=committed.assignment, state=State()))

    async def _say_kept(self, doubt: Violation, committed: Committed) -> None:
        report = state.about(
            self._board,
            assignment=committed.assignment,
            phase=WirePhase.IDLE,
            item=committed.item,
            running=committed.item.target,
            code=doubt.code,
            message=f"it goes on running, as this board's policy says: {doubt.message}",
        )
        state.tell(report)
        await self._worker(self._store.save, report=report)
        self._on_report()


_PREPARING: Final = frozenset({Phase.IDLE, Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING})

_SWAPPING: Final = frozenset({Phase.STAGED, Phase.SWAPPING})

_FAILED: Final = frozenset({Phase.FAILED, Phase.ROLLING_BACK, Phase.ROLLED_BACK})

Watch = Callable[[], Coroutine[Any, Any, EffectResult]]


class Sets:
    """The atomic sets among the changes under way."""

    def __init__(self, standing: DeploymentState, keep_well: Callable[[ActiveChange], Awaitable[None]]) -> None:
        """`keep_well(flight)` persists that its change has passed its own probation."""
        self._standing = standing
        self._keep_well = keep_well
        self._moved = asyncio.Condition()

    async def moved(self) -> None:
        """Some change went on: whoever waits for it looks again."""
        async with self._moved:
            self._moved.notify_all()

    def _siblings(self, change: Change) -> list[str]:
        if change.item is None or not change.item.atomic:
            return []
        return [
            name
            for name, item in self._standing.wanted().items()
            if item.atomic == change.item.atomic and name != change.instance
        ]

    async def _known(self, change: Change) -> None:
        """A change found at the start belongs to a set whose other members the assignment names: wait for that."""
        if change.item is not None and change.item.atomic:
            async with self._moved:
                await self._moved.wait_for(lambda: self._standing.assignment is not None)

    def _flight(self, name: str, change: Change) -> ActiveChange | None:
        """The flight by which a sibling becomes what this set wants; None where there is none (yet, or any more)."""
        flight = self._standing.flights.get(name)
        mine = change.item.atomic if change.item is not None else ""
        ours = flight is not None and flight.change.item is not None and flight.change.item.atomic == mine
        return flight if ours else None

    def _trouble(self, change: Change) -> str:
        """A sibling that failed or went back; empty if none did."""
        for name in self._siblings(change):
            flight = self._flight(name, change)
            if flight.change.phase in _FAILED if flight is not None else self._standing.has_failed(name):
                return name
        return ""

    def _is_ready(self, name: str, change: Change) -> bool:
        flight = self._flight(name, change)
        if flight is None:  # it runs already, or has not begun: what is under way there ends first
            return self._standing.is_committed(name) and name not in self._standing.flights
        return flight.change.phase not in _PREPARING

    def _is_well(self, name: str, change: Change) -> bool:
        flight = self._flight(name, change)
        if flight is None:
            return self._standing.is_committed(name)
        return flight.change.well or flight.change.phase is Phase.COMMITTED

    def together(self, change: Change) -> tuple[str, ...]:
        """The instances that are to be swapped in the same moment as this one."""
        flights = {name: self._flight(name, change) for name in self._siblings(change)}
        return tuple(name for name, each in flights.items() if each is not None and each.change.phase in _SWAPPING)

    async def staged(self, flight: ActiveChange) -> EffectResult:
        """At once for what is swapped alone, else when every change of its set is ready."""
        await self._known(flight.change)
        return await self._all(flight, self._is_ready, EffectResult(Happened(Event.DONE)), Event.REFUSED)

    async def watched(self, flight: ActiveChange, watch: Watch, runs: Watch) -> EffectResult:
        """The outcome of probation: of one alone, or of its whole set.

        `watch` is its own probation, `runs` only whether it runs, for one that has been well before.
        """
        await self._known(flight.change)
        if not self._siblings(flight.change):
            return await watch()
        outcome = await self._watched_beside(flight, runs if flight.change.well else watch)
        if outcome.happened.event is not Event.WELL:
            return outcome
        if not flight.change.well:
            await self._keep_well(flight)
            await self.moved()
        return await self._all(flight, self._is_well, outcome, Event.UNWELL)

    async def _watched_beside(self, flight: ActiveChange, watch: Watch) -> EffectResult:
        """The outcome of its own probation, unless a sibling fails first."""
        watching = asyncio.ensure_future(watch())
        failing = asyncio.ensure_future(self._until_trouble(flight))
        try:
            await asyncio.wait({watching, failing}, return_when=asyncio.FIRST_COMPLETED)
            return watching.result() if watching.done() else _failed(Event.UNWELL, failing.result())
        finally:
            watching.cancel()
            failing.cancel()

    async def _until_trouble(self, flight: ActiveChange) -> str:
        async with self._moved:
            while not (trouble := self._trouble(flight.change)):
                await self._moved.wait()
            return trouble

    async def _all(
        self, flight: ActiveChange, holds: Callable[[str, Change], bool], outcome: EffectResult, otherwise: Event
    ) -> EffectResult:
        """`outcome` when it holds of every sibling, or that one of them failed."""
        async with self._moved:
            while True:
                trouble = self._trouble(flight.change)
                if trouble:
                    return _failed(otherwise, trouble)
                if all(holds(name, flight.change) for name in self._siblings(flight.change)):
                    return outcome
                await self._moved.wait()


def _failed(event: Event, sibling: str) -> EffectResult:
    message = f"it is to be swapped together with {sibling}, which failed"
    return EffectResult(Happened(event, RejectCode.SET_FAILED.value, message))
