"""Messages between device and server: reports, health, hello, acknowledgements, logs, enrolment.

MQTT carries them, except for enrolment, renewal, logs and archives (HTTPS): `up/*` from a device to the server,
`down/*` the other way; where a network blocks MQTT, an `Exchange` over HTTPS does. `fleet.protocol.assignment` has what
the director signs. Times are UTC. Every handler is idempotent: a report is identified by (device, boot id, sequence),
and the server acknowledges what it has stored.

Logs: a device posts `LogChunk`s to `/v1/logs` on the devices' listener, with its certificate, as long as the reply
says that an operator reads them. The server stores none of them. An archive that an operator asked for comes to
`/v1/diagnose`, sealed to that operator: a note first, then `PUT` with the bytes.

Enrolment: a one-time token is one line of text, `wf1.<base64url of JSON>`. The token travels on standard input, in a
file or a systemd credential, never as an argument, and is sent to the server only after TLS verified against the CA
whose hash it holds.
"""

import base64
import binascii
from typing import Annotated, ClassVar, Final

import msgspec
from msgspec import Meta

from fleet.protocol import bounds, wire
from fleet.protocol.bounds import (
    Count,
    Counts,
    Figure,
    MessageData,
    MessageTopic,
    MessageType,
    Metadata,
    Percent,
    Stored,
    Utc,
    Word,
)
from fleet.protocol.codes import InstanceState, Phase, RejectCode
from fleet.protocol.metrics import Metrics
from fleet.protocol.wire import Message


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """Versions of a device's software.

    Attributes:
        engine: wasmtime's version, empty where the device has none.
        interfaces: packages that its host serves to components, such as `wasi:clocks@0.2`; empty for an earlier host.
        commands: verbs of the commands that its agent knows; empty for an earlier agent.
    """

    agent: str = ""
    host: str = ""
    engine: str = ""
    python: str = ""
    kernel: str = ""
    os: str = ""
    machine: str = ""
    interfaces: Annotated[tuple[str, ...], Meta(max_length=bounds.INTERFACES_MAX)] = ()
    commands: Annotated[tuple[Word, ...], Meta(max_length=bounds.COMMANDS_MAX)] = ()


class Hello(Message, frozen=True, kw_only=True):
    """`up/hello`, after each connect: a nonce to answer, and the device's versions.

    Attributes:
        accepted, deployed, committed: the device's three assignment versions (0 for none): persisted as soon as the
            envelope verifies; being carried out; fully committed.
        acked: newest report that a server has acknowledged; 0 for none.
        readings: epoch of its readings, of which a server that takes any says how far it has them (`ReadingsAck`);
            empty from agents without.
    """

    MAX_BYTES: ClassVar[int] = bounds.HELLO_MAX_BYTES
    device: str
    nonce: str
    boot_id: str
    accepted: Count = 0
    deployed: Count = 0
    committed: Count = 0
    versions: Versions = Versions()
    acked: Count = 0
    readings: Word = ""


class State(Message, frozen=True, kw_only=True):
    """`up/state`, retained; the will says `online: false`."""

    MAX_BYTES: ClassVar[int] = bounds.STATE_MAX_BYTES
    device: str
    online: bool
    boot_id: str = ""
    versions: Versions = Versions()


class DeviceResources(msgspec.Struct, frozen=True, kw_only=True):
    """Resources of the device; None where it has no such sensor.

    Attributes:
        load: the one-minute load average.
        written_bytes: written to disk by agent and host since the agent started.
    """

    uptime_s: Count = 0
    load: Figure = 0.0
    cpus: Count = 0
    memory_total_bytes: Count = 0
    memory_available_bytes: Count = 0
    disk_total_bytes: Count = 0
    disk_free_bytes: Count = 0
    temperature_c: Figure | None = None
    clock_synchronised: bool | None = None
    written_bytes: Count = 0


LATENCY_BOUNDS_MS: Final = (1, 3, 10, 30, 100, 300, 1000)


class HealthChecks(msgspec.Struct, frozen=True, kw_only=True):
    """Answers of an instance's health check since its generation took over.

    Attributes:
        asked: checks that were answered or timed out.
        missed: those without a good answer: the component reports that it is unhealthy, fails, or does not answer.
        well: the instance runs and the last answer was good.
    """

    asked: Count = 0
    missed: Count = 0
    well: bool = True


class QueueHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Messages on the device's bus for an instance, since the host started.

    Attributes:
        waiting, waiting_bytes: that it has not handled yet, with what belongs to them.
        oldest_s: age of the oldest of these; 0 for none.
        delivered: that its handler has handled.
        failed: runs of the handler that failed; each message has several.
        dropped: for want of room, or as it may not have them any more.
        dead_letters: given up after as many runs as a message gets.
    """

    waiting: Count = 0
    waiting_bytes: Count = 0
    oldest_s: Count = 0
    delivered: Count = 0
    failed: Count = 0
    dropped: Count = 0
    dead_letters: Count = 0


class LocalFigures(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Figures of an instance for its device's own metrics, which are not sent to the server.

    Attributes:
        durations: calls since its generation started, up to each of `LATENCY_BOUNDS_MS` and longer, each in one.
        durations_us: sum of these, in microseconds.
        swaps: changes of its generation since the host started, rollbacks included.
        swap_ms: time that these took to hand over; where one generation stops before the next starts, without answers.
    """

    durations: Annotated[tuple[Count, ...], Meta(max_length=bounds.NAMES_MAX)] = ()
    durations_us: Count = 0
    swaps: Count = 0
    swap_ms: Count = 0


class InstanceHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of an instance since it started; `calls` counts by outcome (`fleet.protocol.codes.CallOutcome`).

    Attributes:
        errors: answers with status 500 and above.
        p50_us, p99_us: guest time of a call, in microseconds, over the last calls.
        latencies: number of those calls up to each of `LATENCY_BOUNDS_MS`, and of longer ones; empty without calls.
        cpu_ms: processor time of its calls, in milliseconds.
        denials: requests of the running component that its grants did not allow.
        dropped_lines: log lines over its limit.
        written_bytes: written to its data today (UTC).
        memory_bytes: private memory of the instance's workers; of a shared worker, its part.
        outgoing: requests that it sent; those without a grant count as denials.
        keyvalue_reads, keyvalue_writes, keyvalue_bytes: requests to its key-value store, and bytes of keys and values.
        shared_worker: the worker that it shares with other instances, which say the same; empty for workers of its own.
        `lanes`, `shared_lane`: earlier names of `workers` and `shared_worker`, from devices before 0.2.0: only read.
        checks: None where the manifest has no health check, or the host does not count them.
        messages: for it, on the device's bus; None where it receives none.
        metrics: figures of the component's own; unset without their grant, and where none came along.
        local: unset where they come from a device.
    """

    instance: str
    target: str
    generation: Count
    state: InstanceState
    since: Utc | None = None
    restarts: Count = 0
    calls: Counts = {}
    errors: Count = 0
    denials: Count = 0
    dropped_lines: Count = 0
    written_bytes: Count = 0
    outgoing: Count = 0
    keyvalue_reads: Count = 0
    keyvalue_writes: Count = 0
    keyvalue_bytes: Count = 0
    p50_us: Count = 0
    p99_us: Count = 0
    latencies: tuple[Count, ...] = ()
    cpu_ms: Count = 0
    memory_bytes: Count = 0
    workers: Count = 0
    lanes: Count | msgspec.UnsetType = msgspec.UNSET
    shared_worker: str = ""
    shared_lane: str | msgspec.UnsetType = msgspec.UNSET
    phase: Phase = Phase.IDLE
    manifest_sha256: str = ""
    error: str = ""
    checks: HealthChecks | None = None
    messages: QueueHealth | None = None
    metrics: Metrics | msgspec.UnsetType = msgspec.UNSET
    local: LocalFigures | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        """Read the earlier names of fields."""
        wire.take_earlier(self, workers="lanes", shared_worker="shared_lane")


class ReadingsHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Readings that a device keeps until the server has stored them.

    Attributes:
        waiting, waiting_bytes: that are not acknowledged yet.
        oldest_s: age of the oldest of these; 0 for none.
        dropped: that were given up since the device began to keep any, for want of room or since they were too old.
        refused: messages that were not taken since the agent started.
    """

    waiting: Count = 0
    waiting_bytes: Count = 0
    oldest_s: Count = 0
    dropped: Count = 0
    refused: Count = 0


