"""The agent's configuration in three tenses: fragments (files), the merged input, and validated settings.

`/etc/wasmfleet/agent.toml` and then `config.d/*.toml` beside it, in the order of their names; later files win key by
key. Everything has a default: a board without any file works. What stands here is the board owner's word: it narrows
what the fleet may ask of this board and never widens it.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from fleet.protocol import bounds, outbound
from fleet.protocol.manifest import CORE_INSTANCES_MAX, MAY_BE_NONE, TABLE_ELEMENTS_MAX, Grants, Limits

STATE_DIR: Final = Path("/var/lib/wasmfleet-agent")
RUNTIME_DIR: Final = Path("/run/wasmfleet")
CONFIG_FILE: Final = Path("/etc/wasmfleet/agent.toml")

CAPPED: Final = (
    *("memory_bytes", "call_ms", "start_ms", "idle_ms", "total_ms", "concurrency", "request_bytes", "response_bytes"),
    *("log_lines_per_minute", "fuel", "storage_bytes", "daily_written_bytes", "state_bytes"),
    *("table_elements", "core_instances"),
)
"""The limits of a manifest that the board's policy bounds, by the names they have in both."""

_MAY_BE_NONE: Final = MAY_BE_NONE.intersection(CAPPED) - {"fuel"}


class ConfigError(Exception):
    """The operator's or owner's input: a file that cannot be read, a key that is unknown or ill-typed."""


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the board's owner allows, whatever the fleet signs.

    Attributes:
        interfaces: interfaces or packages that components may import; None for all.
        outbound: where they may send requests, as `https://host:443`; None for wherever their grants say.
        logs: what may leave the board when an operator follows logs.
        bundles: accept assignments from an offline bundle, for which nobody vouches that they are current.
        late_bundles: accept them past the expiry of timestamp and snapshot too, until what people signed expires.
        on_revoked: what becomes of a component that runs and is then revoked, denied its grants, or found to be below
            the security epoch.
        memory_bytes, call_ms, start_ms, idle_ms, total_ms, concurrency, request_bytes, response_bytes,
            log_lines_per_minute, storage_bytes, daily_written_bytes, state_bytes, table_elements, core_instances: upper
            bounds on a manifest's limits.
        fuel: an upper bound too, where a manifest asks for fuel at all.
        compile_memory_bytes, compile_s: for the compiler.
    """

    interfaces: tuple[str, ...] | None = None
    outbound: tuple[str, ...] | None = None
    logs: Literal["off", "errors", "all"] = "errors"
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
    compile_memory_bytes: int = 1024 * bounds.MIB
    compile_s: int = 300

    def limit(self, limits: Limits) -> Limits:
        """A manifest's limits, within this board's."""
        return msgspec.structs.replace(
            limits, **{name: min(getattr(limits, name), getattr(self, name)) for name in CAPPED}
        )

    def denied(self, grants: Grants) -> tuple[str, ...]:
        """What this board's owner does not allow of `grants`."""
        beyond: list[str] = []
        if self.interfaces is not None:
            ceiling = Grants(interfaces=self.interfaces)
            beyond += [each for each in grants.interfaces if not ceiling.allows(each)]
        if self.outbound is not None:
            beyond += [each for each in grants.outbound if not outbound.covered(each, self.outbound)]
        return tuple(beyond)


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the board reaches its fleet.

    Attributes:
        proxy: `http://host:port` for HTTPS requests; empty for the environment's (`https_proxy`), or none.
        min_rate_bytes_s: a download slower than this over half a minute is given up and resumed later.
        request_s: total time of one small request.
        download_s: total time of one download attempt.
        keepalive_s: of MQTT.
    """

    proxy: str = ""
    min_rate_bytes_s: int = 256
    request_s: float = 30.0
    download_s: float = 3600.0
    keepalive_s: int = 240


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How much of the disk the agent may use.

    Attributes:
        budget_bytes: for artifacts and images together; what runs is never evicted.
        reserve_bytes: kept free on the file system.
    """

    budget_bytes: int = 512 * bounds.MIB
    reserve_bytes: int = 16 * bounds.MIB


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The validated whole.

    Attributes:
        production: refuse development fleets (keys without a passphrase, an embedded broker).
        name: what to call this board when it enrols; empty for its host name.
        health_s: how often the board's figures are sent while nothing changes.
        refresh_s: how often the desired state is asked for over HTTPS while MQTT is blocked.
        recheck_s: how often it is asked for while MQTT works, and what runs is held against revocations.
    """

    production: bool = False
    name: str = ""
    health_s: float = 900.0
    refresh_s: float = 300.0
    recheck_s: float = 3600.0
    policy: Policy = Policy()
    network: Network = Network()
    disk: Disk = Disk()


def fragments(file: Path) -> tuple[Path, ...]:
    """The files that make up the configuration, in the order in which they are merged; missing ones are left out."""
    extra = sorted((file.parent / "config.d").glob("*.toml"))
    return tuple(path for path in (file, *extra) if path.is_file())


def merge(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Fragments (by name, in order) as one; tables are merged key by key, everything else is replaced."""
    merged: dict[str, Any] = {}
    for part in parts.values():
        for key, value in part.items():
            if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
                merged[key] = {**merged[key], **value}
            else:
                merged[key] = value
    return merged


