"""Where the new generations of an atomic set wait for each other: none takes over before all are ready to.

Each start names the others. Who is ready waits here; the last one lets all go, in one turn of the loop. Who fails
before that takes the others with it, and who does not come in time has failed.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from agent.host.generation import StartError
from fleet.protocol.codes import RejectCode

_GRACE_S: Final = 15.0
_REMEMBERED_S: Final = 30.0


class _Meeting:
    """One set that is being swapped."""

    def __init__(self) -> None:
        self.met: set[str] = set()
        self.ready: set[str] = set()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.inside = 0

    def fail(self, instance: str) -> None:
        """This one failed: whoever waits here hears of it, and that may be nobody."""
        self.over.set_exception(StartError(RejectCode.SET_FAILED, instance))
        self.over.exception()


class Muster:
    """Every set that is being swapped now."""

    def __init__(self) -> None:
        self._meetings: dict[frozenset[str], _Meeting] = {}
        self._untold: dict[frozenset[str], tuple[str, set[str]]] = {}  # who failed, and who has not come yet to hear it

    @asynccontextmanager
    async def joined(self, instance: str, together: tuple[str, ...]) -> AsyncIterator["Place"]:
        """Begin a start that is one of a set; an exception in here is the whole set's, as long as it waits."""
        members = frozenset({instance, *together})
        meeting = self._meetings.get(members)
        if meeting is None or meeting.over.done():
            meeting = self._meetings[members] = _Meeting()
        failed, untold = self._untold.get(members, ("", set()))
        if instance in untold:
            untold.discard(instance)
            meeting.fail(failed)
        meeting.met.add(instance)
        meeting.inside += 1
        try:
            yield Place(meeting, instance, members)
        except BaseException:
            if not meeting.over.done():
                meeting.fail(instance)
                self._untold[members] = (instance, set(members - meeting.met))
                asyncio.get_running_loop().call_later(_REMEMBERED_S, self._untold.pop, members, None)
            raise
        finally:
            meeting.inside -= 1
            if not meeting.inside and self._meetings.get(members) is meeting:
                del self._meetings[members]


class Place:
    """One member's place among the others."""

    def __init__(self, meeting: _Meeting, instance: str, members: frozenset[str]) -> None:
        self._meeting, self._instance, self._members = meeting, instance, members

    async def ready(self, longest_s: float) -> None:
        """Wait until all are ready. Raises `StartError` (SET_FAILED) when one is not, or does not come."""
        meeting = self._meeting
        meeting.ready.add(self._instance)
        if meeting.ready >= self._members and not meeting.over.done():
            meeting.over.set_result(None)
        try:
            await asyncio.wait_for(asyncio.shield(meeting.over), longest_s + _GRACE_S)
        except TimeoutError as error:
            missing = ", ".join(sorted(self._members - meeting.ready))
            raise failure(self._instance, f"{missing}, which did not come") from error
        except StartError as error:
            raise failure(self._instance, f"{error}, which failed") from error


def failure(instance: str, whom: str) -> StartError:
    """That a member is not started because of another."""
    return StartError(
        RejectCode.SET_FAILED, f"{instance}: it is to be swapped together with {whom}; nothing is changed"
    )
