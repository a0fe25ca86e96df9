"""Protocol of agent and host: requests, replies, events. All that either knows of the other.

A Unix socket of type SOCK_SEQPACKET: one packet is one message, JSON by msgspec, with the descriptor that belongs to
it, if any (SCM_RIGHTS). The host listens; the agent, or `fleet-agent restore`, connects. Each request carries an `id`
and is answered by one `Reply` with the same id; events carry none and come at any time to whoever is connected.

Requests are idempotent by (instance, generation): the generation grows with every change the agent makes to an
instance, and asking for what already is answers at once. Secrets stand in no packet: they come in a descriptor.

Versions. A package upgrade replaces the agent and leaves the host running, so each has to speak with the other of two
protocol versions ago. `Hello` and `Welcome` name the version of their sender, 1 where there is none. Unknown fields are
ignored; fields that a manifest has got since are left out at their defaults, as hosts refuse a limit that they do not
know. A request that cannot be read is answered with `Failed`, an unknown event is dropped, and neither ends the
connection. A new message, field without a default or word of a vocabulary raises `PROTOCOL`, and is only sent to
peers of that version.
"""

import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from agent.host.ipc import framing
from fleet.protocol import files, wire
from fleet.protocol.bounds import Count, MessageData, MessageTopic, MessageType, Metadata, Port, Seconds, Text, Word
from fleet.protocol.codes import InstanceState, RejectCode
from fleet.protocol.manifest import Grants, Limits, Manifest
from fleet.protocol.messages import InstanceHealth

PROTOCOL: Final = 5
"""Version of this protocol.

2 names its version, answers requests that it cannot read, and lists routes; 3 knows `Configure`;
4 knows `TakeMessages`; 5 knows `KeepData` and mounts data packages (`Run.packages`).
"""

CONFIGURES: Final = 3
"""Version from which on `Configure` is known."""

TAKES_MESSAGES: Final = 4
"""Version from which on `TakeMessages` is known."""

KEEPS_DATA: Final = 5
"""Version from which on `KeepData` is known."""

MOUNTS_DATA: Final = 5
"""Version from which on `Run.packages` is known."""

KEPT_MAX: Final = 2000
"""Instances that one `KeepData` names: as many as fit in a packet."""

OLDEST_PROTOCOL: Final = 1
"""Oldest version of a peer that is understood: two before are promised, and the first still is."""

_ENTRIES_MAX_BYTES: Final = 128 * 1024
RUNTIME: Final = "/run/wasmfleet"
"""Runtime directory of the packaged host, where its sockets are."""

WHY_NOT: Final = "host.why"
"""File beside the host's socket: why it did not start the last time, in one sentence; removed once it has."""

_WHY_NOT_MAX_CHARS: Final = 500
CHECK_WAIT_S: Final = 60.0
"""Longest wait of `Status` for a health check: half of what the agent waits for any answer."""

TAKE_WAIT_S: Final = 90
"""Longest wait of `TakeMessages` for a message: below what the agent waits for any answer."""

ROUTES_MAX: Final = 300
TAKEN_MAX: Final = 1000
"""Messages of components in one answer, far more than fit."""

T = TypeVar("T")


class IpcError(Exception):
    """The peer has closed the connection, or sent an invalid message."""


class UnreadableError(Exception):
    """A message of another version, which cannot be read.

    Attributes:
        id: of the request, or of the reply; None for an event.
    """

    def __init__(self, message: str, id: int | None) -> None:  # noqa: A002 - the name of the field
        super().__init__(message)
        self.id = id


