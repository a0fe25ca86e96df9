"""The listeners: ports taken early, TLS of the fleet's CA with certificates that renew themselves, uvicorn on top."""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

import uvicorn
from cryptography import x509

from fleet.ca import CertificateAuthority, due, write_secret
from fleet.server.home import Address, Home
from fleet.server.peercert import PeerCertificateProtocol

log = logging.getLogger(__name__)
_NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME: a board with an expired certificate may still renew; the routes check the dates."""
_END_S: Final = 5.0


class PortError(Exception):
    """A port cannot be taken; one line: what, why, what to do."""


def bind(where: str, what: str) -> socket.socket:
    """Take a port.

    Raises:
        PortError: it is in use, or may not be taken.
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
    """The listeners' certificate, and the server's own for its broker. Made anew when two thirds of a life are over."""

    def __init__(self, home: Home, ca: CertificateAuthority, host: str, clock: Callable[[], datetime]) -> None:
        self._tls = home.tls
        self._authority = home.ca / "ca.pem"
        self._ca, self._host, self._clock = ca, host, clock
        self._contexts: list[ssl.SSLContext] = []
        self.client = home.tls / "mqtt-both.pem"
        self.renew()

    def renew(self) -> bool:
        """Make anew what is due; connections from now on see it. True when something was."""
        now = self._clock()
        changed = False
        for name in ("server", "mqtt"):
            path = self._tls / f"{name}.pem"
            if path.exists() and not self._outdated(path.read_bytes(), now):
                continue
            if self._ca.issuer.not_valid_after_utc <= now and path.exists():
                log.error("the issuing CA has ended: fleet ca renew")
                continue
            server = name == "server"
            pair = self._ca.server([self._host], now=now) if server else self._ca.server_client(now=now)
            write_secret(self._tls / f"{name}.key", pair.key_pem)
            path.write_bytes(pair.certificate_pem)
            changed = True
        write_secret(self.client, (self._tls / "mqtt.pem").read_bytes() + (self._tls / "mqtt.key").read_bytes())
        if changed:
            for context in self._contexts:
                self._load(context)
        return changed

    def _outdated(self, pem: bytes, now: datetime) -> bool:
        """Whether a certificate is due, or of an issuing CA that is not the newest."""
        leaf = x509.load_pem_x509_certificate(pem)
        return leaf.issuer != self._ca.issuer.subject or not self._ca.accepts(leaf) or due(pem, now=now)

    def context(self, *, devices: bool) -> ssl.SSLContext:
        """For one listener; the one for boards asks for a certificate of the fleet's CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load(context)
        # With the CA in its store, OpenSSL shows it in the chain: a board that enrols compares it with its token's hash
        # before it says anything (`agent.enroll.presented_ca`).
        context.load_verify_locations(self._authority)
        if devices:
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
        self._contexts.append(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        context.load_cert_chain(self._tls / "server.pem", self._tls / "server.key")


class Listener:
    """One application on one socket."""

    def __init__(self, application: Any, sock: socket.socket, context: ssl.SSLContext) -> None:
        config = uvicorn.Config(
            application,
            http=PeerCertificateProtocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="critical",  # what a route raises is logged by the route itself
            server_header=False,
            ssl_context_factory=lambda _config, _default: context,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
        )
        self._server = _Uvicorn(config)
        self._socket = sock
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when it serves."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._task.done():
                await self._task
                raise RuntimeError("a listener ended at once")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Let requests end for a moment, then close."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_END_S)


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: the process has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """Leave signals alone."""
        yield
