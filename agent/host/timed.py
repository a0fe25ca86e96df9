"""Answers of peers, read in time: `http.client` with a limit for the whole of a head and one for each piece of a body.

A socket's time-out alone lets a peer that drips bytes take for ever over a head, a line at a time.
"""

import http.client
import io
import socket
import time
from typing import Any


class _Timed(io.RawIOBase):
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock  # a connection closes its own where the peer will close, the descriptor stays for `_raw`
        self._raw = sock.makefile("rb", buffering=0)
        self._until_s = time.monotonic() + (sock.gettimeout() or 0.0)
        self.each_s: float | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._until_s - time.monotonic() if self.each_s is None else self.each_s
        if left_s <= 0:
            raise TimeoutError("the head takes too long")
        self._sock.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class Response(http.client.HTTPResponse):
    """One whose head has the time that the socket has, all of it."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        """See `http.client.HTTPResponse`."""
        super().__init__(sock, *args, **options)
        self.fp.close()
        self._timed = _Timed(sock)
        self.fp = io.BufferedReader(self._timed)

    def wait(self, each_s: float) -> None:
        """From now on a piece may take so long."""
        self._timed.each_s = each_s


class Connection(http.client.HTTPConnection):
    """A connection whose responses are such."""

    response_class = Response

    def getresponse(self) -> Response:
        """See `http.client.HTTPConnection.getresponse`."""
        found = super().getresponse()
        assert isinstance(found, Response)
        return found
