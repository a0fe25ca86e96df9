"""The manifest: what an author declares beside a component, and what a publisher's signature covers.

This is the normalised form: integers with units in their names, nothing optional left open. It is inlined in the
target's signed metadata (`custom.manifest`) and its sha256 is bound again in the assignment, the image's key and the
board's report. `fleet.protocol.author` reads the form that people write, `component.toml`.
"""

from typing import Any, Final

import msgspec

from fleet.protocol import caps, outbound, wire
from fleet.protocol.caps import Count


class Http(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="http"):
    """Called for each HTTP request."""


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="schedule"):
    """Called by the clock: `every_ms` after the last start, or by `cron` (five fields, the board's zone)."""

    every_ms: Count | None = None
    cron: str | None = None


class OnMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="message"):
    """Called for each message on the board's bus."""

    topics: tuple[str, ...] = ()


class Service(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="service"):
    """Runs until it ends: `wasi:cli/run`."""


Trigger = Http | Schedule | OnMessage | Service


class Grants(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the component may reach. Empty means nothing: deny by default.

    Attributes:
        interfaces: interfaces or whole packages it may import, without version: `wasi:clocks`, `wasi:cli/stdout`.
        outbound: where it may send requests, as `https://api.example.com:443` (`fleet.protocol.outbound`).
        instances: neighbours on the board it may call over `http://<instance>.internal/`.
    """

    interfaces: tuple[str, ...] = ()
    outbound: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()

    def allows(self, interface: str) -> bool:
        """Whether an import, such as `wasi:clocks/wall-clock@0.2.3`, is granted."""
        bare = interface.partition("@")[0]
        package = bare.partition("/")[0]
        return bare in self.interfaces or package in self.interfaces

    def within(self, ceiling: "Grants") -> bool:
        """Whether everything granted here is granted by `ceiling` too."""
        return (
            all(ceiling.allows(interface) for interface in self.interfaces)
            and all(outbound.covered(each, ceiling.outbound) for each in self.outbound)
            and set(self.instances) <= set(ceiling.instances)
        )


NATIVE_ANSWER_MAX_BYTES: Final = 128 * caps.MIB // 48
"""The engine copies at most 128 MiB out of a guest in one call, and a byte of a body costs 48."""


TABLE_ELEMENTS_MAX: Final = 100_000
CORE_INSTANCES_MAX: Final = 128
"""The engine keeps room for so many: no manifest and no policy goes beyond."""

MAY_BE_NONE: Final = frozenset(
    {"fuel", "request_bytes", "log_lines_per_minute", "storage_bytes", "daily_written_bytes", "state_bytes"}
    | {"requests_per_instance"}
)
"""The limits of which 0 means something: none of it, or for `fuel` and `requests_per_instance` what is said there."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the component may use. The board's policy caps each.

    Attributes:
        memory_bytes: linear memory of one instance.
        call_ms: guest time of one call; time blocked on a peer does not count.
        start_ms: guest time of instantiation and start, and of saving or loading state.
        idle_ms: how long a call may wait for others in one piece.
        total_ms: how long a call may take in all, waiting included.
        concurrency: lanes at most.
        request_bytes, response_bytes: one HTTP body. In world `wasmfleet:http` an answer has at most
            `NATIVE_ANSWER_MAX_BYTES`, whatever stands here.
        log_lines_per_minute: more are dropped and counted.
        fuel: instructions of one call (wasmtime's fuel), 0 for no such limit.
        storage_bytes: the instance's own data.
        daily_written_bytes: what it may write to its data in one day (UTC).
        state_bytes: the memory that it may hand to its successor at a swap.
        requests_per_instance: how many requests one instance may answer before the next gets a fresh one; 0 for what
            its world is built for: one in `wasi:http` (a request with a body always gets its own), any number else.
        table_elements: of each of its tables (functions that are called through a table, references).
        core_instances: core modules that may be instantiated in one instance, and its memories and tables, each.
    """

    memory_bytes: Count = 16 * caps.MIB
    call_ms: Count = 1000
    start_ms: Count = 5000
    idle_ms: Count = 10_000
    total_ms: Count = 60_000
    concurrency: Count = 1
    request_bytes: Count = 1 * caps.MIB
    response_bytes: Count = 2 * caps.MIB
    log_lines_per_minute: Count = 600
    fuel: Count = 0
    storage_bytes: Count = 16 * caps.MIB
    daily_written_bytes: Count = 64 * caps.MIB
    state_bytes: Count = 1 * caps.MIB
    requests_per_instance: Count = 0
    table_elements: Count = TABLE_ELEMENTS_MAX
    core_instances: Count = CORE_INSTANCES_MAX

    def __post_init__(self) -> None:
        """Raises ValueError for what bounds nothing: to the engine a number below 0 is no limit at all."""
        for name in self.__struct_fields__:
            value, least = getattr(self, name), 0 if name in MAY_BE_NONE else 1
            if value < least:
                raise ValueError(f"limits.{name} is {value}, and must be at least {least}")


class Health(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a version shows that it is well.

    Attributes:
        check: whether it exports the health check, asked before traffic, every `interval_ms` and, on probation, more
            often.
        probation_ms: how long after a swap the board may still go back by itself.
        min_calls: calls below which probation ends `committed-unexercised`.
        max_faults: guest faults (traps and time-outs) tolerated in probation.
        max_error_percent: share of answers of 500 and above in probation, from `min_calls` calls on.
    """

    check: bool = False
    interval_ms: Count = 30_000
    probation_ms: Count = 30_000
    min_calls: Count = 20
    max_faults: Count = 0
    max_error_percent: Count = 10


class ConfigKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A configuration key that an operator may set."""

    description: str = ""
    default: str | None = None


class SecretKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A secret that the component reads, as it reads configuration.

    Attributes:
        required: it does not start without.
    """

    description: str = ""
    required: bool = True


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a component is and needs.

    Attributes:
        name, version: of the component; the namespace is the signing key's.
        world: which contract it exports: `wasmfleet:http` (small native world) or `wasi:http`, and so on.
        security_epoch: a board that ran epoch N never runs an older one again.
        data_schema: version of the instance's data; a change copies it before the swap.
        arch: CPUs it may run on (`x86_64`, `aarch64`, `riscv64`); empty for any.
        secrets: names of the secrets it may be given; no other reaches it.
    """

    name: str
    version: str
    trigger: Trigger
    world: str = ""
    description: str = ""
    grants: Grants = Grants()
    limits: Limits = Limits()
    health: Health = Health()
    config: dict[str, ConfigKey] = {}
    security_epoch: Count = 0
    data_schema: Count = 0
    arch: tuple[str, ...] = ()
    secrets: dict[str, SecretKey] = {}

    def plain(self) -> dict[str, Any]:
        """As JSON types, for signing: who does not use what is in `LATER` reads and hashes as before it was there."""
        value: dict[str, Any] = msgspec.to_builtins(self)
        for path in LATER:
            within, _, name = path.rpartition(".")
            struct, place = (getattr(self, within), value[within]) if within else (self, value)
            if getattr(struct, name) == _default(struct, name):
                del place[name]
        return value

    def digest(self) -> str:
        """The manifest's sha256 over its canonical JSON, in hex."""
        return wire.digest(self.plain())


LATER: Final = ("secrets", "limits.table_elements", "limits.core_instances")
"""Fields that came after the first form, as `secrets` or `limits.name`: left out at their default, so that a new one
changes no manifest's digest and boards of before go on reading what does not use it. Their defaults never change."""


def _default(struct: msgspec.Struct, name: str) -> object:
    field = next(each for each in msgspec.structs.fields(struct) if each.name == name)
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


class BadManifestError(ValueError):
    """A manifest that does not follow the schema; the message names the field."""


def decode(data: bytes) -> Manifest:
    """Read a normalised manifest from JSON.

    Raises:
        BadManifestError: too large, not JSON, an unknown field or one of another type.
    """
    if len(data) > caps.MANIFEST_MAX_BYTES:
        raise BadManifestError(f"the manifest has {len(data)} bytes, at most {caps.MANIFEST_MAX_BYTES} fit")
    try:
        return msgspec.json.decode(data, type=Manifest)
    except wire.JSON_ERRORS as error:
        raise BadManifestError(f"manifest: {error}") from error


def convert(value: object) -> Manifest:
    """Read a normalised manifest from decoded JSON, as TUF's `custom` holds it; raises `BadManifestError`."""
    return decode(wire.canonical(value))
