"""Brings the board to its desired state: makes the plan, and walks each change through the update machine.

Persist, then act: every step is one transaction with the report that tells of it, and only then is its effect carried
out (`agent.carry`). One change per instance is in flight; each has a task of its own, so that nothing holds up a
removal. The plan is made anew whenever something ended.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

import msgspec

from agent import restore
from agent.carry import Carrier, Outcome
from agent.config import Places
from agent.records import Change, Committed, FailedItem, item_key
from agent.store import Store
from agent.update.machine import Effect, Event, Happened, Phase, State, advance
from agent.update.plan import Act, Failure, InFlight, Want, plan
from agent.worker import Worker
from fleet.protocol import caps
from fleet.protocol.assignment import Assignment, Item
from fleet.protocol.codes import RETRYABLE, RejectCode
from fleet.protocol.codes import Phase as WirePhase
from fleet.protocol.messages import Report
from fleet.protocol.names import TargetName

log = logging.getLogger("agent.deploy")

PROGRESS_S: Final = 5.0
RETRY_FAILED_FIRST_S: Final = 3600.0
RETRY_FAILED_MAX_S: Final = 86_400.0
RETRY_FAILED_TRIES_MAX: Final = 10
_SUPERSEDABLE: Final = frozenset({Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING, Phase.STAGED, Phase.PROBATION})
_QUIET: Final = frozenset({Phase.IDLE, Phase.VERIFYING, Phase.STAGED, Phase.ROLLING_BACK})
"""Phases that pass at once: no report of their own."""


@dataclass(slots=True)
class Flight:
    """A change under way, with the task that drives it."""

    change: Change
    superseded: bool = False
    well: Outcome | None = None
    work: asyncio.Task[Outcome] | None = None
    log: tuple[str, ...] = ()
    progress_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """What a deployment has to know of the board it runs on."""

    device: str
    boot_id: str
    places: Places
    mac_key: bytes
    clock: Callable[[], float]
    """Seconds that do not jump (boot time)."""


@dataclass(slots=True)
class Standing:
    """Where the board stands, for hello, health and `status`."""

    assignment: Assignment | None = None
    committed: dict[str, Committed] = field(default_factory=dict)
    flights: dict[str, Flight] = field(default_factory=dict)


class Deployer:
    """Carries out assignments."""

    def __init__(
        self, *, board: Board, store: Store, worker: Worker, carrier: Carrier, on_report: Callable[[], None]
    ) -> None:
        """A deployer; call `recover` once, then `desire` for each accepted assignment.

        Args:
            board: the board.
            store: used on `worker` only.
            worker: the thread for SQLite.
            carrier: carries out effects.
            on_report: called when there is a new report to send.
        """
        self._board = board
        self._store = store
        self._worker = worker
        self._carrier = carrier
        self._on_report = on_report
        self._tasks: set[asyncio.Task[None]] = set()
        self._moved = asyncio.Condition()
        self._planning = asyncio.Lock()
        self.standing = Standing()

    async def recover(self) -> None:
        """Take up what the last run of the agent left: each stored state names its recovery."""
        self.standing.committed = {each.item.instance: each for each in await self._worker(self._store.committed)}
        for change in await self._worker(self._store.changes):
            found = change
            if found.boot_id != self._board.boot_id:
                state = replace(found.state, entered=self._board.clock())
                found = msgspec.structs.replace(found, state=state, boot_id=self._board.boot_id)
            log.info("%s: found %s", found.instance, found.phase)
            self._launch(Flight(found), Happened(Event.INTERRUPTED))

    async def desire(self, assignment: Assignment) -> None:
        """Bring the board to this state; it has been verified, accepted and persisted."""
        self.standing.assignment = assignment
        await self.replan()

    async def replan(self) -> None:
        """Compare what is wanted with what is, and start what is missing."""
        assignment = self.standing.assignment
        if assignment is None:
            return
        async with self._planning:
            failures = await self._worker(self._store.failed)
            steps = plan(
                {item.instance: _want(item) for item in assignment.items},
                {name: _want(each.item) for name, each in self.standing.committed.items()},
                {name: _in_flight(flight.change) for name, flight in self.standing.flights.items()},
                {(each.instance, each.key, each.attempt): _failure(each) for each in failures},
                datetime.now(UTC).timestamp(),
            )
            items = {item.instance: item for item in assignment.items}
            if steps:
                await self._worker(self._store.set_counter, "deployed", assignment.version)
            for step in steps:
                await self._take(step.act, step.instance, assignment, items, failures)
            if not self.standing.flights and self._all_committed(items):
                await self._worker(self._store.set_counter, "committed", assignment.version)

    def _all_committed(self, items: Mapping[str, Item]) -> bool:
        have = {name: item_key(each.item) for name, each in self.standing.committed.items()}
        return have == {name: item_key(item) for name, item in items.items()}

    async def _take(
        self,
        act: Act,
        instance: str,
        assignment: Assignment,
        items: Mapping[str, Item],
        failures: tuple[FailedItem, ...],
    ) -> None:
        match act:
            case Act.REMOVE:
                change = Change(instance=instance, assignment=assignment.version, state=State())
                self._launch(Flight(change), Happened(Event.REMOVE))
            case Act.START:
                change = Change(instance=instance, assignment=assignment.version, state=State(), item=items[instance])
                self._launch(Flight(change), Happened(Event.BEGIN))
            case Act.SUPERSEDE:
                flight = self.standing.flights[instance]
                flight.superseded = True
                if flight.work is not None and flight.change.phase in _SUPERSEDABLE:
                    flight.work.cancel()
            case Act.RELABEL:
                flight = self.standing.flights[instance]
                flight.change = msgspec.structs.replace(
                    flight.change, item=items[instance], assignment=assignment.version
                )
                await self._save(flight.change, report=self._report(flight.change, ()))
            case Act.ADOPT:
                await self._adopt(items[instance], assignment.version)
            case Act.REFUSE:
                key, attempt = item_key(items[instance]), items[instance].attempt
                known = next(e for e in failures if (e.instance, e.key, e.attempt) == (instance, key, attempt))
                await self._refuse_again(items[instance], known, assignment.version)

    async def _adopt(self, item: Item, version: int) -> None:
        """It runs already: keep the new label, and say so to whoever asks now."""
        before = self.standing.committed[item.instance]
        now = msgspec.structs.replace(before, item=item, assignment=version)
        self.standing.committed[item.instance] = now
        report = self._bare_report(item, version, phase=WirePhase.COMMITTED)
        await self._worker(self._store.save, committed=now, report=report)
        self._on_report()

    async def _refuse_again(self, item: Item, known: FailedItem, version: int) -> None:
        """It failed before and is not tried again: say so to whoever asks now."""
        report = msgspec.structs.replace(
            self._bare_report(item, version, phase=WirePhase.FAILED),
            code=known.code,
            message=f"it failed before and is not tried again until it is told to (fleet retry): {known.message}",
        )
        relabelled = msgspec.structs.replace(known, rollout=item.rollout)
        await self._worker(self._store.save, failure=relabelled, report=report)
        self._on_report()

    # One change

    def _launch(self, flight: Flight, happened: Happened) -> None:
        self.standing.flights[flight.change.instance] = flight
        task = asyncio.get_running_loop().create_task(self._drive(flight, happened))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a deployment stopped by a fault of the agent's own", exc_info=error)

    async def _drive(self, flight: Flight, happened: Happened) -> None:
        outcome = Outcome(happened)
        while (effect := await self._step(flight, outcome)) is not Effect.CLOSE:
            if effect is Effect.WATCH:
                await self.replan()  # something newer may have been wanted during the swap
            outcome = await self._carry_out(flight, effect)
        del self.standing.flights[flight.change.instance]
        async with self._moved:
            self._moved.notify_all()
        await self.replan()

    async def _carry_out(self, flight: Flight, effect: Effect) -> Outcome:
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

    async def _effect(self, flight: Flight, effect: Effect) -> Outcome:
        change = flight.change
        try:
            return await self._dispatch(flight, effect)
        except Exception:
            log.exception("%s: %s failed by a fault of the agent's own", change.instance, effect)
            event = {Phase.PROBATION: Event.UNWELL}.get(change.phase, Event.REFUSED)
            if change.phase in {Phase.COMMITTED, Phase.FAILED, Phase.ROLLED_BACK, Phase.ROLLING_BACK}:
                event = Event.DONE
            return Outcome(Happened(event, RejectCode.INTERNAL.value, f"{effect} failed: see the agent's journal"))

    def _dispatch(  # noqa: C901, PLR0911 - one case for each effect, and nothing in any
        self, flight: Flight, effect: Effect
    ) -> Awaitable[Outcome]:
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
                return self._complete_set(flight)
            case Effect.SWAP:
                return carrier.swap(change)
            case Effect.STOP:
                return carrier.stop(change)
            case Effect.WATCH:
                return self._watch(flight)
            case Effect.COMMIT:
                return self._commit(change)
            case Effect.REVERT:
                return carrier.revert(change, self.standing.committed.get(change.instance), self._renew)
            case Effect.REMEMBER | Effect.CLOSE:
                return _done()

    async def _commit(self, change: Change) -> Outcome:
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

    # Atomic sets: all or none

    def _siblings(self, change: Change) -> list[str]:
        assignment = self.standing.assignment
        if change.item is None or not change.item.atomic or assignment is None:
            return []
        return [
            item.instance
            for item in assignment.items
            if item.atomic == change.item.atomic and item.instance != change.instance
        ]

    def _sibling_trouble(self, siblings: list[str]) -> str:
        for name in siblings:
            flight = self.standing.flights.get(name)
            if flight is not None and flight.change.phase in {Phase.FAILED, Phase.ROLLING_BACK, Phase.ROLLED_BACK}:
                return name
            if flight is None and not self._is_committed(name):
                return name
        return ""

    def _is_committed(self, name: str) -> bool:
        assert self.standing.assignment is not None
        wanted = next((item for item in self.standing.assignment.items if item.instance == name), None)
        have = self.standing.committed.get(name)
        return wanted is not None and have is not None and item_key(have.item) == item_key(wanted)

    async def _complete_set(self, flight: Flight) -> Outcome:
        """Staged alone, or until every change of its set is staged too."""
        siblings = self._siblings(flight.change)
        waiting = {Phase.IDLE, Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING}
        async with self._moved:
            while True:
                trouble = self._sibling_trouble(siblings)
                if trouble:
                    return _set_failed(Event.REFUSED, trouble)
                flights = [self.standing.flights[name] for name in siblings if name in self.standing.flights]
                if not any(each.change.phase in waiting for each in flights):
                    return Outcome(Happened(Event.DONE))
                await self._moved.wait()

    async def _watch(self, flight: Flight) -> Outcome:
        """Probation of one, and then of its whole set."""
        watching = asyncio.get_running_loop().create_task(self._carrier.watch(flight.change))
        siblings = self._siblings(flight.change)
        failing = asyncio.get_running_loop().create_task(self._wait_for_trouble(siblings))
        try:
            done, _ = await asyncio.wait({watching, failing}, return_when=asyncio.FIRST_COMPLETED)
            if failing in done and watching not in done:
                return _set_failed(Event.UNWELL, failing.result())
            outcome = watching.result()
        finally:
            watching.cancel()
            failing.cancel()
        if outcome.happened.event is Event.WELL and siblings:
            flight.well = outcome
            return await self._all_well(outcome, siblings)
        return outcome

    async def _wait_for_trouble(self, siblings: list[str]) -> str:
        async with self._moved:
            while not (trouble := self._sibling_trouble(siblings)):
                await self._moved.wait()
            return trouble

    async def _all_well(self, outcome: Outcome, siblings: list[str]) -> Outcome:
        async with self._moved:
            self._moved.notify_all()
            while True:
                trouble = self._sibling_trouble(siblings)
                if trouble:
                    return _set_failed(Event.UNWELL, trouble)
                flights = [self.standing.flights[name] for name in siblings if name in self.standing.flights]
                if all(each.well is not None or each.change.phase is Phase.COMMITTED for each in flights):
                    return outcome
                await self._moved.wait()

    # Persisting

    async def _step(self, flight: Flight, outcome: Outcome) -> Effect:
        """Advance, persist the new state with its report, and only then return what is to be done."""
        before, now = flight.change, self._board.clock()
        state, effect = advance(before.state, outcome.happened, now)
        timings = dict(before.timings_ms)
        if state.phase is not before.phase and before.phase is not Phase.IDLE:
            spent = int(1000 * max(0.0, now - before.state.entered))
            timings[before.phase.value] = timings.get(before.phase.value, 0) + spent
        change = msgspec.structs.replace(
            before, state=state, timings_ms=timings, boot_id=self._board.boot_id, **outcome.fields
        )
        if state.phase is Phase.SWAPPING and change.generation == 0 and change.item is not None:
            change = msgspec.structs.replace(change, generation=await self._worker(self._store.next_generation))
        flight.change, flight.log = change, outcome.log or flight.log
        if effect is Effect.CLOSE:
            await self._close(flight, before)
        elif state.phase is before.phase and outcome.happened.event is not Event.DELAYED:
            await self._save(change)
        else:
            await self._persist(flight, before.phase)
        async with self._moved:
            self._moved.notify_all()
        return effect

    async def _close(self, flight: Flight, before: Change) -> None:
        """It is over. A superseded change ends in FAILED without having been anything else: that is reported."""
        change = flight.change
        report = None
        if change.phase is Phase.FAILED and before.phase is not Phase.FAILED:
            report = self._report(change, flight.log)
        await self._worker(self._store.save, closed=change.instance, report=report)
        if report is not None:
            self._on_report()

    async def _persist(self, flight: Flight, left: Phase) -> None:
        change, log_lines = flight.change, flight.log
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
        elif change.item is None and left is Phase.IDLE:
            removed = change.instance
        elif change.phase in {Phase.FAILED, Phase.ROLLED_BACK}:
            failure = await self._failed_item(change)
        if committed is not None:
            self.standing.committed[change.instance] = committed
        if removed:
            self.standing.committed.pop(removed, None)
        quiet = change.phase in _QUIET
        report = None if quiet else self._report(change, log_lines if change.state.code else ())
        await self._save(change, report=report, committed=committed, removed=removed, failure=failure, facts=facts)
        if removed:
            await self._write_runset()

    async def _save(self, change: Change, *, report: Report | None = None, **also: object) -> None:
        await self._worker(self._store.save, change, report=report, **also)  # type: ignore[arg-type]
        if report is not None:
            self._on_report()

    async def _failed_item(self, change: Change) -> FailedItem | None:
        assert change.item is not None
        code = RejectCode(change.state.code or RejectCode.INTERNAL)
        if code is RejectCode.SUPERSEDED:
            return None
        key, now = item_key(change.item), datetime.now(UTC)
        known = [
            each
            for each in await self._worker(self._store.failed)
            if (each.instance, each.key, each.attempt) == (change.instance, key, change.item.attempt)
        ]
        tries = 1 + (known[0].tries if known else 0)
        again = code in RETRYABLE and tries <= RETRY_FAILED_TRIES_MAX
        delay_s = min(RETRY_FAILED_MAX_S, RETRY_FAILED_FIRST_S * 2.0 ** (tries - 1))
        return FailedItem(
            instance=change.instance,
            key=key,
            attempt=change.item.attempt,
            target=change.item.target,
            code=code,
            message=change.state.message,
            at=now,
            rollout=change.item.rollout,
            tries=tries,
            retry_at=now.timestamp() + delay_s if again else None,
        )

    def _progress(self, flight: Flight, percent: int) -> None:
        """A download went on: said at most every few seconds, and only the newest is kept."""
        now = self._board.clock()
        if now - flight.progress_at < PROGRESS_S:
            return
        flight.progress_at = now
        report = msgspec.structs.replace(self._report(flight.change, ()), progress=percent)
        task = asyncio.get_running_loop().create_task(self._post(report))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _post(self, report: Report) -> None:
        await self._worker(self._store.save, report=report)
        self._on_report()

    # Reports

    def _bare_report(self, item: Item, version: int, *, phase: WirePhase) -> Report:
        running = self.standing.committed.get(item.instance)
        return Report(
            device=self._board.device,
            boot_id=self._board.boot_id,
            sequence=0,
            at=datetime.now(UTC),
            assignment=version,
            instance=item.instance,
            target=item.target,
            manifest_sha256=item.manifest_sha256,
            attempt=item.attempt,
            rollout=item.rollout,
            phase=phase,
            running=running.item.target if running is not None else "",
        )

    def _report(self, change: Change, log_lines: tuple[str, ...]) -> Report:
        item = change.item
        if item is None:
            base = Report(
                device=self._board.device,
                boot_id=self._board.boot_id,
                sequence=0,
                at=datetime.now(UTC),
                assignment=change.assignment,
                instance=change.instance,
            )
        else:
            base = self._bare_report(item, change.assignment, phase=WirePhase.IDLE)
        answers = item is not None and change.phase in {Phase.PROBATION, Phase.COMMITTED}
        return msgspec.structs.replace(
            base,
            phase=WirePhase(change.phase.value),
            exercised=change.state.exercised,
            running=item.target if answers and item is not None else base.running,
            code=RejectCode(change.state.code) if change.state.code else None,
            message=change.state.message,
            log=_capped(log_lines),
            timings_ms=change.timings_ms,
        )

    async def close(self) -> None:
        """Leave everything as it stands, for `recover`."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _done() -> Outcome:
    return Outcome(Happened(Event.DONE))


