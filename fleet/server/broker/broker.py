"""Choice, start, supervision and revocation list of the broker; configuration of Mosquitto.

The broker is external, Mosquitto, or the embedded one. A broker started here is a child process, restarted when it
ends; its output goes to the server's log.

Mosquitto gets a generated configuration. Each client shows a certificate of the fleet's CA, whose CN becomes user
name and client id, so that no device can impersonate another. A device writes the channels of its own `up/`, reads
those of its own `down/` and the common poke, and nothing else; the server reads and writes everything. Devices that are
revoked or suspended get a deny line, which from the next SIGHUP on also blocks an open connection. Memory for each
client is bounded; what Mosquitto cannot limit for each client is limited by `fleet.server.device_budget`.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from fleet.ca import SERVER_CN
from fleet.protocol import bounds, topics
from fleet.protocol.files import atomic_write, set_aside
from fleet.server.config import EVERYWHERE, Address, ServerConfig, ServerPaths
from fleet.server.limits import DEFAULTS, ServerLimits

LISTS: Final = "issuers.crl"


class Reader(NamedTuple):
    """Consumer: its user, and the filters that it may read; none for one that was revoked."""

    user: str
    topics: tuple[str, ...]


class Denied(NamedTuple):
    """Devices that the broker refuses: revoked ones altogether, of suspended ones what they write; and consumers."""

    revoked: Sequence[str] = ()
    suspended: Sequence[str] = ()
    readers: Sequence[Reader] = ()


class Broker:
    """Broker of the fleet.

    Attributes:
        name: `mosquitto`, `embedded` or `external`.
        address: address for the server's connection.
        remembers: whether it keeps messages and sessions over a restart.
    """

    def __init__(
        self,
        name: str,
        bind: Address,
        program: list[str] | None,
        home: ServerPaths,
        lists: Callable[[], bytes],
        limits: ServerLimits = DEFAULTS,
    ) -> None:
        """Create a broker at `bind`; `program` is its command, None for an external broker."""
        self.name, self._limits = name, limits
        self.address = bind if program is None else bind.here
        self.remembers = name != "embedded"
        self._bind = bind
        self._child = None if program is None else Child(name, program, self.address, self._set_database_aside)
        self._forgotten = False
        self._home = home
        self._lists = lists

    @classmethod
    def choose(cls, config: ServerConfig, home: ServerPaths, lists: Callable[[], bytes]) -> "Broker":
        """Choose the broker that the configuration and this machine allow.

        `lists` gives the revocation lists of the accepted issuers: certificates of others are refused.

        Raises:
            BrokerError: Mosquitto is missing, and the embedded broker is only for development on one machine.
        """
        external = config.external_broker
        if external is not None:
            return cls("external", external, None, home, lists)
        bind = Address.parse(config.mqtt, "mqtt")
        program = find() if config.broker in {"auto", "mosquitto"} else None
        if program is None and config.broker == "mosquitto":
            raise BrokerError("mosquitto is not installed: apt install mosquitto, or name another with --broker")
        if program is None and (config.production or not bind.loopback):
            raise BrokerError(
                "the embedded broker is for development on one machine: "
                "install mosquitto, or name one with --broker mqtts://HOST:PORT"
            )
        if program is not None:
            command = [str(program), "-c", str(home.broker / FILE)]
            return cls("mosquitto", bind, command, home, lists, config.limits)
        files = (home.ca / "ca.pem", home.tls / "server.pem", home.tls / "server.key")
        command = [sys.executable, "-m", "fleet.server.broker.embedded", bind.host, str(bind.port)]
        command += [
            str(path) for path in (*files, home.broker / "revoked", home.broker / "suspended", home.broker / LISTS)
        ]
        most = config.limits
        command += map(str, (most.broker_client_bytes, most.broker_client_messages, most.broker_memory_bytes))
        return cls("embedded", bind, command, home, lists, most)

    @property
    def pid(self) -> int | None:
        """Process id of a broker that was started here; None for none."""
        return None if self._child is None else self._child.pid

    async def start(self, denied: Denied) -> None:
        """Start the broker and return when it listens. Raises `BrokerError`."""
        if self._child is not None:
            self._write(denied)
            if self.name == "mosquitto":
                self._configure()
            await self._child.start()

    def has_forgotten(self) -> bool:
        """Tell, once, whether the broker's stored messages were lost, and have to be published again."""
        forgotten, self._forgotten = self._forgotten, False
        return forgotten

    def _set_database_aside(self) -> bool:
        """Move Mosquitto's database out of its way, where there is one; true when it may start now."""
        path = self._home.broker / "data" / "mosquitto.db"
        if self.name != "mosquitto" or not path.exists():
            return False
        aside = set_aside(path)
        self._forgotten = True
        log.warning("the broker cannot read its database: moved to %s, its messages are published again", aside)
        return True

    def shut_out(self, denied: Denied) -> None:
        """Revoke and suspend devices at the broker, and let it reload certificates from disk."""
        if self._child is not None:
            self._write(denied)
            self._child.reload()

    async def start_again(self, denied: Denied) -> None:
        """Restart the broker, to end connections that are no longer accepted. Raises `BrokerError`."""
        await self.stop()
        await self.start(denied)

    async def stop(self) -> None:
        """Stop the broker."""
        if self._child is not None:
            await self._child.stop()

    def _configure(self) -> None:
        tls, lists = self._home.tls, self._home.broker / LISTS
        configure(
            self._home.broker,
            address=self._bind,
            ca=self._home.ca / "ca.pem",
            certificate=tls / "server.pem",
            key=tls / "server.key",
            lists=lists if lists.stat().st_size else None,
            limits=self._limits,
        )

    def _write(self, denied: Denied) -> None:
        atomic_write(self._home.broker / LISTS, self._lists(), mode=0o644)
        if self.name == "mosquitto":
            write_acl(self._home.broker, denied)
        else:
            atomic_write(self._home.broker / "revoked", "\n".join(sorted(denied.revoked)), mode=0o644)
            atomic_write(self._home.broker / "suspended", "\n".join(sorted(denied.suspended)), mode=0o644)


