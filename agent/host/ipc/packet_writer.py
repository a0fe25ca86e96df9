"""Writer of a packet socket in an event loop, for the agent and the host's processes."""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from agent.host.ipc import framing


@dataclass(slots=True, eq=False)
class Packet:
    """A packet that waits for room in its socket; `fds` are copies, which belong to it."""

    data: bytes
    fds: tuple[int, ...]


class PacketWriter:
    """The only writer of a non-blocking packet socket: packets leave in the order in which they were given.

    An event loop knows one writer for each socket, so senders that wait for it themselves displace each other. Here
    no sender waits: a packet that finds no room is kept until there is some. Belongs to the loop's thread.
    """

    def __init__(self, sock: socket.socket, on_broken: Callable[[OSError], None]) -> None:
        """Write to `sock`, which stays its owner's to close, after `close`.

        `on_broken` is called once, when the socket takes nothing any more; the writer is closed by then.
        """
        self._sock = sock
        self._on_broken = on_broken
        self._kept: deque[Packet] = deque()
        self._closed = False

    def __len__(self) -> int:
        """Return how many packets wait for room."""
        return len(self._kept)

    def send(self, data: bytes, *fds: int) -> Packet | None:
        """Send a packet and descriptors (they stay open here), or keep it until there is room.

        Returns:
            The packet while it is kept, for `withdraw`; None where it was sent, or the socket is broken or closed.

        Raises:
            OSError: a descriptor cannot be copied.
        """
        if self._closed or (not self._kept and self._try(data, fds)):
            return None
        packet = Packet(data, _copies(fds))
        if not self._kept:
            asyncio.get_running_loop().add_writer(self._sock, self._flush)
        self._kept.append(packet)
        return packet

    def withdraw(self, packet: Packet | None) -> None:
        """Forget a packet that was not sent yet."""
        if packet is not None and packet in self._kept:
            self._kept.remove(packet)
            _close(packet)
            self._rest()

    def close(self) -> None:
        """Forget what is kept, and send no more."""
        self._closed = True
        if self._kept:
            for packet in self._kept:
                _close(packet)
            self._kept.clear()
            self._rest()

    def _flush(self) -> None:
        while self._kept and self._try(self._kept[0].data, self._kept[0].fds):
            if self._kept:  # else it broke, and everything is forgotten
                _close(self._kept.popleft())
                self._rest()

    def _rest(self) -> None:
        """Watch the socket no longer than something waits for it."""
        if not self._kept:
            asyncio.get_running_loop().remove_writer(self._sock)

    def _try(self, data: bytes, fds: tuple[int, ...]) -> bool:
        """Return False where there is no room."""
        try:
            framing.send_packet(self._sock, data, fds)
        except BlockingIOError:
            return False
        except OSError as error:
            self.close()
            self._on_broken(error)
        return True


def _copies(fds: tuple[int, ...]) -> tuple[int, ...]:
    """Return copies of all descriptors. Raises `OSError`, with none left open."""
    copies: list[int] = []
    try:
        copies.extend(os.dup(fd) for fd in fds)
    except OSError:
        framing.close_all(copies)
        raise
    return tuple(copies)


def _close(packet: Packet) -> None:
    framing.close_all(packet.fds)
