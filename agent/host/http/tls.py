"""TLS terminator: a process that speaks TLS with clients of the shared port and passes plain bytes to the router.

It alone holds the keys of the device owner's certificates, which it reads before it confines itself; it parses no HTTP.
For each client it makes a pair of connected sockets, gives one end to the router together with the client's address
(`TlsClient`), and moves bytes between the other end and the client. When certificates change, the supervisor starts
another terminator on the same listening socket and closes the socket of this one, which then accepts no more and ends
with its last client: no request is cut.

A client may end its sending side, by TLS's close_notify or TCP's end, and still gets its answers, as on the plain port.
"""

import asyncio
import socket
import ssl
from asyncio import sslproto
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.host.http.ingress_config import READY, Certificate, IngressError
from agent.host.http.router import ACCEPT_PAUSE_S, NO_RESOURCES
from agent.host.http.routing import plain_address
from agent.host.ipc import framing
from agent.host.ipc.helper_api import TlsClient
from agent.host.sandbox import sandbox
from fleet.protocol import bounds, files

_CLIENTS_MAX: Final = 1024
_HANDSHAKE_S: Final = 10
_SHUTDOWN_S: Final = 60
"""Time for a client to read what was written before the end; as long as the router lets one stall."""

_HIGH_BYTES: Final = 256 * 1024
_LOW_BYTES: Final = 192 * 1024  # a slow client takes its answer in small steps, for the judgement in `pace`
_MISMATCH: Final = frozenset({"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"})
"""Reasons of OpenSSL for a key of another certificate: of the same kind, or of another."""


class _EncryptedError(Exception):
    """The key needs a passphrase."""


def contexts(certificates: Sequence[Certificate]) -> ssl.SSLContext:
    """Load certificates into a context that picks one by the name for which a client asks.

    Raises:
        IngressError: a file cannot be read, or is no certificate or not its key.
    """
    by_name: dict[str, ssl.SSLContext] = {}
    made = [_context(each) for each in certificates]
    for certificate, context in zip(certificates, made, strict=True):
        for name in certificate.names:
            by_name.setdefault(name.lower().removeprefix("*"), context)

    def pick(connection: Any, name: str | None, _context: ssl.SSLContext) -> None:
        found = _named(by_name, (name or "").lower().rstrip("."))
        if found is not None:
            connection.context = found

    made[0].sni_callback = pick
    return made[0]


def _named(by_name: dict[str, ssl.SSLContext], name: str) -> ssl.SSLContext | None:
    """Find the context for a name: its own, or that of a wildcard, which stands for one label."""
    return by_name.get(name) or by_name.get("." + name.partition(".")[2])


