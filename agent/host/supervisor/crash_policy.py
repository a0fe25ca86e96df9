"""Decide what follows the end of a worker: another one, after a pause, or quarantine.

Pure: no clock, no file, no process. The instance carries the decision out.
"""

from dataclasses import dataclass
from typing import Final

CRASHES_MAX: Final = 5
"""Crashes in a row that are a quarantine: with the pauses below, the last chance comes after about nine seconds."""

MIN_UPTIME_S: Final = 30.0
"""A worker that lived longer has done some work: its end is a first crash again."""

FIRST_PAUSE_S: Final = 0.1
"""Pause after a first crash: clients behind the router wait that long without an error."""

_PAUSE_FACTOR: Final = 4.0

LONGEST_PAUSE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Restart:
    """Start another worker after a pause of `after_s`, to be shortened at random."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Replace:
    """Start another worker likewise; the instance was not at fault, and nothing is counted."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Start no more workers until somebody asks for it."""

    reason: str


class CrashPolicy:
    """Count of crashes in a row of one instance, and the decision that each crash leads to."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def on_exit(self, uptime_s: float, *, at_fault: bool) -> Restart | Replace | Quarantine:
        """Decide about a worker that ended after `uptime_s`; `at_fault`: by its own doing, or for a reason unknown."""
        if not at_fault:
            return Replace(self._pause_s())
        self.count = 1 if uptime_s > MIN_UPTIME_S else self.count + 1
        if self.count >= CRASHES_MAX:
            return Quarantine(f"{self.count} crashes in a row")
        return Restart(self._pause_s())

    def on_steady(self, uptime_s: float) -> bool:
        """Forget the crashes before a worker that has been up for so long. Return whether that changed the count."""
        if not self.count or uptime_s <= MIN_UPTIME_S:
            return False
        self.count = 0
        return True

    def on_start(self, count_remembered: int) -> None:
        """Begin a generation with the crashes that its target had before: one more chance at least."""
        self.count = min(count_remembered, CRASHES_MAX - 1)

    def on_request(self) -> None:
        """Begin anew, because somebody asked for a restart."""
        self.count = 0

    @property
    def is_first(self) -> bool:
        """True if the next worker comes so soon that clients can wait for it."""
        return self.count <= 1

    def _pause_s(self) -> float:
        pause_s: float = FIRST_PAUSE_S * _PAUSE_FACTOR ** (self.count - 1)
        return min(LONGEST_PAUSE_S, pause_s)
