"""Handles of worker processes and of their slots.

Every worker process has a slot for each instance that it runs: a worker of its own is a process with a single slot, a
shared worker has up to `MAX_SLOTS`. Code that starts, swaps and retires workers holds a slot (`WorkerHandle`) and need
not know how many other slots the process has. Only the ways in which slots end differ:

    the slot leaves          its socket is closed; the process and the other slots go on; the last slot ends the process
    its call must end        only ending the process helps: that slot is to blame, the others are bystanders
    the process dies         the slot in a call is to blame; if none was, each has lost its worker as it would its own
    a call outlives its slot the process ends itself once that call is past a limit, and the others are bystanders

A process is ended by a signal through its pidfd, which cannot hit another one; its exit status comes from its zygote.
Everything here belongs to the supervisor's event loop.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import time
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import msgspec

from agent.host.ipc import framing, metrics_page, stats_page, worker_api
from agent.host.ipc.helper_api import ChannelReport
from agent.host.ipc.worker_api import TokenBucket

_EXIT_GRACE_S: Final = 1.0  # from the end of its socket to the end of the process

_MEMORY_FRESH_S: Final = 0.5  # the slots of a process ask for its memory figures at once

R = TypeVar("R", bound=worker_api.Reply)


class WorkerGoneError(Exception):
    """The worker ended before it answered."""


class WorkerRefusedError(WorkerGoneError):
    """The worker answered `Refused`: it cannot be set up, for the reason given."""

    def __init__(self, refusal: worker_api.Refused) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class WorkerEvents(Protocol):
    """Receiver of what workers report. The methods are synchronous and never wait."""

    def worker_message(self, worker: "WorkerHandle", message: worker_api.FromWorker) -> None:
        """Take a message that answers no request: a log line, a fault, a call that is overdue."""

    def worker_exited(self, worker: "WorkerHandle", uptime_s: float) -> None:
        """Take note that a worker that was ready has ended, `uptime_s` after it had become so."""

    def router_report(self, worker: "WorkerHandle", message: ChannelReport) -> None:
        """Take what the router says of a worker's channel."""


class WorkerChannel(Protocol):
    """Worker's channel, which the router has.

    Attributes:
        drained: None before the router was told to give no more calls; done once none is left.
    """

    drained: asyncio.Future[None] | None

    def serve(self) -> None:
        """Give calls to the worker."""

    async def drain(self, wait_s: float) -> None:
        """Give no more calls to the worker, and wait until those that it has are over, at most `wait_s`."""

    def leave_loop(self) -> None:
        """Have the worker read its control socket, in which a request waits."""


class ControlOwner(Protocol):
    """Owner of a control socket: a slot, or a shared process."""

    @property
    def name(self) -> str:
        """Name for errors and figures."""

    def on_message(self, message: worker_api.FromWorker) -> None:
        """Take a message that answers no request."""

    def request_sent(self) -> None:
        """Take note that a request is in the socket."""

    def hung_up(self) -> None:
        """Take note that the other end has closed the socket."""

    def kill(self, reason: str) -> None:
        """End the process at the other end now."""

    def end(self, reason: str) -> None:
        """End what this socket belongs to."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A request without its answer."""

    reply: type[msgspec.Struct]
    future: asyncio.Future[worker_api.Reply]

    def accepts(self, message: worker_api.Reply) -> bool:
        """Return whether `message` answers this request, or refuses it."""
        refusable = self.reply in {worker_api.Ready, worker_api.Opened}
        return isinstance(message, self.reply) or (refusable and isinstance(message, worker_api.Refused))


