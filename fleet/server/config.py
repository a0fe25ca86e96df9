"""Files of a server, `<home>/server`, and its configuration, `server.toml`.

server.toml   this configuration
ca/           the fleet's CA: the root's certificate and the issuing CA (in a development fleet, the root's key)
tls/          the listeners' certificate, and the server's own for its broker
keys/         director, snapshot, timestamp
repository/   TUF metadata, one file per version; timestamp.json is the head
artifacts/    components by sha256
broker/       the broker's configuration and persistence
fleet.db      everything else
"""

import functools
import ipaddress
import socket
import tomllib
import urllib.parse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from fleet.protocol import names
from fleet.protocol.files import RESTORE, damage
from fleet.server.limits import Between, LimitError, ServerLimits, check_number

FORMAT: Final = 1
SIZES: Final = ("dev", "solo", "team")
BROKERS: Final = ("auto", "mosquitto", "embedded")
_PORT_MAX: Final = 65_535
_PORT_DIGITS: Final = 5
_KEEP_DAYS: Final = Between(1, 36_500)
EVERYWHERE: Final = "::"
"""Every address of the machine, those of IPv4 too; `0.0.0.0` is those of IPv4 alone."""


class HomeError(Exception):
    """The home cannot be used; one line says what, why and what to do."""


class ChoiceError(HomeError):
    """No server is in the home that was named, or no broker is of the kind that was named."""


