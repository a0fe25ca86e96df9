"""A guest's outgoing request: its head, its body on the way out, the connection that carries it, and its response.

Nothing here waits: `agent.host.interfaces.outgoing_http` does.
"""

import re
import select
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from agent.host.http import routing
from agent.host.http.response import ResponseError, ResponseParser
from agent.host.ipc.helper_api import RefusedError
from fleet.protocol import bounds

HOPS: Final = routing.HOPS_HEADER.decode()
WINDOW_BYTES: Final = 64 * 1024
"""Bytes of a body that are kept on their way, each way, while the guest and its peer both take part."""

LATE: Final = "connection-read-timeout"
_PIECE_BYTES: Final = 16 * 1024
_WORDS: Final = 7  # in the first line of a head
_OURS: Final = frozenset(
    {"connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", HOPS}
)
IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})
_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TARGET: Final = re.compile(r"[^\x00-\x20\x7f#]+")
_AUTHORITY: Final = re.compile(r"[!-~]*")
_VALUE: Final = re.compile(r"[^\r\n\x00\u0100-\U0010ffff]*")


@dataclass(frozen=True, slots=True)
class RequestHead:
    """Head of a request that is to be sent, as the adapter writes it."""

    method: str
    target: str
    scheme: str
    authority: str
    waits: tuple[str, str, str]
    fields: list[tuple[str, str]]

    @classmethod
    def parse(cls, text: str) -> "RequestHead":
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
        fields = read_fields(lines)
        return cls(method, target, scheme, authority, (waits[0], waits[1], waits[2]), fields)

    def check_length(self, body_bytes: int) -> None:
        """Compare the guest's content-length with the length of the body. Raises `RefusedError`."""
        declared = self.declared_length()
        if declared is not None and declared != body_bytes:
            raise RefusedError(
                "HTTP-request-body-size", f"its body has {body_bytes} bytes, its content-length says {declared}"
            )

    def encode(self, more: list[tuple[str, str]], framing: list[tuple[str, str]]) -> bytes:
        """Return the bytes of the head, with `more` fields and those that frame the body."""
        ours = [each for each in self.fields if each[0].lower() not in _OURS]
        lines = "".join(f"{name}: {value}\r\n" for name, value in [("host", self.authority), *ours, *more, *framing])
        return f"{self.method} {self.target} HTTP/1.1\r\n".encode() + f"{lines}\r\n".encode("latin-1")

    def declared_length(self) -> int | None:
        """Return the guest's own content-length; None without one. Raises `RefusedError`."""
        said = {value.strip() for name, value in self.fields if name.lower() == "content-length"}
        if not said:
            return None
        length = bounds.parse_number(said.pop().encode("latin-1"))
        if length is None or said:
            raise RefusedError("HTTP-request-body-size", "its content-length is no number")
        return length


def read_fields(lines: str) -> list[tuple[str, str]]:
    """Read the field lines of a head or of trailers. Raises `RefusedError`."""
    fields = []
    for line in lines.split("\r\n"):
        if line:
            name, colon, value = line.partition(": ")
            if not colon or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
                raise RefusedError("HTTP-protocol-error", f"the header line {line[:80]!r} cannot be sent")
            fields.append((name, value))
    return fields


