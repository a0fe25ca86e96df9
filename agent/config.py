"""Configuration of the agent: fragments (files), the merged input, and validated settings.

Files are `/etc/wasmfleet/agent.toml` and then `config.d/*.toml` beside it, sorted by name; later files override single
keys. Everything has a default, so that a device needs no file at all. The configuration is the device owner's policy:
it narrows what the fleet may do on this device, and never widens it.
"""

import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_type_hints

import msgspec

from agent.proxy import Proxy, ProxyError
from fleet.component import toml_fields
from fleet.protocol import bounds, directories, files, hardware, message_topics, outbound
from fleet.protocol.files import irregular
from fleet.protocol.manifest import CORE_INSTANCES_MAX, MAY_BE_NONE, TABLE_ELEMENTS_MAX, Grants, Limits
from fleet.protocol.toml_lines import in_words, line_of, path_of

STATE_DIR: Final = Path("/var/lib/wasmfleet-agent")
HOST_STATE_DIR: Final = Path("/var/lib/wasmfleet-host")
RUNTIME_DIR: Final = Path("/run/wasmfleet")
AGENT_RUNTIME_DIR: Final = Path("/run/wasmfleet-agent")
CONFIG_FILE: Final = Path("/etc/wasmfleet/agent.toml")

CAPPED: Final = (
    *("memory_bytes", "call_ms", "start_ms", "idle_ms", "total_ms", "concurrency", "request_bytes", "response_bytes"),
    *("log_lines_per_minute", "fuel", "storage_bytes", "daily_written_bytes", "state_bytes"),
    *("table_elements", "core_instances", "queue_bytes", "queue_messages"),
)
"""Names of the limits that both a manifest and the device's policy set."""

UNPRIVILEGED_PORT: Final = 1024
"""First port that needs no privilege, as `ip_unprivileged_port_start` of the kernel."""

_PRIVATE: Final = (
    *map(str, (STATE_DIR, HOST_STATE_DIR, RUNTIME_DIR, CONFIG_FILE.parent)),
    *("/dev", "/proc", "/sys"),
)
"""Directories that no policy lets components read, nor what they are in."""

_PORT_MAX: Final = 65535
_READINGS_MAX_BYTES: Final = 1 << 40
_MINUTE_MS: Final = 60_000
_MAY_BE_NONE: Final = MAY_BE_NONE.intersection(CAPPED) - {"fuel"}


