"""Route table; headers that are forwarded.

Which instance a request on the shared port is for: by path (`/<instance>/...`) or by host (`<instance>.<anything>`).

Pure over the head of a request. The host wins, since a client that sends `Host: meter.device` means it. The first
segment of a path is taken off, and passed to the instance in `x-forwarded-prefix`.

What an instance is given of a client's request: its head, less what belongs to the client's connection. Pure.
"""

import re
from dataclasses import dataclass
from typing import Final

from agent.host.http.parser import RequestHead, tokens
from agent.host.ipc import heads

_IPV4: Final = re.compile(rb"\d+\.\d+\.\d+\.\d+(:\d+)?")
_LISTED_MAX: Final = 100


@dataclass(frozen=True, slots=True)
class Known:
    """Reading of a whole request without a body, and where it went."""

    request: RequestHead
    instance: str
    head: bytes


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes: an instance and its target there, or a status with a sentence.

    `own`: it came by a listener of the instance's own, and stays as it is.
    """

    instance: str = ""
    target: bytes = b""
    prefix: bytes = b""
    status: int = 0
    why: str = ""
    own: bool = False


class OwnRoute:
    """Route of every request at a listener that is one instance's own."""

    def __init__(self, instance: str) -> None:
        self.known: dict[bytes, Known] = {}
        self._instance = instance

    def find(self, _host: bytes, target: bytes) -> Route:
        """Return the route, on which a request stays as it is."""
        return Route(instance=self._instance, target=target, own=True)


class RouteTable:
    """The instances behind the shared port: name -> whether it answers at present."""

    def __init__(self) -> None:
        self.up: dict[str, bool] = {}

    def find(self, host: bytes, target: bytes) -> Route:
        """Where a request with this Host and request target goes."""
        target = _origin_form(target)
        label, dot, _ = host.partition(b".")
        name = label.decode("latin-1").lower()
        if dot and name in self.up and _IPV4.fullmatch(host) is None:
            return self._to(name, target, b"")
        path, query_mark, query = target.partition(b"?")
        first, slash, rest = path[1:].partition(b"/")
        name = first.decode("latin-1")
        if path.startswith(b"/") and name in self.up:
            return self._to(name, b"/" + rest + query_mark + query, b"/" + first)
        del slash
        return Route(status=404, why=self._listing(name))

    def _to(self, name: str, target: bytes, prefix: bytes) -> Route:
        if not self.up[name]:
            return Route(status=503, why=f"{name} is not answering at present; try again in a little while")
        return Route(instance=name, target=target, prefix=prefix)

    def _listing(self, name: str) -> str:
        what = f"no instance {name!r} runs on this device" if name else "name an instance in the path"
        known = sorted(self.up)[:_LISTED_MAX]
        return f"{what}; here are: {', '.join(f'/{each}/' for each in known)}" if known else f"{what}; there are none"


def _origin_form(target: bytes) -> bytes:
    """RFC 9112, section 3.2: the absolute form names scheme and host before the path."""
    for scheme in (b"http://", b"https://"):
        if target.lower().startswith(scheme):
            _, slash, path = target[len(scheme) :].partition(b"/")
            return slash + path if slash else b"/"
    return target or b"/"


HOPS_HEADER: Final = b"x-wasmfleet-hops"
"""The field that tells a neighbour on the device how many others a request has come through; the adapter reads it."""


_HOP: Final = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade content-length expect"
    b" x-forwarded-prefix".split()
) | {HOPS_HEADER}


def guest_head(request: RequestHead, route: Route) -> bytes:
    """Return the head as a guest gets it in a frame."""
    if route.own:
        lines = [b"%b: %b\r\n" % each for each in request.fields]
    else:
        lines = _forwarded_lines(request, route)
        if request.chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        elif request.length is not None:
            lines.append(b"content-length: %d\r\n" % request.length)
    return heads.request_head(request.method, route.target, b"".join(lines))


def _forwarded_lines(request: RequestHead, route: Route) -> list[bytes]:
    """Return field lines without those of the client's connection (RFC 9110, section 7.6.1)."""
    named = tokens(request.fields, b"connection") - {b"host"}
    lines = [b"%b: %b\r\n" % each for each in request.fields if each[0] not in _HOP and each[0] not in named]
    if route.prefix:
        lines.append(b"x-forwarded-prefix: " + route.prefix + b"\r\n")
    return lines


def forwarded_head(request: RequestHead, route: Route) -> bytes:
    """Return the head as an instance gets it on a connection."""
    lines = [request.method, b" ", route.target, b" HTTP/1.0\r\n" if request.old else b" HTTP/1.1\r\n"]
    lines += _forwarded_lines(request, route)
    if request.old:
        lines.append(b"connection: keep-alive\r\n")
    elif b"trailers" in tokens(request.fields, b"te"):
        lines.append(b"te: trailers\r\nconnection: te\r\n")
    if request.chunked:
        lines.append(b"transfer-encoding: chunked\r\n")
    elif request.length is not None:
        lines.append(b"content-length: %d\r\n" % request.length)
    return b"".join([*lines, b"\r\n"])
