"""What a lane's guest writes to its data in a day: counted, and refused beyond its share.

The kernel counts what this process writes (`/proc/self/io`, opened before the cell was shut); sockets and shared memory
are not in it. Beyond the share no file may grow or be written any more (`RLIMIT_FSIZE`), until the day (UTC) is over.
Only lanes with data have one of these.
"""

import contextlib
import os
import resource
import time
from typing import Final

_DAY_S: Final = 86_400


def open_counter() -> int | None:
    """The kernel's account of this process; None where it keeps none."""
    try:
        return os.open("/proc/self/io", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


class Writes:
    """The share of one lane, of which `before` bytes were written today already."""

    def __init__(self, fd: int | None, *, most: int, before: int) -> None:
        """`fd`: from `open_counter`."""
        self._fd, self._most = fd, most
        self._soft, self._hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._day = int(time.time() // _DAY_S)
        self._seen = 0
        self._seen = self._read()
        self.today = before
        self.total = 0
        self.spent = False
        self._judge()

    def _read(self) -> int:
        if self._fd is None:
            return 0
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in os.pread(self._fd, 1024, 0).splitlines():
                if line.startswith(b"wchar:"):
                    return int(line.split()[1])
        return self._seen

    def forgive(self, count: int) -> None:
        """So much of what was counted was an answer, and no file."""
        self.total -= count
        self.today -= count

    def look(self) -> bool:
        """Count what was written since the last look; whether it is too much now, and was not before."""
        seen = self._read()
        written, self._seen = seen - self._seen, seen
        self.total += written
        day = int(time.time() // _DAY_S)
        if day != self._day:
            self._day, self.today = day, 0
            if self.spent:
                self.spent = False
                resource.setrlimit(resource.RLIMIT_FSIZE, (self._soft, self._hard))
        self.today += written
        return self._judge()

    def _judge(self) -> bool:
        if self.spent or self.today < self._most:
            return False
        self.spent = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, self._hard))
        return True

    def why(self) -> str:
        """That it may write no more, for people."""
        return f"it has written {self.today} bytes today, {self._most} are allowed: no more until 00:00 UTC"
