"""Rows of the store as frozen structs. Times are seconds since 1970."""

from functools import lru_cache
from typing import Any, Final, TypeVar

import msgspec

from fleet.protocol.codes import AlertKind, RolloutState
from fleet.protocol.messages import Versions
from fleet.protocol.operator_api import GroupPlan
from fleet.rollout.decide import Limits, Rollout
from fleet.rollout.effective import Fitness
from fleet.rollout.members import Stage
from fleet.rollout.model import Value
from fleet.store.sqlite import Row

_JSON: Final = frozenset({"selector", "labels", "timings_ms", "metadata", "topics"})
"""Columns that are decoded anew for each row: their values may be changed."""

T = TypeVar("T")


class DeviceRow(msgspec.Struct, frozen=True, kw_only=True):
    """Device. `health` is its newest health message as received; every report up to `acked` is stored."""

    id: str
    name: str
    machine: str
    sealing_key: str
    key_sha256: str
    enrolled_at: float
    labels: dict[str, str]
    revoked: bool
    commands: int
    online: bool
    seen_at: float | None
    boot_id: str
    versions: Versions
    accepted: int
    deployed: int
    committed: int
    acked: int
    health_at: float | None
    health: bytes | None


class AlertRow(msgspec.Struct, frozen=True, kw_only=True):
    """A security event of a device that is shown until its time is over."""

    device: str
    kind: AlertKind
    since: float
    until: float
    text: str


class GroupRow(msgspec.Struct, frozen=True, kw_only=True):
    """Group with a list of members, or with a selector that chooses them by labels; `policy` is its plan."""

    name: str
    priority: int
    selector: dict[str, str]
    created_at: float
    policy: GroupPlan | None = None


class TokenRow(msgspec.Struct, frozen=True, kw_only=True):
    """Enrolment token without its secret."""

    group: str
    root_sha256: str
    created_at: float
    expires: float
    used_at: float | None
    device: str | None
    by: str


class OperatorRow(msgspec.Struct, frozen=True, kw_only=True):
    """Operator without the token."""

    name: str
    role: str
    created_at: float


class CertificateRow(msgspec.Struct, frozen=True, kw_only=True):
    """Certificate that the CA issued to a device."""

    serial: str
    device: str
    not_after: float
    issued_at: float
    pem: str
    revoked: bool


class SettledRow(msgspec.Struct, frozen=True, kw_only=True):
    """Settled value: desired state of an instance in a group or on a device, once every rollout has ended."""

    group: str
    device: str
    instance: str
    value: Value
    since: float
    rollout: str


class RolloutPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Wish of an operator for a rollout, beside its value.

    Attributes:
        stages: as asked; waves without a device are dropped when the rollout begins.
        seed: of the draw.
        starts_at: seconds since 1970, None for at once.
        where: text of the query that chose among the devices of the scope.
        site_label: label by which the budget counts.
        approval: whether a second person has to approve before anything is offered.
        fitness: of the release that is offered, for the time when it may be withdrawn.
    """

    stages: tuple[Stage, ...]
    limits: Limits = msgspec.field(default_factory=Limits)
    soak_s: float = 0.0
    seed: int = 0
    starts_at: float | None = None
    allow_empty: bool = False
    where: str = ""
    site_label: str = ""
    approval: bool = False
    fitness: Fitness = Fitness(0, 0)


class RolloutRow(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout of a group, or of a device where `group` is empty. `progress` is how far it is; `waves` as drawn."""

    number: int
    id: str
    group: str
    device: str
    instance: str
    value: Value
    before: Value | None
    state: RolloutState
    waves: str
    plan: RolloutPlan
    progress: Rollout
    revision: int
    reason: str
    note: str
    by: str
    undoes: str
    superseded_by: int
    created_at: float
    ended_at: float | None

    @property
    def model(self) -> Rollout:
        """Return the rollout as decisions see it."""
        return msgspec.structs.replace(self.progress, state=self.state)


class Extra(msgspec.Struct, frozen=True, kw_only=True):
    """Stored facts of a device in a rollout, beside its progress.

    Attributes:
        previous: target path that the device should have run before, empty for none.
        version: of the assignment that first offered it.
    """

    previous: str = ""
    version: int = 0
    offered_at: float | None = None
    acked_at: float | None = None
    ended_at: float | None = None
    timings_ms: dict[str, int] = {}
    log: tuple[str, ...] = ()


class AssignmentRow(msgspec.Struct, frozen=True, kw_only=True):
    """Signed assignment. `wanted` is its content without version and times."""

    device: str
    version: int
    sha256: str
    issued: float
    expires: float
    wanted: str
    envelope: bytes


class ReportRow(msgspec.Struct, frozen=True, kw_only=True):
    """Report as received at `at`."""

    device: str
    boot_id: str
    sequence: int
    at: float
    rollout: str
    raw: bytes


class EventRow(msgspec.Struct, frozen=True, kw_only=True):
    """Event of a device beside its reports."""

    device: str
    at: float
    kind: str
    text: str
    rollout: str
    assignment: int


class AuditRow(msgspec.Struct, frozen=True, kw_only=True):
    """Entry of the audit log."""

    number: int
    at: float
    actor: str
    act: str
    subject: str
    detail: str


_SHARED: Final[dict[str, msgspec.json.Decoder[Any]]] = {
    "value": msgspec.json.Decoder(Value, strict=False),
    "before": msgspec.json.Decoder(Value | None, strict=False),
    "plan": msgspec.json.Decoder(RolloutPlan, strict=False),
    "progress": msgspec.json.Decoder(Rollout, strict=False),
    "policy": msgspec.json.Decoder(GroupPlan | None, strict=False),
    "versions": msgspec.json.Decoder(Versions, strict=False),
    "log": msgspec.json.Decoder(tuple[str, ...], strict=False),
}
"""Decoders of columns whose values nobody can change. Thousands of rows have the same text in them."""


@lru_cache(maxsize=1024)
def _shared(column: str, data: str) -> Any:
    return _SHARED[column].decode(data)


_COLUMNS: Final[dict[type[Any], tuple[str, ...]]] = {}


def _json_columns(kind: type[Any]) -> tuple[str, ...]:
    if kind not in _COLUMNS:
        names = (field.name for field in msgspec.structs.fields(kind))
        _COLUMNS[kind] = tuple(name for name in names if name in _JSON | _SHARED.keys())
    return _COLUMNS[kind]


def read(kind: type[T], row: Row) -> T:
    """Convert a row to a struct: JSON columns decoded, integers as booleans where the struct says so."""
    for name in _json_columns(kind):
        data = row.get(name)
        if isinstance(data, str):
            row[name] = _shared(name, data) if name in _SHARED else msgspec.json.decode(data)
    return msgspec.convert(row, kind, strict=False)
