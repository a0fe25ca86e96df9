"""`fleet-agent run`: the one asyncio loop that connects the board's parts.

It decides nothing itself: assignments are judged by `signing`, changes by `agent.update`, and instances are the host's.
That the agent stops, starts or is upgraded touches no instance.
"""

import asyncio
import contextlib
import logging
import random
import secrets
import signal
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from agent import enroll, health, images, restore, systemd
from agent.bus import Bus
from agent.carry import Carrier, Host
from agent.config import Places, Settings
from agent.deploy import Board, Deployer
from agent.fetch import FetchError, Https
from agent.host import ipc
from agent.hostlink import HostGoneError, HostLink, HostRefusedError
from agent.identity import Identity
from agent.outbox import Outbox
from agent.store import Store
from agent.tls import DeviceTls
from agent.trust import Trust, remembered_assignment
from agent.worker import Worker
from fleet.protocol import caps, wire
from fleet.protocol.api import RenewReply, RenewRequest
from fleet.protocol.assignment import CheckIn, FollowLogs, Restart
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.messages import Ack, Health, Hello, InstanceHealth, Poke, Report, State
from fleet.protocol.topics import POKE, BadTopicError, Down, Topic, Up
from signing.errors import Rejected

log = logging.getLogger("agent")

HEALTH_AFTER_CHANGE_S: Final = 1.0
RENEW_CHECK_S: Final = 6 * 3600.0
RESTARTS_PER_HOUR: Final = 6
POKES_MIN_S: Final = 30.0


