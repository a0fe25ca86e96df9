"""Enrolment of the device in the fleet that its token names, and renewal of its certificate.

The token's secret leaves the device only over a TLS connection verified against the CA whose hash is in the token: a
first connection, without any request, obtains the CA certificate; its hash is compared; a second connection is verified
with it. Keys are made on the device and never leave it. The directory `identity/` is created atomically.
"""

import asyncio
import contextlib
import hashlib
import http.client
import logging
import os
import random
import socket
import ssl
import urllib.parse
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from agent import disk
from agent.clock import ReferenceClock
from agent.config import Paths, packages_of
from agent.disk import Write
from agent.identity.identity import Identity
from agent.link import dialer, https
from agent.link.https import FetchError, FixedTls, HttpsClient, Problem
from agent.proxy import ProxyError
from fleet.protocol import bounds, files, names, wire
from fleet.protocol.codes import RejectCode
from fleet.protocol.messages import (
    EXPIRED,
    OUTDATED,
    REVOKED,
    BadTokenError,
    Enrolled,
    EnrolRequest,
    RenewReply,
    RenewRequest,
    Token,
)
from signing.errors import KeyFileError
from signing.sealing import load, public_key

log = logging.getLogger("agent.identity.enrolment")

CONNECT_S: Final = 20.0
NEW: Final = ".identity.new"
"""Directory in the state directory in which a new identity is prepared."""


class EnrolError(Exception):
    """Enrolment failed; the message says why and what to do."""


def device_name(configured: str = "") -> str:
    """Return the name for this device: the configured one or the host name, made into a valid name."""
    raw = (configured or socket.gethostname().partition(".")[0] or "device").lower()
    cleaned = "".join(char if char.isascii() and (char.isalnum() or char == "-") else "-" for char in raw).strip("-")
    return names.check_label(cleaned[:54] or "device", "device")


def presented_ca(url: str, sha256: str, *, proxy: str = "") -> str:
    """Fetch the CA certificate with a given hash from the chain that a server presents, without sending a request.

    Args:
        url: `https://host:port`.
        sha256: hash of the CA certificate (DER) in hex.
        proxy: see `HttpsClient`.

    Returns:
        The certificate as PEM.

    Raises:
        EnrolError: the server is unreachable, or presents another CA.
    """
    split = urllib.parse.urlsplit(url)
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    host, port = split.hostname or "", split.port or 443
    try:
        with (
            dialer.connect(host, port, timeout_s=CONNECT_S, proxy=dialer.proxy_for(host, proxy)) as plain,
            blind.wrap_socket(plain, server_hostname=host) as connection,
        ):
            chain = _chain(connection)
    except ssl.SSLError as error:
        raise EnrolError(
            f"{url} does not speak TLS ({https.why(error)}): check the address and port in the token, and that no "
            "login page of this network answers in place of the server"
        ) from error
    except ProxyError as error:
        raise EnrolError(f"cannot reach {url}: {error}") from error
    except OSError as error:
        raise EnrolError(
            f"cannot reach {url}: {error.strerror or error}; check that 'fleet serve' runs there"
        ) from error
    for certificate in chain:
        if hashlib.sha256(certificate).hexdigest() == sha256:
            return ssl.DER_cert_to_PEM_cert(certificate)
    raise EnrolError(
        f"the server at {url} does not present the CA that the token names: "
        "the server belongs to another fleet, or the connection is intercepted"
    )


def _chain(connection: ssl.SSLSocket) -> list[bytes]:
    if hasattr(connection, "get_unverified_chain"):  # Python 3.13
        return list(connection.get_unverified_chain())
    inner: Any = connection._sslobj  # type: ignore[attr-defined]  # noqa: SLF001 - public since Python 3.13
    return [ssl.PEM_cert_to_DER_cert(each.public_bytes()) for each in inner.get_unverified_chain() or ()]