def _superseded() -> Outcome:
    return Outcome(Happened(Event.SUPERSEDED, RejectCode.SUPERSEDED.value, "something else is wanted now"))


def _set_failed(event: Event, sibling: str) -> Outcome:
    return Outcome(
        Happened(event, RejectCode.SET_FAILED.value, f"it is to be swapped together with {sibling}, which failed")
    )


def _capped(lines: tuple[str, ...]) -> tuple[str, ...]:
    kept: list[str] = []
    size = 0
    for line in reversed(lines[-caps.LOG_LINES :]):
        size += len(line.encode())
        if size > caps.LOG_MAX_BYTES:
            break
        kept.append(line)
    return tuple(reversed(kept))


def _want(item: Item) -> Want:
    return Want(instance=item.instance, key=item_key(item), attempt=item.attempt, rollout=item.rollout)


def _in_flight(change: Change) -> InFlight:
    item = change.item
    if item is None:
        return InFlight(instance=change.instance, key="", phase=change.phase)
    return InFlight(
        instance=change.instance,
        key=item_key(item),
        phase=change.phase,
        attempt=item.attempt,
        rollout=item.rollout,
    )


def _failure(failed: FailedItem) -> Failure:
    return Failure(
        instance=failed.instance,
        key=failed.key,
        attempt=failed.attempt,
        rollout=failed.rollout,
        retry_at=failed.retry_at,
    )
