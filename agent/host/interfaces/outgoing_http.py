"""wasi:http/outgoing-handler over the egress.

The worker's side of outgoing requests: HTTP/1.1 over connections that the egress hands in, TLS included.

The adapter inside the sandbox asks through the functions of its interface `host` (components/adapter/wit/adapter.wit).
None of them waits for the network: one thread, `Loop`, does everything that takes time, each request as a
generator that yields what it waits for. A guest that waits is told by a nudge of the channel (`agent.host.ipc.frames`)
that something it waits for is there. What the adapter passes on is a guest's, so everything in it is checked.

A request goes out once its body is finished, with its length, or else when the guest waits for something: then its body
is sent while the guest writes it, in chunks unless the guest has said how long it is. Until then the body is kept, up
to `limits.request`; from then on no more of it than `_WINDOW_BYTES`. As much of a response is read ahead.

Every request is judged anew, a redirect that the guest follows included: what is kept for reuse is a connection to a
place that was granted, under scheme, host and port. TLS always verifies the certificate and the name, against the
device's own bundle, which `trust` loads before the worker enters the sandbox.

The head of a response has one time limit as a whole and each piece of its body another: a socket's own time-out alone
would let a peer that drips bytes take for ever over a head. Time runs only while the guest has done its part.
"""

import contextlib
import math
import os
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from agent.host.engine import adapter_abi
from agent.host.http.response import ResponseError
from agent.host.interfaces.outgoing_request import (
    HOPS,
    IDEMPOTENT,
    LATE,
    WINDOW_BYTES,
    Connection,
    OutgoingRequest,
    RequestHead,
    Transfer,
    Upload,
    is_cut_off,
    read_fields,
)
from agent.host.ipc import framing, helper_api
from agent.host.ipc.helper_api import RefusedError
from fleet.component.wasi import OUTGOING_HANDLER
from fleet.protocol import bounds, outbound, wire
from fleet.protocol.manifest import Grants, Limits

AT_ONCE: Final = 16
"""Requests that an instance may have begun and not have dropped."""

HOPS_MAX: Final = 4
_KEPT: Final = 8
_KEPT_S: Final = 10.0
_MARGIN: Final = 0.8  # of the limit on waiting, so that the guest hears of it before the worker is ended for it
_REPLY_MARGIN: Final = 0.05  # of the same: the egress says what it waited for, which a time-out here could not
_NUMBER_MAX: Final = 2**27
_STACK_BYTES: Final = 512 * 1024
# Alerts of a server whose names in OpenSSL do not say that they are alerts.
_ALERTS: Final = frozenset(
    {
        "TLSV1_UNRECOGNIZED_NAME",
        "TLSV1_UNSUPPORTED_EXTENSION",
        "TLSV1_CERTIFICATE_UNOBTAINABLE",
        "TLSV1_BAD_CERTIFICATE_STATUS_RESPONSE",
        "TLSV1_BAD_CERTIFICATE_HASH_VALUE",
    }
)
_told: Final[msgspec.json.Decoder[helper_api.ConnectReply]] = msgspec.json.Decoder(helper_api.ConnectReply)


