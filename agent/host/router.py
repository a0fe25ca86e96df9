"""The router: a process that owns the board's shared HTTP port and proxies to instances. A fork of the supervisor.

It holds the listening socket, a socket to the supervisor that says which instances there are, and a view of the
directory with the instances' sockets; no wasm, no configuration, no other file.
"""

import asyncio
import gc
import mmap
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from agent.host import cell, control, ipc
from agent.host.proxy import Client
from agent.host.routes import Routes
from agent.host.upstream import Pool
from fleet.protocol.caps import Count

IDLE_S: Final = 75
STALL_S: Final = 60
_SWEEP_S: Final = 15
_DRAIN_S: Final = 5
_CLIENTS_MAX: Final = 1024
_COUNT: Final = struct.Struct("=I")


class Set(msgspec.Struct, frozen=True, tag="set"):
    """An instance is there, and answers or not. Answered with `Ack`.

    `spread`: it may have several lanes, so each request asks anew for one that is free.
    """

    instance: str
    up: bool
    spread: bool = False
    id: Count = 0


class Unset(msgspec.Struct, frozen=True, tag="unset"):
    """An instance is gone. Answered with `Ack`."""

    instance: str
    id: Count = 0


class Ack(msgspec.Struct, frozen=True):
    """The message with this id is heeded from now on."""

    id: Count


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Accept no more, answer what was asked, and end."""


_decoder: Final[msgspec.json.Decoder[Set | Unset | Drain]] = msgspec.json.Decoder(Set | Unset | Drain)


class Clients(set[Client]):
    """The clients there are. How many is kept in memory that the supervisor shares, who says so if the router dies."""

    def __init__(self, page: mmap.mmap) -> None:
        super().__init__()
        self._page = page
        self.left: Callable[[], None] = lambda: None
        """Called when one has gone."""

    def add(self, client: Client) -> None:
        """One has come."""
        super().add(client)
        _COUNT.pack_into(self._page, 0, len(self))

    def discard(self, client: object) -> None:
        """One has gone."""
        super().discard(client)
        _COUNT.pack_into(self._page, 0, len(self))
        self.left()


def clients_of(page: mmap.mmap) -> int:
    """How many clients a router has, or had when it died."""
    count: int = _COUNT.unpack_from(page)[0]
    return min(count, _CLIENTS_MAX)  # whoever broke into it may have written anything


def fork(listener: socket.socket, directory: Path, keep: tuple[int, ...] = ()) -> tuple[int, socket.socket, mmap.mmap]:
    """Fork a router on this listener; (its pid, the supervisor's end of its socket, its page for `clients_of`).

    `keep`: further descriptors that the child may hold; every other one is closed.
    """
    ours, theirs = control.pair()
    page = mmap.mmap(-1, mmap.PAGESIZE)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            cell.die_with_parent(parent)
            ours.close()
            _main(listener, theirs, directory, keep, page)
            status = 0
        except BaseException as error:  # noqa: BLE001 - this process was forked, nobody above could handle it
            sys.stderr.write(f"router: {type(error).__name__}: {error}\n")
            sys.stderr.flush()
        finally:
            os._exit(status)
    theirs.close()
    return pid, ours, page


def _main(
    listener: socket.socket, sock: socket.socket, directory: Path, keep: tuple[int, ...], page: mmap.mmap
) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the supervisor decides
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.freeze()
    cell.close_all_but({0, 1, 2, listener.fileno(), sock.fileno(), *keep})
    loop = asyncio.SelectorEventLoop()
    asyncio.set_event_loop(loop)
    layers = cell.enter(cell.router_plan(str(directory)))
    where = "" if layers["mount"] else str(directory)
    loop.run_until_complete(_Router(listener, sock, where, Clients(page)).run())


class _Router:
    def __init__(self, listener: socket.socket, sock: socket.socket, directory: str, clients: Clients) -> None:
        self._listener = listener
        self._sock = sock
        self._routes = Routes()
        self._pool = Pool(directory)
        self._clients = clients
        self._accepting = False
        self._ended = asyncio.Event()
        self._writer = ipc.Writer(sock, lambda _: self._ended.set())

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        self._sock.setblocking(False)
        loop.add_reader(self._sock, self._obey)
        self._clients.left = self._accept_again
        self._accept_again()
        sweep = asyncio.ensure_future(self._sweep())
        await self._ended.wait()
        sweep.cancel()

    def _accept_again(self) -> None:
        """There is room: whoever waits may come."""
        if not self._accepting and self._listener.fileno() >= 0 and len(self._clients) < _CLIENTS_MAX:
            self._accepting = True
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        if len(self._clients) >= _CLIENTS_MAX:  # the others wait at the listener until one has gone
            self._accepting = False
            asyncio.get_running_loop().remove_reader(self._listener)
            return
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop = asyncio.get_running_loop()
        # A transport without the handshake of connect_accepted_socket: one callback instead of a task a connection.
        loop._make_socket_transport(sock, Client(self._routes, self._pool, self._clients))  # type: ignore[attr-defined]  # noqa: SLF001

    def _obey(self) -> None:
        try:
            data, _ = control.receive_packet(self._sock)
        except BlockingIOError:
            return
        except control.GoneError:
            self._ended.set()
            return
        message = _decoder.decode(data)
        if isinstance(message, Drain):
            self._drain()
            return
        self._heed(message)
        self._writer.send(msgspec.json.encode(Ack(message.id)))

    def _heed(self, message: Set | Unset) -> None:
        self._pool.known.clear()
        match message:
            case Set(instance=instance, up=up, spread=spread):
                self._routes.up[instance] = up
                (self._pool.spread.add if spread else self._pool.spread.discard)(instance)
                if spread or not up:
                    self._pool.forget(instance)
            case Unset(instance=instance):
                self._routes.up.pop(instance, None)
                self._pool.spread.discard(instance)
                self._pool.forget(instance)

    def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        self._listener.close()
        for client in list(self._clients):
            client.end_when_idle()
        loop.call_later(_DRAIN_S, self._ended.set)
        self._when_empty()

    def _when_empty(self) -> None:
        if self._clients:
            asyncio.get_running_loop().call_later(0.02, self._when_empty)
        else:
            self._ended.set()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._pool.sweep()
            now = time.monotonic()
            for client in list(self._clients):
                if now - client.last_s > (IDLE_S if client.idle else STALL_S):
                    client.close()
