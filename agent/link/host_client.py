"""Connection to the host; requests matched by id.

The agent's end of the socket to the host: requests and answers on the loop, and a connection that comes back.

The host may die at any time. Then every request that waits for its answer fails with `HostGoneError`, and the link
tries again, unhurried, until somebody listens. Nothing is remembered across connections: what the host has is what it
says in its `Welcome`.
"""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from agent.host.ipc import host_api
from fleet.protocol import bounds
from fleet.protocol.codes import RejectCode
from fleet.protocol.messages import InstanceHealth

RETRY_FIRST_S: Final = 0.1

RETRY_MAX_S: Final = 5.0

REQUEST_S: Final = 120.0

R = TypeVar("R", bound=msgspec.Struct)


class HostGoneError(Exception):
    """There is no host, or it went away before it answered."""


class HostRefusedError(Exception):
    """The host answered that it could not be done; nothing changed."""

    def __init__(self, failed: host_api.Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


class HostClient:
    """A connection to the host.

    Attributes:
        on_event: told what the host says by itself.
        on_lost: called the moment a connection is over.
    """

    def __init__(self, path: Path, *, on_event: Callable[[host_api.Event], None] = lambda _event: None) -> None:
        self._path = path
        self.on_event = on_event
        self.on_lost: Callable[[], None] = lambda: None
        self._sock: socket.socket | None = None
        self._writer: host_api.Writer | None = None
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[host_api.Reply]] = {}
        self._lost = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._sock is not None

    async def connect(self) -> host_api.Welcome:
        """Connect once and ask who is there.

        Raises:
            HostGoneError: nobody listens, or it does not speak this protocol.
        """
        self.close()
        sock = host_api.new_socket()
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, str(self._path))
        except OSError as error:
            sock.close()
            raise HostGoneError(f"no host at {self._path}: {error.strerror}") from error
        self._sock, self._writer = sock, host_api.Writer(sock, lambda _: self.close())
        self._lost.clear()
        asyncio.get_running_loop().add_reader(sock, self._readable)
        return await self.ask(host_api.Hello, host_api.Welcome)

    async def stay_connected(self, on_welcome: Callable[[host_api.Welcome], Awaitable[None]]) -> None:
        """Connect, tell `on_welcome`, wait for the end, and again; for ever."""
        delay = RETRY_FIRST_S
        while True:
            try:
                welcome = await self.connect()
                await on_welcome(welcome)
                delay = RETRY_FIRST_S
                await self._lost.wait()
            except HostGoneError:
                self.close()
            await asyncio.sleep(delay)
            delay = min(RETRY_MAX_S, delay * 2)

    def close(self) -> None:
        """End the connection; whoever waits for an answer gets `HostGoneError`."""
        sock, self._sock = self._sock, None
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        if sock is not None:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(sock)
            sock.close()
            self.on_lost()
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
                self.on_event(message)
                continue
            future = self._waiting.pop(message.id, None)
            if future is not None and not future.done():
                future.set_result(message)

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


HOST_WAIT_S: Final = 60.0


class Host:
    """The host as the effects see it: a link, and whether what is committed has been restored on it."""

    def __init__(self, link: HostClient) -> None:
        self.link = link
        self.ready = asyncio.Event()
        self.nudges: dict[str, asyncio.Event] = {}
        self.trapped: dict[tuple[str, int], host_api.Trapped | host_api.Changed] = {}
        # Whoever asks before what is committed runs again would be overtaken by it.
        link.on_lost = self.ready.clear

    def on_event(self, event: host_api.Event) -> None:
        """Remember the newest trouble of an instance, and wake whoever watches it."""
        if isinstance(event, host_api.Trapped) or event.message:
            self.trapped[event.instance, event.generation] = event
            while len(self.trapped) > 2 * bounds.ITEMS_MAX:
                del self.trapped[next(iter(self.trapped))]
        nudge = self.nudges.get(event.instance)
        if nudge is not None:
            nudge.set()

    async def wait(self) -> None:
        """Until there is a host with everything committed on it; raises `HostGoneError` after a minute."""
        try:
            async with asyncio.timeout(HOST_WAIT_S):
                await self.ready.wait()
        except TimeoutError as error:
            raise HostGoneError(f"there was no host for {HOST_WAIT_S:.0f} s") from error

    async def figures(self, *, check: str = "") -> tuple[InstanceHealth, ...]:
        """Every instance's figures, once what is committed has been restored; raises `HostGoneError`.

        `check` names an instance whose health check is asked first.
        """
        await self.wait()
        return (await self.link.ask(host_api.Status, host_api.HostStats, check=check)).instances
