"""Checks of `fleet-agent check`: everything that the agent needs, in the order in which it depends on each other.

The first failure ends the checks, as the later ones would fail for the same reason.
"""

import contextlib
import http.client
import os
import platform
import shutil
import socket
import ssl
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Final

import msgspec

from agent.clock import ReferenceClock
from agent.config import Paths, Settings
from agent.identity import enrolment, identity
from agent.link.https import DeviceTls, FetchError, HttpsClient, proxy_for, why
from agent.update.images import compiler
from fleet.protocol import bounds
from fleet.protocol.codes import RejectCode
from fleet.protocol.files import is_read_only, temporary_name

CONNECT_S: Final = 10.0
COMPILER_S: Final = 60.0
MACHINES: Final = frozenset({"x86_64", "aarch64", "riscv64"})
BITS: Final = 64


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a check: its name, whether it passed, and a sentence."""

    name: str
    ok: bool
    text: str


class _FailedError(Exception):
    """Failed check; the message says what does not work and what to do."""


def run_checks(
    places: Paths, settings: Settings, *, machine: str = platform.machine(), bits: int = sys.maxsize.bit_length() + 1
) -> list[Result]:
    """Run the checks in order, up to the first failure.

    Args:
        places: paths of the agent's files.
        settings: configuration of the agent.
        machine: the kernel's name of the processor.
        bits: word size of this program; a 32-bit system may run under a 64-bit kernel.
    """
    results = []
    for name, check in _checks(places, settings, machine, bits):
        try:
            results.append(Result(name=name, ok=True, text=check()))
        except _FailedError as error:
            results.append(Result(name=name, ok=False, text=str(error)))
            break
    return results


def _checks(places: Paths, settings: Settings, machine: str, bits: int) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "machine", lambda: _machine(machine, bits)
    yield "identity", lambda: _identity(places, settings)
    yield "disk", lambda: _disk(places, settings)
    who = identity.load(places.identity)
    url = urllib.parse.urlsplit(who.devices_url)
    proxy = proxy_for(url, settings.network.proxy)
    first = proxy or url
    yield "DNS", lambda: _dns(first.hostname or "")
    yield "TCP", lambda: _tcp(first.hostname or "", first.port or (3128 if proxy else 443))
    yield "proxy", lambda: _proxy(proxy, url)
    yield "TLS", lambda: _tls(places, who, url, proxy)
    yield "clock", lambda: _clock(who)
    yield "MQTT", lambda: _mqtt(places, who)
    yield "HTTP", lambda: _http(places, settings, who)
    yield "engine", _engine
    yield "host", lambda: _host(places)


def _machine(machine: str, bits: int) -> str:
    if machine not in MACHINES or bits != BITS:
        here = f"{machine} with a {bits}-bit system" if machine in MACHINES else machine
        raise _FailedError(f"{here} is not supported: install a 64-bit system (x86_64, aarch64 or riscv64)")
    return f"{machine}, Linux {platform.release()}"


def _engine() -> str:
    try:
        done = subprocess.run([*compiler(), "--describe"], capture_output=True, timeout=COMPILER_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _FailedError(f"the compiler cannot be started: {error}") from error
    if done.returncode != 0:
        raise _FailedError(
            f"no WebAssembly engine on this device: {done.stderr.decode(errors='replace').strip()[-300:]}"
        )
    facts = msgspec.json.decode(done.stdout, type=dict[str, str])
    return f"wasmtime {facts.get('engine', '?')} for {facts.get('triple', '?')}"


def _identity(places: Paths, settings: Settings) -> str:
    try:
        who = identity.load(places.identity)
        renew = enrolment.renew_at(places.identity)
    except (identity.IdentityError, OSError, ValueError) as error:
        raise _FailedError(str(error)) from error
    if settings.production and not who.production:
        raise _FailedError(
            "this device is in production mode, but its fleet is for development: it accepts no assignment before "
            "'fleet sign move'"
        )
    return f"{who.device} in the fleet {who.fleet}; the certificate will be renewed after {renew:%Y-%m-%d}"


def _dns(host: str) -> str:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _FailedError(f"{host} cannot be resolved ({error.strerror}): check the device's DNS settings") from error
    return f"{host} has address {found[0][4][0]}"


def _tcp(host: str, port: int) -> str:
    try:
        with closing(socket.create_connection((host, port), timeout=CONNECT_S)):
            return f"{host}:{port} answers"
    except OSError as error:
        raise _FailedError(
            f"cannot connect to {host}:{port}: {error.strerror or error}: "
            "check that the server runs, and that no firewall blocks the connection"
        ) from error


def _clock(who: identity.Identity) -> str:
    now = datetime.now(UTC)
    if now < who.floor:
        return f"{now:%Y-%m-%d %H:%M}Z is before {who.floor:%Y-%m-%d %H:%M}Z: the agent uses the latter until it is set"
    return f"{now:%Y-%m-%d %H:%M:%S}Z"


def _connect(target: urllib.parse.SplitResult, proxy: urllib.parse.SplitResult | None) -> socket.socket:
    """Connect to a server, through a proxy if there is one (CONNECT: RFC 9110, section 9.3.6)."""
    host, port = target.hostname or "", target.port or 443
    if proxy is None:
        return socket.create_connection((host, port), timeout=CONNECT_S)
    tunnel = http.client.HTTPConnection(proxy.hostname or "", proxy.port or 3128, timeout=CONNECT_S)
    tunnel.set_tunnel(host, port)
    tunnel.connect()
    assert tunnel.sock is not None
    return tunnel.sock


def _proxy(proxy: urllib.parse.SplitResult | None, url: urllib.parse.SplitResult) -> str:
    if proxy is None:
        return "not used"
    try:
        with closing(_connect(url, proxy)):
            return f"{proxy.netloc} connects to {url.netloc}"
    except OSError as error:
        raise _FailedError(f"{proxy.netloc} does not connect to {url.netloc}: {error}: check the proxy") from error


def _handshake(
    places: Paths, who: identity.Identity, target: urllib.parse.SplitResult, proxy: urllib.parse.SplitResult | None
) -> str:
    tls = DeviceTls(places.identity, ReferenceClock(who.floor))
    try:
        settings = tls.for_connection()
        with (
            closing(_connect(target, proxy)) as plain,
            settings.context.wrap_socket(plain, server_hostname=target.hostname) as connection,
        ):
            settings.check(connection)
            return str(connection.version())
    except ssl.SSLError as error:
        raise _FailedError(
            f"{target.netloc}: TLS: {why(error)}: check the clock, and that no proxy intercepts TLS"
        ) from error
    except OSError as error:
        raise _FailedError(f"{target.netloc}: {error.strerror or error}") from error


def _tls(
    places: Paths, who: identity.Identity, url: urllib.parse.SplitResult, proxy: urllib.parse.SplitResult | None
) -> str:
    return f"{_handshake(places, who, url, proxy)}, the server's certificate is from the fleet's CA"


def _mqtt(places: Paths, who: identity.Identity) -> str:
    if not who.mqtt:
        return "this fleet has no broker; assignments come over HTTPS"
    broker = urllib.parse.urlsplit(who.mqtt[0])
    if broker.scheme == "mqtt":
        return _tcp(broker.hostname or "", broker.port or 1883)
    target = broker if broker.port else broker._replace(netloc=f"{broker.netloc}:8883")
    try:
        return f"{broker.netloc} answers with {_handshake(places, who, target, None)}"
    except _FailedError as error:
        raise _FailedError(f"{error} (without MQTT, assignments still come over HTTPS, but later)") from error


def _http(places: Paths, settings: Settings, who: identity.Identity) -> str:
    https = HttpsClient(
        who.devices_url, DeviceTls(places.identity, ReferenceClock(who.floor)), proxy=settings.network.proxy
    )
    try:
        https.request("GET", "/v1/desired", max_bytes=bounds.DESIRED_MAX_BYTES)
    except FetchError as error:
        if error.code is not RejectCode.NOT_FOUND:
            raise _FailedError(error.message) from error
    return f"{who.devices_url} accepts this device's certificate"


def _host(places: Paths) -> str:
    from agent.host.ipc import host_api  # noqa: PLC0415 - the other checks work without it

    with closing(host_api.new_socket()) as sock:
        sock.settimeout(CONNECT_S)
        try:
            sock.connect(str(places.host_socket))
            host_api.send(sock, host_api.Hello(id=1))
            welcome = host_api.receive_from_host(sock)
        except (OSError, host_api.IpcError) as error:
            reason = host_api.why_not(places.runtime)
            if reason:
                raise _FailedError(f"the host does not start: {reason}") from error
            raise _FailedError(f"no host listens at {places.host_socket}: {error}: start fleet-host") from error
    if not isinstance(welcome, host_api.Welcome):
        raise _FailedError("the host gave an unexpected answer: install the same version of host and agent")
    layers = sorted(welcome.containment.items())
    missing = ", ".join(name for name, there in layers if not there)
    present = ", ".join(name for name, there in layers if there) or "none"
    return f"fleet-host {welcome.version}, isolation layers: {present}" + (f"; missing {missing}" if missing else "")


def _disk(places: Paths, settings: Settings) -> str:
    if not places.state.is_dir():
        raise _FailedError(f"{places.state} does not exist: install the package, or run 'fleet-agent enroll' first")
    if is_read_only(places.state):
        raise _FailedError(
            f"{places.state} is on a read-only file system: look at 'dmesg' for its errors, and mount it writable"
        )
    try:
        probe = temporary_name(places.state / "check")
        with probe.open("xb") as file:
            file.write(b"\0")
            os.fsync(file.fileno())
        probe.unlink()
    except PermissionError:
        raise _FailedError(f"{places.state} is not writable by this user: run as the agent's user or as root") from None
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise _FailedError(f"{places.state} cannot be written: {error.strerror}: check the disk") from error
    free = shutil.disk_usage(places.state).free
    if free < settings.disk.reserve_bytes:
        raise _FailedError(
            f"only {free >> 20} MiB are free, below the reserve of {settings.disk.reserve_bytes >> 20} MiB: free space"
        )
    return f"{free >> 20} MiB free in {places.state}"
