"""Route table; headers that are forwarded.

Which instance a request on the shared port is for: by the owner's rules (host name and path prefix, `IngressRules`),
then by host (`<instance>.<anything>`) or by path (`/<instance>/...`), then by the owner's rule for everything else.

Pure over the head of a request. A host that a rule names is served by the rules of that host alone. Otherwise a rule's
path wins over an instance's name, and of several rules the longest path. By name, the host wins, since a client that
sends `Host: meter.device` means it; the first segment of a path is taken off, and passed to the instance in
`x-forwarded-prefix`.
Paths are compared as sent, whole segments: nothing is decoded, so a rule is no access control.

What an instance is given of a client's request: its head, less what belongs to the client's connection. Pure.
"""

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from agent.host.http.parser import RequestHead, tokens
from agent.host.ipc import heads
from agent.host.ipc.helper_api import ForwardedPolicy, IngressRules, RouteRule

_IPV4: Final = re.compile(rb"\d+\.\d+\.\d+\.\d+(:\d+)?")
_LISTED_MAX: Final = 100
_NOT_FOUND: Final = 404
_HOST_MAX_BYTES: Final = 255


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
    request_max: int | None = None  # bytes of its body


class Peer(NamedTuple):
    """Client of a connection: its address, and the scheme by which it came."""

    address: str
    scheme: bytes = b"http"


class RouteTable:
    """The instances behind the shared port (name -> whether it answers at present) and the owner's rules."""

    def __init__(self) -> None:
        self.up: dict[str, bool] = {}
        self.forwarding = Forwarding(ForwardedPolicy())
        self._by_name = True
        self._hosts: dict[str, list[RouteRule]] = {}  # by host, or suffix with its dot, or empty for any; longest first

    def configure(self, rules: IngressRules) -> None:
        """Take over the owner's rules, in place of those before."""
        self.forwarding = Forwarding(rules.forwarded)
        self._by_name = rules.by_name
        self._hosts = {}
        for rule in sorted(rules.rules, key=lambda rule: -len(rule.path)):
            self._hosts.setdefault(rule.host.removeprefix("*"), []).append(rule)

    def route(self, request: RequestHead) -> Route:
        """Where a request goes, or the status with which its size is refused."""
        found = self.find(request.host, request.target, head_bytes=_head_bytes(request))
        if found.request_max is not None and (request.length or 0) > found.request_max:
            return Route(
                status=413, why=f"the request's body is larger than the {found.request_max} bytes allowed here"
            )
        return found

    def find(self, host: bytes, target: bytes, *, head_bytes: int = 0) -> Route:
        """Where a request with this Host and request target goes."""
        target = _origin_form(target)
        path = target.partition(b"?")[0].decode("latin-1")
        rules = next((self._hosts[name] for name in _names(host) if name in self._hosts), None)
        for rule in self._hosts.get("", ()) if rules is None else rules:
            if rule.path and (path == rule.path or path.startswith(f"{rule.path}/")):
                return self._by_rule(rule, target, head_bytes)
        rest = [rule for rule in (self._hosts.get("", ()) if rules is None else rules) if not rule.path]
        if rules is None and self._by_name:
            found = self._named(host, target)
            if found.status != _NOT_FOUND or not rest:
                return found
        if rest and path.startswith("/"):
            return self._by_rule(rest[0], target, head_bytes)
        return Route(status=404, why="nothing is routed here")

    def _by_rule(self, rule: RouteRule, target: bytes, head_bytes: int) -> Route:
        if rule.head_bytes is not None and head_bytes > rule.head_bytes:
            return Route(status=431, why=f"the request's head is larger than the {rule.head_bytes} bytes allowed here")
        if rule.instance not in self.up:
            return Route(status=503, why=f"{rule.instance} does not run on this device at present")
        prefix = rule.path.encode("latin-1") if rule.strip else b""
        target = target[len(prefix) :]
        found = self._to(rule.instance, target if target.startswith(b"/") else b"/" + target, prefix)
        return found if found.status or rule.request_bytes is None else replace(found, request_max=rule.request_bytes)

    def _named(self, host: bytes, target: bytes) -> Route:
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


def _names(host: bytes) -> Iterator[str]:
    """Yield the keys under which rules for a Host field stand, the most specific first; none for one too long."""
    name = re.sub(rb":[0-9]*$", b"", host).decode("latin-1").lower().rstrip(".")
    if not 0 < len(name) <= _HOST_MAX_BYTES:  # the keys of 64 KiB of labels take a third of a second to look up
        return
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at:]
        at = name.find(".", at + 1)


def _head_bytes(request: RequestHead) -> int:
    """Return the size of a head as its client sent it, but for white space."""
    fields = sum(len(name) + len(value) + 4 for name, value in request.fields)
    return len(request.method) + len(request.target) + 14 + fields


