"""Connections of the agent to a server: directly, or through an HTTP proxy with or without a user and password.

Enrolment, HTTPS, MQTT and `fleet-agent check` connect here. A proxy's password is in no message, log or `repr`.
"""

import http.client
import time
import urllib.request
from socket import socket
from typing import Final

from agent import happy_eyeballs
from agent.proxy import Proxy, ProxyError, authority

BROKER_PORTS: Final = {"mqtt": 1883, "mqtts": 8883, "wss": 443}
HEAD_MAX_BYTES: Final = 16 * 1024
_AT_FAULT: Final = {
    http.client.FORBIDDEN: "the proxy does not allow that destination",
    http.client.METHOD_NOT_ALLOWED: "the proxy does not allow tunnels (CONNECT)",
    http.client.BAD_GATEWAY: "the proxy cannot reach that destination",
    http.client.SERVICE_UNAVAILABLE: "the proxy is busy, or cannot reach that destination",
    http.client.GATEWAY_TIMEOUT: "that destination does not answer the proxy",
}


def proxy_for(host: str, configured: str) -> Proxy | None:
    """Return the proxy on the way to `host`: the configured one, else the environment's; None for none.

    Raises:
        ProxyError: its address is of no supported form.
    """
    if configured:
        return Proxy.parse(configured)
    found = urllib.request.getproxies()
    if not found.get("https"):
        return None
    exempt = [each.strip().strip("[]").lower() for each in found.get("no", "").split(",")]
    if not {"*", host.lower()}.isdisjoint(exempt) or (":" not in host and urllib.request.proxy_bypass(host)):
        return None
    return Proxy.parse(found["https"])


def connect(host: str, port: int, *, timeout_s: float, proxy: Proxy | None = None) -> socket:
    """Connect to a server and return a blocking socket; blocks for at most `timeout_s`, name resolution excluded.

    Args:
        host: name, or address without brackets.
        port: TCP port.
        timeout_s: for all addresses and the proxy's answer together; also the timeout of the socket.
        proxy: on the way.

    Raises:
        ProxyError: the proxy refused.
        socket.gaierror: a name cannot be resolved.
        NoAnswerError: no address answers.
        TimeoutError: the proxy does not answer.
    """
    until = time.monotonic() + timeout_s
    if proxy is None:
        return happy_eyeballs.connect(host, port, timeout_s=timeout_s)
    sock = happy_eyeballs.connect(proxy.host, proxy.port, timeout_s=timeout_s)
    try:
        _tunnel(sock, authority(host, port), proxy, until)
        sock.settimeout(max(0.1, until - time.monotonic()))
    except BaseException:
        sock.close()
        raise
    return sock


def connect_broker(scheme: str, host: str, port: int, *, timeout_s: float, configured_proxy: str) -> socket:
    """Connect to a broker, see `connect`.

    MQTT over WebSocket goes through the proxy, as HTTPS does. Plain MQTT tries without the proxy first, since few
    proxies let through to its port.
    """
    proxy = None if scheme == "mqtt" else proxy_for(host, configured_proxy)
    if proxy is None or scheme == "wss":
        return connect(host, port, timeout_s=timeout_s, proxy=proxy)
    try:
        return connect(host, port, timeout_s=timeout_s / 2)
    except OSError as direct:
        try:
            return connect(host, port, timeout_s=timeout_s / 2, proxy=proxy)
        except OSError as error:
            reason = f"{direct.strerror or direct}; through the proxy: {error.strerror or error}"
            raise OSError(error.errno, reason) from error


def _tunnel(sock: socket, target: str, proxy: Proxy, until: float) -> None:
    """Have the proxy connect to `target` (RFC 9110, section 9.3.6)."""
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.credentials:
        lines.append(f"Proxy-Authorization: {proxy.credentials}")
    sock.sendall("\r\n".join([*lines, "", ""]).encode())
    head = bytearray()
    while b"\r\n\r\n" not in head:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the proxy did not answer in time")
        sock.settimeout(left)
        chunk = sock.recv(1)  # nothing beyond the head: what follows belongs to the tunnel
        head += chunk
        if not chunk or len(head) > HEAD_MAX_BYTES:
            raise ProxyError(f"{proxy} does not answer as an HTTP proxy does: check its address")
    version, _, rest = bytes(head.split(b"\r\n", 1)[0]).partition(b" ")
    number = rest[:3]
    if not version.startswith(b"HTTP/1.") or not number.isdigit():
        raise ProxyError(f"{proxy} does not answer as an HTTP proxy does: check its address")
    status = int(number)
    if status == http.client.PROXY_AUTHENTICATION_REQUIRED:
        reason = (
            "it does not accept this user and password"
            if proxy.credentials
            else "it asks for a user and password: write network.proxy = 'http://USER:PASSWORD@HOST:PORT' in agent.toml"
        )
        raise ProxyError(f"the proxy {proxy} answered 407: {reason}")
    if status != http.client.OK:
        reason = _AT_FAULT.get(status, "something other than a tunnel, such as the login page of a network")
        raise ProxyError(f"the proxy {proxy} answered {status} for {target}: {reason}")
