"""Responses of servers as they come off the wire: the reader of a client's side of HTTP/1.1. No socket.

httptools (llhttp in its strict mode) parses; what it leaves open is closed here: informational responses are skipped,
an upgrade that nobody asked for is an error, transfer codings other than `chunked` are refused, and everything that
has no end of its own is bounded. A connection is reusable only when its message has provably ended where its bytes did.
Framing is by RFC 9112, status codes are by RFC 9110.
"""

from typing import Any, Final

import httptools

FIELDS_MAX: Final = 100
HEAD_MAX_BYTES: Final = 64 * 1024  # of one head, whatever it consists of; and of what comes between two events
INFORMATIONAL_MAX: Final = 100  # heads before the final one
_OVERHEAD_BYTES: Final = 2 * HEAD_MAX_BYTES  # of framing that any body may have
_OVERHEAD_MAX: Final = 16  # bytes of framing for a byte of body beyond that
_SWITCHING: Final = 101
_FINAL: Final = 200
_BODILESS: Final = frozenset({204, 304})

Fields = list[tuple[str, str]]


class ResponseError(Exception):
    """Bytes that are no response which can be used; `error` names a case of `wasi:http/types.error-code`."""

    def __init__(self, error: str, why: str) -> None:
        super().__init__(why)
        self.error = error


