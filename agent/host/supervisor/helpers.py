"""RouterHandle, EgressHandle: forked helper processes.

The supervisor's side of the router: keeps one alive on the shared port, and tells it what there is.

The supervisor holds the listening socket too, so a router that dies takes no waiting client with it.

The supervisor's side of the egress: keeps one alive while a lane needs it, and says who each lane is.

The supervisor keeps the egress's end of every lane's socket too, so that an egress that dies is replaced and lanes
notice nothing but that a question stayed unanswered.
"""

import asyncio
import contextlib
import itertools
import mmap
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final

import msgspec

from agent.host.egress import run_egress
from agent.host.http import router
from agent.host.http.router import run_router
from agent.host.ipc import framing, helper_api, host_api
from agent.host.sandbox import sandbox
from fleet.component.wasi import OUTGOING_HANDLER
from fleet.protocol import wire
from fleet.protocol.manifest import Grants

_ACK_S: Final = 5.0

_PAUSE_S: Final = 0.5

_DRAIN_S: Final = 6.0

_ack: Final[msgspec.json.Decoder[helper_api.RouteAcknowledged]] = msgspec.json.Decoder(helper_api.RouteAcknowledged)


class RouterHandle:
    """The router's handle."""

    def __init__(self, ingress: socket.socket, directory: Path) -> None:
        self._ingress = ingress
        self._directory = directory
        self._up: dict[str, tuple[bool, bool]] = {}
        self._ids = itertools.count(1)
        self._acks: dict[int, asyncio.Future[None]] = {}
        self._closing = False
        self._fork()

    def _fork(self) -> None:
        self._pid, self._sock, self._page = fork_router(self._ingress, self._directory)
        self._pidfd = os.pidfd_open(self._pid)
        self._sock.setblocking(False)
        self._writer = host_api.Writer(self._sock, lambda _: None)  # its pidfd tells of its end
        self._gone = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._sock, self._readable)
        loop.add_reader(self._pidfd, self._ended)
        for instance, (up, spread) in self._up.items():
            self._tell(helper_api.RouteUpdate(instance, up, spread))

    def _tell(self, message: helper_api.RouteUpdate | helper_api.RouteRemove | helper_api.DrainRouter) -> None:
        self._writer.send(msgspec.json.encode(message))  # a router that is gone is replaced, and told everything again

    async def route(self, instance: str, *, up: bool | None, spread: bool) -> None:
        """Say whether an instance answers (None: it is gone), and wait until the router knows; `spread` as in `Set`."""
        if self._up.get(instance) == (None if up is None else (up, spread)):
            return
        number = next(self._ids)
        if up is None:
            del self._up[instance]
            self._tell(helper_api.RouteRemove(instance, number))
        else:
            self._up[instance] = up, spread
            self._tell(helper_api.RouteUpdate(instance, up, spread, number))
        if self._gone.done():
            return
        future = self._acks[number] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait_for(future, _ACK_S)
        except TimeoutError:
            pass
        finally:
            self._acks.pop(number, None)

    def _readable(self) -> None:
        try:
            data, fds = framing.receive_packet(self._sock)
        except BlockingIOError:
            return
        except framing.GoneError:
            asyncio.get_running_loop().remove_reader(self._sock)
            return
        for fd in fds:
            os.close(fd)
        try:
            future = self._acks.get(_ack.decode(data).id)
        except wire.JSON_ERRORS:  # a router that somebody broke into
            return
        if future is not None and not future.done():
            future.set_result(None)

    def _ended(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        loop.remove_reader(self._sock)
        os.close(self._pidfd)
        self._writer.close()
        self._sock.close()
        lost = router.clients_of(self._page)
        self._page.close()
        _, status = os.waitpid(self._pid, 0)
        for future in self._acks.values():
            if not future.done():
                future.set_result(None)
        if not self._gone.done():
            self._gone.set_result(None)
        if not self._closing:
            why = f"{os.waitstatus_to_exitcode(status)}; client connections lost with it: {lost}"
            sys.stderr.write(f"host: the router ended ({why}), starting another\n")
            sys.stderr.flush()
            loop.call_later(_PAUSE_S, self._again)

    def _again(self) -> None:
        if not self._closing:
            self._fork()

    async def drain(self) -> None:
        """Accept no more on the shared port, answer what was asked, and end the router."""
        self._closing = True
        self._ingress.close()
        if self._gone.done():
            return
        self._tell(helper_api.DrainRouter())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._gone), _DRAIN_S)

    def close(self) -> None:
        """End the router now."""
        self._closing = True
        if not self._gone.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._ended()