class Connection:
    """A connected socket, TLS included, that never waits, and the reader of the response that it carries."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.response = ResponseParser("GET")
        self.silent = True  # nothing has come of the response
        self.broken: Exception | None = None  # error that ended the response

    def begin(self, method: str) -> None:
        """Prepare for the response to a request."""
        self.response, self.silent = ResponseParser(method), True

    def send(self, data: bytearray) -> int:
        """Send some of `data`, and take that away; the events to wait for before more goes. Raises `OSError`."""
        try:
            sent = self.sock.send(memoryview(data)[:_PIECE_BYTES])
        except ssl.SSLWantReadError:
            return select.POLLIN
        except (BlockingIOError, ssl.SSLWantWriteError):
            return select.POLLOUT
        del data[:sent]
        return select.POLLOUT if data else 0

    def receive(self) -> int:
        """Read what has come; the events to wait for if that is nothing. Errors end up in `broken`."""
        try:
            data = self.sock.recv(WINDOW_BYTES)
            if data:
                self.silent = False
                self.response.feed(data)
            else:
                self.response.end()
        except (BlockingIOError, ssl.SSLWantReadError):
            return select.POLLIN
        except ssl.SSLWantWriteError:
            return select.POLLOUT
        except (OSError, ResponseError) as error:
            self.broken = (
                ResponseError("HTTP-response-incomplete", "the server closed the connection within its response")
                if is_cut_off(error) and self.response.status
                else error
            )
        return 0

    def spoke(self) -> bool:
        """Tell whether the peer hung up, or said something that nobody asked for."""
        poll = select.poll()
        with suppress(OSError, ValueError):
            if isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
                return True
            poll.register(self.sock, select.POLLIN)
            return bool(poll.poll(0))
        return True

    @property
    def reusable(self) -> bool:
        """True if it may carry another request."""
        return self.broken is None and self.response.reusable and not self.spoke()

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


def is_cut_off(error: Exception) -> bool:
    """Tell whether the peer ended the connection, within TLS or below it."""
    if isinstance(error, ssl.SSLError):  # the first releases of Python 3.11 have no class for it
        ended = isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
        return ended or error.reason == "UNEXPECTED_EOF_WHILE_READING"
    return isinstance(error, ConnectionError)


@dataclass(slots=True)
class OutgoingRequest:
    """A request that a guest has begun.

    Attributes:
        number: the adapter's name for it.
        hops: neighbours on this device that the call came through.
        what: method and URL, for the log.
        head: what is sent; None until the guest hands it over.
        body: what the guest has written of it and is not on its way yet.
        body_bytes: all that the guest has written of it.
        ends: whether the guest has finished its body.
        trailers: fields behind the body.
        goes: whether the head may go out, with the body as it is.
        response: reader of its response, once the request is on its way.
        error: why there is no response, or no more of it: a case of error-code.
        over: whether nothing more is done for it: there is a response, or an error.
        taken_bytes: what the guest has taken of the response's body.
        waits_since_s: since when the guest waits for it; 0 while it does not.
        dropped: whether the guest needs it no more.
    """

    number: int
    hops: int = 0
    what: str = ""
    head: RequestHead | None = None
    key: tuple[str, str, int] = ("", "", 0)
    connect_s: float = 0.0
    first_s: float = 0.0
    between_s: float = 0.0
    body: bytearray = field(default_factory=bytearray)
    body_bytes: int = 0
    ends: bool = False
    trailers: list[tuple[str, str]] = field(default_factory=list)
    goes: bool = False
    response: ResponseParser | None = None
    error: str = ""
    over: bool = False
    taken_bytes: int = 0
    waits_since_s: float = 0.0
    dropped: bool = False

    def room(self, most: int) -> int:
        """Bytes of its body that can be taken now; before it is on its way, up to `most` altogether."""
        if self.over:
            return WINDOW_BYTES  # nobody takes them any more
        if self.goes:
            return max(0, WINDOW_BYTES - len(self.body))
        return max(1, min(WINDOW_BYTES, most - len(self.body)))  # the byte that is too many is an error, and no wait

    @property
    def has_head(self) -> bool:
        """True once there is a response's head, or an error in its place."""
        return bool(self.error) or (self.response is not None and self.response.status > 0)

    @property
    def has_body(self) -> bool:
        """True while reading the response's body would not wait."""
        return self.over or bool(self.error) or (self.response is not None and bool(self.response.body))


