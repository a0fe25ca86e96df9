"""Requests for evidence: the signed command `check-in`, after which a device signs again how each instance stands.

Unsigned messages (hello, health, presence) decide nothing; they make the server ask here. A device is asked again only
after a while, which doubles until it has answered by a signed report: an agent of an earlier version never does.
"""

import time
from collections.abc import Callable
from typing import Final

from fleet.protocol.assignment import CheckIn
from fleet.server.director import Director

ASK_FIRST_S: Final = 60.0
"""Health comes about as often, so that each health of a device can lead to at most one request."""

ASK_MAX_S: Final = 3600.0
DEVICES_MAX: Final = 10_000


class CheckIns:
    """Asks devices for their signed state.

    Args:
        director: signs and sends the command.
        clock: seconds that do not jump.
    """

    def __init__(self, director: Director, clock: Callable[[], float] = time.monotonic) -> None:
        self._director, self._clock = director, clock
        self._asked: dict[str, tuple[float, float]] = {}

    def ask(self, device: str) -> bool:
        """Ask a device for its state; false where that was done a moment ago."""
        now = self._clock()
        due, delay_s = self._asked.get(device, (now, ASK_FIRST_S))
        if now < due:
            return False
        if len(self._asked) >= DEVICES_MAX:
            self._asked.clear()
        self._asked[device] = now + delay_s, min(ASK_MAX_S, 2 * delay_s)
        self._director.command(device, CheckIn())
        return True

    def answered(self, device: str) -> None:
        """Note a signed report that says how an instance stands: the next wait is short again."""
        due, _ = self._asked.get(device, (0.0, 0.0))
        if due:
            self._asked[device] = min(due, self._clock() + ASK_FIRST_S), ASK_FIRST_S