class Health(Message, frozen=True, kw_only=True):
    """`up/health`: condition of the device and its instances. Only the newest matters.

    Attributes:
        containment: layer -> whether the host has it (`seccomp`, `network`, `mount`, `user`, `landlock`, `cgroup`).
        host_runs_as: the way in which the host is run (`root service`), which limits its isolation layers.
        problems: sentences for people, most urgent first.
        board: older agents' name of `resources`: read, never written.
        readings: None from agents that keep none.
        data: target of the data package that is kept under each name.
    """

    MAX_BYTES: ClassVar[int] = bounds.HEALTH_MAX_BYTES
    device: str
    boot_id: str
    at: Utc
    accepted: Count = 0
    committed: Count = 0
    versions: Versions = Versions()
    resources: DeviceResources = DeviceResources()
    instances: Annotated[tuple[InstanceHealth, ...], Meta(max_length=bounds.INSTANCES_MAX)] = ()
    containment: Annotated[dict[str, bool], Meta(max_length=bounds.NAMES_MAX)] = {}  # noqa: RUF012 - msgspec copies it for each struct
    host_runs_as: str = ""
    problems: Annotated[tuple[str, ...], Meta(max_length=bounds.PROBLEMS_MAX)] = ()
    board: DeviceResources | msgspec.UnsetType = msgspec.UNSET
    readings: ReadingsHealth | None = None
    data: Annotated[dict[str, str], Meta(max_length=bounds.ITEMS_MAX)] = {}  # noqa: RUF012 - msgspec copies it for each struct

    def __post_init__(self) -> None:
        """Take `resources` by its older name."""
        if self.board is not msgspec.UNSET:
            msgspec.structs.force_setattr(self, "resources", self.board)
            msgspec.structs.force_setattr(self, "board", msgspec.UNSET)


class Report(Message, frozen=True, kw_only=True):
    """`up/report`: one step of a deployment, the state of an instance, or of an assignment as a whole.

    Of a whole assignment (then `instance` is empty) it tells that it was refused, or that all of it is committed. A
    device reports the state of each instance again when the server asks it to check in.

    It travels in a DSSE envelope under the device key (`signing.device_statements`).

    Attributes:
        sequence: grows by one with each report of this device, over reboots too.
        assignment: the version that asked for it.
        attempt, rollout: as in the assignment's item.
        generation: of the instance in the host, with PROBATION and COMMITTED the one that answers; 0 for none, as after
            a removal; None from an agent that does not sign its state.
        exercised: with COMMITTED, false when probation saw fewer than `min_calls` calls.
        undecided: with COMMITTED, which gates on metrics had too few samples; unset for none.
        running: target path that serves now, empty for none.
        code, message: reason of the failure or refusal, and a sentence for people with what to do next.
        tries_ended: with FAILED and ROLLED_BACK, the device does not try this attempt again by itself, although it does
            after most failures of this code (`codes.RETRYABLE`).
        log: the instance's last lines before the failure, as many as the device's owner lets go and
            `bounds.EXCERPT_MAX_BYTES` holds; with their times, where the host keeps them.
        timings_ms: duration of each phase, by name.
        refused, refused_sha256: of an assignment that was refused as a whole: the version that it claims, which nobody
            has verified (0 where it cannot be read), and the sha256 of the envelope as it came.
        nonce: of the device's newest hello, to be answered by a freshness statement.
        assignment_sha256: of the accepted assignment's payload; empty for none.
        previous: sha256 of the report before this one, those of mere progress left out; empty for the first.
    """

    MAX_BYTES: ClassVar[int] = bounds.REPORT_MAX_BYTES
    device: str
    boot_id: str
    sequence: Count
    at: Utc
    assignment: Count
    instance: str = ""
    target: str = ""
    manifest_sha256: str = ""
    attempt: Count = 0
    rollout: str = ""
    phase: Phase = Phase.IDLE
    generation: Count | None = None
    exercised: bool = True
    undecided: str | msgspec.UnsetType = msgspec.UNSET
    running: str = ""
    code: RejectCode | None = None
    message: str = ""
    tries_ended: bool = False
    progress: Percent | None = None
    log: tuple[str, ...] = ()
    timings_ms: Counts = {}  # noqa: RUF012 - msgspec copies it for each struct
    refused: Count = 0
    refused_sha256: str = ""
    nonce: str = ""
    assignment_sha256: str = ""
    previous: str = ""


class DesiredReply(Message, frozen=True, kw_only=True):
    """Reply to `GET /v1/desired?nonce=N`: the content of `down/desired` and `down/fresh`, for a device without MQTT.

    Attributes:
        assignment: the envelope, as published.
        fresh: the director's statement for the nonce, an envelope too.
    """

    MAX_BYTES: ClassVar[int] = 2 * (bounds.DESIRED_MAX_BYTES + bounds.COMMAND_MAX_BYTES)
    assignment: str
    fresh: str


