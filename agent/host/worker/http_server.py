"""HTTP server of a worker: sockets of clients in an epoll set, requests handed to the guest one by one, inline.

A worker accepts one connection at a time and none while a call is in flight (there is only this thread), so workers
that share a listener share the work. Where an instance may have several workers, clients do not wait behind a long
call: they are put into a queue from which any idle worker takes them (`relieve`). At a swap every connection is passed
to the successor at a message boundary, with the bytes of its next message so far.

`Responder` turns a request into the bytes of its response: it calls the guest, and counts and logs the outcome. Of a
response that was streamed while the guest wrote it (`StreamingResponse`), only the end is left when the call returns;
an error can then be shown to the client only by ending the connection early.
"""

import contextlib
import math
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from agent.host.engine.runtime import GuestError
from agent.host.http import connection
from agent.host.http.connection import BadAnswerError, Http1Connection, Request
from agent.host.http.pace import Pace, acknowledged
from agent.host.ipc import framing, worker_api
from agent.host.worker.runner import GuestRunner
from agent.host.worker.streaming import StreamingResponse
from fleet.protocol.codes import CallOutcome
from fleet.protocol.manifest import Limits

IDLE_S: Final = 75  # a client may keep a quiet connection this long
STALL_S: Final = 30  # and may be silent this long within a message, or leave an answer unread
SWEEP_S: Final = 10
CLIENTS_MAX: Final = 512
_READ_BYTES: Final = 64 * 1024
_PASS_TIMEOUT_S: Final = 1.0
_LINGER_S: Final = 5  # time for which bytes after a refusal are read and discarded
_LINGER_MAX_BYTES: Final = 32 * 1024 * 1024


class Client:
    """A connection, its socket, and what it has not read yet."""

    def __init__(self, sock: socket.socket, *, body_max_bytes: int) -> None:
        self.sock = sock
        self.state = Http1Connection(body_max_bytes=body_max_bytes)
        self.out: bytes | memoryview = b""
        self.last_s = time.monotonic()
        self.trusted = sock.family == socket.AF_UNIX  # the router times its own clients
        self.awaits = select.EPOLLIN
        self.lingers_until_s = 0.0  # 0: not lingering
        self.discarded_bytes = 0
        self.received = self.sent = 0
        self.sending, self.reading = Pace(), Pace()

    def is_slow_to_send(self, now_s: float) -> bool:
        """Return whether the request comes below the minimum rate."""
        turn = self.state.turn if self.state.lacks and not self.out else None
        return self.sending.is_slow(now_s, self.received, turn)

    def is_slow_to_read(self, now_s: float) -> bool:
        """Return whether the client takes the answer below the minimum rate."""
        if not self.out:
            return self.reading.is_slow(now_s, 0, None)
        return self.reading.is_slow(now_s, self.sent + acknowledged(self.sock), 0)


