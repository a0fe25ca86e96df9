"""Daily write quota: bytes that an instance has written to its data today (UTC), across restarts of workers and host.

`QuotaStore` saves the sums to a file, but not often: a killed host loses at most a mebibyte for each instance.
`QuotaPage` is a page of shared memory for all workers of an instance. Each worker writes only its own place; the sum of
the places is the instance's, so that all workers of all generations share a single quota. The first place is the
supervisor's: bytes written before, and by workers that have ended. Places of another day are ignored.

A compromised worker can write anywhere in it. So a second page, which no worker has, holds what the key-value store
counts, and the supervisor puts the first one right where its sum has fallen below what was known.

`WriteMeter` is the worker's side. The kernel counts what the process writes (`/proc/self/io`, opened before the sandbox
is closed); sockets and shared memory are not included. Beyond the quota, files can neither grow nor be written
(`RLIMIT_FSIZE`) until the day is over. Only workers with data have a meter.
"""

import contextlib
import json
import mmap
import os
import resource
import struct
import time
from pathlib import Path
from typing import Final

from agent import disk
from agent.disk import Write
from agent.host.ipc.framing import sealed_memfd
from fleet.protocol import files
from fleet.protocol.bounds import MIB

DAY_S: Final = 86_400


class QuotaStore:
    """Store of the bytes written today, by instance."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._day = day()
        self._written: dict[str, int] = {}
        self._unsaved = 0
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
            kept = json.loads(files.read_text(path))
            if int(kept["day"]) == self._day:
                self._written = {str(name): int(count) for name, count in kept["written"].items()}
        self.written_bytes = 0

    def bytes_today(self, instance: str) -> int:
        """Return the bytes that an instance has written today."""
        self._turn()
        return self._written.get(instance, 0)

    def add(self, instance: str, count: int) -> None:
        """Add bytes that an instance has written, and save after each new mebibyte."""
        self._turn()
        self._written[instance] = self._written.get(instance, 0) + count
        self._unsaved += count
        if self._unsaved >= MIB:
            self.save()

    def save(self) -> None:
        """Write the file if a sum has changed."""
        if not self._unsaved:
            return
        data = json.dumps({"day": self._day, "written": self._written}).encode()
        with contextlib.suppress(OSError):  # a full disk: the sum stays in memory, and is saved later
            disk.write(Write.QUOTA, self._path, data, mode=0o600)
            self._unsaved = 0
            self.written_bytes += len(data)

    def _turn(self) -> None:
        today = day()
        if today != self._day:
            self._day, self._written = today, {}


_SIZE: Final = 4096
_PLACE: Final = struct.Struct("=QQ")  # bytes, day
_PLACES: Final = _SIZE // _PLACE.size
_COUNT_MAX: Final = 2**48  # more than any disk can write in a day; limits what a compromised worker can claim


def day() -> int:
    """Return the current day (UTC), counted from 1970."""
    return int(time.time() // DAY_S)


class QuotaPage:
    """Mapped quota page of an instance."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, _SIZE)

    def sum(self, of_day: int) -> int:
        """Return the sum of all places for a day."""
        return sum(min(count, _COUNT_MAX) for count, on in _PLACE.iter_unpack(self._map) if on == of_day)

    def at(self, place: int, of_day: int) -> int:
        """Return the bytes in a place for a day; 0 if the place is of another day."""
        count, on = _PLACE.unpack_from(self._map, place * _PLACE.size)
        return min(count, _COUNT_MAX) if on == of_day else 0

    def put(self, place: int, count: int, of_day: int) -> None:
        """Set a place."""
        _PLACE.pack_into(self._map, place * _PLACE.size, max(0, count), of_day)

    def close(self) -> None:
        """Unmap the page."""
        self._map.close()


class QuotaLedger:
    """Supervisor's side of an instance's page: allocates places, and adds new bytes to the store."""

    def __init__(self, name: str, daily: QuotaStore) -> None:
        self._name = name
        self._daily = daily
        self._free = list(range(1, _PLACES))
        self._pages: tuple[QuotaPage, ...] = ()
        self.fds: tuple[int, ...] = ()

    @property
    def fd(self) -> int:
        """Descriptor of the page that workers share; -1 without one."""
        return self.fds[0] if self.fds else -1

    def take(self) -> int:
        """Allocate a place for a worker; the pages exist while a place is allocated."""
        if not self._pages:
            self.fds = tuple(sealed_memfd(f"written-{self._name}", _SIZE) for _ in range(2))
            self._pages = tuple(map(QuotaPage, self.fds))
            for page in self._pages:
                page.put(0, self._daily.bytes_today(self._name), day())
        return self._free.pop(0)

    def give_back(self, place: int) -> None:
        """Release the place of a worker that has ended; its bytes stay counted."""
        if self._pages:
            today = day()
            count = max(page.at(place, today) for page in self._pages)
            for page in self._pages:
                page.put(0, page.at(0, today) + count, today)
                page.put(place, 0, 0)
            self.bytes_today()
        self._free.append(place)
        if self._pages and len(self._free) == _PLACES - 1:
            for page in self._pages:
                page.close()
            for fd in self.fds:
                os.close(fd)
            self._pages, self.fds = (), ()

    def bytes_today(self) -> int:
        """Return the bytes that the instance has written today, after adding new ones to the store.

        A sum that has fallen was written by a compromised worker: it is put right, so that what is known stays counted.
        """
        known, today = self._daily.bytes_today(self._name), day()
        for page in self._pages:
            if (lost := known - page.sum(today)) > 0 and page is self._pages[0]:
                page.put(0, page.at(0, today) + lost, today)
        total = max((page.sum(today) for page in self._pages), default=known)
        if total > known:
            self._daily.add(self._name, total - known)
        return max(total, known)


def open_counter() -> int | None:
    """Open the kernel's counter of bytes written by this process; None without one."""
    try:
        return os.open("/proc/self/io", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def read_counter(fd: int) -> int | None:
    """Return the bytes that this process has written, from `open_counter`; None where that cannot be read."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in os.pread(fd, 1024, 0).splitlines():
            if line.startswith(b"wchar:"):
                return int(line.split()[1])
    return None


class WriteMeter:
    """Worker's side: counts the bytes that the process writes, and stops writing at the quota."""

    def __init__(self, fd: int | None, *, most: int, tally: QuotaPage, place: int) -> None:
        """Meter this process.

        Args:
            fd: from `open_counter`.
            most: daily quota in bytes, of all workers together.
            tally: the instance's quota page.
            place: of this worker in the page.
        """
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
        found = read_counter(self._fd)
        return self._seen if found is None else found

    def look(self, *, answered: int = 0) -> bool:
        """Count the bytes written since the last call, except `answered` bytes, which went to a client or a device.

        Returns:
            True if the quota was reached since the last call.
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
        """Return why no more may be written, for people."""
        used = f"it has written {self.today} bytes today, {self._most} are allowed (limits.daily_written)"
        return f"{used}: no more until 00:00 UTC"
