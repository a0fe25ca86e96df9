"""The supervisor's side of zygotes and lanes: starting them, talking to them, ending them.

A `Lane` here is a handle: its socket, its pidfd, its page of figures. Ending one is a signal through the pidfd, which
cannot hit another process; how it ended arrives from its zygote.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

from agent.host import control, page, program

FORK: Final = b"F"
_MESSAGE_BYTES: Final = 12
_FORK_TIMEOUT_S: Final = 30.0
_GONE_S: Final = 1.0
_ENVIRONMENT: Final = frozenset({"PATH", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH"})
_IDLE_S: Final = 60.0


def _environment() -> dict[str, str]:
    """What a zygote, and so every lane, may know of this host's environment: how to find Python, and nothing else.

    The WASI implementation would start a thread for each processor of the board; one does.
    """
    kept = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT or name.startswith("PYTHON")}
    return {**kept, "TOKIO_WORKER_THREADS": "1"}


class LaneGoneError(Exception):
    """The lane ended before it answered."""


class Lane:
    """The supervisor's handle of a lane."""

    def __init__(self, name: str, sock: socket.socket, on_message: Callable[["Lane", control.FromLane], None]) -> None:
        self.name = name
        self.pid = 0
        self.since_s = time.monotonic()
        self.pidfd = -1
        self.page_fd = page.create(name)
        self.page = page.Page(self.page_fd)
        self.memory_fd = -1
        self.ready: control.Ready | None = None
        self.exit_status: int | None = None
        self.killed_because = ""
        self.drained: asyncio.Future[None] | None = None  # while it hands its connections over
        self.ended = asyncio.get_running_loop().create_future()
        self._sock = sock
        self._on_message = on_message
        self._waiting: dict[type, asyncio.Future[control.FromLane]] = {}
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock, self._readable)

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return not self.ended.done()

    def send(self, message: control.ToLane, *fds: int) -> None:
        """Tell it something. Raises `LaneGoneError`; a lane that reads nothing is ended."""
        try:
            control.send(self._sock, message, *fds)
        except BlockingIOError:
            self.kill("it reads no messages")
            raise LaneGoneError(f"{self.name}: it reads no messages") from None
        except control.GoneError as error:
            raise LaneGoneError(f"{self.name}: {error}") from error

    async def ask(
        self, message: control.ToLane, *fds: int, answer: type[control.FromLane], timeout_s: float
    ) -> control.FromLane:
        """Tell it something and wait for an `answer` (or `Refused`).

        Raises:
            LaneGoneError: it ended first.
            TimeoutError: it did not answer in time.
        """
        future: asyncio.Future[control.FromLane] = asyncio.get_running_loop().create_future()
        self._waiting[answer] = future
        try:
            self.send(message, *fds)
            return await asyncio.wait_for(future, timeout_s)
        finally:
            self._waiting.pop(answer, None)

    def _readable(self) -> None:
        try:
            message, fds = control.receive_from_lane(self._sock)
        except BlockingIOError:
            return
        except control.GoneError:
            self._unplug()
            asyncio.get_running_loop().call_later(_GONE_S, self.kill, "it closed its socket and did not end")
            return
        if isinstance(message, control.Ready):
            self.ready = message
            if fds:
                self.memory_fd, *fds = fds  # type: ignore[assignment]
        for fd in fds:
            os.close(fd)
        if isinstance(message, control.HandedOver) and self.drained is not None and not self.drained.done():
            self.drained.set_result(None)
        kind = control.Ready if isinstance(message, control.Refused) else type(message)
        future = self._waiting.get(kind)
        if future is not None and not future.done():
            future.set_result(message)
        else:
            self._on_message(self, message)

    def _unplug(self) -> None:
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()

    def kill(self, because: str) -> None:
        """End it now."""
        if self.pidfd >= 0 and self.alive:
            self.killed_because = self.killed_because or because
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def kill_when_drained(self, because: str, timeout_s: float) -> None:
        """End it as soon as its connections are handed over, or after `timeout_s`."""
        if self.drained is not None and self.alive:
            await asyncio.wait([self.drained, self.ended], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        self.kill(because)

    def has_ended(self, status: int) -> None:
        """Its zygote says that it has ended."""
        if self.ended.done():
            return
        self._drain()
        self.exit_status = status
        self._unplug()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(LaneGoneError(f"{self.name}: {self.describe_end()}"))
        self.ended.set_result(status)

    def _drain(self) -> None:
        """Read what it said last: often why it ended."""
        while self._sock.fileno() >= 0:
            before = self._sock
            try:
                message, fds = control.receive_from_lane(before)
            except (BlockingIOError, control.GoneError):
                return
            for fd in fds:
                os.close(fd)
            future = self._waiting.get(control.Ready if isinstance(message, control.Refused) else type(message))
            if future is not None and not future.done():
                future.set_result(message)
            else:
                self._on_message(self, message)

    def describe_end(self) -> str:
        """How it ended, for people."""
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
        if self.memory_fd < 0 or not self.alive:
            return 0
        try:
            text = os.pread(self.memory_fd, 4096, 0)
        except OSError:
            return 0
        return 1024 * sum(
            int(line.split()[1]) for line in text.splitlines() if line.startswith((b"Private_Dirty", b"Swap:"))
        )

    def close(self) -> None:
        """Give its descriptors back, once it has ended."""
        self._unplug()
        self.page.close()
        for fd in (self.page_fd, self.memory_fd, self.pidfd):
            if fd >= 0:
                os.close(fd)
        self.page_fd = self.memory_fd = self.pidfd = -1


class Zygote:
    """The supervisor's handle of one namespace's zygote, started when it is first needed."""

    def __init__(self, namespace: str, *, fuel: bool) -> None:
        self.namespace = namespace
        self.idle_since_s: float | None = None
        self.lanes: dict[int, Lane] = {}
        self._forking: list[tuple[Lane, asyncio.Future[None]]] = []
        ours, theirs = control.pair()
        with theirs:
            self.process = subprocess.Popen(
                [*program.command("agent.host.zygote"), str(theirs.fileno()), *(["--fuel"] if fuel else [])],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
            )
        self._sock = ours
        ours.setblocking(False)
        asyncio.get_running_loop().add_reader(ours, self._readable)

    @property
    def alive(self) -> bool:
        """Whether it still serves."""
        return self._sock.fileno() >= 0

    async def lane(self, name: str, on_message: Callable[[Lane, control.FromLane], None]) -> Lane:
        """Fork a lane; raises `LaneGoneError` if the zygote is gone or does not answer."""
        ours, theirs = control.pair()
        lane = Lane(name, ours, on_message)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with theirs:
            try:
                control.send_packet(self._sock, FORK + bytes(_MESSAGE_BYTES - 1), (theirs.fileno(),))
            except OSError as error:
                lane.close()
                raise LaneGoneError(f"the zygote of {self.namespace} is gone") from error
        self._forking.append((lane, future))
        try:
            await asyncio.wait_for(future, _FORK_TIMEOUT_S)
        except TimeoutError as error:
            self.close()
            raise LaneGoneError(f"the zygote of {self.namespace} does not answer") from error
        return lane

    def _readable(self) -> None:
        try:
            data, fds = control.receive_packet(self._sock)
        except BlockingIOError:
            return
        except control.GoneError:
            self.close()
            return
        pid = int.from_bytes(data[4:8], sys.byteorder, signed=True)
        status = int.from_bytes(data[8:12], sys.byteorder, signed=True)
        if data.startswith(FORK):
            lane, future = self._forking.pop(0)
            lane.pid, lane.pidfd = pid, fds[0]
            self.lanes[pid] = lane
            if not future.done():
                future.set_result(None)
        elif (ended := self.lanes.pop(pid, None)) is not None:
            ended.has_ended(status)

    def close(self) -> None:
        """End it and every lane of it."""
        if self._sock.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for _, future in self._forking:
            if not future.done():
                future.set_exception(LaneGoneError(f"the zygote of {self.namespace} is gone"))
        self._forking.clear()
        for lane in list(self.lanes.values()):
            lane.has_ended(-signal.SIGKILL)
        self.lanes.clear()


class Nursery:
    """Every zygote: one for each signing namespace, and one more where it has components with a fuel limit."""

    def __init__(self) -> None:
        self._zygotes: dict[tuple[str, bool], Zygote] = {}

    async def lane(
        self, namespace: str, name: str, on_message: Callable[[Lane, control.FromLane], None], *, fuel: bool
    ) -> Lane:
        """Fork a lane of a namespace, starting its zygote if there is none. Raises `LaneGoneError`."""
        zygote = self._zygotes.get((namespace, fuel))
        if zygote is None or not zygote.alive:
            zygote = self._zygotes[namespace, fuel] = Zygote(namespace, fuel=fuel)
        zygote.idle_since_s = None
        return await zygote.lane(name, on_message)

    def retire(self) -> None:
        """End the zygotes that have had no lanes for a while."""
        now_s = time.monotonic()
        for key, zygote in list(self._zygotes.items()):
            if zygote.lanes:
                zygote.idle_since_s = None
            elif zygote.idle_since_s is None:
                zygote.idle_since_s = now_s
            elif now_s - zygote.idle_since_s > _IDLE_S:
                zygote.close()
                del self._zygotes[key]

    def close(self) -> None:
        """End everything."""
        for zygote in self._zygotes.values():
            zygote.close()
        self._zygotes.clear()