def certificate_request(key: ec.EllipticCurvePrivateKey, name: str) -> str:
    """Make a PKCS#10 request (PEM) for the device key; the server uses only its public key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.PEM).decode()


def _private_pem(key: ec.EllipticCurvePrivateKey | X25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _keys(fresh: Path, token_sha256: str) -> tuple[ec.EllipticCurvePrivateKey, X25519PrivateKey]:
    """Load or make the device and sealing keys for a token; they are on disk before their public halves are sent.

    A device that did not receive the server's answer asks again with the same key, which the server recognises.
    """
    with contextlib.suppress(OSError, ValueError, TypeError):
        if files.read_text(fresh / "token.sha256") == token_sha256:
            key = load_pem_private_key(files.read(fresh / "device.key"), password=None)
            sealing = load_pem_private_key(files.read(fresh / "sealing.key"), password=None)
            if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(sealing, X25519PrivateKey):
                return key, sealing
    disk.remove_tree(Write.NEW_IDENTITY, fresh)
    disk.make_directory(Write.NEW_IDENTITY, fresh, mode=0o700)
    key, sealing = ec.generate_private_key(ec.SECP256R1()), X25519PrivateKey.generate()
    disk.write(Write.NEW_KEY, fresh / "device.key", _private_pem(key), mode=0o600)
    disk.write(Write.NEW_KEY, fresh / "sealing.key", _private_pem(sealing), mode=0o600)
    disk.write(Write.NEW_FILE, fresh / "token.sha256", token_sha256, mode=0o600)
    return key, sealing


def enrol(
    text: str, *, state: Path, name: str, production: bool, force: bool = False, machine: str = "", proxy: str = ""
) -> Identity:
    """Join the fleet that a token names.

    Args:
        text: the token.
        state: the agent's state directory; `identity/` is created in it.
        name: for this device.
        production: refuse fleets made for development.
        force: discard an existing identity, with the whole state of the old fleet.
        machine: id of the machine, to detect a copied disk later.
        proxy: see `HttpsClient`.

    Raises:
        EnrolError: the token is bad, expired or refused, the server is not the one that it names, or a file cannot be
            written.
    """
    directory = state / "identity"
    if (directory / "enrolled.json").exists() and not force:
        raise EnrolError(f"this device is already enrolled ({directory}): --force discards its identity and state")
    try:
        token = Token.decode(text)
    except BadTokenError as error:
        raise EnrolError(f"{error}; 'fleet enroll-token' makes another") from error
    now = max(datetime.now(UTC), token.floor)
    if now >= token.expires:
        raise EnrolError(f"the token expired on {token.expires:%Y-%m-%d %H:%M} UTC: ask for a new one")
    try:
        key, sealing = _keys(state / NEW, hashlib.sha256(text.strip().encode()).hexdigest())
        enrolled, ca_pem = _ask(token, key, sealing, name, machine, proxy)
        identity = _checked(token, enrolled, key, production=production, machine=machine)
        files = {
            "device.pem": enrolled.certificate_pem.encode(),
            "ca.pem": ca_pem.encode(),
            "mac.key": os.urandom(32),
            "root.json": enrolled.root.encode(),
            "enrolled.json": msgspec.json.encode(identity),
        }
        _install(state, files)
    except OSError as error:
        raise EnrolError(f"cannot write {directory}: {error.strerror}") from error
    return identity


def enrolled_with(text: str, who: Identity) -> bool:
    """Return whether an identity was made with this token: its time floor is the identity's."""
    with contextlib.suppress(BadTokenError):
        token = Token.decode(text)
        return (token.fleet, token.floor) == (who.fleet, who.floor)
    return False


def _ask(
    token: Token, key: ec.EllipticCurvePrivateKey, sealing: X25519PrivateKey, name: str, machine: str, proxy: str
) -> tuple[Enrolled, str]:
    ca_pem = presented_ca(token.url, token.ca_sha256, proxy=proxy)
    floor = token.floor if ReferenceClock(token.floor).behind else None
    client = HttpsClient(token.url, FixedTls(https.context(ca_pem, clock_behind=floor is not None), floor), proxy=proxy)
    sealing_key = public_key(sealing)
    request = EnrolRequest(
        secret=token.secret,
        name=name,
        csr_pem=certificate_request(key, name),
        sealing_key=sealing_key,
        sealing_proof=_proof(_private_pem(key), token.fleet, sealing_key),
        machine=machine,
    )
    try:
        answer = client.request(
            "POST",
            "/v1/enrol",
            body=wire.encode(request),
            headers={"Content-Type": "application/json"},
            max_bytes=bounds.API_BODY_MAX_BYTES,
        )
        return wire.decode(Enrolled, answer), ca_pem
    except FetchError as error:
        raise EnrolError(_refusal(error, token)) from error
    except wire.WireError as error:
        raise EnrolError(f"the server's answer cannot be read: {error}") from error


def _refusal(error: FetchError, token: Token) -> str:
    if error.code is RejectCode.NOT_FOUND:
        return f"{token.url} offers no enrolment: check the address in the token"
    if words := Problem.read(error.body).words:
        return words
    return f"the server refused: {error.message}"


