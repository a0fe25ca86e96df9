"""Server process of `fleet serve`: everything in one event loop, except for the broker, which is a child process.

Start in this order: store, TUF repository, ports (so that a port in use is reported at once), broker, connection to the
broker, rollout loop, two listeners. All state is in the store: a server that is killed at any instant resumes where it
was.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from fleet import ca
from fleet.ca import CaError, CertificateAuthority
from fleet.protocol import operator_api, wire
from fleet.protocol.assignment import CheckIn
from fleet.protocol.files import remove_leftovers
from fleet.protocol.messages import Poke
from fleet.protocol.topics import POKE, RETAINED, Down, Topic
from fleet.server import consumers
from fleet.server import listener as listeners
from fleet.server.ahead import AheadDevices
from fleet.server.api import routes
from fleet.server.api.archives import Archives
from fleet.server.api.devices import DeviceApi, LogRelay, Talk
from fleet.server.api.messages import MessageHandlers
from fleet.server.api.metrics import Figures, Metrics
from fleet.server.api.operators import (
    CommandHandlers,
    DeviceHandlers,
    EnrolmentHandlers,
    FleetHandlers,
    GroupHandlers,
    RolloutHandlers,
)
from fleet.server.api.publishing import Artifacts, PublishingHandlers
from fleet.server.api.routes import Handlers
from fleet.server.api.secrets import SecretHandlers
from fleet.server.api.trust import CaHandlers, OnlineRoles, OperatorAccounts
from fleet.server.api.views import Views
from fleet.server.broker.broker import Broker, BrokerError, Denied
from fleet.server.check_ins import CheckIns
from fleet.server.clock import BEHIND_MAX, ServerClock
from fleet.server.config import HomeError, ServerConfig, ServerPaths
from fleet.server.consumers import ConsumerHandlers, Kick, MessageRelay, ReadersBroker
from fleet.server.device_budget import DeviceBudget, RequestBudget
from fleet.server.device_keys import DeviceKeys
from fleet.server.director import LIFE, RENEW_BEFORE, Director
from fleet.server.enrolment import Enrolment
from fleet.server.exchange import Exchanges
from fleet.server.ingest import Ingest
from fleet.server.listener import Certificates, Listener, PortError, bind
from fleet.server.mqtt import MqttClient
from fleet.server.rollout_controller import RolloutController
from fleet.server.rollout_members import Membership
from fleet.server.rollout_planner import RolloutPlanner
from fleet.server.tuf_repository import OnlineKeys, TrustedSigner, TufRepository
from fleet.store.sqlite import StoreError, check_owner, utc
from fleet.store.store import AuditLog, ChangeSignal, Store
from signing.errors import SigningError

log = logging.getLogger(__name__)
UPKEEP_S: Final = 600
LAST_COMMAND_S: Final = 1.0
"""Longest wait for the broker to pass on the last command to a device that is revoked."""

END_S: Final = 30.0
"""Longest end after SIGTERM: below the 90 s of systemd, above the waits for requests and the broker."""

POKE_JITTER_PER_BOARD_S: Final = 0.01


class ServeError(Exception):
    """The server cannot run; one line says what, why and what to do."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Addresses of a server that is ready."""

    fleet: str
    operators_url: str
    devices_url: str
    mqtt: tuple[str, ...]
    broker: str


