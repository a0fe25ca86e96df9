"""Listeners: ports bound early, TLS with certificates that renew themselves, uvicorn, deadlines and limits.

Connections are accepted here, not by uvicorn, so that a connection is counted before TLS has any memory for it (a
quarter of a mebibyte each), and every wait for a client has a deadline: `Deadlines`. `fleet.server.connections` says
which connection ends where there are too many. Each listener has limits of its own, so neither starves the other.

No other module uses uvicorn's internals. Its protocol class for HTTP/1.1 is extended:

- a TLS client's certificate is put into the ASGI scope, where the ASGI TLS extension has it:
  `scope["extensions"]["tls"]["client_cert_chain"]`, PEM, leaf first. TLS has verified it against the listener's CA
  before a byte of the request is read. A test with real TLS guards this against a change in uvicorn;
- the deadlines within a request.
"""

import asyncio
import contextlib
import errno
import logging
import resource
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import formatdate
from functools import partial
from typing import Any, Final, cast

import h11
import uvicorn
from cryptography import x509
from cryptography.x509.oid import NameOID
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fleet.ca import SERVER_LIFE, CertificateAuthority, due
from fleet.protocol.files import atomic_write
from fleet.server.clock import ServerClock
from fleet.server.config import EVERYWHERE, Address, ServerPaths, has_ipv6
from fleet.server.connections import Connection, Connections, Limits

