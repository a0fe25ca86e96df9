"""Memory that clients of a broker may take by not reading: for each of them, and in all.

Counted are messages that wait for a client: for its connection, for its acknowledgement, or for its return. What is
over is not queued. Nothing is lost by that: assignments are retained, and devices keep reports until they are
acknowledged.
"""

from collections import Counter
from typing import Final, NamedTuple

from fleet.protocol import bounds

MESSAGE_BYTES: Final = 2048
"""Taken by a message beside its payload: task, coroutines, topic, packet."""


class Allowance(NamedTuple):
    """Bounds of what waits: bytes and messages of one client, and bytes in all."""

    client_bytes: int
    client_messages: int
    total_bytes: int


class Waiting:
    """Messages that wait for clients. All methods run on the loop.

    Attributes:
        total: bytes that wait.
        away: those of them that are kept for clients that are not connected.
        dropped: messages that were not queued, by client.
    """

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._bytes: Counter[str] = Counter()
        self._messages: Counter[str] = Counter()
        self.total = self.away = 0
        self.dropped: Counter[str] = Counter()

    @property
    def full(self) -> bool:
        """Tell whether clients may add nothing now: the largest message would be dropped.

        What is kept for clients that are away does not count: it may stay for days, and gives way (`lacks_room`).
        """
        return self.total - self.away + MESSAGE_BYTES + bounds.DESIRED_MAX_BYTES > self._allowance.total_bytes

    def lacks_room(self, payload: int) -> bool:
        """Tell whether a message for a present client finds no room for what is kept for clients that are away."""
        size = payload + MESSAGE_BYTES
        return bool(self.away) and self.total - self.away + size <= self._allowance.total_bytes < self.total + size

    def take(self, client: str, payload: int, *, away: bool = False) -> bool:
        """Count a message that waits for a client, which may be away; false when it may not."""
        size = payload + MESSAGE_BYTES
        allowed = (
            self._bytes[client] + size <= self._allowance.client_bytes
            and self._messages[client] < self._allowance.client_messages
            and self.total + size <= self._allowance.total_bytes
        )
        if not allowed:
            self.dropped[client] += 1
            return False
        self._bytes[client] += size
        self._messages[client] += 1
        self.total += size
        self.away += size if away else 0
        return True

    def give(self, client: str, payload: int, *, away: bool = False) -> None:
        """Count a message no more."""
        size = payload + MESSAGE_BYTES
        self.total -= size
        self.away -= size if away else 0
        self._bytes[client] -= size
        self._messages[client] -= 1
        if not self._messages[client]:
            del self._bytes[client], self._messages[client]
            self.dropped.pop(client, None)