class ConfigError(Exception):
    """Error in the configuration: a file that cannot be read, or a key that is unknown or has a wrong value.

    Attributes:
        key: dotted name of the key; empty for none.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


_ERRORS: Final = ("error", "critical", "host:")
_TIME: Final = re.compile(r"[0-9-]{10}T[0-9:]{8}Z ")


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Policy of the device's owner, which applies whatever the fleet signs.

    Attributes:
        interfaces: interfaces or packages that components may import; None for all.
        outbound: destinations of components' requests, as `https://host:443`; None for all that their grants allow.
        publish: filters of topics on which components may publish, to the operator or within the device; None for all
            that their grants allow.
        subscribe: the same of topics that they may receive from other components.
        directories: directories of this device that components may be granted to read: path by name.
        gpio: lines of GPIO chips that components may have, as `gpiochip0:17` or `gpiochip0:22-27`; empty for none.
        serial: serial ports that components may have: name in their grants -> device, as `/dev/ttyUSB0`.
        ports: ports that components may have of their own, as `8080` or `8000-8099`; empty for none.
        share_workers: let components of one publisher share a process where the director says so.
        logs: log lines that may leave the device when an operator follows logs, and with the report of a failure, to
            which `errors` adds the last lines.
        diagnose: what an operator may have of the archive about this device, by a signed command. `summary` helps in
            most cases and is mostly known to the fleet: state, history, checks, figures, configuration and the agent's
            own log. `all` adds what others wrote: lines of instances as far as `logs` allows, the kernel's messages,
            names of files.
        bundles: accept assignments from an offline bundle, which nothing proves to be current.
        late_bundles: accept bundles even after timestamp and snapshot have expired, until root or targets expires.
        on_revoked: action on a running component that is revoked, denied its grants, or below the security epoch.
        memory_bytes, call_ms, start_ms, idle_ms, total_ms, concurrency, request_bytes, response_bytes,
            log_lines_per_minute, storage_bytes, daily_written_bytes, state_bytes, table_elements, core_instances,
            queue_bytes, queue_messages: upper bounds of the limits of the same names in manifests.
        fuel: upper bound of a manifest's fuel, for manifests that set fuel at all.
        compile_memory_bytes, compile_s: limits of the compiler's memory and time.
    """

    interfaces: tuple[str, ...] | None = None
    outbound: tuple[str, ...] | None = None
    publish: tuple[str, ...] | None = None
    directories: dict[str, str] = {}
    subscribe: tuple[str, ...] | None = None
    gpio: tuple[str, ...] = ()
    serial: dict[str, str] = {}
    ports: tuple[str, ...] = (f"{UNPRIVILEGED_PORT}-{_PORT_MAX}",)
    share_workers: bool = True
    logs: Literal["off", "errors", "all"] = "errors"
    diagnose: Literal["off", "summary", "all"] = "summary"
    bundles: bool = False
    late_bundles: bool = False
    on_revoked: Literal["stop", "keep"] = "stop"
    memory_bytes: int = 256 * bounds.MIB
    call_ms: int = 60_000
    start_ms: int = 60_000
    idle_ms: int = 60_000
    total_ms: int = 600_000
    concurrency: int = 8
    request_bytes: int = 64 * bounds.MIB
    response_bytes: int = 64 * bounds.MIB
    log_lines_per_minute: int = 6000
    fuel: int = 1 << 40
    storage_bytes: int = 256 * bounds.MIB
    daily_written_bytes: int = 1024 * bounds.MIB
    state_bytes: int = 2 * bounds.MIB
    table_elements: int = TABLE_ELEMENTS_MAX
    core_instances: int = CORE_INSTANCES_MAX
    queue_bytes: int = 4 * bounds.MIB
    queue_messages: int = 10_000
    compile_memory_bytes: int = 1024 * bounds.MIB
    compile_s: int = 300

    def limit(self, limits: Limits) -> Limits:
        """Return a manifest's limits, lowered to this policy's."""
        return msgspec.structs.replace(
            limits, **{name: min(getattr(limits, name), getattr(self, name)) for name in CAPPED}
        )

    def mounts(self, grants: Grants) -> dict[str, str]:
        """Return the paths of the directories that are granted, by the path at which the component sees each."""
        offered = self.directories
        return {place: offered[name] for place, name in grants.mounts.items() if name in offered}

    def excerpt(self, lines: tuple[str, ...]) -> tuple[str, ...]:
        """Return the lines of an instance's log that the report of its failure may carry."""
        if self.logs == "off":
            return ()
        last = 0 if self.logs == "all" else len(lines) - bounds.LOG_LINES
        return tuple(line for number, line in enumerate(lines) if number >= last or is_error(line))

    def denied(self, grants: Grants, port: int | None) -> tuple[str, ...]:
        """Return the interfaces and destinations in `grants`, and the own port, that this policy does not allow."""
        beyond: list[str] = []
        if self.interfaces is not None:
            ceiling = Grants(interfaces=self.interfaces)
            beyond += [each for each in grants.interfaces if not ceiling.allows(each)]
        if self.outbound is not None:
            beyond += [each for each in grants.outbound if not outbound.covered(each, self.outbound)]
        most = Grants(
            publish=grants.publishes if self.publish is None else self.publish,
            publish_local=grants.publishes_locally if self.publish is None else self.publish,
            subscribe=grants.subscribes if self.subscribe is None else self.subscribe,
        )
        beyond += grants.messages_beyond(most)
        beyond += [f"directory {each}" for each in sorted({*grants.mounts.values()} - self.directories.keys())]
        beyond += hardware.denied_lines(grants.devices.gpio, self.gpio)
        beyond += hardware.denied_ports(grants.devices.serial, self.serial)
        if port is not None and not any(port in port_range(each) for each in self.ports):
            beyond.append(f"port {port}")
        return tuple(beyond)


def is_error(line: str) -> bool:
    """Return whether a line of an instance's log says of itself, after its time, that it is an error."""
    return _TIME.sub("", line).startswith(_ERRORS)