log = logging.getLogger(__name__)
_NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME: a device with an expired certificate may still renew; the routes check the dates."""

_BACKLOG: Final = 1024
_DRAIN_S: Final = 2.0
"""Time for requests that are being answered when the server ends."""

_CANCEL_S: Final = 1.0
_BREATH_S: Final = 0.1
"""Pause after the system had no descriptor or memory for a connection."""

_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_FILES_MAX: Final = 16_384
_FILES_ELSEWHERE: Final = 256
"""Descriptors that are not connections of a listener: the database, artifacts being sent, the broker, the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Longest waits for a client, in seconds.

    Attributes:
        first_byte: from the connection to the first byte of TLS.
        handshake: from there to the end of the handshake.
        head: from the handshake, or the first byte of a further request, to the end of the request's headers.
        body: for a body, and as long again for each `body_bytes` of it that came.
        idle: between two requests.
        stalled: while the client takes nothing of an answer.
        goodbye: for the client's part of the end of TLS.
    """

    first_byte: float = 10.0
    handshake: float = 10.0
    head: float = 10.0
    body: float = 20.0
    body_bytes: int = 20 * 1024  # 1 KiB/s: twice Apache's default of mod_reqtimeout
    idle: float = 30.0
    stalled: float = 300.0
    goodbye: float = 2.0


class PortError(Exception):
    """The port cannot be bound; one line says what, why and what to do."""


def bind(where: str, what: str) -> list[socket.socket]:
    """Take a port: one socket for each address that the host has. `[::]` is every address, of IPv4 too.

    Raises:
        PortError: the port is in use, or may not be bound.
    """
    address = Address.parse(where, what)
    sockets: list[socket.socket] = []
    try:
        for family, host in _families(address):
            sock = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != EVERYWHERE))
            sock.bind((host, address.port))
            # without listen() a second socket with SO_REUSEADDR could take the same port
            sock.listen(_BACKLOG)
            sock.setblocking(False)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise PortError(
            f"{what} cannot listen at {address}: {(error.strerror or str(error)).lower()}; "
            "end the program that has the port, or change it in server/server.toml"
        ) from error
    return sockets


def _families(address: Address) -> list[tuple[socket.AddressFamily, str]]:
    """Return the family and address of each socket; a kernel without IPv6 has IPv4 alone."""
    if address.host == EVERYWHERE and not has_ipv6():
        return [(socket.AF_INET, "0.0.0.0")]  # noqa: S104 - as server.toml says
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    usable = [(family, str(where[0])) for family, _, _, _, where in found if family != socket.AF_INET6 or has_ipv6()]
    return list(dict.fromkeys(usable)) or [(found[0][0], str(found[0][4][0]))]


class Certificates:
    """The listeners' certificate, and the server's own for its broker.

    Made anew when two thirds of a life are over, when a wrong clock dated them, and when they or their keys are
    damaged. While the clocks disagree a certificate is valid by both.

    Attributes:
        client: certificate and key of the server as a client of its broker.
        ends: end of the listeners' certificate, UTC.
    """

    def __init__(self, home: ServerPaths, ca: CertificateAuthority, host: str, clock: ServerClock) -> None:
        self._tls = home.tls
        self._authority = home.ca / "ca.pem"
        self._ca, self._host, self._clock = ca, host, clock
        self._contexts: list[ssl.SSLContext] = []
        self.client = home.tls / "mqtt-both.pem"
        self.renew()

    def renew(self) -> bool:
        """Renew certificates that are due, for connections from now on; return True when some were."""
        earliest, latest = self._clock.earliest, self._clock.latest
        changed = False
        for name in ("server", "mqtt"):
            path = self._tls / f"{name}.pem"
            usable = self._is_usable(name)
            if usable and not self._outdated(path.read_bytes()):
                continue
            if self._ca.issuer.not_valid_after_utc <= earliest and usable:
                log.error("the issuing CA has ended: fleet ca renew")
                continue
            make = partial(self._ca.server, [self._host]) if name == "server" else self._ca.server_client
            pair = make(now=earliest, life=SERVER_LIFE + (latest - earliest))
            # without its certificate a key is made anew: a power cut between the two leaves no pair that does not match
            path.unlink(missing_ok=True)
            atomic_write(self._tls / f"{name}.key", pair.key_pem, mode=0o600)
            atomic_write(path, pair.certificate_pem, mode=0o644)
            changed = True
        both = (self._tls / "mqtt.pem").read_bytes() + (self._tls / "mqtt.key").read_bytes()
        atomic_write(self.client, both, mode=0o600)
        self.ends = x509.load_pem_x509_certificate((self._tls / "server.pem").read_bytes()).not_valid_after_utc
        if changed:
            for context in self._contexts:
                self._load(context)
        return changed

    def _is_usable(self, name: str) -> bool:
        """Tell whether a certificate and its key are there and belong to each other; note damage in the log."""
        path, key = self._tls / f"{name}.pem", self._tls / f"{name}.key"
        if not path.exists():
            return False
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path, key)
            x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError):
            log.warning("%s or its key is damaged: both are made anew", path)
            return False
        return True

    def _outdated(self, pem: bytes) -> bool:
        """Tell whether a certificate is due by either clock, or of an issuing CA that is not the newest."""
        leaf = x509.load_pem_x509_certificate(pem)
        if leaf.issuer != self._ca.issuer.subject or not self._ca.accepts(leaf):
            return True
        earliest, latest = self._clock.earliest, self._clock.latest
        life = SERVER_LIFE + (latest - earliest)
        return due(pem, now=earliest, life=life) or due(pem, now=latest, life=life)

    def context(self, *, devices: bool) -> ssl.SSLContext:
        """Make the TLS context of a listener; that for devices requires a certificate of the fleet's CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load(context)
        # With the CA in its store, OpenSSL sends it in the chain: a device that enrols compares it with the hash in its
        # token before sending anything (`agent.identity.enrolment.presented_ca`).
        context.load_verify_locations(self._authority)
        if devices:
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
        self._contexts.append(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self._tls / "server.pem", self._tls / "server.key")