class Daemon:
    """The agent of one enrolled board."""

    def __init__(
        self, *, identity: Identity, root: bytes, mac_key: bytes, places: Places, settings: Settings, store: Store
    ) -> None:
        """An agent with what lies in `identity/`; the opened `store` belongs to its worker from now on."""
        self._identity = identity
        self._places = places
        self._settings = settings
        self._store = store
        self._worker = Worker("store")
        self._boot_id = health.boot_id()
        self._nonce = ""
        self._refusals: set[tuple[str, str]] = set()
        self._problems: dict[str, str] = {}
        self._restarts: list[float] = []
        self._poked_at = -POKES_MIN_S
        self._tasks: set[asyncio.Task[Any]] = set()
        self._health_due = asyncio.Event()
        self._refresh_due = asyncio.Event()
        self._stop = asyncio.Event()
        self._faulty = False
        self._welcome: ipc.Welcome | None = None
        floor = identity.floor
        tls = DeviceTls(places.identity, lambda: floor)
        network = settings.network
        self._https = Https(
            identity.devices_url,
            tls,
            proxy=network.proxy,
            request_s=network.request_s,
            download_s=network.download_s,
            min_rate_bytes_s=network.min_rate_bytes_s,
            reserve_bytes=settings.disk.reserve_bytes,
        )
        self._trust = Trust(
            identity=identity,
            root=root,
            cache=places.trust,
            https=self._https,
            store=store,
            production=settings.production,
        )
        policy = settings.policy
        self._images = images.Images(
            places.images, mac_key, memory_bytes=policy.compile_memory_bytes, seconds=policy.compile_s
        )
        self._link = HostLink(places.host_socket, on_event=self._on_host_event)
        self._host = Host(self._link)
        carrier = Carrier(
            places=places,
            settings=settings,
            worker=self._worker,
            trust=self._trust,
            https=self._https,
            images=self._images,
            host=self._host,
            clock=health.boot_clock,
            jitter=random.random,
        )
        self._carrier = carrier
        board = Board(
            device=identity.device,
            boot_id=self._boot_id,
            places=places,
            mac_key=mac_key,
            clock=health.boot_clock,
        )
        self._deployer = Deployer(
            board=board, store=store, worker=self._worker, carrier=carrier, on_report=self._on_report
        )
        self._outbox = Outbox(store=store, worker=self._worker, publish=lambda body: self._bus.publish(Up.REPORT, body))
        self._bus = Bus(
            device=identity.device,
            addresses=identity.mqtt,
            tls=tls,
            will=wire.encode(State(device=identity.device, online=False)),
            keepalive_s=network.keepalive_s,
            on_connected=self._on_connected,
            on_disconnected=self._on_disconnected,
            on_message=self._on_message,
        )

    # Life

    async def run(self) -> int:
        """Until SIGTERM or SIGINT; returns the exit code, 1 after a fault of the agent's own."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._refresh_due.set)
        self._spawn(self._link.stay_connected(self._on_welcome))
        await self._deployer.recover()
        await self._resume()
        for part in (self._bus.run, self._outbox.run, self._send_health, self._refresh, self._renew, self._watchdog):
            self._spawn(part())
        systemd.notify(READY="1", STATUS="running; connecting to the fleet")
        log.info("%s of the fleet %s: running", self._identity.device, self._identity.fleet)
        await self._stop.wait()
        systemd.notify(STOPPING="1", STATUS="stopping; instances go on")
        await self._close()
        return int(self._faulty)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a part of the agent stopped by its own fault", exc_info=error)
            self._faulty = True
            self._stop.set()  # systemd, or whoever started it, starts it anew

    async def _close(self) -> None:
        if self._bus.connected:
            self._bus.publish(Up.STATE, wire.encode(self._state(online=False)), retain=True)
            await asyncio.sleep(0.05)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._deployer.close()
        self._link.close()
        self._carrier.close()
        self._worker.close()
        self._store.close()

    async def _watchdog(self) -> None:
        """Pet systemd's watchdog as long as loop and worker get work done."""
        interval = systemd.watchdog_s()
        while interval is not None:
            await self._worker(lambda: None)
            systemd.notify(WATCHDOG="1", STATUS=self._status_line())
            await asyncio.sleep(interval)

    def _status_line(self) -> str:
        running = len(self._deployer.standing.committed)
        changing = len(self._deployer.standing.flights)
        where = "connected" if self._bus.connected else "not connected to the broker"
        return f"{where}; {running} instances" + (f", {changing} changing" if changing else "")

    # The host

    async def _on_welcome(self, welcome: ipc.Welcome) -> None:
        """A host is there: what is committed is started where it does not run, and only then may anyone else talk."""
        self._welcome = welcome
        items = await self._worker(self._store.committed)
        flying = {each.instance: each for each in await self._worker(self._store.changes)}
        known = {each.item.instance for each in items} | flying.keys()
        for running in welcome.running:
            if running.instance not in known:
                log.warning("%s runs on the host and belongs to nothing: stopped", running.instance)
                await self._link.ask(ipc.Stop, ipc.Done, instance=running.instance)
        for restored in await restore.restore(
            self._link, welcome, items, self._images, self._places.artifacts, self._settings.policy
        ):
            if restored.problem:
                self._problems[restored.instance] = f"{restored.instance} could not be started: {restored.problem}"
                log.error("%s", self._problems[restored.instance])
            else:
                self._problems.pop(restored.instance, None)
                log.info("%s runs again", restored.instance)
        self._host.ready.set()
        self._health_due.set()

    def _on_host_event(self, event: ipc.Event) -> None:
        if isinstance(event, ipc.Trapped):
            log.warning("%s: %s: %s", event.instance, event.code, event.message.partition("\n")[0])
        else:
            log.info("%s: %s %s", event.instance, event.state, event.message)
            self._health_due.set()
        self._host.on_event(event)

    # The bus

    def _on_connected(self) -> None:
        log.info("connected to the broker")
        self._nonce = secrets.token_hex(16)
        self._bus.publish(Up.STATE, wire.encode(self._state(online=True)), retain=True)
        self._spawn(self._say_hello())
        self._outbox.reconnected()
        self._health_due.set()

    def _on_disconnected(self, reason: str) -> None:
        log.info("the connection to the broker ended: %s", reason)
        self._refresh_due.set()

    def _state(self, *, online: bool) -> State:
        return State(device=self._identity.device, online=online, boot_id=self._boot_id, versions=self._versions())

    def _versions(self) -> Any:
        welcome = self._welcome
        return health.versions(
            host=welcome.version if welcome is not None else "", engine=welcome.engine if welcome is not None else ""
        )

    async def _say_hello(self) -> None:
        numbers = [await self._worker(self._store.counter, name) for name in ("accepted", "deployed", "committed")]
        hello = Hello(
            device=self._identity.device,
            nonce=self._nonce,
            boot_id=self._boot_id,
            accepted=numbers[0],
            deployed=numbers[1],
            committed=numbers[2],
            versions=self._versions(),
        )
        self._bus.publish(Up.HELLO, wire.encode(hello))

    def _on_message(self, topic: str, payload: bytes) -> None:
        if topic == POKE:
            self._on_poke(payload)
            return
        try:
            channel = Topic.parse(topic).channel
        except BadTopicError:
            return
        match channel:
            case Down.DESIRED if payload:
                self._spawn(self._desired(payload))
            case Down.ACK:
                with contextlib.suppress(wire.WireError):
                    self._spawn(self._outbox.acknowledge(wire.decode(Ack, payload).sequence))
            case Down.COMMAND:
                self._spawn(self._command(payload))
            case Down.FRESH:
                self._spawn(self._fresh(payload))
            case _:
                return

    def _on_poke(self, payload: bytes) -> None:
        """Unsigned, so it may only make the board ask, with jitter, and not often."""
        now = asyncio.get_running_loop().time()
        if now - self._poked_at < POKES_MIN_S:
            return
        self._poked_at = now
        with contextlib.suppress(wire.WireError):
            jitter_s = min(3600, max(0, wire.decode(Poke, payload).jitter_s))
            asyncio.get_running_loop().call_later(random.uniform(0, jitter_s), self._refresh_due.set)  # noqa: S311

    def _on_report(self) -> None:
        self._outbox.wake()
        asyncio.get_running_loop().call_later(HEALTH_AFTER_CHANGE_S, self._health_due.set)

    # Desired state

    async def _resume(self) -> None:
        """What was accepted before is carried on with, network or none."""
        envelope = await self._worker(self._store.envelope)
        if envelope is not None:
            assignment = remembered_assignment(envelope)
            if assignment is not None:
                await self._deployer.desire(assignment)

    async def _desired(self, envelope: bytes) -> None:
        """Judge an assignment, wherever it came from; refusals are reported once each."""
        try:
            accepted = await self._worker(self._trust.accept, envelope)
        except Rejected as error:
            await self._refused(envelope, error)
            return
        self._problems.pop("assignment", None)
        log.info("assignment %d accepted", accepted.assignment.version)
        await self._deployer.desire(accepted.assignment)

    async def _refused(self, envelope: bytes, error: Rejected) -> None:
        if error.code in {RejectCode.UNREACHABLE, RejectCode.TOO_SLOW}:
            log.warning("the assignment cannot be judged now: %s", error.message)
            self._problems["assignment"] = f"the fleet's metadata cannot be fetched: {error.message}"
            asyncio.get_running_loop().call_later(random.uniform(5, 30), self._refresh_due.set)  # noqa: S311
            return
        key = (str(hash(envelope)), error.code.value)
        self._problems["assignment"] = f"an assignment was refused: {error.message}"
        if key in self._refusals:
            return
        self._refusals.add(key)
        log.error("assignment refused: %s", error)
        version = await self._worker(self._store.counter, "accepted")
        report = Report(
            device=self._identity.device,
            boot_id=self._boot_id,
            sequence=0,
            at=datetime.now(UTC),
            assignment=version,
            phase=Phase.FAILED,
            code=error.code,
            message=error.message,
        )
        await self._worker(self._store.save, report=report)
        self._on_report()

    async def _refresh(self) -> None:
        """Ask for the desired state over HTTPS: at the start, when told to, and regularly while MQTT is blocked."""
        while True:
            self._refresh_due.clear()
            try:
                envelope = await asyncio.to_thread(
                    self._https.request, "GET", "/v1/desired", max_bytes=caps.DESIRED_MAX_BYTES
                )
                await self._desired(envelope)
            except FetchError as error:
                if error.code is not RejectCode.NOT_FOUND:
                    log.info("the desired state cannot be fetched: %s", error.message)
            interval = self._settings.refresh_s if not self._bus.connected else None
            with contextlib.suppress(TimeoutError):
                jitter = random.uniform(0.5, 1.5)  # noqa: S311
                async with asyncio.timeout(None if interval is None else interval * jitter):
                    await self._refresh_due.wait()

    async def _fresh(self, envelope: bytes) -> None:
        facts = await self._worker(self._store.facts)
        if facts.assignment is None:
            return
        try:
            await self._worker(self._trust.fresh, envelope, nonce=self._nonce, sha256=facts.assignment.sha256)
        except Rejected as error:
            if error.code is RejectCode.FREEZE:
                self._problems["fresh"] = f"this board may be kept from its newest assignment: {error.message}"
                self._refresh_due.set()
            log.warning("freshness statement refused: %s", error)
        else:
            self._problems.pop("fresh", None)

    # Commands

    async def _command(self, envelope: bytes) -> None:
        try:
            command = await self._worker(self._trust.command, envelope)
        except Rejected as error:
            log.warning("command refused: %s", error)
            return
        match command.verb:
            case CheckIn():
                self._refresh_due.set()
                self._health_due.set()
            case Restart(instance=instance):
                await self._restart(instance)
            case FollowLogs(instance=instance):
                log.info("logs of %s were asked for; this board's policy is %s", instance, self._settings.policy.logs)

    async def _restart(self, instance: str) -> None:
        now = asyncio.get_running_loop().time()
        self._restarts = [at for at in self._restarts if now - at < 3600]  # noqa: PLR2004 - an hour
        if len(self._restarts) >= RESTARTS_PER_HOUR:
            log.warning("%s is not restarted: at most %d restarts an hour", instance, RESTARTS_PER_HOUR)
            return
        self._restarts.append(now)
        try:
            await self._link.ask(ipc.Restart, ipc.Done, instance=instance)
        except (HostGoneError, HostRefusedError) as error:
            log.warning("%s could not be restarted: %s", instance, error)

    # Health

    async def _send_health(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                jitter = random.uniform(0.9, 1.1)  # noqa: S311
                async with asyncio.timeout(self._settings.health_s * jitter):
                    await self._health_due.wait()
            await asyncio.sleep(HEALTH_AFTER_CHANGE_S)
            self._health_due.clear()
            if self._bus.connected:
                self._bus.publish(Up.HEALTH, wire.encode(await self._health()))

    async def _health(self) -> Health:
        figures: tuple[InstanceHealth, ...] = ()
        problems = list(self._problems.values())
        written = 0
        try:
            answer = await self._link.ask(ipc.Status, ipc.Figures)
            figures, written = answer.instances, answer.written_bytes
        except (HostGoneError, HostRefusedError):
            problems.insert(0, "the host does not run: no instance answers")
        board = await asyncio.to_thread(health.board, self._places.state, host_written_bytes=written)
        return Health(
            device=self._identity.device,
            boot_id=self._boot_id,
            at=datetime.now(UTC),
            accepted=await self._worker(self._store.counter, "accepted"),
            committed=await self._worker(self._store.counter, "committed"),
            versions=self._versions(),
            board=board,
            instances=tuple(self._with_phase(each) for each in figures),
            containment=self._welcome.containment if self._welcome is not None else {},
            problems=tuple(problems),
        )

    def _with_phase(self, figure: InstanceHealth) -> InstanceHealth:
        standing = self._deployer.standing
        flight = standing.flights.get(figure.instance)
        committed = standing.committed.get(figure.instance)
        manifest = committed.item.manifest_sha256 if committed is not None else ""
        phase = Phase.IDLE
        if flight is not None:
            phase = Phase(flight.change.phase.value)
            if flight.change.item is not None and flight.change.generation == figure.generation:
                manifest = flight.change.item.manifest_sha256
        return msgspec.structs.replace(figure, phase=phase, manifest_sha256=manifest)

    # The certificate

    async def _renew(self) -> None:
        """Renew the device certificate at two thirds of its life."""
        while True:
            try:
                due = await asyncio.to_thread(enroll.renew_at, self._places.identity)
                if datetime.now(UTC) >= due:
                    await asyncio.to_thread(self._renew_now)
                    log.info("the device certificate was renewed")
            except (FetchError, enroll.EnrolError, OSError, ValueError, wire.WireError, msgspec.MsgspecError) as error:
                log.warning("the device certificate could not be renewed: %s", error)
            await asyncio.sleep(RENEW_CHECK_S * random.uniform(0.8, 1.2))  # noqa: S311

    def _renew_now(self) -> None:
        csr = enroll.renewal_request(self._places.identity, self._identity.device)
        answer = self._https.request(
            "POST",
            "/v1/renew",
            body=wire.encode(RenewRequest(csr_pem=csr)),
            headers={"Content-Type": "application/json"},
            max_bytes=caps.API_BODY_MAX_BYTES,
        )
        reply = msgspec.json.decode(answer, type=RenewReply)
        enroll.install_certificate(self._places.identity, reply.certificate_pem)
