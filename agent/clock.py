"""Boot clock, boot id, is the clock set; reference time with its floor."""

import contextlib
import ctypes
import time
from functools import cache
from pathlib import Path
from typing import Final

_STA_UNSYNC: Final = 0x0040

_TIME_ERROR: Final = 5


def boot_id() -> str:
    """The kernel's id of this boot."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def boot_clock() -> float:
    """Seconds since boot, suspended time included; it never jumps."""
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
    """Whether the kernel's clock is disciplined by something (adjtimex); None where that cannot be asked."""
    try:
        timex = _Timex()
        answer = int(_libc().adjtimex(ctypes.byref(timex)))
    except (OSError, AttributeError):
        return None
    return None if answer < 0 else answer != _TIME_ERROR and not timex.status & _STA_UNSYNC
