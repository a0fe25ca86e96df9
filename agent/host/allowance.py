"""So many a minute, saved up for at most a minute: what a lane may log and tell, kept on both sides of its socket."""

import time


class Allowance:
    """So many a minute, saved up for at most a minute."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._left = float(per_minute)
        self._at = time.monotonic()

    def take(self) -> bool:
        """Whether there is one left; takes it."""
        now = time.monotonic()
        self._left = min(self._per_minute, self._left + (now - self._at) * self._per_minute / 60)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
