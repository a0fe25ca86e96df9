"""Composition, task group, start and stop.

`fleet-agent run`: the one asyncio loop that connects the board's parts.

It decides nothing itself: assignments are judged by `signing`, changes by `agent.update`, and instances are the host's.
That the agent stops, starts or is upgraded touches no instance.
"""

import asyncio
import contextlib
import logging
import os
import random
import signal
from collections.abc import Callable, Coroutine
from typing import Any, Final

from agent import clock, systemd
from agent.clock import ReferenceClock
from agent.commands import Commands, LogFollower
from agent.config import Paths, Settings
from agent.host.ipc import host_api
from agent.identity import enrolment
from agent.identity.identity import Identity, note_production
from agent.link import bundle
from agent.link.bundle import BundleSource
from agent.link.host_client import Host, HostClient, HostGoneError, HostRefusedError
from agent.link.https import DeviceTls, FetchError, HttpsClient
from agent.link.mqtt import MqttClient
from agent.report.uplink import Outbox, Vitals
from agent.update import effects, restore, state, trust
from agent.update.effects import EffectRunner
from agent.update.images import ImageStore
from agent.update.receiver import AssignmentReceiver
from agent.update.reconciler import ImageDamaged, Reconciler
from agent.update.secrets import SecretStore
from agent.update.state import DeviceContext
from agent.update.store import Database, Store, StoreError
from agent.update.trust import DeviceTrust
from fleet.protocol import wire
from fleet.protocol.assignment import Command, FollowLogs
from fleet.protocol.codes import Phase
from fleet.protocol.messages import Ack, Hello, Poke, Report, State
from fleet.protocol.topics import POKE, BadTopicError, Down, Topic, Up
from signing.device_statements import DeviceSigner
from signing.errors import Rejected

log = logging.getLogger("agent")

RESTARTS_PER_HOUR: Final = 6

POKES_MIN_S: Final = 30.0

POKE_JITTER_MAX_S: Final = 3600

GOODBYE_S: Final = 0.05


