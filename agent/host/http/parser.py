"""Request parser: the one reader of HTTP/1.1, shared by the router and the workers.

Since both read with it, they cannot disagree about where a request ends. httptools (llhttp in its strict mode) parses;
what it leaves open is closed here: versions, the Host field, forms of the request target, transfer codings, sizes of
what has no end, trailers (which are never mixed into the head), and what follows an offer to upgrade (which is not
taken up, so the connection stays HTTP). RFC 9112 for framing, RFC 9110 for fields. No socket, no policy.

What is refused is refused with a status, and the connection ends: after a message that was not understood nobody knows
where the next one begins.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import httptools

HEAD_MAX_BYTES: Final = 64 * 1024
FIELDS_MAX: Final = 100
_SPARE_FIELDS: Final = 4
_SPARE_BYTES: Final = 512
QUIET_MAX_BYTES: Final = 2 * HEAD_MAX_BYTES
"""Bytes that may come and are nothing yet: a field, a target or a chunk's extension without an end."""

_OVERHEAD_MAX: Final = 16
"""Bytes of framing (chunk sizes, extensions) for a byte of body, where it is more than a head may have."""

_METHOD: Final = re.compile(rb"(?:\r\n)*[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64} ")
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9\-._~!$&'()*+,;=%]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
_ABSOLUTE: Final = re.compile(rb"https?://([^/?#]*)([^#]*)", re.IGNORECASE)
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding", b"expect"})
_NOT_TRAILERS: Final = frozenset(
    b"authorization cache-control connection content-encoding content-length content-range content-type cookie expect"
    b" host keep-alive max-forwards proxy-authenticate proxy-authorization range set-cookie te trailer"
    b" transfer-encoding upgrade www-authenticate x-forwarded-prefix x-wasmfleet-hops".split()
)

Fields = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class RequestHead:
    """A request's head.

    Attributes:
        method: as sent.
        target: in origin-form (or `*`); an absolute-form's authority has replaced the Host field.
        fields: names in lower case, values without white space around them.
        host: the Host field's value, empty without one.
        length: what Content-Length says, None without one.
        chunked: whether the body comes in chunks.
        expects: whether the client waits for 100 Continue.
        old: whether it speaks HTTP/1.0: no chunks for it.
    """

    method: bytes = b""
    target: bytes = b""
    fields: Fields = field(default_factory=list)
    host: bytes = b""
    length: int | None = None
    chunked: bool = False
    expects: bool = False
    old: bool = False

    @property
    def has_body(self) -> bool:
        """True if a body is announced, be it an empty one in chunks."""
        return self.chunked or bool(self.length)


class Sink(Protocol):
    """Receiver of what the parser reads."""

    def head(self, head: RequestHead) -> None:
        """Begin a request; `refuse` may be called from here."""

    def body(self, data: bytes) -> None:
        """Take a piece of its body; `refuse` may be called from here."""

    def end(self, trailers: Fields, *, keep_alive: bool) -> None:
        """End the request, which is complete."""

    def refused(self, status: int) -> None:
        """Take note of a request that cannot be served, by its status; nothing after it is read."""


