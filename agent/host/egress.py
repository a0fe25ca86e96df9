"""Egress: the only process on a device that opens connections for components; a fork of the supervisor, with network.

The egress exists while at least one worker may send requests or open sockets. For each such worker it has an end of a
socket pair, which the supervisor gave it together with the grants of the worker's instance: a request is attributed to
a worker by its socket, never by its content. A request names scheme, host and port; the reply is a connected socket or
an error. The egress resolves names and then checks each address; it connects to the first checked one that answers,
without resolving again. TLS is the worker's task: this process sees no HTTP at all.

A component's own sockets (`tcp`, `udp`) are asked for by address. Names are looked up here too, and the addresses of
one that a grant names are remembered for the instance, so that a connection to them is allowed. Whoever holds a UDP
socket can send anywhere, so it stays here: its datagrams go through one end of a pair (`agent.host.datagrams`).

Workers have no network, so even an escaped guest can only reach what its grants allow, over connected sockets.
"""

import asyncio
import contextlib
import ipaddress
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec

from agent import happy_eyeballs
from agent.host.datagrams import Relays
from agent.host.ipc import framing
from agent.host.ipc.helper_api import (
    CONNECT_MAX_S,
    DENIED,
    RESTARTED,
    ConnectReply,
    ConnectRequest,
    LookupRequest,
    RefusedError,
    RegisterWorker,
    ToEgress,
    check_grant,
    check_lookup,
    check_socket,
    filter_addresses,
    reachable,
)
from agent.host.sandbox import sandbox
from fleet.protocol import outbound, wire
from fleet.protocol.manifest import Grants

_RESOLVE_S: Final = 10.0
_AT_ONCE: Final = 16
_NAMES_AT_ONCE: Final = 2
"""Names of one instance that are being resolved; the process has `sandbox.RESOLVER_THREADS` for all."""

_PACKET: Final = 4096
_PORT_DIGITS: Final = 5
_NAMES_KEPT: Final = 64
"""Names of one instance whose addresses are remembered."""

_STACK_BYTES: Final = 512 * 1024
"""Stack of a thread that resolves a name: those of all count as data, which the sandbox limits."""

Resolve = Callable[[str, int], Awaitable[list[str]]]

_admits: Final[msgspec.json.Decoder[RegisterWorker]] = msgspec.json.Decoder(RegisterWorker)
_asks: Final[msgspec.json.Decoder[ToEgress]] = msgspec.json.Decoder(ToEgress)


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name from this device's resolver. Raises `OSError`."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


class Names:
    """Resolver of one instance: a few names at once, each in a thread of its own for as long as that takes.

    A lookup whose caller has given up keeps its place until its thread returns: threads cannot be ended, and those of
    one instance must leave some for the others.
    """

    def __init__(self, resolver: Resolve, instance: str = "") -> None:
        self.instance = instance
        self._resolver = resolver
        self._room = asyncio.Semaphore(_NAMES_AT_ONCE)
        self._known: dict[str, dict[str, None]] = {}  # addresses of names that a socket may lead to, the latest last

    async def __call__(self, host: str, port: int) -> list[str]:
        """See `resolve`."""
        await self._room.acquire()
        lookup = asyncio.ensure_future(self._resolver(host, port))
        lookup.add_done_callback(self._done)
        return await asyncio.shield(lookup)

    def knows(self, name: str, address: str) -> bool:
        """Tell whether an address is one that a name was said to have."""
        return address in self._known.get(name, ())

    def remember(self, name: str, addresses: list[str]) -> None:
        """Take note of a name's addresses: a server behind it may give other ones each time."""
        known = self._known.pop(name, {})
        for each in addresses:
            known.pop(each, None)
            known[each] = None
        self._known[name] = dict.fromkeys([*known][-_NAMES_KEPT:])
        while len(self._known) > _NAMES_KEPT:
            del self._known[next(iter(self._known))]

    def _done(self, lookup: "asyncio.Future[list[str]]") -> None:
        self._room.release()
        if not lookup.cancelled():
            lookup.exception()  # is the caller's, who may have given up


async def connect(grants: Grants, ask: ConnectRequest, *, directory: str, resolver: Resolve = resolve) -> socket.socket:
    """Connect to the destination of a request and return the socket.

    Args:
        grants: of the requesting instance.
        ask: the request.
        directory: holds the sockets of the device's instances.
        resolver: resolves a name to addresses.

    Raises:
        RefusedError: not granted, or the destination does not answer.
    """
    host, port = check_grant(grants, ask.scheme, ask.authority)
    timeout_s = _timeout_s(ask)
    if host.endswith(outbound.INTERNAL):
        return await _neighbour(host.removesuffix(outbound.INTERNAL), directory, timeout_s)
    loop = asyncio.get_running_loop()
    until_s = loop.time() + timeout_s
    found = await _addresses(host, port, resolver, min(timeout_s, _RESOLVE_S))
    addresses = filter_addresses(grants, ask.scheme, host, port, found)
    return await _first(host, [_meant(each) for each in addresses], port, max(until_s - loop.time(), 0.001))