def wanted(grants: Grants) -> bool:
    """Whether an instance with these grants may send requests anywhere."""
    return grants.allows(OUTGOING_HANDLER) and bool(grants.outbound or grants.instances)


class EgressHandle:
    """The egress's handle; there is a process behind it only while there are lanes."""

    def __init__(self, directory: Path) -> None:
        """`directory` holds the sockets of the board's instances."""
        self._directory = directory
        self._lanes: dict[int, tuple[socket.socket, helper_api.RegisterWorker]] = {}
        self._sock: socket.socket | None = None
        self._pidfd = -1
        self._pid = 0
        self._next = 0
        self._closing = False

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._sock is not None

    def admit(self, instance: str, grants: Grants) -> tuple[int, socket.socket]:
        """A lane more: what to call it here, and its end of the socket on which it asks."""
        ours, theirs = framing.socket_pair()
        self._next += 1
        admit = helper_api.RegisterWorker(instance=instance, outbound=grants.outbound, instances=grants.instances)
        self._lanes[self._next] = (ours, admit)
        if self._sock is None:
            self._fork()
        else:
            self._tell(ours, admit)
        return self._next, theirs

    def release(self, number: int) -> None:
        """A lane is gone; with the last of them the process."""
        found = self._lanes.pop(number, None)
        if found is not None:
            found[0].close()
        if not self._lanes and self._sock is not None:
            self._writer.close()
            self._sock.close()  # and it ends

    def _fork(self) -> None:
        self._pid, self._sock = fork_egress(self._directory)
        self._sock.setblocking(False)
        self._writer = host_api.Writer(self._sock, lambda _: None)  # its pidfd tells of its end
        self._pidfd = os.pidfd_open(self._pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._ended)
        for ours, admit in self._lanes.values():
            self._tell(ours, admit)

    def _tell(self, ours: socket.socket, admit: helper_api.RegisterWorker) -> None:
        # An egress that is gone is replaced, and told everything again.
        with contextlib.suppress(OSError):  # out of descriptors: this lane's questions stay unanswered
            self._writer.send(msgspec.json.encode(admit), ours.fileno())

    def _ended(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        _, status = os.waitpid(self._pid, 0)
        if self._sock is not None:
            self._writer.close()
            self._sock.close()
            self._sock = None
        if self._lanes and not self._closing:
            sys.stderr.write(f"host: the egress ended ({os.waitstatus_to_exitcode(status)}), starting another\n")
            loop.call_later(_PAUSE_S, self._again)

    def _again(self) -> None:
        if self._lanes and self._sock is None and not self._closing:
            self._fork()

    def close(self) -> None:
        """End it now."""
        self._closing = True
        for number in list(self._lanes):
            self.release(number)
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._ended()


def fork_router(
    listener: socket.socket, directory: Path, keep: tuple[int, ...] = ()
) -> tuple[int, socket.socket, mmap.mmap]:
    """Fork a router on this listener; (its pid, the supervisor's end of its socket, its page for `clients_of`).

    `keep`: further descriptors that the child may hold; every other one is closed.
    """
    ours, theirs = framing.socket_pair()
    page = mmap.mmap(-1, mmap.PAGESIZE)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sandbox.die_with_parent(parent)
            ours.close()
            run_router(listener, theirs, directory, keep, page)
            status = 0
        except BaseException as error:  # noqa: BLE001 - this process was forked, nobody above could handle it
            sys.stderr.write(f"router: {type(error).__name__}: {error}\n")
            sys.stderr.flush()
        finally:
            os._exit(status)
    theirs.close()
    return pid, ours, page


def fork_egress(directory: Path, keep: tuple[int, ...] = ()) -> tuple[int, socket.socket]:
    """Fork an egress; (its pid, the supervisor's end of its socket).

    `directory` holds the instances' sockets. `keep`: further descriptors that the child may hold.
    """
    ours, theirs = framing.socket_pair()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sandbox.die_with_parent(parent)
            ours.close()
            run_egress(theirs, directory, keep)
            status = 0
        except BaseException as error:  # noqa: BLE001 - this process was forked, nobody above could handle it
            sys.stderr.write(f"egress: {type(error).__name__}: {error}\n")
            sys.stderr.flush()
        finally:
            os._exit(status)
    theirs.close()
    return pid, ours
