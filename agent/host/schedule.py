"""When a scheduled task is due: `every_ms` after the last start, or by a cron line in the board's own time zone.

A time that the clock skips is not made up, and a time that comes twice is run once.
"""

import asyncio
import time
from datetime import datetime
from typing import Final

from fleet.protocol import cron
from fleet.protocol.manifest import Schedule

MIN_EVERY_MS: Final = 100
_LONGEST_SLEEP_S: Final = 60.0


class Clock:
    """Waits for the next time a schedule is due."""

    def __init__(self, schedule: Schedule) -> None:
        """Raises `cron.BadCronError` for a cron line that is none, or never comes due."""
        self._cron = None if schedule.cron is None else cron.parse(cron.check(schedule.cron))
        self._every_s = max(schedule.every_ms or 60_000, MIN_EVERY_MS) / 1000
        self._next_s = time.monotonic() + self._every_s

    async def next(self) -> int:
        """Wait until it is due; when it was due, in milliseconds since 1970 (UTC)."""
        if self._cron is None:
            await asyncio.sleep(self._next_s - time.monotonic())
            late_s = time.monotonic() - self._next_s
            self._next_s = max(self._next_s, time.monotonic() - self._every_s) + self._every_s
            return int((time.time() - max(0.0, late_s)) * 1000)
        coming = self._cron.next_after(datetime.now())  # noqa: DTZ005 - the board's own zone is meant
        assert coming is not None, "checked when it was read"
        due = coming.timestamp()
        # In short sleeps, since the clock may be set meanwhile.
        while (left_s := due - time.time()) > 0:  # noqa: ASYNC110 - what is waited for is the clock
            await asyncio.sleep(min(left_s, _LONGEST_SLEEP_S))
        return int(due * 1000)
