"""Operator API: status, devices, groups, components, rollouts, audit; Problem and its exception.

Requests and replies of `/v1` as structs, for the server and the command line alike; the OpenAPI document is generated
from them and from the route table, `fleet.server.api.routes.ROUTES`. Times are UTC, durations say their unit. Every
error is a `Problem`. `{id}` of a rollout is its id or its number.

The listener for devices has routes of its own: `/v1/tuf/{file}`, `/v1/artifacts/{sha256}`, `/v1/secrets/{sha256}`,
`/v1/desired` (the envelope as published, 404 for none; with `?nonce=` a `DesiredReply`), `POST /v1/assignment` (the
envelope that the device has accepted, after the problem `ahead`), `POST /v1/logs` and `POST /v1/renew`
(`fleet.protocol.messages`).
"""

from typing import Annotated, Final, Literal

import msgspec

from fleet.protocol import wire
from fleet.protocol.assignment import CheckIn, Diagnose, FollowLogs, Restart
from fleet.protocol.bounds import (
    ITEMS_MAX,
    Count,
    Document,
    Labels,
    Port,
    Priority,
    Seconds,
    Stored,
    Text,
    Utc,
    Word,
    Words,
)
from fleet.protocol.codes import AlertKind, OnBreach, Outcome, PauseCause, Phase, RejectCode, RolloutState
from fleet.protocol.manifest import Grants
from fleet.protocol.messages import Health, InstanceHealth, Versions


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of requests: an unknown field is an error that names it."""


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Base of replies: a client ignores fields that it does not know."""


class Problem(View, frozen=True, kw_only=True):
    """Refusal of a request (RFC 9457, `application/problem+json`).

    Attributes:
        type: a word for programs: `unknown-group`, `conflict`, `unauthorised`, and so on.
        title, detail: failure and reason, for people.
        action: what to do next; may be empty.
    """

    type: str
    title: str
    status: Stored
    detail: str = ""
    action: str = ""


class Published(View, frozen=True, kw_only=True):
    """TUF role as published by the server."""

    role: str
    version: Stored
    expires: Utc


class Status(View, frozen=True, kw_only=True):
    """Summary of the fleet.

    Attributes:
        size: `dev`, `solo` or `team`; production is false for `dev`.
        broker: `mosquitto`, `embedded` or `external`; `broker_connected` whether the server is on it.
        waiting: open rollouts and catch-up queues, each with what it waits for.
        problems: sentences for people, most urgent first.
    """

    fleet: str
    size: str
    production: bool
    version: str
    now: Utc
    started_at: Utc
    operators_url: str
    devices_url: str
    mqtt: tuple[str, ...]
    broker: str
    broker_connected: bool
    devices: Stored = 0
    online: Stored = 0
    groups: Stored = 0
    open_rollouts: Stored = 0
    roles: tuple[Published, ...] = ()
    waiting: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class AheadDevice(View, frozen=True, kw_only=True):
    """Device with a newer assignment than the server, which was made anew from a backup.

    Attributes:
        accepted, assigned: versions: of the device's assignment, and of the newest that the server knows, 0 for none.
        has: target path by instance in the device's assignment; None while the device has not shown it.
        wants: the same as the server would have it.
        obstacle: why the device's assignment cannot be adopted; empty for nothing.
    """

    device: str
    online: bool = False
    accepted: Stored = 0
    assigned: Stored = 0
    has: dict[str, str] | None = None
    wants: dict[str, str] = {}
    obstacle: str = ""


class ReconcileRequest(Body, frozen=True, kw_only=True):
    """Decision on devices that are ahead of the server.

    Attributes:
        mode: `adopt` takes the devices' assignments, as pins where they differ; `impose` the server's state.
        selector: a device id, or a selector (`fleet.rollout.selector`); empty for every device that is ahead.
        dry_run: only tell what would be done.
    """

    mode: Literal["adopt", "impose"]
    selector: Text = ""
    dry_run: bool = True


class Reconciliation(View, frozen=True, kw_only=True):
    """Devices that are ahead; with `done` those without an obstacle were reconciled."""

    devices: tuple[AheadDevice, ...] = ()
    done: bool = False


