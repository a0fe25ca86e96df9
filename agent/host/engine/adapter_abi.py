"""Formats that host and adapter exchange: heads, error codes, standard-output pipe.

An exchange with a guest of wasi:http: what its heads look like, and where its answer's body goes.

It is one call: the request's head as a string in, a few words as a string back (components/adapter/wit/adapter.wit).
The request's body is the store's standard input. The answer's head and body are the process's own standard output:
written there by the engine without a callback, which would cost a change of threads for each chunk;
`agent.host.worker.streaming` says where they go. No wasmtime here, and no descriptor.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

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


class Requests(Protocol):
    """Outgoing requests as the adapter asks for them: functions of its interface `host`."""

    def begin(self, hops: int) -> int:
        """Begin a request of a call that came through `hops` neighbours on this device, and return its number."""

    def write(self, number: int, data: str) -> int:
        """Send a piece of its body."""

    def send(self, number: int, head: str) -> int:
        """Send it."""

    def head(self, number: int) -> str:
        """Return the head of its answer."""

    def read(self, number: int, most: int) -> str:
        """Return a piece of its answer's body."""

    def close(self, number: int) -> None:
        """Forget a request that is not needed any more."""

    def reset(self) -> None:
        """Forget all requests: the call is over."""


class DenyOutgoing:
    """The requests of an instance that may send none."""

    def __init__(self, log: Callable[[str], None], denied: Callable[[], None] = lambda: None) -> None:
        self._log = log
        self._denied = denied

    def begin(self, _hops: int) -> int:
        """See `Requests`."""
        return 1

    def write(self, _number: int, _data: str) -> int:
        """See `Requests`."""
        return 0

    def send(self, _number: int, head: str) -> int:
        """Denied, and said in the log."""
        method, target, scheme, authority, *_ = head.partition("\r\n")[0].split(" ")
        self._denied()
        self._log(f"host: {method} {scheme}://{authority}{target} is denied: no outgoing requests are granted")
        return 1 + REQUEST_DENIED

    def head(self, _number: int) -> str:
        """See `Requests`."""
        return f"error {REQUEST_DENIED}"

    def read(self, _number: int, _most: int) -> str:
        """See `Requests`."""
        return "."

    def close(self, _number: int) -> None:
        """See `Requests`."""

    def reset(self) -> None:
        """See `Requests`."""


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


PIPE_BYTES: Final = 1024 * 1024
READ_BYTES: Final = 64 * 1024

_OUT: Final = 1
_SET_PIPE_SIZE: Final = 1031

stdout_pipe: list[int] = []


def catch_stdout() -> None:
    """Put a pipe in place of standard output, before the cell is shut. Raises OSError where there can be none."""
    inner, outer = os.pipe2(os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a user has only so many large pipes: then guests stand still sooner
            fcntl.fcntl(inner, _SET_PIPE_SIZE, PIPE_BYTES)
        os.set_blocking(inner, False)
        os.dup2(outer, _OUT, inheritable=False)
    finally:
        os.close(outer)
    while stdout_pipe:
        os.close(stdout_pipe.pop())
    stdout_pipe.append(inner)


def drain_stdout() -> bytes:
    """Return what stands in the pipe; nothing where there is none."""
    pieces = []
    with contextlib.suppress(BlockingIOError):
        while stdout_pipe:
            pieces.append(os.read(stdout_pipe[0], PIPE_BYTES))
            if len(pieces[-1]) < READ_BYTES:
                break
    return b"".join(pieces)
