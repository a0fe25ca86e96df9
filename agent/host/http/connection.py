"""Answers in HTTP/1.1: what a guest says, or the host in its place, as bytes. No socket, no guest.

RFC 9112 for framing, RFC 9110 for fields.
"""

import http
import time
from typing import Final

from agent.host.http.parser import HEAD_MAX_BYTES, Fields
from fleet.protocol import bounds

_TOKEN: Final = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_OURS: Final = frozenset({b"connection", b"content-length", b"transfer-encoding", b"keep-alive", b"upgrade", b"date"})
_REASONS: Final = {status.value: status.phrase.encode() for status in http.HTTPStatus}
BODILESS: Final = frozenset({204, 304})
"""Statuses of responses without a body (RFC 9112, section 6.3)."""

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
REFUSALS: Final = {
    400: "the request is not HTTP/1.1",
    408: "the request came too slowly",
    413: "the request's body is larger than this component takes",
    417: "only 100-continue may be expected",
    431: "the request's header fields are too large",
    501: "this method or transfer coding is not served here",
    505: "only HTTP/1.0 and HTTP/1.1 are spoken here",
}


def lines(fields: Fields) -> bytes:
    """Return field lines as on the wire."""
    return b"".join([b"%b: %b\r\n" % each for each in fields])


_date: tuple[int, bytes] = (0, b"")


_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def http_date(time_s: int) -> str:
    """Format a time as RFC 9110, section 5.6.7 has it; `email.utils` would cost the router 300 KB."""
    year, month, day, hour, minute, second, weekday, *_ = time.gmtime(time_s)
    return f"{_DAYS[weekday]}, {day:02} {_MONTHS[month - 1]} {year:04} {hour:02}:{minute:02}:{second:02} GMT"


def _today() -> bytes:
    global _date  # noqa: PLW0603 - formatting it for each answer costs more than the answer
    now = int(time.time())
    if _date[0] != now:
        _date = (now, http_date(now).encode())
    return _date[1]


def answer(
    status: int,
    headers: bytes,
    body: bytes,
    *,
    head: bool,
    keep_alive: bool,
    trailers: bytes = b"",
    old: bool = False,
) -> bytes:
    """Return the bytes of a response. `headers` are field lines ending in CR LF; `head`: the request was HEAD.

    With `trailers` the body is sent as one chunk. `old`: to an HTTP/1.0 client.
    """
    bodiless = status in BODILESS
    length = None if bodiless or trailers else len(body)
    chunked = bool(trailers) and not bodiless
    lines = answer_head(status, headers, length=length, chunked=chunked, keep_alive=keep_alive, old=old)
    if bodiless or head:
        return lines
    if trailers:
        return b"%b%b0\r\n%b\r\n" % (lines, b"%x\r\n%b\r\n" % (len(body), body) if body else b"", trailers)
    return lines + body


def answer_head(
    status: int, headers: bytes, *, length: int | None, chunked: bool, keep_alive: bool, old: bool = False
) -> bytes:
    """Return the head of a response with the framing of its body; without any, the connection's end ends it.

    `old`: to an HTTP/1.0 client, who waits for the connection's end unless the head says that it is kept.
    """
    lines = [b"HTTP/1.1 %d %s\r\n" % (status, _REASONS.get(status, b"")), headers, b"date: ", _today(), b"\r\n"]
    if chunked:
        lines.append(b"transfer-encoding: chunked\r\n")
    elif length is not None:
        lines.append(b"content-length: %d\r\n" % length)
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    elif old:
        lines.append(b"connection: keep-alive\r\n")
    lines.append(b"\r\n")
    return b"".join(lines)


def declared_length(headers: bytes) -> int | None:
    """Return the Content-Length among a guest's field lines; None if there is none that is a number.

    Raises:
        BadAnswerError: a number that no body's length can be, or two that differ.
    """
    found: int | None = None
    for line in headers.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length" and value.strip().isdigit():
            length = bounds.parse_number(value.strip())
            if length is None:
                raise BadAnswerError(f"a content-length of {len(value.strip())} digits")
            if found not in {None, length}:
                raise BadAnswerError(f"a content-length of {found}, and one of {length}", public=True)
            found = length
    return found


def check_length(status: int, declared: int | None, length: int, *, head: bool) -> None:
    """Compare a whole body of `length` bytes with the guest's Content-Length; None without one.

    Raises:
        BadAnswerError: they differ, and the body is one that a client would read.
    """
    if declared not in {None, length} and not head and status not in BODILESS:
        raise BadAnswerError(f"a body of {length} bytes, its content-length says {declared}", public=True)


def note(status: int, why: str, *, head: bool = False, keep_alive: bool = True, old: bool = False) -> bytes:
    """Return a response of the host's own: a status with a sentence as its body."""
    fields = b"content-type: text/plain; charset=utf-8\r\n"
    return answer(status, fields, why.encode() + b"\n", head=head, keep_alive=keep_alive, old=old)


class BadAnswerError(Exception):
    """Response of a guest that is not HTTP. `sentence`: why, for its client, without any of its bytes."""

    def __init__(self, why: str, *, public: bool = False) -> None:
        """Say why; `public`: a client may know too, as there is nothing of the guest's in it but numbers."""
        super().__init__(why)
        self.sentence = f"the component's answer is not one: {why}" if public else "the component's answer is not one"


def guest_fields(status: int, headers: bytes, length: int, most: int) -> bytes:
    """Return the guest's header fields as they may be sent, without those of framing, which the host sets.

    Raises:
        BadAnswerError: a status outside 200 to 599, a line that is no field (RFC 9110, section 5), or a body of
            `length` bytes where `most` may be.
    """
    if length > most:
        raise BadAnswerError(f"a body of {length} bytes, at most {most} are allowed (limits.response)")
    if not 200 <= status <= 599:  # noqa: PLR2004
        raise BadAnswerError(f"status {status}, which is none of a final response (200 to 599)", public=True)
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
