"""Takes what may not run any more off the board, or lets it run on, as the board's owner decided.

It needs no network and waits for nothing: a download or a compilation of the version that shall replace it goes on
beside it. That it is not committed any more is persisted first, with the report that says so; then the host is told. If
power goes in between, nothing starts it again, and a host that still runs it is told to stop what belongs to nothing.
"""

from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import Final, Literal

from agent import reports
from agent.carry import Carrier
from agent.records import Change, Committed, Doubt, FailedItem, item_key
from agent.standing import Board, Standing
from agent.store import Store
from agent.update.machine import Phase, State
from agent.worker import Worker
from fleet.protocol.codes import Phase as WirePhase
from fleet.protocol.codes import RejectCode

_NEW_ONE_THERE: Final = frozenset({Phase.SWAPPING, Phase.PROBATION, Phase.COMMITTED})
"""Phases in which the host has the next version too, which a stop would take along: going back then stops both."""


class Withdrawals:
    """What was found to speak against committed items, and what becomes of them."""

    def __init__(
        self,
        *,
        board: Board,
        store: Store,
        worker: Worker,
        carrier: Carrier,
        standing: Standing,
        policy: Literal["stop", "keep"],
        on_report: Callable[[], None],
        write_runset: Callable[[], Awaitable[None]],
    ) -> None:
        """On what this board has; `policy` is its owner's word, `write_runset` records what is committed."""
        self._board, self._store, self._worker, self._carrier = board, store, worker, carrier
        self._standing, self._policy = standing, policy
        self._on_report, self._write_runset = on_report, write_runset
        self._doubts: tuple[Doubt, ...] = ()

    def hold(self, doubts: Iterable[Doubt]) -> None:
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

    def _concerned(self, doubt: Doubt) -> Committed | None:
        """What is committed under that name, unless it is something else by now."""
        committed = self._standing.committed.get(doubt.instance)
        return committed if committed is not None and item_key(committed.item) == doubt.key else None

    async def _stop(self, doubt: Doubt, committed: Committed) -> None:
        flight = self._standing.flights.get(doubt.instance)
        phase = Phase.IDLE if flight is None else flight.change.phase
        if phase is Phase.ROLLING_BACK or (flight is not None and doubt.code is RejectCode.SECURITY_EPOCH):
            return  # it is looked at again when that has ended
        item = committed.item
        report = reports.about(
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
        reports.tell(report)
        await self._worker(self._store.save, removed=doubt.instance, failure=failure, report=report)
        self._standing.committed.pop(doubt.instance, None)
        await self._write_runset()
        self._on_report()
        if phase not in _NEW_ONE_THERE:
            await self._carrier.stop(Change(instance=doubt.instance, assignment=committed.assignment, state=State()))

    async def _say_kept(self, doubt: Doubt, committed: Committed) -> None:
        report = reports.about(
            self._board,
            assignment=committed.assignment,
            phase=WirePhase.IDLE,
            item=committed.item,
            running=committed.item.target,
            code=doubt.code,
            message=f"it goes on running, as this board's policy says: {doubt.message}",
        )
        reports.tell(report)
        await self._worker(self._store.save, report=report)
        self._on_report()
