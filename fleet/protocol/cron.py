"""Cron lines of five fields, as POSIX crontab(5) has them: read once, then asked for the next minute that fits.

Fields: minute 0-59, hour 0-23, day of month 1-31, month 1-12, day of week 0-7 (0 and 7 are Sunday). A field is `*`, a
number, a range `a-b`, a step `*/n` or `a-b/n`, or several of these with commas. When both days are restricted, either
fits. Times here are naive: wall-clock times of the board's zone; the caller knows the zone.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

_FIELDS: Final = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 7))
_SEARCH: Final = timedelta(days=366 * 8 + 2)
_SUNDAY_TOO: Final = 7
_TEXT_MAX: Final = 200


class BadCronError(ValueError):
    """Not a cron line; the message names the field."""


@dataclass(frozen=True, slots=True)
class Cron:
    """The minutes, hours, days, months and weekdays (0 is Sunday) that fit."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either_day: bool

    def next_after(self, moment: datetime) -> datetime | None:
        """The first full minute after `moment` that fits; None for a line that never does, such as 30 February."""
        at = moment.replace(second=0, microsecond=0) + timedelta(minutes=1)
        end = at + _SEARCH
        while at < end:
            if at.month not in self.months or not self._day_fits(at):
                at = at.replace(hour=0, minute=0) + timedelta(days=1)
            elif at.hour not in self.hours:
                at = at.replace(minute=0) + timedelta(hours=1)
            elif at.minute not in self.minutes:
                at += timedelta(minutes=1)
            else:
                return at
        return None

    def _day_fits(self, at: datetime) -> bool:
        day, weekday = at.day in self.days, at.isoweekday() % 7 in self.weekdays
        return day or weekday if self.either_day else day and weekday


def parse(text: str) -> Cron:
    """Read a cron line; raises `BadCronError`."""
    words = text.split()
    if len(words) != len(_FIELDS) or len(text) > _TEXT_MAX:
        raise BadCronError(f"{text[:80]!r} has {len(words)} fields, wanted are minute, hour, day, month, day of week")
    values = [_field(word, *field) for word, field in zip(words, _FIELDS, strict=True)]
    weekdays = frozenset(day % _SUNDAY_TOO for day in values[4])
    either = not words[2].startswith("*") and not words[4].startswith("*")
    return Cron(values[0], values[1], values[2], values[3], weekdays, either)


def check(text: str) -> str:
    """`text`, if it is a cron line whose time comes; raises `BadCronError`."""
    if parse(text).next_after(datetime(2000, 1, 1)) is None:  # noqa: DTZ001 - naive on purpose, see above
        raise BadCronError(f"{text!r} never comes: there is no such day")
    return text


def _field(word: str, what: str, least: int, most: int) -> frozenset[int]:
    found: set[int] = set()
    for part in word.split(","):
        span, slash, step = part.partition("/")
        first, dash, last = span.partition("-")
        numbers = [first, *([last] if dash else []), *([step] if slash else [])]
        if span == "*":
            numbers = [step] if slash else []
            start, end = least, most
        else:
            start, end = (int(first or -1), int(last or -1)) if _digits(first, last or first) else (-1, -1)
            end = end if dash else (most if slash else start)
        if not _digits(*numbers) or not least <= start <= end <= most or (slash and not int(step)):
            raise BadCronError(f"{word[:40]!r} is no {what}: {least} to {most}, as *, 5, 1-5, */10 or 1,15")
        found.update(range(start, end + 1, int(step) if slash else 1))
    return frozenset(found)


def _digits(*words: str) -> bool:
    return all(word.isascii() and word.isdigit() and len(word) < 4 for word in words)  # noqa: PLR2004