class DataMount(msgspec.Struct, frozen=True, kw_only=True):
    """Data package to mount read-only.

    Attributes:
        path: of its one file, as the guest opens it.
        file: where it is on the device.
        owner: user to whom the file has to belong, as the host sets it: whoever asks; None for anyone.
    """

    path: str
    file: str
    owner: Count | None = None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Order to run an instance: everything the host needs to know of it.

    Attributes:
        target: TUF target path, for people and reports.
        grants, limits: already narrowed by operator and device policy.
        port: own port on the ingress address, None for the shared port under `/<instance>/`.
        data: the instance's own directory, empty for none.
        share_worker: whether the operator lets it share a worker with other instances of its publisher.
        share_lane: earlier name of `share_worker`, from agents before 0.2.0: only read.
        secrets: names of its secrets, whose values came with `PutSecrets` before.
        image_sha256: of the image that comes along; empty where the agent does not say, and the host hashes it.
        directories: directories of the device that it may read, by the path at which it sees each.
        serial: device of each serial port that is granted, by its name.
        packages: data packages that it reads.
    """

    instance: str
    generation: Count
    target: str
    manifest: Manifest
    grants: Grants
    limits: Limits
    config: dict[str, str] = {}
    port: Port | None = None
    data: str = ""
    share_worker: bool = False
    share_lane: bool | msgspec.UnsetType = msgspec.UNSET
    secrets: tuple[str, ...] = ()
    image_sha256: str = ""
    directories: dict[str, str] = {}
    serial: dict[str, str] = {}
    packages: tuple[DataMount, ...] = ()

    def __post_init__(self) -> None:
        """Read the earlier names of fields."""
        wire.take_earlier(self, share_worker="share_lane")


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """Ask for the host's state and what runs, from the instance after `after` on. Answered with `Welcome`.

    Attributes:
        protocol: version of the sender.
    """

    id: Count
    after: str = ""
    protocol: Count = 1


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """Run this image (its sealed memfd comes along).

    Where another generation of the instance runs, this is a swap by the trigger's rules: the new one is started beside
    it, checked, and given the calls; the old one is kept warm until `Commit` or `Revert`.
    Answered with `Started` when it takes calls, or with `Failed`: then the old one still answers.

    Attributes:
        together: instances that are started too, naming this one: none takes over before all can.
        probation: the generation is on probation until `Commit` names it: its health check is asked more often.
    """

    id: Count
    run: Run
    together: tuple[str, ...] = ()
    probation: bool = False


class PutSecrets(msgspec.Struct, frozen=True, kw_only=True, tag="put-secrets"):
    """Hold secrets for the start of this generation, which follows. Answered with `Done`.

    A sealed memfd comes along, with the values by name as a JSON object. The host hands it to the generation's
    workers and never reads it: no process that it forks has a value in its memory but the workers that it is for.
    """

    id: Count
    instance: str
    generation: Count


class EarlierPutSecrets(PutSecrets, frozen=True, kw_only=True, tag="entrust"):
    """`PutSecrets` as agents before 0.2.0 call it: only read."""


class Commit(msgspec.Struct, frozen=True, kw_only=True, tag="commit"):
    """End the probation of this generation, and drop the previous one. Answered with `Done`."""

    id: Count
    instance: str
    generation: Count


class Revert(msgspec.Struct, frozen=True, kw_only=True, tag="revert"):
    """Swap back to the previous generation, kept warm. `Failed` with HOST_GONE if there is none any more."""

    id: Count
    instance: str
    generation: Count


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """Stop the instance: drain, then end its workers. Answered with `Done`, also when it does not run."""

    id: Count
    instance: str


class Restart(msgspec.Struct, frozen=True, kw_only=True, tag="restart"):
    """Restart the running generation. Answered with `Done`."""

    id: Count
    instance: str


class Configure(msgspec.Struct, frozen=True, kw_only=True, tag="configure"):
    """Give the generation that runs this configuration, without a restart. Answered with `Done`.

    Answered with `Failed`, and nothing has changed, where that generation does not run alone, or the component reads
    its configuration at its start only. Hosts before `CONFIGURES` do not know it.
    """

    id: Count
    instance: str
    generation: Count
    config: dict[str, str]


class Status(msgspec.Struct, frozen=True, kw_only=True, tag="status"):
    """Ask for the figures of every instance, from the one after `after` on. Answered with `HostStats`.

    Attributes:
        check: an instance whose health check is asked first, so that its figures have the answer; empty for none.
            An instance without a worker that runs, or that does not answer within `CHECK_WAIT_S`, counts no question.
    """

    id: Count
    after: str = ""
    check: str = ""


class Logs(msgspec.Struct, frozen=True, kw_only=True, tag="logs"):
    """Ask for the last log lines of an instance. Answered with `Lines`.

    Attributes:
        excerpt: as many as `bounds.EXCERPT_MAX_BYTES` holds, with their times, from before a restart and of an instance
            that has stopped too; earlier hosts answer with the last lines.
    """

    id: Count
    instance: str
    excerpt: bool = False


class ListRoutes(msgspec.Struct, frozen=True, kw_only=True, tag="list-routes"):
    """Ask what answers where. Answered with `RouteList`."""

    id: Count


class TakeMessages(msgspec.Struct, frozen=True, kw_only=True, tag="take-messages"):
    """Ask for messages that components publish. Answered with `Messages` once there are any, or after a while.

    Hosts before `TAKES_MESSAGES` do not know it.

    Attributes:
        session: of the host that numbered the messages which were kept; empty for none.
        done: number up to which every message is kept, or refused.
        refused: number of each message that is not kept -> why.
        wait_s: longest wait for a message, where there is none.
    """

    id: Count
    session: Word = ""
    done: Count = 0
    refused: Annotated[dict[Count, Text], Meta(max_length=TAKEN_MAX)] = {}
    wait_s: Seconds = 0


class KeepData(msgspec.Struct, frozen=True, kw_only=True, tag="keep-data"):
    """Remove the data of every instance that is neither named here nor runs: files and pairs. Answered with `Done`.

    Hosts before `KEEPS_DATA` do not know it.

    Attributes:
        namespaces: whose shared buckets stay, beside those of what runs; None for all of them.
    """

    id: Count
    instances: Annotated[tuple[str, ...], Meta(max_length=KEPT_MAX)]
    namespaces: Annotated[tuple[str, ...], Meta(max_length=KEPT_MAX)] | None = None


_Change = PutSecrets | Start | Commit | Revert | Stop | Restart | Configure | KeepData
Request = Hello | _Change | Status | Logs | ListRoutes | TakeMessages


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """Instance that runs; `previous` is the generation kept warm, None for none."""

    instance: str
    generation: Count
    target: str
    state: InstanceState
    previous: Count | None = None


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome"):
    """Reply to `Hello`: the host's own state.

    Attributes:
        session: differs after each start of the host.
        engine: wasmtime's version, empty where the host has no engine.
        containment: isolation layer -> whether it holds.
        runs_as: which of the ways of running a host this is, as `fleet-host check` names them.
        ingress: address of the shared HTTP port, `127.0.0.1:8080`; empty while no router runs.
        interfaces: packages that the host serves to components.
        more: whether there are more instances than fit; ask again, after the last of these.
        protocol: version of the sender.
    """

    id: Count
    session: str
    version: str
    engine: str
    containment: dict[str, bool]
    ingress: str
    running: tuple[Running, ...]
    more: bool = False
    runs_as: str = ""
    interfaces: tuple[str, ...] = ()
    protocol: Count = 1


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    """Reply to `Start` and `Revert`: calls go to this generation.

    Attributes:
        replaced: the generation now kept warm, None for none.
        swap_ms: duration of the handover.
    """

    id: Count
    instance: str
    generation: Count
    replaced: Count | None = None
    swap_ms: Count = 0


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """Failure reply: nothing changed."""

    id: Count
    code: RejectCode
    message: str
    log: tuple[str, ...] = ()


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """Generic success reply."""

    id: Count


class HostStats(msgspec.Struct, frozen=True, kw_only=True, tag="host-stats"):
    """Reply to `Status`: health by instance; `written_bytes` by the host itself, `more` as in `Welcome`."""

    id: Count
    instances: tuple[InstanceHealth, ...]
    written_bytes: Count = 0
    more: bool = False


class EarlierHostStats(HostStats, frozen=True, kw_only=True, tag="figures"):
    """`HostStats` as hosts before 0.2.0 call them: only read."""


class Lines(msgspec.Struct, frozen=True, kw_only=True, tag="lines"):
    """Reply to `Logs`: lines, oldest first, at most 50 and 16 KiB but for an excerpt.

    Attributes:
        count: of all lines since the instance began.
    """

    id: Count
    lines: tuple[str, ...] = ()
    count: Count = 0


class Trapped(msgspec.Struct, frozen=True, kw_only=True, tag="trapped"):
    """Event: a call of the guest ended in a trap, a time-out or a limit, or its health check was not passed.

    Attributes:
        code: TRAPPED, RESTARTED when its process died, or HEALTH_FAILED when its health export says so.
        message: the wasm backtrace with names, or the limit that was hit.
        faults: guest faults of this generation so far.
    """

    instance: str
    generation: Count
    code: RejectCode
    message: str
    faults: Count
    log: tuple[str, ...] = ()


class Changed(msgspec.Struct, frozen=True, kw_only=True, tag="changed"):
    """Event: an instance changed its state (`backoff`, `quarantined`, `running` again)."""

    instance: str
    generation: Count
    state: InstanceState
    message: str = ""
    log: tuple[str, ...] = ()


class RouteView(msgspec.Struct, frozen=True, kw_only=True):
    """Route to an instance.

    Attributes:
        host: name in the Host field; empty for any.
        path: prefix of the path; empty for an instance with a port of its own.
        strip: the prefix is taken off.
        by_name: the instance's name is the route; otherwise the device's owner wrote it.
        port: the instance's own; 0 on the shared port.
        request_bytes, head_bytes: limits of the route; None for the instance's own.
        answers: None where no such instance runs.
    """

    instance: str
    host: str = ""
    path: str = ""
    strip: bool = False
    by_name: bool = False
    port: Count = 0
    request_bytes: Count | None = None
    head_bytes: Count | None = None
    answers: bool | None = None


class RouteList(msgspec.Struct, frozen=True, kw_only=True, tag="route-list"):
    """Reply to `ListRoutes`, in the order in which routes are looked for.

    Attributes:
        ingress, tls: addresses of the shared port, without and with TLS; empty for none.
        names: of the certificates.
    """

    id: Count
    ingress: str = ""
    tls: str = ""
    names: tuple[str, ...] = ()
    routes: tuple[RouteView, ...] = ()


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Message of a component; `number` grows within the host's session."""

    number: Count
    instance: Word
    topic: MessageTopic
    data: MessageData = b""
    content_type: MessageType = ""
    metadata: Metadata = ()


