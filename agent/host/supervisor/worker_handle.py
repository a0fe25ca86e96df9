"""The supervisor's handles of lanes: talking to them, reading their figures, ending them.

Ending a process is a signal through its pidfd, which cannot hit another one; how it ended arrives from its zygote. A
seat in a shared lane has the same handle: what it does otherwise is asked of `Shared`.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from agent.host.ipc import framing, stats_page, worker_api
from agent.host.ipc.worker_api import TokenBucket

_GONE_S: Final = 1.0

_WEIGHED_S: Final = 0.5  # many seats ask for one process's figures at once


class WorkerGoneError(Exception):
    """The lane ended before it answered."""


class SharedProcess(Protocol):
    """What a seat asks of the lane it is in."""

    name: str

    def kill(self, asked: "WorkerHandle", because: str, *, at_fault: bool) -> None:
        """End the process; `at_fault`: for what the one that asks has done itself."""

    def leave(self, seat: "WorkerHandle") -> None:
        """End the seat."""

    def private_bytes(self) -> int:
        """The seat's part of the process's memory."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request that is not answered yet."""

    answer: type[worker_api.Reply]
    future: asyncio.Future[worker_api.Reply]

    def fits(self, message: worker_api.Reply) -> bool:
        """Return whether this is its answer, or the refusal of it."""
        refusable = self.answer in {worker_api.Ready, worker_api.Opened}
        return isinstance(message, self.answer) or (refusable and isinstance(message, worker_api.Refused))


