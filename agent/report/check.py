"""Checks of `fleet-agent check`: everything that the agent needs, in the order in which it depends on each other.

The first failure ends the checks, as the later ones would fail for the same reason.
"""

import asyncio
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

from agent import disk, happy_eyeballs
from agent.clock import ReferenceClock
from agent.config import Paths, Settings
from agent.disk import Write
from agent.happy_eyeballs import NoAnswerError
from agent.identity import enrolment, identity
from agent.link import dialer
from agent.link.https import DeviceTls, FetchError, HttpsClient, why
from agent.proxy import Proxy, ProxyError, authority
from agent.report.status import store_fault
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
    host, port = url.hostname or "", url.port or 443
    proxy = _proxy_for(host, settings)
    first = (proxy.host, proxy.port) if isinstance(proxy, Proxy) else (host, port)
    yield "DNS", lambda: _dns(*first)
    yield "TCP", lambda: _tcp(*first)
    yield "proxy", lambda: _proxy(proxy, host, port)
    yield "TLS", lambda: _tls(places, who, url, proxy)
    yield "clock", lambda: _clock(who)
    yield "HTTP", lambda: _http(places, settings, who)  # before MQTT: the server says why it refuses, a broker does not
    yield "MQTT", lambda: _mqtt(places, settings, who)
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


def _proxy_for(host: str, settings: Settings) -> Proxy | ProxyError | None:
    """Return the proxy on the way to `host`, or why its address cannot be read; None for no proxy."""
    try:
        return dialer.proxy_for(host, settings.network.proxy)
    except ProxyError as error:
        return error


def _dns(host: str, port: int) -> str:
    try:
        found = happy_eyeballs.resolve(host, port)
    except OSError as error:
        raise _FailedError(f"{host} cannot be resolved ({error.strerror}): check the device's DNS settings") from error
    if len(found) == 1:
        return f"{host} has address {found[0]}"
    return f"{host} has the addresses {', '.join(found)}"


def _tcp(host: str, port: int) -> str:
    """Connect to each address of a name at once; one that answers is enough, and each is named."""

    async def each_address() -> list[str | OSError]:
        addresses = happy_eyeballs.resolve(host, port)
        return await asyncio.gather(*(_tcp_address(address, port) for address in addresses))

    try:
        found = asyncio.run(each_address())
    except OSError as error:
        raise _FailedError(str(error.strerror)) from error
    said = "; ".join(str(each) for each in found)
    if all(isinstance(each, OSError) for each in found):
        name = "" if ":" in host or host.replace(".", "").isdigit() else f" for {host}"
        raise _FailedError(
            f"cannot connect{name}: {said}: check that the server runs, and that no firewall blocks the connection"
        )
    return said


async def _tcp_address(address: str, port: int) -> str | OSError:
    where = authority(address, port)
    try:
        sock = await happy_eyeballs.first_connected([address], port, timeout_s=CONNECT_S)
    except NoAnswerError as error:
        return OSError(f"{where}: {happy_eyeballs.reason_of(error.failures[0][1])}")
    sock.close()
    return f"{where} answers"


def _clock(who: identity.Identity) -> str:
    now = datetime.now(UTC)
    if now < who.floor:
        return f"{now:%Y-%m-%d %H:%M}Z is before {who.floor:%Y-%m-%d %H:%M}Z: the agent uses the latter until it is set"
    return f"{now:%Y-%m-%d %H:%M:%S}Z"


def _proxy(proxy: Proxy | ProxyError | None, host: str, port: int) -> str:
    if proxy is None:
        return "not used"
    if isinstance(proxy, ProxyError):
        raise _FailedError(str(proxy)) from proxy
    target = authority(host, port)
    try:
        with closing(dialer.connect(host, port, timeout_s=CONNECT_S, proxy=proxy)):
            return f"{proxy} connects to {target}"
    except OSError as error:
        raise _FailedError(
            f"{proxy} does not connect to {target}: {error.strerror or error}: check the proxy"
        ) from error