class ControlSocket:
    """Supervisor's end of a control socket: requests, replies matched by id, and a limit on everything else.

    Attributes:
        memory_fd: the process's own memory figures, which come with `Ready` or `Opened`; -1 for none.
        closed: set once nothing is read any more.
    """

    def __init__(self, owner: ControlOwner, sock: socket.socket) -> None:
        self.owner = owner
        self.memory_fd = -1
        self.closed = asyncio.Event()
        self._sock = sock
        self._budget = TokenBucket(worker_api.most_a_minute(0))
        self._ids = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock, self._readable)

    def allow(self, *, log_lines_a_minute: int) -> None:
        """Allow as many messages as a worker with this log limit has reason to send."""
        self._budget = TokenBucket(worker_api.most_a_minute(log_lines_a_minute))

    def send(self, message: worker_api.ToWorker, *fds: int) -> None:
        """Send a message with descriptors, which stay open here.

        Raises:
            WorkerGoneError: the worker is gone, or reads nothing; in that case it is killed.
        """
        try:
            worker_api.send(self._sock, message, *fds)
        except BlockingIOError:
            self.owner.kill("it reads no messages")
            raise WorkerGoneError(f"{self.owner.name}: it reads no messages") from None
        except framing.GoneError as error:
            raise WorkerGoneError(f"{self.owner.name}: {error}") from error

    async def request(self, message: worker_api.Request, *fds: int, reply: type[R], timeout_s: float) -> R:
        """Send a request, under an id given here, and return the worker's `reply`.

        Raises:
            WorkerRefusedError: the worker refused to be set up.
            WorkerGoneError: the worker ended first.
            TimeoutError: no answer within `timeout_s`.
        """
        number = next(self._ids)
        pending = self._pending[number] = _Pending(reply, asyncio.get_running_loop().create_future())
        try:
            self.send(msgspec.structs.replace(message, id=number), *fds)
            self.owner.request_sent()
            async with asyncio.timeout(timeout_s):
                answer = await pending.future
        finally:
            self._pending.pop(number, None)
        if isinstance(answer, worker_api.Refused):
            raise WorkerRefusedError(answer)
        assert isinstance(answer, reply)  # `accepts` has looked
        return answer

    def fail_requests(self, error: WorkerGoneError) -> None:
        """Let every request without an answer raise `error`."""
        for pending in self._pending.values():
            if not pending.future.done():
                pending.future.set_exception(error)

    def read_rest(self) -> None:
        """Read what the worker sent last: often why it ended."""
        while self._sock.fileno() >= 0:
            try:
                message, fds = worker_api.receive_from_worker(self._sock)
            except (BlockingIOError, framing.GoneError):
                return
            framing.close_all(fds)
            if not self._take_reply(message):
                self.owner.on_message(message)

    def unplug(self) -> None:
        """Close the socket."""
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self.closed.set()

    def close(self) -> None:
        """Close the socket and the descriptor of the memory figures."""
        self.unplug()
        if self.memory_fd >= 0:
            os.close(self.memory_fd)
            self.memory_fd = -1

    def _readable(self) -> None:
        try:
            message, fds = worker_api.receive_from_worker(self._sock)
        except BlockingIOError:
            return
        except framing.GoneError:
            self.unplug()
            self.owner.hung_up()
            return
        if isinstance(message, worker_api.Ready | worker_api.Opened) and fds and self.memory_fd < 0:
            self.memory_fd, fds = fds[0], fds[1:]
        framing.close_all(fds)
        if self._take_reply(message):
            return
        if self._budget.take():
            self.owner.on_message(message)
        else:
            self.owner.kill("it sent its supervisor more messages than any worker has reason to")
            self.unplug()

    def _take_reply(self, message: worker_api.FromWorker) -> bool:
        """Give a reply to the request with its id; False for a message that no request waits for.

        An id of 0 comes from a worker of a version without ids: such a reply is matched by its type.
        """
        if not isinstance(message, worker_api.Reply):
            return False
        found = list(self._pending.values()) if message.id == 0 else [self._pending.get(message.id)]
        for pending in found:
            if pending is not None and pending.accepts(message) and not pending.future.done():
                pending.future.set_result(message)
                return True
        return False


