"""Connections of one listener: how many there may be, and which one ends to make room for a newer one.

Connections are counted by peer: the address until a certificate is verified, then the device. A connection that waits
for its client (no byte yet, an unfinished handshake, half a request, keep-alive) ends when its peer, or the listener,
has as many as it may: the one that has waited longest. A connection whose request is being answered never ends for
another. Where every connection is being answered, the new one is refused. So a client that holds thousands of idle
connections takes nothing from those that ask.
"""

import ipaddress
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Final

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
        """Lower the limits to what a number of open files allows."""
        connections = max(1, min(self.connections, files))
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
    """Those that wait for their client, longest first."""

    busy: set[Connection] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.busy)


class Connections:
    """Table of a listener's connections."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._peers: dict[str, _Peer] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def all(self) -> list[Connection]:
        """Every connection."""
        return [each for peer in self._peers.values() for each in (*peer.waiting, *peer.busy)]

    def enter(self, connection: Connection, address: str) -> bool:
        """Count a new connection, which waits for its client; False when there is no room for it."""
        connection.peer = peer_of(address)
        return self._place(connection, self._limits.per_address)

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
        """Note that the answer is complete: the connection waits for its client, from now on."""
        peer = self._peers.get(connection.peer)
        if peer is not None and connection in peer.busy:
            peer.busy.remove(connection)
            peer.waiting[connection] = None

    def leave(self, connection: Connection) -> None:
        """Count a connection no more; nothing happens when it was not counted."""
        peer = self._peers.get(connection.peer)
        if peer is None or not (connection in peer.waiting or connection in peer.busy):
            return
        peer.waiting.pop(connection, None)
        peer.busy.discard(connection)
        self._count -= 1
        if not len(peer):
            del self._peers[connection.peer]

    def relieve(self) -> bool:
        """End the connection that has waited longest, of the peer with most of them; False when none waits."""
        crowd = max(self._peers.values(), key=lambda peer: len(peer.waiting), default=None)
        return crowd is not None and self._end_oldest(crowd)

    def _place(self, connection: Connection, most: int) -> bool:
        peer = self._peers.get(connection.peer)
        if peer is not None and len(peer) >= most and not self._end_oldest(peer):
            return False
        if self._count >= self._limits.connections and not self.relieve():
            return False
        self._peers.setdefault(connection.peer, _Peer()).waiting[connection] = None
        self._count += 1
        return True

    def _end_oldest(self, peer: _Peer) -> bool:
        oldest = next(iter(peer.waiting), None)
        if oldest is None:
            return False
        self.leave(oldest)
        oldest.end()
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