class WorkerHandle:
    """The supervisor's handle of a lane, or of one instance's seat in a lane that several share.

    Attributes:
        shared: of a seat: the lane it is in, None for a lane of its own.
        blamed: of a seat that has ended: whether its whole lane was ended on its account.
        bystander_of: the same, of the others: the instance on whose account.
    """

    def __init__(
        self, name: str, sock: socket.socket, on_message: Callable[["WorkerHandle", worker_api.FromWorker], None]
    ) -> None:
        self.name = name
        self.pid = 0
        self.since_s = time.monotonic()
        self.pidfd = -1
        self.page_fd = stats_page.create_page(name)
        self.page = stats_page.StatsPage(self.page_fd)
        self.memory_fd = -1
        self.ready: worker_api.Ready | None = None
        self.exit_status: int | None = None
        self.killed_because = ""
        self.shared: SharedProcess | None = None
        self.blamed = False
        self.bystander_of = ""
        self.drained: asyncio.Future[None] | None = None  # while it hands its connections over
        self.ended = asyncio.get_running_loop().create_future()
        self._sock = sock
        self._on_message = on_message
        self._weighed = (0.0, 0)
        self._may_say = TokenBucket(worker_api.most_a_minute(0))
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._leaving = 0  # the id of the last `HandOver`
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock, self._readable)

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return not self.ended.done()

    def send(self, message: worker_api.ToWorker, *fds: int) -> None:
        """Tell it something. Raises `LaneGoneError`; a lane that reads nothing is ended."""
        try:
            worker_api.send(self._sock, message, *fds)
        except BlockingIOError:
            self.kill("it reads no messages")
            raise WorkerGoneError(f"{self.name}: it reads no messages") from None
        except framing.GoneError as error:
            raise WorkerGoneError(f"{self.name}: {error}") from error

    async def ask(
        self, message: worker_api.Request, *fds: int, answer: type[worker_api.Reply], timeout_s: float
    ) -> worker_api.Reply:
        """Send a request, with an id given here, and wait for its `answer` (or `Refused`).

        Raises:
            LaneGoneError: it ended first.
            TimeoutError: it did not answer in time.
        """
        number = next(self._ids)
        waiting = self._waiting[number] = _Waiting(answer, asyncio.get_running_loop().create_future())
        if isinstance(message, worker_api.Drain):
            self._leaving, self.drained = number, asyncio.get_running_loop().create_future()
        try:
            self.send(msgspec.structs.replace(message, id=number), *fds)
            return await asyncio.wait_for(waiting.future, timeout_s)
        finally:
            self._waiting.pop(number, None)

    def _readable(self) -> None:
        try:
            message, fds = worker_api.receive_from_worker(self._sock)
        except BlockingIOError:
            return
        except framing.GoneError:
            self._unplug()
            asyncio.get_running_loop().call_later(_GONE_S, self.end, "it closed its socket and did not end")
            return
        if isinstance(message, worker_api.Ready) and self.ready is None:
            self.ready = message
        if isinstance(message, worker_api.Ready | worker_api.Opened) and fds and self.memory_fd < 0:
            self.memory_fd, *fds = fds  # type: ignore[assignment]
        for fd in fds:
            os.close(fd)
        if self._take(message):
            return
        if self._may_say.take():
            self._on_message(self, message)
        else:
            self.kill("it told its supervisor more than any lane has to say")
            self._unplug()

    def _take(self, message: worker_api.FromWorker) -> bool:
        """Give a reply to whoever waits for it; False for anything that nobody waits for."""
        if not isinstance(message, worker_api.Reply):
            return False
        if isinstance(message, worker_api.HandedOver) and message.id in {0, self._leaving}:
            self._have_drained()
        found = list(self._waiting.values()) if message.id == 0 else [self._waiting.get(message.id)]
        for waiting in found:
            if waiting is not None and waiting.fits(message) and not waiting.future.done():
                waiting.future.set_result(message)
                return True
        return False

    def _have_drained(self) -> None:
        if self.drained is not None and not self.drained.done():
            self.drained.set_result(None)

    def _unplug(self) -> None:
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()

    def kill(self, because: str, *, at_fault: bool = False) -> None:
        """End its process now; of a seat: with all that share it.

        `at_fault`: it was in a call that has to end. Else whoever is in a call when the process is ended is to blame.
        """
        if self.shared is not None:
            self.shared.kill(self, because, at_fault=at_fault)
        elif self.pidfd >= 0 and self.alive:
            self.killed_because = self.killed_because or because
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def end(self, because: str) -> None:
        """End it now; of a seat: it alone."""
        if self.shared is None:
            self.kill(because)
        elif self.alive:
            self.killed_because = self.killed_because or because
            self.shared.leave(self)

    async def end_when_drained(self, because: str, timeout_s: float) -> None:
        """End it as soon as its connections are handed over, or after `timeout_s`, or when this is cancelled."""
        try:
            if self.drained is not None and self.alive:
                await asyncio.wait([self.drained, self.ended], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.end(because)

    def has_ended(self, status: int) -> None:
        """Its zygote says that it has ended."""
        if self.ended.done():
            return
        self._drain()
        self.exit_status = status
        self._unplug()
        for waiting in self._waiting.values():
            if not waiting.future.done():
                waiting.future.set_exception(WorkerGoneError(f"{self.name}: {self.describe_end()}"))
        self.ended.set_result(status)

    def _drain(self) -> None:
        """Read what it said last: often why it ended."""
        while self._sock.fileno() >= 0:
            before = self._sock
            try:
                message, fds = worker_api.receive_from_worker(before)
            except (BlockingIOError, framing.GoneError):
                return
            for fd in fds:
                os.close(fd)
            if not self._take(message):
                self._on_message(self, message)

    def describe_end(self) -> str:
        """How it ended, for people."""
        if self.bystander_of:
            return f"its lane was ended on account of {self.bystander_of}, which shared it: {self.killed_because}"
        if self.killed_because:
            return self.killed_because
        status = self.exit_status
        if status is None:
            return "it is gone"
        return (
            f"its process was ended by {signal.Signals(-status).name}"
            if status < 0
            else f"its process ended ({status})"
        )

    def private_bytes(self) -> int:
        """Its own memory, 0 where that cannot be told: not the pages of program files, which the kernel can drop."""
        if self.shared is not None:
            return self.shared.private_bytes()
        if self.memory_fd < 0 or not self.alive:
            return 0
        if time.monotonic() - self._weighed[0] > _WEIGHED_S:
            self._weighed = time.monotonic(), self._weigh()
        return self._weighed[1]

    def _weigh(self) -> int:
        try:
            text = os.pread(self.memory_fd, 4096, 0)
        except OSError:
            return 0
        return 1024 * sum(
            int(line.split()[1]) for line in text.splitlines() if line.startswith((b"Private_Dirty", b"Swap:"))
        )

    def is_set_up(self, *, log_lines_a_minute: int) -> None:
        """It has its page of figures: nobody else needs the descriptor."""
        self._may_say = TokenBucket(worker_api.most_a_minute(log_lines_a_minute))
        os.close(self.page_fd)
        self.page_fd = -1

    def close(self) -> None:
        """Give its descriptors back, once it has ended."""
        self._unplug()
        self.page.close()
        for fd in (self.page_fd, self.memory_fd, self.pidfd):
            if fd >= 0:
                os.close(fd)
        self.page_fd = self.memory_fd = self.pidfd = -1