class DeviceRow(View, frozen=True, kw_only=True):
    """Device in a listing.

    Attributes:
        assigned, accepted, committed: assignment versions: newest published, and as the device reports; 0 for none.
        instances: running instances, by the device's newest health.
        data: target of the data package that it keeps under each name, by its newest health.
        problem: the most urgent sentence of its health, empty for none.
        memory_bytes: memory of the device; 0 where it has not reported it.
    """

    id: str
    name: str
    groups: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    online: bool = False
    seen_at: Utc | None = None
    machine: str = ""
    versions: Versions = Versions()
    assigned: Stored = 0
    accepted: Stored = 0
    committed: Stored = 0
    instances: tuple[InstanceHealth, ...] = ()
    pins: tuple[str, ...] = ()
    revoked: bool = False
    problem: str = ""
    memory_bytes: Stored = 0
    data: dict[str, str] = {}


class Devices(View, frozen=True, kw_only=True):
    """Every device."""

    devices: tuple[DeviceRow, ...] = ()


class EffectiveKey(View, frozen=True, kw_only=True):
    """Value of one configuration key on a device, and its source.

    Attributes:
        source: `manifest` for its default, `device` for the device's own, or the source of the version.
        declared: whether the version's manifest declares the key; otherwise the device does not get it.
    """

    value: str
    source: str
    declared: bool = True


class Effective(View, frozen=True, kw_only=True):
    """Desired state of one instance on a device, and its source.

    Attributes:
        target: empty where a pin masks the instance: the device runs nothing under this name.
        source: `pin`, `group edge-eu`, or `rollout 7 (group edge-eu)` while it is being offered; of the version, the
            port and whether the worker is shared.
        config: what is set, without the manifest's defaults.
        keys: each configuration key that has a value, defaults included, with its own source.
    """

    instance: str
    target: str
    source: str
    config: dict[str, str] = {}
    keys: dict[str, EffectiveKey] = {}
    port: Stored | None = None
    share_worker: bool = False
    attempt: Stored = 0
    rollout: str = ""


class Alert(View, frozen=True, kw_only=True):
    """Security event of a device that is shown for a time.

    Attributes:
        until: shown until then; of a suspension, its end.
    """

    kind: AlertKind
    since: Utc
    until: Utc
    text: str


class DeviceDetail(View, frozen=True, kw_only=True):
    """Everything that the server knows of one device.

    Attributes:
        health: its newest health message as it came, with its figures; None before the first.
        failed: instances whose last deployment failed, with the newest report of each.
        alerts: security events, newest first.
        dropped: its messages that were dropped since the server started: unreadable, or over its budget.
    """

    row: DeviceRow
    enrolled_at: Utc
    boot_id: str = ""
    health_at: Utc | None = None
    health: Health | None = None
    effective: tuple[Effective, ...] = ()
    certificate_serial: str = ""
    certificate_expires: Utc | None = None
    failed: tuple["TimelineEntry", ...] = ()
    alerts: tuple[Alert, ...] = ()
    dropped: Stored = 0


class TimelineEntry(View, frozen=True, kw_only=True):
    """Entry of a `Timeline`: something that happened to a device.

    Attributes:
        kind: `enrolled`, `renewed`, `online`, `offline`, `assigned`, `report`, `command`, `revoked`, `security`.
        text: the event in one sentence.
        action: what to do next; empty where nothing is wrong.
    """

    at: Utc
    kind: str
    text: str
    instance: str = ""
    target: str = ""
    phase: Phase | None = None
    code: RejectCode | None = None
    message: str = ""
    action: str = ""
    retryable: bool = False
    rollout: str = ""
    assignment: Stored = 0
    log: tuple[str, ...] = ()
    timings_ms: dict[str, Stored] = {}


class Timeline(View, frozen=True, kw_only=True):
    """Timeline of a device, newest first."""

    device: str
    entries: tuple[TimelineEntry, ...] = ()


