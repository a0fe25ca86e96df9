"""Agent's end of the socket to the host: requests matched by id, events, and a connection that comes back.

The host may die at any time. Every request that waits for its reply then fails with `HostGoneError`, and `run` connects
again until the host listens. The host says in its `Welcome` what it runs; across connections only the newest fault of
each generation is remembered.
"""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from agent.host.ipc import host_api
from agent.host.ipc.packet_writer import PacketWriter
from fleet.protocol import bounds
from fleet.protocol.codes import RejectCode

RETRY_FIRST_S: Final = 0.1
RETRY_MAX_S: Final = 5.0
REQUEST_S: Final = 120.0
READY_S: Final = 60.0

R = TypeVar("R", bound=msgspec.Struct)


class HostGoneError(Exception):
    """The host connection was lost before the reply, or there is none."""


class HostRefusedError(Exception):
    """The host refused a request; nothing changed."""

    def __init__(self, failed: host_api.Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


@dataclass(frozen=True, slots=True)
class HostConnected:
    """A host answered on a new connection; `welcome` says what it runs."""

    welcome: host_api.Welcome


@dataclass(frozen=True, slots=True)
class HostLost:
    """The connection to the host ended."""


HostEvent = HostConnected | HostLost | host_api.Event


class HostClient:
    """Client of the host.

    Attributes:
        ready: set by the restorer once everything committed runs on this host; cleared when the connection ends.
            Whoever asks earlier would be overtaken by the restoration.
        welcome: of the newest connection, also after its end; None before the first.
        nudges: by instance, set when something happened to it.
        faults: by instance and generation, the newest event that tells of a fault.
    """

    name = "host connection"

    def __init__(self, path: Path) -> None:
        self._path = path
        self.ready = asyncio.Event()
        self.welcome: host_api.Welcome | None = None
        self.nudges: dict[str, asyncio.Event] = {}
        self.faults: dict[tuple[str, int], host_api.Event] = {}
        self._events: asyncio.Queue[HostEvent] = asyncio.Queue()
        self._sock: socket.socket | None = None
        self._writer: PacketWriter | None = None
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[host_api.Reply]] = {}
        self._lost = asyncio.Event()

    async def events(self) -> AsyncIterator[HostEvent]:
        """Yield the events of the host and of the connection that `run` holds, in order, for ever. One reader."""
        while True:
            yield await self._events.get()

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._sock is not None

    async def connect(self) -> host_api.Welcome:
        """Connect once, and return the host's welcome.

        Raises:
            HostGoneError: nothing listens, or something that does not speak this protocol.
        """
        self.close()
        sock = host_api.new_socket()
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, str(self._path))
        except OSError as error:
            sock.close()
            raise HostGoneError(f"no host at {self._path}: {error.strerror}") from error
        self._sock, self._writer = sock, PacketWriter(sock, lambda _: self.close())
        self._lost.clear()
        asyncio.get_running_loop().add_reader(sock, self._readable)
        self.welcome = await self.hello()
        return self.welcome

    async def wait(self) -> None:
        """Wait until everything committed runs on a host; raises `HostGoneError` after a minute."""
        try:
            async with asyncio.timeout(READY_S):
                await self.ready.wait()
        except TimeoutError as error:
            raise HostGoneError(f"there was no host for {READY_S:.0f} s") from error

    async def hello(self) -> host_api.Welcome:
        """Ask for the host's own state and every instance that runs, in as many packets as it takes.

        Raises:
            HostGoneError, HostRefusedError: see `ask`.
        """
        welcome = await self.ask(host_api.Hello, host_api.Welcome)
        while welcome.more and (last := welcome.running[-1:]):
            page = await self.ask(host_api.Hello, host_api.Welcome, after=last[0].instance)
            more = page.more and page.running != ()
            welcome = msgspec.structs.replace(page, running=(*welcome.running, *page.running), more=more)
        return welcome

    async def stats(self, *, check: str = "") -> host_api.HostStats:
        """Ask for the figures of every instance, in as many packets as it takes.

        Args:
            check: instance whose health check is asked first; empty for none.

        Raises:
            HostGoneError, HostRefusedError: see `ask`.
        """
        stats = await self.ask(host_api.Status, host_api.HostStats, check=check)
        while stats.more and (last := stats.instances[-1:]):
            page = await self.ask(host_api.Status, host_api.HostStats, after=last[0].instance)
            more = page.more and page.instances != ()
            stats = msgspec.structs.replace(page, instances=(*stats.instances, *page.instances), more=more)
        return stats

    async def run(self) -> None:
        """Connect, wait for the end of the connection, and connect again, for ever."""
        delay = RETRY_FIRST_S
        while True:
            try:
                self._events.put_nowait(HostConnected(await self.connect()))
                delay = RETRY_FIRST_S
                await self._lost.wait()
            except HostGoneError:
                self.close()
            await asyncio.sleep(delay)
            delay = min(RETRY_MAX_S, delay * 2)

    def close(self) -> None:
        """End the connection; every request that waits for its reply fails with `HostGoneError`."""
        sock, self._sock = self._sock, None
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        if sock is not None:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(sock)
            sock.close()
            self.ready.clear()
            self._events.put_nowait(HostLost())
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(HostGoneError("the host went away"))
        self._lost.set()

    def _readable(self) -> None:
        while self._sock is not None:
            try:
                message = host_api.receive_from_host(self._sock)
            except BlockingIOError:
                return
            except host_api.IpcError:
                self.close()
                return
            if isinstance(message, host_api.Trapped | host_api.Changed):
                self._note(message)
                self._events.put_nowait(message)
                continue
            future = self._waiting.pop(message.id, None)
            if future is not None and not future.done():
                future.set_result(message)

    def _note(self, event: host_api.Event) -> None:
        """Remember the newest fault of a generation, and wake the effect that watches the instance."""
        if isinstance(event, host_api.Trapped) or event.message:
            self.faults[event.instance, event.generation] = event
            while len(self.faults) > 2 * bounds.ITEMS_MAX:
                del self.faults[next(iter(self.faults))]
        nudge = self.nudges.get(event.instance)
        if nudge is not None:
            nudge.set()

    async def ask(
        self, kind: Callable[..., host_api.Request], answer: type[R], *, fd: int | None = None, **fields: Any
    ) -> R:
        """Send a request and wait for its answer.

        Args:
            kind: the request's type; its id is given here.
            answer: the type expected.
            fd: a descriptor to send along; it stays open here.
            fields: of the request.

        Raises:
            HostRefusedError: `Failed`, or the request does not fit into a packet.
            HostGoneError: no connection, lost meanwhile, no answer in two minutes, or another answer than expected.
        """
        writer = self._writer
        if writer is None:
            raise HostGoneError("there is no connection to the host")
        number = next(self._ids)
        try:
            data = host_api.encode(kind(id=number, **fields))
        except host_api.IpcError as error:
            failed = host_api.Failed(id=number, code=RejectCode.TOO_LARGE, message=str(error))
            raise HostRefusedError(failed) from error
        future: asyncio.Future[host_api.Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        packet = None
        try:
            packet = writer.send(data, fd)
            async with asyncio.timeout(REQUEST_S):
                reply = await future
        except TimeoutError as error:
            self.close()
            raise HostGoneError("the host does not answer") from error
        except OSError as error:
            raise HostGoneError(f"cannot send to the host: {error.strerror}") from error
        finally:
            self._waiting.pop(number, None)
            writer.withdraw(packet)  # nobody waits for its answer any more
        if isinstance(reply, host_api.Failed):
            raise HostRefusedError(reply)
        if not isinstance(reply, answer):
            raise HostGoneError(f"the host answered with {type(reply).__name__} instead of {answer.__name__}")
        return reply