def _checked(
    token: Token, enrolled: Enrolled, key: ec.EllipticCurvePrivateKey, *, production: bool, machine: str
) -> Identity:
    """Check the server's answer against the token and the request."""
    if hashlib.sha256(enrolled.root.encode()).hexdigest() != token.root_sha256:
        raise EnrolError("the server sent a different trust root than the token names: do not use this server")
    if enrolled.fleet != token.fleet:
        raise EnrolError(f"the server belongs to fleet {enrolled.fleet!r}, but the token to {token.fleet!r}")
    if production and not enrolled.production:
        raise EnrolError(
            "this fleet is for development, but the device is in production mode (production = true in agent.toml)"
        )
    try:
        certificate = x509.load_pem_x509_certificate(enrolled.certificate_pem.encode())
        (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        names.check_device(enrolled.device)
    except (ValueError, names.BadNameError) as error:
        raise EnrolError(f"the certificate that the server issued cannot be used: {error}") from error
    if certificate.public_key() != key.public_key() or name.value != enrolled.device:
        raise EnrolError("the server issued a certificate for another key or another device")
    return Identity(
        device=enrolled.device,
        fleet=enrolled.fleet,
        group=enrolled.group,
        devices_url=enrolled.devices_url,
        mqtt=enrolled.mqtt,
        production=enrolled.production,
        floor=token.floor,
        machine=machine,
    )


def _install(state: Path, files: dict[str, bytes]) -> None:
    """Install the new identity atomically, after removing everything of an old one."""
    fresh, final = state / NEW, state / "identity"
    for name, data in files.items():
        disk.write(Write.NEW_FILE, fresh / name, data, mode=0o600)
    if final.exists():
        discard_identity(state)
    disk.move(Write.IDENTITY, fresh, final)
    # Not before: after a power cut the device asks again with the same keys, as the token is spent for all others.
    disk.remove(Write.TOKEN_SPENT, final / "token.sha256")


def discard_identity(state: Path) -> None:
    """Remove an identity and all state that belongs to it."""
    disk.remove(Write.IDENTITY_DROPPED, state / "identity" / "enrolled.json", missing_ok=True)
    discard_state(state)
    disk.remove_tree(Write.IDENTITY_DROPPED, state / "identity")


def discard_state(state: Path) -> None:
    """Remove the state of an identity: its counters and metadata are not valid in another fleet."""
    for name in ("store.db", "store.db-wal", "store.db-shm", "runset.json"):
        disk.remove(Write.STATE_DROPPED, state / name, missing_ok=True)
    for name in ("trust", "images", "artifacts", "bundle", "secrets", "readings"):
        disk.remove_tree(Write.STATE_DROPPED, state / name)
    for path in packages_of(state).glob("*"):
        disk.remove(Write.STATE_DROPPED, path, missing_ok=True)


def renewal_request(identity: Path, device: str) -> str:
    """Make a certificate request for the existing device key; raises `OSError`."""
    return certificate_request(_load_key(identity), device)


def sealing_proof(identity: Path, fleet: str) -> str:
    """Sign the device's statement about its sealing key; empty if that key cannot be read. Raises `OSError`."""
    try:
        key = public_key(load(files.read(identity / "sealing.key")))
    except (OSError, KeyFileError):
        return ""
    return _proof(files.read(identity / "device.key"), fleet, key)


def _proof(device_key: bytes, fleet: str, sealing_key: str) -> str:
    from signing.device_statements import DeviceSigner  # noqa: PLC0415
    from signing.sealing import prove  # noqa: PLC0415 - needed only to enrol and renew

    return prove(DeviceSigner(device_key), fleet=fleet, sealing_key=sealing_key).decode()


def _load_key(identity: Path) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(files.read(identity / "device.key"), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def renew_at(identity: Path) -> datetime:
    """Return when to renew the device certificate: after two thirds of its life. Raises `OSError`, `ValueError`."""
    certificate = x509.load_pem_x509_certificate(files.read(identity / "device.pem"))
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return certificate.not_valid_before_utc + life * 2 / 3


LIFE_MAX: Final = timedelta(days=91)
"""No server gives a device a certificate for longer, but one whose clock is ahead."""


def renewal_due(identity: Path, clock: ReferenceClock) -> bool:
    """Return whether to renew: two thirds of a life are over, or the server had a wrong clock when it issued.

    Raises:
        OSError, ValueError: the certificate cannot be read.
    """
    now = clock.now()
    if now >= renew_at(identity):
        return True
    certificate = x509.load_pem_x509_certificate(files.read(identity / "device.pem"))
    wrong = certificate.not_valid_before_utc > now or certificate.not_valid_after_utc - now > LIFE_MAX
    return wrong and clock.is_trustworthy()


def wants_renewal(error: FetchError) -> bool:
    """Return whether the server refused the device's certificate for a reason that renewal fixes."""
    return error.status == http.client.FORBIDDEN and problem_of(error) in {EXPIRED, OUTDATED}


def problem_of(error: FetchError) -> str:
    """Return the type of the problem that the server answered with; empty where the answer is none."""
    return Problem.read(error.body).type


def exclusion(error: FetchError) -> str:
    """Return why the fleet's server takes this device for none of its own, and what to do; empty where it does not."""
    problem = Problem.read(error.body)
    if error.status not in {http.client.UNAUTHORIZED, http.client.FORBIDDEN} or wants_renewal(error):
        return ""
    if problem.type == REVOKED:
        return (
            "the fleet has revoked this device: it gets no updates, commands or secrets, and what runs here goes on; "
            "if that is a mistake, ask for a new token and run 'fleet-agent enroll --force'"
        )
    return f"the fleet's server refuses this device: {problem.words or error.message}"


def install_certificate(identity: Path, pem: str) -> None:
    """Install a renewed certificate, after checking that it is for this device's key.

    Raises:
        EnrolError: the certificate cannot be read, or is for another key.
        OSError: the file cannot be written.
    """
    try:
        renewed = x509.load_pem_x509_certificate(pem.encode())
    except ValueError as error:
        raise EnrolError(f"the renewed certificate cannot be read: {error}") from error
    if renewed.public_key() != _load_key(identity).public_key():
        raise EnrolError("the renewed certificate is for another key; the old one stays in use")
    disk.write(Write.CERTIFICATE, identity / "device.pem", pem.encode(), mode=0o600)


RENEW_CHECK_S: Final = 6 * 3600.0


class Retries(Protocol):
    """Connection that may have been refused with the old certificate (`agent.link.mqtt.MqttClient`)."""

    def retry(self) -> None:
        """Reconnect now."""


class CertificateRenewal:
    """Renewal of the device certificate: at two thirds of its life, and when the server demands it.

    Attributes:
        renewed: set after each renewal; the reader clears it.
    """

    name = "certificate renewal"

    def __init__(
        self, *, places: Paths, identity: Identity, https: HttpsClient, clock: ReferenceClock, mqtt: Retries
    ) -> None:
        """Prepare renewal over `https`; each renewal reconnects to the broker."""
        self._places = places
        self._identity = identity
        self._https = https
        self._clock = clock
        self._mqtt = mqtt
        self._requested = asyncio.Event()
        self.renewed = asyncio.Event()

    def request(self) -> None:
        """Renew now, because the server refuses the certificate as outdated."""
        self._requested.set()

    async def run(self) -> None:
        """Renew whenever it is due, forever."""
        while True:
            requested = self._requested.is_set()
            self._requested.clear()
            try:
                if requested or await asyncio.to_thread(renewal_due, self._places.identity, self._clock):
                    await asyncio.to_thread(renew_now, self._places, self._https, self._identity)
                    log.info("the device certificate was renewed")
                    self._mqtt.retry()
                    self.renewed.set()
            except (FetchError, EnrolError, OSError, ValueError, wire.WireError, msgspec.MsgspecError) as error:
                log.warning("the device certificate could not be renewed: %s", error)
            with contextlib.suppress(TimeoutError):
                jitter = random.uniform(0.8, 1.2)  # noqa: S311 - jitter, not a secret
                async with asyncio.timeout(RENEW_CHECK_S * jitter):
                    await self._requested.wait()


def renew_now(places: Paths, https: HttpsClient, who: Identity) -> None:
    """Request a new certificate for the same key and install it. Raises `FetchError`, `EnrolError` and `OSError`."""
    answer = https.request(
        "POST",
        "/v1/renew",
        body=wire.encode(
            RenewRequest(
                csr_pem=renewal_request(places.identity, who.device),
                sealing_proof=sealing_proof(places.identity, who.fleet),
            )
        ),
        headers={"Content-Type": "application/json"},
        max_bytes=bounds.API_BODY_MAX_BYTES,
    )
    try:
        reply = msgspec.json.decode(answer, type=RenewReply)
    except wire.JSON_ERRORS as error:
        raise EnrolError(f"the server's answer to the renewal cannot be read: {error}") from error
    install_certificate(places.identity, reply.certificate_pem)
