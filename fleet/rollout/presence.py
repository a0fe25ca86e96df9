"""Presence of devices that reach the server over HTTPS alone: each poll for the assignment is a sign of life.

A device without the broker fetches its assignment and its releases, and signs nothing meanwhile. So its polls admit it
from the catch-up queue, where nobody waits for its word, and never make it a canary or hold up a wave. A device that
hears nothing from the broker polls every 300 s by default, at random between half and one and a half of that.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

POLL_LEAST_S: Final = 600.0
"""Longest pause of an agent with its default settings, 450 s, and a third for slow networks."""

POLL_MOST_S: Final = 3600.0
"""A device that polls more rarely is not present between two polls."""

_JITTER: Final = 3.0
"""Ratio of the longest to the shortest pause of an agent."""


@dataclass(frozen=True, slots=True)
class Polls:
    """Polls of a device that is not connected to the broker. Times are steady.

    Attributes:
        since: the first one of those that followed each other.
        last: the newest one.
        pause_s: between the newest two; 0 where there was one only.
    """

    since: float
    last: float
    pause_s: float = 0.0

    @property
    def until(self) -> float:
        """Return until when the device counts as present: it would have polled again by then."""
        return self.last + max(POLL_LEAST_S, min(POLL_MOST_S, _JITTER * self.pause_s))


def polled(before: Polls | None, now: float) -> Polls:
    """Return the polls of a device after another one."""
    if before is None:
        return Polls(now, now)
    pause_s = now - before.last
    if now > before.until:
        return Polls(now, now, pause_s)  # gone meanwhile, or polls more rarely than was known
    return replace(before, last=now, pause_s=max(pause_s, before.pause_s / _JITTER))


def by_polls(polls: Mapping[str, Polls], connected: Iterable[str], now: float) -> dict[str, Polls]:
    """Return the devices that are present by their polls alone; what is over is left out.

    The broker knows better whether a device is there: the polls of one that is connected count for nothing, also after
    it has gone.
    """
    there = set(connected)
    return {device: each for device, each in polls.items() if now <= each.until and device not in there}