class Messages(msgspec.Struct, frozen=True, kw_only=True, tag="messages"):
    """Reply to `TakeMessages`: messages that are not kept yet, in order; each comes again until it is.

    `session`: of the host. Others, which did not fit, come with the next reply.
    """

    id: Count
    session: Word
    messages: tuple[Message, ...] = ()


Reply = Welcome | Started | Failed | Done | HostStats | Lines | RouteList | Messages
Event = Trapped | Changed
FromHost = Reply | Event

_requests: Final[msgspec.json.Decoder[Request]] = msgspec.json.Decoder(Request | EarlierPutSecrets)
_from_host: Final[msgspec.json.Decoder[FromHost]] = msgspec.json.Decoder(FromHost | EarlierHostStats)


def why_not(runtime: Path) -> str:
    """Return why the host did not start, in its own words; empty if it has not written a reason."""
    try:
        with files.open_to_read(runtime / WHY_NOT) as file:
            text = file.read(4 * _WHY_NOT_MAX_CHARS).decode(errors="replace")
    except OSError:
        return ""
    return " ".join(text[:_WHY_NOT_MAX_CHARS].split())


def page(entries: Iterable[T]) -> tuple[tuple[T, ...], bool]:
    """Return the first entries, as many as fit in a message, and whether there are more."""
    kept: list[T] = []
    size = 0
    for entry in entries:
        size += len(msgspec.json.encode(entry)) + 1
        if size > _ENTRIES_MAX_BYTES:
            return tuple(kept), True
        kept.append(entry)
    return tuple(kept), False


