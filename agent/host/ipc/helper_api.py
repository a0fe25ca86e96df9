"""Protocols of the supervisor with router and egress, and of workers with the egress; check of grants."""

import contextlib
import ipaddress
from collections.abc import Callable
from typing import Final

import msgspec

from fleet.protocol import outbound
from fleet.protocol.bounds import Count
from fleet.protocol.manifest import Grants, Limits


class RouteUpdate(msgspec.Struct, frozen=True, tag="set"):
    """Add or change a route: whether the instance answers. Answered with `RouteAcknowledged`."""

    instance: str
    up: bool
    id: Count = 0


class RouteRemove(msgspec.Struct, frozen=True, tag="unset"):
    """Remove the route of an instance. Answered with `RouteAcknowledged`."""

    instance: str
    id: Count = 0


class RouteRule(msgspec.Struct, frozen=True, kw_only=True):
    """Route of the device's owner on the shared port.

    Attributes:
        instance: that answers.
        host: name in the Host field, `*.` and a suffix for all names below it; empty for any.
        path: prefix of whole segments without a slash at its end; empty for every path.
        strip: take the prefix off, and tell the instance in `x-forwarded-prefix`.
        request_bytes, head_bytes: limits of a request's body and head; None for the instance's own.
    """

    instance: str
    host: str = ""
    path: str = ""
    strip: bool = False
    request_bytes: Count | None = None
    head_bytes: Count | None = None


class ForwardedPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Policy of what instances are told of a client in `x-forwarded-*`.

    Attributes:
        mode: `pass`: what the client sent; `set`: what the host knows, in place of what clients say that are not
            trusted; `drop`: nothing.
        trust: addresses and networks of proxies, whose fields are kept and added to.
    """

    mode: str = "pass"
    trust: tuple[str, ...] = ()


class IngressRules(msgspec.Struct, frozen=True, kw_only=True, tag="rules"):
    """Rules of the device's owner for the shared port. Answered with `RouteAcknowledged`.

    `by_name`: also route by `/NAME/` and `NAME.anything`.
    """

    rules: tuple[RouteRule, ...] = ()
    forwarded: ForwardedPolicy = ForwardedPolicy()
    by_name: bool = True
    id: Count = 0


class TlsClient(msgspec.Struct, frozen=True):
    """Client that has come over TLS, from the terminator to the router: its connection, decrypted, is attached."""

    address: str


class DrainRouter(msgspec.Struct, frozen=True, tag="drain"):
    """Accept no more connections, answer pending requests, and exit."""


class AddListener(msgspec.Struct, frozen=True, tag="add-listener"):
    """Accept clients of this instance alone from the listening socket that comes along, in place of an earlier one.

    Answered with `RouteAcknowledged`.
    """

    instance: str
    id: Count = 0


class RemoveListener(msgspec.Struct, frozen=True, tag="remove-listener"):
    """Close the listening socket of this instance."""

    instance: str


class AddChannel(msgspec.Struct, frozen=True, tag="add-channel"):
    """Add a worker's channel, which takes no calls until `ServeChannel`. Two pages come along behind it.

    The first records the calls that go over the channel, see `stats_page.CallPage`. The second is the worker's own.
    Answered with `RouteAcknowledged`.

    Attributes:
        worker: number of the worker in every message between supervisor and router.
        reuses: whether the worker's store reads several calls from the channel.
        whole: whether the worker keeps a request's body until it is whole, so that it should not wait for one.
        shared: whether calls of other instances may run before one of this; the worker says with a credit of 0 that
            one begins.
    """

    instance: str
    worker: Count
    limits: Limits
    reuses: bool
    whole: bool = False
    shared: bool = False
    id: Count = 0


class ServeChannel(msgspec.Struct, frozen=True, tag="serve-channel"):
    """Give calls to this worker from now on, by the limits of its channel."""

    worker: Count


class DrainChannel(msgspec.Struct, frozen=True, tag="drain-channel"):
    """Give no more calls to this worker; it keeps its channel. Answered with `ChannelDrained`."""

    worker: Count


class YieldChannel(msgspec.Struct, frozen=True, tag="yield-channel"):
    """Have this worker read its control socket between two calls: a request of the supervisor's waits there."""

    worker: Count


ToRouter = (
    RouteUpdate
    | RouteRemove
    | IngressRules
    | DrainRouter
    | AddListener
    | RemoveListener
    | AddChannel
    | ServeChannel
    | DrainChannel
    | YieldChannel
)


