"""Messages between supervisor, zygote and worker: one packet, one message, with the descriptors that belong to it.

The worker's end of this socket is all that it has of the world, beside the connections of its clients. A worker trusts
the supervisor; the supervisor trusts nothing a worker says further than that worker's own figures and log.

Each `Request` carries an `id`, and its `Reply` echoes it. The field has a default and unknown fields are ignored: after
an upgrade, a supervisor from before it gives no ids to the workers of a new zygote, and reads none. A reply without an
id belongs to the request that has waited longest for one of its type.
"""

import socket
import struct
import time
from collections.abc import Container
from typing import Final, NamedTuple

import msgspec

from agent.host.ipc.framing import DescriptorsLostError, GoneError, close_all, receive_packet, send_packet
from fleet.component.wasi import MESSAGING_HANDLER
from fleet.protocol import wire
from fleet.protocol.bounds import Count, MessageData, MessageTopic, MessageType, Metadata
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants, Http, Limits, OnMessage, Schedule, Service, Trigger

FAULTS_A_MINUTE: Final = 300
"""Faults that a worker reports one by one; all are counted."""

_OTHERS_A_MINUTE: Final = 2500
ABANDONED: Final = 75
"""Exit status of a worker whose call went past a limit after its slot had left: EX_TEMPFAIL of sysexits.h."""

SERVICE_ENDED: Final = 77
"""Exit status of a worker whose service has ended by itself."""

RENEW: Final = 76
"""Exit status of a worker whose channel has ended: its router did, or closed it. Another worker takes its place."""

IMAGES_MAX: Final = 32
"""Images that one shared worker may have open."""

QUEUED: Final = "host: requests wait for one that takes long: limits.concurrency allows {} at a time"
"""Line of an instance's log, at most one in `QUEUE_SAID_EVERY_S`."""

QUEUE_SAID_EVERY_S: Final = 60


FORKED: Final = b"F"
EXITED: Final = b"X"
_ZYGOTE_MESSAGE: Final = struct.Struct("=cxxxii")


class ZygoteMessage(NamedTuple):
    """Message between supervisor and zygote, of fixed size: the zygote shares its memory with every worker.

    Attributes:
        kind: FORKED, also for the order to fork; EXITED when a worker has ended.
        status: exit status as `os.waitstatus_to_exitcode` has it.
    """

    kind: bytes
    pid: int = 0
    status: int = 0

    @classmethod
    def fork(cls) -> "ZygoteMessage":
        """Return the order to fork a worker; its end of the control socket comes along."""
        return cls(FORKED)

    def encode(self) -> bytes:
        """Return the packet."""
        return _ZYGOTE_MESSAGE.pack(*self)

    @classmethod
    def decode(cls, data: bytes) -> "ZygoteMessage":
        """Read a packet. Raises `GoneError`: of another size."""
        if len(data) != _ZYGOTE_MESSAGE.size:
            raise GoneError(f"{len(data)} bytes are no message of a zygote")
        return cls(*_ZYGOTE_MESSAGE.unpack(data))


