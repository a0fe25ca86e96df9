"""Messages between device and server: reports, health, hello, acknowledgements, logs, enrolment.

MQTT carries them, except for enrolment, renewal and logs (HTTPS): `up/*` from a device to the server, `down/*` the
other way; `fleet.protocol.assignment` has what the director signs. Times are UTC. Every handler is idempotent: a
report is identified by (device, boot id, sequence), and the server acknowledges what it has stored.

Logs: a device posts `LogChunk`s to `/v1/logs` on the devices' listener, with its certificate, as long as the reply
says that an operator reads them. The server stores none of them.

Enrolment: a one-time token is one line of text, `wf1.<base64url of JSON>`. The token travels on standard input, in a
file or a systemd credential, never as an argument, and is sent to the server only after TLS verified against the CA
whose hash it holds.
"""

import base64
import binascii
from typing import ClassVar, Final

import msgspec

from fleet.protocol import bounds, wire
from fleet.protocol.bounds import Count, Figure, Percent, Stored, Utc
from fleet.protocol.codes import InstanceState, Phase, RejectCode
from fleet.protocol.wire import Message


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """Versions of a device's software. `engine` is wasmtime's version, empty where the device has none."""

    agent: str = ""
    host: str = ""
    engine: str = ""
    python: str = ""
    kernel: str = ""
    os: str = ""
    machine: str = ""


class Hello(Message, frozen=True, kw_only=True):
    """`up/hello`, after each connect: a nonce to answer, and where the device stands.

    Attributes:
        accepted, deployed, committed: the device's three assignment versions (0 for none): persisted as soon as the
            envelope verifies; being carried out; fully committed.
        acked: up to which report a server has said that it stored them; 0 for none.
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


class State(Message, frozen=True, kw_only=True):
    """`up/state`, retained; the will says `online: false`."""

    MAX_BYTES: ClassVar[int] = bounds.STATE_MAX_BYTES
    device: str
    online: bool
    boot_id: str = ""
    versions: Versions = Versions()


class DeviceResources(msgspec.Struct, frozen=True, kw_only=True):
    """The device's own figures; None where it has no such sensor.

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
        asked: questions that have been answered, or whose time is over.
        missed: those of them without a good answer: the component says that it is not well, fails, or is silent.
        well: the instance runs, and the last answer was good.
    """

    asked: Count = 0
    missed: Count = 0
    well: bool = True


class InstanceHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of an instance since it started; `calls` counts by outcome (`fleet.protocol.codes.CallOutcome`).

    Attributes:
        errors: answers with status 500 and above.
        p50_us, p99_us: guest time of a call, in microseconds, over the last calls.
        latencies: how many of those calls took up to each of `LATENCY_BOUNDS_MS`, and longer; empty without calls.
        cpu_ms: of the processor's time that its calls have taken, in milliseconds.
        denials: what it asked for and was refused while it ran.
        dropped_lines: of its log, over its limit.
        written_bytes: to its data, today (UTC).
        memory_bytes: private memory of the instance's lanes; of a lane that is shared, its part.
        outgoing: requests that it sent; those that it was not granted are among the denials.
        shared_lane: the lane that it shares with other instances, which say the same; empty for lanes of its own.
        checks: None where the manifest promises no health check, and from a host that does not count them.
    """

    instance: str
    target: str
    generation: Count
    state: InstanceState
    since: Utc | None = None
    restarts: Count = 0
    calls: dict[str, Count] = {}
    errors: Count = 0
    denials: Count = 0
    dropped_lines: Count = 0
    written_bytes: Count = 0
    outgoing: Count = 0
    p50_us: Count = 0
    p99_us: Count = 0
    latencies: tuple[Count, ...] = ()
    cpu_ms: Count = 0
    memory_bytes: Count = 0
    lanes: Count = 0
    shared_lane: str = ""
    phase: Phase = Phase.IDLE
    manifest_sha256: str = ""
    error: str = ""
    checks: HealthChecks | None = None


class Health(Message, frozen=True, kw_only=True):
    """`up/health`: how the device is. Only the newest matters.

    Attributes:
        containment: layer -> whether the host has it (`seccomp`, `network`, `mount`, `user`, `landlock`, `cgroup`).
        host_runs_as: how the host is run, which decides what isolation layers are possible (`root service`).
        problems: sentences for people, most urgent first.
        board: `resources` as older agents call it: read, and never written.
    """

    MAX_BYTES: ClassVar[int] = bounds.HEALTH_MAX_BYTES
    device: str
    boot_id: str
    at: Utc
    accepted: Count = 0
    committed: Count = 0
    versions: Versions = Versions()
    resources: DeviceResources = DeviceResources()
    instances: tuple[InstanceHealth, ...] = ()
    containment: dict[str, bool] = {}  # noqa: RUF012 - msgspec copies it for each struct
    host_runs_as: str = ""
    problems: tuple[str, ...] = ()
    board: DeviceResources | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        """Read the older name of `resources`."""
        if self.board is not msgspec.UNSET:
            msgspec.structs.force_setattr(self, "resources", self.board)
            msgspec.structs.force_setattr(self, "board", msgspec.UNSET)


