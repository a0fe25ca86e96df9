"""Listeners: ports bound early, TLS with certificates that renew themselves, uvicorn, client certificates.

No other module uses uvicorn's internals. uvicorn does not pass a TLS client's certificate on, so its protocol class is
extended to put the certificate into the ASGI scope, at the place of the ASGI TLS extension:
`scope["extensions"]["tls"]["client_cert_chain"]`, PEM, leaf first. TLS has verified it against the listener's CA
before a byte of the request is read. A test with real TLS guards this against a change in uvicorn.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from functools import partial
from typing import Any, Final

import uvicorn
from cryptography import x509
from uvicorn.protocols.http.h11_impl import H11Protocol

from fleet.ca import SERVER_LIFE, CertificateAuthority, due
from fleet.protocol.files import atomic_write
from fleet.server.clock import ServerClock
from fleet.server.config import Address, ServerPaths

log = logging.getLogger(__name__)
_NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME: a device with an expired certificate may still renew; the routes check the dates."""

_END_S: Final = 5.0


class PortError(Exception):
    """The port cannot be bound; one line says what, why and what to do."""


def bind(where: str, what: str) -> socket.socket:
    """Bind a port.

    Raises:
        PortError: the port is in use, or may not be bound.
    """
    address = Address.parse(where, what)
    sock = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address.host, address.port))
        # without listen() a second socket with SO_REUSEADDR could take the same port
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise PortError(
            f"{what} cannot listen at {address}: {(error.strerror or str(error)).lower()}; "
            "end the program that has the port, or change it in server/server.toml"
        ) from error
    sock.setblocking(False)
    return sock


class Certificates:
    """The listeners' certificate, and the server's own for its broker.

    Made anew when two thirds of a life are over, when a wrong clock dated them, and when they or their keys are
    damaged. While the clocks disagree a certificate is valid by both.
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
    """Application on one socket."""

    def __init__(self, application: Any, sock: socket.socket, context: ssl.SSLContext) -> None:
        config = uvicorn.Config(
            application,
            http=PeerCertificateProtocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="critical",  # errors of routes are logged by the routes
            server_header=False,
            ssl_context_factory=lambda _config, _default: context,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
        )
        self._server = _Uvicorn(config)
        self._socket = sock
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start serving, and return once it does."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._task.done():
                await self._task
                raise RuntimeError("a listener ended at once")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Wait briefly for requests to finish, then close."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_END_S)


class _Uvicorn(uvicorn.Server):
    """Server of uvicorn without its signal handlers: the process has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """Install no signal handlers."""
        yield


class PeerCertificateProtocol(H11Protocol):
    """Protocol of uvicorn that puts the client's certificate into the scope of each request."""

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


def peer_certificate(scope: Any) -> x509.Certificate | None:
    """Return the verified certificate of a request's client; None where TLS requested none."""
    chain = scope.get("extensions", {}).get("tls", {}).get("client_cert_chain", [])
    return x509.load_pem_x509_certificate(chain[0].encode()) if chain else None