class Package(msgspec.Struct, frozen=True, kw_only=True):
    """Data package that a worker mounts.

    Attributes:
        path: of its one file, as the guest opens it.
        file: where it is on the device.
        owner: user to whom it has to belong; None for anyone.
    """

    path: str
    file: str
    owner: Count | None = None


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag="setup"):
    """First message: set the instance up. Answered with `Ready` or `Refused`.

    Descriptors, in this order: memfd of the image, page of figures; then, as far as there are such: quota page, socket
    to the egress, socket to the key-value store, memfd of the secrets, end of a channel, socket for messages, page of
    metrics, hardware in the order of the grants. A slot in a shared worker gets no image, since that was opened before
    the sandbox was shut.

    Attributes:
        uid: user to become, None to stay.
        data: data directory, empty for none.
        place: the worker's place in the quota page.
        image: in a shared worker, which of its images.
        egress: whether the socket to the egress comes along.
        secrets: whether secrets come along: a JSON object of values by name. Not in a shared worker.
        channel: whether the worker's end of a channel comes along, which has its calls once it is told to serve.
        service: whether it is to run a service, whose standard input ends with a `Drain`.
        messages: whether the socket for what the component publishes comes along.
        keyvalue: whether the socket to the key-value store comes along.
        directories: directories of the device that it may read, by the path at which the guest sees each.
        metrics: whether the page of the component's own figures comes along.
        hardware: descriptors of granted hardware that come along.
        packages: data packages to mount. Not in a shared worker.
    """

    instance: str
    grants: Grants
    limits: Limits
    config: dict[str, str] = {}
    uid: Count | None = None
    data: str = ""
    place: Count = 0
    image: str = ""
    egress: bool = False
    secrets: bool = False
    channel: bool = False
    service: bool = False
    messages: bool = False
    keyvalue: bool = False
    directories: dict[str, str] = {}
    metrics: bool = False
    hardware: Count = 0
    packages: tuple[Package, ...] = ()
    id: Count = 0


class OpenShared(msgspec.Struct, frozen=True, kw_only=True, tag="open-shared"):
    """First message to a shared worker: map these images, then shut the sandbox. Answered with `Opened` or `Refused`.

    The images' memfds come along. From then on each `AddSlot` is a further instance.

    Attributes:
        images: name of each image in a `Setup`.
        limits: the largest of any instance in it.
        slots: instances at most.
    """

    images: tuple[str, ...]
    limits: Limits
    slots: Count
    uid: Count | None = None
    id: Count = 0


class AddSlot(msgspec.Struct, frozen=True, kw_only=True, tag="add-slot"):
    """Add an instance to a shared worker: the control socket that comes along is its own, and speaks like a worker's.

    Its end ends that instance, and nothing else.
    """


class Serve(msgspec.Struct, frozen=True, kw_only=True, tag="serve"):
    """Take calls from the channel.

    A supervisor from before channels sends a listener along: such a worker ends, and says why in the instance's log.
    """


class Check(msgspec.Struct, frozen=True, kw_only=True, tag="check"):
    """Ask the guest's health export. Answered with `Checked`."""

    id: Count = 0


class Task(msgspec.Struct, frozen=True, kw_only=True, tag="task"):
    """Run the guest's scheduled task. Answered with `Ran`.

    Attributes:
        args: arguments, of a guest that exports `wasi:cli/run`.
    """

    scheduled_ms: Count
    args: tuple[str, ...] = ()
    id: Count = 0


class Deliver(msgspec.Struct, frozen=True, kw_only=True, tag="deliver"):
    """Run the guest's handler with a message. Answered with `Delivered`."""

    topic: MessageTopic
    data: MessageData = b""
    content_type: MessageType = ""
    metadata: Metadata = ()
    id: Count = 0


class RunService(msgspec.Struct, frozen=True, kw_only=True, tag="run-service"):
    """Run `wasi:cli/run` until it ends. Followed by a `ServiceEnded`, and then the worker ends."""

    args: tuple[str, ...] = ()


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag="drain"):
    """End the standard input of the service: it is to end by itself. `Interrupt` ends it."""


class SaveState(msgspec.Struct, frozen=True, kw_only=True, tag="save-state"):
    """Have the guest save its state into the memfd that comes along, and begin no call until `Resume`.

    Answered with `StateSaved`; with a problem in it, the worker goes on by itself.
    """

    id: Count = 0


class LoadState(msgspec.Struct, frozen=True, kw_only=True, tag="load-state"):
    """Have the guest load the first `length` bytes of the memfd that comes along. Answered with `StateLoaded`."""

    length: Count
    id: Count = 0


class Resume(msgspec.Struct, frozen=True, kw_only=True, tag="resume"):
    """Go on after `SaveState`."""


class Interrupt(msgspec.Struct, frozen=True, kw_only=True, tag="interrupt"):
    """End the call in flight on the channel if it is still this one, by its number in the page of figures.

    `abandoned`: only since nobody wants its answer, so it is no fault.
    """

    call: Count
    abandoned: bool = False


