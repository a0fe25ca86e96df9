"""Router: the process that owns the device's HTTP ports and all clients' connections. A fork of the supervisor.

It holds the listening sockets, a channel to each worker, and a socket to the supervisor that says which instances there
are; no wasm, no configuration, no file.
"""

import asyncio
import contextlib
import errno
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Final

import msgspec

from agent.host.http.channel import Channel, InstanceCalls
from agent.host.http.proxy import ClientConnection, Clients, Instances
from agent.host.http.routing import OwnRoute, Peer, RouteTable
from agent.host.ipc import framing
from agent.host.ipc.helper_api import (
    AddChannel,
    AddListener,
    ChannelDrained,
    DrainChannel,
    DrainRouter,
    FromRouter,
    IngressRules,
    RemoveListener,
    RouteAcknowledged,
    RouteRemove,
    RouteUpdate,
    ServeChannel,
    TlsClient,
    ToRouter,
    YieldChannel,
)
from agent.host.ipc.packet_writer import PacketWriter
from agent.host.ipc.stats_page import CallPage
from agent.host.sandbox import sandbox

IDLE_S: Final = 75
STALL_S: Final = 60
_SWEEP_S: Final = 15
_DRAIN_S: Final = 5
_CLIENTS_MAX: Final = 1024
OWN_CLIENTS_MAX: Final = 512
"""Clients of one instance's own listener."""

_ALL_OWN_CLIENTS_MAX: Final = 1536
"""Clients of all of those: with the shared port's, no more than the router has descriptors for (`router_spec`)."""

_COUNT: Final = struct.Struct("=I")
NO_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of `accept` that leave the listener readable: whoever asks again at once spins."""

ACCEPT_PAUSE_S: Final = 1.0
_IDLE_WHERE_FULL_S: Final = 5.0
"""Time after which a client between two requests gives its place to one who waits."""


_decoder: Final[msgspec.json.Decoder[ToRouter]] = msgspec.json.Decoder(ToRouter)
_tls_decoder: Final[msgspec.json.Decoder[TlsClient]] = msgspec.json.Decoder(TlsClient)


class SharedClients(Clients):
    """Clients of the shared port, counted in memory shared with the supervisor, which reports it if the router dies."""

    def __init__(self, page: mmap.mmap) -> None:
        super().__init__()
        self._page = page
        self._timer: asyncio.TimerHandle | None = None

    def add(self, client: ClientConnection) -> None:
        """Add a client."""
        super().add(client)
        _COUNT.pack_into(self._page, 0, len(self))

    def discard(self, client: object) -> None:
        """Remove a client."""
        super().discard(client)
        _COUNT.pack_into(self._page, 0, len(self))

    def make_room(self) -> None:
        """End the connection that has been idle for longest, where there is one (RFC 9112, section 9.4)."""
        before_s = time.monotonic() - _IDLE_WHERE_FULL_S
        idle = [client for client in self if client.is_between_requests and client.last_s < before_s]
        if idle:
            min(idle, key=lambda client: client.last_s).end_when_idle()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(1, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        if len(self) >= _CLIENTS_MAX:
            self.make_room()

    def may_wait(self, waiting: int) -> bool:
        """Return whether another client may wait for an instance: as many do as there are places left for all others.

        So a flood of one instance takes half of the port, one of two instances two thirds.
        """
        return waiting < max(1, _CLIENTS_MAX - len(self))


def clients_of(page: mmap.mmap) -> int:
    """Return how many clients a router has, or had when it died."""
    count: int = _COUNT.unpack_from(page)[0]
    return min(count, _CLIENTS_MAX)  # whoever broke into it may have written anything


def run_router(
    listener: socket.socket | None,
    sock: socket.socket,
    keep: tuple[int, ...],
    page: mmap.mmap,
    decrypted: socket.socket | None = None,
) -> None:
    """Run the router in a process just forked from the supervisor, confined before it accepts a client.

    `decrypted`: on which clients arrive that came over TLS, see `agent.host.http.tls`.
    """
    if decrypted is not None:
        keep = (*keep, decrypted.fileno())
    sandbox.begin_helper({sock.fileno(), *keep} | (set() if listener is None else {listener.fileno()}))
    loop = asyncio.SelectorEventLoop()
    asyncio.set_event_loop(loop)
    sandbox.apply(sandbox.router_spec())
    loop.run_until_complete(Router(listener, sock, SharedClients(page), decrypted).run())


class Acceptor:
    """Listening socket whose clients are accepted while there is room for them."""

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[Peer | None], ClientConnection],
        has_room: Callable[[], bool],
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        """Make each client a `protocol`, told who it is where that is known beforehand.

        `make_room`: called where there is none, and somebody waits.
        """
        self._make_room = make_room
        self._listener = listener
        self._protocol = protocol
        self._has_room = has_room
        self._accepting = False
        listener.setblocking(False)
        self.go_on()

    def go_on(self) -> None:
        """Accept again if there is room: whoever waits may come."""
        if not self._accepting and self._listener.fileno() >= 0 and self._has_room():
            self._accepting = True
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        if not self._has_room():  # the others wait at the listener until one has gone
            self.pause()
            self._make_room()
            return
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in NO_RESOURCES:  # the listener stays readable, so asking again at once would never end
                self.pause()
                asyncio.get_running_loop().call_later(ACCEPT_PAUSE_S, self.go_on)
            return
        self.welcome(sock)

    def welcome(self, sock: socket.socket, peer: Peer | None = None) -> ClientConnection:
        """Make a connected socket a client."""
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop, client = asyncio.get_running_loop(), self._protocol(peer)
        # A transport without the handshake of connect_accepted_socket: one callback instead of a task a connection.
        loop._make_socket_transport(sock, client)  # type: ignore[attr-defined]  # noqa: SLF001
        return client

    def pause(self) -> None:
        """Accept nobody for now: whoever comes waits."""
        if self._accepting:
            self._accepting = False
            asyncio.get_running_loop().remove_reader(self._listener)

    def close(self) -> None:
        """Close the listener; its clients stay."""
        if self._listener.fileno() >= 0:
            self.pause()
            self._listener.close()


class TlsAcceptor(Acceptor):
    """Socket on which clients arrive, decrypted, from the process that speaks TLS with them."""

    def _accept(self) -> None:
        if not self._has_room():
            self.pause()
            self._make_room()
            return
        try:
            data, fds = framing.receive_packet(self._listener)
        except (BlockingIOError, framing.GoneError):
            return
        for fd in fds:
            self.welcome(socket.socket(fileno=fd), Peer(_tls_decoder.decode(data).address, b"https"))


class OwnListener:
    """Listener of one instance's own, and the clients that came by it."""

    def __init__(self, instance: str, listener: socket.socket, instances: Instances, router: "Router") -> None:
        self.route = OwnRoute(instance)
        self.clients = Clients(router.own_left)
        is_trusted = listener.family == socket.AF_UNIX
        self._acceptor = Acceptor(
            listener,
            lambda peer: ClientConnection(self.route, instances, self.clients, peer, is_trusted=is_trusted),
            lambda: len(self.clients) < min(OWN_CLIENTS_MAX, router.own_spare),
        )

    def go_on(self) -> None:
        """Accept again if there is room."""
        self._acceptor.go_on()

    def close(self) -> None:
        """Accept nobody any more, and end each client once it is answered."""
        self._acceptor.close()
        for client in list(self.clients):
            client.end_when_idle()


