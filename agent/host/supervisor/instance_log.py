"""Log of an instance: its latest lines."""

from collections import deque
from typing import Final

from agent.host.ipc.host_api import plain
from fleet.protocol import bounds

_LINE_MAX_CHARS: Final = 1100


class InstanceLog:
    """Ring buffer of an instance's latest lines; `count` of all lines since the start."""

    def __init__(self) -> None:
        self._log: deque[str] = deque(maxlen=bounds.LOG_LINES)
        self.count = 0

    def note(self, text: str) -> None:
        """Add a line."""
        self._log.append(plain(text, _LINE_MAX_CHARS).replace("\n", " "))
        self.count += 1

    def lines(self) -> tuple[str, ...]:
        """Return the last lines, oldest first, within the cap on bytes."""
        kept: list[str] = []
        size = 0
        for line in reversed(self._log):
            size += len(line.encode()) + 1
            if size > bounds.LOG_MAX_BYTES:
                break
            kept.append(line)
        return tuple(reversed(kept))