class Listener:
    """Application on one port.

    Args:
        application: ASGI.
        sockets: of the port, as `bind` returns them; closed at the end.
        context: for TLS.
        limits: on connections.
        deadlines: for clients.
    """

    def __init__(
        self,
        application: Any,
        sockets: Sequence[socket.socket],
        context: ssl.SSLContext,
        limits: Limits,
        deadlines: Deadlines = Deadlines(),
    ) -> None:
        self._config = uvicorn.Config(
            application,
            http=_Protocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="critical",  # errors of routes are logged by the routes
            server_header=False,
            proxy_headers=False,  # nobody stands before this listener: it ends TLS itself
            timeout_keep_alive=cast("int", deadlines.idle),
        )
        self._sockets, self._context, self._deadlines = sockets, context, deadlines
        self.connections = Connections(limits)
        self._state = ServerState()
        self._accepting: list[asyncio.Task[None]] = []
        self._left = asyncio.Event()

    async def start(self) -> None:
        """Serve from now on."""
        self._config.load()
        self._accepting = [asyncio.create_task(self._accept(sock), name="accept") for sock in self._sockets]

    async def stop(self) -> None:
        """End: no new connections, a moment for requests that are being answered, then close.

        A request that is not answered by then loses its connection, so its client knows that nobody answered.
        """
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for sock in self._sockets:
            sock.close()
        for connection in self.connections.all():
            assert isinstance(connection, _Accepted)
            connection.finish()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while len(self.connections):
                    self._left.clear()
                    await self._left.wait()
        for connection in self.connections.all():
            connection.end()
        for task in list(self._state.tasks):
            task.cancel()
        if self._state.tasks:
            await asyncio.wait(list(self._state.tasks), timeout=_CANCEL_S)

    async def _accept(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, address = await loop.sock_accept(sock)
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self.connections.relieve()
                    await asyncio.sleep(_BREATH_S)
                continue
            accepted = _Accepted(self, client)
            if self.connections.enter(accepted, address[0]):
                accepted.begin()
            else:
                client.close()
            # sock_accept returns at once while connections are waiting: others have their turn between two
            await asyncio.sleep(0)

    async def secure(self, sock: socket.socket, accepted: "_Accepted") -> None:
        """Bring a connection to its first request.

        Raises:
            OSError: no TLS in time, or none that is accepted.
        """
        async with asyncio.timeout(self._deadlines.first_byte):
            if not (await _speaks(sock) and self.connections.spoke(accepted)):
                raise ConnectionResetError
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: _Protocol(self._config, self._state, {}, accepted=accepted, deadlines=self._deadlines),
            sock,
            ssl=self._context,
            ssl_handshake_timeout=self._deadlines.handshake,
            ssl_shutdown_timeout=self._deadlines.goodbye,
        )

    def left(self, connection: Connection) -> None:
        """Forget a connection that has ended."""
        self.connections.leave(connection)
        self._left.set()


async def _speaks(sock: socket.socket) -> bool:
    """Wait for the first byte of a connection and leave it there; False when the client has gone instead."""
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    loop.add_reader(sock, arrived.set)
    try:
        await arrived.wait()
    finally:
        loop.remove_reader(sock)
    return bool(sock.recv(1, socket.MSG_PEEK))


class _Accepted(Connection):
    """Connection of a listener: a socket until TLS stands, then a protocol."""

    def __init__(self, listener: Listener, sock: socket.socket) -> None:
        self._listener, self._socket = listener, sock
        self._task: asyncio.Task[None] | None = None
        self._protocol: _Protocol | None = None

    def begin(self) -> None:
        """Wait for TLS."""
        self._task = asyncio.create_task(self._listener.secure(self._socket, self), name="tls")
        # not in the task itself: one that is cancelled before its first step runs nothing of its own
        self._task.add_done_callback(self._secured)

    def _secured(self, task: asyncio.Task[None]) -> None:
        self._task = None
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, OSError):  # TimeoutError and ssl.SSLError are OSError
            log.error("a connection could not be taken", exc_info=error)
        if self._protocol is None:
            self._socket.close()
            self._listener.left(self)

    def established(self, protocol: "_Protocol", device: str) -> bool:
        """TLS stands; False when the device has more connections than it may."""
        self._protocol = protocol
        if device:
            return self._listener.connections.verified(self, device)
        self._listener.connections.waits(self)
        return True

    def busy(self, *, busy: bool) -> None:
        """Note that a request is being answered, or that its answer is complete."""
        table = self._listener.connections
        (table.busy if busy else table.waits)(self)

    def went_on(self) -> None:
        """Note that the client sends its body in time: connections that send nothing end before this one."""
        self._listener.connections.went_on(self)

    def lost(self) -> None:
        """Forget it."""
        self._listener.left(self)

    def finish(self) -> None:
        """Close, after the answer that is under way."""
        if self._protocol is None:
            self.end()
        else:
            self._protocol.shutdown()

    def end(self) -> None:
        """Close at once."""
        if self._protocol is not None:
            abort(self._protocol.transport)
        elif self._task is not None:
            self._task.cancel()
        else:
            self._socket.close()
            self._listener.left(self)