_TELLS_OF_CLIENTS: Final = frozenset(
    b"forwarded x-forwarded x-forwarded-for x-forwarded-proto x-forwarded-protocol x-forwarded-host x-forwarded-port"
    b" x-forwarded-server x-forwarded-ssl x-forwarded-scheme x-url-scheme x-real-ip x-client-ip x-cluster-client-ip"
    b" true-client-ip front-end-https".split()
)


class Forwarding:
    """Policy by which fields tell instances of a client."""

    def __init__(self, policy: ForwardedPolicy) -> None:
        self._mode = policy.mode
        self._trusted = tuple(ipaddress.ip_network(each) for each in policy.trust)

    @property
    def by_client(self) -> bool:
        """True if what an instance is told depends on the client's address."""
        return self._mode == "set"

    def drops(self, peer: Peer | None) -> bool:
        """Tell whether what a client says of itself is taken off."""
        return self._mode != "pass" and not (self.by_client and self._is_trusted(peer))

    def told(self, request: RequestHead, peer: Peer | None) -> list[bytes]:
        """Return the field lines to add for a request of this client."""
        if not self.by_client or peer is None:
            return []
        given = dict(request.fields) if self._is_trusted(peer) else {}
        chain = [value for name, value in request.fields if name == b"x-forwarded-for"] if given else []
        lines = [b"x-forwarded-for: " + b", ".join([*chain, peer.address.encode()])]
        if b"x-forwarded-proto" not in given:
            lines.append(b"x-forwarded-proto: " + peer.scheme)
        if b"x-forwarded-host" not in given and 0 < len(request.host) <= _HOST_MAX_BYTES:
            lines.append(b"x-forwarded-host: " + request.host)
        return [line + b"\r\n" for line in lines]

    def _is_trusted(self, peer: Peer | None) -> bool:
        if peer is None or not self._trusted:
            return False
        try:
            address = ipaddress.ip_address(peer.address)
        except ValueError:
            return False
        return any(address in network for network in self._trusted)


def plain_address(text: str) -> str:
    """Return an address as people write it: without a zone, and IPv4 as such where IPv6 carries it."""
    text = text.partition("%")[0]
    return text.removeprefix("::ffff:") if "." in text else text


def _origin_form(target: bytes) -> bytes:
    """RFC 9112, section 3.2: the absolute form names scheme and host before the path."""
    for scheme in (b"http://", b"https://"):
        if target.lower().startswith(scheme):
            _, slash, path = target[len(scheme) :].partition(b"/")
            return slash + path if slash else b"/"
    return target or b"/"


class OwnRoute:
    """Route of every request at a listener that is one instance's own; the owner's rules are for the shared port."""

    def __init__(self, instance: str) -> None:
        self.known: dict[bytes, Known] = {}
        self.forwarding = Forwarding(ForwardedPolicy())
        self._instance = instance

    def route(self, request: RequestHead) -> Route:
        """Return the route, on which a request stays as it is."""
        return Route(instance=self._instance, target=request.target, own=True)


HOPS_HEADER: Final = b"x-wasmfleet-hops"
"""The field that tells a neighbour on the device how many others a request has come through; the adapter reads it."""


_HOP: Final = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade content-length expect"
    b" x-forwarded-prefix".split()
) | {HOPS_HEADER}


def guest_head(
    request: RequestHead, route: Route, forwarding: Forwarding | None = None, peer: Peer | None = None
) -> bytes:
    """Return the head as a guest gets it in a frame.

    `forwarding`: what it is told of the client `peer`; None for what the client itself says.
    """
    if route.own:
        lines = [b"%b: %b\r\n" % each for each in request.fields]
    else:
        lines = _forwarded_lines(request, route, forwarding, peer)
        if request.chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        elif request.length is not None:
            lines.append(b"content-length: %d\r\n" % request.length)
    return heads.request_head(request.method, route.target, b"".join(lines))


def _forwarded_lines(
    request: RequestHead, route: Route, forwarding: Forwarding | None, peer: Peer | None
) -> list[bytes]:
    """Return field lines without those of the client's connection (RFC 9110, section 7.6.1)."""
    named = tokens(request.fields, b"connection") - {b"host"}
    fields = [each for each in request.fields if each[0] not in _HOP and each[0] not in named]
    told: list[bytes] = []
    if forwarding is not None:
        told = forwarding.told(request, peer)
        taken = {line.partition(b":")[0] for line in told}
        if forwarding.drops(peer):
            taken |= _TELLS_OF_CLIENTS
        fields = [each for each in fields if each[0].replace(b"_", b"-") not in taken]
    lines = [*(b"%b: %b\r\n" % each for each in fields), *told]
    if route.prefix:
        lines.append(b"x-forwarded-prefix: " + route.prefix + b"\r\n")
    return lines
