"""wasi:http/outgoing-handler over the egress.

The worker's side of outgoing requests: HTTP/1.1 over connections that the egress hands in, TLS included.

The adapter inside the sandbox asks through six functions (components/adapter/wit/adapter.wit, interface `host`); here
each request is sent, its answer's head waited for and its body read, piece by piece. A request is written whole, so
several can be under way at their servers at once while the guest waits for one of them. What the adapter passes on is a
guest's, so everything in it is checked.

Every request is judged anew, a redirect that the guest follows included: what is kept for reuse is a connection to a
place that was granted, under scheme, host and port. TLS always verifies the certificate and the name, against the
device's own bundle, which `trust` loads before the worker enters the sandbox.

The head of a response has one time limit as a whole and each piece of its body another: a socket's own time-out alone
would let a peer that drips bytes take for ever over a head.
"""

import contextlib
import os
import re
import select
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from agent.host.engine import adapter_abi
from agent.host.http import routing
from agent.host.http.response import ResponseError, ResponseParser
from agent.host.ipc import framing, helper_api
from agent.host.ipc.helper_api import RefusedError
from fleet.protocol import bounds, outbound, wire
from fleet.protocol.manifest import Grants, Limits

HOPS: Final = routing.HOPS_HEADER.decode()
HOPS_MAX: Final = 4
_KEPT: Final = 8
_KEPT_S: Final = 10.0
_AT_ONCE: Final = 16
_BEGUN_MAX: Final = 256  # requests that a guest has begun and neither sent nor dropped
_MARGIN: Final = 0.8  # of the limit on waiting, so that the guest hears of it before the worker is ended for it
_REPLY_MARGIN: Final = 0.05  # of the same: the egress says what it waited for, which a time-out here could not
_PIECE_BYTES: Final = 64 * 1024
_WORDS: Final = 7  # in the first line of a head
_OURS: Final = frozenset(
    {"connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", HOPS}
)
_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})
_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TARGET: Final = re.compile(r"[^\x00-\x20\x7f#]+")
_AUTHORITY: Final = re.compile(r"[!-~]*")
_VALUE: Final = re.compile(r"[^\r\n\x00\u0100-\U0010ffff]*")
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


