"""Router: the process that owns the device's shared HTTP port and proxies to instances. A fork of the supervisor.

It holds the listening socket, a socket to the supervisor that says which instances there are, and a view of the
directory with the instances' sockets; no wasm, no configuration, no other file.
"""

import asyncio
import gc
import mmap
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from agent.host.http.proxy import ClientConnection, UpstreamPool
from agent.host.http.routing import Peer, RouteTable
from agent.host.ipc import framing
from agent.host.ipc.helper_api import (
    DrainRouter,
    IngressRules,
    RouteAcknowledged,
    RouteRemove,
    RouteUpdate,
    TlsClient,
)
from agent.host.ipc.packet_writer import PacketWriter
from agent.host.sandbox import sandbox

IDLE_S: Final = 75
STALL_S: Final = 60
_SWEEP_S: Final = 15
_DRAIN_S: Final = 5
_CLIENTS_MAX: Final = 1024
_COUNT: Final = struct.Struct("=I")


_decoder: Final[msgspec.json.Decoder[RouteUpdate | RouteRemove | IngressRules | DrainRouter]] = msgspec.json.Decoder(
    RouteUpdate | RouteRemove | IngressRules | DrainRouter
)
_tls_decoder: Final[msgspec.json.Decoder[TlsClient]] = msgspec.json.Decoder(TlsClient)


class Clients(set[ClientConnection]):
    """Clients of a router, counted in memory shared with the supervisor, which reports it if the router dies."""

    def __init__(self, page: mmap.mmap) -> None:
        super().__init__()
        self._page = page
        self.left: Callable[[], None] = lambda: None
        """Called after a client has left."""

    def add(self, client: ClientConnection) -> None:
        """Add a client."""
        super().add(client)
        _COUNT.pack_into(self._page, 0, len(self))

    def discard(self, client: object) -> None:
        """Remove a client."""
        super().discard(client)
        _COUNT.pack_into(self._page, 0, len(self))
        self.left()


def clients_of(page: mmap.mmap) -> int:
    """Return how many clients a router has, or had when it died."""
    count: int = _COUNT.unpack_from(page)[0]
    return min(count, _CLIENTS_MAX)  # whoever broke into it may have written anything


def run_router(
    listener: socket.socket,
    sock: socket.socket,
    directory: Path,
    keep: tuple[int, ...],
    page: mmap.mmap,
    decrypted: socket.socket | None = None,
) -> None:
    """Run the router in a process just forked from the supervisor, confined before it accepts a client.

    `decrypted`: on which clients arrive that came over TLS, see `agent.host.http.tls`.
    """
    if decrypted is not None:
        keep = (*keep, decrypted.fileno())
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the supervisor decides
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.freeze()
    sandbox.close_all_but({0, 1, 2, listener.fileno(), sock.fileno(), *keep})
    loop = asyncio.SelectorEventLoop()
    asyncio.set_event_loop(loop)
    layers = sandbox.apply(sandbox.router_spec(str(directory)))
    where = "" if layers["mount"] else "."  # an address as short as possible, see `sandbox.apply`
    loop.run_until_complete(Router(listener, sock, where, Clients(page), decrypted).run())


class Router:
    """Router process: accepts clients and passes their requests to the instances."""

    def __init__(
        self,
        listener: socket.socket,
        sock: socket.socket,
        directory: str,
        clients: Clients,
        decrypted: socket.socket | None = None,
    ) -> None:
        self._decrypted = decrypted
        self._listener = listener
        self._sock = sock
        self._routes = RouteTable()
        self._pool = UpstreamPool(directory)
        self._clients = clients
        self._accepting = False
        self._ended = asyncio.Event()
        self._writer = PacketWriter(sock, lambda _: self._ended.set())

    async def run(self) -> None:
        """Serve until the supervisor closes its end of the socket."""
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        self._sock.setblocking(False)
        loop.add_reader(self._sock, self._obey)
        self._clients.left = self._accept_again
        self._accept_again()
        sweep = asyncio.ensure_future(self._sweep())
        await self._ended.wait()
        sweep.cancel()

    def _accept_again(self) -> None:
        """Accept clients again, if there is room."""
        if not self._accepting and self._listener.fileno() >= 0 and len(self._clients) < _CLIENTS_MAX:
            self._accepting = True
            asyncio.get_running_loop().add_reader(self._listener, self._accept)
            if self._decrypted is not None:
                asyncio.get_running_loop().add_reader(self._decrypted, self._accept_decrypted)

    def _accept(self) -> None:
        if len(self._clients) >= _CLIENTS_MAX:  # the others wait at the listener until one has gone
            self._pause()
            return
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._serve(sock)

    def _accept_decrypted(self) -> None:
        """Take a client over from the process that speaks TLS with it."""
        assert self._decrypted is not None
        if len(self._clients) >= _CLIENTS_MAX:
            self._pause()
            return
        try:
            data, fds = framing.receive_packet(self._decrypted)
        except (BlockingIOError, framing.GoneError):
            return
        for fd in fds:
            self._serve(socket.socket(fileno=fd), Peer(_tls_decoder.decode(data).address, b"https"))

    def _pause(self) -> None:
        """Accept nobody for want of room: whoever comes waits."""
        self._accepting = False
        for sock in (self._listener, self._decrypted):
            if sock is not None:
                asyncio.get_running_loop().remove_reader(sock)

    def _serve(self, sock: socket.socket, peer: Peer | None = None) -> None:
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        # A transport without the handshake of connect_accepted_socket: one callback instead of a task a connection.
        loop._make_socket_transport(sock, ClientConnection(self._routes, self._pool, self._clients, peer))  # type: ignore[attr-defined]  # noqa: SLF001

    def _obey(self) -> None:
        try:
            data, _ = framing.receive_packet(self._sock)
        except BlockingIOError:
            return
        except framing.GoneError:
            self._ended.set()
            return
        message = _decoder.decode(data)
        if isinstance(message, DrainRouter):
            self._drain()
            return
        self._heed(message)
        self._writer.send(msgspec.json.encode(RouteAcknowledged(message.id)))

    def _heed(self, message: RouteUpdate | RouteRemove | IngressRules) -> None:
        self._pool.known.clear()
        match message:
            case RouteUpdate(instance=instance, up=up, spread=spread):
                self._routes.up[instance] = up
                (self._pool.spread.add if spread else self._pool.spread.discard)(instance)
                if spread or not up:
                    self._pool.forget(instance)
            case IngressRules():
                self._routes.configure(message)
            case RouteRemove(instance=instance):
                self._routes.up.pop(instance, None)
                self._pool.spread.discard(instance)
                self._pool.forget(instance)

    def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        self._pause()
        self._listener.close()
        for client in list(self._clients):
            client.end_when_idle()
        loop.call_later(_DRAIN_S, self._ended.set)
        self._when_empty()

    def _when_empty(self) -> None:
        if self._clients:
            asyncio.get_running_loop().call_later(0.02, self._when_empty)
        else:
            self._ended.set()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._pool.sweep()
            now = time.monotonic()
            for client in list(self._clients):
                if now - client.last_s > (IDLE_S if client.idle else STALL_S):
                    client.close()
