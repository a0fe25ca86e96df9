"""Supervisor, zygote and worker: messages; token bucket for both ends.

What the supervisor and a lane say to each other: one packet, one message, with the descriptors that belong to it.

The lane's end of this socket is all that it has of the world, beside the connections of its clients. A lane trusts the
supervisor; the supervisor trusts nothing a lane says further than that lane's own figures and log.

Each `Request` carries an `id`, and its `Reply` echoes it. The field has a default and unknown fields are ignored: after
an upgrade, a supervisor from before it gives no ids to the lanes of a new zygote, and reads none. A reply without an id
belongs to the request that has waited longest for one of its type.

So many a minute, saved up for at most a minute: what a lane may log and tell, kept on both sides of its socket.
"""

import os
import socket
import time
from typing import Final

import msgspec

from agent.host.ipc.framing import GoneError, receive_packet, send_packet
from fleet.protocol import wire
from fleet.protocol.bounds import Count
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants, Limits

FAULTS_A_MINUTE: Final = 300
"""How many faults a lane tells one by one; all are counted."""

_OTHERS_A_MINUTE: Final = 2500

ABANDONED: Final = 75
"""Exit status of a lane with a call past a limit whose supervisor has closed the socket: EX_TEMPFAIL of sysexits.h."""

IMAGES_MAX: Final = 32
"""How many different images one shared lane may have open."""


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag="setup"):
    """First of all, with two descriptors: the image's memfd and the figures' page.

    Then, as far as there are such: the page of what is written to its data, the socket on which the egress is asked,
    the memfd of its secrets.

    To a seat of a shared lane the figures' page comes alone, since the image was opened before the cell was shut.

    Attributes:
        uid: what to become, None to stay.
        data: its data directory, empty for none.
        place: where to count what is written there.
        image: in a shared lane, which of its images.
        egress: whether it may ask the egress.
        secrets: whether it has secrets: a JSON object of values by name. Not in a shared lane.
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
    id: Count = 0


class OpenShared(msgspec.Struct, frozen=True, kw_only=True, tag="open"):
    """First of all, for a lane that several instances share: shut the cell, with these images mapped before.

    The images' memfds come along. Answered with `Opened`; from then on each `Seat` is an instance more.

    Attributes:
        images: what each image is called in a `Setup`.
        limits: the largest of any instance in it.
        seats: how many instances at most.
    """

    images: tuple[str, ...]
    limits: Limits
    seats: Count
    uid: Count | None = None
    id: Count = 0


class AddSlot(msgspec.Struct, frozen=True, kw_only=True, tag="seat"):
    """An instance more in a shared lane: the control socket that comes along is its own, and speaks like a lane's.

    When it closes, that instance is ended, and nothing else.
    """


class Serve(msgspec.Struct, frozen=True, kw_only=True, tag="serve"):
    """Accept connections from the listener that comes along.

    Behind it come, where there may be several lanes, both ends of the queue for clients that wait behind a long call.
    """


class AcceptConnections(msgspec.Struct, frozen=True, kw_only=True, tag="adopt"):
    """Take over the connections that arrive on the socket that comes along."""


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag="hand-over"):
    """Accept no more; pass every connection on to the socket that comes along, each at a message boundary.

    Without a socket, connections end after their answer instead. Answered with `HandedOver` when none is left.
    """

    deadline_ms: Count = 10_000
    id: Count = 0


class Check(msgspec.Struct, frozen=True, kw_only=True, tag="check"):
    """Ask the guest's health export. Answered with `Checked`."""

    id: Count = 0


class Task(msgspec.Struct, frozen=True, kw_only=True, tag="task"):
    """Run the guest's scheduled task. Answered with `Ran`."""

    scheduled_ms: Count
    id: Count = 0


class SaveState(msgspec.Struct, frozen=True, kw_only=True, tag="save-state"):
    """Have the guest save its state into the memfd that comes along, and answer nobody until `HandOver` or `Resume`.

    Answered with `StateSaved`; with a problem in it, the lane goes on by itself.
    """

    id: Count = 0


class LoadState(msgspec.Struct, frozen=True, kw_only=True, tag="load-state"):
    """Have the guest load the first `length` bytes of the memfd that comes along. Answered with `StateLoaded`."""

    length: Count
    id: Count = 0


class Resume(msgspec.Struct, frozen=True, kw_only=True, tag="resume"):
    """Go on after `SaveState`."""


class Probe(msgspec.Struct, frozen=True, kw_only=True, tag="probe"):
    """Answer with `Probed`: whether the lane still listens."""

    id: Count = 0


Request = Setup | OpenShared | Drain | Check | Task | Probe | SaveState | LoadState