def port_range(text: str) -> range:
    """Return the ports of `8080` or `8000-8099`. Raises `ValueError`."""
    found = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", text)
    ports = range(0) if found is None else range(int(found[1]), int(found[2] or found[1]) + 1)
    if not ports or ports[0] < 1 or ports[-1] > _PORT_MAX:
        raise ValueError(f"{text[:40]!r} is not a port, nor a range of ports such as 8000-8099")
    return ports


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Connection of the device to its fleet.

    Attributes:
        proxy: `http://[user:password@]host:port`; empty to use the environment's (`https_proxy`), if any. HTTPS and
            MQTT over WebSocket go through it; plain MQTT does where it cannot connect directly.
        min_rate_bytes_s: minimum rate of a download over half a minute; a slower one is aborted and resumed later.
        request_s: total time of a small request.
        download_s: total time of a download attempt.
        keepalive_s: keep-alive interval of MQTT.
    """

    proxy: str = ""
    min_rate_bytes_s: int = 256
    request_s: float = 30.0
    download_s: float = 3600.0
    keepalive_s: int = 240


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Disk space that the agent may use.

    Attributes:
        budget_bytes: for artifacts and images together; those of running components are never evicted.
        data_bytes: for data packages together; those in use are never removed.
        reserve_bytes: to keep free on the file system.
    """

    budget_bytes: int = 512 * bounds.MIB
    data_bytes: int = 1024 * bounds.MIB
    reserve_bytes: int = 16 * bounds.MIB


_PACKAGED_STATE: Final = Path("/var/lib/wasmfleet-agent")
_PACKAGED_DATA: Final = Path("/var/lib/wasmfleet-packages")


class ReadingsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Messages of components that are kept until the server has them.

    Attributes:
        max: of them on the disk, as `64MiB`.
        keep: age after which they are given up, as `30d`.
        full: what gives way when there is no more room: the oldest, or those that are new.
    """

    max: str = "64MiB"
    keep: str = "30d"
    full: Literal["drop-oldest", "refuse"] = "drop-oldest"

    @property
    def max_bytes(self) -> int:
        """`max` in bytes."""
        return toml_fields.parse_size(self.max)

    @property
    def keep_ms(self) -> int:
        """`keep` in milliseconds."""
        return toml_fields.parse_duration(self.keep)


class UplinkSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Traffic from components to the fleet."""

    readings: ReadingsSettings = ReadingsSettings()


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Validated configuration.

    Attributes:
        production: refuse development fleets (keys without a passphrase, an embedded broker).
        name: of this device when it enrols; empty for its host name.
        health_s: interval of health messages while nothing changes.
        refresh_s: interval of polling the assignment over HTTPS while MQTT is blocked.
        recheck_s: interval of polling while MQTT works, and of checking running components for revocations.
    """

    production: bool = False
    name: str = ""
    health_s: float = 900.0
    refresh_s: float = 300.0
    recheck_s: float = 3600.0
    policy: Policy = Policy()
    network: Network = Network()
    disk: Disk = Disk()
    uplink: UplinkSettings = UplinkSettings()


def fragments(file: Path) -> tuple[Path, ...]:
    """List the existing files of the configuration in the order in which they are merged."""
    extra = sorted((file.parent / "config.d").glob("*.toml"))
    return tuple(path for path in (file, *extra) if path.is_file())


def merge(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Merge fragments (file name -> content, in order): tables key by key, everything else is replaced."""
    merged: dict[str, Any] = {}
    for part in parts.values():
        for key, value in part.items():
            if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
                merged[key] = {**merged[key], **value}
            else:
                merged[key] = value
    return merged


