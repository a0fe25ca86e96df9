"""wasi:http/outgoing-handler over the egress.

The worker's side of outgoing requests: HTTP/1.1 over connections that the egress hands in, TLS included.

The adapter inside the sandbox asks through six functions (components/adapter/wit/adapter.wit, interface `host`); here
each request is sent, its answer's head waited for and its body read, piece by piece. A request is written whole, so
several can be under way at their servers at once while the guest waits for one of them.

Every request is judged anew, a redirect that the guest follows included: what is kept for reuse is a connection to a
place that was granted, under scheme, host and port. TLS always verifies the certificate and the name, against the
device's own bundle, which `trust` loads before the worker enters the sandbox.

Answers of peers, read in time: `http.client` with a limit for the whole of a head and one for each piece of a body.

A socket's time-out alone lets a peer that drips bytes take for ever over a head, a line at a time.
"""

import contextlib
import http.client
import io
import os
import select
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from agent.host.engine import adapter_abi
from agent.host.http import routing
from agent.host.ipc import framing, helper_api
from agent.host.ipc.helper_api import RefusedError
from fleet.protocol import bounds, outbound, wire
from fleet.protocol.manifest import Grants, Limits


class _Timed(io.RawIOBase):
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock  # a connection closes its own where the peer will close, the descriptor stays for `_raw`
        self._raw = sock.makefile("rb", buffering=0)
        self._until_s = time.monotonic() + (sock.gettimeout() or 0.0)
        self.each_s: float | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_s = self._until_s - time.monotonic() if self.each_s is None else self.each_s
        if left_s <= 0:
            raise TimeoutError("the head takes too long")
        self._sock.settimeout(left_s)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class DeadlineResponse(http.client.HTTPResponse):
    """Response whose head has the time that the socket has, in all."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        """See `http.client.HTTPResponse`."""
        super().__init__(sock, *args, **options)
        self.fp.close()
        self._timed = _Timed(sock)
        self.fp = io.BufferedReader(self._timed)

    def wait(self, each_s: float) -> None:
        """From now on a piece may take so long."""
        self._timed.each_s = each_s


class DeadlineConnection(http.client.HTTPConnection):
    """A connection whose responses are such."""

    response_class = DeadlineResponse

    def getresponse(self) -> DeadlineResponse:
        """See `http.client.HTTPConnection.getresponse`."""
        found = super().getresponse()
        assert isinstance(found, DeadlineResponse)
        return found


HOPS: Final = routing.HOPS_HEADER.decode()
HOPS_MAX: Final = 4
_KEPT: Final = 8
_KEPT_S: Final = 10.0
_AT_ONCE: Final = 16
_MARGIN: Final = 0.8  # of the limit on waiting, so that the guest hears of it before the worker is ended for it
_OURS: Final = frozenset(
    {"connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", HOPS}
)
_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})
_told: Final[msgspec.json.Decoder[helper_api.ConnectReply]] = msgspec.json.Decoder(helper_api.ConnectReply)


def trust() -> ssl.SSLContext:
    """Make a TLS context with the system's certificates, while files can be read."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


@dataclass(slots=True)
class _Request:
    refused: str = ""  # why it is not to be sent, a case of error-code
    body: bytearray = field(default_factory=bytearray)
    key: tuple[str, str, int] = ("", "", 0)
    connection: DeadlineConnection | None = None
    response: DeadlineResponse | None = None
    taken_bytes: int = 0  # of its answer's body
    between_s: float = 0.0
    again: Callable[[], DeadlineConnection] | None = None  # sends it once more, where that is allowed


