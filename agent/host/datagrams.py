"""Datagrams of guests, in the egress: between a UDP socket that leads to one peer, and one end of a pair of sockets.

Whoever holds a UDP socket can send anywhere with it, so no worker ever gets one. Datagrams are dropped, as networks do,
where a guest does not read them, and beyond `PER_S` each way.
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable
from typing import Final

from agent.host.ipc.helper_api import BROKEN, DATAGRAM, DATAGRAM_MAX_BYTES, RefusedError

PER_S: Final = 1000
"""Datagrams of one socket in a second, each way."""

_RELAYS_MAX: Final = 256
"""Sockets of all instances at once: each takes two descriptors of this process."""

OF_INSTANCE: Final = 64
"""Sockets of one instance at once. Its workers keep to fewer each, unless a guest has taken one over."""

_TURN: Final = 16
"""Datagrams that are passed on before other sockets have their turn."""


class Relays:
    """The UDP sockets of all instances."""

    def __init__(self) -> None:
        self._open: set[_Relay] = set()

    def start(self, sock: socket.socket, instance: str) -> socket.socket:
        """Pass a connected socket's datagrams on; return the worker's end. Raises `RefusedError`: too many."""
        why = ""
        if len(self._open) >= _RELAYS_MAX:
            why = f"{_RELAYS_MAX} UDP sockets are open on this device, as many as there may be"
        elif sum(each.instance == instance for each in self._open) >= OF_INSTANCE:
            why = f"{OF_INSTANCE} UDP sockets of this instance are open, as many as there may be"
        if why:
            sock.close()
            raise RefusedError("connection-limit-reached", why)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        ours.setblocking(False)
        theirs.setblocking(False)
        relay = _Relay(sock, ours, instance, self._open.discard)
        self._open.add(relay)
        return theirs


class _Pace:
    """Counts what goes one way, up to `PER_S` in each second."""

    def __init__(self) -> None:
        self._second = 0
        self._count = 0

    def allows(self) -> bool:
        second = int(asyncio.get_running_loop().time())
        if second != self._second:
            self._second, self._count = second, 0
        self._count += 1
        return self._count <= PER_S


class _Relay:
    def __init__(
        self, sock: socket.socket, worker: socket.socket, instance: str, ended: Callable[["_Relay"], None]
    ) -> None:
        self.instance = instance
        self._sock, self._worker, self._ended = sock, worker, ended
        self._in, self._out = _Pace(), _Pace()
        loop = asyncio.get_running_loop()
        loop.add_reader(sock, self._from_peer)
        loop.add_reader(worker, self._from_worker)

    def _from_peer(self) -> None:
        for _ in range(_TURN):
            try:
                packet = DATAGRAM + self._sock.recv(DATAGRAM_MAX_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                packet = _broken(error)
            if self._in.allows():
                self._tell(packet)

    def _from_worker(self) -> None:
        for _ in range(_TURN):
            try:
                packet = self._worker.recv(DATAGRAM_MAX_BYTES + 1)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._close()
                return
            if self._out.allows():
                try:
                    self._sock.send(packet[1:])
                except BlockingIOError:
                    continue  # the device's own buffer is full
                except OSError as error:
                    self._tell(_broken(error))

    def _tell(self, packet: bytes) -> None:
        with contextlib.suppress(OSError):  # the worker does not read, or has ended
            self._worker.send(packet, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _close(self) -> None:
        loop = asyncio.get_running_loop()
        for each in (self._sock, self._worker):
            loop.remove_reader(each)
            each.close()
        self._ended(self)


def _broken(error: OSError) -> bytes:
    return BROKEN + str(error.errno or errno.EIO).encode()
