"""Socket for the agent: who may connect, requests and replies, events for every connection.

The agent and `fleet-agent restore` connect to `<runtime>/host.sock`. Requests are handled at once, each in a task of
its own; the handler serialises the changes of an instance.
"""

import array
import asyncio
import contextlib
import os
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec

from agent.host.http.router import ACCEPT_PAUSE_S, NO_RESOURCES
from agent.host.ipc import host_api
from agent.host.ipc.packet_writer import PacketWriter
from fleet.protocol import bounds
from fleet.protocol.codes import RejectCode

SOCKET_NAME: Final = "host.sock"

_CONNECTIONS_MAX: Final = 8

_QUEUE_MAX: Final = 256  # unread packets after which a connection is closed
_SERVED_MAX: Final = 2 * bounds.ITEMS_MAX
"""Maximum number of requests of a connection that are handled at once: the starts of the largest atomic set, which wait
for each other, and as many others. Further requests wait in the socket."""

_UCRED: Final = struct.Struct("=iII")
_SO_PEERGROUPS: Final = 59
_GROUPS_MAX_BYTES: Final = 4096


EventQueue = asyncio.Queue[host_api.Event]
"""Events for the agent, which go to every connection."""


class RequestHandler(Protocol):
    """Receiver of the agent's requests."""

    async def handle(self, request: host_api.Request, fd: int | None) -> host_api.Reply:
        """Handle a request and return the reply. The handler owns the descriptor."""

    def agent_gone(self) -> None:
        """Handle the end of the last connection."""


class AgentConnection:
    """Connection of the agent; `on_closed` is called once, however it ends."""

    def __init__(self, sock: socket.socket, on_closed: Callable[["AgentConnection"], None]) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._on_closed = on_closed
        self._writer = PacketWriter(sock, lambda _: self.close())
        self._served = 0

    def read_by(self, readable: Callable[["AgentConnection"], None]) -> None:
        """Call `readable` whenever there is a request, as long as few enough are served."""
        self._readable = readable
        asyncio.get_running_loop().add_reader(self.sock, readable, self)

    def begin(self) -> None:
        """Count a request that is served from now on, and read no more where there are many."""
        self._served += 1
        if self._served == _SERVED_MAX:
            asyncio.get_running_loop().remove_reader(self.sock)

    def end(self) -> None:
        """Count a request that was served, and read on."""
        self._served -= 1
        if self._served == _SERVED_MAX - 1 and self.sock.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self.sock, self._readable, self)

    def send(self, message: host_api.FromHost) -> None:
        """Send a message, or keep it until there is room; a connection whose peer never reads is closed."""
        try:
            self._writer.send(host_api.encode(message))
        except host_api.IpcError:
            self.close()
        if len(self._writer) > _QUEUE_MAX:
            self.close()

    def close(self) -> None:
        """Close the connection."""
        if self.sock.fileno() >= 0:
            self._writer.close()
            asyncio.get_running_loop().remove_reader(self.sock)
            self.sock.close()
            self._on_closed(self)