class WorkerProcess:
    """A forked worker process and its slots.

    Attributes:
        pidfd: -1 until the zygote has forked it.
        slots: the instances that it runs; the only one of a process that is not shared.
        images: sha256 of each image that a shared process has open.
        is_ending: no further slot is given out.
        ended: done with the exit status.
    """

    def __init__(self, name: str, sock: socket.socket) -> None:
        """`sock` is the supervisor's end of the control socket that the process is forked with."""
        self.name = name
        self.pid = 0
        self.pidfd = -1
        self.slots: list[WorkerHandle] = []
        self.is_shared = False
        self.images: frozenset[str] = frozenset()
        self.is_ending = False
        self.killed_because = ""
        self.exit_status: int | None = None
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._control = ControlSocket(self, sock)
        self._blamed: WorkerHandle | None = None
        self._has_left = False
        self._memory = (0.0, 0)

    @property
    def alive(self) -> bool:
        """True until the process has ended."""
        return not self.ended.done()

    def only_slot(self, name: str, events: WorkerEvents) -> "WorkerHandle":
        """Return the slot of a process of one instance, which speaks on the process's own control socket.

        Raises `OSError`.
        """
        slot = WorkerHandle(name, self, self._control, events)
        self.slots.append(slot)
        return slot

    async def open_shared(self, order: worker_api.OpenShared, *fds: int, timeout_s: float) -> None:
        """Make the process a shared one: it opens the images (`fds`), shuts its sandbox and waits for slots.

        Raises:
            WorkerGoneError: the process ended or refused.
            TimeoutError: no answer within `timeout_s`.
        """
        self.is_shared, self.images = True, frozenset(order.images)
        try:
            await self._control.request(order, *fds, reply=worker_api.Opened, timeout_s=timeout_s)
        except WorkerRefusedError as error:
            self.kill(str(error))
            raise
        except BaseException:
            self.kill("it did not open in time")
            raise

    def add_slot(self, name: str, events: WorkerEvents) -> "WorkerHandle":
        """Add a slot to a shared process. Raises `WorkerGoneError` or `OSError`."""
        ours, theirs = framing.socket_pair()
        with theirs:
            try:
                slot = WorkerHandle(name, self, ours, events)
            except OSError:
                ours.close()
                raise
            try:
                self._control.send(worker_api.AddSlot(), theirs.fileno())
            except WorkerGoneError:
                slot.close()
                raise
        self.slots.append(slot)
        return slot

    def kill(self, reason: str, blame: "WorkerHandle | None" = None) -> None:
        """End the process now, and with it every slot; `blame`: the slot that is the cause."""
        self._blamed = self._blamed or blame
        self.is_ending = True
        if self.pidfd >= 0 and self.alive:
            self.killed_because = self.killed_because or reason
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def end(self, reason: str) -> None:
        """End the process, as the owner of a control socket."""
        self.kill(reason)

    def leave(self, slot: "WorkerHandle", reason: str) -> None:
        """End one slot alone; the last one ends the process."""
        slot.killed_because = slot.killed_because or reason
        if len(self.slots) > 1:
            self.slots.remove(slot)
            slot.has_ended(0)
        else:
            self._has_left = True
            self.kill(reason)

    def slot_in_call(self) -> "WorkerHandle | None":
        """Return the slot that is in a call now; None for none."""
        return next((slot for slot in self.slots if slot.began_ns()), None)

    def hung_up(self) -> None:
        """Wait a little for the end of the process that has closed its control socket, and then end it."""
        asyncio.get_running_loop().call_later(_EXIT_GRACE_S, self.end, "it closed its socket and did not end")

    def private_bytes_per_slot(self) -> int:
        """Return a slot's share of the process's own memory; 0 if the kernel does not report it.

        Pages of program files do not count, since the kernel can drop them.
        """
        if self._control.memory_fd < 0 or not self.alive:
            return 0
        if time.monotonic() - self._memory[0] > _MEMORY_FRESH_S:
            self._memory = time.monotonic(), self._read_memory()
        return self._memory[1] // max(1, len(self.slots))

    def _read_memory(self) -> int:
        try:
            text = os.pread(self._control.memory_fd, 4096, 0)
        except OSError:
            return 0
        return 1024 * sum(
            int(line.split()[1]) for line in text.splitlines() if line.startswith((b"Private_Dirty", b"Swap:"))
        )

    def request_sent(self) -> None:
        """Do nothing: the process reads its socket."""

    def on_message(self, message: worker_api.FromWorker) -> None:
        """Ignore what a shared process sends on its own account: its slots speak for themselves."""

    def has_ended(self, status: int) -> None:
        """Take note of the exit status that the zygote reports, and end the slots."""
        if self.ended.done():
            return
        self._control.read_rest()
        self.exit_status = status
        culprit = None if self._has_left else self._blamed or self.slot_in_call()
        slots, self.slots = self.slots, []
        for slot in slots:
            if self.is_shared:
                self._assign_blame(slot, culprit)
            slot.has_ended(status)
        self._control.fail_requests(WorkerGoneError(f"{self.name}: {self.describe_end()}"))
        self.ended.set_result(status)
        self.close()

    def _assign_blame(self, slot: "WorkerHandle", culprit: "WorkerHandle | None") -> None:
        slot.blamed = slot is culprit
        if culprit is not None and not slot.blamed:
            slot.bystander_of = culprit.name.partition("/")[0]
        elif culprit is None and self.exit_status == worker_api.ABANDONED:
            slot.bystander_of = "one that had left it"

    def describe_end(self) -> str:
        """Return how the process ended, for people."""
        if self.killed_because:
            return self.killed_because
        if self.exit_status is None:
            return "its process has ended"
        if self.exit_status < 0:
            return f"its process was ended by {signal.Signals(-self.exit_status).name}"
        return f"its process ended ({self.exit_status})"

    def close(self) -> None:
        """Close the descriptors of a process that has ended, or was never forked."""
        self._control.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def _new_page(name: str) -> tuple[int, stats_page.StatsPage]:
    """Return a new page of figures: its memfd, and the page mapped. Raises `OSError`."""
    fd = stats_page.create_page(name)
    try:
        return fd, stats_page.StatsPage(fd)
    except OSError:
        os.close(fd)
        raise