class Upload:
    """Bytes of a request on their way."""

    def __init__(self, request: OutgoingRequest, hops: list[tuple[str, str]]) -> None:
        """Frame the body by its length if that is known, else in chunks. Raises `RefusedError`."""
        assert request.head is not None
        self._request = request
        self._ended = False
        head = request.head
        length = head.declared_length()
        framing: list[tuple[str, str]] = []
        self.whole = request.ends and not request.trailers
        if self.whole:
            head.check_length(request.body_bytes)
            if request.body_bytes or head.method in {"POST", "PUT", "PATCH"}:
                framing = [("content-length", str(request.body_bytes))]
        else:
            framing = [("transfer-encoding", "chunked")] if length is None else [("content-length", str(length))]
        self._chunked = not self.whole and length is None
        self.out = bytearray(head.encode(hops, framing))
        if self.whole:
            self.out += request.body
            request.body.clear()
            self._ended = True

    @property
    def is_sent(self) -> bool:
        """True once all of the request has left."""
        return self._ended and not self.out

    @property
    def waits_for_guest(self) -> bool:
        """True while there is nothing to send, since the guest has not written it."""
        return not self._ended and not self.out

    def fill(self) -> bool:
        """Take more of the body, as far as there is room; True if the guest has room for more of it now."""
        request, took = self._request, False
        while request.body and len(self.out) < WINDOW_BYTES:
            piece = bytes(request.body[:_PIECE_BYTES])
            del request.body[:_PIECE_BYTES]
            self.out += b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece
            took = True
        if request.ends and not request.body and not self._ended:
            self._ended = True
            if self._chunked:
                kept = [each for each in request.trailers if each[0].lower() not in _OURS]
                lines = "".join(f"{name}: {value}\r\n" for name, value in kept)
                self.out += b"0\r\n" + lines.encode("latin-1") + b"\r\n"
        return took

    def stop(self) -> None:
        """Send no more: the server has answered, or hung up."""
        self.out.clear()
        self._request.body.clear()


class Transfer:
    """A request and its response on a connection, in turns that do not wait.

    Attributes:
        unsent: error that ended the sending: the server may have answered early, and hung up.
    """

    def __init__(self, request: OutgoingRequest, connection: Connection, upload: Upload) -> None:
        assert request.head is not None
        connection.begin(request.head.method)
        request.response = connection.response
        self._request = request
        self._connection = connection
        self._upload = upload
        self._progress_s = time.monotonic()
        self.unsent: OSError | None = None

    @property
    def is_over(self) -> bool:
        """True once the response has ended, well or not."""
        return self._connection.response.complete or self._connection.broken is not None

    def turn(self) -> tuple[int, bool]:
        """Send and read some: the events to wait for (0: go on at once), and whether the guest has something new."""
        news = self._upload.fill()
        to_send, to_receive = self._send(), self._receive()
        heard = len(self._connection.response.body), self._connection.response.status
        # Where something was read there may be more, which TLS has already and the socket will not tell of.
        events = to_send | to_receive if to_receive or self.is_full else 0
        return events, news or heard != self._heard

    def _send(self) -> int:
        out = self._upload.out
        had = len(out)
        if not had:
            return 0
        try:
            return self._connection.send(out)
        except OSError as error:
            self.unsent = error
            self._upload.stop()
            return 0
        finally:
            if len(out) < had:
                self._progress_s = time.monotonic()

    def _receive(self) -> int:
        response = self._connection.response
        self._heard = len(response.body), response.status
        return 0 if self.is_full else self._connection.receive()

    @property
    def is_full(self) -> bool:
        """True while the guest has to take something before more is read."""
        return len(self._connection.response.body) >= WINDOW_BYTES

    def deadline(self) -> tuple[float | None, str]:
        """Say until when something must have happened, and which error it is if nothing has."""
        request = self._request
        if self._upload.out:
            return self._progress_s + request.first_s, "connection-write-timeout"
        since_s = request.waits_since_s
        if not self._connection.response.status:
            if self._upload.waits_for_guest:
                return max(self._progress_s, since_s) + request.first_s if since_s else None, LATE
            return self._progress_s + request.first_s, LATE
        return since_s + request.between_s if since_s else None, LATE
