"""What a lane's guest writes to its data in a day: counted, and refused beyond the share of its instance.

The kernel counts what this process writes (`/proc/self/io`, opened before the cell was shut); sockets and shared memory
are not in it. The count goes into a page that all lanes of the instance see (`agent.host.tally`). Beyond the share no
file may grow or be written any more (`RLIMIT_FSIZE`), until the day (UTC) is over. Only lanes with data have one of
these.
"""

import contextlib
import os
import resource

from agent.host.tally import Tally, day


def open_counter() -> int | None:
    """The kernel's account of this process; None where it keeps none."""
    try:
        return os.open("/proc/self/io", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


class Writes:
    """One lane's part in the share."""

    def __init__(self, fd: int | None, *, most: int, tally: Tally, place: int) -> None:
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