class Ack(Message, frozen=True, kw_only=True):
    """`down/ack`: the server has stored every report up to and including `sequence`.

    With `again` the server lacks later reports: the device sends those that it still has.
    """

    MAX_BYTES: ClassVar[int] = bounds.ACK_MAX_BYTES
    sequence: Count
    again: bool = False


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """Message of a component, as its device keeps it until the server has stored it.

    Attributes:
        position: among all readings of the device: one more than that of the reading before it.
        sequence: among those of its instance, in the order in which the component sent them.
        at: when the device took it, by its clock.
        data: as base64 in JSON.
    """

    position: Count
    instance: Word
    sequence: Count
    at: Utc
    topic: MessageTopic
    data: MessageData = b""
    content_type: MessageType = ""
    metadata: Metadata = ()


class Readings(Message, frozen=True, kw_only=True):
    """`up/readings`: the oldest readings that are not acknowledged; later ones follow once they are.

    Attributes:
        epoch: of the device's spool: another one after the spool was lost, when positions and sequences begin anew.
    """

    MAX_BYTES: ClassVar[int] = bounds.READINGS_MAX_BYTES
    device: Word
    epoch: Word
    readings: Annotated[tuple[Reading, ...], Meta(max_length=bounds.READINGS_MAX)] = ()


class ReadingsAck(Message, frozen=True, kw_only=True):
    """`down/readings`: the server has every reading of this epoch up to and including `position`, or will never."""

    MAX_BYTES: ClassVar[int] = bounds.ACK_MAX_BYTES
    epoch: Word
    position: Count


class Poke(Message, frozen=True, kw_only=True):
    """`all/poke`: check in within `jitter_s` seconds. Unsigned: it only makes devices ask."""

    MAX_BYTES: ClassVar[int] = bounds.ACK_MAX_BYTES
    jitter_s: Count = 60


class Packet(msgspec.Struct, frozen=True, kw_only=True):
    """Message in an `Exchange`: what MQTT carries on the topic of this channel.

    Attributes:
        number: of a message to the device, growing within a session; 0 of one from it.
    """

    channel: Word
    payload: Annotated[str, Meta(max_length=bounds.DESIRED_MAX_BYTES)]
    number: Count = 0


class Exchange(Message, frozen=True, kw_only=True):
    """`POST /v1/exchange`: the conversation of a device whose network blocks MQTT, both ways.

    The server keeps messages to the device until it says that it has received them.

    Attributes:
        session: as the last reply called it; empty at first. Another one in the reply means that the server knows
            nothing of this session any more, as after its restart.
        up: messages to the server, oldest first.
        received: number of the newest message that came in this session.
        wait_s: time that the server may hold its reply for want of a message.
        ends: the device says goodbye, or uses the broker again.
    """

    MAX_BYTES: ClassVar[int] = bounds.API_BODY_MAX_BYTES
    session: Word = ""
    up: Annotated[tuple[Packet, ...], Meta(max_length=bounds.EXCHANGE_MESSAGES_MAX)] = ()
    received: Count = 0
    wait_s: Count = 0
    ends: bool = False


class ExchangeReply(Message, frozen=True, kw_only=True):
    """Reply to an `Exchange`.

    Attributes:
        down: messages to the device that it has not received yet, oldest first.
        next_s: after which the device asks again; 0 for at once.
    """

    MAX_BYTES: ClassVar[int] = bounds.API_BODY_MAX_BYTES
    session: Word
    down: tuple[Packet, ...] = ()
    next_s: Count = 0


class LogChunk(Message, frozen=True, kw_only=True):
    """Some lines of one instance's log, oldest first, without any secret.

    Attributes:
        command: sequence of the signed command that asked for them.
        left_out: lines since the last chunk that the device's policy withholds, or that exceeded the rate limit.
        refused: a sentence that says why there are no lines; empty when there are.
        ended: no further chunk follows.
    """

    MAX_BYTES: ClassVar[int] = bounds.LOG_CHUNK_MAX_BYTES
    instance: str
    command: Count
    lines: tuple[str, ...] = ()
    left_out: Count = 0
    refused: str = ""
    ended: bool = False


class LogAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Reply to a `LogChunk`: whether an operator still reads."""

    more: bool


class LogView(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/devices/{id}/logs?command=N&after=K&wait=S`: lines after a position, and the next position.

    Attributes:
        heard: whether the device has answered the command.
    """

    lines: tuple[str, ...] = ()
    next: Stored = 0
    heard: bool = False
    ended: bool = False
    refused: str = ""
    left_out: Stored = 0