def encode(message: Request | FromHost) -> bytes:
    """Return the packet of a message. Raises `IpcError`: larger than a packet may be."""
    data = msgspec.json.encode(_for_earlier(message) if isinstance(message, Start) else message)
    if len(data) > framing.PACKET_MAX_BYTES:
        raise IpcError(
            f"{type(message).__name__}: {len(data)} bytes, at most {framing.PACKET_MAX_BYTES} fit in a packet"
        )
    return data


def _for_earlier(start: Start) -> dict[str, Any]:
    """Return a request to start without the fields of manifest and limits that are newer than a host may be."""
    value: dict[str, Any] = msgspec.to_builtins(start)
    run = start.run
    narrowed = msgspec.structs.replace(run.manifest, limits=run.limits)
    value["run"] |= {"manifest": run.manifest.plain(), "limits": narrowed.plain()["limits"]}
    return value


def compatibility(peer: str, version: str, protocol: int) -> str:
    """Return a sentence where this program and a peer of a protocol version cannot talk; empty where they can."""
    if OLDEST_PROTOCOL <= protocol <= PROTOCOL + 2:
        return ""
    older, newer = (peer, "this program") if protocol < OLDEST_PROTOCOL else ("this program", peer)
    return (
        f"{peer} {version} speaks version {protocol} of the protocol between agent and host, and this program version "
        f"{PROTOCOL} and those before: {older} is too old for {newer}; upgrade both, and restart fleet-host"
    )


