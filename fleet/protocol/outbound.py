"""Outbound grants: the entries of a manifest's `outbound`, where a component may send requests.

    scheme://host[:port]      https://api.example.com      http://10.1.0.0/16:8000..8010      https://*.example.com:*

    scheme   `http`, `https`, or `*` for either of them; `tcp` or `udp` for sockets, which need a port
    host     a name; `*.name` for every name below it (not itself); `*` for every name and public address; an IPv4
             address or `[IPv6]`, alone or as a network (`10.1.0.0/16`, `[fd00::]/8`)
    port     a number; `a..b` for a up to, not including, b; `*` for any; left out: the scheme's own, 80 or 443

The grammar is that of Spin's `allowed_outbound_hosts`, without its templates. Addresses that are not public (loopback,
private, link-local and so on, also inside IPv6) are covered by an entry that is such an address or network, or by
`localhost`, but by no name and no `*`; the address at which clouds serve credentials is covered only by itself.

Pure functions: no name is resolved here. Errors are `BadOutboundError` with one sentence.
"""

import functools
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PORTS: Final = {"http": 80, "https": 443}
SOCKETS: Final = frozenset({"tcp", "udp"})
"""Schemes of sockets: whatever a component speaks over them. `*` stands for none of them."""

INTERNAL: Final = ".internal"
"""Suffix of names of neighbours on the device: granted by `instances`, never by `outbound`."""

_PORT_END: Final = 1 << 16
_NAME_MAX: Final = 253
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_METADATA: Final = frozenset(map(ipaddress.ip_address, ("169.254.169.254", "fd00:ec2::254", "100.100.100.200")))
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
# Ranges that are translated, relayed or unused, and that the standard library calls global.
_SPECIAL: Final = tuple(
    map(ipaddress.ip_network, ("192.88.99.0/24", "2002::/16", "2001::/23", "64:ff9b:1::/48", "::/96", "fec0::/10"))
)