def trust() -> ssl.SSLContext:
    """Make a TLS context with the system's certificates, all read now, while files can be read.

    OpenSSL would open the files of a directory of certificates only when it looks for one, and find none in the
    worker's sandbox.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Some releases of Python 3.11 set it: a connection that was cut off would look like the end of a body.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    paths = ssl.get_default_verify_paths()
    if paths.capath is not None and (paths.cafile is None or paths.openssl_capath_env in os.environ):
        for file in sorted(Path(paths.capath).iterdir()):
            with contextlib.suppress(OSError, ValueError, ssl.SSLError):  # not a certificate
                context.load_verify_locations(cadata=file.read_text(encoding="ascii"))
    return context


class DroppedError(Exception):
    """The guest needs a request no more."""


class Wait(NamedTuple):
    """Reason to go on with a request: events on a descriptor, a time, or in any case the guest."""

    fd: int = -1
    events: int = 0
    until_s: float | None = None


Steps = Generator[Wait, None, None]


def _receive(sock: socket.socket) -> tuple[helper_api.ConnectReply, Sequence[int]]:
    """Receive a reply of the egress; a connection that this process has no descriptor for is an error of that one."""
    try:
        data, fds = framing.receive_packet(sock)
    except framing.DescriptorsLostError as error:
        why = f"{error} in the worker"
        return msgspec.structs.replace(_told.decode(error.data), error="internal-error", why=why), ()
    return _told.decode(data), fds


class Question:
    """A question to the egress."""

    def __init__(self, ask: helper_api.ToEgress, number: int) -> None:
        self.ask = ask
        self.number = number  # of the request that waits for it
        self.reply: helper_api.ConnectReply | None = None
        self.fd = -1
        self.failure = ""


class Loop:
    """The thread that runs requests, and the lock under which it and the guest's thread do everything.

    Started with the first request; without requests it waits for the next.
    """

    def __init__(self, ask_sock: socket.socket | None) -> None:
        self.lock = threading.Condition(threading.RLock())
        if ask_sock is not None:
            ask_sock.setblocking(False)
        self._ask_sock = ask_sock
        self._questions: dict[int, Question] = {}
        self._asked = 0
        self._tasks: dict[int, Steps] = {}
        self._waits: dict[int, Wait] = {}
        self._due: set[int] = set()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._started = self._closed = False

    def run(self, number: int, steps: Steps) -> None:
        """Begin a request. Called under the lock, as all others."""
        self._tasks[number] = steps
        self.poke(number)
        if not self._started:
            self._started = True
            threading.stack_size(_STACK_BYTES)
            threading.Thread(target=self._serve, name="outgoing", daemon=True).start()

    def poke(self, number: int) -> None:
        """Let a request look again at what it waits for."""
        if number in self._tasks:
            self._due.add(number)
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the thread."""
        with self.lock:
            self._closed = True
            os.eventfd_write(self._wake, 1)

    def ask(self, number: int, scheme: str, authority: str, timeout_s: float, *, name: str = "") -> Question:
        """Ask the egress for a connection. Raises `OSError`. `name` as in `ConnectRequest`."""
        self._asked += 1
        timeout_ms = max(1, int(timeout_s * 1000))
        return self._question(
            helper_api.ConnectRequest(self._asked, scheme, authority, timeout_ms=timeout_ms, name=name), number
        )

    def look_up(self, number: int, name: str, timeout_s: float) -> Question:
        """Ask the egress for the addresses of a name. Raises `OSError`."""
        self._asked += 1
        timeout_ms = max(1, int(timeout_s * 1000))
        return self._question(helper_api.LookupRequest(self._asked, name, timeout_ms), number)

    def _question(self, ask: helper_api.ToEgress, number: int) -> Question:
        question = Question(ask, number)
        self._send(ask)
        self._questions[ask.id] = question
        return question

    def forget(self, question: Question) -> None:
        """Wait no more for a reply; one that comes is thrown away."""
        self._questions.pop(question.ask.id, None)

    def _send(self, ask: helper_api.ToEgress) -> None:
        assert self._ask_sock is not None
        self._ask_sock.send(msgspec.json.encode(ask), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _serve(self) -> None:
        while True:
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            with self.lock:
                if self._closed:
                    os.close(self._wake)
                    return
                while self._due:
                    self._step(self._due.pop())
                if self._questions and self._ask_sock is not None:
                    poll.register(self._ask_sock, select.POLLIN)
                for wait in self._waits.values():
                    if wait.fd >= 0:
                        poll.register(wait.fd, wait.events)
                times_s = [wait.until_s for wait in self._waits.values() if wait.until_s is not None]
            wait_ms = max(0, int((min(times_s) - time.monotonic()) * 1000) + 1) if times_s else None
            ready = {fd for fd, _ in poll.poll(wait_ms)}
            with self.lock:
                self._note(ready)

    def _note(self, ready: set[int]) -> None:
        """Take note of which requests may go on."""
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        if self._ask_sock is not None and self._ask_sock.fileno() in ready:
            self._hear(self._ask_sock)
        now_s = time.monotonic()
        for number, wait in self._waits.items():
            if wait.fd in ready or (wait.until_s is not None and wait.until_s <= now_s):
                self._due.add(number)

    def _step(self, number: int) -> None:
        steps = self._tasks.get(number)
        if steps is None:
            return
        try:
            self._waits[number] = next(steps)
        except StopIteration:
            del self._tasks[number]
            self._waits.pop(number, None)

    def _hear(self, sock: socket.socket) -> None:
        """Read the replies of the egress."""
        try:
            while self._questions:
                self._take(*_receive(sock))
        except BlockingIOError:
            pass
        except (OSError, framing.GoneError, *wire.JSON_ERRORS) as error:
            for question in self._questions.values():
                question.failure = f"no egress: {error}"
                self._due.add(question.number)

    def _take(self, told: helper_api.ConnectReply, fds: Sequence[int]) -> None:
        question = self._questions.get(told.id)
        if question is not None and question.reply is None and (told.error or fds or told.addresses):
            question.reply = told
            if fds and not told.error:
                question.fd, *fds = fds
            self._due.add(question.number)
        framing.close_all(fds)
        if told.id == helper_api.RESTARTED:
            for each in self._questions.values():
                self._send(each.ask)


NO_WAIT, NUDGED, WAITS, WAITS_A_MOMENT = range(4)
"""Ways of a guest to wait, see `OutgoingHttp.poll`."""

_MOMENT_S: Final = 0.01

HEAD, READ, WRITE, REST = range(4)
"""Parts that a guest may wait for: its response's head, its response's body, room for its request's body, and the end
of its response's body, which it does not read.
"""


class OutgoingHttp:
    """The requests of one instance's calls.

    Everything public belongs to the guest's thread.
    """

    def __init__(
        self,
        sock: socket.socket | None,
        grants: Grants,
        limits: Limits,
        *,
        log: Callable[[str], None],
        count: Callable[[bool], None] = lambda _denied: None,
        context: ssl.SSLContext | None = None,
        nudge: Callable[[], None] = lambda: None,
    ) -> None:
        """`sock`: on which the egress is asked; None where nothing is granted. `count(denied)`: called for each.

        `nudge`: wakes a guest that waits for its channel, see `poll`.
        """
        self._granted = sock is not None and grants.allows(OUTGOING_HANDLER)
        self._grants = grants
        self._limits = limits
        self._log = log
        self._count = count
        self._context = context
        self._nudge = nudge
        self._requests: dict[int, OutgoingRequest] = {}
        self._kept: list[tuple[tuple[str, str, int], float, Connection]] = []
        self._number = 0
        self._armed: tuple[int, ...] = ()  # parts that the guest waits for, if it awaits a nudge
        self._notes: deque[Callable[[], None]] = deque()  # log lines and counts of the thread
        self._loop = Loop(sock)
        self._lock = self._loop.lock
        self._prepare()

    def _prepare(self) -> None:
        """Make what a subclass has beside."""

    # -- calls of the adapter

    def begin(self, hops: int) -> int:
        """Begin a request and return its number; 0, which is no request's, if there are too many.

        `hops` as in `agent.host.engine.adapter_abi.Requests.begin`.
        """
        with self._lock:
            if len(self._requests) >= AT_ONCE:
                self._log(
                    f"host: a request is refused: {AT_ONCE} are under way, as many as an instance may have at once"
                )
                return 0
            self._number = self._number % _NUMBER_MAX + 1
            self._requests[self._number] = OutgoingRequest(self._number, hops=hops)
            return self._number

    def room(self, number: int) -> int:
        """Bytes of its body that it takes now."""
        with self._lock:
            request = self._requests.get(number)
            return WINDOW_BYTES if request is None else request.room(self._limits.request_bytes)

    def write(self, number: int, data: str) -> int:
        """Take a piece of its body; return 0, or one more than an error's number."""
        with self._lock:
            request = self._requests.get(number)
            if request is None:
                return _result("connection-limit-reached")
            if request.over:
                return _result(request.error) if request.error else 0
            try:
                piece = data.encode("latin-1")
            except UnicodeEncodeError:
                return self._refuse_body(request, RefusedError("internal-error", "its body is no bytes"))
            request.body_bytes += len(piece)
            if not request.goes and request.body_bytes > self._limits.request_bytes:
                return self._refuse_body(request, self._too_large())
            declared = request.head.declared_length() if request.head is not None else None
            if request.goes and declared is not None and request.body_bytes > declared:
                why = f"its body has {request.body_bytes} bytes or more, its content-length says {declared}"
                return self._refuse_body(request, RefusedError("HTTP-request-body-size", why))
            request.body += piece
            if request.goes:
                self._loop.poke(number)
            return 0

    def _too_large(self) -> RefusedError:
        most = self._limits.request_bytes
        why = (
            f"its body is larger than {most} bytes (limits.request), which are kept until the guest waits for something"
        )
        return RefusedError("HTTP-request-body-size", why)

    def _refuse_body(self, request: OutgoingRequest, error: RefusedError) -> int:
        self._fail(request, error.error, str(error))
        self._flush_notes()
        return _result(error.error)

    def send(self, number: int, head: str) -> int:
        """Send it with the body that it has; 0, or one more than an error's number."""
        return self._start(number, head, ends=True)

    def start(self, number: int, head: str) -> int:
        """Hand it over; its body goes on, up to `finish`. 0, or one more than an error's number."""
        return self._start(number, head, ends=False)

    def _start(self, number: int, head: str, *, ends: bool) -> int:
        with self._lock:
            request = self._requests.get(number)
            if request is None:
                return _result("connection-limit-reached")
            if request.error:
                self._count(False)
                self._drop(number)
                return _result(request.error)
            try:
                self._check(request, head)
                assert request.head is not None
                if ends:
                    request.head.check_length(request.body_bytes)
            except RefusedError as error:
                self._count(error.error in {helper_api.DENIED, helper_api.PROHIBITED})
                self._log(f"host: {request.what or 'a request'}: {error}")
                self._drop(number)
                return _result(error.error)
            request.ends = request.goes = ends
            self._loop.run(number, self._run(request))
            return 0

    def _check(self, request: OutgoingRequest, text: str) -> None:
        """Judge a request. Raises `RefusedError`."""
        head = RequestHead.parse(text)
        request.what = f"{head.method} {head.scheme}://{head.authority}{head.target}"
        if not self._granted:
            raise RefusedError(helper_api.DENIED, "is denied: no outgoing requests are granted")
        host, port = helper_api.check_grant(self._grants, head.scheme, head.authority)
        head.declared_length()
        if host.endswith(outbound.INTERNAL) and request.hops >= HOPS_MAX:
            raise RefusedError("loop-detected", f"it came through {request.hops} neighbours already")
        request.key = (head.scheme, host, port)
        request.connect_s, request.first_s, request.between_s = (self._wait_s(each) for each in head.waits)
        request.head = head

    def finish(self, number: int, trailers: str) -> int:
        """End its body, with these field lines behind it; 0, or one more than an error's number."""
        with self._lock:
            request = self._requests.get(number)
            if request is None or request.over or request.ends:
                return 0
            try:
                request.trailers = read_fields(trailers)
                if request.head is not None and request.head.declared_length() is not None:
                    request.head.check_length(request.body_bytes)
            except RefusedError as error:
                return self._refuse_body(request, error)
            request.ends = request.goes = True
            self._loop.poke(number)
            return 0

    def abort(self, number: int) -> None:
        """Give it up: its body was dropped before its end."""
        with self._lock:
            request = self._requests.get(number)
            if request is not None and not request.over and not request.ends:
                self._fail(request, "connection-terminated", "its body was dropped before its end")
                self._flush_notes()

    def poll(self, wanted: str, wait: int) -> str:
        """Tell what is there of `wanted`: 0 or 1 for each, 4 times a request's number plus HEAD, READ, WRITE or REST.

        `wait`: `NUDGED` where the guest is about to wait: if nothing is there, it gets a nudge once something is, up to
        the next call of this. `WAITS` and `WAITS_A_MOMENT` wait here.
        """
        with self._lock:
            self._armed = ()
            numbers = tuple(int(word) for word in wanted.split())
            if wait != NO_WAIT and not any(map(self._is_there, numbers)):
                self._wait(numbers, wait)
            there = [self._is_there(each) for each in numbers]
            for each, ready in zip(numbers, there, strict=True):
                found = self._requests.get(each >> 2)
                if each & 3 == HEAD and not ready and found is not None:
                    self._let_go(found)  # a guest that looks for its answer has nothing else to do
            if wait == NUDGED and not any(there):
                self._armed = numbers
            self._flush_notes()
            return "".join("1" if each else "0" for each in there)

    def _let_go(self, request: OutgoingRequest) -> None:
        if request.head is not None and not request.goes:
            request.goes = True
            self._loop.poke(request.number)

    def _wait(self, numbers: tuple[int, ...], wait: int) -> None:
        """Let what is handed over go, since the guest waits; wait with it if it cannot by itself."""
        now_s = time.monotonic()
        for request in self._requests.values():
            self._let_go(request)
        for number in {each >> 2 for each in numbers}:
            waiting = self._requests.get(number)
            if waiting is not None and not waiting.waits_since_s:
                waiting.waits_since_s = now_s
                self._loop.poke(number)
        if wait != NUDGED:
            timeout_s = _MOMENT_S if wait == WAITS_A_MOMENT else None
            self._lock.wait_for(lambda: any(map(self._is_there, numbers)), timeout_s)

    def _is_there(self, wanted: int) -> bool:
        request = self._requests.get(wanted >> 2)
        if request is None:
            return True
        match wanted & 3:
            case 0:
                return request.has_head
            case 1:
                return request.has_body
            case 3:
                self._discard(request)
                return request.over or bool(request.error)
            case _:
                return request.room(self._limits.request_bytes) > 0

    def _discard(self, request: OutgoingRequest) -> None:
        """Throw away what has come of a body that its guest does not read."""
        if request.response is not None and request.response.body:
            request.taken_bytes += len(request.response.body)
            request.response.body.clear()
            if request.taken_bytes > self._limits.response_bytes:
                self._fail(request, "HTTP-response-body-size", self._too_much())
            self._loop.poke(request.number)

    def _too_much(self) -> str:
        return f"the response has more than {self._limits.response_bytes} bytes (limits.response)"

    def head(self, number: int) -> str:
        """Return the answer's head, or `error <n>`; a guest waits for it first (`poll`)."""
        with self._lock:
            request = self._requests.get(number)
            if request is None:
                return f"error {adapter_abi.ERRORS.index('internal-error')}"
            if not request.has_head:
                self._wait((number << 2 | HEAD,), WAITS)
            self._flush_notes()
            response = request.response
            if response is None or not response.status:
                self._drop(number)
                return f"error {adapter_abi.ERRORS.index(request.error)}"
            fields = "".join(f"{name}: {value}\r\n" for name, value in response.fields if _sound(name, value))
            return f"{response.status}\r\n{fields}"

    def read(self, number: int, most: int) -> str:
        """Return `+` and at most `most` bytes of the body, or its end: `.` and trailers, `!` and an error's number.

        A request with trailers or an error is kept after that: a guest may ask again for these.
        """
        with self._lock:
            request = self._requests.get(number)
            if request is None or request.response is None or not request.response.status:
                return "."
            response = request.response
            piece = bytes(response.body[: min(most, WINDOW_BYTES)])
            if request.taken_bytes + len(piece) > self._limits.response_bytes:
                self._fail(request, "HTTP-response-body-size", self._too_much())
            elif piece or not most or not request.over:
                del response.body[: len(piece)]
                request.taken_bytes += len(piece)
                self._loop.poke(number)  # there is room for more
                return "+" + piece.decode("latin-1")
            self._flush_notes()
            if request.error:
                return f"!{adapter_abi.ERRORS.index(request.error)}"
            if not response.trailers:
                self._drop(number)
            return "." + "".join(f"{name}: {value}\r\n" for name, value in response.trailers if _sound(name, value))

    def ask(self, question: str) -> str:
        """See `Requests.ask`; `agent.host.interfaces.sockets` answers where sockets are granted."""
        self._count(True)
        self._log(f"host: {question.partition(' ')[0][:20]} of a socket is denied: no sockets are granted")
        return adapter_abi.SOCKET_DENIED

    def renew(self) -> None:
        """See `Requests.renew`."""

    def close(self, number: int) -> None:
        """Forget a request that is not needed any more; its connection is kept if it can carry another."""
        with self._lock:
            self._drop(number)
            self._flush_notes()

    def reset(self) -> None:
        """End whatever a call that has ended left under way."""
        with self._lock:
            self._armed = ()
            for number in list(self._requests):
                self._drop(number)
            self._flush_notes()

    def end(self) -> None:
        """End the thread, with everything."""
        self.reset()
        self._loop.close()

    def _drop(self, number: int) -> None:
        request = self._requests.pop(number, None)
        if request is not None:
            request.dropped = True
            self._loop.poke(number)

    # Steps of a request, on the thread.

    def _run(self, request: OutgoingRequest) -> Steps:
        """Do everything for a request, under the lock; each yield gives that up until there is something to do."""
        try:
            while not request.goes:
                self._go_on_with(request)
                yield Wait()
            yield from self._exchange(request)
        except DroppedError:
            pass
        except RefusedError as error:
            self._note_count(denied=error.error in {helper_api.DENIED, helper_api.PROHIBITED})
            self._fail(request, error.error, str(error))
        except Exception as error:  # noqa: BLE001 - whatever it is: the guest must not wait in vain
            self._fail(request, "internal-error", f"{type(error).__name__}: {error}")
        request.over = True
        self._changed()

    @staticmethod
    def _go_on_with(request: OutgoingRequest, until_s: float = math.inf) -> None:
        """Raise `DroppedError` if nobody needs a request any more, or `TimeoutError`."""
        if request.dropped or request.error:
            raise DroppedError
        if time.monotonic() >= until_s:
            raise TimeoutError

    def _exchange(self, request: OutgoingRequest) -> Steps:
        head = request.head
        assert head is not None
        hops = [(HOPS, str(request.hops + 1))] if request.key[1].endswith(outbound.INTERNAL) else []
        upload = Upload(request, hops)
        kept = self._take_kept(request.key) if upload.whole else None
        if kept is not None:
            data = bytes(upload.out)
            again = yield from self._transfer(request, kept, upload, kept=True)
            if not again:
                return
            upload.out[:] = data
        connection = yield from self._connect(request, head)
        self._note_count(denied=False)
        yield from self._transfer(request, connection, upload, kept=False)

    def _transfer(
        self, request: OutgoingRequest, connection: Connection, upload: Upload, *, kept: bool
    ) -> Generator[Wait, None, bool]:
        """Send the request and read its response; True if it is to be sent again, on a fresh connection."""
        carried = False
        try:
            transfer = Transfer(request, connection, upload)
            while not transfer.is_over:
                self._go_on_with(request)
                events, news = transfer.turn()
                if news:
                    request.waits_since_s = 0.0
                    self._changed()
                if events:
                    yield from self._wait_for(transfer, connection, events)
                elif transfer.is_full and not upload.out:
                    yield Wait()  # for the guest to take some of it
            hung_up = transfer.unsent is not None or _is_worth_repeating(request, connection)
            if kept and connection.silent and hung_up:
                return True
            if kept:
                self._note_count(denied=False)
            carried = upload.is_sent and connection.reusable
            if connection.broken is not None:
                self._break(request, connection, connection.broken, transfer.unsent)
            upload.stop()
            return False
        finally:
            if carried:
                self._keep(request.key, connection)
            else:
                connection.close()

    @staticmethod
    def _wait_for(transfer: Transfer, connection: Connection, events: int) -> Steps:
        until_s, late = transfer.deadline()
        if until_s is not None and until_s <= time.monotonic():
            connection.broken = TimeoutError(late)
        else:
            yield Wait(connection.sock.fileno(), events, until_s)

    def _break(
        self, request: OutgoingRequest, connection: Connection, error: Exception, unsent: OSError | None
    ) -> None:
        """Give up a request whose response is broken."""
        if unsent is not None and connection.silent:
            why = f"cannot be sent: {_why(unsent)}"
            self._fail(request, _name(unsent, "connection-write-timeout"), why)
        elif isinstance(error, ResponseError):
            self._fail(request, error.error, _why(error))
        else:
            self._fail(request, _name(error, str(error) if str(error) in adapter_abi.ERRORS else LATE), _why(error))

    def _fail(self, request: OutgoingRequest, error: str, why: str) -> None:
        if not request.error:
            request.error, request.over = error, True
            request.body.clear()
            self._loop.poke(request.number)
            self._notes.append(lambda: self._log(f"host: {request.what or 'a request'}: {why}"))
        self._changed()

    def _changed(self) -> None:
        """Wake the guest if what it waits for is there."""
        self._lock.notify_all()
        if self._armed and any(map(self._is_there, self._armed)):
            self._armed = ()
            self._nudge()

    def _note_count(self, *, denied: bool) -> None:
        self._notes.append(lambda: self._count(denied))

    def _flush_notes(self) -> None:
        """Log and count what the thread has noted."""
        while self._notes:
            self._notes.popleft()()

    def _wait_s(self, ns: str) -> float:
        most = self._limits.idle_ms / 1000 * _MARGIN
        wanted_ns = bounds.parse_number(ns.encode())
        return most if wanted_ns is None else min(most, max(0.001, wanted_ns / 1e9))

    # Connections.

    def _connect(self, request: OutgoingRequest, head: RequestHead) -> Generator[Wait, None, Connection]:
        sock = yield from self._ask(request, head)
        if head.scheme == "https":
            assert self._context is not None
            try:
                sock = yield from self._shake_hands(request, self._context, sock)
            except (OSError, ValueError) as error:
                sock.close()
                raise RefusedError(_name(error, "connection-timeout"), f"no TLS: {self._why_no_tls(error)}") from error
            except BaseException:
                sock.close()
                raise
        return Connection(sock)

    def _shake_hands(
        self, request: OutgoingRequest, context: ssl.SSLContext, sock: socket.socket
    ) -> Generator[Wait, None, socket.socket]:
        sock.setblocking(False)
        until_s = time.monotonic() + request.connect_s
        # A server that ends without saying so may have been cut off: that is no end of a body.
        inside = context.wrap_socket(
            sock, server_hostname=request.key[1], do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        try:
            while True:
                try:
                    inside.do_handshake()
                except ssl.SSLWantReadError:
                    events = select.POLLIN
                except ssl.SSLWantWriteError:
                    events = select.POLLOUT
                else:
                    return inside
                yield Wait(inside.fileno(), events, until_s)
                self._go_on_with(request, until_s)
        except BaseException:
            inside.close()
            raise

    def _why_no_tls(self, error: Exception) -> str:
        if isinstance(error, ssl.SSLCertVerificationError) and self._context is not None:
            if not self._context.cert_store_stats()["x509_ca"]:
                return "this device has no certificates of authorities: install ca-certificates, or set SSL_CERT_FILE"
            return f"the server's certificate is not accepted: {error.verify_message}"
        return _why(error)

    def _ask(self, request: OutgoingRequest, head: RequestHead) -> Generator[Wait, None, socket.socket]:
        """Return a connection from the egress."""
        timeout_s = request.connect_s
        until_s = time.monotonic() + timeout_s + self._limits.idle_ms / 1000 * _REPLY_MARGIN
        try:
            question = self._loop.ask(request.number, head.scheme, head.authority, timeout_s)
        except OSError as error:
            raise RefusedError("internal-error", f"no egress: {error}") from error
        try:
            while question.reply is None:
                if question.failure:
                    raise RefusedError("internal-error", question.failure)
                if time.monotonic() >= until_s:
                    raise RefusedError("connection-timeout", f"no connection in {timeout_s:g} s")
                yield Wait(until_s=until_s)
                self._go_on_with(request)
            told, fd = question.reply, question.fd
            question.fd = -1
        finally:
            self._loop.forget(question)
            if question.fd >= 0:
                os.close(question.fd)
        if told.error:
            raise RefusedError(told.error, told.why)
        return socket.socket(fileno=fd)

    def _keep(self, key: tuple[str, str, int], connection: Connection) -> None:
        if len(self._kept) >= _KEPT:
            self._kept.pop(0)[2].close()
        self._kept.append((key, time.monotonic(), connection))

    def _take_kept(self, key: tuple[str, str, int]) -> Connection | None:
        """Take a kept connection to this place, and close those that are too old or were closed by their peers."""
        now_s = time.monotonic()
        found = None
        kept, self._kept = self._kept, []
        for each, since_s, connection in kept:
            if now_s - since_s > _KEPT_S or connection.spoke():
                connection.close()
            elif found is None and each == key:
                found = connection
            else:
                self._kept.append((each, since_s, connection))
        return found


def _result(error: str) -> int:
    return 1 + adapter_abi.ERRORS.index(error)


def _is_worth_repeating(request: OutgoingRequest, connection: Connection) -> bool:
    """Tell whether a kept connection was closed by its peer meanwhile, and the request may be sent once more."""
    assert request.head is not None
    error = connection.broken
    hung_up = isinstance(error, ResponseError) or (error is not None and is_cut_off(error))
    return hung_up and connection.silent and request.head.method in IDEMPOTENT


def _sound(name: str, value: str) -> bool:
    return name.isascii() and not any(c in name + value for c in "\r\n\0")


def _why(error: Exception) -> str:
    """Say an error in words, without the numbers and lines of libraries."""
    if is_cut_off(error):
        return "the server closed the connection"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    if isinstance(error, TimeoutError):
        return "the server is silent for too long"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _name(error: Exception, late: str) -> str:
    """Return the case of error-code that an error of a socket is."""
    match error:
        case ssl.SSLCertVerificationError():
            return "TLS-certificate-error"
        case TimeoutError():
            return late
        case _ if is_cut_off(error):
            return "connection-terminated"
        case ssl.SSLError():
            reason = error.reason or ""
            return "TLS-alert-received" if "ALERT" in reason or reason in _ALERTS else "TLS-protocol-error"
        case _:
            return "connection-terminated" if isinstance(error, OSError) else "HTTP-protocol-error"
