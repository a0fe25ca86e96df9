"""ingress.toml: how the device's owner lets others reach instances over the shared port.

    by_name = true                         # /NAME/ and NAME.anything, as without this file

    [tls]
    listen = "0.0.0.0:8443"

    [[tls.certificates]]                   # the first is for clients that name no other
    certificate = "/etc/wasmfleet/tls/meter.pem"
    key = "/etc/wasmfleet/tls/meter.key"
    names = ["meter.example.com", "*.meter.example.com"]

    [forwarded]
    mode = "set"                           # set, pass, drop
    trust = ["10.0.0.0/8"]                 # proxies whose fields are kept

    [[routes]]
    host = "meter.example.com"
    path = "/api"
    instance = "meter"
    strip = true
    request = "1MiB"
    head = "16KiB"

Pure over the file's text; whether certificates can be read is found out by the process that uses them.
"""

import ipaddress
import re
import tomllib
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from agent.host.http.parser import HEAD_MAX_BYTES
from agent.host.ipc.helper_api import ForwardedPolicy, IngressRules, RouteRule
from fleet.component.toml_fields import BadUnitError, parse_size
from fleet.protocol import names
from fleet.protocol.toml_lines import in_words, line_of, path_of

DEFAULT_FILE: Final = "/etc/wasmfleet/ingress.toml"
READY: Final = b"ready"
"""First word of a TLS terminator that accepts clients; another one says why it cannot."""

ROUTES_MAX: Final = 200
CERTIFICATES_MAX: Final = 100
FILE_MAX_CHARS: Final = 256 * 1024
_HOST: Final = re.compile(r"(\*\.)?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_PATH: Final = re.compile(r"/[A-Za-z0-9\-._~!$&'()*+,;=:@%/]*")


class IngressError(Exception):
    """The file is not valid, or a certificate cannot be used; the message names the file and the key."""


class _WrongKeyError(Exception):
    """A value that is not valid, with the dotted name of its key."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Certificate of the device's owner: files of a chain and its key in PEM, and the names that it is for."""

    certificate: str
    key: str
    names: tuple[str, ...] = ()


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Address at which the shared port is served over TLS, and the certificates."""

    listen: str
    certificates: Annotated[tuple[Certificate, ...], Meta(min_length=1, max_length=CERTIFICATES_MAX)]


class _Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    instance: str
    host: str = ""
    path: str = "/"
    strip: bool = False
    request: str = ""
    head: str = ""


class _Forwarded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mode: str = "set"
    trust: tuple[str, ...] = ()


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    by_name: bool = True
    tls: Tls | None = None
    forwarded: _Forwarded = _Forwarded()
    routes: Annotated[tuple[_Route, ...], Meta(max_length=ROUTES_MAX)] = ()


@dataclass(frozen=True, slots=True)
class IngressConfig:
    """Rules and TLS as the owner allows them; without a file, routes by name alone and no TLS."""

    rules: IngressRules = field(default_factory=IngressRules)
    tls: Tls | None = None


def read(text: str, *, file: str = "ingress.toml") -> IngressConfig:
    """Read the file's text. Raises `IngressError`, with the key and its line."""
    if len(text) > FILE_MAX_CHARS:
        raise IngressError(f"{file} has {len(text)} characters, at most {FILE_MAX_CHARS} are read")
    try:
        return _understood(msgspec.convert(tomllib.loads(text), _File))
    except msgspec.ValidationError as error:
        key, words = in_words(str(error))
        raise IngressError(f"{file}: {words}{_line(text, key)}") from error
    except _WrongKeyError as error:
        raise IngressError(f"{file}: {error}{_line(text, error.key)}") from error
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise IngressError(f"{file} is not TOML: {error}") from error


def _line(text: str, key: str) -> str:
    line = line_of(text, path_of(key))
    return f" (line {line})" if line else ""


def _understood(found: _File) -> IngressConfig:
    rules = tuple(_rule(each, f"routes[{number}]") for number, each in enumerate(found.routes))
    seen: set[tuple[str, str]] = set()
    for number, rule in enumerate(rules):
        if (rule.host, rule.path) in seen:
            raise _WrongKeyError(f"routes[{number}]", f"{rule.host}{rule.path or '/'} is routed twice")
        seen.add((rule.host, rule.path))
    if found.tls is not None:
        _check_tls(found.tls)
    forwarded = _forwarded(found.forwarded)
    return IngressConfig(IngressRules(rules=rules, forwarded=forwarded, by_name=found.by_name), found.tls)


def _rule(route: _Route, where: str) -> RouteRule:
    try:
        names.check_label(route.instance, "instance")
    except names.BadNameError as error:
        raise _WrongKeyError(f"{where}.instance", str(error)) from error
    host = route.host.lower().rstrip(".")
    if host and not _HOST.fullmatch(host):
        raise _WrongKeyError(
            f"{where}.host", f"{route.host!r} is not a host name, such as meter.example.com or *.example.com"
        )
    if not _PATH.fullmatch(route.path):
        raise _WrongKeyError(f"{where}.path", f"{route.path!r} is not a path, such as /api")
    return RouteRule(
        instance=route.instance,
        host=host,
        path=route.path.rstrip("/"),
        strip=route.strip,
        request_bytes=_size(route.request, f"{where}.request"),
        head_bytes=_size(route.head, f"{where}.head", HEAD_MAX_BYTES),
    )


def _size(text: str, where: str, most: int = 1 << 40) -> int | None:
    if not text:
        return None
    try:
        size = parse_size(text)
    except BadUnitError as error:
        raise _WrongKeyError(where, str(error)) from error
    if size > most:
        raise _WrongKeyError(where, f"{text} is more than the {most} bytes that the host takes")
    return size


def _forwarded(forwarded: _Forwarded) -> ForwardedPolicy:
    if forwarded.mode not in {"set", "pass", "drop"}:
        raise _WrongKeyError("forwarded.mode", f"{forwarded.mode!r} is not one of set, pass, drop")
    for each in forwarded.trust:
        try:
            ipaddress.ip_network(each)
        except ValueError as error:
            raise _WrongKeyError("forwarded.trust", f"{each!r} is no address or network: {error}") from error
    return ForwardedPolicy(mode=forwarded.mode, trust=forwarded.trust)


def _check_tls(tls: Tls) -> None:
    address(tls.listen)
    for number, certificate in enumerate(tls.certificates):
        where = f"tls.certificates[{number}].names"
        if number and not certificate.names:
            raise _WrongKeyError(where, "only the first certificate may have none")
        for name in certificate.names:
            if not _HOST.fullmatch(name.lower()):
                raise _WrongKeyError(where, f"{name!r} is not a host name")


def address(text: str) -> tuple[str, int]:
    """Read the `ADDRESS:PORT` of `tls.listen`; `read` has checked it."""
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:  # noqa: PLR2004
        raise _WrongKeyError("tls.listen", f"{text!r} is not ADDRESS:PORT, such as 0.0.0.0:8443")
    return host.strip("[]") or "127.0.0.1", int(port)
