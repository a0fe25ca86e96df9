"""Atomic sets: instances that the operator declared to be swapped as one. All of a set is committed, or none of it.

Each member walks the update machine by itself; here it is held back before the swap until all are staged, and before
the commit until all are well, and it goes back when one of them does.
"""

import asyncio
from collections.abc import Awaitable
from typing import Final

from agent.carry import Outcome
from agent.records import Change
from agent.standing import Flight, Standing
from agent.update.machine import Event, Happened, Phase
from fleet.protocol.codes import RejectCode

_PREPARING: Final = frozenset({Phase.IDLE, Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING})
_FAILED: Final = frozenset({Phase.FAILED, Phase.ROLLING_BACK, Phase.ROLLED_BACK})


class Sets:
    """The atomic sets among the changes under way."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
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

    def _trouble(self, siblings: list[str]) -> str:
        """A sibling that failed or went back; empty if none did."""
        for name in siblings:
            flight = self._standing.flights.get(name)
            if flight is not None and flight.change.phase in _FAILED:
                return name
            if flight is None and not self._standing.is_committed(name):
                return name
        return ""

    def _flights(self, siblings: list[str]) -> list[Flight]:
        return [self._standing.flights[name] for name in siblings if name in self._standing.flights]

    async def staged(self, flight: Flight) -> Outcome:
        """At once for what is swapped alone, else when every change of its set is ready."""
        siblings = self._siblings(flight.change)
        async with self._moved:
            while True:
                trouble = self._trouble(siblings)
                if trouble:
                    return _failed(Event.REFUSED, trouble)
                if not any(each.change.phase in _PREPARING for each in self._flights(siblings)):
                    return Outcome(Happened(Event.DONE))
                await self._moved.wait()

    async def watched(self, flight: Flight, watching: Awaitable[Outcome]) -> Outcome:
        """The outcome of probation: of one alone, or of its whole set."""
        siblings = self._siblings(flight.change)
        if not siblings:
            return await watching
        watch = asyncio.ensure_future(watching)
        fail = asyncio.ensure_future(self._until_trouble(siblings))
        try:
            await asyncio.wait({watch, fail}, return_when=asyncio.FIRST_COMPLETED)
            if not watch.done():
                return _failed(Event.UNWELL, fail.result())
            outcome = watch.result()
        finally:
            watch.cancel()
            fail.cancel()
        if outcome.happened.event is not Event.WELL:
            return outcome
        flight.well = outcome
        await self.moved()
        return await self._all_well(outcome, siblings)

    async def _until_trouble(self, siblings: list[str]) -> str:
        async with self._moved:
            while not (trouble := self._trouble(siblings)):
                await self._moved.wait()
            return trouble

    async def _all_well(self, outcome: Outcome, siblings: list[str]) -> Outcome:
        async with self._moved:
            while True:
                trouble = self._trouble(siblings)
                if trouble:
                    return _failed(Event.UNWELL, trouble)
                flights = self._flights(siblings)
                if all(each.well is not None or each.change.phase is Phase.COMMITTED for each in flights):
                    return outcome
                await self._moved.wait()


def _failed(event: Event, sibling: str) -> Outcome:
    message = f"it is to be swapped together with {sibling}, which failed"
    return Outcome(Happened(event, RejectCode.SET_FAILED.value, message))