def _timeout_s(ask: ToEgress) -> float:
    return min(CONNECT_MAX_S, max(ask.timeout_ms, 1) / 1000)


async def look_up(grants: Grants, ask: LookupRequest, names: Names) -> tuple[str, ...]:
    """Return those addresses of a name to which a socket may lead.

    Raises:
        RefusedError: not granted, or not resolved.
    """
    name = check_lookup(grants, ask.name)
    found = await _addresses(name, 0, names, min(_timeout_s(ask), _RESOLVE_S))
    addresses = reachable(grants, name, [_meant(each) for each in found])
    names.remember(name, addresses)
    return tuple(addresses)


async def open_socket(grants: Grants, ask: ConnectRequest, names: Names) -> socket.socket:
    """Connect a socket of the guest's own, TCP or UDP, and return it.

    Raises:
        RefusedError: not granted, or the destination does not answer.
    """
    address, _, port = ask.authority.rpartition(":")
    address = address.strip("[]")
    if not port.isdecimal() or len(port) > _PORT_DIGITS or not 0 < int(port) < 1 << 16:
        raise RefusedError("HTTP-request-URI-invalid", f"{port[:20]!r} is no port")
    if check_socket(grants, ask.scheme, address, int(port), ask.name) and not names.knows(ask.name.lower(), address):
        again = LookupRequest(id=ask.id, name=ask.name, timeout_ms=ask.timeout_ms)
        if address not in await look_up(grants, again, names):
            raise RefusedError(DENIED, f"{address} is denied: it is no address of {ask.name}")
    if ask.scheme == "tcp":
        return await _first(address, [address], int(port), _timeout_s(ask))
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        sock.connect((address, int(port)))
    except OSError as error:
        sock.close()
        raise RefusedError("destination-unavailable", f"no way to {address}: {error.strerror}") from error
    return sock


async def _addresses(host: str, port: int, resolver: Resolve, timeout_s: float) -> list[str]:
    with contextlib.suppress(ValueError):
        return [str(ipaddress.ip_address(host))]
    try:
        async with asyncio.timeout(timeout_s):
            return await resolver(host, port)
    except TimeoutError as error:
        raise RefusedError("DNS-timeout", f"{host} could not be resolved within {timeout_s:g} s") from error
    except (OSError, UnicodeError) as error:
        raise RefusedError("DNS-error", f"{host} cannot be resolved: {error}") from error


def _meant(address: str) -> str:
    """Return the IPv4 address that is written as an IPv6 one, else the address itself."""
    return str(outbound.unwrapped(ipaddress.ip_address(address))) if address.startswith("::ffff:") else address


async def _first(host: str, addresses: list[str], port: int, timeout_s: float) -> socket.socket:
    """Connect to the first address that answers (RFC 8305)."""
    try:
        return await happy_eyeballs.first_connected(addresses, port, timeout_s=timeout_s)
    except happy_eyeballs.NoAnswerError as error:
        kinds = [type(each) for _, each in error.failures]
        if ConnectionRefusedError in kinds:
            code = "connection-refused"
        else:
            code = "connection-timeout" if TimeoutError in kinds else "destination-unavailable"
        raise RefusedError(code, f"cannot connect to {host}:{port}: {error}") from error


async def _neighbour(name: str, directory: str, timeout_s: float) -> socket.socket:
    try:
        async with asyncio.timeout(timeout_s):
            return await _connected(f"{directory}/{name}")
    except TimeoutError as error:
        raise RefusedError("connection-timeout", f"instance {name} did not answer in {timeout_s:g} s") from error
    except OSError as error:
        raise RefusedError("destination-unavailable", f"no instance {name} answers on this device") from error