def validate(merged: Mapping[str, Any]) -> Settings:
    """Convert the merged input into settings.

    Raises:
        ConfigError: an unknown key, or a value of a wrong type or range; the message names the key.
    """
    try:
        settings = msgspec.convert(dict(merged), Settings)
    except msgspec.ValidationError as error:
        key, words = in_words(str(error))
        raise ConfigError(f"{words}{_choices(key)}", key) from error
    positive = {
        "health_s": settings.health_s,
        "refresh_s": settings.refresh_s,
        "recheck_s": settings.recheck_s,
        "network.request_s": settings.network.request_s,
        "network.download_s": settings.network.download_s,
        "network.keepalive_s": settings.network.keepalive_s,
        "disk.budget_bytes": settings.disk.budget_bytes,
        "disk.data_bytes": settings.disk.data_bytes,
        **{f"policy.{name}": getattr(settings.policy, name) for name in CAPPED if name not in _MAY_BE_NONE},
        "policy.compile_memory_bytes": settings.policy.compile_memory_bytes,
        "policy.compile_s": settings.policy.compile_s,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:  # TOML has inf and nan
            raise ConfigError(f"{name} is {value}, but must be a number more than 0", name)
    for name in sorted(_MAY_BE_NONE):
        if getattr(settings.policy, name) < 0:
            raise ConfigError(
                f"policy.{name} is {getattr(settings.policy, name)}, but must be 0 or more", f"policy.{name}"
            )
    if settings.network.proxy:
        try:
            Proxy.parse(settings.network.proxy)
        except ProxyError as error:
            raise ConfigError(f"network.proxy: {error}", "network.proxy") from None
    _check_readings(settings.uplink.readings)
    _check_publish(settings.policy)
    _check_directories(settings.policy)
    _check_names(settings.policy)
    _check_hardware(settings.policy)
    return settings


def _check_names(policy: Policy) -> None:
    """Refuse what names nothing: a list of such names would allow less than its owner means. Raises `ConfigError`."""
    for ports in policy.ports:
        try:
            port_range(ports)
        except ValueError as error:
            raise ConfigError(f"policy.ports: {error}", "policy.ports") from None
    for entry in policy.outbound or ():
        try:
            outbound.parse(entry)
        except outbound.BadOutboundError as error:
            raise ConfigError(f"policy.outbound: {entry[:80]!r}: {error}", "policy.outbound") from None
    if policy.interfaces:
        from fleet.component import served  # noqa: PLC0415 - for owners who list them

        for interface in policy.interfaces:
            if wrong := served.unknown(interface):
                raise ConfigError(f"policy.interfaces: {interface[:80]!r}: {wrong}", "policy.interfaces")


def _check_hardware(policy: Policy) -> None:
    """Refuse what is no piece of hardware. Raises `ConfigError`."""
    for line in policy.gpio:
        try:
            hardware.parse_lines(line)
        except hardware.BadHardwareError as error:
            raise ConfigError(f"policy.gpio: {error}", "policy.gpio") from None
    for name, node in policy.serial.items():
        try:
            hardware.check_node(name, node)
        except hardware.BadHardwareError as error:
            raise ConfigError(f"policy.serial: {error}", "policy.serial") from None


def _check_publish(policy: Policy) -> None:
    """Refuse what is no filter of topics. Raises `ConfigError`."""
    for name, filters in (("publish", policy.publish), ("subscribe", policy.subscribe)):
        try:
            for each in filters or ():
                message_topics.check_filter(each)
        except message_topics.BadMessageTopicError as error:
            raise ConfigError(f"policy.{name}: {error}", f"policy.{name}") from None


def _check_directories(policy: Policy) -> None:
    """Refuse what is no name or no path, and directories that no component is to read. Raises `ConfigError`."""
    key = "policy.directories"
    if len(policy.directories) > directories.OFFERED_MAX:
        raise ConfigError(f"{key} has {len(policy.directories)} directories, at most {directories.OFFERED_MAX}", key)
    for name, path in policy.directories.items():
        try:
            directories.check_name(name)
        except directories.BadDirectoryError as error:
            raise ConfigError(f"{key}: {error}", key) from None
        at = f"{key}.{name}"
        if not path.startswith("/") or os.path.normpath(path) != path or path.startswith("//"):
            raise ConfigError(f"{at} is {path[:80]!r}, but must be an absolute path, such as /srv/maps", at)
        private = next((each for each in _PRIVATE if _overlap(path, each)), None)
        if private is not None:
            raise ConfigError(f"{at} is {path[:80]!r}: components may not read {private}", at)


def _overlap(path: str, other: str) -> bool:
    """Tell whether one of two paths is, or is in, the other."""
    return os.path.commonpath([path, other]) in {path, other}


def _check_readings(settings: ReadingsSettings) -> None:
    """Refuse bounds that cannot be read, or are too small or too large. Raises `ConfigError`."""
    try:
        size = settings.max_bytes
    except toml_fields.BadUnitError as error:
        raise ConfigError(f"uplink.readings.max: {error}", "uplink.readings.max") from None
    try:
        keep = settings.keep_ms
    except toml_fields.BadUnitError as error:
        raise ConfigError(f"uplink.readings.keep: {error}", "uplink.readings.keep") from None
    if not bounds.MIB <= size <= _READINGS_MAX_BYTES:
        raise ConfigError("uplink.readings.max must be from 1MiB to 1024GiB", "uplink.readings.max")
    if not _MINUTE_MS <= keep <= 1000 * bounds.WAIT_MAX_S:
        raise ConfigError("uplink.readings.keep must be from 1m to 3660d", "uplink.readings.keep")


def _choices(key: str) -> str:
    """Return the advice to a key of which the values are listed."""
    listed = [
        each for each in get_args(get_type_hints(Policy).get(key.removeprefix("policy."))) if isinstance(each, str)
    ]
    return f"; give one of {', '.join(listed)}" if listed else ""


def _parsed(path: Path) -> tuple[str, Mapping[str, Any]]:
    """Return a file's text and what it says. Raises `ConfigError`."""
    try:
        text = "" if irregular(path) else files.read_text(path, max_bytes=bounds.MIB)
        return text, tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path}: it is not UTF-8; save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: it is not TOML: {error}") from error