def _context(certificate: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    where = f"certificate {certificate.certificate} with key {certificate.key}"
    try:
        for each in (certificate.certificate, certificate.key):
            files.read(Path(each), max_bytes=bounds.MIB)  # OpenSSL would wait for a named pipe
        context.load_cert_chain(certificate.certificate, certificate.key, password=_no_password)
    except _EncryptedError:
        why = "the key is encrypted, and the host can ask nobody for its passphrase; decrypt it with 'openssl pkey'"
        raise IngressError(f"cannot use {where}: {why}") from None
    except ssl.SSLError as error:
        why = (
            "the key does not belong to the certificate"
            if error.reason in _MISMATCH
            else "one of them is not valid PEM"
        )
        raise IngressError(f"cannot use {where}: {why}: {error.reason or error}") from error
    except OSError as error:
        raise IngressError(f"cannot read {where}: {error.strerror or error}") from error
    return context


def _no_password() -> str:
    raise _EncryptedError


def run_terminator(
    listener: socket.socket, sock: socket.socket, to_router: socket.socket, certificates: Sequence[Certificate]
) -> None:
    """Run the terminator in a process just forked from the supervisor, which it tells `READY`, or why it cannot."""
    sandbox.begin_helper({each.fileno() for each in (listener, sock, to_router)})
    try:
        context = contexts(certificates)
    except IngressError as error:
        framing.send_packet(sock, str(error).encode())
        return
    loop = asyncio.SelectorEventLoop()
    asyncio.set_event_loop(loop)
    sandbox.apply(sandbox.tls_spec())
    framing.send_packet(sock, READY)
    loop.run_until_complete(Terminator(listener, sock, to_router, context).run())


class Terminator:
    """Accepts clients of TLS and passes them on."""

    def __init__(
        self, listener: socket.socket, sock: socket.socket, to_router: socket.socket, context: ssl.SSLContext
    ) -> None:
        self._listener = listener
        self._sock = sock
        self.to_router = to_router
        self._context = context
        self._count = 0
        self._accepting = False
        self._retired = False
        self._ended = asyncio.Event()
        self._handshakes: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until the supervisor closes its end of the socket and the last client has gone."""
        loop = asyncio.get_running_loop()
        for sock in (self._listener, self._sock, self.to_router):
            sock.setblocking(False)
        loop.add_reader(self._sock, self._retire)
        self._accept_again()
        await self._ended.wait()

    def _retire(self) -> None:
        """Accept no more: the supervisor has closed its end."""
        asyncio.get_running_loop().remove_reader(self._sock)
        self._retired = True
        self._pause()
        self._listener.close()
        if not self._count:
            self._ended.set()

    def _accept_again(self) -> None:
        if not self._accepting and not self._retired and self._count < _CLIENTS_MAX:
            self._accepting = True
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _pause(self) -> None:
        if self._accepting:
            self._accepting = False
            asyncio.get_running_loop().remove_reader(self._listener)

    def _accept(self) -> None:
        if self._count >= _CLIENTS_MAX:  # the others wait at the listener until one has gone
            self._pause()
            return
        try:
            sock, address = self._listener.accept()
        except BlockingIOError:  # another terminator took it
            return
        except OSError as error:
            if error.errno in NO_RESOURCES:  # as in `router.Acceptor`
                self._pause()
                asyncio.get_running_loop().call_later(ACCEPT_PAUSE_S, self._accept_again)
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._count += 1
        task = asyncio.ensure_future(self._shake_hands(sock, plain_address(address[0])))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _shake_hands(self, sock: socket.socket, address: str) -> None:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        tls = _HalfOpenTls(
            loop,
            _ClientSide(self, address),
            self._context,
            waiter,
            server_side=True,
            ssl_handshake_timeout=_HANDSHAKE_S,
            ssl_shutdown_timeout=_SHUTDOWN_S,
        )
        transport = _transport(sock, tls)
        try:
            await waiter
        except (TimeoutError, OSError, ssl.SSLError):  # no client of TLS, or none that stays
            transport.close()
            self.gone()

    def gone(self) -> None:
        """Take note that a client has gone."""
        self._count -= 1
        if self._retired and not self._count:
            self._ended.set()
        self._accept_again()


def _transport(sock: socket.socket, protocol: asyncio.BaseProtocol) -> Any:
    """Make a transport at once, without the task of connect_accepted_socket: it reads from the next turn on."""
    loop: Any = asyncio.get_running_loop()
    return loop._make_socket_transport(sock, protocol)  # noqa: SLF001 - the loop offers it by coroutines alone


class _HalfOpenTls(sslproto.SSLProtocol):
    """TLS whose peer may end its sending side and goes on reading; asyncio's own closes the connection then.

    The end of TCP alone ends the sending side too, although anybody on the way can forge that: by its own framing a
    request is whole, or reaches no guest.
    """

    _app_protocol: Any
    _do_read: Any
    _sslobj: Any
    _state: Any
    _has_ended = False

    def _do_read__copied(self) -> None:
        """Pass on what has come, and the end of it, once."""
        try:
            while data := self._sslobj.read(self.max_size):
                self._app_protocol.data_received(data)
        except sslproto.SSLAgainErrors:
            if not self._eof_received:
                return
        if not self._has_ended:
            self._has_ended = True
            self._app_protocol.eof_received()

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio's own says it too
        """Take the end of TCP's one half; return whether the other stays open."""
        if self._state is not sslproto.SSLProtocolState.WRAPPED:
            super().eof_received()
            return None
        self._eof_received = True
        self._do_read()
        return True


class _Side(asyncio.Protocol):
    """Side of a client's connection: what it reads, the other sends."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.other: _Side | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.set_write_buffer_limits(high=_HIGH_BYTES, low=_LOW_BYTES)

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def eof_received(self) -> bool:
        return False  # closes, once what was written is sent

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        other, self.other = self.other, None
        if other is not None:
            other.other = None
            other.transport.close()


class _RouterSide(_Side):
    """End of the pair whose other end the router has."""


class _ClientSide(_Side):
    """Client, decrypted."""

    def __init__(self, terminator: Terminator, address: str) -> None:
        super().__init__()
        self._terminator = terminator
        self._address = address

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        try:
            ours, theirs = socket.socketpair()
        except OSError:  # no descriptor left
            self.transport.abort()
            return
        try:
            message = msgspec.json.encode(TlsClient(self._address))
            framing.send_packet(self._terminator.to_router, message, (theirs.fileno(),))
        except OSError:  # the router has as many waiting as it can
            ours.close()
            self.transport.abort()
            return
        finally:
            theirs.close()
        ours.setblocking(False)
        router = _RouterSide()
        router.other, self.other = self, router
        router.transport = _transport(ours, router)  # there must be one before the first bytes come

    def eof_received(self) -> bool:
        if self.other is not None and not self.other.transport.is_closing():
            self.other.transport.write_eof()
        return False  # asyncio would warn of anything else

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._terminator.gone()
