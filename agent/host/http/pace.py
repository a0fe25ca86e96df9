"""Minimum rate of clients: how slowly one may send a request or read an answer before its connection ends.

The rate is an average over windows in which the host waited for nobody but the client, so one that is silent for a
moment loses nothing, and one that sends a byte now and then does not keep its connection by that. Sockets are looked
at now and then, not at each byte.
"""

import contextlib
import socket
import struct
from typing import Final

MIN_BYTES_PER_S: Final = 500
"""As in Apache's mod_reqtimeout; a link of 64 kbit/s carries sixteen times as much."""

WINDOW_S: Final = 30

_TCP_INFO_BYTES: Final = 128
_BYTES_ACKED: Final = struct.Struct("=Q")
_BYTES_ACKED_AT: Final = 120


class Pace:
    """Pace of a client in one direction."""

    __slots__ = ("_moved", "_since_s", "_turn")

    def __init__(self) -> None:
        self._turn: int | None = None
        self._since_s = 0.0
        self._moved = 0

    def is_slow(self, now_s: float, moved: int, turn: int | None) -> bool:
        """Return whether too little has moved in the window that ends now.

        Args:
            now_s: of a clock that stands still while the host does not attend to its clients.
            moved: bytes so far, on this connection.
            turn: number of what the client is waited for; None if the host waits for nothing of it. Each begins a
                window.
        """
        if turn is None or turn != self._turn:
            self._turn, self._since_s, self._moved = turn, now_s, moved
            return False
        passed_s = now_s - self._since_s
        if passed_s < WINDOW_S:
            return False
        is_slow = moved - self._moved < MIN_BYTES_PER_S * passed_s
        self._since_s, self._moved = now_s, moved
        return is_slow


def acknowledged(sock: socket.socket) -> int:
    """Return how many bytes the other end's kernel has taken; 0 where this one does not know.

    A kernel's buffer takes more only in large steps, which may be further apart than a window for a slow link.
    """
    if sock.family == socket.AF_UNIX:
        return 0
    with contextlib.suppress(OSError):
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        if len(info) == _TCP_INFO_BYTES:
            count: int = _BYTES_ACKED.unpack_from(info, _BYTES_ACKED_AT)[0]
            return count
    return 0
