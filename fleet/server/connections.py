"""Connections of one listener: how many there may be, and which one ends to make room for a newer one.

Connections are counted by peer: the address until a certificate is verified, then the device. A connection that waits
for its client (no byte yet, half a request, keep-alive) ends when its peer, or the listener, has as many as it may: the
one that has waited longest. A client that goes on sending a body waits anew with each part. A connection whose request
is being answered never ends for another. Where every connection is being answered, the new one is refused. So a client
that holds thousands of idle connections takes nothing from those that ask.

Handshakes of one address are bounded apart, by half of its connections, and each has `HANDSHAKE_S` in which none of its
own address ends it: beyond the bound the newest is refused. If the oldest ended instead, a thousand devices that come
back behind one router would end each other's handshakes, and none would finish. Those that are refused try again.
"""

import ipaddress
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

HANDSHAKE_S: Final = 3.0
"""Two round trips by satellite and a signature of a slow device, or 128 handshakes on one slow core of the server."""

_IPV6_SITE_BITS: Final = 64
"""A host has a whole /64 of IPv6 addresses (RFC 4291, section 2.5.1): they count as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one listener.

    Attributes:
        connections: in all.
        per_address: of one address, or one /64 of IPv6, as long as no certificate was verified.
        per_device: of one verified certificate.
    """

    connections: int
    per_address: int
    per_device: int

    def within(self, files: int) -> "Limits":
        """Lower the limits to what a number of open files allows, where that is less than all connections."""
        if files >= self.connections:
            return self
        connections = max(1, files)
        return Limits(
            connections=connections,
            per_address=max(1, min(self.per_address, connections // 2)),
            per_device=self.per_device,
        )


class Connection(ABC):
    """Connection of a listener, from the moment it is accepted.

    Attributes:
        peer: under which it is counted.
    """

    peer: str = ""

    @abstractmethod
    def end(self) -> None:
        """Close at once; the connection counts no more."""


@dataclass(slots=True)
class _Peer:
    waiting: dict[Connection, None] = field(default_factory=dict)
    """Connections that wait for their client, longest first."""

    handshakes: dict[Connection, float] = field(default_factory=dict)
    """Handshakes, and when each began, oldest first."""

    busy: set[Connection] = field(default_factory=set)

    def __len__(self) -> int:
        return self.unanswered + len(self.busy)

    @property
    def unanswered(self) -> int:
        """Number of connections that are not being answered."""
        return len(self.waiting) + len(self.handshakes)

    def oldest(self, began_before: float) -> Connection | None:
        """Return which one ends for another; of handshakes only one that began before a time."""
        for connection in self.waiting:
            return connection
        for connection, began in self.handshakes.items():
            return connection if began < began_before else None
        return None


class Connections:
    """Table of a listener's connections.

    Args:
        limits: of the listener.
        monotonic: seconds of a clock that never jumps.
    """

    def __init__(self, limits: Limits, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._monotonic = limits, monotonic
        self._peers: dict[str, _Peer] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def all(self) -> list[Connection]:
        """Every connection."""
        return [each for peer in self._peers.values() for each in (*peer.waiting, *peer.handshakes, *peer.busy)]

    def enter(self, connection: Connection, address: str) -> bool:
        """Count a new connection, which waits for its client; False when there is no room for it."""
        connection.peer = peer_of(address)
        return self._place(connection, self._limits.per_address)

    def spoke(self, connection: Connection) -> bool:
        """Note that a handshake begins; False when its address has as many as it may."""
        peer = self._peers.get(connection.peer)
        if peer is None or connection not in peer.waiting:
            return False
        began = self._monotonic()
        if len(peer.handshakes) >= max(1, self._limits.per_address // 2):
            oldest, since = next(iter(peer.handshakes.items()))
            if since >= began - HANDSHAKE_S:
                return False
            self._end(oldest)
        del peer.waiting[connection]
        peer.handshakes[connection] = began
        return True

    def verified(self, connection: Connection, device: str) -> bool:
        """Count a connection under the device of its certificate from now on; False when there is no room for it."""
        self.leave(connection)
        connection.peer = f"device {device}"
        return self._place(connection, self._limits.per_device)

    def busy(self, connection: Connection) -> None:
        """Note that a request is being answered."""
        peer = self._peers.get(connection.peer)
        if peer is not None and connection in peer.waiting:
            del peer.waiting[connection]
            peer.busy.add(connection)

    def waits(self, connection: Connection) -> None:
        """Note that the handshake, or an answer, is complete: the connection waits for its client, from now on."""
        peer = self._peers.get(connection.peer)
        if peer is not None and (connection in peer.busy or connection in peer.handshakes):
            peer.busy.discard(connection)
            peer.handshakes.pop(connection, None)
            peer.waiting[connection] = None

    def went_on(self, connection: Connection) -> None:
        """Note that the client of a connection that waits for it has sent a good part of a body: it waits anew."""
        peer = self._peers.get(connection.peer)
        if peer is not None and connection in peer.waiting:
            del peer.waiting[connection]
            peer.waiting[connection] = None

    def leave(self, connection: Connection) -> None:
        """Count a connection no more; nothing happens when it was not counted."""
        peer = self._peers.get(connection.peer)
        if peer is None:
            return
        before = len(peer)
        peer.waiting.pop(connection, None)
        peer.handshakes.pop(connection, None)
        peer.busy.discard(connection)
        self._count -= before - len(peer)
        if not len(peer):
            del self._peers[connection.peer]

    def relieve(self) -> bool:
        """End the connection that has waited longest, of the peer with most of them; False when none waits.

        Whoever holds most is not spared for its handshakes: others have to find room.
        """
        crowd = max(self._peers.values(), key=lambda peer: peer.unanswered, default=None)
        return crowd is not None and self._end(crowd.oldest(math.inf))

    def _place(self, connection: Connection, most: int) -> bool:
        peer = self._peers.get(connection.peer)
        overdue = self._monotonic() - HANDSHAKE_S
        if peer is not None and len(peer) >= most and not self._end(peer.oldest(overdue)):
            return False
        if self._count >= self._limits.connections and not self.relieve():
            return False
        self._peers.setdefault(connection.peer, _Peer()).waiting[connection] = None
        self._count += 1
        return True

    def _end(self, connection: Connection | None) -> bool:
        if connection is None:
            return False
        self.leave(connection)
        connection.end()
        return True


def peer_of(address: str) -> str:
    """Return under which peer an address is counted."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Network((found, _IPV6_SITE_BITS), strict=False))