class MessageView(View, frozen=True, kw_only=True):
    """Message of a component, as its device brought it.

    Attributes:
        number: of this message here; grows with each that is stored.
        sequence: among those of this instance on this device; a gap was dropped by the device for want of room.
        epoch: within which the sequence counts: another one after the device lost what it kept.
        at: when the device took it, by the device's clock.
        received_at: when the server stored it.
        data: as base64.
    """

    number: Stored
    device: str
    instance: str
    sequence: Stored
    epoch: str
    at: Utc
    received_at: Utc
    topic: str
    data: bytes = b""
    content_type: str = ""
    metadata: tuple[tuple[str, str], ...] = ()


class Messages(View, frozen=True, kw_only=True):
    """Messages of components, oldest first.

    Attributes:
        next: number after which to ask for what follows.
        more: there is more to look through already; ask again at once.
    """

    messages: tuple[MessageView, ...] = ()
    next: Stored = 0
    more: bool = False


class LabelsRequest(Body, frozen=True, kw_only=True):
    """Labels set by an operator; None removes one."""

    labels: Annotated[dict[Word, Word | None], msgspec.Meta(max_length=ITEMS_MAX)]


class KeysRequest(Body, frozen=True, kw_only=True):
    """A device's own configuration keys of one instance; None removes one. Others stay as they are."""

    instance: Word
    keys: Annotated[dict[Word, Document | None], msgspec.Meta(min_length=1, max_length=ITEMS_MAX)]


class InstanceRequest(Body, frozen=True, kw_only=True):
    """Name an instance of the device in the path."""

    instance: Word


class CommandRequest(Body, frozen=True, kw_only=True):
    """Sign a command and send it to the device in the path."""

    verb: CheckIn | Restart | FollowLogs | Diagnose


class CommandReply(View, frozen=True, kw_only=True):
    """Reply to a command that was sent; `sequence` is its number for this device."""

    sequence: Stored
    expires: Utc


class Settled(View, frozen=True, kw_only=True):
    """Settled state of one instance in a group, once every rollout is over."""

    instance: str
    target: str
    since: Utc
    rollout: str = ""


class GroupRow(View, frozen=True, kw_only=True):
    """Group of devices.

    Attributes:
        priority: of two groups that both set an instance, the higher wins.
        selector: labels that members have; empty for a group with a list of members.
        rollout: the number of the open rollout, 0 for none.
        planned: a plan of its own says how rollouts in it go.
    """

    name: str
    priority: Stored = 0
    selector: dict[str, str] = {}
    devices: Stored = 0
    online: Stored = 0
    settled: tuple[Settled, ...] = ()
    rollout: Stored = 0
    planned: bool = False


class Groups(View, frozen=True, kw_only=True):
    """Every group."""

    groups: tuple[GroupRow, ...] = ()


class GroupRequest(Body, frozen=True, kw_only=True):
    """Make or change a group; None leaves what is.

    Attributes:
        selector: labels of members, instead of a list of devices.
        add, remove: device ids.
    """

    priority: Priority | None = None
    selector: Labels | None = None
    add: Words = ()
    remove: Words = ()


class PlanStage(Body, frozen=True, kw_only=True, omit_defaults=True):
    """Stage of a group's plan.

    Attributes:
        select: labels that its devices have; empty for any device.
        size: of those that it selects and no stage before it took, as a number (`3`) or a share (`10%`); empty for all.
        soak_s: None for the plan's.
        approval: whether somebody other than who began the rollout has to approve before the next stage.
    """

    select: Labels = {}
    size: Word = ""
    soak_s: Seconds | None = None
    approval: bool = False


class PlanLimits(Body, frozen=True, kw_only=True, omit_defaults=True):
    """Limits of a group's plan, as in `RolloutRequest`; empty or None for the default."""

    min_success: Word = ""
    failures: Word = ""
    max_lost: Word = ""
    on_breach: OnBreach | None = None
    at_once: Count | None = None
    catch_up: Word = ""
    timeout_s: Seconds | None = None


class PlanBudget(Body, frozen=True, kw_only=True):
    """Devices of each site, by the value of the label `by`, that stay online and idle during a rollout."""

    by: Word
    min_available: Count