log = logging.getLogger(__name__)
_READY_S: Final = 60.0
_CRASHES: Final = frozenset({-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS})
_STOP_S: Final = 5.0
_BACKOFF_MAX_S: Final = 10.0


class BrokerError(Exception):
    """The broker cannot run; the message is one line."""


class Child:
    """Broker process, kept running until `stop`.

    Args:
        name: name in the log.
        command: program (absolute path) and arguments.
        address: address on which it will listen.
        mend: called when the broker cannot read its stored state; returns True when another start may succeed.
    """

    def __init__(
        self, name: str, command: Sequence[str], address: Address, mend: Callable[[], bool] = lambda: False
    ) -> None:
        self.name = name
        self._mend = mend
        self._command = command
        self._address = address
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._last_words = ""

    @property
    def pid(self) -> int | None:
        """Process id; None while it does not run."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    async def start(self) -> None:
        """Start the process and return when it listens.

        Raises:
            BrokerError: it ended, or did not listen in time.
        """
        try:
            await self._come_up()
        except BrokerError:
            if not self._can_mend():
                raise
            await self._come_up()
        self._task = asyncio.create_task(self._watch(), name=f"{self.name} watch")

    async def _come_up(self) -> None:
        await self._spawn()
        try:
            async with asyncio.timeout(_READY_S):
                await self._listening()
        except TimeoutError:
            await self.stop()
            raise BrokerError(f"{self.name} does not listen at {self._address}: {self._last_words}") from None

    def _can_mend(self) -> bool:
        """Tell whether it ended at its stored state, and that is out of its way now."""
        crashed = self._process is not None and self._process.returncode in _CRASHES
        return ("database" in self._last_words or crashed) and self._mend()

    async def stop(self) -> None:
        """Stop the process: SIGTERM, then SIGKILL."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
            try:
                async with asyncio.timeout(_STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    def reload(self) -> None:
        """Reload its configuration (SIGHUP)."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGHUP)

    async def _spawn(self) -> None:
        tether = (sys.executable, "-m", "fleet.server.broker.tether", str(os.getpid()))
        self._process = await asyncio.create_subprocess_exec(
            *tether,
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the server, which then stops its broker
        )
        self._reader = asyncio.create_task(self._listen_to(self._process))

    async def _listen_to(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # longer than the reader's buffer: dropped, but a broker that nobody reads stands still
                continue
            if not line:
                return
            self._last_words = line.decode(errors="replace").strip()[-300:]
            log.info("%s: %s", self.name, self._last_words)

    async def _listening(self) -> None:
        while True:
            assert self._process is not None
            if self._process.returncode is not None:
                await self._reader
                raise BrokerError(f"{self.name} ended at once: {self._last_words or 'it said nothing'}")
            try:
                _, writer = await asyncio.open_connection(self._address.host, self._address.port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            return

    async def _watch(self) -> None:
        backoff = 0.2
        while True:
            assert self._process is not None
            code = await self._process.wait()
            log.error("%s ended (%s): %s; it is started again", self.name, code, self._last_words)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, _BACKOFF_MAX_S)
            started = asyncio.get_running_loop().time()
            self._last_words = ""
            await self._spawn()
            with contextlib.suppress(BrokerError, TimeoutError):
                try:
                    async with asyncio.timeout(_READY_S):
                        await self._listening()
                except BrokerError:
                    self._can_mend()
                    raise
                if asyncio.get_running_loop().time() - started < _READY_S:
                    backoff = 0.2


FILE: Final = "mosquitto.conf"
_SBIN: Final = "/usr/sbin:/usr/local/sbin"
MAX_PACKET_BYTES: Final = bounds.DESIRED_MAX_BYTES + 4 * bounds.KIB
_IN_FLIGHT_SHARE: Final = 4
"""A fourth of what may wait for a client may be on its way to it at once."""


def find() -> Path | None:
    """Find the program; None where it is not installed."""
    found = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:{_SBIN}")
    return None if found is None else Path(found)


def configure(
    directory: Path,
    *,
    address: Address,
    ca: Path,
    certificate: Path,
    key: Path,
    lists: Path | None = None,
    limits: ServerLimits = DEFAULTS,
) -> Path:
    """Write the configuration and return its path. `write_acl` goes with it.

    `lists`: a file with the revocation lists of the accepted issuers; certificates of others are refused.
    """
    data = directory / "data"
    data.mkdir(mode=0o700, exist_ok=True)
    lines = [
        "# Generated by `fleet serve` at each start: changes are lost.",
        "per_listener_settings false",
        # without an address Mosquitto listens at every one of both families, with `::` at IPv6 alone
        f"listener {address.port}" + ("" if address.host == EVERYWHERE else f" {address.host}"),
        f"cafile {ca}",
        f"certfile {certificate}",
        f"keyfile {key}",
        *([] if lists is None else [f"crlfile {lists}"]),
        "tls_version tlsv1.2",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "allow_anonymous false",
        f"acl_file {directory / 'acl'}",
        "persistence true",
        f"persistence_location {data}/",
        "autosave_interval 300",
        "persistent_client_expiration 14d",
        "max_inflight_messages 1000",
        f"max_inflight_bytes {limits.broker_client_bytes // _IN_FLIGHT_SHARE}",
        f"max_queued_messages {limits.broker_client_messages}",
        f"max_queued_bytes {limits.broker_client_bytes}",
        f"memory_limit {limits.broker_memory_bytes}",
        f"max_packet_size {MAX_PACKET_BYTES}",
        f"message_size_limit {bounds.DESIRED_MAX_BYTES}",
        "log_dest stdout",
        "log_type error",
        "log_type warning",
        "connection_messages false",
    ]
    if os.geteuid() == 0:
        lines.append("user root")  # else Mosquitto would switch to a user who cannot read these files
    path = directory / FILE
    atomic_write(path, "\n".join(lines) + "\n", mode=0o644)
    return path


def write_acl(directory: Path, denied: Denied) -> None:
    """Write the access list. A running Mosquitto reads it at SIGHUP."""
    lines = [
        "# Generated by `fleet serve`: changes are lost.",
        f"user {SERVER_CN}",
        f"topic readwrite {topics.PREFIX}/#",
        "",
    ]
    for device in sorted(denied.revoked):
        lines += [f"user {device}", "topic deny #", ""]
    for device in sorted(set(denied.suspended) - set(denied.revoked)):
        lines += [f"user {device}", f"topic deny {topics.PREFIX}/+/{device}/up/#", ""]
    for reader in denied.readers:
        lines += [f"user {reader.user}", *(f"topic read {topic}" for topic in reader.topics)]
        lines += [*(f"topic deny {topic}" for topic in topics.not_of_consumers(reader.user)), ""]
    lines += [f"pattern {right} {topic}" for right, topic in topics.device_rights("%u")]
    atomic_write(directory / "acl", "\n".join(lines) + "\n", mode=0o600)