class Service:
    """The agent of one enrolled board."""

    def __init__(
        self, *, identity: Identity, root: bytes, mac_key: bytes, places: Paths, settings: Settings, store: Store
    ) -> None:
        """An agent with what lies in `identity/`; the opened `store` belongs to its worker from now on."""
        self._identity, self._places, self._settings, self._store = identity, places, settings, store
        self._worker = Database("store")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._outdated = asyncio.Event()
        self._faulty = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._restarts: list[float] = []
        self._poked_at = -POKES_MIN_S
        self._broken: dict[str, str] = {}
        self._board = DeviceContext(
            device=identity.device,
            boot_id=clock.boot_id(),
            places=places,
            mac_key=mac_key,
            clock=clock.boot_clock,
        )
        network, policy = settings.network, settings.policy
        reference = ReferenceClock(identity.floor)
        tls = DeviceTls(places.identity, reference)
        self._https = HttpsClient(
            identity.devices_url,
            tls,
            proxy=network.proxy,
            request_s=network.request_s,
            download_s=network.download_s,
            min_rate_bytes_s=network.min_rate_bytes_s,
            reserve_bytes=settings.disk.reserve_bytes,
        )
        self._source = BundleSource(self._https, places.bundle)
        self._trust = DeviceTrust(
            identity=identity,
            root=root,
            cache=places.trust,
            https=self._source,
            store=store,
            clock=reference,
            production=settings.production,
            late=policy.bundles and policy.late_bundles,
            on_production=lambda: note_production(places.identity),
        )
        self._images = ImageStore(
            places.images,
            mac_key,
            memory_bytes=policy.compile_memory_bytes,
            seconds=policy.compile_s,
            on_damaged=self._on_damaged,
        )
        self._sealed = SecretStore(places.secrets, places.identity / "sealing.key", identity)
        self._link = HostClient(places.host_socket, on_event=self._on_host_event)
        self._host = Host(self._link)
        self._carrier = EffectRunner(
            places=places,
            settings=settings,
            worker=self._worker,
            trust=self._trust,
            https=self._source,
            images=self._images,
            sealed=self._sealed,
            host=self._host,
            clock=clock.boot_clock,
            jitter=random.random,
        )
        self._deployer = Reconciler(
            board=self._board,
            store=store,
            worker=self._worker,
            carrier=self._carrier,
            sink=self,
            on_revoked=policy.on_revoked,
        )
        self._desired = AssignmentReceiver(
            board=self._board,
            trust=self._trust,
            https=self._source,
            store=store,
            worker=self._worker,
            deployer=self._deployer,
            clock_set=reference.is_trustworthy,
            ask_fresh=self._ask_fresh,
            on_report=self._on_report,
            doubts=lambda: trust.find_violations(self._trust, policy, store.committed()),
            on_outdated=self._outdated.set,
            on_bus=lambda: self._bus.connected,
            strict=settings.production,
            bundles=policy.bundles,
        )
        voice = DeviceSigner((places.identity / "device.key").read_bytes())
        self._outbox = Outbox(
            store=store, worker=self._worker, publish=lambda body: self._bus.publish(Up.REPORT, voice.sign(body))
        )
        self._bus = MqttClient(
            device=identity.device,
            addresses=identity.mqtt,
            tls=tls,
            will=wire.encode(State(device=identity.device, online=False)),
            keepalive_s=network.keepalive_s,
            on_connected=self._on_connected,
            on_disconnected=self._on_disconnected,
            on_message=self._on_message,
        )
        self._follower = LogFollower(
            link=self._link, https=self._https, policy=policy.logs, spawn=self._spawn, told=self._note_logs
        )
        self._vitals = Vitals(
            board=self._board,
            store=store,
            worker=self._worker,
            deployer=self._deployer,
            link=self._link,
            problems=lambda: [
                *self._broken.values(),
                *filter(None, [self._commands.problem]),
                *self._deployer.problems,
                *self._desired.problems.values(),
            ],
            publish=lambda body: self._bus.publish(Up.HEALTH, body),
        )
        self._commands = Commands(
            judge=self._judge,
            check_in=self._check_in,
            restart=self._restart,
            follow=self._follow,
            on_refused=self._vitals.changed,
        )

    # Life

    async def run(self) -> int:
        """Until SIGTERM or SIGINT; returns the exit code, 1 after a fault of the agent's own."""
        loop = self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._desired.refresh)
        await self._deployer.recover()
        self._spawn(self._deployer.run())
        await self._desired.resume()
        self._spawn(self._link.stay_connected(self._on_welcome))
        self._listen_for_bundles(loop)
        self._spawn(self._bus.run())
        self._spawn(self._outbox.run())
        self._spawn(self._vitals.run(self._settings.health_s))
        self._spawn(self._desired.run(self._interval_s))
        self._spawn(
            enrolment.renew(
                self._places,
                self._https,
                self._identity,
                self._trust.now,
                outdated=self._outdated,
                renewed=self._renewed,
            )
        )
        self._spawn(watchdog(self._worker, self._status_line))
        systemd.notify(READY="1", STATUS="running; connecting to the fleet")
        log.info("%s of the fleet %s: running", self._identity.device, self._identity.fleet)
        await self._stop.wait()
        systemd.notify(STOPPING="1", STATUS="stopping; instances go on")
        await self._close()
        return int(self._faulty)

    def _listen_for_bundles(self, loop: asyncio.AbstractEventLoop) -> None:
        """One that was applied while no agent ran is taken up now, others when `fleet-agent apply` says so."""
        self._spawn(self._desired.judge_bundle())
        try:
            self._wake = bundle.listen(self._places.wake)
        except OSError as error:
            log.warning("cannot be told of bundles: %s", error)
            return
        loop.add_reader(self._wake, self._on_wake)

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)
        self._spawn(self._desired.judge_bundle())

    def _interval_s(self) -> float:
        return self._settings.recheck_s if self._bus.connected else self._settings.refresh_s

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
        if self._bus.publish(Up.STATE, wire.encode(self._state(online=False)), retain=True):
            await asyncio.sleep(GOODBYE_S)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._deployer.close()
        self._link.close()
        self._carrier.close()
        self._worker.close()
        self._store.close()

    def _status_line(self) -> str:
        running = len(self._deployer.state.committed)
        changing = len(self._deployer.state.active)
        where = "connected" if self._bus.connected else "not connected to the broker"
        return f"{where}; {systemd.instances(running)}" + (f", {changing} changing" if changing else "")

    # The host

    async def _on_welcome(self, welcome: host_api.Welcome) -> None:
        """A host is there: what is committed is started where it does not run, and only then may anyone else talk."""
        self._vitals.welcome = welcome
        items = await self._worker(self._store.committed)
        changing = {each.instance for each in await self._worker(self._store.changes)}
        known = {each.item.instance for each in items} | changing
        for running in welcome.running:
            if running.instance not in known:
                log.warning("%s runs on the host and belongs to nothing: stopped", running.instance)
                with contextlib.suppress(HostRefusedError):
                    await self._link.ask(host_api.Stop, host_api.Done, instance=running.instance)
        for each in items:
            with contextlib.suppress(FetchError, Rejected, OSError):  # a box that was damaged on the disk comes again
                await asyncio.to_thread(self._sealed.fetch, each.item, self._source)
        for restored in await restore.restore(
            self._link, welcome, items, self._images, self._places.artifacts, self._settings.policy, self._sealed
        ):
            if restored.problem:
                self._broken[restored.instance] = f"{restored.instance} could not be started: {restored.problem}"
                log.error("%s", self._broken[restored.instance])
            else:
                self._broken.pop(restored.instance, None)
                log.info("%s runs again", restored.instance)
        self._host.ready.set()
        self._vitals.changed()

    def _on_host_event(self, event: host_api.Event) -> None:
        if isinstance(event, host_api.Trapped):
            said = f"{event.instance}: {event.code}: {event.message}".partition("\n")[0]
            log.warning("%s", said, extra=systemd.fields(instance=event.instance, code=event.code))
        else:
            log.info("%s: %s %s", event.instance, event.state, event.message)
            self._vitals.changed()
        self._host.on_event(event)

    def _on_damaged(self, artifact: str, message: str) -> None:
        """An image was changed on the disk. It is not used, and said so; called on the thread that found it."""
        log.error("%s", message)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._deployer.post, ImageDamaged(artifact, message))

    # The bus

    def _on_connected(self) -> None:
        log.info("connected to the broker")
        self._bus.publish(Up.STATE, wire.encode(self._state(online=True)), retain=True)
        self._ask_fresh(self._desired.new_nonce())
        self._outbox.reconnected()
        self._vitals.changed()

    def _on_disconnected(self, reason: str) -> None:
        log.info("the connection to the broker ended: %s", reason)
        self._desired.refresh_later(random.uniform(1, 10))  # noqa: S311 - jitter, not a secret

    def _renewed(self) -> None:
        """Whoever refused the certificate of before, the server or the broker, is asked again at once."""
        self._desired.refresh()
        self._bus.retry()

    def _state(self, *, online: bool) -> State:
        versions = self._vitals.versions()
        return State(device=self._identity.device, online=online, boot_id=self._board.boot_id, versions=versions)

    def _ask_fresh(self, nonce: str) -> bool:
        if not self._bus.connected:
            return False
        self._spawn(self._say_hello(nonce))
        return True

    async def _say_hello(self, nonce: str) -> None:
        names = ("accepted", "deployed", "committed")
        accepted, deployed, committed = [await self._worker(self._store.counter, name) for name in names]
        hello = Hello(
            device=self._identity.device,
            nonce=nonce,
            boot_id=self._board.boot_id,
            accepted=accepted,
            deployed=deployed,
            committed=committed,
            versions=self._vitals.versions(),
            acked=await self._worker(self._store.acked),
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
                self._take(channel, self._desired.heard(payload))
            case Down.FRESH:
                self._take(channel, self._desired.fresh(payload))
            case Down.COMMAND:
                self._take(channel, self._commands.obey(payload))
            case Down.ACK:
                try:
                    ack = wire.decode(Ack, payload)
                except wire.WireError as error:
                    log.warning("dropped an acknowledgement: %s", error)
                    return
                heard = self._outbox.again if ack.again else self._outbox.acknowledge
                self._take(channel, heard(ack.sequence))
            case _:
                return

    def _take(self, channel: Down | Up, work: Coroutine[Any, Any, None]) -> None:
        """Handle a message of the broker's; one that cannot be handled is dropped, and does not end the agent.

        Messages may be unsigned and retained: one that ended the agent would end it again at each start.
        """

        async def handled() -> None:
            try:
                await work
            except Exception:
                log.exception("dropped a message on down/%s", channel)

        self._spawn(handled())

    def _on_poke(self, payload: bytes) -> None:
        """Unsigned, so it may only make the board ask, with jitter, and not often."""
        now = asyncio.get_running_loop().time()
        if now - self._poked_at < POKES_MIN_S:
            return
        with contextlib.suppress(wire.WireError):
            jitter_s = min(POKE_JITTER_MAX_S, wire.decode(Poke, payload).jitter_s)
            self._poked_at = now
            delay = random.uniform(0, jitter_s)  # noqa: S311 - jitter, not a secret
            self._desired.refresh_later(delay)
            # A server that was away pokes when it is back, and may have missed what was sent meanwhile.
            asyncio.get_running_loop().call_later(delay, self._outbox.reconnected)

    def saved(self, _report: Report, /) -> None:
        """Take note of a stored report of the reconciler's."""
        self._on_report()

    def _on_report(self) -> None:
        self._outbox.wake()
        self._vitals.changed_soon()
        if not self._deployer.state.active:
            self._spawn(
                effects.make_room(self._places, self._settings, self._images, self._deployer.state, self._sealed)
            )

    # Commands

    async def _judge(self, envelope: bytes) -> Command:
        return await self._worker(self._trust.command, envelope)

    def _check_in(self) -> None:
        self._desired.refresh()
        self._vitals.changed()

    def _follow(self, verb: FollowLogs, sequence: int) -> None:
        self._follower.follow(verb.instance, minutes=verb.minutes, command=sequence)

    async def _note_logs(self, text: str) -> None:
        """What left this board stands in its own signed history."""
        version = await self._worker(self._store.counter, "accepted")
        with contextlib.suppress(StoreError):
            report = state.about(self._board, assignment=version, phase=Phase.IDLE, message=text)
            await self._worker(self._store.save, report=report)
        self._on_report()

    async def _restart(self, instance: str) -> None:
        now = asyncio.get_running_loop().time()
        self._restarts = [at for at in self._restarts if now - at < 3600]  # noqa: PLR2004 - an hour
        if len(self._restarts) >= RESTARTS_PER_HOUR:
            log.warning("%s is not restarted: at most %d restarts an hour", instance, RESTARTS_PER_HOUR)
            return
        self._restarts.append(now)
        try:
            await self._link.ask(host_api.Restart, host_api.Done, instance=instance)
        except (HostGoneError, HostRefusedError) as error:
            log.warning("%s could not be restarted: %s", instance, error)


async def watchdog(worker: Database, status: Callable[[], str]) -> None:
    """Pet systemd's watchdog, where there is one, as long as the loop and the worker get work done."""
    interval = systemd.watchdog_s()
    while interval is not None:
        await worker(lambda: None)
        systemd.notify(WATCHDOG="1", STATUS=status())
        await asyncio.sleep(interval)
