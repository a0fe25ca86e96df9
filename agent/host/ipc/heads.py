"""Heads of an exchange between the host and a guest, as the adapter reads and writes them.

The request's head is a string in, a few words are the end of the answer (components/adapter/wit/adapter.wit). No
wasmtime here, no I/O.
"""

from dataclasses import dataclass
from typing import Final

from fleet.protocol.bounds import parse_number

# wasi:http/types.error-code, in its order
ERRORS: Final = (
    *("DNS-timeout", "DNS-error", "destination-not-found", "destination-unavailable", "destination-IP-prohibited"),
    *("destination-IP-unroutable", "connection-refused", "connection-terminated", "connection-timeout"),
    *("connection-read-timeout", "connection-write-timeout", "connection-limit-reached", "TLS-protocol-error"),
    *("TLS-certificate-error", "TLS-alert-received", "HTTP-request-denied", "HTTP-request-length-required"),
    *("HTTP-request-body-size", "HTTP-request-method-invalid", "HTTP-request-URI-invalid"),
    *("HTTP-request-URI-too-long", "HTTP-request-header-section-size", "HTTP-request-header-size"),
    *("HTTP-request-trailer-section-size", "HTTP-request-trailer-size", "HTTP-response-incomplete"),
    *("HTTP-response-header-section-size", "HTTP-response-header-size", "HTTP-response-body-size"),
    *("HTTP-response-trailer-section-size", "HTTP-response-trailer-size", "HTTP-response-transfer-coding"),
    *("HTTP-response-content-coding", "HTTP-response-timeout", "HTTP-upgrade-failed", "HTTP-protocol-error"),
    *("loop-detected", "configuration-error", "internal-error"),
)
REQUEST_DENIED: Final = ERRORS.index("HTTP-request-denied")

WHOLE: Final = b"0 whole\r\n\r\n"
"""End of an answer, as `answer_head` reads it; its head has gone before."""

CUT: Final = b"0 cut\r\n\r\n"
HEADLESS: Final = b"0 headless\r\n\r\n"
REQUEST_TOO_LARGE: Final = b"error %d" % ERRORS.index("HTTP-request-body-size")
HEAD_TOO_LARGE: Final = b"error %d" % ERRORS.index("HTTP-response-header-section-size")


def utf8(data: bytes) -> bytes:
    """Decode bytes for a string that a guest is given: field values may be any bytes, and Latin-1 reads them all."""
    if data.isascii():
        return data
    try:
        data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1").encode()
    return data


def request_head(method: bytes, target: bytes, headers: bytes, trailers: bytes = b"") -> bytes:
    """Return the head as the adapter reads it; fields are lines as on the wire, names in lower case."""
    authority = b""
    if target[:7].lower() == b"http://":  # absolute-form, RFC 9112 section 3.2.2: it overrides the field
        authority, slash, path = target[7:].partition(b"/")
        target = slash + path
    else:
        at = 0 if headers.startswith(b"host:") else headers.find(b"\r\nhost:") + 2
        if headers.startswith(b"host:", at):
            authority = headers[at + 5 : headers.index(b"\r\n", at)].strip()
    lines = b"%b\r\n%b" % (headers, trailers) if trailers else headers
    if not lines.isascii():
        lines = lines.decode("latin-1").encode()
    return b"%b %b http %b\r\n%b" % (method, utf8(target), utf8(authority) if b" " not in authority else b"", lines)


def request_parts(head: bytes) -> tuple[bytes, bytes, bytes]:
    """Return method, target and field lines of a head as `request_head` makes it."""
    line, _, fields = head.partition(b"\r\n")
    method, target, *_ = line.split(b" ")
    return method, target, fields if fields.isascii() else fields.decode().encode("latin-1")


def native_head(status: int, fields: bytes, length: int) -> bytes:
    """Return the head of a native guest's answer, whose body of `length` bytes is whole, as the adapter writes one."""
    if b"content-length:" not in fields.lower():  # the router need not wait then to refuse a large body
        fields = b"content-length: %d\r\n%b" % (length, fields)
    return b"%d\r\n%b" % (status, fields if fields.isascii() else fields.decode("latin-1").encode())


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The answer's head: its status and field lines, or what is wrong with the answer, as a sentence.

    A status of 0 says that the head stands before the body (`split_head`).
    """

    status: int
    headers: bytes
    problem: str | None = None
    trailers: bytes = b""


def answer_head(raw: bytes) -> ResponseHead:
    """Read what the adapter says of the guest's answer when the call has ended."""
    raw = _latin1(raw)
    first, _, rest = raw.partition(b"\r\n")
    match first.split(b" "):
        case [said, b"whole"] if (status := parse_number(said)) is not None:
            fields, trailers = _until_empty_line(rest)
            return ResponseHead(status, fields, trailers=trailers)
        case [_, b"cut"]:
            return ResponseHead(502, b"", "the component dropped its answer's body before its end")
        case [_, b"headless"]:
            return ResponseHead(502, b"", "the component wrote an answer without the end of a head")
        case [b"error", said] if (case := parse_number(said)) is not None and case < len(ERRORS):
            return ResponseHead(500, b"", f"the component answered with the error {ERRORS[case]}")
        case _:
            return ResponseHead(500, b"", "the component gave no answer")


def split_head(raw: bytes) -> tuple[int, bytes, bytes]:
    """Status, field lines and body of what stands on standard output; raises ValueError if that is no head."""
    head, end, body = raw.partition(b"\r\n\r\n")
    if not end:
        raise ValueError("no head")
    first, _, fields = (head + b"\r\n").partition(b"\r\n")
    status = parse_number(first)
    if status is None:
        raise ValueError("its head begins with no status")
    return status, _latin1(fields), body


def _until_empty_line(lines: bytes) -> tuple[bytes, bytes]:
    if lines.startswith(b"\r\n"):
        return b"", lines[2:]
    before, _, after = lines.partition(b"\r\n\r\n")
    return before + b"\r\n", after


def _latin1(raw: bytes) -> bytes:
    return raw if raw.isascii() else raw.decode(errors="replace").encode("latin-1", errors="replace")