class _Connection:
    """A connected socket, TLS included, and the reader of the response that it carries."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.response = ResponseParser("GET")
        self.silent = True  # nothing has come of the response
        self.broken: Exception | None = None  # error that ended the response

    def send(self, method: str, data: bytes, wait_s: float) -> None:
        """Send a request and prepare for its response. Raises `OSError`."""
        self.response, self.silent = ResponseParser(method), True
        self._sock.settimeout(wait_s)
        self._sock.sendall(data)

    def receive(self, wait_s: float) -> None:
        """Wait for bytes of the response, and read them. Errors end up in `broken`, behind what came before them."""
        try:
            if wait_s <= 0:
                raise TimeoutError("the head takes too long")
            self._sock.settimeout(wait_s)
            data = self._sock.recv(_PIECE_BYTES)
            if data:
                self.silent = False
                self.response.feed(data)
            else:
                self.response.end()
        except (OSError, ResponseError) as error:
            self.broken = (
                ResponseError("HTTP-response-incomplete", "the server closed the connection within its response")
                if _cut_off(error) and self.response.status
                else error
            )

    def spoke(self) -> bool:
        """Tell whether the peer hung up, or said something that nobody asked for."""
        poll = select.poll()
        with contextlib.suppress(OSError, ValueError):
            if isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():
                return True
            poll.register(self._sock, select.POLLIN)
            return bool(poll.poll(0))
        return True

    @property
    def reusable(self) -> bool:
        """True if it may carry another request."""
        return self.broken is None and self.response.reusable and not self.spoke()

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


@dataclass(slots=True)
class _Request:
    refused: str = ""  # why it is not to be sent, a case of error-code
    what: str = ""  # method and URL, for the log
    body: bytearray = field(default_factory=bytearray)
    key: tuple[str, str, int] = ("", "", 0)
    connection: _Connection | None = None
    taken_bytes: int = 0  # of its answer's body
    first_s: float = 0.0
    between_s: float = 0.0
    again: Callable[[], _Connection] | None = None  # sends it once more, where that is allowed


@dataclass(frozen=True, slots=True)
class _Head:
    """Head of a request that is to be sent, as the adapter writes it."""

    method: str
    target: str
    scheme: str
    authority: str
    waits: tuple[str, str, str]
    fields: list[tuple[str, str]]

    @classmethod
    def parse(cls, text: str) -> "_Head":
        """Parse a head. Raises `RefusedError`."""
        first, _, lines = text.partition("\r\n")
        words = first.split(" ")
        if len(words) != _WORDS:
            raise RefusedError("HTTP-request-URI-invalid", f"a request line of {len(words)} words")
        method, target, scheme, authority, *waits = words
        if not _TOKEN.fullmatch(method) or method == "CONNECT":
            raise RefusedError("HTTP-request-method-invalid", f"the method {method[:40]!r} cannot be sent")
        if not _TARGET.fullmatch(target) or not _AUTHORITY.fullmatch(authority):
            raise RefusedError("HTTP-request-URI-invalid", f"{authority[:80]!r}, {target[:80]!r} cannot be sent")
        fields = []
        for line in lines.split("\r\n"):
            if line:
                name, colon, value = line.partition(": ")
                if not colon or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
                    raise RefusedError("HTTP-protocol-error", f"the header line {line[:80]!r} cannot be sent")
                fields.append((name, value))
        return cls(method, target, scheme, authority, (waits[0], waits[1], waits[2]), fields)

    def encode(self, body: bytes | bytearray, more: list[tuple[str, str]]) -> bytes:
        """Return the bytes of the request, with `more` fields. Raises `RefusedError`."""
        declared = self._declared_length()
        if declared is not None and declared != len(body):
            raise RefusedError(
                "HTTP-request-body-size", f"its body has {len(body)} bytes, its content-length says {declared}"
            )
        fields = [("host", self.authority), *(each for each in self.fields if each[0].lower() not in _OURS), *more]
        if body or self.method in {"POST", "PUT", "PATCH"}:
            fields.append(("content-length", str(len(body))))
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
        return f"{self.method} {self.target} HTTP/1.1\r\n".encode() + f"{lines}\r\n".encode("latin-1") + body

    def _declared_length(self) -> int | None:
        """Return the guest's own content-length; None without one. Raises `RefusedError`."""
        said = {value.strip() for name, value in self.fields if name.lower() == "content-length"}
        if not said:
            return None
        length = bounds.parse_number(said.pop().encode("latin-1"))
        if length is None or said:
            raise RefusedError("HTTP-request-body-size", "its content-length is no number")
        return length


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
        self._kept: list[tuple[tuple[str, str, int], float, _Connection]] = []
        self._number = 0
        self._asked = 0
        self._hops = 0

    # -- calls of the adapter

    def begin(self, hops: int) -> int:
        """Begin a request and return its number; 0, which is no request's, if there are too many.

        `hops` as in `agent.host.engine.adapter_abi.Requests.begin`.
        """
        if len(self._requests) >= _BEGUN_MAX:
            return 0
        self._hops = hops
        self._number += 1
        self._requests[self._number] = _Request()
        return self._number

    def write(self, number: int, data: str) -> int:
        """Take a piece of its body; return 0, or one more than an error's number."""
        request = self._requests.get(number)
        if request is None:
            return _result("connection-limit-reached")
        if len(request.body) + len(data) > self._limits.request_bytes:
            request.refused = "HTTP-request-body-size"
            return _result(request.refused)
        try:
            request.body += data.encode("latin-1")
        except UnicodeEncodeError:
            request.refused = "internal-error"
            return _result(request.refused)
        return 0

    def send(self, number: int, head: str) -> int:
        """Send it; 0, or one more than an error's number."""
        request = self._requests.get(number)
        if request is None:
            return _result("connection-limit-reached")
        try:
            parsed = _Head.parse(head)
            request.what = f"{parsed.method} {parsed.scheme}://{parsed.authority}{parsed.target}"
            self._send(request, parsed)
        except RefusedError as error:
            self._count(error.error in {helper_api.DENIED, helper_api.PROHIBITED})
            self._log(f"host: {request.what or 'a request'}: {error}")
            self.close(number)
            return _result(error.error)
        self._count(False)
        return 0

    def head(self, number: int) -> str:
        """Return the answer's head, or `error <n>`."""
        request = self._requests.get(number)
        if request is None or request.connection is None:
            return f"error {adapter_abi.ERRORS.index('internal-error')}"
        connection = self._await_head(request, request.connection)
        if connection.broken is not None and connection.silent and request.again is not None and _hung_up(connection):
            connection.close()
            again, request.again, request.connection = request.again, None, None
            try:
                request.connection = again()
            except RefusedError as error:
                self._log(f"host: {request.what}: {error}")
                self.close(number)
                return f"error {adapter_abi.ERRORS.index(error.error)}"
            connection = self._await_head(request, request.connection)
        response = connection.response
        if not response.status:
            return f"error {self._fail(number, request, connection)}"
        fields = "".join(f"{name}: {value}\r\n" for name, value in response.fields if _sound(name, value))
        return f"{response.status}\r\n{fields}"

    @staticmethod
    def _await_head(request: _Request, connection: _Connection) -> _Connection:
        until_s = time.monotonic() + request.first_s
        while not connection.response.status and connection.broken is None:
            connection.receive(until_s - time.monotonic())
        return connection

    def read(self, number: int, most: int) -> str:
        """`+` and at most `most` bytes of the body, `.` at its end, or `!` and an error's number."""
        request = self._requests.get(number)
        if request is None or request.connection is None or not request.connection.response.status:
            return "."
        if not most:
            return "+"
        connection, response = request.connection, request.connection.response
        while not response.body and not response.complete and connection.broken is None:
            connection.receive(request.between_s)
        piece = bytes(response.body[: min(most, _PIECE_BYTES)])
        del response.body[: len(piece)]
        request.taken_bytes += len(piece)
        if request.taken_bytes > self._limits.response_bytes:
            connection.broken = ResponseError(
                "HTTP-response-body-size",
                f"the response has more than {self._limits.response_bytes} bytes (limits.response)",
            )
        elif piece:
            return "+" + piece.decode("latin-1")
        if connection.broken is not None:
            return f"!{self._fail(number, request, connection)}"
        self.close(number)
        return "."

    def _fail(self, number: int, request: _Request, connection: _Connection) -> int:
        """Give up a request whose response is broken, and return the error's number."""
        assert connection.broken is not None
        error = connection.broken
        self._log(f"host: {request.what}: {_why(error)}")
        self.close(number)
        name = error.error if isinstance(error, ResponseError) else _name(error, "connection-read-timeout")
        return adapter_abi.ERRORS.index(name)

    def close(self, number: int) -> None:
        """Forget a request that is not needed any more; its connection is kept if it can carry another."""
        request = self._requests.pop(number, None)
        if request is None or request.connection is None:
            return
        if not request.connection.reusable:
            request.connection.close()
            return
        if len(self._kept) >= _KEPT:
            self._kept.pop(0)[2].close()
        self._kept.append((request.key, time.monotonic(), request.connection))

    def reset(self) -> None:
        """End whatever a call that has ended left under way."""
        for number in list(self._requests):
            self.close(number)

    # Sending.

    def _send(self, request: _Request, head: _Head) -> None:
        if self._sock is None:
            raise RefusedError(helper_api.DENIED, "is denied: no outgoing requests are granted")
        if request.refused:
            raise RefusedError(
                request.refused, f"its body is larger than {self._limits.request_bytes} bytes (limits.request)"
            )
        host, port = helper_api.check_grant(self._grants, head.scheme, head.authority)
        request.key = (head.scheme, host, port)
        connect_s, request.first_s, request.between_s = (self._wait_s(each) for each in head.waits)
        hops = []
        if host.endswith(outbound.INTERNAL):
            if self._hops >= HOPS_MAX:
                raise RefusedError("loop-detected", f"it came through {self._hops} neighbours already")
            hops.append((HOPS, str(self._hops + 1)))
        data = head.encode(request.body, hops)

        def fresh() -> _Connection:
            connection = self._connect(head, host, connect_s)
            return _put(connection, head.method, data, request.first_s)

        kept = self._take(request.key)
        if kept is not None:
            with contextlib.suppress(RefusedError):
                request.connection = _put(kept, head.method, data, request.first_s, kept=True)
                request.again = fresh if head.method in _IDEMPOTENT else None
                return
        request.connection = fresh()

    def _wait_s(self, ns: str) -> float:
        most = self._limits.idle_ms / 1000 * _MARGIN
        wanted_ns = bounds.parse_number(ns.encode())
        return most if wanted_ns is None else min(most, max(0.001, wanted_ns / 1e9))

    def _connect(self, head: _Head, host: str, timeout_s: float) -> _Connection:
        if len([each for each in self._requests.values() if each.connection is not None]) >= _AT_ONCE:
            raise RefusedError("connection-limit-reached", f"{_AT_ONCE} requests are under way")
        sock = self._ask(head.scheme, head.authority, timeout_s)
        sock.settimeout(timeout_s)
        if head.scheme == "https":
            assert self._context is not None
            try:
                # A server that ends without saying so may have been cut off: that is no end of a body.
                sock = self._context.wrap_socket(sock, server_hostname=host, suppress_ragged_eofs=False)
            except (OSError, ValueError) as error:
                sock.close()
                raise RefusedError(_name(error, "connection-timeout"), f"no TLS: {self._why_no_tls(error)}") from error
        return _Connection(sock)

    def _why_no_tls(self, error: Exception) -> str:
        if isinstance(error, ssl.SSLCertVerificationError) and self._context is not None:
            if not self._context.cert_store_stats()["x509_ca"]:
                return "this device has no certificates of authorities: install ca-certificates, or set SSL_CERT_FILE"
            return f"the server's certificate is not accepted: {error.verify_message}"
        return _why(error)

    def _ask(self, scheme: str, authority: str, timeout_s: float) -> socket.socket:
        """Return a connection from the egress."""
        assert self._sock is not None
        until_s = time.monotonic() + timeout_s + self._limits.idle_ms / 1000 * _REPLY_MARGIN
        ours: set[int] = set()
        try:
            self._forget_replies(self._sock)
            self._question(self._sock, ours, scheme, authority, timeout_s)
            while True:
                self._sock.settimeout(max(0.001, until_s - time.monotonic()))
                data, fds = framing.receive_packet(self._sock)
                told = _told.decode(data)
                if told.id in ours:
                    break
                framing.close_all(fds)
                if told.id == helper_api.RESTARTED:
                    self._question(self._sock, ours, scheme, authority, max(0.001, until_s - time.monotonic()))
        except TimeoutError as error:
            raise RefusedError("connection-timeout", f"no connection in {timeout_s:g} s") from error
        except (OSError, framing.GoneError, *wire.JSON_ERRORS) as error:
            late = time.monotonic() >= until_s
            raise RefusedError("connection-timeout" if late else "internal-error", f"no egress: {error}") from error
        if told.error:
            raise RefusedError(told.error, told.why)
        return socket.socket(fileno=fds[0])

    def _question(self, sock: socket.socket, ours: set[int], scheme: str, authority: str, timeout_s: float) -> None:
        """Ask for a connection, and note the question's number. Raises `OSError`."""
        self._asked += 1
        ours.add(self._asked)
        ask = helper_api.ConnectRequest(
            id=self._asked, scheme=scheme, authority=authority, timeout_ms=max(1, int(timeout_s * 1000))
        )
        sock.settimeout(timeout_s)
        sock.send(msgspec.json.encode(ask))

    @staticmethod
    def _forget_replies(sock: socket.socket) -> None:
        """Throw away replies to questions that were given up."""
        sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                framing.close_all(framing.receive_packet(sock)[1])

    def _take(self, key: tuple[str, str, int]) -> _Connection | None:
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