class GroupPlan(Body, frozen=True, kw_only=True, omit_defaults=True):
    """Plan of a group: how rollouts in it go, unless a request names other values.

    Attributes:
        soak_s: of each stage that names none; None for the default.
        approval: whether somebody other than who began the rollout has to approve before anything is offered.
        stages: in order; the last one takes everybody who is left. Empty for the default of a group of that size.
    """

    soak_s: Seconds | None = None
    limits: PlanLimits = PlanLimits()
    budget: PlanBudget | None = None
    approval: bool = False
    stages: Annotated[tuple[PlanStage, ...], msgspec.Meta(max_length=ITEMS_MAX)] = ()


class GroupPolicyRequest(Body, frozen=True, kw_only=True):
    """Set or clear (None) the plan of a group; with `dry_run` only show what it would be."""

    plan: GroupPlan | None = None
    dry_run: bool = False


class StageView(View, frozen=True, kw_only=True):
    """Stage of a plan, and how many devices of the group it takes as their labels are now."""

    text: str
    devices: Stored
    approval: bool = False


class GroupPolicy(View, frozen=True, kw_only=True):
    """Plan of a group; None for none."""

    group: str
    plan: GroupPlan | None = None
    stages: tuple[StageView, ...] = ()


class EnrollTokenRequest(Body, frozen=True, kw_only=True):
    """Create a one-time token for one device, and its group where there is none."""

    group: Word = ""
    valid_s: Seconds = 3600


class EnrollTokenReply(View, frozen=True, kw_only=True):
    """Enrolment token, shown once: the server keeps only its hash."""

    token: str
    group: str
    expires: Utc


DATA_MEDIA_TYPE: Final = "application/octet-stream"
"""Media type of an upload that is a data package."""


class ComponentRow(View, frozen=True, kw_only=True):
    """Published target; `kind` is `component` or `data`."""

    target: str
    namespace: str
    name: str
    version: str
    length: Stored
    sha256: str
    kind: str = "component"


class Components(View, frozen=True, kw_only=True):
    """Every published target."""

    components: tuple[ComponentRow, ...] = ()


class ArtifactReply(View, frozen=True, kw_only=True):
    """Reply to an upload; `new` is false where the artifact was there already."""

    sha256: str
    length: Stored
    new: bool


class RoleReply(View, frozen=True, kw_only=True):
    """Versions of a published role and of the online roles above it."""

    namespace: str
    version: Stored
    snapshot: Stored
    timestamp: Stored


class RolloutRequest(Body, frozen=True, kw_only=True, omit_defaults=True):
    """Offer a change to a group or to one device.

    Fields at their default are not sent: a server from before a field takes the request. Waves, soak, limits and
    `timeout_s` that are not sent are those of the group's plan, or else the defaults; the ones sent win, which a plan
    leaves to admins.

    Attributes:
        instance: the name on the device.
        target: TUF target path; None removes the instance.
        group, device: exactly one of them (for a pin: the device in the path).
        where: selector of those devices of the group that are meant, judged when the rollout begins; empty for all.
        waves: sizes, each of all devices from the first on: `1, 5%, 100%`. The last must reach all. Empty for the
            default of a group of that size.
        config, port, grants, share_worker: None keeps what the instance has there; port 0 goes back to the shared port.
        keep_data: with a removal, whether the instance's data stays on the device.
        soak_s: how long a wave soaks from the success that met its gate; 0 by default.
        min_success, failures, max_lost: devices of each wave, as a number (`3`) or a share (`10%`): how many must
            succeed, may fail, may be lost. Empty or None for the defaults.
        on_breach: what more failures lead to; `rollback` by default.
        at_once: devices in progress at any time, 0 for no limit.
        catch_up: devices that come later in progress at any time, as a number or a share of the group.
        timeout_s: time without progress after which an online device is deferred as stuck; 900 by default.
        seed: of the draw; None for one that the server draws.
        starts_at: UTC; None for at once.
        allow_empty: succeed where the change concerns no device.
        supersede: take the place of an open rollout whose configuration this changes.
        share_lane: earlier name of `share_worker`, from clients before 0.2.0: only read.
    """

    instance: Word
    target: Word | None = None
    also: Labels = {}  # of an atomic set: its further instances, with their targets
    group: Word = ""
    device: Word = ""
    where: Text = ""
    waves: Word = ""
    config: Annotated[dict[Word, Document], msgspec.Meta(max_length=ITEMS_MAX)] | None = None
    port: Port | None = None
    grants: Grants | None = None
    share_worker: bool | None = None
    share_lane: bool | msgspec.UnsetType | None = msgspec.UNSET
    keep_data: bool = False
    attempt: Count | None = None
    soak_s: Seconds | None = None
    min_success: Word = ""
    failures: Count | Word | None = None
    max_lost: Word = ""
    on_breach: OnBreach | None = None
    at_once: Count | None = None
    catch_up: Word = ""
    timeout_s: Seconds | None = None
    seed: Count | None = None
    starts_at: Utc | None = None
    allow_empty: bool = False
    supersede: bool = False
    note: Text = ""

    def __post_init__(self) -> None:
        """Read the earlier names of fields."""
        wire.take_earlier(self, share_worker="share_lane")


