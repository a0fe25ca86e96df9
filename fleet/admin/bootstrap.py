"""Create a fleet: keys, TUF repository, certificates, the server's configuration and the first operator's token.

The files are made in a temporary directory and moved into place at the end, so that there is a whole fleet or none.
Existing files are never overwritten.
"""

import contextlib
import ipaddress
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.serialization import Encoding

from fleet import ca
from fleet.ca import CaError, CertificateAuthority
from fleet.protocol import names
from fleet.protocol.files import atomic_write, move_into_place
from fleet.server.config import EVERYWHERE, Address, HomeError, ServerConfig, ServerPaths, is_loopback
from fleet.store.sqlite import StoreError
from fleet.store.store import Store
from signing import keys, repository
from signing.errors import SigningError
from signing.keyring import Keyring, recovery_key

OPERATORS_PORT: Final = 8743
DEVICES_PORT: Final = 8744
MQTT_PORT: Final = 8883


class SetupError(Exception):
    """The fleet cannot be created; one line says what, why and what to do."""


@dataclass(frozen=True, slots=True)
class Made:
    """Result of `init`.

    Attributes:
        url: of the API for operators and enrolment.
        warnings: sentences that the operator should read.
        recovery: recovery key of a production fleet, to be printed: shown once and stored nowhere.
    """

    home: Path
    fleet: str
    size: str
    namespace: str
    url: str
    warnings: tuple[str, ...] = ()
    recovery: str = ""


