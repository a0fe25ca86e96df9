"""Atomic sets: instances that the operator declared to be swapped as one. All of a set is committed, or none of it.

Each member walks the update machine by itself; here it is held back before the swap until all are staged, and before
the commit until all are well, and it goes back when one of them does. That a member is well is persisted before any of
them commits: whoever is found with all others well or committed after a power cut commits too, and is not judged again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from agent.carry import Outcome
from agent.records import Change
from agent.standing import Flight, Standing
from agent.update.machine import Event, Happened, Phase
from fleet.protocol.codes import RejectCode

_PREPARING: Final = frozenset({Phase.IDLE, Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING})
_SWAPPING: Final = frozenset({Phase.STAGED, Phase.SWAPPING})
_FAILED: Final = frozenset({Phase.FAILED, Phase.ROLLING_BACK, Phase.ROLLED_BACK})

Watch = Callable[[], Coroutine[Any, Any, Outcome]]


class Sets:
    """The atomic sets among the changes under way."""

    def __init__(self, standing: Standing, keep_well: Callable[[Flight], Awaitable[None]]) -> None:
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

    def _flight(self, name: str, change: Change) -> Flight | None:
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

    async def staged(self, flight: Flight) -> Outcome:
        """At once for what is swapped alone, else when every change of its set is ready."""
        await self._known(flight.change)
        return await self._all(flight, self._is_ready, Outcome(Happened(Event.DONE)), Event.REFUSED)

    async def watched(self, flight: Flight, watch: Watch, runs: Watch) -> Outcome:
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

    async def _watched_beside(self, flight: Flight, watch: Watch) -> Outcome:
        """The outcome of its own probation, unless a sibling fails first."""
        watching = asyncio.ensure_future(watch())
        failing = asyncio.ensure_future(self._until_trouble(flight))
        try:
            await asyncio.wait({watching, failing}, return_when=asyncio.FIRST_COMPLETED)
            return watching.result() if watching.done() else _failed(Event.UNWELL, failing.result())
        finally:
            watching.cancel()
            failing.cancel()

    async def _until_trouble(self, flight: Flight) -> str:
        async with self._moved:
            while not (trouble := self._trouble(flight.change)):
                await self._moved.wait()
            return trouble

    async def _all(
        self, flight: Flight, holds: Callable[[str, Change], bool], outcome: Outcome, otherwise: Event
    ) -> Outcome:
        """`outcome` when it holds of every sibling, or that one of them failed."""
        async with self._moved:
            while True:
                trouble = self._trouble(flight.change)
                if trouble:
                    return _failed(otherwise, trouble)
                if all(holds(name, flight.change) for name in self._siblings(flight.change)):
                    return outcome
                await self._moved.wait()


def _failed(event: Event, sibling: str) -> Outcome:
    message = f"it is to be swapped together with {sibling}, which failed"
    return Outcome(Happened(event, RejectCode.SET_FAILED.value, message))
