"""Composition of the agent: which parts there are, in which order they are made, how they run and stop.

`build` makes every part from those made before it. The parts decide nothing here: assignments are judged by `signing`,
changes by `agent.update`, and instances belong to the host. A stop, start or upgrade of the agent touches no instance.
"""

import asyncio
import logging
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from agent import clock, systemd
from agent.clock import ReferenceClock
from agent.commands import Commands, LogFollower, Senders
from agent.config import Paths, Settings
from agent.identity.enrolment import CertificateRenewal
from agent.identity.identity import Identity, doubt
from agent.link.bundle import BundleSource
from agent.link.conversation import Conversation, HttpsConversation
from agent.link.host_client import HostClient
from agent.link.https import DeviceTls, HttpsClient
from agent.link.mqtt import MqttClient
from agent.report.archive_sender import ArchiveSender
from agent.report.metrics import Connections, MetricsSocket
from agent.report.readings import ReadingsUplink, open_spool
from agent.report.uplink import HealthSources, Uplink
from agent.session import FleetSession, Presence
from agent.starts import ENDS_MAX
from agent.update import effects
from agent.update.effects import EffectRunner
from agent.update.images import ImageStore
from agent.update.problems import Problems, ReportSink
from agent.update.receiver import AssignmentReceiver, BundleListener
from agent.update.reconciler import ImageDamaged, Reconciler
from agent.update.restore import HostRestorer, Materials
from agent.update.secrets import SecretStore
from agent.update.state import DeploymentState, DeviceContext
from agent.update.store import DamagedStoreError, Database, Store, StoreError
from agent.update.trust import DeviceTrust
from fleet.protocol import files, wire
from fleet.protocol.messages import Report, State
from signing.device_statements import DeviceSigner

