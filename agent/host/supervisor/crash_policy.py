"""Crash policy: decides whether a worker that ended is restarted after a pause, or the instance is quarantined.

Pure: no clock, no file, no process. The instance carries out the decision.
"""

from dataclasses import dataclass
from typing import Final

CRASHES_MAX: Final = 5
"""Consecutive crashes that lead to quarantine: with the pauses below, the last restart follows after about nine s."""

MIN_UPTIME_S: Final = 30.0
"""Uptime after which a worker counts as stable: its next crash is a first one again."""

FIRST_PAUSE_S: Final = 0.1
"""Pause after a first crash: clients behind the router wait for it without an error."""

_PAUSE_FACTOR: Final = 4.0

LONGEST_PAUSE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Restart:
    """Restart after a pause of `after_s`, to be shortened randomly."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Replace:
    """Restart likewise, without counting a crash: the instance was not at fault."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Start no worker until a restart is requested."""

    reason: str


class CrashPolicy:
    """Counter of an instance's consecutive crashes, and decision after each crash."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def on_exit(self, uptime_s: float, *, at_fault: bool) -> Restart | Replace | Quarantine:
        """Decide after a worker ended with `uptime_s`; `at_fault`: through its own fault, or for an unknown reason."""
        if not at_fault:
            return Replace(self._pause_s())
        self.count = 1 if uptime_s > MIN_UPTIME_S else self.count + 1
        if self.count >= CRASHES_MAX:
            return Quarantine(f"{self.count} crashes in a row")
        return Restart(self._pause_s())

    def on_steady(self, uptime_s: float) -> bool:
        """Reset the counter once a worker has been up for long enough; return whether the counter changed."""
        if not self.count or uptime_s <= MIN_UPTIME_S:
            return False
        self.count = 0
        return True

    def on_start(self, count_remembered: int) -> None:
        """Begin a generation with the remembered crashes of its target, leaving at least one restart."""
        self.count = min(count_remembered, CRASHES_MAX - 1)

    def on_request(self) -> None:
        """Reset the counter for a requested restart."""
        self.count = 0

    @property
    def is_first(self) -> bool:
        """True if the next worker starts soon enough for clients to wait."""
        return self.count <= 1

    def _pause_s(self) -> float:
        pause_s: float = FIRST_PAUSE_S * _PAUSE_FACTOR ** (self.count - 1)
        return min(LONGEST_PAUSE_S, pause_s)