def load(file: Path, *, required: bool = False) -> Settings:
    """Read, merge and validate the configuration.

    Args:
        file: `agent.toml`.
        required: refuse a `file` that does not exist: somebody has named it, and relies on the policy in it.

    Raises:
        ConfigError: the message names the file, the key and its line.
    """
    texts: dict[str, str] = {}
    parts: dict[str, Mapping[str, Any]] = {}
    for path in (file, *sorted((file.parent / "config.d").glob("*.toml"))):
        # left out, the policy in it would not hold; a link to /dev/null leaves it out on purpose
        if (what := irregular(path)) and path.resolve() != Path(os.devnull):
            raise ConfigError(f"cannot read {path}: it is {what}, not a file")
    if required and not file.is_file():
        raise ConfigError(f"cannot read {file}: no such file; check the path, or leave out --config")
    for path in fragments(file):
        texts[str(path)], parts[str(path)] = _parsed(path)
    try:
        return validate(merge(parts))
    except ConfigError as merged:
        for name, part in reversed(parts.items()):  # later files win
            try:
                validate(part)
            except ConfigError as error:
                line = line_of(texts[name], path_of(error.key))
                raise ConfigError(f"{name}: {error}" + (f" (line {line})" if line else "")) from None
        raise ConfigError(f"{file}: {merged}") from None


def packages_of(state: Path) -> Path:
    """Return the directory of data packages for a state directory.

    The packaged host cannot see the agent's own directory, so that they stand beside it.
    """
    return _PACKAGED_DATA if state == _PACKAGED_STATE else state / "packages"


@dataclass(frozen=True, slots=True)
class Paths:
    """Paths of the agent's files.

    Attributes:
        state: state directory, kept across reboots.
        runtime: directory of sockets, shared with the host.
    """

    state: Path
    runtime: Path

    @property
    def identity(self) -> Path:
        """Directory of keys and certificates."""
        return self.state / "identity"

    @property
    def trust(self) -> Path:
        """Cache of TUF metadata; fetched again if it is lost or damaged."""
        return self.state / "trust"

    @property
    def database(self) -> Path:
        """Database of everything that must not be lost."""
        return self.state / "store.db"

    @property
    def lock(self) -> Path:
        """Lock file of the running agent."""
        return self.state / "lock"

    @property
    def starts(self) -> Path:
        """Record of the agent's starts since it last ended in order."""
        return self.state / "starts.json"

    @property
    def artifacts(self) -> Path:
        """Directory of fetched components, named by sha256."""
        return self.state / "artifacts"

    @property
    def images(self) -> Path:
        """Directory of components compiled for this device."""
        return self.state / "images"

    @property
    def packages(self) -> Path:
        """Directory of data packages."""
        return packages_of(self.state)

    @property
    def secrets(self) -> Path:
        """Directory of sealed secrets, named by the sha256 of each box."""
        return self.state / "secrets"

    @property
    def readings(self) -> Path:
        """Directory of components' messages that the server has not stored yet."""
        return self.state / "readings"

    @property
    def runset(self) -> Path:
        """Copy of the committed instances in a file with a MAC, for when the database is lost."""
        return self.state / "runset.json"

    @property
    def bundle(self) -> Path:
        """Directory of an unpacked offline bundle."""
        return self.state / "bundle"

    @property
    def wake(self) -> Path:
        """FIFO that notifies the agent of a bundle."""
        return self.state / "wake"

    @property
    def log(self) -> Path:
        """Log of the agent, kept over boots; an older one beside it."""
        return self.state / "log" / "agent.log"

    @property
    def metrics_socket(self) -> Path:
        """Socket on which the agent gives the device's figures; of the packaged agent, in a directory of its own."""
        return (AGENT_RUNTIME_DIR if self.runtime == RUNTIME_DIR else self.runtime) / "metrics.sock"

    @property
    def host_socket(self) -> Path:
        """Socket on which the host listens."""
        return self.runtime / "host.sock"