class RouteAcknowledged(msgspec.Struct, frozen=True, tag="acknowledged"):
    """Reply to the message with this id: the change is in effect, or why not."""

    id: Count
    problem: str = ""


class ChannelDrained(msgspec.Struct, frozen=True, tag="channel-drained"):
    """Reply to `DrainChannel`: no call is left in the worker, or its channel is closed."""

    worker: Count


class LongCall(msgspec.Struct, frozen=True, tag="long-call"):
    """Report of a call that has taken `LONG_CALL_S`: the supervisor watches it from now on. Sent once for a call."""

    worker: Count
    call: Count


class CallAbandoned(msgspec.Struct, frozen=True, tag="call-abandoned"):
    """Report of a call that goes on although its client has gone, or is too slow: it is to be ended, without blame."""

    worker: Count
    call: Count


class ChannelBroken(msgspec.Struct, frozen=True, tag="channel-broken"):
    """Report of a channel on which something else than frames came; it is closed."""

    worker: Count
    why: str


class ChannelNote(msgspec.Struct, frozen=True, tag="channel-note"):
    """Line for the log of a worker's instance, such as why an answer was refused."""

    worker: Count
    text: str


ChannelReport = LongCall | CallAbandoned | ChannelBroken | ChannelNote
FromRouter = RouteAcknowledged | ChannelDrained | ChannelReport

LONG_CALL_S: Final = 0.03
"""Age at which a call is reported: most calls end sooner, and cost no message."""


CONNECT_MAX_S: Final = 30.0


class RegisterWorker(msgspec.Struct, frozen=True, tag="admit"):
    """Admit a worker of an instance with these grants; its requests come on the attached socket.

    `again`: an egress before this one had the worker and ended, and with it the requests that it had read.
    """

    instance: str
    outbound: tuple[str, ...]
    instances: tuple[str, ...]
    again: bool = False


class ConnectRequest(msgspec.Struct, frozen=True, tag="connect"):
    """Request of a worker for a connection to a destination within `timeout_ms`. Answered with `ConnectReply`.

    Attributes:
        scheme: `http` or `https`; `tcp` or `udp` for a socket, whose authority is an address and a port.
        name: with `tcp` and `udp`, the name that the guest looked the address up by; empty for none.
    """

    id: Count
    scheme: str
    authority: str
    timeout_ms: Count
    name: str = ""


class LookupRequest(msgspec.Struct, frozen=True, tag="lookup"):
    """Request of a worker for the addresses of a name within `timeout_ms`. Answered with `ConnectReply`."""

    id: Count
    name: str
    timeout_ms: Count


ToEgress = ConnectRequest | LookupRequest


RESTARTED: Final = 0
"""The id of no request: in a reply, it says that requests sent before may be lost and have to be sent again."""


class ConnectReply(msgspec.Struct, frozen=True):
    """Reply to `ConnectRequest`, with the connected socket attached unless there is an error; or to `LookupRequest`.

    A UDP socket stays in the egress, since whoever holds one can send anywhere: attached is one end of a pair, which
    takes and gives a datagram behind a `DATAGRAM` in each packet, or `BROKEN` and an error's number.

    Attributes:
        id: of the request; or RESTARTED.
        error: name of a case of `wasi:http/types.error-code`; empty if there is none.
        why: reason, for the instance's log.
        local: with `udp`, address and port of the device's end.
        addresses: of a name.
    """

    id: Count
    error: str = ""
    why: str = ""
    local: tuple[str, int] = ("", 0)
    addresses: tuple[str, ...] = ()


DATAGRAM: Final = b"+"
BROKEN: Final = b"!"
DATAGRAM_MAX_BYTES: Final = 65507


class RefusedError(Exception):
    """Connection refused; `error` names a case of `wasi:http/types.error-code`."""

    def __init__(self, error: str, why: str) -> None:
        super().__init__(why)
        self.error = error


DENIED: Final = "HTTP-request-denied"
PROHIBITED: Final = "destination-IP-prohibited"


