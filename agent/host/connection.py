"""One client's HTTP/1.1 connection in a lane: bytes in, requests out; answers in, bytes out. No socket, no guest.

A connection can be passed to another lane whenever it stands at a message boundary, or has sent no more of its next
message than fits in a packet (`prefix`). RFC 9112 for framing, RFC 9110 for fields.
"""

import http
import time
from collections import deque
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, Final

import httptools

HEAD_MAX_BYTES: Final = 64 * 1024
PREFIX_MAX_BYTES: Final = 96 * 1024
_HEADERS_MAX: Final = 100
_TOKEN: Final = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_OURS: Final = frozenset({b"connection", b"content-length", b"transfer-encoding", b"keep-alive", b"upgrade", b"date"})
_REASONS: Final = {status.value: status.phrase.encode() for status in http.HTTPStatus}
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(slots=True)
class Request:
    """A whole request; `refusal` is the status to answer with instead of asking the guest, 0 for none."""

    method: bytes = b""
    target: bytes = b""
    headers: bytearray = field(default_factory=bytearray)
    body: bytearray = field(default_factory=bytearray)
    keep_alive: bool = True
    refusal: int = 0


class Connection:
    """The protocol state of one connection."""

    def __init__(self, *, body_max_bytes: int) -> None:
        self.requests: deque[Request] = deque()
        self.closing = False  # after what is queued to be sent, it ends
        self._body_max_bytes = body_max_bytes
        self._parser: Any = httptools.HttpRequestParser(self)
        self._now: Request | None = None
        self._head_bytes = 0
        self._fields = 0
        self._raw: bytearray | None = bytearray()
        self._completed = False
        self._out = b""

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the client's; whole requests appear in `requests`. Returns what to send at once."""
        if self.closing:
            return b""
        self._completed = False
        if self._raw is not None:
            self._raw += data
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._end_after_answer()
        except (httptools.HttpParserError, _RefusedError) as error:
            status = error.__context__.status if isinstance(error.__context__, _RefusedError) else 400
            self._refuse(error.status if isinstance(error, _RefusedError) else status)
        if self._now is None:
            self._raw = bytearray()
        elif self._completed or (self._raw is not None and len(self._raw) > PREFIX_MAX_BYTES):
            self._raw = None
        out, self._out = self._out, b""
        return out

    def _end_after_answer(self) -> None:
        """An offer to speak another protocol: answer in this one, and end (RFC 9110, section 7.8)."""
        self._now = None
        self.closing = True
        last = self.requests[-1]
        last.keep_alive = False
        if last.method == b"CONNECT":
            last.refusal = 501

    def _refuse(self, status: int) -> None:
        self._now = None
        self.closing = True
        self.requests.append(Request(refusal=status, keep_alive=False))

    @property
    def prefix(self) -> bytes | None:
        """What came of the next message so far, to be fed to another `Connection`; None if it cannot be passed now."""
        if self.closing or self.requests or self._raw is None:
            return None
        return bytes(self._raw)

    @property
    def idle(self) -> bool:
        """Whether it stands at a message boundary with nothing to answer."""
        return self._now is None and not self.requests

    # What the parser calls.

    def on_message_begin(self) -> None:
        """A message begins."""
        self._now = Request()
        self._head_bytes = 0
        self._fields = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the request target."""
        assert self._now is not None
        self._count(len(url))
        self._now.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field."""
        assert self._now is not None
        self._count(len(name) + len(value) + 4)
        self._fields += 1
        if self._fields > _HEADERS_MAX:
            raise _RefusedError(431)
        self._now.headers += name.lower() + b": " + value + b"\r\n"
        if name.lower() == b"expect" and value.lower() == b"100-continue":
            self._out += _CONTINUE

    def on_headers_complete(self) -> None:
        """The head is complete."""
        assert self._now is not None
        self._now.method = self._parser.get_method()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        assert self._now is not None
        if len(self._now.body) + len(body) > self._body_max_bytes:
            raise _RefusedError(413)
        self._now.body += body

    def on_message_complete(self) -> None:
        """The message is complete."""
        assert self._now is not None
        self._now.keep_alive = self._parser.should_keep_alive()
        self.requests.append(self._now)
        self._now = None
        self._completed = True

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > HEAD_MAX_BYTES:
            raise _RefusedError(431)


class _RefusedError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


_date: tuple[int, bytes] = (0, b"")


def _today() -> bytes:
    global _date  # noqa: PLW0603 - formatting it for each answer costs more than the answer
    now = int(time.time())
    if _date[0] != now:
        _date = (now, formatdate(now, usegmt=True).encode())
    return _date[1]


def answer(status: int, headers: bytes, body: bytes, *, head: bool, keep_alive: bool) -> bytes:
    """The bytes of an answer. `headers` are field lines ending in CR LF; `head`: the request was HEAD."""
    bodiless = status in {204, 304}
    lines = [b"HTTP/1.1 %d %s\r\n" % (status, _REASONS.get(status, b"")), headers, b"date: ", _today(), b"\r\n"]
    if not bodiless:
        lines.append(b"content-length: %d\r\n" % len(body))
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    lines.append(b"\r\n")
    if not bodiless and not head:
        lines.append(body)
    return b"".join(lines)


def note(status: int, why: str, *, head: bool = False, keep_alive: bool = True) -> bytes:
    """An answer of the host's own: a status with a sentence as its body."""
    fields = b"content-type: text/plain; charset=utf-8\r\n"
    return answer(status, fields, why.encode() + b"\n", head=head, keep_alive=keep_alive)


class BadAnswerError(Exception):
    """The guest's answer is not HTTP."""


def guest_fields(status: int, headers: bytes, length: int, most: int) -> bytes:
    """The guest's header fields as they may go out: framing is the host's own business.

    Raises:
        BadAnswerError: a status outside 200 to 599, a line that is no field (RFC 9110, section 5), or a body of
            `length` bytes where `most` may be.
    """
    if length > most:
        raise BadAnswerError(f"a body of {length} bytes, at most {most} are allowed")
    if not 200 <= status <= 599:  # noqa: PLR2004
        raise BadAnswerError(f"status {status}")
    if len(headers) > HEAD_MAX_BYTES:
        raise BadAnswerError(f"{len(headers)} bytes of header fields")
    kept = []
    for line in headers.split(b"\r\n"):
        if not line:
            continue
        name, colon, value = line.partition(b":")
        if not colon or not name or not _TOKEN.issuperset(name) or any(c in value for c in b"\r\n\0"):
            raise BadAnswerError(f"header line {line[:80]!r}")
        if name.lower() not in _OURS:
            kept.append(line + b"\r\n")
    return b"".join(kept)