class OutgoingHttp:
    """The requests of one instance's calls."""

    def __init__(
        self,
        sock: socket.socket | None,
        grants: Grants,
        limits: Limits,
        *,
        log: Callable[[str], None],
        count: Callable[[bool], None] = lambda _denied: None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """`sock`: on which the egress is asked; None where nothing is granted. `count(denied)`: called for each."""
        self._sock = sock
        self._grants = grants
        self._limits = limits
        self._log = log
        self._count = count
        self._context = context
        self._requests: dict[int, _Request] = {}
        self._kept: list[tuple[tuple[str, str, int], float, DeadlineConnection]] = []
        self._number = 0
        self._asked = 0
        self.hops = 0

    # -- calls of the adapter

    def begin(self) -> int:
        """Begin a request and return its number."""
        self._number += 1
        self._requests[self._number] = _Request()
        return self._number

    def write(self, number: int, data: str) -> int:
        """Take a piece of its body; return 0, or one more than an error's number."""
        request = self._requests[number]
        if len(request.body) + len(data) > self._limits.request_bytes:
            request.refused = "HTTP-request-body-size"
            return 1 + adapter_abi.ERRORS.index(request.refused)
        request.body += data.encode("latin-1")
        return 0

    def send(self, number: int, head: str) -> int:
        """Send it; 0, or one more than an error's number."""
        first, _, lines = head.partition("\r\n")
        method, target, scheme, authority, *waits = first.split(" ")
        try:
            self._send(self._requests[number], method, target, scheme, authority, waits, lines)
        except RefusedError as error:
            self._count(error.error in {helper_api.DENIED, helper_api.PROHIBITED})
            self._log(f"host: {method} {scheme}://{authority}{target}: {error}")
            self.close(number)
            return 1 + adapter_abi.ERRORS.index(error.error)
        self._count(False)
        return 0

    def head(self, number: int) -> str:
        """Return the answer's head, or `error <n>`."""
        request = self._requests[number]
        try:
            try:
                response = self._head(request)
            except (http.client.RemoteDisconnected, ConnectionError):
                if request.again is None:
                    raise
                request.connection, request.again = request.again(), None
                response = self._head(request)
        except (OSError, http.client.HTTPException) as error:
            self.close(number)
            return f"error {adapter_abi.ERRORS.index(_name(error, 'connection-read-timeout'))}"
        request.response = response
        fields = "".join(f"{name}: {value}\r\n" for name, value in response.getheaders() if _sound(name, value))
        return f"{response.status}\r\n{fields}"

    def read(self, number: int, most: int) -> str:
        """`+` and at most `most` bytes of the body, `.` at its end, or `!` and an error's number."""
        request = self._requests.get(number)
        if request is None or request.response is None or request.connection is None:
            return "."
        left = request.response.length
        try:
            piece = request.response.read1(most) if most else b""
            if not piece and most and left:
                raise http.client.IncompleteRead(b"", left)
            request.taken_bytes += len(piece)
            if request.taken_bytes > self._limits.response_bytes:
                self._log(f"host: an answer from {request.key[1]} has more than {self._limits.response_bytes} bytes")
                self.close(number)
                return f"!{adapter_abi.ERRORS.index('HTTP-response-body-size')}"
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.close(number)
            return f"!{adapter_abi.ERRORS.index(_name(error, 'connection-read-timeout'))}"
        if piece or not most:
            return "+" + piece.decode("latin-1")
        self._keep(request)
        self.close(number)
        return "."

    def close(self, number: int) -> None:
        """Forget a request that is not needed any more."""
        request = self._requests.pop(number, None)
        if request is not None and request.connection is not None:
            request.connection.close()
            if request.response is not None:
                request.response.close()

    def reset(self) -> None:
        """End whatever a call that has ended left under way."""
        for number in list(self._requests):
            self.close(number)

    # Sending.

    def _send(
        self, request: _Request, method: str, target: str, scheme: str, authority: str, waits: list[str], lines: str
    ) -> None:
        if self._sock is None:
            raise RefusedError(helper_api.DENIED, "is denied: no outgoing requests are granted")
        if request.refused:
            raise RefusedError(request.refused, f"its body is larger than {self._limits.request_bytes} bytes")
        host, port = helper_api.check_grant(self._grants, scheme, authority)
        request.key = (scheme, host, port)
        connect_s, first_s, request.between_s = (self._wait_s(each) for each in waits)
        said = [line.split(": ", 1) for line in lines.split("\r\n") if line]
        fields = [each for each in said if each[0] not in _OURS]
        if host.endswith(outbound.INTERNAL):
            if self.hops >= HOPS_MAX:
                raise RefusedError("loop-detected", f"it came through {self.hops} neighbours already")
            fields.append([HOPS, str(self.hops + 1)])

        def fresh() -> DeadlineConnection:
            connection = self._connect(scheme, authority, host, connect_s)
            return _put(connection, request.body, method, target, [["host", authority], *fields], first_s)

        kept = self._take(request.key)
        if kept is not None:
            with contextlib.suppress(RefusedError):
                _put(kept, request.body, method, target, [["host", authority], *fields], first_s)
                request.connection, request.again = kept, fresh if method in _IDEMPOTENT else None
                return
        request.connection = fresh()

    def _wait_s(self, ns: str) -> float:
        most = self._limits.idle_ms / 1000 * _MARGIN
        wanted_ns = bounds.parse_number(ns.encode())
        return most if wanted_ns is None else min(most, max(0.001, wanted_ns / 1e9))

    def _connect(self, scheme: str, authority: str, host: str, timeout_s: float) -> DeadlineConnection:
        if len([each for each in self._requests.values() if each.connection is not None]) >= _AT_ONCE:
            raise RefusedError("connection-limit-reached", f"{_AT_ONCE} requests are under way")
        sock = self._ask(scheme, authority, timeout_s)
        sock.settimeout(timeout_s)
        if scheme == "https":
            assert self._context is not None
            try:
                sock = self._context.wrap_socket(sock, server_hostname=host)
            except (OSError, ValueError) as error:
                sock.close()
                raise RefusedError(_name(error, "connection-timeout"), f"no TLS: {error}") from error
        connection = DeadlineConnection(host)
        connection.sock = sock
        return connection

    def _ask(self, scheme: str, authority: str, timeout_s: float) -> socket.socket:
        """Return a connection from the egress."""
        assert self._sock is not None
        self._asked += 1
        ask = helper_api.ConnectRequest(
            id=self._asked, scheme=scheme, authority=authority, timeout_ms=max(1, int(timeout_s * 1000))
        )
        until_s = time.monotonic() + timeout_s
        try:
            self._sock.settimeout(timeout_s)
            self._sock.send(msgspec.json.encode(ask))
            while True:
                self._sock.settimeout(max(0.001, until_s - time.monotonic()))
                data, fds = framing.receive_packet(self._sock)
                told = _told.decode(data)
                if told.id == ask.id:
                    break
                for fd in fds:  # the answer to a question that was given up
                    os.close(fd)
        except TimeoutError as error:
            raise RefusedError("connection-timeout", f"no connection in {timeout_s:g} s") from error
        except (OSError, framing.GoneError, *wire.JSON_ERRORS) as error:
            late = time.monotonic() >= until_s
            raise RefusedError("connection-timeout" if late else "internal-error", f"no egress: {error}") from error
        if told.error:
            raise RefusedError(told.error, told.why)
        return socket.socket(fileno=fds[0])

    def _head(self, request: _Request) -> DeadlineResponse:
        assert request.connection is not None
        response = request.connection.getresponse()
        response.wait(request.between_s)
        return response

    # Reuse.

    def _take(self, key: tuple[str, str, int]) -> DeadlineConnection | None:
        now_s = time.monotonic()
        found = None
        kept, self._kept = self._kept, []
        for each, since_s, connection in kept:
            if now_s - since_s > _KEPT_S or _spoke(connection):
                connection.close()
            elif found is None and each == key:
                found = connection
            else:
                self._kept.append((each, since_s, connection))
        return found

    def _keep(self, request: _Request) -> None:
        connection, response = request.connection, request.response
        if connection is None or response is None or response.will_close or connection.sock is None:
            return
        response.close()
        if len(self._kept) >= _KEPT:
            self._kept.pop(0)[2].close()
        self._kept.append((request.key, time.monotonic(), connection))
        request.connection = None


def _put(
    connection: DeadlineConnection,
    body: bytes | bytearray,
    method: str,
    target: str,
    fields: list[list[str]],
    wait_s: float,
) -> DeadlineConnection:
    """Write a request out whole."""
    try:
        connection.sock.settimeout(wait_s)
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in fields:
            connection.putheader(name, value.encode("latin-1"))
        if body or method in {"POST", "PUT", "PATCH"}:
            connection.putheader("content-length", str(len(body)))
        connection.endheaders(bytes(body) or None)
    except (OSError, ValueError, http.client.HTTPException) as error:
        connection.close()
        raise RefusedError(_name(error, "connection-write-timeout"), f"cannot be sent: {error}") from error
    return connection


def _spoke(connection: DeadlineConnection) -> bool:
    """Tell whether the peer hung up, or said something that nobody asked for."""
    poll = select.poll()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        poll.register(connection.sock, select.POLLIN)
        return bool(poll.poll(0))
    return True


def _sound(name: str, value: str) -> bool:
    return name.isascii() and not any(c in name + value for c in "\r\n\0")


def _name(error: Exception, late: str) -> str:  # noqa: PLR0911 - one line for each kind of error
    """Return the case of error-code that an error is."""
    match error:
        case ssl.SSLCertVerificationError():
            return "TLS-certificate-error"
        case TimeoutError():
            return late
        case ssl.SSLError():
            return "TLS-protocol-error"
        case http.client.IncompleteRead():
            return "HTTP-response-incomplete"
        case http.client.RemoteDisconnected() | ConnectionError():
            return "connection-terminated"
        case http.client.LineTooLong():
            return "HTTP-response-header-section-size"
        case http.client.HTTPException():
            return "HTTP-response-header-section-size" if "headers" in str(error) else "HTTP-protocol-error"
        case _:
            return "connection-terminated" if isinstance(error, OSError) else "HTTP-protocol-error"