class ResponseParser:
    """Reader of the response to one request."""

    def __init__(self, method: str) -> None:
        """Prepare to read the response to a request of this method: those to HEAD have no body."""
        self._bodiless = method == "HEAD"
        self._parser: Any = httptools.HttpResponseParser(self)
        # Small devices end their lines with LF alone, which a recipient may take (RFC 9112, section 2.2).
        # Chunks win over a length beside them (section 6.3); such a connection is not kept.
        self._parser.set_dangerous_leniencies(lenient_optional_cr_before_lf=True, lenient_chunked_length=True)
        self._broken: ResponseError | None = None
        self._read_bytes = self._quiet_bytes = self._body_bytes = self._head_bytes = 0
        self._informational = self._trailers = self._trailers_bytes = 0
        self._skipping = False  # inside an informational response
        self._framed = self._chunked = self._more = self._keeps = False
        self._length: int | None = None
        self.status = 0
        """Status of the final response; 0 until its head is complete."""
        self.fields: Fields = []
        self.trailers: Fields = []
        """Fields behind the body."""
        self.body = bytearray()
        """Body bytes that the caller has not taken yet."""
        self.complete = False
        """True once the response has ended."""

    @property
    def reusable(self) -> bool:
        """True if the connection may carry another request: the message ended by its framing, and nothing follows."""
        return self.complete and self._framed and not self._more and self._keeps

    def feed(self, data: bytes) -> None:
        """Take bytes of the server's.

        Raises:
            ResponseError: they are no response that can be used; nothing more may be fed.
        """
        self._read_bytes += len(data)
        self._quiet_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise self._upgrade() from None
        except httptools.HttpParserError as error:
            if self._broken is not None:
                raise self._broken from None
            if not self.complete:  # bytes after a complete response only cost the connection
                raise ResponseError("HTTP-protocol-error", f"the response is not HTTP/1.1: {error}") from None
            self._more = True
        self._check_bounds()

    def end(self) -> None:
        """Take the end of the connection.

        Raises:
            ResponseError: the response is not complete.
        """
        if self.complete:
            return
        if not self.status:
            raise ResponseError("connection-terminated", "the server closed the connection before it responded")
        if self._framed:
            raise ResponseError("HTTP-response-incomplete", "the server closed the connection within its response")
        self.complete = True  # a body without framing ends with the connection

    def _check_bounds(self) -> None:
        if self.complete:
            return
        if self._quiet_bytes > HEAD_MAX_BYTES:
            if not self.status:
                raise self._too_large(f"more than {HEAD_MAX_BYTES} bytes of head")
            raise ResponseError("HTTP-protocol-error", f"{self._quiet_bytes} bytes of framing without a byte of body")
        framing_bytes = self._read_bytes - self._body_bytes
        if self.status and framing_bytes > _OVERHEAD_BYTES * 2 + self._body_bytes * _OVERHEAD_MAX:
            raise ResponseError("HTTP-protocol-error", f"{framing_bytes} bytes of framing")

    @staticmethod
    def _too_large(why: str) -> ResponseError:
        return ResponseError("HTTP-response-header-section-size", f"the response has {why}")

    def _upgrade(self) -> ResponseError:
        return ResponseError("HTTP-upgrade-failed", "the server switches to a protocol that nobody asked for")

    def _stop(self, error: ResponseError) -> None:
        self._broken = error
        raise _StopError

    # Callbacks of the parser.

    def on_message_begin(self) -> None:
        """Start a head; a second final one is too much."""
        self._more = self._more or self.complete
        self._skipping = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a field of a head, or of the trailers."""
        if self.complete:
            return
        if self.status:
            self._trailers += 1
            self._quiet_bytes = 0
            if self._trailers > FIELDS_MAX:
                self._stop(ResponseError("HTTP-response-trailer-section-size", f"more than {FIELDS_MAX} trailers"))
            self._trailers_bytes += len(name) + len(value) + 4
            if self._trailers_bytes > HEAD_MAX_BYTES:
                what = f"more than {HEAD_MAX_BYTES} bytes of trailers"
                self._stop(ResponseError("HTTP-response-trailer-section-size", what))
            self.trailers.append((name.decode("latin-1"), value.decode("latin-1").strip(" \t")))
            return
        self._head_bytes += len(name) + len(value) + 4
        if len(self.fields) >= FIELDS_MAX:
            self._stop(self._too_large(f"more than {FIELDS_MAX} header fields"))
        if self._head_bytes > HEAD_MAX_BYTES:
            self._stop(self._too_large(f"more than {HEAD_MAX_BYTES} bytes of header fields"))
        self.fields.append((name.decode("latin-1"), value.decode("latin-1").strip(" \t")))

    def on_headers_complete(self) -> None:
        """Take the end of a head: skip it if it is informational."""
        if self.complete:
            return
        status = self._parser.get_status_code()
        if status == _SWITCHING:
            self._stop(self._upgrade())
        if self._parser.get_http_version() not in {"1.0", "1.1"} or status < 100:  # noqa: PLR2004 - classes of status
            self._stop(ResponseError("HTTP-protocol-error", "the response is not HTTP/1.1"))
        if status < _FINAL:
            self._informational += 1
            if self._informational > INFORMATIONAL_MAX:
                self._stop(
                    ResponseError("HTTP-protocol-error", f"more than {INFORMATIONAL_MAX} informational responses")
                )
            if any(name.lower() in {"content-length", "transfer-encoding"} for name, _ in self.fields):
                self._stop(ResponseError("HTTP-protocol-error", f"an informational response ({status}) with a body"))
            self._skipping = True
            self._head_bytes = self._quiet_bytes = 0
            self.fields.clear()
            return
        self._frame(status)
        # HTTP/1.0 knows no chunks, and where there is a length beside them, somebody else may have gone by that.
        sure = not self._chunked or (self._parser.get_http_version() == "1.1" and self._length is None)
        self._keeps = sure and self._parser.should_keep_alive()
        self.status = status
        self._quiet_bytes = 0
        self.complete = self._bodiless or status in _BODILESS or (self._length == 0 and not self._chunked)

    def _frame(self, status: int) -> None:
        """Find how the body ends (RFC 9112, section 6.3)."""
        for name, value in self.fields:
            match name.lower():
                case "transfer-encoding":
                    self._chunked = True
                    if value.lower() != "chunked" and not self._bodiless:
                        self._stop(ResponseError("HTTP-response-transfer-coding", f"transfer coding {value[:40]!r}"))
                case "content-length":
                    self._length = int(value)  # the parser let nothing but digits of 64 bits pass
        self._framed = self._bodiless or status in _BODILESS or self._chunked or self._length is not None

    def on_chunk_header(self) -> None:
        """Take a chunk's size."""
        self._quiet_bytes = 0

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        if self.complete:
            self._more = True
            return
        self._quiet_bytes = 0
        self._body_bytes += len(body)
        self.body += body

    def on_message_complete(self) -> None:
        """Take the end of a message, unless that was an informational one."""
        if not self._skipping:
            self.complete = self.complete or bool(self.status)


class _StopError(httptools.HttpParserError):
    pass
