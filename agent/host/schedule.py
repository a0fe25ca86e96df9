"""When a scheduled task is due: `every_ms` after the last start, or by a cron line in the board's own time zone.

Cron has five fields (minute, hour, day of month, month, day of week) of `*`, numbers, lists, ranges and steps; 7 is
Sunday too. As POSIX says, when both days are restricted, either suffices. A time that the clock skips is not made up,
and a time that comes twice is run once.
"""

import asyncio
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from fleet.protocol.manifest import Schedule

MIN_EVERY_MS: Final = 100
_LOOK_MINUTES: Final = 366 * 24 * 60 * 5
_LONGEST_SLEEP_S: Final = 60.0
_FIELDS: Final = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
_SUNDAY: Final = 7


class BadCronError(ValueError):
    """Not a cron line; the message names the field."""


@dataclass(frozen=True, slots=True)
class Cron:
    """A cron line, read."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    any_day: bool
    any_weekday: bool

    @classmethod
    def parse(cls, line: str) -> "Cron":
        """Read a line of five fields; raises `BadCronError`."""
        parts = line.split()
        if len(parts) != len(_FIELDS):
            raise BadCronError(f"cron {line!r} has {len(parts)} fields, five are needed")
        minutes, hours, days, months, weekdays = (
            _field(part, low, high) for part, (low, high) in zip(parts, _FIELDS, strict=True)
        )
        weekdays = frozenset(day % _SUNDAY for day in weekdays)
        return cls(minutes, hours, days, months, weekdays, parts[2].startswith("*"), parts[4].startswith("*"))

    def _on(self, day: datetime) -> bool:
        in_month, in_week = day.day in self.days, day.isoweekday() % _SUNDAY in self.weekdays
        if self.any_day or self.any_weekday:
            return in_month and in_week
        return in_month or in_week

    def after(self, moment: datetime) -> datetime:
        """The first minute after `moment` (naive local time) that matches.

        Raises:
            BadCronError: none within five years (a 30th of February).
        """
        at = moment.replace(second=0, microsecond=0) + timedelta(minutes=1)
        end = at + timedelta(minutes=_LOOK_MINUTES)
        while at < end:
            if at.month not in self.months or not self._on(at):
                at = (at + timedelta(days=1)).replace(hour=0, minute=0)
            elif at.hour not in self.hours:
                at = (at + timedelta(hours=1)).replace(minute=0)
            elif at.minute not in self.minutes:
                at += timedelta(minutes=1)
            else:
                return at
        raise BadCronError("this cron line never comes due")


def _field(text: str, low: int, high: int) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        span, _, step_text = part.partition("/")
        first, dash, last = span.partition("-")
        try:
            step = int(step_text) if step_text else 1
            start = low if span == "*" else int(first)
            stop = high if span == "*" or (step_text and not dash) else int(last) if dash else start
        except ValueError as error:
            raise BadCronError(f"cron field {part!r} is not *, a number, a range or a step") from error
        if step < 1 or not low <= start <= stop <= high:
            raise BadCronError(f"cron field {part!r} is outside {low}-{high}")
        found.update(range(start, stop + 1, step))
    return frozenset(found)


class Clock:
    """Waits for the next time a schedule is due."""

    def __init__(self, schedule: Schedule) -> None:
        """Raises `BadCronError` for a cron line that is none."""
        self._cron = None if schedule.cron is None else Cron.parse(schedule.cron)
        self._every_s = max(schedule.every_ms or 60_000, MIN_EVERY_MS) / 1000
        self._next_s = time.monotonic() + self._every_s

    async def next(self) -> int:
        """Wait until it is due; when it was due, in milliseconds since 1970 (UTC)."""
        if self._cron is None:
            await asyncio.sleep(self._next_s - time.monotonic())
            late_s = time.monotonic() - self._next_s
            self._next_s = max(self._next_s, time.monotonic() - self._every_s) + self._every_s
            return int((time.time() - max(0.0, late_s)) * 1000)
        due = self._cron.after(datetime.now()).timestamp()  # noqa: DTZ005 - the board's own zone is meant
        # In short sleeps, since the clock may be set meanwhile.
        while (left_s := due - time.time()) > 0:  # noqa: ASYNC110 - what is waited for is the clock
            await asyncio.sleep(min(left_s, _LONGEST_SLEEP_S))
        return int(due * 1000)