def check_grant(grants: Grants, scheme: str, authority: str) -> tuple[str, int]:
    """Return the host and port to connect to; another instance on the device is `<name>.internal`, port 80.

    Raises:
        RefusedError: the authority is malformed, or not granted.
    """
    try:
        host, port = outbound.place(scheme, authority)
    except outbound.BadOutboundError as error:
        raise RefusedError("HTTP-request-URI-invalid", str(error)) from error
    if host.endswith(outbound.INTERNAL):
        name = host.removesuffix(outbound.INTERNAL)
        if (scheme, port) != ("http", 80) or name not in grants.instances:
            raise RefusedError(DENIED, f"{scheme}://{authority} is denied: grants.instances does not name {name}")
        return host, port
    if not any(entry.allows(scheme, host, port) for entry in _entries(grants)):
        raise RefusedError(DENIED, f"{scheme}://{authority} is denied: grants.outbound does not name {host}:{port}")
    return host, port


def filter_addresses(grants: Grants, scheme: str, host: str, port: int, addresses: list[str]) -> list[str]:
    """Return the addresses to which a connection is allowed, in order.

    Raises:
        RefusedError: no address is allowed.
    """
    entries = _entries(grants)
    kept, why = _public_or(addresses, lambda address: any(entry.names(scheme, address, port) for entry in entries))
    if why:
        why = f"{host} is {why}, and grants.outbound does not name that"
        raise RefusedError(PROHIBITED, f"{scheme}://{host}:{port} is denied: {why}")
    if not kept:
        raise RefusedError("DNS-error", f"{host} has no address")
    return kept


def check_socket(grants: Grants, scheme: str, address: str, port: int, name: str) -> bool:
    """Judge a socket's destination; return True where it is allowed only if the address is one of `name`.

    An address is allowed where a grant names it, its network or every public address; or where one names the name that
    it was looked up by, and the address is public.

    Raises:
        RefusedError: not granted.
    """
    where = f"{scheme}://{f'[{address}]' if ':' in address else address}:{port}"
    if "%" in address:  # `Entry.allows` would take it for a name, which `*` covers
        raise RefusedError(DENIED, f"{where} is denied: no address has a zone here")
    try:
        parsed = ipaddress.ip_address(address)
        entries = _entries(grants)
        if any(entry.allows(scheme, address, port) or entry.names(scheme, parsed, port) for entry in entries):
            return False
        named = bool(name) and any(entry.allows(scheme, outbound.name(name), port) for entry in entries)
    except ValueError as error:
        raise RefusedError(DENIED, f"{where} is denied: {error}") from error
    kind = outbound.kind(parsed)
    if named and not kind:
        return True
    if named:
        why = f"{name} is {address}, a {kind} address, and grants.outbound does not name that"
        raise RefusedError(PROHIBITED, f"{where} is denied: {why}")
    raise RefusedError(DENIED, f"{where} is denied: grants.outbound does not name {address}:{port}")


def check_lookup(grants: Grants, name: str) -> str:
    """Return a name that a socket may lead to, in lower case. Raises `RefusedError`."""
    try:
        host = outbound.name(name)
    except outbound.BadOutboundError as error:
        raise RefusedError("HTTP-request-URI-invalid", str(error)) from error
    if not any(entry.resolves(host) for entry in _entries(grants)):
        raise RefusedError(DENIED, f"the name {host} is denied: grants.outbound has no socket to it")
    return host


def reachable(grants: Grants, name: str, addresses: list[str]) -> list[str]:
    """Return the addresses of a name to which some socket may lead. Raises `RefusedError`: none."""
    entries = _entries(grants)
    kept, why = _public_or(addresses, lambda address: any(entry.reaches(address) for entry in entries))
    if why:
        raise RefusedError(PROHIBITED, f"{name} is {why}, and grants.outbound has no socket to that")
    if not kept:
        raise RefusedError("DNS-error", f"{name} has no address")
    return kept


def _public_or(addresses: list[str], granted: Callable[[outbound.Address], bool]) -> tuple[list[str], str]:
    """Return the addresses that are public or granted; where there is none, the last one refused, and its kind."""
    kept, refused = [], ""
    for each in addresses:
        try:
            address = ipaddress.ip_address(each)
        except ValueError:
            continue
        kind = outbound.kind(address)
        if kind and not granted(address):
            refused = f"{each}, a {kind} address"
        else:
            kept.append(each)
    return kept, "" if kept else refused


def _entries(grants: Grants) -> list[outbound.Entry]:
    found = []
    for each in grants.outbound:
        with contextlib.suppress(outbound.BadOutboundError):
            found.append(outbound.parse(each))
    return found
