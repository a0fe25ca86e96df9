"""Client of the host: requests matched with replies by id, events, and reconnection.

The host may die at any time. Every pending request then fails with `HostGoneError`, and `run` reconnects as soon as a
host listens. The host's `Welcome` lists what it runs; across connections, only the latest fault of each generation is
remembered.
"""

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from agent.host.ipc import host_api
from agent.host.ipc.packet_writer import PacketWriter
from fleet.protocol import bounds, wire
from fleet.protocol.codes import RejectCode
from fleet.protocol.messages import InstanceHealth

log = logging.getLogger("agent.link.host_client")

RETRY_FIRST_S: Final = 0.1
RETRY_MAX_S: Final = 5.0
REQUEST_S: Final = 120.0
READY_S: Final = 60.0

R = TypeVar("R", bound=msgspec.Struct)


class HostGoneError(Exception):
    """The connection to the host was lost before the reply, or does not exist."""


class HostRefusedError(Exception):
    """The host refused a request; nothing changed."""

    def __init__(self, failed: host_api.Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


@dataclass(frozen=True, slots=True)
class HostConnected:
    """New connection to a host; `welcome` lists what it runs."""

    welcome: host_api.Welcome


@dataclass(frozen=True, slots=True)
class HostLost:
    """The connection to the host ended."""


HostEvent = HostConnected | HostLost | host_api.Event


class HostClient:
    """Client of the host.

    Attributes:
        ready: set by the restorer once all committed instances run on this host; cleared when the connection ends.
            Changes before that would collide with the restoration.
        welcome: of the latest connection, even after its end; None before the first.
        nudges: instance -> event that is set when something happens to the instance.
        faults: (instance, generation) -> latest event that reports a fault.
        mismatch: sentence on a host whose version is too far from this agent's; empty for none.
    """

    name = "host connection"

    def __init__(self, path: Path) -> None:
        self._path = path
        self.ready = asyncio.Event()
        self.welcome: host_api.Welcome | None = None
        self.mismatch = ""
        self.nudges: dict[str, asyncio.Event] = {}
        self.faults: dict[tuple[str, int], host_api.Event] = {}
        self._events: asyncio.Queue[HostEvent] = asyncio.Queue()
        self._sock: socket.socket | None = None
        self._writer: PacketWriter | None = None
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[host_api.Reply]] = {}
        self._figures: dict[str, dict[str, Any]] = {}
        self._lost = asyncio.Event()
        self._up = asyncio.Event()

    async def events(self) -> AsyncIterator[HostEvent]:
        """Yield the events of the host and of the connection in `run`, in order, forever. Only for a single reader."""
        while True:
            yield await self._events.get()

    @property
    def connected(self) -> bool:
        """True while there is a connection."""
        return self._sock is not None

    async def connect(self) -> host_api.Welcome:
        """Connect once, and return the host's welcome.

        Raises:
            HostGoneError: no process listens, or it does not speak this protocol.
        """
        self.close()
        sock = host_api.new_socket()
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, str(self._path))
        except OSError as error:
            sock.close()
            raise HostGoneError(f"no host listens at {self._path}: {error.strerror}") from error
        self._sock, self._writer = sock, PacketWriter(sock, lambda _: self.close())
        self._lost.clear()
        asyncio.get_running_loop().add_reader(sock, self._readable)
        try:
            welcome = await self.hello()
        except HostRefusedError as error:
            self.close()
            raise HostGoneError(f"the host cannot be understood: {error}") from error
        mismatch = host_api.compatibility("fleet-host", welcome.version, welcome.protocol)
        if mismatch != self.mismatch:
            self.mismatch = mismatch
            log.error("%s", mismatch) if mismatch else log.info("agent and host understand each other again")
        if mismatch:
            self.close()
            raise HostGoneError(mismatch)
        self.welcome = welcome
        self._up.set()
        return welcome

    async def connection(self) -> host_api.Welcome:
        """Wait until there is a connection, and return the host's welcome."""
        await self._up.wait()
        assert self.welcome is not None
        return self.welcome

    async def lost(self) -> None:
        """Wait until there is no connection."""
        await self._lost.wait()

    async def wait(self) -> None:
        """Wait until all committed instances run on a host; raises `HostGoneError` after READY_S."""
        try:
            async with asyncio.timeout(READY_S):
                await self.ready.wait()
        except TimeoutError as error:
            raise HostGoneError(f"no host was ready within {READY_S:.0f} s") from error

    async def hello(self) -> host_api.Welcome:
        """Ask for the host's state and every running instance, in as many packets as needed.

        Raises:
            HostGoneError, HostRefusedError: see `ask`.
        """
        welcome = await self.ask(host_api.Hello, host_api.Welcome, protocol=host_api.PROTOCOL)
        while welcome.more and (last := welcome.running[-1:]):
            page = await self.ask(host_api.Hello, host_api.Welcome, after=last[0].instance)
            more = page.more and page.running != ()
            welcome = msgspec.structs.replace(page, running=(*welcome.running, *page.running), more=more)
        return welcome

    async def stats(self, *, check: str = "") -> host_api.HostStats:
        """Ask for the figures of every instance, in as many packets as needed.

        Args:
            check: instance whose health check to run first; empty for none.

        Raises:
            HostGoneError, HostRefusedError: see `ask`.
        """
        stats = await self.ask(host_api.Status, host_api.HostStats, check=check)
        while stats.more and (last := stats.instances[-1:]):
            page = await self.ask(host_api.Status, host_api.HostStats, after=last[0].instance)
            more = page.more and page.instances != ()
            stats = msgspec.structs.replace(page, instances=(*stats.instances, *page.instances), more=more)
        names = {each.instance for each in stats.instances}
        self._figures = {name: each for name, each in self._figures.items() if name in names}
        return stats

    async def run(self) -> None:
        """Connect, wait for the end of the connection, and reconnect, forever."""
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
        """Close the connection; every pending request fails with `HostGoneError`."""
        sock, self._sock = self._sock, None
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._up.clear()
        if sock is not None:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(sock)
            sock.close()
            self.ready.clear()
            self._events.put_nowait(HostLost())
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(HostGoneError("the host connection was lost"))
        self._lost.set()

    def _readable(self) -> None:
        while self._sock is not None:
            try:
                message, data = host_api.receive_with_bytes(self._sock)
            except BlockingIOError:
                return
            except host_api.UnreadableError as error:
                self._unread(error)
                continue
            except host_api.IpcError:
                self.close()
                return
            if isinstance(message, host_api.Trapped | host_api.Changed):
                self._note(message)
                self._events.put_nowait(message)
                continue
            if isinstance(message, host_api.HostStats):
                self._keep_figures(data)
            future = self._waiting.pop(message.id, None)
            if future is not None and not future.done():
                future.set_result(message)

    def _keep_figures(self, data: bytes) -> None:
        """Keep figures as they came: a newer host has some that this agent relays without knowing them."""
        said = msgspec.json.decode(data)
        self._figures |= {each["instance"]: each for each in said["instances"]}

    def relayed(self, figure: InstanceHealth) -> dict[str, Any]:
        """Return an instance's figures for JSON, with those that only the host knows."""
        return wire.with_unknown(self._figures.get(figure.instance, {}), figure)

    def _unread(self, error: host_api.UnreadableError) -> None:
        """Drop a message of another version of the host; whoever waits for it learns that it cannot be read."""
        log.warning("the host said something that this agent cannot read: %s", error)
        future = None if error.id is None else self._waiting.pop(error.id, None)
        if error.id is not None and future is not None and not future.done():
            message = f"the host answered what this agent cannot read ({error}): upgrade both to one version"
            future.set_result(host_api.Failed(id=error.id, code=RejectCode.INTERNAL, message=message))

    def _note(self, event: host_api.Event) -> None:
        """Remember a generation's latest fault, and wake the effect that waits for the instance."""
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
        """Send a request and wait for the reply.

        Args:
            kind: type of the request; `ask` sets its id.
            answer: expected type of the reply.
            fd: descriptor to send along; stays open in this process.
            fields: fields of the request.

        Raises:
            HostRefusedError: the host replied `Failed`, or the request does not fit into a packet.
            HostGoneError: no connection, connection lost, no reply within two minutes, or an unexpected reply.
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
            packet = writer.send(data, *(() if fd is None else (fd,)))
            async with asyncio.timeout(REQUEST_S):
                reply = await future
        except TimeoutError as error:
            self.close()
            raise HostGoneError(f"the host did not answer within {REQUEST_S:.0f} s") from error
        except OSError as error:
            raise HostGoneError(f"cannot send to the host: {error.strerror}") from error
        finally:
            self._waiting.pop(number, None)
            writer.withdraw(packet)  # nothing waits for its reply any longer
        if isinstance(reply, host_api.Failed):
            raise HostRefusedError(reply)
        if not isinstance(reply, answer):
            raise HostGoneError(f"the host answered with {type(reply).__name__} instead of {answer.__name__}")
        return reply