class RemovalRequest(Body, frozen=True, kw_only=True):
    """Take an instance off a group or a device."""

    instance: Word
    group: Word = ""
    device: Word = ""
    keep_data: bool = False
    waves: Word = "100%"


class UndoRequest(Body, frozen=True, kw_only=True):
    """Offer the previous state again.

    Attributes:
        rollout: id or number of the rollout to undo; empty for the newest (of `group`, when given).
    """

    rollout: Word = ""
    group: Word = ""
    waves: Word = ""


class AbortRequest(Body, frozen=True, kw_only=True):
    """Abort a rollout; with `keep` devices that have the version, or began with it, stay there, pinned."""

    keep: bool = False


class CancelRequest(Body, frozen=True, kw_only=True):
    """Leave one device out of a rollout."""

    device: Word


class FreezeRequest(Body, frozen=True, kw_only=True):
    """Pause every rollout and catch-up queue of a group (empty: of the fleet), and refuse new ones."""

    reason: Text
    group: Word = ""


class UnfreezeRequest(Body, frozen=True, kw_only=True):
    """End a freeze of a group, or of the fleet."""

    group: Word = ""


class Freezes(View, frozen=True, kw_only=True):
    """Freezes in force: the reason by group; the empty name stands for the whole fleet."""

    freezes: dict[str, str] = {}


class RolloutDevice(View, frozen=True, kw_only=True):
    """Device in a rollout.

    Attributes:
        wave: from 1.
        progress: percent of the current phase, None where it has none.
        running: target path that answers now, by the device's word; empty for none or unknown.
        offered_at, acked_at, ended_at: offered by the server, first word of the device, decided.
        exercised: false when it was committed after fewer calls than its manifest asks.
        reason: why it is deferred, lost, not affected or unproven.
        retrying: the device tries again by itself.
        returning: the rollout ended, and the device has not confirmed its previous version yet.
        accepted: an operator accepted its failure or loss by resuming.
    """

    device: str
    wave: Stored
    outcome: Outcome
    online: bool = False
    previous: str = ""
    running: str = ""
    phase: Phase | None = None
    progress: Stored | None = None
    code: RejectCode | None = None
    message: str = ""
    exercised: bool = True
    reason: str = ""
    retrying: bool = False
    returning: bool = False
    accepted: bool = False
    offered_at: Utc | None = None
    acked_at: Utc | None = None
    ended_at: Utc | None = None
    timings_ms: dict[str, Stored] = {}
    log: tuple[str, ...] = ()


class WaveView(View, frozen=True, kw_only=True):
    """Wave: how it was written, how many devices it adds, whether it has been offered."""

    text: str
    devices: Stored
    offered: bool = False