class BadOutboundError(ValueError):
    """Not an entry of the grant, or no valid destination of a request; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Entry of an `outbound` grant.

    Attributes:
        scheme: `http`, `https`, `tcp`, `udp` or `*`.
        host: a name, `*`, or `*.name`; empty where `network` says it.
        ports: first and, not included, last.
    """

    scheme: str
    host: str
    network: Network | None
    ports: tuple[int, int]

    def __str__(self) -> str:
        first, end = self.ports
        port = "*" if (first, end) == (1, _PORT_END) else str(first) if end == first + 1 else f"{first}..{end}"
        return f"{self.scheme}://{self.host or _network_text(self.network)}:{port}"

    def allows(self, scheme: str, host: str, port: int) -> bool:
        """Tell whether the entry covers a destination, as `place` returns it."""
        if not self._door(scheme, port):
            return False
        address = _address(host)
        if address is not None:
            return self._means(address)
        return self._names(host)

    def names(self, scheme: str, address: Address, port: int) -> bool:
        """Tell whether the entry covers an address that is not public, by naming the address or its network."""
        if not self._door(scheme, port):
            return False
        meant = unwrapped(address)
        if self.host == "localhost":
            return meant.is_loopback
        return self.network is not None and self._means(address)

    def covers(self, other: "Entry") -> bool:
        """Tell whether this entry covers everything that `other` covers."""
        inner = self.ports[0] <= other.ports[0] and other.ports[1] <= self.ports[1]
        if not inner or not self._speaks(other.scheme):
            return False
        if other.network is not None:
            if self.network is not None:
                same = self.network.version == other.network.version
                held = same and self.network.supernet_of(other.network)  # type: ignore[arg-type]
                return held and (not _metadata_alone(other.network) or self.network == other.network)
            return self.host == "*" and other.network.num_addresses == 1 and kind(other.network[0]) == ""
        if other.host == "*" or self.network is not None:
            return self.host == other.host
        if other.host.startswith("*."):
            wide = self.host.startswith("*.") and other.host[1:].endswith(self.host[1:])
            return self.host == "*" or wide
        return self.host == other.host or self._names(other.host)

    def resolves(self, host: str) -> bool:
        """Tell whether a socket may lead to a name, whatever its port: then its addresses may be looked up."""
        return self.scheme in SOCKETS and self._names(host)

    def reaches(self, address: Address) -> bool:
        """Tell whether a socket may lead to an address by naming it, its network or this device, whatever its port."""
        return self.scheme in SOCKETS and self.names(self.scheme, address, self.ports[0])

    def _door(self, scheme: str, port: int) -> bool:
        return self._speaks(scheme) and self.ports[0] <= port < self.ports[1]

    def _speaks(self, scheme: str) -> bool:
        return self.scheme == scheme or (self.scheme == "*" and scheme not in SOCKETS)

    def _names(self, host: str) -> bool:
        if host == "localhost" or self.network is not None:
            return self.host == host
        if self.host == "*":
            return True
        return host.endswith(self.host[1:]) if self.host.startswith("*.") else host == self.host

    def _means(self, address: Address) -> bool:
        meant = unwrapped(address)
        if self.network is None:
            return self.host == "*" and kind(address) == ""
        if meant in _METADATA and self.network.num_addresses > 1:
            return False
        return meant in self.network or address in self.network


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> Entry:
    """Parse one entry. Raises `BadOutboundError`."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        example = f"https://{text}" if _is_place(text) else "https://api.example.com:443"
        raise BadOutboundError(f'expected scheme, host and port, such as "{example}"')
    scheme = scheme.lower()
    if scheme not in {*PORTS, *SOCKETS, "*"}:
        raise BadOutboundError(f"the scheme is http, https or * for requests, tcp or udp for sockets, not {scheme!r}")
    if "@" in rest:
        raise BadOutboundError("user names and passwords are not allowed here")
    network, host, port = _split(rest.lower())
    if any(c in port or c in host for c in "/?#"):
        raise BadOutboundError("a path or query is not allowed here: the grant is for a whole host")
    return Entry(scheme, host, network, _ports(port, scheme))


def _is_place(text: str) -> bool:
    """Return whether text is an entry but for its scheme."""
    try:
        return "/" not in text and bool(parse(f"https://{text}"))
    except BadOutboundError:
        return False


def _split(rest: str) -> tuple[Network | None, str, str]:
    """Split the part after the scheme into network or host, and port."""
    bracketed = re.fullmatch(r"\[([^]]*)](/[0-9]+)?(?::(.*))?", rest)
    if bracketed:
        return _network(f"{bracketed[1]}{bracketed[2] or ''}", version=6), "", bracketed[3] or ""
    host, colon, port = rest.partition(":")
    if colon and not port:
        raise BadOutboundError("a port is missing behind the colon")
    slashed = re.fullmatch(r"[0-9.]+/[0-9]+", host)
    if slashed or _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
        return _network(host, version=4), "", port
    if host.endswith("/") and not colon:
        host = host[:-1]
    if host in {"self", "internal"} or host.endswith(INTERNAL):
        raise BadOutboundError('neighbours on the device are granted by name: instances = ["their-name"]')
    if host == "*":
        return None, host, port
    if "*" in host.removeprefix("*."):
        raise BadOutboundError("* stands for a whole host, or before the first dot: *.example.com")
    if any(c in host for c in "/?#"):
        raise BadOutboundError("a path or query is not allowed here: the grant is for a whole host")
    return None, ("*." if host.startswith("*.") else "") + _name(host.removeprefix("*.")), port


def _network(text: str, *, version: int) -> Network:
    try:
        found = ipaddress.ip_network(text)
    except ValueError as error:
        what = f"{text!r} is no address or network"
        try:
            loose = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise BadOutboundError(f"{what}: four numbers from 0 to 255, or [IPv6]") from error
        raise BadOutboundError(f"{what}: did you mean {loose}?") from error
    if found.version != version:
        raise BadOutboundError(f"an IPv6 address stands in brackets: [{text}]")
    return found


def _ports(text: str, scheme: str) -> tuple[int, int]:
    if not text:
        if scheme not in PORTS:
            raise BadOutboundError(f"with the scheme {scheme} a port has to be named, or * for any")
        return PORTS[scheme], PORTS[scheme] + 1
    if text == "*":
        return 1, _PORT_END
    first, dots, end = text.partition("..")
    if not all(re.fullmatch(r"[0-9]{1,5}", each) for each in ((first, end) if dots else (first,))):
        raise BadOutboundError(f"{text!r} is no port: a number, a range such as 8000..8010, or *")
    found = (int(first), int(end) if dots else int(first) + 1)
    if not 0 < found[0] < found[1] <= _PORT_END:
        raise BadOutboundError(
            f"{text!r} contains no port: ports are 1 to 65535, and the end of a range is not included"
        )
    return found


def _name(text: str) -> str:
    name = text.lower().removesuffix(".")
    if not name.isascii():
        raise BadOutboundError(f"{text!r} is not ASCII: write its xn-- form")
    if not 0 < len(name) <= _NAME_MAX or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise BadOutboundError(f"{text[:80]!r} is no host name")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        raise BadOutboundError(f"{text[:80]!r} is a number: an IPv4 address is four of them, from 0 to 255")
    return name


def place(scheme: str, authority: str) -> tuple[str, int]:
    """Return the host and port of a request's authority: a name in lower case, or an address in its usual form.

    Forms that a resolver might take for an address (`127.1`, `0x7f000001`, `017700000001`) are refused.

    Raises:
        BadOutboundError: the authority or the scheme is not one that a request may have.
    """
    if scheme not in PORTS:
        raise BadOutboundError(f"the scheme {scheme!r} is not one of http and https")
    if "@" in authority:
        raise BadOutboundError("user names and passwords are not allowed in an authority")
    bracketed = re.fullmatch(r"\[([^]]*)](?::([0-9]*))?", authority)
    host, port = (bracketed[1], bracketed[2] or "") if bracketed else authority.partition(":")[::2]
    if bracketed:
        address = _address(host)
        if address is None or address.version != 6:  # noqa: PLR2004 - the protocol's version
            raise BadOutboundError(f"{authority[:80]!r} is no IPv6 address")
        host = str(address)
    elif _address(host) is None:
        host = _name(host)
    if port and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < _PORT_END):
        raise BadOutboundError(f"{port[:20]!r} is no port")
    return host, int(port) if port else PORTS[scheme]


def is_socket(text: str) -> bool:
    """Tell whether an entry is one for sockets."""
    return text.lower().startswith(tuple(f"{scheme}://" for scheme in SOCKETS))


def name(text: str) -> str:
    """Return a host name in lower case. Raises `BadOutboundError`."""
    return _name(text)


def _address(text: str) -> Address | None:
    try:
        return None if "%" in text else ipaddress.ip_address(text)
    except ValueError:
        return None


def unwrapped(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address stands for (mapped, or through NAT64), else the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def kind(address: Address) -> str:
    """Return one word for the class of an address that is not public; empty for a public one."""
    meant = unwrapped(address)
    for word, holds in (
        ("unspecified", meant.is_unspecified),
        ("loopback", meant.is_loopback),
        ("metadata", meant in _METADATA),
        ("link-local", meant.is_link_local),
        ("multicast", meant.is_multicast),
        ("private", meant.is_private),
        ("reserved", meant.is_reserved or not meant.is_global),
        ("special", any(meant.version == each.version and meant in each for each in _SPECIAL)),
    ):
        if holds:
            return word
    return ""


def _metadata_alone(network: Network) -> bool:
    return network.num_addresses == 1 and network[0] in _METADATA


def _network_text(network: Network | None) -> str:
    assert network is not None
    text = str(network[0]) if network.num_addresses == 1 else str(network)
    if network.version == 4:  # noqa: PLR2004 - the protocol's version
        return text
    address, slash, bits = text.partition("/")
    return f"[{address}]{slash}{bits}"


def covered(text: str, ceiling: Iterable[str]) -> bool:
    """Tell whether an entry is within one of `ceiling`'s. An entry that cannot be read is within its equal alone."""
    above = tuple(ceiling)
    if text in above:
        return True
    try:
        entry = parse(text)
    except BadOutboundError:
        return False
    for each in above:
        try:
            if parse(each).covers(entry):
                return True
        except BadOutboundError:
            continue
    return False


def describe(text: str) -> str:
    """Describe an entry to those who decide: its text, and what it allows beyond what it seems to."""
    try:
        entry = parse(text)
    except BadOutboundError:
        return text
    said = []
    if entry.host == "*":
        said.append("any public host")
    elif entry.host.startswith("*."):
        said.append(f"any name below {entry.host[2:]}")
    elif entry.host == "localhost":
        said.append("this device itself")
    elif entry.network is not None:
        one = entry.network.num_addresses == 1
        what = kind(entry.network[0]) or kind(entry.network[-1])
        said += [f"a {what} address" if one else f"addresses that are {what}"] if what else []
        said += [] if one else [f"{entry.network.num_addresses} addresses"]
    first, end = entry.ports
    if end - first > 1:
        said.append("any port" if end - first == _PORT_END - 1 else f"{end - first} ports")
    if entry.scheme in {"http", "*"}:
        said.append("not encrypted" if entry.scheme == "http" else "encrypted or not")
    return f"{text} ({', '.join(said)})" if said else text
