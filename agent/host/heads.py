"""An exchange with a guest of wasi:http: what its heads look like, and where its answer's body goes.

It is one call: the request's head as a string in, the answer's head as a string back
(components/adapter/wit/adapter.wit). The request's body is the store's standard input. The answer's body is the
process's own standard output: written there by the engine without a callback (which would cost a change of threads for
each chunk), into memory that `take` empties after the call. `catch` puts that memory in place of descriptor 1, which in
a lane nobody else writes to, before the cell is shut. No wasmtime here.
"""

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

_OUT: Final = 1

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


def catch() -> None:
    """Put memory in place of standard output. Raises OSError where the kernel has no memfd."""
    fd = os.memfd_create("answers")
    try:
        # Appending, so that emptying it needs no seek.
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        os.dup2(fd, _OUT, inheritable=False)
    finally:
        os.close(fd)


def take(most: int) -> bytes:
    """What was written since the last time, at most `most` + 1 bytes of it: one more says that it was too much."""
    size = os.lseek(_OUT, 0, os.SEEK_END)
    if not size:
        return b""
    body = os.pread(_OUT, min(size, most + 1), 0)
    os.ftruncate(_OUT, 0)
    return body


def utf8(data: bytes) -> bytes:
    """What a guest may be given as a string: field values may be any bytes, and Latin-1 reads them all."""
    if data.isascii():
        return data
    try:
        data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1").encode()
    return data


def request_head(method: bytes, target: bytes, headers: bytes) -> bytes:
    """The head as the adapter reads it; `headers` are field lines as on the wire, names in lower case."""
    authority = b""
    if target[:7].lower() == b"http://":  # absolute-form, RFC 9112 section 3.2.2: it overrides the field
        authority, slash, path = target[7:].partition(b"/")
        target = slash + path
    else:
        at = 0 if headers.startswith(b"host:") else headers.find(b"\r\nhost:") + 2
        if headers.startswith(b"host:", at):
            authority = headers[at + 5 : headers.index(b"\r\n", at)].strip()
    if not headers.isascii():
        headers = headers.decode("latin-1").encode()
    return b"%b %b http %b\r\n%b" % (method, utf8(target), utf8(authority) if b" " not in authority else b"", headers)


HOPS: Final = b"x-wasmfleet-hops"
"""The field that tells a neighbour on the board how many others a request has come through."""


def hops(headers: bytes) -> int:
    """That of a request's field lines, names in lower case; 0 for one that came from outside."""
    at = 0 if headers.startswith(HOPS + b":") else headers.find(b"\r\n" + HOPS + b":") + 2
    if not headers.startswith(HOPS + b":", at):
        return 0
    said = headers[at + len(HOPS) + 1 :].partition(b"\r\n")[0].strip()
    return int(said) if said.isdigit() and len(said) < 3 else 99  # noqa: PLR2004 - as many as nobody may have


class Requests(Protocol):
    """What the adapter asks for outgoing requests: its interface `host`, and what stands around a call."""

    hops: int

    def begin(self) -> int:
        """A request more: its number."""

    def write(self, number: int, data: str) -> int:
        """A piece of its body."""

    def send(self, number: int, head: str) -> int:
        """Send it."""

    def head(self, number: int) -> str:
        """The head of its answer."""

    def read(self, number: int, most: int) -> str:
        """A piece of its answer's body."""

    def close(self, number: int) -> None:
        """It is not needed any more."""

    def reset(self) -> None:
        """Nor is any other."""


class Nowhere:
    """The requests of an instance that may send none."""

    hops = 0

    def __init__(self, log: Callable[[str], None], denied: Callable[[], None] = lambda: None) -> None:
        self._log = log
        self._denied = denied

    def begin(self) -> int:
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
class Head:
    """The answer's head: its status and field lines, or what is wrong with the answer, as a sentence."""

    status: int
    headers: bytes
    problem: str | None = None


def answer_head(raw: bytes) -> Head:
    """Read what the adapter says of the guest's answer."""
    if not raw.isascii():
        raw = raw.decode(errors="replace").encode("latin-1", errors="replace")
    first, _, rest = raw.partition(b"\r\n")
    match first.split(b" "):
        case [status, b"whole"] if status.isdigit():
            # The trailers after the empty line are left behind: an answer goes out whole, with its length.
            fields = b"" if rest.startswith(b"\r\n") else rest.partition(b"\r\n\r\n")[0] + b"\r\n"
            return Head(int(status), fields)
        case [_, b"cut"]:
            return Head(502, b"", "the component dropped its answer's body before its end")
        case [b"error", number] if number.isdigit() and int(number) < len(ERRORS):
            return Head(500, b"", f"the component answered with the error {ERRORS[int(number)]}")
        case _:
            return Head(500, b"", "the component gave no answer")