class ArchiveNote(Message, frozen=True, kw_only=True):
    """`POST /v1/diagnose`: a device says that it makes the archive that a command asked for, or why there is none.

    Attributes:
        command: sequence of the signed command.
        refused: a sentence that says why there is no archive; empty while one is made.
        failed: the archive could not be made, although the device's owner allows it.
    """

    MAX_BYTES: ClassVar[int] = bounds.ARCHIVE_NOTE_MAX_BYTES
    command: Count
    refused: Annotated[str, Meta(max_length=2000)] = ""
    failed: bool = False


class ArchiveTaken(msgspec.Struct, frozen=True, kw_only=True):
    """Reply to an `ArchiveNote` and to the archive itself."""

    bytes: Stored = 0


class ArchiveView(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/devices/{id}/diagnose?command=N&known=S&wait=W`: progress of an archive.

    Attributes:
        step: `asked`, `made` (the device makes it), `sent` (on its way to the server), `ready`, `refused` or `failed`.
        received, bytes: of the sealed archive, so far and in all.
        refused: the device's reason, with `refused` and `failed`.
    """

    step: str
    received: Stored = 0
    bytes: Stored = 0
    refused: str = ""


TOKEN_PREFIX: Final = "wf1."  # noqa: S105 - a format's name, not a secret

EXPIRED: Final = "certificate-expired"
OUTDATED: Final = "certificate-outdated"
"""Problem types that a new certificate solves: the old one has expired, or its issuing CA is no longer accepted."""

REVOKED: Final = "revoked"
"""Type of the problem that an operator has revoked the device."""

AHEAD: Final = "ahead"
"""Type of the problem that a device's assignment is newer than any that its server knows: the device shows it."""


class BadTokenError(ValueError):
    """The text is no enrolment token."""


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """Content of a one-time token: everything that a device needs for its first connection.

    Attributes:
        url: of the enrolment API, `https://host:port`.
        ca_sha256: of the fleet CA's certificate, DER.
        root_sha256: of TUF's root metadata to pin, as served.
        floor: lower bound of the present time, for devices without a clock.
        secret: valid once; the server keeps only its hash.
    """

    url: str
    fleet: str
    ca_sha256: str
    root_sha256: str
    floor: Utc
    expires: Utc
    secret: str
    group: str = ""

    def encode(self) -> str:
        """Return the token as one line of text."""
        return TOKEN_PREFIX + base64.urlsafe_b64encode(msgspec.json.encode(self)).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> "Token":
        """Read a token.

        Raises:
            BadTokenError: no token, or a damaged one (a copied line that lost its end, for example).
        """
        line = text.strip()
        if not line.startswith(TOKEN_PREFIX) or len(line) > 4096:  # noqa: PLR2004
            raise BadTokenError("this is not an enrolment token: one starts with 'wf1.'")
        body = line.removeprefix(TOKEN_PREFIX)
        try:
            return msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=cls)
        except (binascii.Error, ValueError, *wire.JSON_ERRORS) as error:
            raise BadTokenError("this enrolment token is damaged: was it copied whole?") from error


class EnrolRequest(Message, frozen=True, kw_only=True):
    """`POST /v1/enrol`: request of a device, authenticated by the token's secret.

    Attributes:
        csr_pem: PKCS#10; its key is the device key, its subject is ignored.
        sealing_key: X25519 public key, base64, for secrets.
        sealing_proof: the same, signed by the device key (`signing.sealing.prove`).
    """

    MAX_BYTES: ClassVar[int] = bounds.ENROL_MAX_BYTES
    secret: str
    name: str
    csr_pem: str
    sealing_key: str
    machine: str = ""
    sealing_proof: str = ""


class Enrolled(Message, frozen=True, kw_only=True):
    """Reply to an enrolment: the device's identity and addresses.

    Attributes:
        device: its id, also the CN of the certificate.
        certificate_pem, ca_pem: leaf first, then any issuing CA; the fleet CA apart.
        root: TUF root metadata, as JSON text, whose sha256 the token pinned.
        devices_url: the HTTPS API for devices.
        mqtt: broker addresses in the order to try, `mqtts://host:8883`.
    """

    MAX_BYTES: ClassVar[int] = bounds.API_BODY_MAX_BYTES
    device: str
    fleet: str
    group: str
    certificate_pem: str
    ca_pem: str
    root: str
    devices_url: str
    mqtt: tuple[str, ...]
    production: bool


class RenewRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/renew` on the devices' listener: a PKCS#10 request for the enrolled key; its subject is ignored.

    Attributes:
        sealing_proof: as at enrolment, from a device that enrolled without one.
    """

    csr_pem: str
    sealing_proof: str = ""


class RenewReply(msgspec.Struct, frozen=True, kw_only=True):
    """The new certificate, leaf first."""

    certificate_pem: str
    ca_pem: str