@dataclass(frozen=True, slots=True)
class Address:
    """Address of a listener, or of a peer."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, what: str) -> "Address":
        """Read `host:port` or `[v6]:port`.

        Raises:
            HomeError: the text has neither form.
        """
        host, colon, port = text.rpartition(":")
        host = host.strip("[]")
        number = int(port) if port.isascii() and port.isdigit() and len(port) <= _PORT_DIGITS else _PORT_MAX + 1
        if not colon or not host or number > _PORT_MAX:
            raise HomeError(f"{what} {text!r} is not an address: write host:port")
        return cls(host, number)

    @property
    def loopback(self) -> bool:
        """Tell whether the address is reachable only from this machine."""
        return is_loopback(self.host)

    @property
    def here(self) -> "Address":
        """Where this machine reaches what listens at this address."""
        any_of_ours = {"0.0.0.0": "127.0.0.1", EVERYWHERE: "::1" if has_ipv6() else "127.0.0.1"}  # noqa: S104 - asked
        return Address(any_of_ours.get(self.host, self.host), self.port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """`server.toml`.

    Attributes:
        size: `dev`, `solo` or `team`.
        host: name or address under which devices reach this machine.
        operators, devices, mqtt: where the listeners bind, `host:port`.
        broker: `auto` (Mosquitto when it is on PATH, else the embedded one in a development fleet), `mosquitto`,
            `embedded`, or `mqtts://host:port` of an external one.
        mqtt_websocket: `wss://host:port/path` at which devices reach the same broker over WebSocket; empty for none.
        keep_days: days for which reports and events are kept.
        limits: the table `[limits]`.
    """

    fleet: str
    size: str
    host: str
    operators: str
    devices: str
    mqtt: str
    namespace: str = "main"
    broker: str = "auto"
    mqtt_websocket: str = ""
    keep_days: int = 90
    format: int = FORMAT
    limits: ServerLimits = field(default_factory=ServerLimits)

    @property
    def production(self) -> bool:
        """Tell whether devices in production accept this fleet."""
        return self.size != "dev"

    @property
    def operators_url(self) -> str:
        """URL of the API for operators and enrolment."""
        return f"https://{self._reach(self.operators, 'operators')}"

    @property
    def devices_url(self) -> str:
        """URL of the API for enrolled devices."""
        return f"https://{self._reach(self.devices, 'devices')}"

    @property
    def mqtt_urls(self) -> tuple[str, ...]:
        """URLs of the broker, in the order to try."""
        plain = self._reach(self.mqtt, "mqtt") if self.external_broker is None else self.external_broker
        return (f"mqtts://{plain}", *((self.mqtt_websocket,) if self.mqtt_websocket else ()))

    @property
    def external_broker(self) -> Address | None:
        """Address of an external broker; None for the server's own."""
        if self.broker in BROKERS:
            return None
        try:
            return Address.parse(self.broker.removeprefix("mqtts://"), "broker")
        except HomeError:
            raise ChoiceError(
                f"broker {self.broker!r} is unknown: write {', '.join(BROKERS)}, or mqtts://HOST:PORT"
            ) from None

    def _reach(self, bind: str, what: str) -> Address:
        return Address(self.host, Address.parse(bind, what).port)

    def dump(self) -> str:
        """Render as TOML; of the limits only those that are not the default."""
        unset = {"limits", *(() if self.mqtt_websocket else ("mqtt_websocket",))}
        lines = [f"{each.name} = {_toml(getattr(self, each.name))}" for each in fields(self) if each.name not in unset]
        if changed := self.limits.changed:
            lines += ["", "[limits]", *(f"{key} = {value}" for key, value in changed.items())]
        return "# How this server runs. Restart `fleet serve` after a change.\n" + "\n".join(lines) + "\n"

    @classmethod
    def load(cls, path: Path) -> "ServerConfig":
        """Read `server.toml`.

        Raises:
            HomeError: missing, not TOML, of another version, or with an unknown key or an invalid value.
        """
        values = _read(path)
        found = values.get("format", FORMAT)
        if found != FORMAT:
            raise HomeError(
                f"{path.parent} was made by another wasmfleet (format {found}, this one knows {FORMAT}): upgrade it"
            )
        known = {each.name: each.type for each in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise HomeError(f"{path}: unknown key {name!r}; known are {', '.join(known)}")
            if known[name] is str and not isinstance(value, str):
                raise HomeError(f"{path}: {name} must be text")
        missing = [name for name in ("fleet", "size", "host", "operators", "devices", "mqtt") if name not in values]
        if missing:
            raise HomeError(f"{path}: {missing[0]} is missing; add it, or {RESTORE}")
        try:
            config = cls(**{**values, "limits": ServerLimits.read(values.get("limits", {}))})
            check_number("keep_days", config.keep_days, _KEEP_DAYS)
        except LimitError as error:
            raise HomeError(f"{path}: {error}") from error
        config.check()
        return config

    def check(self) -> None:
        """Refuse invalid values. Raises `HomeError`."""
        try:
            names.check_label(self.fleet, "fleet")
            names.check_label(self.namespace, "namespace")
        except names.BadNameError as error:
            raise HomeError(str(error)) from error
        if self.size not in SIZES:
            raise HomeError(f"size {self.size!r} is none of {', '.join(SIZES)}")
        for what in ("operators", "devices", "mqtt"):
            Address.parse(getattr(self, what), what)
        assert self.external_broker is None or self.external_broker.port
        if self.mqtt_websocket and not _is_websocket(self.mqtt_websocket):
            raise HomeError(f"mqtt_websocket {self.mqtt_websocket!r} is not an address: write wss://host:port/path")
        if not self.production and not is_loopback(self.host) and self.broker == "embedded":
            raise HomeError("the embedded broker serves this machine only: install mosquitto for devices elsewhere")


@dataclass(frozen=True, slots=True)
class ServerPaths:
    """Paths under one home."""

    root: Path

    @property
    def operator(self) -> Path:
        """Directory of the operator: configuration, token, keys."""
        return self.root / "operator"

    @property
    def server(self) -> Path:
        """Directory of the server."""
        return self.root / "server"

    @property
    def config(self) -> Path:
        """`server.toml`."""
        return self.server / "server.toml"

    @property
    def ca(self) -> Path:
        """Directory of the CA."""
        return self.server / "ca"

    @property
    def ca_root(self) -> Path:
        """Encrypted root key of the CA, which the operator holds, never a separate server."""
        return self.operator / "ca.key"

    @property
    def tls(self) -> Path:
        """Directory of the listeners' certificates."""
        return self.server / "tls"

    @property
    def keys(self) -> Path:
        """Directory of the online keys: director, snapshot, timestamp."""
        return self.server / "keys"

    @property
    def repository(self) -> Path:
        """Directory of TUF metadata."""
        return self.server / "repository"

    @property
    def artifacts(self) -> Path:
        """Directory of components, by sha256."""
        return self.server / "artifacts"

    @property
    def broker(self) -> Path:
        """Directory of the broker."""
        return self.server / "broker"

    @property
    def database(self) -> Path:
        """File of the store."""
        return self.server / "fleet.db"


def _is_websocket(url: str) -> bool:
    try:
        split = urllib.parse.urlsplit(url)
        return split.scheme == "wss" and bool(split.hostname) and split.port != 0 and not split.username
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@functools.cache
def has_ipv6() -> bool:
    """Tell whether this machine's kernel has IPv6."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    """Read a file of TOML. Raises `HomeError`."""
    try:
        if words := damage(path):
            raise HomeError(f"{path} is damaged ({words}): {RESTORE}")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ChoiceError(
            f"no server in {path.parent.parent}: run 'fleet init --dev', or name another --home"
        ) from None
    except PermissionError:
        raise HomeError(f"cannot read {path}: it belongs to another user; use a home of your own") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        raise HomeError(f"cannot read {path}: {error}; correct it, or {RESTORE}") from error


def _toml(value: str | int) -> str:
    if isinstance(value, int):
        return str(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
