"""Boot clock, boot id, synchronisation of the system clock, and the reference time with its floor."""

import contextlib
import ctypes
import threading
import time
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Final

_STA_UNSYNC: Final = 0x0040
_TIME_ERROR: Final = 5


def boot_id() -> str:
    """Return the kernel's id of this boot; empty if it cannot be read."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def boot_clock() -> float:
    """Return the seconds since boot, including suspended time; this clock never jumps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class _Timex(ctypes.Structure):
    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def clock_synchronised() -> bool | None:
    """Return whether the kernel's clock is synchronised (adjtimex); None if the kernel does not tell."""
    try:
        timex = _Timex()
        answer = int(_libc().adjtimex(ctypes.byref(timex)))
    except (OSError, AttributeError):
        return None
    return None if answer < 0 else answer != _TIME_ERROR and not timex.status & _STA_UNSYNC


class ReferenceClock:
    """Reference time for certificates, metadata and assignments: the system clock, but never earlier than the floor.

    A device without a battery-backed clock starts in 1970. The floor is the latest time that a signed document has
    proved so far; it only rises. Thread-safe.
    """

    def __init__(self, floor: datetime) -> None:
        self._floor = floor
        self._lock = threading.Lock()

    @property
    def floor(self) -> datetime:
        """Earliest possible current time."""
        return self._floor

    def raise_floor(self, to: datetime) -> None:
        """Raise the floor to a proven time; a time before the floor changes nothing."""
        with self._lock:
            self._floor = max(self._floor, to)

    def now(self) -> datetime:
        """Return the reference time."""
        return max(datetime.now(UTC), self._floor)

    @property
    def behind(self) -> bool:
        """True while the system clock shows a time before the floor."""
        return datetime.now(UTC) < self._floor

    def is_trustworthy(self) -> bool:
        """Return whether the system clock is reliable: not behind the floor, and not known to be unsynchronised."""
        return not self.behind and clock_synchronised() is not False