class HttpServer:
    """Clients of one worker, from accept to close or hand-over."""

    def __init__(
        self,
        poll: select.epoll,
        caller: GuestRunner,
        limits: Limits,
        done: Callable[[int, int], None],
        *,
        clients_max: int = CLIENTS_MAX,
    ) -> None:
        """`done(passed, cut)` is called when a hand-over has ended."""
        self._clients_max = clients_max
        self._poll = poll
        self._caller = caller
        self._answers = Responder(caller, limits)
        self._limits = limits
        self._done = done
        self._clients: dict[int, Client] = {}
        self._listener: socket.socket | None = None
        self._accepting = False
        self._sources: dict[int, socket.socket] = {}
        self._successor: socket.socket | None = None
        self._leaving = False
        self._held = False
        self._deadline_s = 0.0
        self._passed = self._cut = 0
        self._next_sweep_s = 0.0
        self._busy_s = 0.0  # time in calls, in which no client is attended to
        self._queue: tuple[socket.socket, socket.socket] | None = None  # to put clients in, and to take them out
        self._calling: Client | None = None
        self._lock = threading.Lock()  # of what `relieve` touches while a call is in flight
        caller.relieve = self.relieve
        caller.queued = self.note_queue
        self._queue_said_s = -math.inf

    # The supervisor's orders.

    def serve(self, listener: socket.socket, queue: tuple[socket.socket, socket.socket] | None = None) -> None:
        """Accept from `listener` from now on; `queue`: both ends of the queue of workers that share the work."""
        self._stop_accepting()
        for end in self._queue or ():
            end.close()
        self._queue = queue
        for end in queue or ():
            end.setblocking(False)
        self._leaving = False
        _close(self._successor)
        self._successor = None
        listener.setblocking(False)
        self._listener = listener
        self._accept_or_wait()

    def adopt(self, source: socket.socket) -> None:
        """Take over the connections that arrive on `source`."""
        source.setblocking(False)
        self._sources[source.fileno()] = source
        self._poll.register(source, select.EPOLLIN)

    def hand_over(self, successor: socket.socket | None, *, deadline_s: float) -> None:
        """Accept no more, and pass (or end) every connection at its next message boundary."""
        self._stop_accepting()
        self._release()
        self._leaving = True
        self._successor = successor
        if successor is not None:
            successor.settimeout(_PASS_TIMEOUT_S)
        self._deadline_s = time.monotonic() + deadline_s
        self._passed = self._cut = 0
        for source in [*self._sources.values(), *(self._queue or ())[1:]]:
            while source.fileno() >= 0 and self._receive(source):
                pass  # connections passed to this worker and not taken up yet go on too
        for client in list(self._clients.values()):
            if client.lingers_until_s:
                self._drop(client)
                continue
            self._settle(client)
            self._leave(client)
        self._finish_leaving()

    def close(self) -> None:
        """End it all, clients too."""
        self._stop_accepting()
        self._leaving = False
        _close(self._successor)
        for sock in [*self._sources.values(), *(self._queue or ()), *(each.sock for each in self._clients.values())]:
            sock.close()

    def hold(self) -> None:
        """Answer nobody until `hand_over` or `resume`: what comes meanwhile waits in the sockets."""
        self._held = True
        self._pause_accepting()
        for source in self._sources.values():
            self._poll.unregister(source)
        for client in list(self._clients.values()):
            self._settle(client)

    def resume(self) -> None:
        """Go on as before `hold`."""
        self._release()
        for client in self._clients.values():
            client.sending = Pace()  # nothing was read meanwhile
        if self._listener is not None:
            self._accept_or_wait()
        for client in list(self._clients.values()):
            self._work(client)

    def _release(self) -> None:
        if self._held:
            self._held = False
            for source in self._sources.values():
                self._poll.register(source, select.EPOLLIN)

    # The loop.

    def wait_s(self) -> float:
        """Return how long the loop may sleep, in seconds; -1: until something happens."""
        now = time.monotonic()
        waits = []
        if self._leaving:
            waits.append(self._deadline_s - now)
        if any(not client.trusted or client.out or client.lingers_until_s for client in self._clients.values()):
            waits.append(self._next_sweep_s - now)
        return max(0.0, min(waits)) if waits else -1.0

    def event(self, fd: int, mask: int) -> None:
        """Something happened on a descriptor of ours."""
        if self._held and not mask & select.EPOLLOUT:
            return  # of the same turn of the loop as the hold
        if self._listener is not None and fd == self._listener.fileno():
            self._accept()
        elif fd in self._sources:
            self._receive(self._sources[fd])
        elif self._queue is not None and fd == self._queue[1].fileno():
            self._receive(self._queue[1])
        elif (client := self._clients.get(fd)) is not None:
            if mask & select.EPOLLOUT:
                self._send(client)
            elif mask & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                self._read(client)

    def tick(self) -> None:
        """End what has waited too long."""
        now = time.monotonic()
        if self._leaving and now >= self._deadline_s:
            for source in list(self._sources.values()):
                self._forget(source)
            self._cut += len(self._clients)
            for client in list(self._clients.values()):
                self._drop(client)
            self._finish_leaving()
        if now < self._next_sweep_s:
            return
        self._next_sweep_s = now + SWEEP_S
        for client in list(self._clients.values()):
            self._mind(client, now)

    def _mind(self, client: Client, now: float) -> None:
        """End what a client has kept waiting for too long."""
        quiet_s, free_s = now - client.last_s, now - self._busy_s
        if client.lingers_until_s:
            if now > client.lingers_until_s:
                self._drop(client)
        elif client.out and (quiet_s > STALL_S or (not client.trusted and client.is_slow_to_read(free_s))):
            self._caller.count(CallOutcome.CLIENT_SLOW, None)
            self._drop(client)
        elif not client.trusted and not self._held and client.is_slow_to_send(free_s):
            client.state.give_up()
            self._work(client)
        elif not client.trusted and quiet_s > (IDLE_S if client.state.idle else STALL_S):
            self._drop(client)

    # Connections.

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:  # out of descriptors: wait until a client leaves
            self._pause_accepting()
            return
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._add(sock)

    def _add(self, sock: socket.socket) -> Client:
        sock.setblocking(False)
        client = Client(sock, body_max_bytes=self._limits.request_bytes)
        self._clients[sock.fileno()] = client
        self._poll.register(sock, select.EPOLLIN)
        if len(self._clients) >= self._clients_max:
            self._pause_accepting()
        if not self._next_sweep_s:
            self._next_sweep_s = client.last_s + SWEEP_S
        return client

    def _receive(self, source: socket.socket) -> bool:
        """Take up a connection that was passed to this worker; False if there is none."""
        try:
            data, fds = framing.receive_packet(source)
        except BlockingIOError:
            return False
        except framing.GoneError:
            if source.fileno() in self._sources:
                self._forget(source)
            return False
        for fd in fds:
            client = self._add(socket.socket(fileno=fd))
            prefix = data[len(connection.PASSED) :]
            if prefix:
                self._take(client, prefix)
            elif self._leaving:
                self._leave(client)
        return True

    def _forget(self, source: socket.socket) -> None:
        del self._sources[source.fileno()]
        self._poll.unregister(source)
        source.close()
        self._finish_leaving()

    def _read(self, client: Client) -> None:
        try:
            data = client.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
        elif client.lingers_until_s:
            client.discarded_bytes += len(data)
            if client.discarded_bytes > _LINGER_MAX_BYTES:
                self._drop(client)
        else:
            self._take(client, data)

    def _take(self, client: Client, data: bytes) -> None:
        client.received += len(data)
        if at_once := client.state.feed(data):
            client.out = bytes(client.out) + at_once
        if not client.state.idle:  # empty lines between requests do not keep a connection
            client.last_s = time.monotonic()
        self._work(client)

    def _work(self, client: Client) -> None:
        """Answer what is whole, send what is answered, and leave if it is time."""
        while client.state.requests and not client.out and not self._held:
            request = client.state.requests.popleft()
            if self._leaving and self._successor is None:
                request.keep_alive = False
            with self._lock:
                self._calling = client
            began_s = time.monotonic()
            client.out = self._answers.answer(client.sock, request)
            client.last_s = time.monotonic()
            self._busy_s += client.last_s - began_s
            with self._lock:
                self._calling = None
            self._accept_again()
            if not request.keep_alive:
                client.state.closing = True
                client.state.requests.clear()
            if client.out:  # else its client has gone while the guest was writing
                self._flush(client)
        if not client.out:
            client.out = client.state.go_on()
        if client.out:
            self._flush(client)
        self._settle(client)

    def _flush(self, client: Client) -> None:
        try:
            sent = client.sock.send(client.out, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError:
            self._caller.count(CallOutcome.CLIENT_GONE, None)
            self._drop(client)
            return
        client.sent += sent
        client.out = memoryview(client.out)[sent:] if sent < len(client.out) else b""  # a view: nothing is copied

    def _send(self, client: Client) -> None:
        client.last_s = time.monotonic()
        self._flush(client)
        if client.sock.fileno() >= 0 and not client.out:
            self._work(client)

    def _settle(self, client: Client) -> None:
        """Wait for what comes next on this connection: room to write, more to read, or nothing at all."""
        if client.sock.fileno() < 0:
            return
        if client.state.closing and not client.out and not client.lingers_until_s:
            if not client.state.unread or self._leaving:
                self._drop(client)
                return
            self._linger(client)
        self._await(client, select.EPOLLOUT if client.out else 0 if self._held else select.EPOLLIN)
        if self._leaving and not client.out:
            self._leave(client)
            self._finish_leaving()

    def _await(self, client: Client, mask: int) -> None:
        if not mask and client.awaits:
            self._poll.unregister(client.sock)
        elif mask and not client.awaits:
            self._poll.register(client.sock, mask)
        elif mask != client.awaits:
            self._poll.modify(client.sock, mask)
        client.awaits = mask

    def _linger(self, client: Client) -> None:
        """Close in two steps: a client that still sends would lose the response to a reset (RFC 9112, section 9.6)."""
        client.lingers_until_s = time.monotonic() + _LINGER_S
        with contextlib.suppress(OSError):
            client.sock.shutdown(socket.SHUT_WR)

    def _drop(self, client: Client) -> None:
        fd = client.sock.fileno()
        if fd < 0:
            return
        self._await(client, 0)
        del self._clients[fd]
        client.sock.close()
        self._accept_again()
        if self._leaving:
            self._finish_leaving()

    # Handing over.

    def _leave(self, client: Client) -> None:
        prefix = client.state.prefix
        if client.sock.fileno() < 0 or client.out or prefix is None:
            return
        if self._successor is None:
            if client.state.idle:
                self._drop(client)
            return
        # Where the successor is busy or gone, it is served here until the deadline.
        self._passed += self._pass(client, prefix, self._successor)

    def _pass(self, client: Client, prefix: bytes, to: socket.socket) -> bool:
        """Give a connection away, with what has come of its next message."""
        fd = client.sock.fileno()
        try:
            framing.send_packet(to, connection.PASSED + prefix, (fd,))
        except OSError:
            return False
        self._await(client, 0)
        del self._clients[fd]
        client.sock.close()
        return True

    def relieve(self) -> None:
        """Pass the other clients to any idle worker while a call is in flight. Called on the watchdog's thread."""
        with self._lock:
            if self._calling is None or self._queue is None or self._leaving:
                return
            for client in [each for each in self._clients.values() if each is not self._calling]:
                prefix = client.state.prefix
                if prefix is not None and not client.out and not client.lingers_until_s:
                    self._pass(client, prefix, self._queue[0])

    def note_queue(self) -> None:
        """Log, once in a while, that requests wait for the call in flight. Called on the watchdog's thread."""
        with self._lock:
            now_s = time.monotonic()
            if self._calling is None or now_s - self._queue_said_s < worker_api.QUEUE_SAID_EVERY_S:
                return
            own = self._calling.sock.fileno()
            accepting = self._listener.fileno() if self._accepting and self._listener is not None else -1
            ready = [fd for fd, _ in self._poll.poll(0) if fd != own]
            waits = any(fd == accepting or (fd in self._clients and _asks(self._clients[fd])) for fd in ready)
        if waits:
            self._queue_said_s = now_s
            self._caller.say(worker_api.Line(text=worker_api.QUEUED.format(self._limits.concurrency)))

    def _finish_leaving(self) -> None:
        if self._leaving and not self._clients and not self._sources:
            self._leaving = False
            _close(self._successor)
            self._successor = None
            self._done(self._passed, self._cut)

    # The listener.

    def _accept_or_wait(self) -> None:
        assert self._listener is not None
        if not self._accepting:
            for sock in (self._listener, *(self._queue or ())[1:]):
                self._poll.register(sock, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            self._accepting = True

    def _accept_again(self) -> None:
        """Accept, if that was only put off for want of room."""
        room = len(self._clients) < self._clients_max
        if self._listener is not None and not self._accepting and not self._held and room:
            self._accept_or_wait()

    def _pause_accepting(self) -> None:
        if self._listener is not None and self._accepting:
            for sock in (self._listener, *(self._queue or ())[1:]):
                self._poll.unregister(sock)
            self._accepting = False

    def _stop_accepting(self) -> None:
        self._pause_accepting()
        _close(self._listener)
        self._listener = None


def _asks(client: Client) -> bool:
    """Tell whether a request of a client has come, rather than its end."""
    try:
        return bool(client.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False


def _close(sock: socket.socket | None) -> None:
    """Close it if there is one."""
    if sock is not None:
        sock.close()


_LEFT: Final = {"gone": CallOutcome.CLIENT_GONE, "slow": CallOutcome.CLIENT_SLOW}
_SERVER_ERROR: Final = 500


class Responder:
    """Asks one guest."""

    def __init__(self, caller: GuestRunner, limits: Limits) -> None:
        self._caller = caller
        self._limits = limits

    def answer(self, sock: socket.socket, request: Request) -> bytes:
        """Ask the guest; what is left to be sent of the answer. `request.keep_alive` may change."""
        head = request.method == b"HEAD"
        if request.refusal:
            self._caller.count(CallOutcome.HOST_ERROR, None)
            return connection.note(request.refusal, connection.REFUSALS[request.refusal], keep_alive=False)
        began_ns = time.monotonic_ns()
        way = StreamingResponse(sock, request, self._limits.response_bytes) if self._caller.streams else None
        try:
            status, headers, body = self._caller.handle(request, way)
        except GuestError as error:
            if way is not None and way.begun:
                return self._break_off(way, error, began_ns)
            self._caller.count(error.outcome, began_ns, error=True)
            status = 504 if error.outcome is CallOutcome.GUEST_TIMEOUT else 500
            why = str(error).splitlines()[0]
            return connection.note(status, why, head=head, keep_alive=request.keep_alive, old=request.old)
        try:
            trailers = b"" if way is None else _trailers(way)
            if way is not None and way.begun:
                return self._end(way, began_ns)
            fields = connection.guest_fields(status, headers, len(body), self._limits.response_bytes)
            declared = connection.declared_length(headers)
            connection.check_length(status, declared, len(body), head=head)
        except BadAnswerError as error:
            return self._refuse(way, request, error, began_ns)
        self._caller.count(CallOutcome.OK, began_ns, error=status >= _SERVER_ERROR)
        return _whole(request, status, fields, body, declared if head else None, trailers)

    def _refuse(self, way: StreamingResponse | None, request: Request, error: BadAnswerError, began_ns: int) -> bytes:
        if way is not None and way.begun:
            way.problem = way.problem or str(error)
            return self._end(way, began_ns)
        self._caller.count(CallOutcome.OK, began_ns, error=True)
        self._caller.log(f"host: its answer is refused: {error}")
        head = request.method == b"HEAD"
        return connection.note(502, error.sentence, head=head, keep_alive=request.keep_alive, old=request.old)

    def _end(self, way: StreamingResponse, began_ns: int) -> bytes:
        """Return the end of a response that was streamed."""
        left = way.finish()
        if way.ended:
            self._caller.count(_LEFT[way.ended], began_ns)
            return b""
        if way.problem:
            self._caller.log(f"host: its answer is cut off: {way.problem}")
        self._caller.count(CallOutcome.OK, began_ns, error=bool(way.problem))
        return left

    def _break_off(self, way: StreamingResponse, error: GuestError, began_ns: int) -> bytes:
        """Report a call whose guest failed, or was ended since its client is gone."""
        left = way.finish(str(error))
        if way.ended:
            self._caller.count(_LEFT[way.ended], began_ns)
            return b""
        self._caller.count(error.outcome, began_ns, error=True)
        return left


def _whole(request: Request, status: int, fields: bytes, body: bytes, declared: int | None, trailers: bytes) -> bytes:
    """Return the bytes of a whole response; `declared`: the guest's length of a body that HEAD leaves out."""
    keep_alive, old = request.keep_alive, request.old
    if declared is not None:
        return connection.answer_head(status, fields, length=declared, chunked=False, keep_alive=keep_alive, old=old)
    head = request.method == b"HEAD"
    return connection.answer(status, fields, body, head=head, keep_alive=keep_alive, trailers=trailers, old=old)


def _trailers(way: StreamingResponse) -> bytes:
    """Return the guest's trailers, if the client takes any; raise BadAnswerError if the response is not HTTP."""
    if way.problem and not way.begun and not way.failed:
        raise BadAnswerError(way.problem)
    if not way.request.takes_trailers:
        way.trailers = b""
    if way.trailers:
        way.trailers = connection.guest_fields(_SERVER_ERROR, way.trailers, 0, 0)
    return way.trailers
