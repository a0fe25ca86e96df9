"""Forked helper processes, kept alive by the supervisor: the router on the shared port, and the egress.

The handle of the key-value store is in `keyvalue_handle`, that of the TLS terminator in `shared_ingress`.

A helper that ends is replaced after a short pause, and given its whole state again. The supervisor keeps the sockets on
which clients and workers wait: the listening socket, so that clients waiting to be accepted survive a crash of the
router, and the egress's ends of the workers' sockets, so that a crash of the egress only loses pending requests.
"""

import asyncio
import contextlib
import itertools
import mmap
import os
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from agent.host.egress import run_egress
from agent.host.http import router
from agent.host.http.router import run_router
from agent.host.ipc import framing, helper_api
from agent.host.ipc.packet_writer import PacketWriter
from agent.host.sandbox import kernel, sandbox
from agent.host.supervisor.resources import Listener
from agent.host.supervisor.worker_handle import WorkerHandle
from fleet.component.wasi import OUTGOING_HANDLER
from fleet.protocol import wire
from fleet.protocol.manifest import Grants, Limits

_ACK_S: Final = 5.0
_PAUSE_S: Final = 0.5
_PAUSE_MAX_S: Final = 15.0
_WELL_S: Final = 60.0
"""Pause before a replacement: doubled with each process that did not live for `_WELL_S`, so that helpers that cannot
work here use up neither the CPU nor the journal."""

_DRAIN_S: Final = 6.0  # a second more than the router gives its clients


_from_router: Final[msgspec.json.Decoder[helper_api.FromRouter]] = msgspec.json.Decoder(helper_api.FromRouter)


