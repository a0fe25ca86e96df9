"""What an instance is given of a client's request: its head, less what belongs to the client's connection. Pure."""

from dataclasses import dataclass
from typing import Final

from agent.host.heads import HOPS
from agent.host.reader import Head, tokens
from agent.host.routes import Route

_HOP: Final = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade content-length expect"
    b" x-forwarded-prefix".split()
) | {HOPS}


@dataclass(frozen=True, slots=True)
class Known:
    """What a whole request without a body was read as, and where it went."""

    request: Head
    instance: str
    head: bytes


def forwarded(request: Head, route: Route) -> bytes:
    """The head as the instance gets it: without what belongs to the client's connection (RFC 9110, section 7.6.1)."""
    named = tokens(request.fields, b"connection") - {b"host"}
    lines = [request.method, b" ", route.target, b" HTTP/1.0\r\n" if request.old else b" HTTP/1.1\r\n"]
    lines += [b"%b: %b\r\n" % each for each in request.fields if each[0] not in _HOP and each[0] not in named]
    if route.prefix:
        lines.append(b"x-forwarded-prefix: " + route.prefix + b"\r\n")
    if request.old:
        lines.append(b"connection: keep-alive\r\n")
    elif b"trailers" in tokens(request.fields, b"te"):
        lines.append(b"te: trailers\r\nconnection: te\r\n")
    if request.chunked:
        lines.append(b"transfer-encoding: chunked\r\n")
    elif request.length is not None:
        lines.append(b"content-length: %d\r\n" % request.length)
    return b"".join([*lines, b"\r\n"])