class Report(Message, frozen=True, kw_only=True):
    """`up/report`: one step of a deployment, or the refusal of an assignment (then `instance` is empty).

    It travels in a DSSE envelope under the device key (`signing.device_statements`).

    Attributes:
        sequence: grows by one for each report of this device and never falls, over reboots too.
        assignment: the version that asked for it.
        attempt, rollout: as in the assignment's item.
        exercised: with COMMITTED, false when probation saw fewer than `min_calls` calls.
        running: target path that answers now, empty for none.
        code, message: why it failed or was refused, and a sentence for people with what to do next.
        log: the instance's last lines, at most 50 and 16 KiB.
        timings_ms: how long each phase took, by name.
        refused, refused_sha256: of an assignment that was refused as a whole: the version that it claims, which nobody
            has verified (0 where it cannot be read), and the sha256 of the envelope as it came.
        nonce: of the device's newest hello, which a freshness statement answers.
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
    exercised: bool = True
    running: str = ""
    code: RejectCode | None = None
    message: str = ""
    progress: Percent | None = None
    log: tuple[str, ...] = ()
    timings_ms: dict[str, Count] = {}  # noqa: RUF012 - msgspec copies it for each struct
    refused: Count = 0
    refused_sha256: str = ""
    nonce: str = ""
    assignment_sha256: str = ""
    previous: str = ""


class DesiredReply(Message, frozen=True, kw_only=True):
    """The answer to `GET /v1/desired?nonce=N`: what `down/desired` and `down/fresh` say, for a device without MQTT.

    Attributes:
        assignment: the envelope, as published.
        fresh: the director's statement for the nonce, an envelope too.
    """

    MAX_BYTES: ClassVar[int] = 2 * (bounds.DESIRED_MAX_BYTES + bounds.COMMAND_MAX_BYTES)
    assignment: str
    fresh: str


class Ack(Message, frozen=True, kw_only=True):
    """`down/ack`: the server has stored every report up to and including `sequence`.

    With `again` it has lost, or was never shown, what came after: the device sends what it still has of that.
    """

    MAX_BYTES: ClassVar[int] = bounds.ACK_MAX_BYTES
    sequence: Count
    again: bool = False


class Poke(Message, frozen=True, kw_only=True):
    """`all/poke`: check in within `jitter_s` seconds. Unsigned: it only makes devices ask."""

    MAX_BYTES: ClassVar[int] = bounds.ACK_MAX_BYTES
    jitter_s: Count = 60


class LogChunk(Message, frozen=True, kw_only=True):
    """Some lines of one instance's log, oldest first, without any secret.

    Attributes:
        command: sequence of the signed command that asked for them.
        left_out: lines since the last chunk that this device's policy keeps, or that came too fast.
        refused: why there are none, as a sentence; empty when there are.
        ended: nothing follows.
    """

    MAX_BYTES: ClassVar[int] = bounds.LOG_CHUNK_MAX_BYTES
    instance: str
    command: Count
    lines: tuple[str, ...] = ()
    left_out: Count = 0
    refused: str = ""
    ended: bool = False


class LogAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Reply to a `LogChunk`: tells whether anybody still reads."""

    more: bool


class LogView(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/devices/{id}/logs?command=N&after=K&wait=S`: the lines behind a place, and the next place.

    Attributes:
        heard: whether the device has answered the command at all.
    """

    lines: tuple[str, ...] = ()
    next: Stored = 0
    heard: bool = False
    ended: bool = False
    refused: str = ""
    left_out: Stored = 0


TOKEN_PREFIX: Final = "wf1."  # noqa: S105 - a format's name, not a secret

EXPIRED: Final = "certificate-expired"
OUTDATED: Final = "certificate-outdated"
"""Types of the problems that a new certificate mends: the old one is over, or its issuing CA is accepted no more."""


class BadTokenError(ValueError):
    """Not an enrolment token."""


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """Content of a one-time token: what a device knows before it has connected.

    Attributes:
        url: of the enrolment API, `https://host:port`.
        ca_sha256: of the fleet CA's certificate, DER.
        root_sha256: of TUF's root metadata to pin, as served.
        floor: no earlier than this is it now (devices without a clock).
        secret: known to the server only as a hash; good once.
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
            BadTokenError: not one, or damaged (a copied line that lost its end, for example).
        """
        line = text.strip()
        if not line.startswith(TOKEN_PREFIX) or len(line) > 4096:  # noqa: PLR2004
            raise BadTokenError("this is not an enrolment token: one starts with 'wf1.' (fleet enroll-token)")
        body = line.removeprefix(TOKEN_PREFIX)
        try:
            return msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=cls)
        except (binascii.Error, ValueError, *wire.JSON_ERRORS) as error:
            raise BadTokenError("this enrolment token is damaged: was it copied whole?") from error


class EnrolRequest(Message, frozen=True, kw_only=True):
    """`POST /v1/enrol`: what a device asks with. The token's secret authenticates it.

    Attributes:
        csr_pem: PKCS#10; its key is the device key, its subject is ignored.
        sealing_key: X25519 public key, base64, for secrets.
        sealing_proof: the same, signed by the device key (`signing.sealing.prove`).
    """

    MAX_BYTES: ClassVar[int] = bounds.API_BODY_MAX_BYTES
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
        sealing_proof: as at enrolment, from a device that enrolled before there was one.
    """

    csr_pem: str
    sealing_proof: str = ""


class RenewReply(msgspec.Struct, frozen=True, kw_only=True):
    """The new certificate, leaf first."""

    certificate_pem: str
    ca_pem: str