ToWorker = Request | AddSlot | Serve | AcceptConnections | Resume


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The guest is instantiated in its cell. A descriptor of the lane's own memory figures comes along if there is one.

    Attributes:
        kinds: what it exports (`agent.host.engine.runtime.HANDLER` and so on).
        layers: containment layer -> whether it holds in this lane.
    """

    kinds: tuple[str, ...]
    layers: dict[str, bool]
    id: Count = 0


class Opened(msgspec.Struct, frozen=True, kw_only=True, tag="opened"):
    """The shared lane's cell is shut. A descriptor of its memory figures comes along if there is one."""

    layers: dict[str, bool]
    id: Count = 0


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """It could not be set up; the lane ends."""

    code: RejectCode
    message: str
    id: Count = 0


class HandedOver(msgspec.Struct, frozen=True, kw_only=True, tag="handed-over"):
    """Nothing is left with this lane; `cut` connections were closed at the deadline."""

    passed: Count
    cut: Count = 0
    id: Count = 0


class Checked(msgspec.Struct, frozen=True, kw_only=True, tag="checked"):
    """The guest's health: None for well."""

    id: Count = 0
    problem: str | None = None


class Ran(msgspec.Struct, frozen=True, kw_only=True, tag="ran"):
    """The task has ended: None for done."""

    id: Count = 0
    problem: str | None = None


class StateSaved(msgspec.Struct, frozen=True, kw_only=True, tag="state-saved"):
    """How many bytes the state has, or why there is none."""

    length: Count = 0
    problem: str | None = None
    id: Count = 0


class StateLoaded(msgspec.Struct, frozen=True, kw_only=True, tag="state-loaded"):
    """None for loaded."""

    problem: str | None = None
    id: Count = 0


class Probed(msgspec.Struct, frozen=True, kw_only=True, tag="probed"):
    """It listens."""

    id: Count = 0


class Line(msgspec.Struct, frozen=True, kw_only=True, tag="line"):
    """One log line of the guest; `dropped` lines before it went over the limit."""

    text: str
    dropped: Count = 0


class Fault(msgspec.Struct, frozen=True, kw_only=True, tag="fault"):
    """A call ended in a trap or a limit."""

    message: str


class Busy(msgspec.Struct, frozen=True, kw_only=True, tag="busy"):
    """A call has been in flight for a while: another lane would be of use."""


class Overdue(msgspec.Struct, frozen=True, kw_only=True, tag="overdue"):
    """A call is past a limit and stands still in the host: only ending the lane helps, if it is still in flight.

    Attributes:
        call: its number, as the page of figures has it while it is in flight.
    """

    call: Count
    why: str


Reply = Ready | Opened | Refused | HandedOver | Checked | Ran | Probed | StateSaved | StateLoaded

FromWorker = Reply | Line | Fault | Busy | Overdue

_to_lane: Final[msgspec.json.Decoder[ToWorker]] = msgspec.json.Decoder(ToWorker)

_from_lane: Final[msgspec.json.Decoder[FromWorker]] = msgspec.json.Decoder(FromWorker)


def most_a_minute(log_lines: int) -> int:
    """What a sound lane tells unasked in a minute, and as much again: its log, its faults, that it is busy."""
    return 2 * (log_lines + FAULTS_A_MINUTE) + _OTHERS_A_MINUTE


def encode(message: ToWorker | FromWorker) -> bytes:
    """The packet of a message."""
    return msgspec.json.encode(message)


def send(sock: socket.socket, message: ToWorker | FromWorker, *fds: int) -> None:
    """Send one message and descriptors, which stay open here.

    Raises:
        GoneError: the other side is gone.
        BlockingIOError: a non-blocking socket is full; nothing was sent.
    """
    try:
        send_packet(sock, encode(message), fds)
    except BlockingIOError:
        raise
    except OSError as error:
        raise GoneError(str(error)) from error


def receive_to_worker(sock: socket.socket) -> tuple[ToWorker, tuple[int, ...]]:
    """The supervisor's next message; raises as `receive_packet`."""
    data, fds = receive_packet(sock)
    try:
        return _to_lane.decode(data), fds
    except wire.JSON_ERRORS as error:
        raise GoneError(f"not a message of the supervisor's: {error}") from error


def receive_from_worker(sock: socket.socket) -> tuple[FromWorker, tuple[int, ...]]:
    """A lane's next message; raises as `receive_packet`, and `GoneError` for what is none."""
    data, fds = receive_packet(sock)
    try:
        return _from_lane.decode(data), fds
    except wire.JSON_ERRORS as error:
        for fd in fds:
            os.close(fd)
        raise GoneError(f"not a message of a lane's: {error}") from error


class TokenBucket:
    """So many a minute, saved up for at most a minute."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._left = float(per_minute)
        self._at = time.monotonic()

    def take(self) -> bool:
        """Whether there is one left; takes it."""
        now = time.monotonic()
        self._left = min(self._per_minute, self._left + (now - self._at) * self._per_minute / 60)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