def init(
    home: Path,
    *,
    fleet: str = "fleet",
    size: str = "dev",
    url: str | None = None,
    namespace: str = "main",
    operators_port: int | None = None,
    devices_port: int = DEVICES_PORT,
    mqtt_port: int = MQTT_PORT,
    broker: str = "auto",
    passphrase: bytes | None = None,
    now: datetime | None = None,
) -> Made:
    """Create a fleet in `home`.

    Args:
        home: created when there is none; may hold other files, but no fleet.
        fleet: name; devices refuse assignments of other fleets.
        size: `dev` (keys unencrypted; refused by devices in production mode) or `solo`.
        url: `https://HOST[:PORT]` under which devices reach this machine; loopback when None.
        namespace: of the components that are published with the key made here.
        operators_port: of the API for operators and enrolment; by default that of `url`, or 8743.
        devices_port: of the API for devices.
        mqtt_port: of the broker.
        broker: as in `fleet.server.config.ServerConfig`.
        passphrase: for the offline keys; required for `solo`.
        now: present time, for the dates of certificates and metadata; the clock's when None.

    Raises:
        SetupError: there is a fleet already, the directory cannot be written, or an argument is invalid.
    """
    when = datetime.now(UTC) if now is None else now
    config = configure(fleet, size, url, namespace, operators_port, devices_port, mqtt_port, broker)
    if size == "solo" and not passphrase:
        raise SetupError("a solo fleet needs a passphrase for its root and publisher keys: give one, or use --dev")
    place = ServerPaths(home)
    for taken in (place.operator, place.server):
        if taken.exists():
            raise SetupError(f"{home} holds a fleet already ({taken} exists): use it, or choose another --home")
    try:
        home.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".init-", dir=home))
    except OSError as error:
        raise SetupError(f"cannot write {home}: {error.strerror}; choose another --home") from error
    try:
        recovery = _make(ServerPaths(draft), config, passphrase if size != "dev" else None, when)
        move_into_place(draft / "server", place.server)
        move_into_place(draft / "operator", place.operator)
    except (SigningError, StoreError, HomeError, CaError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SetupError(f"cannot create a fleet in {home}: {why}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    warnings = () if config.production else ("development fleet: every key is stored unencrypted in this home",)
    return Made(home, fleet, size, namespace, config.operators_url, warnings, recovery)


def configure(
    fleet: str,
    size: str,
    url: str | None,
    namespace: str,
    operators_port: int | None,
    devices_port: int,
    mqtt_port: int,
    broker: str,
) -> ServerConfig:
    """Make a server's configuration for `fleet init`. Raises `SetupError`."""
    host, port = ("127.0.0.1", OPERATORS_PORT) if url is None else _asked(url)
    if size == "team":
        raise SetupError("a team's fleet starts as a solo fleet: run fleet init --solo, then fleet sign move team")
    bind = _listening_for(host)
    config = ServerConfig(
        fleet=fleet,
        size=size,
        host=host,
        operators=str(Address(bind, operators_port or port)),
        devices=str(Address(bind, devices_port)),
        mqtt=str(Address(bind, mqtt_port)),
        namespace=namespace,
        broker=broker,
    )
    ports = [Address.parse(bound, "listener").port for bound in (config.operators, config.devices, config.mqtt)]
    if len(set(ports)) < len(ports):
        raise SetupError(f"the ports {', '.join(map(str, ports))} of operators, devices and broker must differ")
    try:
        config.check()
    except HomeError as error:
        raise SetupError(str(error)) from error
    if namespace in repository.RESERVED:
        raise SetupError(f"{namespace!r} is the name of a role and cannot be a namespace")
    return config


def _asked(url: str) -> tuple[str, int]:
    """Return the host and port of a url; raises `SetupError`."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", OPERATORS_PORT if parts.port is None else parts.port
    except ValueError as error:
        raise SetupError(f"the url {url!r} is invalid: {error}") from error
    more = parts.path.rstrip("/") or parts.query or parts.fragment or parts.username or parts.password
    if parts.scheme != "https" or not host or not port or more or "%" in host:
        raise SetupError(f"the url {url!r} must be https://HOST or https://HOST:PORT")
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            raise SetupError(
                f"the url {url!r} is what devices connect to, and nobody connects to {host}: give a name or an address "
                "of this machine; server/server.toml says where the server listens"
            )
    return host, port


def _listening_for(host: str) -> str:
    """Return where to listen so that devices reach `host`: a loopback address itself, else every address."""
    if is_loopback(host):
        return host
    with contextlib.suppress(ValueError):
        if isinstance(ipaddress.ip_address(host), ipaddress.IPv4Address):
            return "0.0.0.0"  # noqa: S104 - devices elsewhere must reach it
    return EVERYWHERE  # a name may have addresses of both families, and may get others


def _make(draft: ServerPaths, config: ServerConfig, passphrase: bytes | None, now: datetime) -> str:
    operator_keys, trust = draft.operator / "keys", draft.operator / "trust"
    inside = (draft.ca, draft.tls, draft.keys, draft.repository, draft.artifacts, draft.broker)
    for directory in (draft.operator, operator_keys, trust, draft.server, *inside):
        directory.mkdir(mode=0o700)
    ca = make_ca(draft, config, passphrase, now)
    ring = Keyring(operator_keys)
    recovery, words = recovery_key() if config.production else (None, "")
    if recovery is not None:
        ring.add("recovery", recovery.public_key)
    files = repository.create(
        fleet=names.check_label(config.fleet, "fleet"),
        namespaces={config.namespace: ring.generate(config.namespace, passphrase=passphrase)[1]},
        root=ring.generate("root", passphrase=passphrase)[1],
        targets=ring.generate("targets", passphrase=passphrase)[1],
        snapshot=keys.generate(draft.keys / "snapshot.pem"),
        timestamp=keys.generate(draft.keys / "timestamp.pem"),
        director=keys.generate(draft.keys / "director.pem"),
        now=now,
        dev=not config.production,
        recovery=None if recovery is None else recovery.public_key,
    )
    for name, data in files.items():
        atomic_write(draft.repository / name, data, mode=0o644)
    atomic_write(draft.config, config.dump(), mode=0o644)
    _make_operator(draft, config, ca, files["1.root.json"], now)
    return words


def make_ca(place: ServerPaths, config: ServerConfig, passphrase: bytes | None, now: datetime) -> CertificateAuthority:
    """Make the fleet's CA: whole on the server for development, else the root's key encrypted with the operator."""
    if passphrase is None:
        return CertificateAuthority.create(place.ca, fleet=config.fleet, now=now)
    root = ca.create(config.fleet, now=now)
    ca.store(place.ca_root, root.key, passphrase)
    atomic_write(place.ca / "ca.pem", root.certificate.public_bytes(Encoding.PEM), mode=0o644)
    issue(place.ca, root, config, now)
    return CertificateAuthority.load(place.ca)


def issue(directory: Path, root: ca.Root, config: ServerConfig, now: datetime) -> None:
    """Issue a server's CA on the machine that has both its directory and the root's key."""
    hosts = (config.host, *(() if config.external_broker is None else (config.external_broker.host,)))
    ca.install(directory, ca.sign(root, ca.request(directory, hosts), now=now), now=now)


def _make_operator(
    draft: ServerPaths, config: ServerConfig, ca: CertificateAuthority, root: bytes, now: datetime
) -> None:
    token = secrets.token_urlsafe(32)
    store = Store.open(draft.database, fleet=config.fleet)
    store.access.add_operator("admin", token, role="admin", now=now.timestamp())
    store.access.audit(actor="init", act="create-fleet", subject=config.fleet, detail=config.size, now=now.timestamp())
    store.close()
    atomic_write(draft.operator / "token", f"{token}\n", mode=0o600)
    atomic_write(draft.operator / "ca.pem", ca.pem, mode=0o644)
    atomic_write(draft.operator / "trust" / "1.root.json", root, mode=0o644)
    lines = (
        f'url = "{config.operators_url}"',
        f'fleet = "{config.fleet}"',
        f'namespace = "{config.namespace}"',
    )
    atomic_write(draft.operator / "config.toml", "\n".join(lines) + "\n", mode=0o644)