class RequestParser:
    """Reads one connection."""

    def __init__(self, sink: Sink, *, spare: bool = False) -> None:
        """`spare`: what is read is passed on with fields added, and must still be small enough for the next reader."""
        self._sink = sink
        self._fields_max = FIELDS_MAX - (_SPARE_FIELDS if spare else 0)
        self._head_max = HEAD_MAX_BYTES - (_SPARE_BYTES if spare else 0)
        self._parser: Any = httptools.HttpRequestParser(self)
        self._target = b""
        self._fields: Fields = []
        self._trailers: Fields = []
        self._head: RequestHead | None = None
        self._size = 0
        self._ghost = False  # the parser reads a head of ours, see `_carry_on`
        self._ended = True
        self._messages = 0  # ended so far
        self._last = False  # the message that ended was the connection's last
        self._quiet = self._raw = self._bytes = 0
        self._status = 0
        self.within = False
        """True inside a message."""
        self.refused = False

    def feed(self, data: bytes) -> None:
        """Take bytes of the client's."""
        if self.refused:
            return
        self._quiet += len(data)
        if self.within:
            self._raw += len(data)
        begins, before, whole = not self.within, self._messages, data
        try:
            while data:
                data = self._feed(data)
        except httptools.HttpParserInvalidMethodError:
            if begins and self._messages == before and _METHOD.match(whole):
                self._status = 501
            self._refuse()
            return
        except httptools.HttpParserError:
            self._refuse()
            return
        if not self.within:
            self._quiet = 0
        elif self._quiet > QUIET_MAX_BYTES or self._raw > HEAD_MAX_BYTES * 2 + self._bytes * (_OVERHEAD_MAX + 1):
            self._status = 431 if self._head is None else 400
            self._refuse()

    def refuse(self, status: int) -> None:
        """Stop reading this message; called by the sink."""
        self._status = status
        raise _StopError

    def give_up(self, status: int) -> None:
        """Stop reading between two pieces of what the client sends."""
        self._status = status
        self._refuse()

    def _refuse(self) -> None:
        self.refused = True
        self.within = False
        # Nothing is read any more, and the connection lingers: without what came of the head.
        self._parser, self._target, self._fields, self._trailers = None, b"", [], []
        self._sink.refused(self._status or 400)

    def _feed(self, data: bytes) -> bytes:
        """Parse; return what is left for another parser."""
        if self._last and data.strip(b"\r\n"):
            raise _StopError
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._carry_on(data[upgrade.args[0] :])
        return b""

    def _carry_on(self, rest: bytes) -> bytes:
        """Ignore an offer of another protocol, at which the parser stops (RFC 9110, section 7.8)."""
        self._parser = httptools.HttpRequestParser(self)
        head = self._head
        if not self._ended and head is not None:
            framing = b"transfer-encoding: chunked" if head.chunked else b"content-length: %d" % (head.length or 0)
            close = b"connection: close\r\n" if _closes(head.fields) else b""
            self._ghost = True
            self._parser.feed_data(b"POST / HTTP/1.1\r\nhost: x\r\n%b%b\r\n\r\n" % (close, framing))
            self._ghost = False
        return rest

    # Called by httptools.

    def on_message_begin(self) -> None:
        """Begin a message."""
        if self._ghost:
            return
        self.within, self._ended = True, False
        self._head = None
        self._target = b""
        self._fields, self._trailers = [], []
        self._size = self._raw = self._bytes = 0

    def on_url(self, url: bytes) -> None:
        """Add a piece of the request target."""
        if not self._ghost:
            self._count(len(url))
            self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a field of the head, or of the trailers."""
        if self._ghost:
            return
        self._quiet = 0
        self._count(len(name) + len(value) + 4)
        known = self._fields if self._head is None else self._trailers
        if len(known) >= self._fields_max:
            self.refuse(431)
        known.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        """Check the head, which is complete, and pass it on."""
        if self._ghost:
            return
        self._quiet = 0
        head = RequestHead(self._parser.get_method(), self._target, self._fields)
        status = check(head, self._parser.get_http_version())
        if status:
            self.refuse(status)
        self._head = head
        self._sink.head(head)

    def on_chunk_header(self) -> None:
        """Note that a chunk's size and extensions are complete."""
        self._quiet = 0

    def on_body(self, body: bytes) -> None:
        """Pass on a piece of the body."""
        self._quiet = 0
        self._bytes += len(body)
        self._sink.body(body)

    def on_message_complete(self) -> None:
        """End the message, unless httptools stopped at an offer to upgrade and its body is still to come."""
        assert self._head is not None
        if self._parser.should_upgrade() and self._head.has_body:
            return
        self._ended, self.within = True, False
        self._messages += 1
        self._quiet = 0
        keep_alive = self._parser.should_keep_alive()
        self._last = not keep_alive
        trailers = [each for each in self._trailers if each[0] not in _NOT_TRAILERS]
        self._sink.end(trailers, keep_alive=keep_alive)

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > self._head_max:
            self.refuse(431)


class _StopError(httptools.HttpParserError):
    pass


def check(head: RequestHead, version: str) -> int:
    """Complete a head from its fields; return the status to refuse it with, 0 for none."""
    head.old = version == "1.0"
    if not head.old and version != "1.1":
        return 505
    hosts = 0
    for name, value in head.fields:
        if name == b"host":
            hosts += 1
            head.host = value
        elif name in _FRAMING and (status := _frame(head, name, value.lower())):
            return status
    if head.method == b"CONNECT":
        return 501
    needed = hosts == 1 or (head.old and not hosts)
    if not needed or _HOST.fullmatch(head.host) is None or (head.chunked and head.old):
        return 400
    return _check_target(head)


def _frame(head: RequestHead, name: bytes, value: bytes) -> int:
    if name == b"content-length":
        head.length = int(value)  # the parser let nothing but digits pass
    elif name == b"transfer-encoding":
        head.chunked = True
        return 0 if value == b"chunked" else 501
    else:
        head.expects = not head.old
        return 0 if value == b"100-continue" else 417
    return 0


def _check_target(head: RequestHead) -> int:
    """Check the form of a request target (RFC 9112, section 3.2)."""
    target = head.target
    if target.startswith(b"/"):
        return 400 if b"#" in target else 0
    if target == b"*":
        return 0 if head.method == b"OPTIONS" else 400
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or not absolute[1] or _HOST.fullmatch(absolute[1]) is None:
        return 400
    head.host, path = absolute[1], absolute[2]
    if not path and head.method == b"OPTIONS":
        head.target = b"*"
    else:
        head.target = path if path.startswith(b"/") else b"/" + path
    head.fields[:] = [(b"host", head.host), *(each for each in head.fields if each[0] != b"host")]
    return 0


def tokens(fields: Fields, name: bytes) -> set[bytes]:
    """Return the members of a list-valued field, in lower case."""
    return {token.strip(b" \t").lower() for known, value in fields if known == name for token in value.split(b",")} - {
        b""
    }


def _closes(fields: Fields) -> bool:
    return b"close" in tokens(fields, b"connection")