def validate(merged: Mapping[str, Any]) -> Settings:
    """The settings.

    Raises:
        ConfigError: an unknown key, or a value of another type or sense; the message names it.
    """
    try:
        settings = msgspec.convert(dict(merged), Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"agent configuration: {error}") from error
    positive = {
        "health_s": settings.health_s,
        "refresh_s": settings.refresh_s,
        "recheck_s": settings.recheck_s,
        "network.request_s": settings.network.request_s,
        "network.download_s": settings.network.download_s,
        "network.keepalive_s": settings.network.keepalive_s,
        "disk.budget_bytes": settings.disk.budget_bytes,
        **{f"policy.{name}": getattr(settings.policy, name) for name in CAPPED if name not in _MAY_BE_NONE},
        "policy.compile_memory_bytes": settings.policy.compile_memory_bytes,
        "policy.compile_s": settings.policy.compile_s,
    }
    for name, value in positive.items():
        if value <= 0:
            raise ConfigError(f"agent configuration: {name} is {value}, it must be more than 0")
    for name in sorted(_MAY_BE_NONE):
        if getattr(settings.policy, name) < 0:
            raise ConfigError(f"agent configuration: policy.{name} is {getattr(settings.policy, name)}, less than 0")
    return settings


def load(file: Path) -> Settings:
    """Read, merge and validate.

    Raises:
        ConfigError: the message names the file, or the key.
    """
    parts: dict[str, Mapping[str, Any]] = {}
    for path in fragments(file):
        try:
            parts[str(path)] = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
    return validate(merge(parts))


@dataclass(frozen=True, slots=True)
class Paths:
    """Where things lie."""

    state: Path
    runtime: Path

    @property
    def identity(self) -> Path:
        """Keys and certificates."""
        return self.state / "identity"

    @property
    def trust(self) -> Path:
        """Cache of TUF metadata: lost or damaged, it is fetched again."""
        return self.state / "trust"

    @property
    def database(self) -> Path:
        """Everything that must survive."""
        return self.state / "store.db"

    @property
    def lock(self) -> Path:
        """Held by the one agent that runs."""
        return self.state / "lock"

    @property
    def artifacts(self) -> Path:
        """Components as fetched, by sha256."""
        return self.state / "artifacts"

    @property
    def images(self) -> Path:
        """Components compiled for this board."""
        return self.state / "images"

    @property
    def secrets(self) -> Path:
        """Secrets in their boxes, by the sha256 of each box."""
        return self.state / "secrets"

    @property
    def runset(self) -> Path:
        """What is committed, once more, as a file with a MAC."""
        return self.state / "runset.json"

    @property
    def bundle(self) -> Path:
        """An offline bundle, as it was laid out."""
        return self.state / "bundle"

    @property
    def wake(self) -> Path:
        """A FIFO by which the agent is told of a bundle."""
        return self.state / "wake"

    @property
    def host_socket(self) -> Path:
        """Where the host listens."""
        return self.runtime / "host.sock"
