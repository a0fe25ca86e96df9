"""Address of an HTTP proxy, with or without a user and password, which are in no message, log or `repr`."""

import base64
import urllib.parse
from dataclasses import dataclass, field
from typing import Final

PORT: Final = 3128
_PORT_MAX: Final = 65535


class ProxyError(OSError):
    """The proxy's address is of no supported form, or the proxy refused a tunnel; the message says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.strerror = message


@dataclass(frozen=True, slots=True)
class Proxy:
    """HTTP proxy.

    Attributes:
        host: name, or address without brackets.
        port: TCP port.
        credentials: value of the header Proxy-Authorization; empty for none.
    """

    host: str
    port: int
    credentials: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> "Proxy":
        """Read `http://[USER:PASSWORD@]HOST[:PORT]`; the scheme may be left out. Raises `ProxyError`."""
        form = "write http://USER:PASSWORD@HOST:PORT, with special characters in percent-encoding"
        try:
            split = urllib.parse.urlsplit(text if "//" in text else f"http://{text}")
            host, port = split.hostname or "", split.port if split.port is not None else PORT
        except ValueError:  # the message may contain a part of the password
            raise ProxyError(f"the proxy's address cannot be read: {form}") from None
        if split.scheme != "http":
            raise ProxyError(f"a proxy of the kind {split.scheme[:20]!r} is not supported: {form}")
        if not host or not 0 < port <= _PORT_MAX or split.path.strip("/") or split.query or split.fragment:
            raise ProxyError(f"the proxy's address cannot be read: {form}")
        if split.username is None:
            return cls(host, port)
        pair = f"{urllib.parse.unquote(split.username)}:{urllib.parse.unquote(split.password or '')}"
        try:
            return cls(host, port, "Basic " + base64.b64encode(pair.encode()).decode())
        except UnicodeEncodeError:  # bytes of the environment that are no UTF-8; the message contains the password
            raise ProxyError(f"the proxy's address cannot be read: {form}") from None

    def __str__(self) -> str:
        return authority(self.host, self.port)


def authority(host: str, port: int) -> str:
    """Return `host:port`, or `[address]:port` for an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