def _handshake(
    places: Paths, who: identity.Identity, host: str, port: int, connect: Callable[[], socket.socket]
) -> str:
    target = authority(host, port)
    tls = DeviceTls(places.identity, ReferenceClock(who.floor))
    try:
        settings = tls.for_connection()
        with (
            closing(connect()) as plain,
            settings.context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            settings.check(connection)
            return str(connection.version())
    except ssl.SSLError as error:
        raise _FailedError(f"{target}: TLS: {why(error)}: check the clock, and that no proxy intercepts TLS") from error
    except OSError as error:
        raise _FailedError(f"{target}: {error.strerror or error}") from error


def _tls(places: Paths, who: identity.Identity, url: urllib.parse.SplitResult, proxy: Proxy | ProxyError | None) -> str:
    host, port = url.hostname or "", url.port or 443

    def connect() -> socket.socket:
        return dialer.connect(host, port, timeout_s=CONNECT_S, proxy=proxy if isinstance(proxy, Proxy) else None)

    return f"{_handshake(places, who, host, port, connect)}, the server's certificate is from the fleet's CA"


def _mqtt(places: Paths, settings: Settings, who: identity.Identity) -> str:
    if not who.mqtt:
        return "this fleet has no broker; the agent talks to it over HTTPS"
    said, failed = [], 0
    for address in who.mqtt:
        try:
            said.append(_broker(places, settings, who, urllib.parse.urlsplit(address)))
        except _FailedError as error:
            said.append(str(error))
            failed += 1
    if failed == len(said):
        raise _FailedError(
            f"{'; '.join(said)} (without MQTT, the agent talks to the fleet over HTTPS, which is slower)"
        )
    return "; ".join(said)


def _broker(places: Paths, settings: Settings, who: identity.Identity, broker: urllib.parse.SplitResult) -> str:
    host, port = broker.hostname or "", broker.port or dialer.BROKER_PORTS.get(broker.scheme, 0)
    if broker.scheme == "mqtt":
        return _tcp(host, port)

    def connect() -> socket.socket:
        return dialer.connect_broker(
            broker.scheme, host, port, timeout_s=CONNECT_S, configured_proxy=settings.network.proxy
        )

    return f"{broker.netloc} answers with {_handshake(places, who, host, port, connect)}"


def _http(places: Paths, settings: Settings, who: identity.Identity) -> str:
    https = HttpsClient(
        who.devices_url, DeviceTls(places.identity, ReferenceClock(who.floor)), proxy=settings.network.proxy
    )
    try:
        https.request("GET", "/v1/desired", max_bytes=bounds.DESIRED_MAX_BYTES)
    except FetchError as error:
        if error.code is not RejectCode.NOT_FOUND:
            raise _FailedError(enrolment.exclusion(error) or error.message) from error
    return f"{who.devices_url} accepts this device's certificate"


def _host(places: Paths) -> str:
    from agent.host.ipc import host_api  # noqa: PLC0415 - the other checks work without it

    with closing(host_api.new_socket()) as sock:
        sock.settimeout(CONNECT_S)
        try:
            sock.connect(str(places.host_socket))
            host_api.send(sock, host_api.Hello(id=1, protocol=host_api.PROTOCOL))
            welcome = host_api.receive_from_host(sock)
        except host_api.UnreadableError as error:
            raise _FailedError(f"the host answers what this agent cannot read ({error}): restart fleet-host") from error
        except (OSError, host_api.IpcError) as error:
            reason = host_api.why_not(places.runtime)
            if reason:
                raise _FailedError(f"the host does not start: {reason}") from error
            raise _FailedError(f"no host listens at {places.host_socket}: {error}: start fleet-host") from error
    if not isinstance(welcome, host_api.Welcome):
        raise _FailedError("the host gave an unexpected answer: install the same version of host and agent")
    if mismatch := host_api.compatibility("fleet-host", welcome.version, welcome.protocol):
        raise _FailedError(mismatch)
    layers = sorted(welcome.containment.items())
    missing = ", ".join(name for name, there in layers if not there)
    present = ", ".join(name for name, there in layers if there) or "none"
    return f"fleet-host {welcome.version}, isolation layers: {present}" + (f"; missing {missing}" if missing else "")


def _disk(places: Paths, settings: Settings) -> str:
    """Check the room on the disk and the database there; name both where both fail."""
    failed: _FailedError | None = None
    try:
        text = _room(places, settings)
    except _FailedError as error:
        text, failed = str(error), error
    if fault := store_fault(places):
        raise _FailedError(f"{text}; {fault}" if failed else fault) from failed
    if failed:
        raise failed
    return text


def _room(places: Paths, settings: Settings) -> str:
    if not places.state.is_dir():
        raise _FailedError(f"{places.state} does not exist: install the package, or run 'fleet-agent enroll' first")
    if is_read_only(places.state):
        raise _FailedError(
            f"{places.state} is on a read-only file system: look at 'dmesg' for its errors, and mount it writable"
        )
    try:
        disk.probe(Write.CHECK, temporary_name(places.state / "check"))
    except PermissionError:
        raise _FailedError(f"{places.state} is not writable by this user: run as the agent's user or as root") from None
    except OSError as error:
        raise _FailedError(f"{places.state} cannot be written: {error.strerror}: check the disk") from error
    free = shutil.disk_usage(places.state).free
    if free < settings.disk.reserve_bytes:
        raise _FailedError(
            f"only {free >> 20} MiB are free, below the reserve of {settings.disk.reserve_bytes >> 20} MiB: free space"
        )
    return f"{free >> 20} MiB free in {places.state}"