async def _connected(path: str) -> socket.socket:
    """Connect a new socket to an instance. Raises `OSError`, also where there is no descriptor left."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, path)
    except BaseException:
        sock.close()
        raise
    return sock


def run_egress(sock: socket.socket, directory: Path, keep: tuple[int, ...]) -> None:
    """Run the egress in a process just forked from the supervisor, sandboxed before it reads a request."""
    sandbox.begin_helper({sock.fileno(), *keep})
    with contextlib.suppress(OSError):
        socket.getaddrinfo("localhost", 80)  # makes the resolver load its libraries before the sandbox closes
    loop = asyncio.SelectorEventLoop()
    threading.stack_size(_STACK_BYTES)
    loop.set_default_executor(ThreadPoolExecutor(sandbox.RESOLVER_THREADS))
    loop.set_exception_handler(lambda _loop, context: report(str(context["message"]), context.get("exception")))
    asyncio.set_event_loop(loop)
    layers = sandbox.apply(sandbox.egress_spec(str(directory)))
    loop.run_until_complete(Egress(sock, sandbox.NEIGHBOURS if layers["mount"] else ".").run())


def report(what: str, error: BaseException | None) -> None:
    """Write a line to standard error, which is the host's log."""
    where, trace = "", None if error is None else error.__traceback__
    while trace is not None:  # the traceback module would read source files, which are out of reach here
        where, trace = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})", trace.tb_next
    with contextlib.suppress(OSError):
        sys.stderr.write(f"egress: {what}: {type(error).__name__}: {error}{where}\n")
        sys.stderr.flush()


class Egress:
    """Egress process: the supervisor's socket, and a socket for each worker."""

    def __init__(self, sock: socket.socket, directory: str, resolver: Resolve = resolve) -> None:
        self._sock = sock
        self._directory = directory
        self._resolve = resolver
        self._names: dict[str, Names] = {}
        self._ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._relays = Relays()

    async def run(self) -> None:
        """Serve until the supervisor closes its socket."""
        self._sock.setblocking(False)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._sock, self._obey)
        await self._ended.wait()
        loop.remove_reader(self._sock)
        for task in self._tasks:
            task.cancel()

    def _obey(self) -> None:
        try:
            data, fds = framing.receive_packet(self._sock)
        except BlockingIOError:
            return
        except framing.DescriptorsLostError as error:
            report(f"cannot connect anything for {_admits.decode(error.data).instance}", error)
            return
        except framing.GoneError:
            self._ended.set()
            return
        admitted = _admits.decode(data)
        worker = socket.socket(fileno=fds[0])
        worker.setblocking(False)
        if admitted.again:
            with contextlib.suppress(OSError):  # the worker has ended, or has as many replies unread as fit
                framing.send_packet(worker, msgspec.json.encode(ConnectReply(id=RESTARTED)))
        grants = Grants(outbound=admitted.outbound, instances=admitted.instances)
        names = self._names.setdefault(admitted.instance, Names(self._resolve, admitted.instance))
        asyncio.get_running_loop().add_reader(worker, self._asked, worker, grants, asyncio.Semaphore(_AT_ONCE), names)

    def _asked(self, worker: socket.socket, grants: Grants, room: asyncio.Semaphore, names: Names) -> None:
        try:
            data = worker.recv(_PACKET)
            ask = _asks.decode(data)
        except BlockingIOError:
            return
        except (OSError, *wire.JSON_ERRORS):  # the worker has ended, or is compromised: do not read from it again
            asyncio.get_running_loop().remove_reader(worker)
            worker.close()
            return
        task = asyncio.ensure_future(self._answer(worker, grants, ask, room, names))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(
        self, worker: socket.socket, grants: Grants, ask: ToEgress, room: asyncio.Semaphore, names: Names
    ) -> None:
        reply, found = ConnectReply(id=ask.id), None
        if room.locked():
            reply = ConnectReply(
                id=ask.id, error="connection-limit-reached", why=f"{_AT_ONCE} connections are being made"
            )
        else:
            async with room:
                try:
                    reply, found = await self._reply(grants, ask, names)
                except RefusedError as error:
                    reply = ConnectReply(id=ask.id, error=error.error, why=str(error))
                except Exception as error:  # noqa: BLE001 - whatever it is, the guest must not wait for a reply in vain
                    report(f"cannot connect to {_destination(ask)}", error)
                    why = f"the egress failed: {type(error).__name__}: {error}"
                    reply = ConnectReply(id=ask.id, error="internal-error", why=why)
        with contextlib.suppress(OSError):  # the worker has ended, or does not read
            framing.send_packet(worker, msgspec.json.encode(reply), () if found is None else (found.fileno(),))
        if found is not None:
            found.close()

    async def _reply(self, grants: Grants, ask: ToEgress, names: Names) -> tuple[ConnectReply, socket.socket | None]:
        if isinstance(ask, LookupRequest):
            return ConnectReply(id=ask.id, addresses=await look_up(grants, ask, names)), None
        if ask.scheme not in outbound.SOCKETS:
            return ConnectReply(id=ask.id), await connect(grants, ask, directory=self._directory, resolver=names)
        found = await open_socket(grants, ask, names)
        if ask.scheme == "tcp":
            return ConnectReply(id=ask.id), found
        host, port = found.getsockname()[:2]
        return ConnectReply(id=ask.id, local=(host, port)), self._relays.start(found, names.instance)


def _destination(ask: ToEgress) -> str:
    return ask.name if isinstance(ask, LookupRequest) else ask.authority