class Probe(msgspec.Struct, frozen=True, kw_only=True, tag="probe"):
    """Answer with `Probed`, in turn: calls and tasks before it have ended then."""

    id: Count = 0


class Configure(msgspec.Struct, frozen=True, kw_only=True, tag="configure"):
    """Give the guest this configuration from now on, its secrets left out. Answered with `Configured`, in turn."""

    config: dict[str, str]
    id: Count = 0


class EarlierOpenShared(OpenShared, frozen=True, kw_only=True, tag="open"):
    """`OpenShared` as supervisors before 0.2.0 send it: only read, as the other earlier forms."""

    slots: Count = msgspec.field(name="seats")


class EarlierAddSlot(AddSlot, frozen=True, kw_only=True, tag="seat"):
    """`AddSlot` of supervisors before 0.2.0."""


Request = Setup | OpenShared | Check | Task | Deliver | Probe | SaveState | LoadState | Configure
ToWorker = Request | AddSlot | Serve | Resume | Interrupt | RunService | Drain
Earlier = EarlierOpenShared | EarlierAddSlot


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The guest is instantiated in its sandbox. A descriptor of the worker's memory figures comes along if it has one.

    Attributes:
        kinds: exports of the guest (`agent.host.engine.runtime.HANDLER` and so on).
        layers: isolation layer -> whether it holds in this worker.
        whole: a body is kept until it is whole, so that none may be larger than `limits.request`.
    """

    kinds: tuple[str, ...]
    layers: dict[str, bool]
    whole: bool = False
    id: Count = 0


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag="opened"):
    """The shared worker's sandbox is shut. A descriptor of its memory figures comes along if there is one."""

    layers: dict[str, bool]
    id: Count = 0


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The worker could not be set up, and ends."""

    code: RejectCode
    message: str
    id: Count = 0


class Checked(msgspec.Struct, frozen=True, kw_only=True, tag="checked"):
    """The guest's health: None for well."""

    id: Count = 0
    problem: str | None = None


class Ran(msgspec.Struct, frozen=True, kw_only=True, tag="ran"):
    """The task has ended: None for done."""

    id: Count = 0
    problem: str | None = None


class Delivered(msgspec.Struct, frozen=True, kw_only=True, tag="delivered"):
    """The handler has ended: None for handled."""

    id: Count = 0
    problem: str | None = None


class StateSaved(msgspec.Struct, frozen=True, kw_only=True, tag="state-saved"):
    """Length of the state in bytes, or why there is none."""

    length: Count = 0
    problem: str | None = None
    id: Count = 0


class StateLoaded(msgspec.Struct, frozen=True, kw_only=True, tag="state-loaded"):
    """Outcome of a load: None for loaded."""

    problem: str | None = None
    id: Count = 0


class Configured(msgspec.Struct, frozen=True, kw_only=True, tag="configured"):
    """Reply to `Configure`: None for done."""

    problem: str | None = None
    id: Count = 0


class Probed(msgspec.Struct, frozen=True, kw_only=True, tag="probed"):
    """Reply to `Probe`."""

    id: Count = 0


class Line(msgspec.Struct, frozen=True, kw_only=True, tag="line"):
    """Log line of the guest; `dropped` lines before it went over the limit."""

    text: str
    dropped: Count = 0


class Fault(msgspec.Struct, frozen=True, kw_only=True, tag="fault"):
    """A call ended in a trap or a limit."""

    message: str


class ServiceEnded(msgspec.Struct, frozen=True, kw_only=True, tag="service-ended"):
    """The run of a service has ended.

    Attributes:
        how: in a sentence.
        fault: the same with a backtrace where there is one; empty if it was asked to end.
    """

    how: str
    fault: str = ""


class Busy(msgspec.Struct, frozen=True, kw_only=True, tag="busy"):
    """A call has been in flight for a while: another worker would be of use."""