class AgentServer:
    """Listening socket and connections; `events` are sent to every connection."""

    def __init__(
        self, listener: socket.socket, handler: RequestHandler, events: EventQueue, *, agent_group: int | None
    ) -> None:
        self._listener = listener
        self._handler = handler
        self._events = events
        self._agent_group = agent_group
        self._connections: set[AgentConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._broadcaster: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start accepting connections."""
        self._listen()
        self._broadcaster = asyncio.ensure_future(self._broadcast())

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def stop_accepting(self) -> None:
        """Close the listening socket; connections stay, to receive the last events and replies."""
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()

    def close(self) -> None:
        """Send the remaining events, and close the connections."""
        if self._broadcaster is not None:
            self._broadcaster.cancel()
        self._flush_events()
        for connection in list(self._connections):
            connection.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in NO_RESOURCES:  # the listener stays readable, so asking again at once would never end
                asyncio.get_running_loop().remove_reader(self._listener)
                asyncio.get_running_loop().call_later(ACCEPT_PAUSE_S, self._listen)
            return
        if not may_command(sock, self._agent_group) or len(self._connections) >= _CONNECTIONS_MAX:
            sock.close()
            return
        connection = AgentConnection(sock, self._closed)
        self._connections.add(connection)
        connection.read_by(self._readable)

    def _closed(self, connection: AgentConnection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._handler.agent_gone()

    def _readable(self, connection: AgentConnection) -> None:
        try:
            request, fd = host_api.receive_request(connection.sock)
        except BlockingIOError:
            return
        except host_api.UnreadableError as error:
            sys.stderr.write(f"host: a request of another version of the agent: {error}\n")
            if error.id is not None:
                message = f"this host does not know what the agent asks ({error}): restart fleet-host if it is older"
                connection.send(host_api.Failed(id=error.id, code=RejectCode.INTERNAL, message=message))
            return
        except host_api.FileLostError as error:
            connection.send(host_api.Failed(id=error.id, code=RejectCode.INTERNAL, message=str(error)))
            return
        except host_api.IpcError:
            connection.close()
            return
        connection.begin()
        if isinstance(request, host_api.Start) and request.run.packages:
            request = _with_owner(request, connection.sock)
        task = asyncio.ensure_future(self._serve(connection, request, fd))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: AgentConnection, request: host_api.Request, fd: int | None) -> None:
        try:
            reply = await self._handler.handle(request, fd)
        except Exception as error:  # noqa: BLE001 - a bug in the host: report it, and keep serving
            sys.stderr.write(f"host: {type(request).__name__}: {type(error).__name__}: {error}\n")
            reply = host_api.Failed(id=request.id, code=RejectCode.INTERNAL, message=f"the host failed: {error!r}")
        finally:
            connection.end()
        self._flush_events()  # events before the reply, as they happened
        connection.send(reply)

    async def _broadcast(self) -> None:
        while True:
            self._send_event(await self._events.get())

    def _flush_events(self) -> None:
        while not self._events.empty():
            self._send_event(self._events.get_nowait())

    def _send_event(self, event: host_api.Event) -> None:
        for connection in list(self._connections):
            connection.send(event)


def _with_owner(request: host_api.Start, sock: socket.socket) -> host_api.Start:
    """Return a request whose data packages have to belong to the peer: it has files mounted that are its own."""
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    packages = [msgspec.structs.replace(each, owner=uid or None) for each in request.run.packages]
    return msgspec.structs.replace(request, run=msgspec.structs.replace(request.run, packages=tuple(packages)))


def may_command(sock: socket.socket, agent_group: int | None) -> bool:
    """Return whether the peer is root, this user, or a member of the agent's group."""
    _, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid in {0, os.geteuid()}:
        return True
    if agent_group is None:
        return False
    if gid == agent_group:
        return True
    groups = array.array("i")
    with contextlib.suppress(OSError):
        groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_MAX_BYTES))
    return agent_group in groups


class ListenError(Exception):
    """The socket for the agent cannot be opened; the message says why."""


class InUseError(ListenError):
    """Another host listens on the socket."""


def open_listener(runtime: Path, agent_group: int | None) -> socket.socket:
    """Open the socket in a runtime directory, for this user and the agent's group.

    Raises:
        InUseError: another host runs there.
        ListenError: the socket cannot be opened for another reason.
    """
    path = runtime / SOCKET_NAME
    with host_api.new_socket() as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
        else:
            raise InUseError(f"another host already runs here: {path} is in use")
    listener = host_api.new_socket()
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        why = error.strerror or f"{error} (of {len(str(path))} characters); give a shorter --runtime"
        raise ListenError(f"cannot listen on {path}: {why}") from error
    finally:
        os.umask(mask)
    if agent_group is not None:
        try:
            os.chown(path, -1, agent_group)
            path.chmod(0o660)
        except OSError as error:
            raise ListenError(f"cannot give {path} to the agent's group: {error.strerror}") from error
    listener.listen(_CONNECTIONS_MAX)
    listener.setblocking(False)
    return listener