@dataclass(frozen=True, slots=True)
class Channel:
    """Router's end of a worker's channel, the page of its calls and the worker's own page; its owner closes them."""

    sock: socket.socket
    page_fd: int
    worker_page_fd: int

    def close(self) -> None:
        """Close all of them."""
        self.sock.close()
        os.close(self.page_fd)
        os.close(self.worker_page_fd)


class WorkerHandle:
    """A slot of a worker process: where one instance runs.

    Attributes:
        channel: for the router to take, of a worker that is ready.
        page: figures that the worker writes.
        metrics_fd: page of the component's own figures; -1 for none.
        calls: page of its calls: of a worker with a channel the router writes it, else the worker, and it is `page`.
        ready: the worker's `Ready`; None until it is set up.
        since_s: when it became ready, on the monotonic clock.
        blamed: after the end of a shared process: whether this slot was the cause.
        bystander_of: the same, of the other slots: the instance that was the cause.
        ended: done with the exit status; a slot that left a shared process has 0.
        attached: its channel, once the router has it.
        route: the same, once it takes calls.
        excused: ended without any fault of its instance's.
        service_ended: how the run of its service ended; empty while that runs.
    """

    def __init__(
        self, name: str, process: WorkerProcess, control: ControlSocket | socket.socket, events: WorkerEvents
    ) -> None:
        """`control` is the process's own control socket, or of a slot in a shared process a socket of its own.

        Raises `OSError`.
        """
        self.name = name
        self.process = process
        self.page_fd, self.page = _new_page(name)
        self.metrics_fd = -1
        self.calls = self.page
        self.channel: Channel | None = None
        self.attached: WorkerChannel | None = None
        self.ready: worker_api.Ready | None = None
        self.since_s = time.monotonic()
        self.killed_because = ""
        self.service_ended = ""
        self.blamed = False
        self.bystander_of = ""
        self.route: WorkerChannel | None = None
        self.excused = False
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.control = control if isinstance(control, ControlSocket) else ControlSocket(self, control)
        self.control.owner = self
        self._events = events

    @property
    def pid(self) -> int:
        """Process id of its process."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """True until the slot has ended."""
        return not self.ended.done()

    @property
    def shared_name(self) -> str:
        """Name of the shared process that it is in; empty for a process of its own."""
        return self.process.name if self.process.is_shared else ""

    @property
    def _drained(self) -> asyncio.Future[None] | None:
        return None if self.route is None else self.route.drained

    @property
    def is_draining(self) -> bool:
        """True while it ends its calls, and gets no more."""
        return self._drained is not None and not self._drained.done()

    def request_sent(self) -> None:
        """Have it leave its loop for a request that is in its control socket."""
        if self.route is not None:
            self.route.leave_loop()

    def on_report(self, message: ChannelReport) -> None:
        """Pass on what the router says of its channel."""
        self._events.router_report(self, message)

    def notify(self, message: worker_api.ToWorker, *fds: int) -> None:
        """Send a message that has no answer. Raises `WorkerGoneError`; a worker that reads nothing is killed."""
        self.control.send(message, *fds)

    async def request(self, message: worker_api.Request, *fds: int, reply: type[R], timeout_s: float) -> R:
        """Send a request and return its reply; see `ControlSocket.request`."""
        return await self.control.request(message, *fds, reply=reply, timeout_s=timeout_s)

    def set_ready(
        self, ready: worker_api.Ready, *, log_lines_a_minute: int, channel: socket.socket | None = None
    ) -> None:
        """Take note that the worker is set up: it has its page of figures, and from now on its end is reported.

        `channel`: the router's end of its channel. Raises `OSError`, and the worker is not set up.
        """
        if channel is not None:
            try:
                calls_fd, self.calls = _new_page(self.name)
            except OSError:
                channel.close()
                raise
            self.channel = Channel(channel, calls_fd, self.page_fd)
        else:
            os.close(self.page_fd)
        self.page_fd = -1
        self.ready = ready
        self.since_s = time.monotonic()
        self.control.allow(log_lines_a_minute=log_lines_a_minute)

    def take_channel(self) -> Channel | None:
        """Return the channel, which the caller then owns; None without one, or if it has been taken."""
        channel, self.channel = self.channel, None
        return channel

    def figures(self) -> stats_page.CallStats:
        """Read its figures."""
        own = self.page.read()
        return own if self.calls is self.page else own.plus(self.calls.read())

    def metrics(self) -> metrics_page.Figures:
        """Read the component's own figures."""
        return metrics_page.NOTHING if self.metrics_fd < 0 else metrics_page.read(self.metrics_fd)

    def began_ns(self) -> int:
        """Return the begin of the call in flight, or of another order that it carries out; 0 for none.

        A slot's calls begin when the process has done with those of other slots, which the router does not know.
        """
        return self.page.began_ns() or (0 if self.process.is_shared else self.calls.began_ns())

    @property
    def is_idle(self) -> bool:
        """True while it has no call, not even one that waits for other slots."""
        return not (self.began_ns() or self.calls.began_ns())

    def hung_up(self) -> None:
        """Wait a little for the end of the process that has closed its control socket, and then end the slot.

        A slot whose process goes on has left because its channel has ended, which is no fault of it.
        """
        asyncio.get_running_loop().call_later(_EXIT_GRACE_S, self._end_after_grace)

    def _end_after_grace(self) -> None:
        self.excused = self.excused or (self.alive and self.process.is_shared)
        self.end("its channel has ended" if self.process.is_shared else "it closed its socket and did not end")

    def on_message(self, message: worker_api.FromWorker) -> None:
        """Pass a message on."""
        self._events.worker_message(self, message)

    def kill(self, reason: str, *, at_fault: bool = False) -> None:
        """End its process now, with every slot in it.

        `at_fault`: a call of this slot has to end. Else the slot that is in a call when this happens is to blame.
        """
        self.process.kill(reason, blame=self if at_fault else self.process.slot_in_call() or self)

    def end(self, reason: str) -> None:
        """End this slot alone."""
        if self.alive:
            self.process.leave(self, reason)

    async def end_when_drained(self, reason: str, timeout_s: float) -> None:
        """End it as soon as its calls are over, or after `timeout_s`, or when this is cancelled."""
        try:
            if self._drained is not None and self.alive:
                waits: list[asyncio.Future[Any]] = [self._drained, self.ended]
                await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.end(reason)

    def has_ended(self, status: int) -> None:
        """Take note of the end, and report it if the worker had been ready."""
        if self.ended.done():
            return
        self.control.read_rest()
        self.control.unplug()
        self.control.fail_requests(WorkerGoneError(f"{self.name}: {self.describe_end()}"))
        self.ended.set_result(status)
        if self.ready is not None:
            # In a separate turn of the loop, as the caller that ended the worker is still running.
            uptime_s = time.monotonic() - self.since_s
            asyncio.get_running_loop().call_soon(self._events.worker_exited, self, uptime_s)

    def describe_end(self) -> str:
        """Return how it ended, for people."""
        why = self.killed_because or self.service_ended or self.process.describe_end()
        if self.bystander_of:
            return f"its worker was ended on account of {self.bystander_of}, which shared it: {why}"
        return why

    def private_bytes(self) -> int:
        """Return its share of the process's own memory."""
        return self.process.private_bytes_per_slot()

    def close(self) -> None:
        """Close its descriptors, once it has ended."""
        self.control.unplug()
        self.page.close()
        if self.calls is not self.page:
            self.calls.close()
        if (channel := self.take_channel()) is not None:
            channel.close()
        if self.page_fd >= 0:
            os.close(self.page_fd)
            self.page_fd = -1
        if self.metrics_fd >= 0:
            os.close(self.metrics_fd)
            self.metrics_fd = -1
        if self.process.is_shared:
            self.control.close()
