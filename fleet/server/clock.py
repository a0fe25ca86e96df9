"""Clock of the server: the system clock as far as it can be believed, and a clock that never jumps.

Certificates, metadata, tokens and the deletion of old reports depend on the time, and a wrong reading does harm that
lasts: a clock that was three years ahead for 15 seconds deleted every report and made certificates valid from 2028.
The server therefore keeps a witness, a time that it knows to be past, in its database. While the server runs the
witness moves on with the monotonic clock. A system clock that is far ahead of the witness, or behind it, has jumped:
the server then goes on from the witness (`ServerClock.now`), names the jump in the status, and returns to the system
clock as soon as it agrees again. A clock that stays where it jumped to is believed after a while, or at once with
`fleet serve --trust-clock`.

    offset of the system clock from the witness    believed    becomes the witness after
    up to 5 minutes                                at once     at once
    1 day behind to 90 days ahead                  at once     1 hour (a server that was switched off)
    anything else                                  no          24 hours

What is deleted is judged by the earlier of the two clocks (`ServerClock.earliest`). Durations (soak, time-outs, retry)
run on `ServerClock.monotonic`.
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

log = logging.getLogger(__name__)
AHEAD_MAX: Final = timedelta(days=90)
"""No certificate of a server or device lives longer: a server that was off for more has to be looked after anyway."""

BEHIND_MAX: Final = timedelta(days=1)
SMALL: Final = timedelta(minutes=5)
"""Corrections by NTP, drift, and the granularity of what is stored."""

SETTLE: Final = timedelta(hours=1)
SETTLE_JUMP: Final = timedelta(hours=24)
_TRUST: Final = "set the clock; if it is right, restart the server with 'fleet serve --trust-clock'"


def system_clock() -> datetime:
    """Return the system's time, UTC."""
    return datetime.now(UTC)


def boot_clock() -> float:
    """Return the seconds since boot, suspended time included; this clock never jumps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class ServerClock:
    """Time of a server. Every method may be called at any time, from one thread.

    Args:
        system: the system's time, UTC.
        monotonic: seconds that only grow, at the pace of time.
    """

    def __init__(
        self, system: Callable[[], datetime] = system_clock, monotonic: Callable[[], float] = boot_clock
    ) -> None:
        self._system, self._monotonic = system, monotonic
        self._witness, self._since = system(), monotonic()
        self._offset, self._offset_since = timedelta(0), self._since

    @classmethod
    def of(cls, system: Callable[[], datetime]) -> "ServerClock":
        """Make a clock whose time passes as `system` says: nothing is a jump."""
        return cls(system, lambda: system().timestamp())

    def start_from(self, witness: datetime) -> None:
        """Take a time that is known to be past, from before this process started."""
        self._witness, self._since = witness, self._monotonic()
        self._offset, self._offset_since = self._ahead, self._since

    def now(self) -> datetime:
        """Return the time, UTC: the system clock's, or the witness's while the system clock has jumped."""
        system, expected = self._system(), self.expected
        return system if -BEHIND_MAX <= system - expected <= AHEAD_MAX else expected

    def monotonic(self) -> float:
        """Return seconds that only grow, for durations; they begin anew when the machine starts."""
        return self._monotonic()

    @property
    def expected(self) -> datetime:
        """Time of the witness, moved on with the monotonic clock."""
        return self._witness + timedelta(seconds=self._monotonic() - self._since)

    @property
    def jumped(self) -> bool:
        """Tell whether the system clock cannot be believed now."""
        return not -BEHIND_MAX <= self._ahead <= AHEAD_MAX

    @property
    def earliest(self) -> datetime:
        """Earliest time that it can be now, for what cannot be undone."""
        return min(self._system(), self.expected)

    @property
    def latest(self) -> datetime:
        """Latest time that it can be now."""
        return max(self._system(), self.expected)

    @property
    def _ahead(self) -> timedelta:
        return self._system() - self.expected

    def settle(self) -> datetime:
        """Make the system clock the witness where it has been believable for long enough; the witness, to be stored.

        Called in each round of housekeeping: an offset counts as steady when two rounds see the same.
        """
        ahead, monotonic = self._ahead, self._monotonic()
        if abs(ahead - self._offset) > SMALL:
            self._offset, self._offset_since = ahead, monotonic
            if self.jumped:
                log.error("%s", self._sentence())
        steady_for = timedelta(seconds=monotonic - self._offset_since)
        if abs(ahead) <= SMALL:
            self.trust()
        elif steady_for >= (SETTLE_JUMP if self.jumped else SETTLE):
            log.warning("the clock is believed: it has shown the same time for %s", steady_for)
            self.trust()
        return self.expected

    def trust(self) -> None:
        """Believe the system clock as it is."""
        self._witness, self._since = self._system(), self._monotonic()
        self._offset, self._offset_since = timedelta(0), self._since

    def problems(self) -> list[str]:
        """Return sentences for the status: the clock has jumped."""
        return [self._sentence()] if self.jumped else []

    def _sentence(self) -> str:
        system, expected = self._system(), self.expected
        way = "ahead of" if system > expected else "behind"
        days = abs(system - expected).days
        return (
            f"the clock of this machine says {system:%Y-%m-%d}, {days} days {way} the time that the server knows of: "
            f"it goes on from {expected:%Y-%m-%d %H:%M} UTC; {_TRUST}"
        )