def _put(connection: _Connection, method: str, data: bytes, wait_s: float, *, kept: bool = False) -> _Connection:
    """Write a request out whole. Raises `RefusedError`."""
    try:
        connection.send(method, data, wait_s)
    except OSError as error:
        if isinstance(error, ConnectionError) and not kept and connection.spoke():
            return connection  # the server may have answered early and hung up
        connection.close()
        raise RefusedError(_name(error, "connection-write-timeout"), f"cannot be sent: {_why(error)}") from error
    return connection


def _result(error: str) -> int:
    return 1 + adapter_abi.ERRORS.index(error)


def _hung_up(connection: _Connection) -> bool:
    error = connection.broken
    return isinstance(error, ResponseError) or (error is not None and _cut_off(error))


def _cut_off(error: Exception) -> bool:
    """Tell whether the peer ended the connection, within TLS or below it."""
    if isinstance(error, ssl.SSLError):  # the first releases of Python 3.11 have no class for it
        ended = isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
        return ended or error.reason == "UNEXPECTED_EOF_WHILE_READING"
    return isinstance(error, ConnectionError)


def _sound(name: str, value: str) -> bool:
    return name.isascii() and not any(c in name + value for c in "\r\n\0")


def _why(error: Exception) -> str:
    """Say an error in words, without the numbers and lines of libraries."""
    if _cut_off(error):
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
        case _ if _cut_off(error):
            return "connection-terminated"
        case ssl.SSLError():
            reason = error.reason or ""
            return "TLS-alert-received" if "ALERT" in reason or reason in _ALERTS else "TLS-protocol-error"
        case _:
            return "connection-terminated" if isinstance(error, OSError) else "HTTP-protocol-error"
