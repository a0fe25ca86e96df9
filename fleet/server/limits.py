"""Limits of a server that `server.toml` may change: the table `[limits]`, its defaults and bounds.

A limit has a lowest value, below which devices that do nothing wrong would be refused, and a highest, beyond which
memory is not bounded any more in practice. Sizes of messages and metadata are no part of it: devices and servers agree
on those (`fleet.protocol.bounds`).
"""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Final, NamedTuple, get_args, get_type_hints

from fleet.protocol import bounds
from fleet.server.connections import Limits

_DAY_S: Final = 86_400
_CONNECTIONS_MAX: Final = 16_384
"""As many files as the server opens at most."""

MESSAGE_COST: Final = 4
"""Cost of one report, state or health in the units of a device's budget of work."""


class LimitError(ValueError):
    """A limit has an invalid value; one line names the key and what it may be."""


class Between(NamedTuple):
    """Lowest and highest value of a limit."""

    least: int
    most: int


class Rate(NamedTuple):
    """Limit of a token bucket: `burst` at once, `per_s` in the long run."""

    burst: float
    per_s: float


_Connections = Annotated[int, Between(16, _CONNECTIONS_MAX)]
_OfOne = Annotated[int, Between(1, _CONNECTIONS_MAX)]
_BurstBytes = Annotated[int, Between(bounds.MIB, 1024 * bounds.MIB)]
_Burst = Annotated[int, Between(100, 1_000_000)]
_PerSecond = Annotated[int, Between(1, 10_000)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """The table `[limits]` of `server.toml`.

    Attributes:
        operator_connections: to the operators' port, also for enrolment; 512 connections of TLS are 150 MiB.
        operator_connections_per_address: of those, from one address, or one /64 of IPv6.
        device_connections: to the devices' port; more than operators', since only enrolled devices can hold them.
        device_connections_per_address: of those without a verified certificate, from one address.
        device_connections_per_device: of those, with one verified certificate.
        device_traffic_burst_bytes: of all messages over MQTT. An agent keeps up to 2,000 reports of a few KiB for a
            server that was away, and then sends them.
        device_reports_burst_bytes: of reports, which stay in the database: four such backlogs.
        device_readings_burst_bytes: of components' messages, as they travel: twice what a device keeps offline.
        device_readings_kept_bytes: of those, kept here for each device; the oldest go first.
        readings_kept_bytes: of all devices; beyond it the oldest of the device with the most go.
        readings_kept_days: after which they go in any case.
        device_messages_burst: reports, states and health messages; a hello counts as five.
        device_requests_burst: over HTTPS: a device that carries out 64 items fetches some 200 files, and a followed log
            is a post each second.
        device_rows: reports, and events, kept of one device: a hundred deployments a month for `keep_days`.
        certificates_burst: issued to all devices: a fleet of 10,000 that renews at once is done in seven minutes.
        artifact_bytes: of one uploaded component; at most as much as devices take.
        broker_client_bytes: messages that wait in the broker for one client that is away or slow: 10,000 reports of the
            usual size for the server. The rest comes again, since devices keep reports until they are acknowledged.
        broker_client_messages: of those, their number.
        broker_memory_bytes: of the broker in all, beyond which it drops messages.
    """

    operator_connections: _Connections = 512
    operator_connections_per_address: _OfOne = 256
    device_connections: _Connections = 2048
    device_connections_per_address: _OfOne = 256
    device_connections_per_device: _OfOne = 8
    device_traffic_burst_bytes: _BurstBytes = 16 * bounds.MIB
    device_traffic_bytes_per_s: Annotated[int, Between(bounds.KIB, 64 * bounds.MIB)] = 32 * bounds.KIB
    device_reports_burst_bytes: _BurstBytes = 32 * bounds.MIB
    device_reports_bytes_per_day: _BurstBytes = 32 * bounds.MIB
    device_readings_burst_bytes: _BurstBytes = 128 * bounds.MIB
    device_readings_bytes_per_day: _BurstBytes = 128 * bounds.MIB
    device_readings_kept_bytes: _BurstBytes = 64 * bounds.MIB
    readings_kept_bytes: Annotated[int, Between(bounds.MIB, 1024 * 1024 * bounds.MIB)] = 2048 * bounds.MIB
    readings_kept_days: Annotated[int, Between(1, 36_500)] = 30
    device_messages_burst: _Burst = 2500
    device_messages_per_s: _PerSecond = 10
    device_requests_burst: _Burst = 1000
    device_requests_per_s: _PerSecond = 5
    device_rows: Annotated[int, Between(20, 1_000_000)] = 10_000
    certificates_burst: Annotated[int, Between(10, 1_000_000)] = 2000
    certificates_per_s: _PerSecond = 20
    artifact_bytes: Annotated[int, Between(bounds.MIB, bounds.ARTIFACT_MAX_BYTES)] = bounds.ARTIFACT_MAX_BYTES
    data_bytes: Annotated[int, Between(bounds.MIB, bounds.DATA_MAX_BYTES)] = bounds.DATA_MAX_BYTES
    broker_client_bytes: _BurstBytes = 64 * bounds.MIB
    broker_client_messages: Annotated[int, Between(100, 65_000)] = 10_000
    broker_memory_bytes: Annotated[int, Between(64 * bounds.MIB, 64 * 1024 * bounds.MIB)] = 2048 * bounds.MIB

    def __post_init__(self) -> None:
        """Refuse invalid values. Raises `LimitError`."""
        for key, between in BETWEEN.items():
            check_number(f"limits.{key}", getattr(self, key), between)
        for side in ("operator", "device"):
            most, each = f"{side}_connections", f"{side}_connections_per_address"
            if getattr(self, each) > getattr(self, most):
                raise LimitError(
                    f"limits.{each} is {getattr(self, each)}, more than limits.{most} ({getattr(self, most)}) in all"
                )

    @classmethod
    def read(cls, table: Any) -> "ServerLimits":
        """Read the table.

        Raises:
            LimitError: no table, an unknown key, or an invalid value.
        """
        if not isinstance(table, dict):
            raise LimitError("limits must be a table: write [limits] and below it one key a line")
        for key in table:
            if key not in BETWEEN:
                raise LimitError(f"unknown key 'limits.{key}'; known are {', '.join(BETWEEN)}")
        return cls(**table)

    @property
    def changed(self) -> dict[str, int]:
        """Limits that are not the default."""
        return {
            each.name: getattr(self, each.name) for each in fields(self) if getattr(self, each.name) != each.default
        }

    @property
    def operators(self) -> Limits:
        """Connections to the operators' port."""
        most = self.operator_connections_per_address
        return Limits(connections=self.operator_connections, per_address=most, per_device=most)

    @property
    def devices(self) -> Limits:
        """Connections to the devices' port."""
        return Limits(
            connections=self.device_connections,
            per_address=self.device_connections_per_address,
            per_device=self.device_connections_per_device,
        )

    @property
    def traffic(self) -> Rate:
        """Bytes of a device's messages."""
        return Rate(self.device_traffic_burst_bytes, self.device_traffic_bytes_per_s)

    @property
    def stored(self) -> Rate:
        """Bytes of a device's reports."""
        return Rate(self.device_reports_burst_bytes, self.device_reports_bytes_per_day / _DAY_S)

    @property
    def readings(self) -> Rate:
        """Bytes of a device's readings."""
        return Rate(self.device_readings_burst_bytes, self.device_readings_bytes_per_day / _DAY_S)

    @property
    def work(self) -> Rate:
        """Work that a device's messages make, in units of which a message costs `MESSAGE_COST`."""
        return Rate(self.device_messages_burst * MESSAGE_COST, self.device_messages_per_s * MESSAGE_COST)

    @property
    def requests(self) -> Rate:
        """Requests of a device over HTTPS."""
        return Rate(self.device_requests_burst, self.device_requests_per_s)

    @property
    def certificates(self) -> Rate:
        """Certificates issued to all devices."""
        return Rate(self.certificates_burst, self.certificates_per_s)


def check_number(key: str, value: object, between: Between) -> None:
    """Refuse a value that is no whole number within bounds. Raises `LimitError`."""
    if isinstance(value, bool) or not isinstance(value, int) or not between.least <= value <= between.most:
        if isinstance(value, bool):
            shown = str(value).lower()
        elif isinstance(value, int) and abs(value) > bounds.NUMBER_MAX:
            shown = f"{value:#x}"[:40]  # writing thousands of digits in base ten is an error
        else:
            shown = repr(value)[:40]
        raise LimitError(f"{key} must be a whole number from {between.least} to {between.most}, not {shown}")


BETWEEN: Final[dict[str, Between]] = {
    key: get_args(hint)[1] for key, hint in get_type_hints(ServerLimits, include_extras=True).items()
}
"""Bounds of each key."""

DEFAULTS: Final = ServerLimits()