class HelperProcess(ABC):
    """Forked process with a socket to the supervisor. Subclasses define how to fork it, and its state."""

    def __init__(self, name: str) -> None:
        self.pid = 0
        self._name = name
        self._sock: socket.socket | None = None
        self._writer: PacketWriter | None = None
        self._pidfd = -1
        self._closing = False
        self._began_s = 0.0
        self._pause_s = _PAUSE_S
        self._gone = asyncio.get_running_loop().create_future()
        self._gone.set_result(None)
        self._there = asyncio.Event()

    @property
    def running(self) -> bool:
        """True while there is a process."""
        return self._pidfd >= 0

    async def await_process(self) -> int:
        """Wait until there is a process, and return its pid."""
        await self._there.wait()
        return self.pid

    @abstractmethod
    def _spawn(self) -> tuple[int, socket.socket]:
        """Fork the process; return its pid and the supervisor's end of its socket."""

    @abstractmethod
    def _tell_everything(self) -> None:
        """Send a new process its whole state."""

    @abstractmethod
    def _is_needed(self) -> bool:
        """Return whether a process that has ended should be replaced."""

    def _closed(self) -> str:
        """Close the descriptors of a process that has ended; return what was lost with it, for people."""
        return ""

    def _readable(self) -> None:
        """Stop reading: a helper that sends nothing is readable only at its end, which its pidfd reports."""
        if self._sock is not None:
            asyncio.get_running_loop().remove_reader(self._sock)

    def _fork(self) -> None:
        """Fork the process, and send it its state. Raises `OSError`: there is none."""
        self.pid, sock = self._spawn()
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:
            sock.close()
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise
        self._sock = sock
        self._sock.setblocking(False)
        self._there.set()
        self._writer = PacketWriter(self._sock, lambda _: None)  # the pidfd reports the end
        loop = asyncio.get_running_loop()
        self._began_s = loop.time()
        self._gone = loop.create_future()
        loop.add_reader(self._pidfd, self._ended)
        loop.add_reader(self._sock, self._readable)
        try:
            self._tell_everything()
        except OSError:  # out of descriptors: another process is told everything after a pause
            self._hang_up()

    def _tell(self, message: msgspec.Struct, *fds: int) -> None:
        """Send a message; a process that has ended will be replaced, and given its whole state again."""
        if self._writer is not None:
            self._writer.send(msgspec.json.encode(message), *fds)

    def _hang_up(self) -> None:
        """Close the process's socket, so that it ends."""
        if self._sock is not None and self._writer is not None:
            self._writer.close()
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self._sock = self._writer = None

    def _ended(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._there.clear()
        self._hang_up()
        _, status = os.waitpid(self.pid, 0)
        lost = self._closed()
        self._gone.set_result(None)
        if self._is_needed() and not self._closing:
            pause_s = self._next_pause(loop.time())
            later = f" in {pause_s:g} s" if pause_s > _PAUSE_S else ""
            sys.stderr.write(
                f"host: the {self._name} ended ({os.waitstatus_to_exitcode(status)}{lost}), starting another{later}\n"
            )
            sys.stderr.flush()
            loop.call_later(pause_s, self._again)

    def _next_pause(self, now_s: float) -> float:
        """Return the pause before the next process, and double the one after that."""
        pause_s = _PAUSE_S if now_s - self._began_s >= _WELL_S else self._pause_s
        self._pause_s = min(_PAUSE_MAX_S, 2 * pause_s)
        return pause_s

    def _again(self) -> None:
        if not self._is_needed() or self.running or self._closing:
            return
        try:
            self._fork()
        except OSError as error:  # out of processes, memory or descriptors, for now
            loop = asyncio.get_running_loop()
            pause_s = self._next_pause(loop.time())
            sys.stderr.write(f"host: cannot start the {self._name}: {error.strerror}; trying again in {pause_s:g} s\n")
            sys.stderr.flush()
            loop.call_later(pause_s, self._again)

    def _kill(self) -> None:
        """Kill the process, and start no other."""
        self._closing = True
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._ended()


class RouterRefusedError(Exception):
    """The router has no room for a listener or a channel; the message says of what."""


NO_RULES: Final = helper_api.IngressRules()
"""Routes by name alone."""


class ChannelHandle:
    """Handle of a worker's channel, which the router has.

    Attributes:
        drained: from a `drain` on: done once no call is left in the worker.
    """

    def __init__(self, router: "RouterHandle", number: int, worker: WorkerHandle) -> None:
        self.worker = worker
        self.drained: asyncio.Future[None] | None = None
        self._router = router
        self._number = number

    def serve(self) -> None:
        """Give calls to the worker."""
        self.drained = None
        self._router.tell_channel(helper_api.ServeChannel(self._number))

    async def drain(self, wait_s: float) -> None:
        """Give no more calls to the worker, and wait until those that it has are over, at most `wait_s`."""
        self.drained = asyncio.get_running_loop().create_future()
        if self._router.tell_channel(helper_api.DrainChannel(self._number)) and self.worker.alive:
            waits: list[asyncio.Future[Any]] = [self.drained, self.worker.ended]
            await asyncio.wait(waits, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        else:
            self.set_drained()

    def set_drained(self) -> None:
        """Take note that no call is left."""
        if self.drained is not None and not self.drained.done():
            self.drained.set_result(None)

    def leave_loop(self) -> None:
        """Have the worker read its control socket, in which a request waits."""
        self._router.tell_channel(helper_api.YieldChannel(self._number))


class RouterHandle(HelperProcess):
    """Handle of the router, which always runs."""

    def __init__(
        self,
        ingress: socket.socket | None,
        *,
        decrypted: socket.socket | None = None,
        rules: helper_api.IngressRules = NO_RULES,
    ) -> None:
        """Fork a router for the listening socket `ingress`.

        Args:
            ingress: listening socket; None for no shared port.
            decrypted: router's end of the socket on which clients arrive that came over TLS.
            rules: the device owner's.
        """
        super().__init__("router")
        self._decrypted = decrypted
        self._rules = rules
        self._ingress = ingress
        self._routes: dict[str, bool] = {}
        self._listeners: dict[str, Listener] = {}
        self._channels: dict[int, ChannelHandle] = {}
        self._numbers = itertools.count(1)
        self._ids = itertools.count(1)
        self._acks: dict[int, asyncio.Future[str]] = {}
        self._page: mmap.mmap
        self._fork()

    def _spawn(self) -> tuple[int, socket.socket]:
        forked = fork_router(self._ingress, decrypted=self._decrypted)
        self._page = forked.page
        return forked.pid, forked.sock

    def _tell_everything(self) -> None:
        self._tell(self._rules)
        for instance, up in self._routes.items():
            self._tell(helper_api.RouteUpdate(instance, up))
        for instance, listener in self._listeners.items():
            if listener.sock.fileno() >= 0:
                self._tell(helper_api.AddListener(instance), listener.sock.fileno())

    def _is_needed(self) -> bool:
        return True

    def _closed(self) -> str:
        lost = router.clients_of(self._page)
        self._page.close()
        for future in self._acks.values():
            if not future.done():
                future.set_result("")
        for channel in self._channels.values():  # the worker sees the end of it, and is replaced
            channel.set_drained()
        self._channels.clear()
        return f"; client connections lost with it: {lost}"

    async def update(self, instance: str, *, up: bool | None) -> None:
        """Tell the router whether an instance answers (None: remove it), and wait until the router knows."""
        if self._routes.get(instance) == up:
            return
        number = next(self._ids)
        if up is None:
            del self._routes[instance]
            self._tell(helper_api.RouteRemove(instance, number))
        else:
            self._routes[instance] = up
            self._tell(helper_api.RouteUpdate(instance, up, number))
        await self._acknowledged(number)

    def up(self) -> dict[str, bool]:
        """Return whether each instance behind the shared port answers."""
        return dict(self._routes)

    async def configure(self, rules: helper_api.IngressRules) -> None:
        """Tell the router the owner's rules, and wait until it follows them."""
        self._rules = rules
        number = next(self._ids)
        self._tell(msgspec.structs.replace(rules, id=number))
        await self._acknowledged(number)

    async def _acknowledged(self, number: int) -> None:
        """Wait until the router knows, if there is one. Raises `RouterRefusedError`."""
        if not self.running:
            return
        future = self._acks[number] = asyncio.get_running_loop().create_future()
        problem = ""
        try:
            async with asyncio.timeout(_ACK_S):
                problem = await future
        except TimeoutError:
            pass
        finally:
            self._acks.pop(number, None)
        if problem:
            raise RouterRefusedError(problem)

    async def listen(self, instance: str, listener: Listener) -> None:
        """Have the router accept an instance's clients from its listener, in place of an earlier one.

        Raises:
            RouterRefusedError: the earlier one stays.
            OSError: the same, as a descriptor cannot be copied.
        """
        earlier = self._listeners.get(instance)
        if earlier is listener:
            return
        number = next(self._ids)
        self._tell(helper_api.AddListener(instance, number), listener.sock.fileno())
        self._listeners[instance] = listener
        try:
            await self._acknowledged(number)
        except RouterRefusedError:
            if earlier is None:
                del self._listeners[instance]
            else:
                self._listeners[instance] = earlier
            raise

    def stop_listening(self, instance: str) -> None:
        """Have the router close an instance's listener."""
        if self._listeners.pop(instance, None) is not None:
            self._tell(helper_api.RemoveListener(instance))

    async def attach(self, instance: str, worker: WorkerHandle, limits: Limits, *, reuses: bool) -> ChannelHandle:
        """Give the router a worker's channel, of which this process keeps nothing; it gets no calls until it serves.

        `reuses`: whether the worker's store answers several calls.

        Raises:
            RouterRefusedError: the router has no room for it.
            OSError: a descriptor cannot be copied.
        """
        number, told = next(self._numbers), next(self._ids)
        channel = worker.take_channel()
        assert channel is not None, "once for each worker"
        with contextlib.closing(channel):
            whole = worker.ready is not None and worker.ready.whole
            shared = worker.process.is_shared
            reads = reuses and not whole  # where the worker itself reads frames, it never loses its place in them
            message = helper_api.AddChannel(instance, number, limits, reads, whole, shared, told)
            # The numbers of calls in a slot's page are those of its process, which watches them itself.
            repeated_fd = channel.page_fd if shared else channel.worker_page_fd
            self._tell(message, channel.sock.fileno(), channel.page_fd, repeated_fd)
        handle = ChannelHandle(self, number, worker)
        if self.running:
            self._channels[number] = handle
            worker.ended.add_done_callback(lambda _: self._forget(number))
        await self._acknowledged(told)
        return handle

    def _forget(self, number: int) -> None:
        handle = self._channels.pop(number, None)
        if handle is not None:
            handle.set_drained()

    def tell_channel(
        self, message: helper_api.ServeChannel | helper_api.DrainChannel | helper_api.YieldChannel
    ) -> bool:
        """Send a message about a channel; return False where the router has none of this number."""
        if message.worker not in self._channels:
            return False
        self._tell(message)
        return True

    def _readable(self) -> None:
        assert self._sock is not None
        try:
            data, fds = framing.receive_packet(self._sock)
        except BlockingIOError:
            return
        except framing.GoneError:
            asyncio.get_running_loop().remove_reader(self._sock)
            return
        framing.close_all(fds)
        try:
            message = _from_router.decode(data)
        except wire.JSON_ERRORS:  # a compromised router
            return
        if isinstance(message, helper_api.RouteAcknowledged):
            future = self._acks.get(message.id)
            if future is not None and not future.done():
                future.set_result(message.problem)
        elif (channel := self._channels.get(message.worker)) is not None:
            if isinstance(message, helper_api.ChannelDrained):
                channel.set_drained()
            else:
                channel.worker.on_report(message)

    async def drain(self) -> None:
        """Stop accepting on the shared port, answer pending requests, and end the router."""
        self._closing = True
        if self._ingress is not None:
            self._ingress.close()
        if self.running:
            self._tell(helper_api.DrainRouter())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_S):
                    await asyncio.shield(self._gone)

    def close(self) -> None:
        """Kill the router."""
        self._kill()


def needs_egress(grants: Grants) -> bool:
    """Return whether an instance with these grants may send requests or open sockets anywhere."""
    return grants.sockets or _may_send(grants)


def _may_send(grants: Grants) -> bool:
    return grants.allows(OUTGOING_HANDLER) and bool(grants.requests or grants.instances)


class EgressTicket(NamedTuple):
    """Admission of a worker: its number, for `release`, and its end of the socket for requests."""

    number: int
    worker_end: socket.socket


class _Admitted(NamedTuple):
    sock: socket.socket
    message: helper_api.RegisterWorker


class EgressHandle(HelperProcess):
    """Handle of the egress, which only runs while there are workers that may use it."""

    def __init__(self, directory: Path) -> None:
        """Prepare a handle; `directory` holds the instances' sockets."""
        super().__init__("egress")
        self._directory = directory
        self._workers: dict[int, _Admitted] = {}
        self._numbers = itertools.count(1)
        self._known: set[int] = set()  # workers that an egress has had

    def _spawn(self) -> tuple[int, socket.socket]:
        return fork_egress(self._directory)

    def _tell_everything(self) -> None:
        for number in self._workers:
            with contextlib.suppress(OSError):  # out of descriptors: this worker's requests are not answered
                self._admit(number)

    def _is_needed(self) -> bool:
        return bool(self._workers)

    def admit(self, instance: str, grants: Grants) -> EgressTicket:
        """Admit a worker of this instance. Raises `OSError`: there is no room for it."""
        ours, theirs = framing.socket_pair()
        number = next(self._numbers)
        if not _may_send(grants):  # entries for requests alone lead nowhere
            wanted = tuple(each for each in grants.outbound if each not in grants.requests)
            grants = Grants(outbound=wanted)
        message = helper_api.RegisterWorker(instance=instance, outbound=grants.outbound, instances=grants.instances)
        self._workers[number] = _Admitted(ours, message)
        try:
            if self._sock is not None:
                self._admit(number)
            elif not self.running:
                self._fork()
            # Otherwise the last process is ending, and its end starts the next.
        except OSError:
            theirs.close()
            self.release(number)
            raise
        return EgressTicket(number, theirs)

    def _admit(self, number: int) -> None:
        worker = self._workers[number]
        message = msgspec.structs.replace(worker.message, again=number in self._known)
        self._known.add(number)
        self._tell(message, worker.sock.fileno())

    def release(self, number: int) -> None:
        """Remove a worker that has ended; with the last worker, the process ends."""
        worker = self._workers.pop(number, None)
        self._known.discard(number)
        if worker is not None:
            worker.sock.close()
        if not self._workers:
            self._hang_up()

    def close(self) -> None:
        """Kill the egress."""
        self._closing = True
        for number in list(self._workers):
            self.release(number)
        self._kill()


class ForkedRouter(NamedTuple):
    """Forked router: its pid, the supervisor's end of its socket, and its page for `clients_of`."""

    pid: int
    sock: socket.socket
    page: mmap.mmap


def fork_router(
    listener: socket.socket | None,
    keep: tuple[int, ...] = (),
    decrypted: socket.socket | None = None,
) -> ForkedRouter:
    """Fork a router on a listener.

    Args:
        listener: of the shared port.
        keep: further descriptors that the child may hold.
        decrypted: socket on which clients arrive that came over TLS.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE)
    try:
        pid, sock = fork_child("router", lambda theirs: run_router(listener, theirs, keep, page, decrypted))
    except OSError:
        page.close()
        raise
    return ForkedRouter(pid, sock, page)


def fork_egress(directory: Path, keep: tuple[int, ...] = ()) -> tuple[int, socket.socket]:
    """Fork an egress; return its pid and the supervisor's end of its socket.

    `directory` holds the instances' sockets. `keep`: further descriptors that the child may hold.
    """
    return fork_child("egress", lambda theirs: run_egress(theirs, directory, keep))


def fork_child(name: str, run: Callable[[socket.socket], None]) -> tuple[int, socket.socket]:
    """Fork a process that runs `run` on its end of a socket pair, and is killed when this process ends."""
    ours, theirs = framing.socket_pair()
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        framing.close_all([ours.detach(), theirs.detach()])
        raise
    if pid == 0:
        status = 1
        try:
            sandbox.die_with_parent(parent)
            kernel.set_name(name)
            ours.close()
            run(theirs)
            status = 0
        except BaseException as error:  # noqa: BLE001 - no caller in this forked process could handle it
            sys.stderr.write(f"{name}: {type(error).__name__}: {error}\n")
            sys.stderr.flush()
        finally:
            os._exit(status)
    theirs.close()
    return pid, ours
