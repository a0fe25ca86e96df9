"""Supervisor, router, egress and worker: routes, connect requests, grant check."""

import contextlib
import ipaddress
from typing import Final

import msgspec

from fleet.protocol import outbound
from fleet.protocol.bounds import Count
from fleet.protocol.manifest import Grants


class RouteUpdate(msgspec.Struct, frozen=True, tag="set"):
    """An instance is there, and answers or not. Answered with `Ack`.

    `spread`: it may have several lanes, so each request asks anew for one that is free.
    """

    instance: str
    up: bool
    spread: bool = False
    id: Count = 0


class RouteRemove(msgspec.Struct, frozen=True, tag="unset"):
    """An instance is gone. Answered with `Ack`."""

    instance: str
    id: Count = 0


class RouteAcknowledged(msgspec.Struct, frozen=True):
    """The message with this id is heeded from now on."""

    id: Count


class DrainRouter(msgspec.Struct, frozen=True, tag="drain"):
    """Accept no more, answer what was asked, and end."""


CONNECT_MAX_S: Final = 30.0


class RegisterWorker(msgspec.Struct, frozen=True, tag="admit"):
    """The socket that comes along is a lane's, of this instance with these grants."""

    instance: str
    outbound: tuple[str, ...]
    instances: tuple[str, ...]


class ConnectRequest(msgspec.Struct, frozen=True):
    """A lane's question: a connection to this place, within `timeout_ms`. Answered by `Told`, with a socket if `ok`."""

    id: Count
    scheme: str
    authority: str
    timeout_ms: Count


class ConnectReply(msgspec.Struct, frozen=True):
    """The answer.

    Attributes:
        error: a case of `wasi:http/types.error-code` by its name, empty when the socket comes along.
        why: for the instance's log.
    """

    id: Count
    error: str = ""
    why: str = ""


class RefusedError(Exception):
    """There is no connection; `error` names a case of `wasi:http/types.error-code`."""

    def __init__(self, error: str, why: str) -> None:
        super().__init__(why)
        self.error = error


DENIED: Final = "HTTP-request-denied"

PROHIBITED: Final = "destination-IP-prohibited"


def check_grant(grants: Grants, scheme: str, authority: str) -> tuple[str, int]:
    """The host and port to connect to; a neighbour on the board as `<name>.internal` and port 80.

    Raises:
        RefusedError: it is no place, or not granted.
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
    """Those of the addresses that may be connected to, in order.

    Raises:
        RefusedError: there are none.
    """
    kept, why = [], ""
    for each in addresses:
        try:
            address = ipaddress.ip_address(each)
        except ValueError:
            continue
        kind = outbound.kind(address)
        if kind and not any(entry.names(scheme, address, port) for entry in _entries(grants)):
            why = f"{host} is {each}, a {kind} address, and grants.outbound does not name that"
        else:
            kept.append(each)
    if not kept and why:
        raise RefusedError(PROHIBITED, f"{scheme}://{host}:{port} is denied: {why}")
    if not kept:
        raise RefusedError("DNS-error", f"{host} has no address")
    return kept


def _entries(grants: Grants) -> list[outbound.Entry]:
    found = []
    for each in grants.outbound:
        with contextlib.suppress(outbound.BadOutboundError):
            found.append(outbound.parse(each))
    return found