class RolloutView(View, frozen=True, kw_only=True):
    """A rollout and its devices.

    Attributes:
        id, number: the id is echoed by devices; the number is for people.
        revision: grows with every change; pass it as `since` to wait for the next.
        target: what is offered, empty for a removal; `previous` is the group's settled target before, empty for none.
        where: selector that chose among the devices of the group; empty for all.
        reason: why it ended, is paused, or waits; a sentence, empty while all is well.
        undoes: the id of the rollout that this one takes back, empty for none.
        causes: why it is paused.
        waits_for: devices that it waits for, the first of `waits`.
        queue_closed: why its catch-up queue is closed; empty for open.
    """

    id: str
    number: Stored
    revision: Stored
    state: RolloutState
    instance: str
    target: str = ""
    previous: str = ""
    group: str = ""
    device: str = ""
    where: str = ""
    waves: tuple[WaveView, ...] = ()
    wave: Stored = 0
    devices: tuple[RolloutDevice, ...] = ()
    counts: dict[str, Stored] = {}
    reason: str = ""
    note: str = ""
    by: str = ""
    undoes: str = ""
    together: tuple[Stored, ...] = ()  # of an atomic set: the numbers of its rollouts, which are decided as one
    seed: Stored = 0
    causes: tuple[PauseCause, ...] = ()
    waits_for: tuple[str, ...] = ()
    waits: Stored = 0
    queue_closed: str = ""
    starts_at: Utc | None = None
    created_at: Utc
    ended_at: Utc | None = None


class Rollouts(View, frozen=True, kw_only=True):
    """Rollouts, newest first, without their devices."""

    rollouts: tuple[RolloutView, ...] = ()


class Excluded(View, frozen=True, kw_only=True):
    """A device that could not run the change, and why."""

    device: str
    reason: str


class Preflight(View, frozen=True, kw_only=True):
    """Effect that a rollout would have.

    Attributes:
        waves: device ids, wave by wave.
        new_grants: what this version may reach and the settled one may not: `interface wasi:clocks`, and so on.
        checked_by: what judged the component itself: an engine, or the table of interfaces that devices serve.
        problems: why no device could run the component.
    """

    waves: tuple[tuple[str, ...], ...] = ()
    excluded: tuple[Excluded, ...] = ()
    new_grants: tuple[str, ...] = ()
    previous: str = ""
    warnings: tuple[str, ...] = ()
    checked_by: str = ""
    problems: tuple[str, ...] = ()


class WithdrawnDevice(View, frozen=True, kw_only=True):
    """Device that a withdrawal concerns, once for each instance.

    Attributes:
        runs: whether the device runs the release by its newest word; otherwise it is only assigned.
        next: target path that it is offered instead; empty where it runs nothing under this name.
    """

    device: str
    instance: str
    online: bool = False
    runs: bool = False
    next: str = ""


class WithdrawalView(View, frozen=True, kw_only=True):
    """Effect that the withdrawal of a release would have.

    Attributes:
        devices: that run it, or are assigned it.
        rollouts: numbers of the rollouts that would end with it.
    """

    target: str
    devices: tuple[WithdrawnDevice, ...] = ()
    rollouts: tuple[Stored, ...] = ()


class AuditEntry(View, frozen=True, kw_only=True):
    """Entry of the audit log: an act of an operator, a device or the server itself."""

    number: Stored
    at: Utc
    actor: str
    act: str
    subject: str
    detail: str = ""


class Audit(View, frozen=True, kw_only=True):
    """Acts, newest first."""

    entries: tuple[AuditEntry, ...] = ()


class History(View, frozen=True, kw_only=True):
    """Page of a device's reports as it signed them, to prove what it ran (`signing.device_statements`).

    Attributes:
        certificate_pem: its newest certificate; the key in it never changes.
        reports: envelopes, byte for byte.
        boot_id, sequence: of the last report, to request the next page; 0 at the end.
    """

    device: str
    certificate_pem: str
    reports: tuple[msgspec.Raw, ...] = ()
    boot_id: str = ""
    sequence: Stored = 0


class Refusal(Exception):  # noqa: N818 - an answer, not a fault of ours
    """The server refuses a request; `problem` says why and what to do."""

    def __init__(self, status: int, kind: str, title: str, detail: str = "", action: str = "") -> None:
        super().__init__(title)
        self.problem = Problem(type=kind, title=title, status=status, detail=detail, action=action)
