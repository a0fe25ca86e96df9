"""Daily write quota: stored, shared page, per-worker meter.

How much each instance has written today (UTC), over restarts of lanes and host: kept in a file, and not too often.

What a host that is killed has not saved yet is at most a mebibyte of each instance.

What all lanes of one instance have written to its data today (UTC), in one page that each of them sees.

Each has a place of its own there and writes no other; the sum of the places is the instance's. So however many lanes
there are, and of whichever generation, they have one share together. The first place is the supervisor's: what was
written before, and by lanes that have ended. A place of another day counts for nothing.

What a lane's guest writes to its data in a day: counted, and refused beyond the share of its instance.

The kernel counts what this process writes (`/proc/self/io`, opened before the cell was shut); sockets and shared memory
are not in it. The count goes into a page that all lanes of the instance see (`agent.host.ipc.write_quota`). Beyond the
share no file may grow or be written any more (`RLIMIT_FSIZE`), until the day (UTC) is over. Only lanes with data have
one of these.
"""

import contextlib
import fcntl
import json
import mmap
import os
import resource
import struct
import time
from pathlib import Path
from typing import Final

from fleet.protocol.bounds import MIB

_DAY_S: Final = 86_400


class QuotaStore:
    """The bytes of today, by instance."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._day = _today()
        self._written: dict[str, int] = {}
        self._unsaved = 0
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if int(kept["day"]) == self._day:
                self._written = {str(name): int(count) for name, count in kept["written"].items()}
        self.written_bytes = 0

    def of(self, instance: str) -> int:
        """What it has written today."""
        self._turn()
        return self._written.get(instance, 0)

    def note(self, instance: str, count: int) -> None:
        """It has written so much more."""
        self._turn()
        self._written[instance] = self._written.get(instance, 0) + count
        self._unsaved += count
        if self._unsaved >= MIB:
            self.save()

    def save(self) -> None:
        """Keep what is known, if there is anything new."""
        if not self._unsaved:
            return
        data = json.dumps({"day": self._day, "written": self._written}).encode()
        part = self._path.with_suffix(".part")
        with contextlib.suppress(OSError):  # a disk that is full: it is known here, and kept later
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self._path)
            self._unsaved = 0
            self.written_bytes += len(data)

    def _turn(self) -> None:
        day = _today()
        if day != self._day:
            self._day, self._written = day, {}


def _today() -> int:
    return int(time.time() // _DAY_S)


_SIZE: Final = 4096

_PLACE: Final = struct.Struct("=QQ")  # bytes, day

_PLACES: Final = _SIZE // _PLACE.size

_COUNT_MAX: Final = 2**48  # more than that nobody writes in a day, whatever stands there

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def day() -> int:
    """Which day it is (UTC), counted from 1970."""
    return int(time.time() // _DAY_S)


class QuotaPage:
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


class QuotaLedger:
    """The supervisor's side of one instance's page: gives out places and carries the sum over to what is kept."""

    def __init__(self, name: str, daily: QuotaStore) -> None:
        self._name = name
        self._daily = daily
        self._free = list(range(1, _PLACES))
        self._tally: QuotaPage | None = None
        self.fd = -1

    def take(self) -> int:
        """A place for a lane more; the page is there while anybody has one."""
        if self._tally is None:
            self.fd = os.memfd_create(f"written-{self._name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, _SIZE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._tally = QuotaPage(self.fd)
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


def open_counter() -> int | None:
    """The kernel's account of this process; None where it keeps none."""
    try:
        return os.open("/proc/self/io", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


class WriteMeter:
    """One lane's part in the share."""

    def __init__(self, fd: int | None, *, most: int, tally: QuotaPage, place: int) -> None:
        """`fd`: from `open_counter`; `most`: bytes in a day, of all lanes together."""
        self._fd, self._most = fd, most
        self._tally, self._place = tally, place
        self._soft, self._hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._day = day()
        self._seen = 0
        self._seen = self._read()
        self._own = 0
        self.today = 0
        self.spent = False
        self.look()

    def _read(self) -> int:
        if self._fd is None:
            return 0
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in os.pread(self._fd, 1024, 0).splitlines():
                if line.startswith(b"wchar:"):
                    return int(line.split()[1])
        return self._seen

    def look(self, *, answered: int = 0) -> bool:
        """Count what was written since the last look, but `answered` bytes, which were an answer and no file.

        Whether it is too much now, and was not before.
        """
        seen, now = self._read(), day()
        if now != self._day:
            self._day, self._own = now, 0
        self._own += seen - self._seen - answered
        self._seen = seen
        self._tally.put(self._place, self._own, now)
        self.today = self._tally.sum(now)
        before, self.spent = self.spent, self.today >= self._most
        if self.spent != before:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0 if self.spent else self._soft, self._hard))
        return self.spent and not before

    def why(self) -> str:
        """That it may write no more, for people."""
        return f"it has written {self.today} bytes today, {self._most} are allowed: no more until 00:00 UTC"
