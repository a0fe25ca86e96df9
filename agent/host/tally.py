"""What all lanes of one instance have written to its data today (UTC), in one page that each of them sees.

Each has a place of its own there and writes no other; the sum of the places is the instance's. So however many lanes
there are, and of whichever generation, they have one share together. The first place is the supervisor's: what was
written before, and by lanes that have ended. A place of another day counts for nothing.
"""

import fcntl
import mmap
import os
import struct
import time
from typing import Final

from agent.host.daily import Daily

_SIZE: Final = 4096
_PLACE: Final = struct.Struct("=QQ")  # bytes, day
_PLACES: Final = _SIZE // _PLACE.size
_COUNT_MAX: Final = 2**48  # more than that nobody writes in a day, whatever stands there
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_DAY_S: Final = 86_400


def day() -> int:
    """Which day it is (UTC), counted from 1970."""
    return int(time.time() // _DAY_S)


class Tally:
    """The mapped page."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, _SIZE)

    def sum(self, of_day: int) -> int:
        """The bytes of that day, over all places."""
        return sum(min(count, _COUNT_MAX) for count, on in _PLACE.iter_unpack(self._map) if on == of_day)

    def at(self, place: int, of_day: int) -> int:
        """The bytes of that day in one place."""
        count, on = _PLACE.unpack_from(self._map, place * _PLACE.size)
        return min(count, _COUNT_MAX) if on == of_day else 0

    def put(self, place: int, count: int, of_day: int) -> None:
        """What stands in a place from now on."""
        _PLACE.pack_into(self._map, place * _PLACE.size, max(0, count), of_day)

    def close(self) -> None:
        """Unmap it."""
        self._map.close()


class Account:
    """The supervisor's side of one instance's page: gives out places and carries the sum over to what is kept."""

    def __init__(self, name: str, daily: Daily) -> None:
        self._name = name
        self._daily = daily
        self._free = list(range(1, _PLACES))
        self._tally: Tally | None = None
        self.fd = -1

    def take(self) -> int:
        """A place for a lane more; the page is there while anybody has one."""
        if self._tally is None:
            self.fd = os.memfd_create(f"written-{self._name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, _SIZE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._tally = Tally(self.fd)
            self._tally.put(0, self._daily.of(self._name), day())
        return self._free.pop(0)

    def give_back(self, place: int) -> None:
        """The lane has ended; what it wrote stays counted."""
        if self._tally is not None:
            today = day()
            self._tally.put(0, self._tally.at(0, today) + self._tally.at(place, today), today)
            self._tally.put(place, 0, 0)
            self.written()
        self._free.append(place)
        if self._tally is not None and len(self._free) == _PLACES - 1:
            self._tally.close()
            os.close(self.fd)
            self._tally, self.fd = None, -1

    def written(self) -> int:
        """What the instance has written today; what is new of it is kept."""
        known = self._daily.of(self._name)
        total = known if self._tally is None else self._tally.sum(day())
        if total > known:
            self._daily.note(self._name, total - known)
        return max(total, known)