class Server:
    """Server of one fleet.

    Args:
        home: created by `fleet.admin.bootstrap.init`.
        broker: overrides the configuration's.
        clock: the time, UTC: a clock of its own, or a function by which time passes.
        trust_clock: believe the system clock, however far it is from the last time that the server knows of.
    """

    def __init__(
        self,
        home: Path,
        *,
        broker: str | None = None,
        clock: ServerClock | Callable[[], datetime] | None = None,
        trust_clock: bool = False,
    ) -> None:
        self._home = ServerPaths(home)
        self._time = (
            ServerClock() if clock is None else clock if isinstance(clock, ServerClock) else ServerClock.of(clock)
        )
        self._clock = self._time.now
        self._trust_clock = trust_clock
        self._broker_wish = broker
        self._stack = contextlib.AsyncExitStack()

    async def start(self) -> Ready:
        """Start every part, and return once devices and operators can connect.

        Raises:
            ServeError: the server cannot run; every started part is stopped again.
        """
        try:
            return await self._start()
        except (HomeError, StoreError, SigningError, CaError, BrokerError, PortError) as error:
            await self.stop()
            raise ServeError(str(error)) from error
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop every part, in reverse order."""
        await self._stack.aclose()

    async def _start(self) -> Ready:
        self._config = self._read_config()
        self._lock()
        if found := remove_leftovers(self._home.server):
            log.warning("%d files that were being written when the power went are removed", found)
        self._store = Store.open(self._home.database, fleet=self._config.fleet, create=False)
        self._stack.callback(self._store.close)
        self._start_clock()
        self._repository = TufRepository(self._home.repository, OnlineKeys(self._home.keys))
        self._repository.check_keys()
        self._repository.keep_fresh(now=self._clock())
        # a fleet may have moved to another size since server.toml was written: root has the present one
        self._config = replace(self._config, size=self._repository.size)
        for note in ca.mend(self._home.ca, now=self._clock()):
            log.warning("%s", note)
        self._ca = CertificateAuthority.load(self._home.ca)
        self._certificates = Certificates(self._home, self._ca, self._config.host, self._time)
        operators = self._bind(self._config.operators, "the API for operators")
        devices = self._bind(self._config.devices, "the API for devices")
        self._broker = await self._start_broker()
        self._compose()
        files, certificates = listeners.files_for_each(2), self._certificates
        for_operators = routes.application(self._operators, self._store)
        for_devices = routes.device_application(self._devices)
        limits = self._config.limits
        seen = self._latencies
        for application, sockets, context, most in (
            (seen.of(for_operators, "operators"), operators, certificates.context(devices=False), limits.operators),
            (seen.of(for_devices, "devices"), devices, certificates.context(devices=True), limits.devices),
        ):
            if most.within(files) != most:
                log.warning("only %s connections: this process may not have more open files (ulimit -n)", files)
            listener = Listener(application, sockets, context, most.within(files))
            self._stack.push_async_callback(listener.stop)
            await listener.start()
        self._stack.callback(self._end_polls)
        self._run(self._conductor.run(), "rollouts")
        self._run(self._exchanges.run(), "conversations over HTTPS")
        self._run(self._upkeep(), "upkeep")
        self._run(self._relay.run(), "messages for consumers")
        return Ready(
            fleet=self._config.fleet,
            operators_url=self._config.operators_url,
            devices_url=self._config.devices_url,
            mqtt=self._config.mqtt_urls,
            broker=self._broker.name,
        )

    def _bind(self, where: str, what: str) -> list[socket.socket]:
        sockets = bind(where, what)
        for sock in sockets:
            self._stack.callback(sock.close)
        return sockets

    # -- parts -------------------------------------------------------------------------------------------------------

    def _start_clock(self) -> None:
        """Compare the clock with the last time that the server knows of, and store that time from now on."""
        witness = self._store.witness(before=self._time.now().timestamp())
        if witness is not None and not self._trust_clock:
            self._time.start_from(utc(witness))
        for problem in self._time.problems():
            log.error("%s", problem)
        self._stack.callback(self._store_witness)
        self._store_witness()
        self._started_at = self._clock()

    def _store_witness(self) -> None:
        self._store.set_witness(self._time.settle().timestamp())

    def _read_config(self) -> ServerConfig:
        config = ServerConfig.load(self._home.config)
        if self._broker_wish is not None:
            config = replace(config, broker=self._broker_wish)
            config.check()
        check_owner(self._home.server)
        return config

    def _lock(self) -> None:
        path = self._home.server / "lock"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ServeError(f"cannot write {self._home.server}: {error.strerror}; run as its owner") from error
        self._stack.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ServeError(f"another server runs on {self._home.root}: stop it, or use another --home") from None

    async def _start_broker(self) -> Broker:
        broker = Broker.choose(self._config, self._home, lambda: self._ca.revocation_lists)
        if broker.name != "external":
            for sock in bind(self._config.mqtt, "the broker"):
                sock.close()
        self._stack.push_async_callback(broker.stop)
        await broker.start(self._denied())
        return broker

    def _denied(self) -> Denied:
        revoked = [row.id for row in self._store.devices.all() if row.revoked]
        readers = consumers.readers(self._store, now=self._clock().timestamp())
        return Denied(revoked=revoked, suspended=self._store.devices.suspended(), readers=readers)

    def _compose(self) -> None:
        store, repository, clock = self._store, self._repository, self._clock
        audit = AuditLog(store, clock)
        watch = self._changes = ChangeSignal()
        self._artifacts = Artifacts(
            self._home.artifacts,
            most_bytes=self._config.limits.artifact_bytes,
            most_data_bytes=self._config.limits.data_bytes,
        )
        _ = repository.director  # without it, or with one that others can read, no server starts
        self._director = Director(
            store=store,
            repository=repository,
            signer=TrustedSigner(lambda: repository.director),
            fleet=self._config.fleet,
            publish=self._publish,
            clock=clock,
        )
        check_ins = CheckIns(self._director)
        membership = Membership(store=store, repository=repository, director=self._director)
        self._conductor = RolloutController(
            store=store,
            director=self._director,
            membership=membership,
            watch=watch,
            clock=clock,
            check_ins=check_ins,
        )
        self._budget = DeviceBudget(
            store=store,
            clock=clock,
            monotonic=time.monotonic,
            silence=lambda: self._broker.shut_out(self._denied()),
            clear=lambda topic: self._bus.publish(topic, b"", retain=True),
            limits=self._config.limits,
        )
        ingest = self._ingest = Ingest(
            store=store,
            director=self._director,
            conductor=self._conductor,
            check_ins=check_ins,
            watch=watch,
            budget=self._budget,
            clock=clock,
        )
        self._exchanges = Exchanges(
            take=ingest.on_message,
            clock=time.monotonic,
            most_held=self._config.limits.device_connections // 4,
        )
        self._bus = MqttClient(
            address=self._broker.address,
            ca=self._home.ca / "ca.pem",
            certificate=self._certificates.client,
            on_message=self._on_broker_message,
            on_connected=self._on_connected,
            remembered=self._broker.remembers,
        )
        self._relay = MessageRelay(store=store, bus=lambda: self._bus, changes=watch, clock=clock)
        self._stack.push_async_callback(self._bus.close)
        self._stack.callback(ingest.flush)
        self._online = OnlineRoles(repository=repository, shown=self._touch_all, audit=audit, clock=clock)
        enrolment = Enrolment(
            store=store,
            ca=self._ca,
            repository=repository,
            config=self._config,
            clock=clock,
            budget=RequestBudget(time.monotonic, self._config.limits),
        )
        planner = RolloutPlanner(
            store=store,
            repository=repository,
            director=self._director,
            membership=membership,
            conductor=self._conductor,
            clock=clock,
        )
        logs = self._logs = LogRelay(clock)
        archives = self._archives = Archives(audit, clock)
        views = Views(
            store=store, director=self._director, dropped=ingest.dropped, clock=clock, waits=self._conductor.waits
        )
        ahead = self._ahead = AheadDevices(
            store=store, repository=repository, director=self._director, controller=self._conductor, clock=clock
        )
        keys = DeviceKeys(
            store=store, repository=repository, director=self._director, controller=self._conductor, clock=clock
        )
        figures = Figures(
            version=_version(),
            started_at=self._started_at,
            connected=lambda: self._bus.connected,
            messages=ingest.counts,
            pending=lambda: ingest.pending,
            certificates=lambda: {
                "root": self._ca.root.not_valid_after_utc,
                "issuing": self._ca.issuer.not_valid_after_utc,
                "server": self._certificates.ends,
            },
            roles=lambda: {role.role: role.expires for role in self._repository.roles()},
            ahead=ahead.count,
        )
        metrics = Metrics(store=store, figures=figures, clock=clock, monotonic=time.monotonic)
        self._latencies = metrics.latencies
        self._operators = Handlers(
            fleet=FleetHandlers(views=views, metrics=metrics, status=self.status, ahead=ahead),
            devices=DeviceHandlers(
                store=store, controller=self._conductor, planner=planner, keys=keys, views=views, audit=audit
            ),
            commands=CommandHandlers(
                store=store, director=self._director, logs=logs, archives=archives, audit=audit, clock=clock
            ),
            enrolment=EnrolmentHandlers(
                store=store,
                enrolment=enrolment,
                controller=self._conductor,
                views=views,
                update_revoked=self._on_revoked,
                audit=audit,
                clock=clock,
            ),
            groups=GroupHandlers(store=store, controller=self._conductor, views=views, audit=audit, clock=clock),
            rollouts=RolloutHandlers(store=store, planner=planner, views=views, changes=watch),
            publishing=PublishingHandlers(
                store=store,
                repository=repository,
                artifacts=self._artifacts,
                controller=self._conductor,
                online=self._online,
                audit=audit,
                clock=clock,
            ),
            secrets=SecretHandlers(
                store=store,
                repository=repository,
                director=self._director,
                controller=self._conductor,
                audit=audit,
                clock=clock,
            ),
            accounts=OperatorAccounts(store=store, audit=audit, clock=clock),
            ca=CaHandlers(ca=self._ca, hosts=self._hosts, changed=self._on_issuer, audit=audit, clock=clock),
            online=self._online,
            logs=logs,
            messages=MessageHandlers(store=store, changes=watch),
            archives=archives,
            consumers=ConsumerHandlers(
                store=store,
                ca=self._ca,
                broker=ReadersBroker(
                    name=self._broker.name,
                    urls=self._config.mqtt_urls,
                    changed=lambda: self._broker.shut_out(self._denied()),
                    kick=Kick(
                        issue=lambda user, life: consumers.throwaway(self._ca, user, now=clock(), life=life),
                        ca=self._home.ca / "ca.pem",
                        address=lambda: self._broker.address,
                    ),
                ),
                audit=audit,
                clock=clock,
            ),
        )
        self._devices = DeviceApi(
            store=store,
            repository=repository,
            artifacts=self._artifacts,
            enrolment=enrolment,
            clock=clock,
            talk=Talk(logs, archives, self._exchanges, suspended=self._budget.suspended),
            ahead=ahead,
        )

    def _end_polls(self) -> None:
        """Answer long polls with what there is, so that followers ask again, and find the next server."""
        self._changes.close()
        self._logs.close()
        self._archives.close()
        self._exchanges.close()

    def _touch_all(self) -> None:
        self._conductor.touch(row.id for row in self._store.devices.all())

    @property
    def _hosts(self) -> tuple[str, ...]:
        external = self._config.external_broker
        return (self._config.host, *(() if external is None else (external.host,)))

    async def _on_issuer(self) -> None:
        """Replace certificates after a change of the issuing CA, and end connections that are no longer accepted."""
        self._certificates.renew()
        await self._broker.start_again(self._denied())

    async def _on_revoked(self, device: str) -> None:
        """Shut a device out of the broker, and clear what the broker retains for it and of it.

        Its last command makes it ask over HTTPS, where it is told that it is revoked: a broker gives no reason.
        """
        try:
            self._director.command(device, CheckIn())
            await self._bus.acknowledged(LAST_COMMAND_S)
        except SigningError as error:
            log.warning("%s is not told that it is revoked: %s", device, error)
        finally:
            self._exchanges.forget(device)
            self._broker.shut_out(self._denied())
            self._budget.clear(device, Topic(device, Down.DESIRED))

    def _publish(self, topic: Topic, payload: bytes) -> bool:
        retain = topic.channel in RETAINED
        if self._exchanges.put(topic, payload) and not retain:
            return True  # the broker would only queue it
        return self._bus.publish(str(topic), payload, retain=retain) or self._exchanges.has(topic.device)

    def _on_broker_message(self, topic: str, payload: bytes) -> None:
        if not self._exchanges.overrides(topic, payload):
            self._ingest.on_message(topic, payload)

    def _on_connected(self) -> None:
        """Publish what devices may have missed after a (re)connection to the broker, and make them check in."""
        lost = self._broker.has_forgotten()
        for device in [row.id for row in self._store.devices.all()] if lost else self._store.delivery.behind():
            row = self._store.delivery.assignment(device)
            if row is not None:
                self._director.publish_assignment(row)
        devices = self._store.devices.count().total
        jitter_s = min(60, int(devices * POKE_JITTER_PER_BOARD_S))
        self._bus.publish(POKE, wire.encode(Poke(jitter_s=jitter_s)))
        self._conductor.wake()

    # -- upkeep ------------------------------------------------------------------------------------------------------

    def _run(self, coroutine: Any, name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)

        async def end() -> None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        self._stack.push_async_callback(end)

    async def _upkeep(self) -> None:
        """Periodic housekeeping: online roles, assignments before they expire, certificates, old reports."""
        while True:
            await asyncio.sleep(UPKEEP_S)
            try:
                for _ in self._round():
                    await asyncio.sleep(0)
            except Exception:
                log.exception("upkeep failed; it is tried again")

    def keep_up(self) -> None:
        """Run one round of housekeeping at once."""
        for _ in self._round():
            pass

    def _round(self) -> Iterator[None]:
        """Run one round of housekeeping, piece by piece: between two of them others have the loop and the database."""
        self._store_witness()
        when = self._clock()
        self._repository.keep_fresh(now=when)
        self._budget.lift()
        if self._certificates.renew():
            self._broker.shut_out(self._denied())
        yield
        unfit = self._store.delivery.expiring(
            (when + RENEW_BEFORE).timestamp(), after=(when + LIFE + BEHIND_MAX).timestamp()
        )
        for device in unfit:
            self._director.reconcile(device, renew=True)
            yield
        keep = timedelta(days=self._config.keep_days)
        for _ in self._store.delivery.forgetting(before=(self._time.earliest - keep).timestamp()):
            yield
        self._store.delivery.trim(self._config.limits.device_rows)
        limits = self._config.limits
        keep = timedelta(days=limits.readings_kept_days)
        for _ in self._store.readings.forgetting(before=(self._time.earliest - keep).timestamp()):
            yield
        for _ in self._store.readings.trimming(
            device_bytes=limits.device_readings_kept_bytes, all_bytes=limits.readings_kept_bytes
        ):
            yield

    def status(self) -> operator_api.Status:
        """Return a summary of the fleet."""
        devices, online = self._store.devices.count()
        roles = self._repository.roles()
        when = self._clock()
        problems = [
            *ca.warnings(self._ca, now=when),
            *self._online.problems(),
            *self._devices.problems(),
            *self._artifacts.problems(),
        ]
        problems += [*self._ahead.problems(), *self._budget.problems(), *self._ingest.problems()]
        problems += [
            f"the role {role.role} expired on {role.expires:%Y-%m-%d}" for role in roles if role.expires <= when
        ]
        problems[:0] = self._time.problems()
        if not self._bus.connected:
            problems.insert(0, f"the server is not connected to its broker at {self._broker.address}")
        return operator_api.Status(
            fleet=self._config.fleet,
            size=self._repository.size,
            production=self._repository.size != "dev",
            version=_version(),
            now=when,
            started_at=self._started_at,
            operators_url=self._config.operators_url,
            devices_url=self._config.devices_url,
            mqtt=self._config.mqtt_urls,
            broker=self._broker.name,
            broker_connected=self._bus.connected,
            devices=devices,
            online=online,
            groups=len(self._store.devices.groups()),
            open_rollouts=len(self._store.rollouts.open()),
            roles=roles,
            waiting=tuple(self._conductor.waiting()),
            problems=tuple(problems),
        )

    @property
    def broker_pid(self) -> int | None:
        """Process id of a broker that was started here; None for none."""
        return self._broker.pid


async def run(
    home: Path,
    *,
    broker: str | None = None,
    trust_clock: bool = False,
    on_ready: Callable[[Ready], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Run a fleet's server until SIGTERM, SIGINT or `stop`.

    Args:
        home: created by `fleet.admin.bootstrap.init`.
        broker: overrides the configuration's: `auto`, `mosquitto`, `embedded` or `mqtts://host:port`.
        trust_clock: as for `Server`.
        on_ready: called once when devices and operators can come.
        stop: set it to end the server.

    Raises:
        ServeError: the server cannot run.
    """
    ending = asyncio.Event() if stop is None else stop
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ValueError, RuntimeError):  # outside the main thread, `stop` is the only way to end
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _end, ending)
    listeners.allow_files()
    server = Server(home, broker=broker, trust_clock=trust_clock)
    ready = await server.start()
    try:
        if on_ready is not None:
            on_ready(ready)
        await ending.wait()
    finally:
        await server.stop()


def _end(ending: asyncio.Event) -> None:
    """End in order, and in any case after `END_S`: the store is whole at any instant, and the broker is tethered."""
    if not ending.is_set():
        last = threading.Timer(END_S, _end_now)
        last.daemon = True
        last.start()
    ending.set()


def _end_now() -> None:
    log.error("the server has not ended in %s s: it ends at once, and goes on from its store at the next start", END_S)
    os._exit(1)


def _version() -> str:
    try:
        return metadata.version("wasmfleet")
    except metadata.PackageNotFoundError:
        return "0"
