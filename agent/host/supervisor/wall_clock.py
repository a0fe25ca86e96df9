"""Times of day: when a cron line is due next in the device's time zone, and waiting for that over changes of the clock.

Summer time. An hour that the clock skips has no due times, and none are made up for. In an hour that occurs twice, a
line for every hour goes on as ever (`*/10 * * * *` pauses for no hour), and a line that names its hours is due once.

Changes of the clock. A due time is computed again whenever the clock is set, as by NTP or by hand: a timer of the
kernel ends then (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET). Where a clock set forward leaves out at most an hour, the
due time in it is due at once; a clock set back by less than three hours does not run again what has run.
"""

import asyncio
import ctypes
import errno
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

from fleet.protocol.manifest import Cron

_DAY_S: Final = 86_400.0
_LATE_MAX_S: Final = 3600.0
_AGAIN_MAX_S: Final = 3 * 3600.0
"""Bounds of a change of the clock that is taken for a correction; the second is that of Vixie cron."""

_WITHOUT_TIMER_S: Final = 60.0
_HOURS: Final = 24
_TFD_TIMER_ABSTIME: Final = 1
_TFD_TIMER_CANCEL_ON_SET: Final = 2

Offset = Callable[[float], int]
"""Seconds east of UTC of the device's time zone, by unix time."""


def local_offset(at: float) -> int:
    """Return the offset of the device's time zone."""
    return time.localtime(at).tm_gmtoff


def next_due(cron: Cron, after: float, offset: Offset = local_offset) -> float:
    """Return the first time after `after` at which a cron line is due, in unix seconds.

    Args:
        cron: a line that matches some time (`manifest.check`).
        after: unix seconds.
        offset: of the time zone.
    """
    start = after
    while True:
        east = offset(start)
        coming = cron.next_after(_naive(start, east))
        assert coming is not None, "checked when it was read"
        due = (coming - timedelta(seconds=east)).replace(tzinfo=UTC).timestamp()
        change = _first_change(start, due, offset)
        if change is not None:
            start = change - 1  # from the new offset's first minute on, which is looked for after the second before
            east = offset(change)
            coming = cron.next_after(_naive(change, east) - timedelta(seconds=1))
            assert coming is not None, "the same line"
            due = (coming - timedelta(seconds=east)).replace(tzinfo=UTC).timestamp()
            if _first_change(change, due, offset) is not None:
                start = change
                continue
        if len(cron.hours) < _HOURS and _is_second(due, offset):
            start = due
            continue
        return due


def _naive(at: float, east: int) -> datetime:
    return datetime.fromtimestamp(at + east, UTC).replace(tzinfo=None)


def _first_change(start: float, end: float, offset: Offset) -> float | None:
    """Return the first second after `start`, up to `end`, with another offset; None for none."""
    before, low = offset(start), start
    while low < end:
        high = min(end, low + _DAY_S)
        if offset(high) != before:
            first, last = int(low), int(high) + (high > int(high))
            while last - first > 1:
                middle = (first + last) // 2
                first, last = (middle, last) if offset(middle) == before else (first, middle)
            return float(last)
        low = high
    return None


def _is_second(at: float, offset: Offset) -> bool:
    """Return whether the clock has shown this time of day before, a moment ago: summer time has ended meanwhile."""
    back = offset(at - _AGAIN_MAX_S) - offset(at)
    return back > 0 and offset(at - back) - offset(at) == back


class WallClock(Protocol):
    """The system's clock, and waiting for a time that it shows."""

    def now(self) -> float:
        """Return the time in unix seconds."""

    async def reach(self, at: float) -> None:
        """Return once the clock shows `at`, or when it was set, whichever is first."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


_libc = ctypes.CDLL(None, use_errno=True)


class SystemClock:
    """The kernel's clock, with a timer that ends when the clock is set."""

    def now(self) -> float:
        """Return the time in unix seconds."""
        return time.time()

    async def reach(self, at: float) -> None:
        """Return once the clock shows `at`, or when it was set, whichever is first; sooner without a timer."""
        try:
            fd = _check(_libc.timerfd_create(time.CLOCK_REALTIME, os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError:  # out of descriptors, for now
            await asyncio.sleep(min(_WITHOUT_TIMER_S, max(0.0, at - self.now())))
            return
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        try:
            spec = _Itimerspec(_Timespec(0, 0), _Timespec(max(1, int(at)), int(at % 1 * 1e9)))
            flags = _TFD_TIMER_ABSTIME | _TFD_TIMER_CANCEL_ON_SET
            _check(_libc.timerfd_settime(fd, flags, ctypes.byref(spec), None))
            loop.add_reader(fd, _set, ended)
            await ended
        finally:
            loop.remove_reader(fd)
            os.close(fd)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        if number != errno.ECANCELED:  # the clock was set between two calls: the timer is armed
            raise OSError(number, f"timerfd: {os.strerror(number)}")
    return result


SYSTEM_CLOCK: Final = SystemClock()


class CronTimer:
    """Timer of a cron line."""

    def __init__(self, cron: Cron, clock: WallClock = SYSTEM_CLOCK, offset: Offset = local_offset) -> None:
        self._cron = cron
        self._clock = clock
        self._offset = offset
        self._last = float("-inf")

    async def next(self) -> float:
        """Wait until the line is due; return that time in unix seconds."""
        while True:
            now = self._clock.now()
            is_again = 0 <= self._last - now < _AGAIN_MAX_S  # the clock was set back a little
            due = next_due(self._cron, self._last if is_again else now, self._offset)
            while (left := due - self._clock.now()) > 0:
                before = self._clock.now()
                await self._clock.reach(due)
                if self._clock.now() < before:
                    break  # set back: computed again
            else:
                if -left <= _LATE_MAX_S:
                    self._last = due
                    return due