class _Protocol(H11Protocol):
    """uvicorn's protocol, with the client's certificate in the scope of each request, and deadlines."""

    def __init__(self, *arguments: Any, accepted: _Accepted, deadlines: Deadlines) -> None:
        super().__init__(*arguments)
        self._accepted, self._deadlines = accepted, deadlines
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._waits_for: Any = None
        self._body_bytes, self._body_since, self._body_paid = 0, 0.0, 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wrap the application of this connection."""
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        der = None if tls is None else tls.getpeercert(binary_form=True)
        chain = [] if der is None else [ssl.DER_cert_to_PEM_cert(der)]
        application = self.app

        async def with_certificate(scope: Any, receive: Any, send: Any) -> None:
            extensions = scope.setdefault("extensions", {})
            extensions["tls"] = {"client_cert_chain": chain}
            await application(scope, receive, send)

        self.app = with_certificate
        if not self._accepted.established(self, "" if der is None else _subject(der)):
            abort(transport)
            return
        self._await(h11.IDLE, self._deadlines.head)

    def data_received(self, data: bytes) -> None:
        """Take bytes, and hold the client to its deadlines."""
        self.server_state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
        self._body_bytes += len(data)
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """Wait for the next request: uvicorn's own timer ends a connection that is idle."""
        super().on_response_complete()
        self._look(idle=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._cancel()
        if self._stall is not None:
            self._stall.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._accepted.lost()

    def pause_writing(self) -> None:
        """Give the client time to take what was sent."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self._deadlines.stalled, abort, self.transport)

    def resume_writing(self) -> None:
        """End that wait."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _look(self, *, idle: bool = False) -> None:
        """Set the deadline for what the client owes now, if anything."""
        if self.transport.is_closing():
            return
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            if self._waits_for is not state:
                self._body_bytes, self._body_since, self._body_paid = 0, self.loop.time(), -1
            paid = self._body_bytes // self._deadlines.body_bytes
            if paid > self._body_paid:
                if paid:
                    self._accepted.went_on()
                self._body_paid = paid
                self._await(state, self._body_since + self._deadlines.body * (1 + paid) - self.loop.time())
        elif state is h11.IDLE:
            self._accepted.busy(busy=False)
            if idle:
                self._cancel()
            elif self._waits_for is not state:
                self._await(state, self._deadlines.head)
        else:
            self._cancel()
            self._accepted.busy(busy=True)

    def _await(self, what: Any, seconds: float) -> None:
        self._cancel()
        self._waits_for = what
        self._timer = self.loop.call_later(seconds, self.transport.close)

    def _cancel(self) -> None:
        self._waits_for = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def abort(transport: asyncio.WriteTransport) -> None:
    """End a connection at once.

    A connection over TLS that was closed twice ends by itself, with the goodbye of TLS; Python before 3.11.4 raises
    AttributeError when asked to abort it.
    """
    with contextlib.suppress(AttributeError):
        transport.abort()


def _subject(der: bytes) -> str:
    """Return the common name of a verified certificate: the device."""
    names = x509.load_der_x509_certificate(der).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def allow_files() -> None:
    """Raise this process's limit on open files as far as it may itself: a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, _FILES_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def files_for_each(listeners: int) -> int:
    """Return how many open files each of this process's listeners may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _FILES_MAX if soft == resource.RLIM_INFINITY else soft
    return max(0, files - _FILES_ELSEWHERE) // listeners


def peer_certificate(scope: Any) -> x509.Certificate | None:
    """Return the verified certificate of a request's client; None where TLS requested none."""
    chain = scope.get("extensions", {}).get("tls", {}).get("client_cert_chain", [])
    return x509.load_pem_x509_certificate(chain[0].encode()) if chain else None