class Overdue(msgspec.Struct, frozen=True, kw_only=True, tag="overdue"):
    """A call is past a limit and stands still in the host: only ending the worker helps, if it is still in flight.

    Attributes:
        call: number of the call, as the page of figures has it while it is in flight.
    """

    call: Count
    why: str


Reply = Ready | Opened | Refused | Checked | Ran | Delivered | Probed | StateSaved | StateLoaded | Configured
FromWorker = Reply | Line | Fault | Busy | Overdue | ServiceEnded

_to_worker: Final[msgspec.json.Decoder[ToWorker]] = msgspec.json.Decoder(ToWorker | Earlier)

_from_worker: Final[msgspec.json.Decoder[FromWorker]] = msgspec.json.Decoder(FromWorker)


def most_a_minute(log_lines: int) -> int:
    """Return how many messages a worker may send on its own in a minute: twice what an intact worker needs."""
    return 2 * (log_lines + FAULTS_A_MINUTE) + _OTHERS_A_MINUTE


def encode(message: ToWorker | FromWorker) -> bytes:
    """Return the packet of a message."""
    return msgspec.json.encode(message)


def send(sock: socket.socket, message: ToWorker | FromWorker, *fds: int) -> None:
    """Send one message and descriptors, which stay open here.

    Raises:
        GoneError: the peer has closed the connection.
        BlockingIOError: a non-blocking socket is full; nothing was sent.
    """
    try:
        send_packet(sock, encode(message), fds)
    except BlockingIOError:
        raise
    except OSError as error:
        raise GoneError(str(error)) from error


def receive_to_worker(sock: socket.socket) -> tuple[ToWorker, tuple[int, ...]]:
    """Receive the supervisor's next message and its descriptors; raises as `receive_packet`."""
    data, fds = receive_packet(sock)
    try:
        return _to_worker.decode(data), fds
    except wire.JSON_ERRORS as error:
        raise GoneError(f"not a message of the supervisor: {error}") from error


def setup_id(data: bytes) -> int:
    """Return the id of a `Setup` whose descriptors were lost; 0 for anything else."""
    try:
        return msgspec.json.decode(data, type=Setup).id
    except wire.JSON_ERRORS:
        return 0


def receive_from_worker(sock: socket.socket) -> tuple[FromWorker, tuple[int, ...]]:
    """Receive a worker's next message and its descriptors, as far as there is room for those.

    The supervisor can do without any of them. Raises as `receive_packet`.
    """
    try:
        data, fds = receive_packet(sock)
    except DescriptorsLostError as error:
        data, fds = error.data, ()
    try:
        return _from_worker.decode(data), fds
    except wire.JSON_ERRORS as error:
        close_all(fds)
        raise GoneError(f"not a message of a worker: {error}") from error


_EXPORTS: Final[dict[type[Trigger], tuple[str, ...]]] = {
    Http: ("wasmfleet:http/handler",),
    Schedule: ("wasmfleet:schedule/task", "wasi:cli/run"),
    Service: ("wasi:cli/run",),
    OnMessage: (MESSAGING_HANDLER,),
}


def lacking(trigger: Trigger, kinds: Container[str]) -> str:
    """Say which export a guest with these `kinds` lacks for a trigger; empty for none."""
    wanted = _EXPORTS.get(type(trigger))
    if wanted is None:
        return f"this host has no {type(trigger).__name__} trigger"
    return "" if any(each in kinds for each in wanted) else f"it exports no {' and no '.join(wanted)}"


class TokenBucket:
    """Token bucket: `per_minute` tokens, burst of one minute. Both ends of a control socket keep one."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._left = float(per_minute)
        self._at = time.monotonic()

    def take(self, count: int = 1) -> bool:
        """Take some tokens; False, and nothing is taken, if there are not so many."""
        now = time.monotonic()
        self._left = min(self._per_minute, self._left + (now - self._at) * self._per_minute / 60)
        self._at = now
        if self._left < count:
            return False
        self._left -= count
        return True