def send(sock: socket.socket, message: Request | FromHost, fd: int | None = None) -> None:
    """Send one message, with a descriptor if there is one (it stays open here).

    Raises:
        IpcError: larger than a packet may be, or the peer has closed the connection.
        BlockingIOError: a non-blocking socket is full; nothing was sent.
    """
    data = encode(message)
    try:
        framing.send_packet(sock, data, () if fd is None else (fd,))
    except BlockingIOError:
        raise
    except OSError as error:
        raise IpcError(f"cannot reach the other side: {error.strerror}") from error


class FileLostError(Exception):
    """The descriptor of a request did not arrive: this process may open no more. The connection is intact."""

    def __init__(self, request: Request) -> None:
        super().__init__(framing.no_descriptors("the host"))
        self.id = request.id


def _receive(sock: socket.socket) -> tuple[bytes, int | None, bool]:
    """Receive a packet, its descriptor, and whether that was lost."""
    try:
        data, fds = framing.receive_packet(sock, max_fds=1)
    except framing.DescriptorsLostError as error:
        return error.data, None, True
    except framing.GoneError as error:
        raise IpcError(str(error)) from error
    framing.close_all(fds[1:])  # there is room for a second one, by alignment
    return data, fds[0] if fds else None, False


def receive_request(sock: socket.socket) -> tuple[Request, int | None]:
    """Receive the next request and its descriptor, which the caller owns.

    Raises:
        IpcError: closed, or not a request.
        UnreadableError: a request of another version.
        FileLostError: a request whose descriptor this process has no room for.
        BlockingIOError: nothing there on a non-blocking socket.
    """
    data, fd, lost = _receive(sock)
    try:
        request = _requests.decode(data)
    except wire.JSON_ERRORS as error:
        if fd is not None:
            os.close(fd)
        raise _unreadable(data, error, "not a request") from error
    if lost:
        raise FileLostError(request)
    return request, fd


def receive_from_host(sock: socket.socket) -> FromHost:
    """Receive the host's next reply or event.

    Raises:
        IpcError: closed, or not a message of the host's.
        UnreadableError: a message of another version.
        BlockingIOError: nothing there on a non-blocking socket.
    """
    return receive_with_bytes(sock)[0]


def receive_with_bytes(sock: socket.socket) -> tuple[FromHost, bytes]:
    """Receive as `receive_from_host`, with the bytes that came: a newer host says more than this program reads."""
    data, fd, _ = _receive(sock)
    if fd is not None:
        os.close(fd)
    try:
        return _from_host.decode(data), data
    except wire.JSON_ERRORS as error:
        raise _unreadable(data, error, "not a message of the host's") from error


def _unreadable(data: bytes, error: Exception, what: str) -> IpcError | UnreadableError:
    """Return the error for a message that cannot be read: of another version, or none at all."""
    try:
        fields = msgspec.json.decode(data, type=dict[str, Any])
        number = msgspec.convert(fields.get("id"), Count | None)
        return UnreadableError(f"{str(fields['type'])[:40]}: {error}", number)
    except (KeyError, *wire.JSON_ERRORS):
        return IpcError(f"{what}: {error}")


def new_socket() -> socket.socket:
    """Return a new socket of the type that this protocol needs."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


class StartError(Exception):
    """Exception form of `Failed`: nothing changed."""

    def __init__(self, code: RejectCode, message: str) -> None:
        super().__init__(message)
        self.code = code


_MESSAGE_MAX_CHARS: Final = 4096
# Characters that move a terminal's cursor, and grow sixfold in JSON: a report of it would be too large to be taken.
_CONTROLS: Final = dict.fromkeys({*range(32), *range(0x7F, 0xA0)} - {ord("\t"), ord("\n")}, "\N{REPLACEMENT CHARACTER}")


def plain(text: str, most_chars: int = _MESSAGE_MAX_CHARS) -> str:
    """Return text of a guest or its engine fit for reports and terminals: shortened, without control characters."""
    return text[:most_chars].translate(_CONTROLS)