class Router:
    """Router process: accepts clients and passes their requests to the instances."""

    def __init__(
        self,
        listener: socket.socket | None,
        sock: socket.socket,
        clients: SharedClients,
        decrypted: socket.socket | None = None,
    ) -> None:
        """Serve the shared port on `listener`, or no shared port for None; `decrypted` as in `run_router`."""
        self._listener = listener
        self._decrypted = decrypted
        self._sock = sock
        self._routes = RouteTable()
        self._instances = Instances()
        self._clients = clients
        self._shared: list[Acceptor] = []
        self._calls: dict[str, InstanceCalls] = {}  # also of instances that take no calls by channels at present
        self._own: dict[str, OwnListener] = {}
        self._closed_own: set[OwnListener] = set()
        self._channels: dict[int, Channel] = {}
        self._ended = asyncio.Event()
        self._writer = PacketWriter(sock, lambda _: self._ended.set())

    async def run(self) -> None:
        """Serve until the supervisor closes its end of the socket."""
        loop = asyncio.get_running_loop()
        self._sock.setblocking(False)
        loop.add_reader(self._sock, self._obey)
        for kind, source in ((Acceptor, self._listener), (TlsAcceptor, self._decrypted)):
            if source is not None:
                has_room = lambda: len(self._clients) < _CLIENTS_MAX  # noqa: E731
                self._shared.append(kind(source, self._client, has_room, self._clients.make_room))
        self._clients.left = self._go_on
        sweep = asyncio.ensure_future(self._sweep())
        await self._ended.wait()
        sweep.cancel()

    def _client(self, peer: Peer | None) -> ClientConnection:
        return ClientConnection(self._routes, self._instances, self._clients, peer)

    def _go_on(self) -> None:
        for acceptor in self._shared:
            acceptor.go_on()

    def report(self, message: FromRouter) -> None:
        """Send a message to the supervisor."""
        self._writer.send(msgspec.json.encode(message))

    def _obey(self) -> None:
        """Do all that the supervisor says before any client is read: a new router is told every route at once."""
        with contextlib.suppress(BlockingIOError):
            while not self._ended.is_set():
                try:
                    data, fds = framing.receive_packet(self._sock)
                except framing.DescriptorsLostError as error:
                    self._refuse(_decoder.decode(error.data))
                except framing.GoneError:
                    self._ended.set()
                else:
                    self._take(_decoder.decode(data), fds)

    def _refuse(self, message: ToRouter) -> None:
        """Refuse the channel or listener that there is no descriptor for, and go on with all others."""
        if isinstance(message, AddChannel | AddListener):
            self.report(RouteAcknowledged(message.id, framing.no_descriptors("the router")))
        else:
            self._take(message, ())

    def _take(self, message: ToRouter, fds: tuple[int, ...]) -> None:
        match message:
            case DrainRouter():
                self._drain()
            case RouteUpdate() | RouteRemove() | IngressRules():
                self._heed(message)
                self.report(RouteAcknowledged(message.id))
            case AddListener():
                self._heed_listener(message, fds)
                self.report(RouteAcknowledged(message.id))
            case RemoveListener():
                self._heed_listener(message, fds)
            case AddChannel():
                self._add_channel(message, fds)
            case _:
                self._heed_channel(message)

    def _forget_known(self) -> None:
        self._instances.known.clear()
        for own in self._own.values():
            own.route.known.clear()

    def _heed(self, message: RouteUpdate | RouteRemove | IngressRules) -> None:
        self._forget_known()
        match message:
            case RouteUpdate(instance=instance, up=up):
                self._routes.up[instance] = up
                if not up and (calls := self._instances.calls.get(instance)) is not None:
                    calls.refuse_all(503, f"{instance} is not answering at present; try again in a little while")
            case IngressRules():
                self._routes.configure(message)
            case RouteRemove(instance=instance):
                self._routes.up.pop(instance, None)

    def _heed_listener(self, message: AddListener | RemoveListener, fds: tuple[int, ...]) -> None:
        self._forget_known()
        instance = message.instance
        own = self._own.pop(instance, None)
        if own is not None:
            own.close()
            self._closed_own.add(own)  # until its last client has gone
        match message:
            case AddListener():
                self._instances.calls[instance] = self._calls_of(instance)
                self._own[instance] = OwnListener(instance, socket.socket(fileno=fds[0]), self._instances, self)
            case RemoveListener():
                calls = self._instances.calls.pop(instance, None)
                if calls is not None:
                    calls.refuse_all(503, f"{instance} is not answering at present; try again in a little while")
                    calls.rest()

    @property
    def own_spare(self) -> int:
        """Number of places that clients of instances' own listeners have left; one listener's get no more than that."""
        return _ALL_OWN_CLIENTS_MAX - sum(len(own.clients) for own in [*self._own.values(), *self._closed_own])

    def own_left(self) -> None:
        """Take note that a client of an instance's own listener has gone."""
        self._closed_own = {own for own in self._closed_own if own.clients}
        for own in self._own.values():
            own.go_on()

    def _calls_of(self, instance: str) -> InstanceCalls:
        kept = self._instances.calls
        self._calls = {name: calls for name, calls in self._calls.items() if calls.channels or name in kept}
        return self._calls.setdefault(instance, InstanceCalls(instance, self))

    def _add_channel(self, message: AddChannel, fds: tuple[int, ...]) -> None:
        channel_fd, *page_fds = fds
        try:
            page = CallPage(*page_fds)  # a map keeps a descriptor of its own
        except OSError as error:
            os.close(channel_fd)
            why = framing.no_descriptors("the router") if error.errno in framing.NO_DESCRIPTORS else str(error)
            self.report(RouteAcknowledged(message.id, why))
            return
        finally:
            framing.close_all(page_fds)
        calls = self._calls_of(message.instance)
        self._channels = {worker: channel for worker, channel in self._channels.items() if channel.is_open}
        self._channels[message.worker] = calls.add(message, socket.socket(fileno=channel_fd), page)
        self.report(RouteAcknowledged(message.id))

    def _heed_channel(self, message: ServeChannel | DrainChannel | YieldChannel) -> None:
        channel = self._channels.get(message.worker)
        if channel is None or not channel.is_open:
            if isinstance(message, DrainChannel):
                self.report(ChannelDrained(message.worker))
            return
        match message:
            case ServeChannel():
                channel.serve()
            case DrainChannel():
                channel.drain()
            case YieldChannel():
                channel.leave_loop()

    def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        for acceptor in self._shared:
            acceptor.close()
        for instance in list(self._own):
            own = self._own.pop(instance)
            own.close()
            self._closed_own.add(own)
        for client in list(self._clients):
            client.end_when_idle()
        loop.call_later(_DRAIN_S, self._ended.set)
        self._when_empty()

    def _all_clients(self) -> list[ClientConnection]:
        owns = [*self._own.values(), *self._closed_own]
        return [*self._clients, *(client for own in owns for client in own.clients)]

    def _when_empty(self) -> None:
        if self._all_clients():
            asyncio.get_running_loop().call_later(0.02, self._when_empty)
        else:
            self._ended.set()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.mind_clients(time.monotonic())

    def mind_clients(self, now_s: float) -> None:
        """End connections of clients that are quiet for too long, or too slow."""
        for client in self._all_clients():
            if client.is_trusted:
                continue
            client.mind_pace(now_s)
            if not client.waits_for_guest and now_s - client.last_s > (IDLE_S if client.idle else STALL_S):
                client.close()