log = logging.getLogger("agent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """Enrolled device: its identity, keys and settings.

    Attributes:
        root: TUF root pinned at enrolment.
        mac_key: key that authenticates this device's images and run set.
        places: paths of the agent's files.
        settings: configuration by the device's owner.
    """

    identity: Identity
    root: bytes
    mac_key: bytes
    places: Paths
    settings: Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Connections of the agent: to the server for files, to the fleet for messages, and to the host."""

    https: HttpsClient
    archives: HttpsClient
    conversation: Conversation
    host: HostClient

    @classmethod
    def of(cls, enrolled: Enrolled, reference: ReferenceClock, *, broker_after_s: float = 0.0) -> "Links":
        """Prepare the connections of a device, with the broker left alone at first; none is opened yet."""
        identity, places, settings = enrolled.identity, enrolled.places, enrolled.settings
        network = settings.network
        tls = DeviceTls(places.identity, reference)
        mqtt = None
        if identity.mqtt:
            mqtt = MqttClient(
                device=identity.device,
                addresses=identity.mqtt,
                tls=tls,
                will=wire.encode(State(device=identity.device, online=False)),
                keepalive_s=network.keepalive_s,
                proxy=network.proxy,
            )
        exchange = HttpsClient(identity.devices_url, tls, proxy=network.proxy)
        return cls(
            https=HttpsClient(
                identity.devices_url,
                tls,
                proxy=network.proxy,
                request_s=network.request_s,
                download_s=network.download_s,
                min_rate_bytes_s=network.min_rate_bytes_s,
                reserve_bytes=settings.disk.reserve_bytes,
            ),
            archives=HttpsClient(identity.devices_url, tls, proxy=network.proxy, request_s=network.request_s),
            conversation=Conversation(
                mqtt=mqtt, https=HttpsConversation(identity.device, exchange), broker_after_s=broker_after_s
            ),
            host=HostClient(places.host_socket),
        )


class Part(Protocol):
    """Part of the agent with something to do for as long as the agent runs."""

    name: Final[str]  # type: ignore[misc]

    async def run(self) -> None:
        """Work until cancelled; an exception ends the agent."""


class Service:
    """Agent of an enrolled device: runs its parts, and stops them in order."""

    def __init__(
        self,
        *,
        parts: Sequence[Part],
        receiver: AssignmentReceiver,
        reconciler: Reconciler,
        presence: Presence,
        host: HostClient,
        effects: EffectRunner,
        db: Database,
    ) -> None:
        """Prepare a service of `parts`; see `build`."""
        self._parts = parts
        self._receiver = receiver
        self._reconciler = reconciler
        self._presence = presence
        self._host = host
        self._effects = effects
        self._db = db
        self._stop = asyncio.Event()

    async def run(self) -> int:
        """Run until SIGTERM or SIGINT; return the exit code, 1 after an internal error."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._receiver.refresh)
        status = 0
        try:
            await self._reconciler.recover()  # before anything arrives
            async with asyncio.TaskGroup() as tasks:
                for part in self._parts:
                    tasks.create_task(part.run(), name=part.name)
                systemd.notify(READY="1", STATUS="running; connecting to the fleet")
                log.info("running")
                await self._stop.wait()
                systemd.notify(STOPPING="1", STATUS="stopping; instances go on")
                await self._presence.goodbye()
                raise _Stopped  # noqa: TRY301 - the group cancels every part, and waits for it
        except* _Stopped:
            pass
        except* StoreError as faults:
            for fault in faults.exceptions:
                log.error("%s", fault)  # noqa: TRY400 - a sentence for people
            status = 1  # systemd starts the agent again, which rebuilds a damaged database
        except* Exception as faults:
            log.exception("a part of the agent failed with an internal error", exc_info=faults)
            status = 1  # systemd starts the agent again
        finally:
            await self._close()
        return status

    def stop(self) -> None:
        """Stop, as at SIGTERM."""
        self._stop.set()

    async def _close(self) -> None:
        await self._reconciler.close()
        self._host.close()
        self._effects.close()
        self._db.close()


class _Stopped(Exception):  # noqa: N818 - no error: ends the task group
    """The service was asked to stop."""


def build(enrolled: Enrolled, db: Database, reference: ReferenceClock, links: Links) -> Service:
    """Compose the agent; every object uses only those made before it.

    Args:
        enrolled: the device.
        db: its store; closed by the service when it ends.
        reference: clock that `links` use too.
        links: connections of the device.
    """
    identity, places, settings = enrolled.identity, enrolled.places, enrolled.settings
    policy = settings.policy
    device = DeviceContext(
        device=identity.device,
        boot_id=clock.boot_id(),
        places=places,
        mac_key=enrolled.mac_key,
        clock=clock.boot_clock,
    )
    source = BundleSource(links.https, places.bundle)
    trust = DeviceTrust(
        identity=identity,
        home=places.identity,
        root=enrolled.root,
        cache=places.trust,
        https=source,
        store=db.store,
        clock=reference,
        production=settings.production,
        late=policy.bundles and policy.late_bundles,
    )
    images = ImageStore(
        places.images, enrolled.mac_key, memory_bytes=policy.compile_memory_bytes, seconds=policy.compile_s
    )
    secrets = SecretStore(places.secrets, places.identity / "sealing.key", identity)
    problems = Problems(db)
    if question := doubt(identity):
        problems.set("machine", question)
    if text := db.store.waits or db.store.replaced:
        problems.set("store", text)
    if db.store.downgraded:
        problems.set("downgrade", db.store.downgraded)
    state = DeploymentState()
    readings = _readings(enrolled, links, problems, reference)
    uplink = Uplink(
        device=device,
        mqtt=links.conversation,
        db=db,
        sources=HealthSources(links.host, state, problems, readings, sorted(settings.policy.directories)),
        signer=DeviceSigner(files.read(places.identity / "device.key")),
        health_s=settings.health_s,
    )
    eviction = Eviction(places=places, settings=settings, images=images, state=state, secrets=secrets)
    sink = Sinks(uplink, eviction)
    runner = EffectRunner(
        places=places,
        settings=settings,
        worker=db.run,
        trust=trust,
        https=source,
        images=images,
        sealed=secrets,
        host=links.host,
        clock=clock.boot_clock,
        jitter=random.random,
    )
    reconciler = Reconciler(
        device=device,
        store=db.store,
        worker=db.run,
        carrier=runner,
        sink=sink,
        on_revoked=policy.on_revoked,
        state=state,
    )
    restorer = HostRestorer(
        host=links.host,
        db=db,
        materials=Materials(images, places.artifacts, policy, secrets),
        source=source,
        problems=problems,
        sink=sink,
    )
    presence = Presence(device=device, mqtt=links.conversation, db=db, software=uplink, readings=readings)
    renewal = CertificateRenewal(
        places=places, identity=identity, https=links.https, clock=reference, mqtt=links.conversation
    )
    receiver = AssignmentReceiver(
        device=device,
        settings=settings,
        clock=reference,
        trust=trust,
        source=source,
        db=db,
        reconciler=reconciler,
        presence=presence,
        renewal=renewal,
        problems=problems,
        sink=sink,
    )
    follower = LogFollower(device=device, host=links.host, https=links.https, policy=policy.logs, db=db, sink=sink)
    archives = ArchiveSender(device=device, https=links.archives, settings=settings, db=db, sink=sink)
    commands = Commands(
        trust=trust,
        db=db,
        host=links.host,
        receiver=receiver,
        senders=Senders(follower, archives),
        problems=problems,
        sink=sink,
    )
    session = FleetSession(
        mqtt=links.conversation,
        receiver=receiver,
        commands=commands,
        uplink=uplink,
        presence=presence,
        readings=readings,
    )
    parts: tuple[Part, ...] = (
        reconciler,
        receiver,
        links.host,
        restorer,
        DamagedImages(images, reconciler),
        StoreGuard(db),
        StoreHealer(db, problems, receiver, sink),
        eviction,
        BundleListener(places.wake, receiver),
        links.conversation,
        BrokerPause(links.conversation, problems),
        session,
        commands,
        follower,
        archives,
        uplink,
        *(() if readings is None else (readings,)),
        problems,
        renewal,
        MetricsSocket(places.metrics_socket, uplink.health, Connections(links.conversation, links.host)),
        Watchdog(db=db, state=state, presence=presence),
    )
    log.info("agent of %s in the fleet %s", identity.device, identity.fleet)
    return Service(
        parts=parts,
        receiver=receiver,
        reconciler=reconciler,
        presence=presence,
        host=links.host,
        effects=runner,
        db=db,
    )


def _readings(enrolled: Enrolled, links: Links, problems: Problems, reference: ReferenceClock) -> ReadingsUplink | None:
    """Return the keeper of components' messages; None where the disk has no place for them: all else goes on."""
    settings = enrolled.settings
    try:
        spool = open_spool(
            enrolled.places.readings, settings.uplink.readings, reserve_bytes=settings.disk.reserve_bytes
        )
    except OSError as error:
        text = f"messages of components cannot be kept: {error}"
        log.error("%s", text)  # noqa: TRY400 - a sentence for people
        problems.set("readings", text)
        return None
    return ReadingsUplink(
        device=enrolled.identity.device,
        spool=spool,
        host=links.host,
        mqtt=links.conversation,
        problems=problems,
        clock=reference,
    )


class BrokerPause:
    """Announcer of a broker that is left alone at first, after three ends of the agent within a minute."""

    name = "broker pause"

    def __init__(self, conversation: Conversation, problems: Problems) -> None:
        self._conversation = conversation
        self._problems = problems

    async def run(self) -> None:
        """Say so until the broker is used."""
        minutes = round(self._conversation.broker_after_s / 60)
        if not minutes:
            return
        text = (
            f"the agent ended {ENDS_MAX} times within a minute: it leaves the broker (MQTT) alone for {minutes} "
            "minutes and talks to the fleet over HTTPS; the journal says why it ended"
        )
        log.warning("%s", text)
        self._problems.set("starts", text)
        await self._conversation.broker_used.wait()
        self._problems.clear("starts")


class DamagedImages:
    """Forwarder of damaged images, which any thread may find, to the reconciler."""

    name = "damaged images"

    def __init__(self, images: ImageStore, reconciler: Reconciler) -> None:
        self._images = images
        self._reconciler = reconciler

    async def run(self) -> None:
        """Forward damaged images, forever."""
        while True:
            damaged = await self._images.damaged.get()
            log.error("%s", damaged.message)
            self._reconciler.post(ImageDamaged(damaged.artifact, damaged.message))


class StoreGuard:
    """Ends the agent once its database is found damaged: its next start rebuilds it, and instances go on meanwhile."""

    name = "store"

    def __init__(self, db: Database) -> None:
        self._db = db

    async def run(self) -> None:
        """Wait until the database is found damaged; then raise `DamagedStoreError`."""
        await self._db.damaged.wait()
        raise DamagedStoreError("the database is damaged: the agent ends, and its next start rebuilds it")


HEAL_FIRST_S: Final = 2.0
HEAL_MAX_S: Final = 60.0
"""Pauses between attempts to write to a disk that was full or read-only when the agent started: a look at its room."""


class StoreHealer:
    """Goes on with the database's file once its disk can be written again; until then what is known is in memory."""

    name = "store healer"

    def __init__(self, db: Database, problems: Problems, receiver: AssignmentReceiver, sink: ReportSink) -> None:
        self._db = db
        self._problems = problems
        self._receiver = receiver
        self._sink = sink

    async def run(self) -> None:
        """Try until the file is used; return at once where it is."""
        if not self._db.store.waits:
            return
        pause_s = HEAL_FIRST_S
        while not await self._db(Store.heal):
            await asyncio.sleep(pause_s)
            pause_s = min(HEAL_MAX_S, 2 * pause_s)
        if self._db.store.replaced:
            self._problems.set("store", self._db.store.replaced)
        else:
            self._problems.clear("store")
        self._receiver.refresh()  # nothing that came meanwhile could be accepted
        self._sink.changed()


class Eviction:
    """Keeper of the disk budget: evicts artifacts and images once no change needs them."""

    name = "eviction"

    def __init__(
        self, *, places: Paths, settings: Settings, images: ImageStore, state: DeploymentState, secrets: SecretStore
    ) -> None:
        self._places = places
        self._settings = settings
        self._images = images
        self._state = state
        self._secrets = secrets
        self._due = asyncio.Event()

    def saved(self) -> None:
        """Check the budget soon: a stored report may mean that a change has ended."""
        self._due.set()

    async def run(self) -> None:
        """Evict whenever a change has ended, forever."""
        while True:
            await self._due.wait()
            self._due.clear()
            if not self._state.active:
                await effects.make_room(self._places, self._settings, self._images, self._state, self._secrets)


class Sinks:
    """Distributor of stored reports: to the uplink and to the keeper of the disk budget."""

    def __init__(self, uplink: ReportSink, eviction: Eviction) -> None:
        self._uplink = uplink
        self._eviction = eviction

    def saved(self, report: Report | None = None) -> None:
        """Note that a report was stored."""
        self._uplink.saved(report)
        self._eviction.saved()

    def changed(self) -> None:
        """Note that the device's health changed."""
        self._uplink.changed()


class Watchdog:
    """Notifier of systemd's watchdog, if there is one, as long as the event loop and the database work."""

    name = "watchdog"

    def __init__(self, *, db: Database, state: DeploymentState, presence: Presence) -> None:
        self._db = db
        self._state = state
        self._presence = presence

    async def run(self) -> None:
        """Notify the watchdog regularly, forever; return at once without a watchdog."""
        interval = systemd.watchdog_s()
        while interval is not None:
            await self._db(Store.counter, "accepted")
            systemd.notify(WATCHDOG="1", STATUS=self._status())
            await asyncio.sleep(interval)

    def _status(self) -> str:
        where = "connected" if self._presence.connected else "not connected to the fleet"
        changing = len(self._state.active)
        text = f"{where}; {systemd.instances(len(self._state.committed))}"
        return f"{text}, {changing} changing" if changing else text
