"""Session of the device with its broker: presence messages, and dispatch of incoming messages."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from typing import Final, Protocol

from agent import clock
from agent.commands import Commands
from agent.link.mqtt import Connected, Disconnected, Event, Message
from agent.report.uplink import Uplink
from agent.update.receiver import AssignmentArrived, AssignmentReceiver, FreshnessArrived
from agent.update.state import DeviceContext
from agent.update.store import Database, Store, StoreError
from fleet.protocol import wire
from fleet.protocol.messages import Ack, Hello, Poke, State, Versions
from fleet.protocol.topics import POKE, BadTopicError, Down, Topic, Up

log = logging.getLogger("agent.session")

POKES_MIN_S: Final = 30.0
"""Minimum interval of pokes that are followed. Pokes are not signed, so a broker may send any number of them."""

POKE_JITTER_MAX_S: Final = 3600

RECONNECT_POLL_S: Final = (1.0, 10.0)
"""Delay before polling HTTPS after the broker was lost; random, as a broker that restarts loses all devices at once."""

GOODBYE_S: Final = 0.05
"""Time for the last message to leave before the connection is closed."""


class Broker(Protocol):
    """Connection to the fleet (`agent.link.conversation.Conversation`)."""

    @property
    def connected(self) -> bool:
        """True while messages can be published."""

    @property
    def broker_connected(self) -> bool:
        """True while they go through the broker, rather than over HTTPS."""

    def publish(self, channel: Up, payload: bytes, *, retain: bool = False) -> bool:
        """Hand over a message; return false when there is no connection."""

    def leave(self) -> None:
        """Disconnect cleanly when the connection is closed."""

    def events(self) -> AsyncIterator[Event]:
        """Yield the events of the connection, in order, forever."""


class Described(Protocol):
    """Source of the versions of this device's software (`agent.report.uplink.Uplink`)."""

    def versions(self) -> Versions:
        """Return the versions known now."""


class Kept(Protocol):
    """Readings that wait for the server (`agent.report.readings.ReadingsUplink`)."""

    @property
    def epoch(self) -> str:
        """Name of what is kept, for the server to say how far it has it."""

    def reconnected(self) -> None:
        """Take note of a new connection, before anything is said on it."""

    def resend(self) -> None:
        """Send again what is not acknowledged."""

    async def acknowledge(self, payload: bytes) -> None:
        """Take what the server says of the readings that it has."""


class Presence:
    """Messages that tell the fleet that this device is online."""

    def __init__(
        self, *, device: DeviceContext, mqtt: Broker, db: Database, software: Described, readings: Kept | None = None
    ) -> None:
        self._device = device
        self._mqtt = mqtt
        self._db = db
        self._software = software
        self._readings = readings

    @property
    def connected(self) -> bool:
        """True while messages reach the fleet."""
        return self._mqtt.connected

    @property
    def broker_connected(self) -> bool:
        """True while the broker is connected."""
        return self._mqtt.broker_connected

    def announce(self) -> bool:
        """Publish that the device is online; return False without a connection."""
        return self._publish_state(online=True)

    async def hello(self, nonce: str) -> bool:
        """Publish the device's state, and ask for a freshness statement; return False without a connection."""
        if not self._mqtt.connected:
            return False
        hello = Hello(
            device=self._device.device,
            nonce=nonce,
            boot_id=self._device.boot_id,
            accepted=await self._db(Store.counter, "accepted"),
            deployed=await self._db(Store.counter, "deployed"),
            committed=await self._db(Store.counter, "committed"),
            versions=self._software.versions(),
            acked=await self._db(Store.acked),
            readings="" if self._readings is None else self._readings.epoch,
        )
        return self._mqtt.publish(Up.HELLO, wire.encode(hello))

    async def goodbye(self) -> None:
        """Publish that the device goes offline, and give the message time to leave."""
        if self._publish_state(online=False):
            self._mqtt.leave()
            await asyncio.sleep(GOODBYE_S)

    def _publish_state(self, *, online: bool) -> bool:
        state = State(
            device=self._device.device,
            online=online,
            boot_id=self._device.boot_id,
            versions=self._software.versions(),
        )
        return self._mqtt.publish(Up.STATE, wire.encode(state), retain=True)


class FleetSession:
    """Reader of the broker's events. Receivers verify the messages; no message can end the agent."""

    name = "session"

    def __init__(
        self,
        *,
        mqtt: Broker,
        receiver: AssignmentReceiver,
        commands: Commands,
        uplink: Uplink,
        presence: Presence,
        readings: Kept | None = None,
        clock: Callable[[], float] = clock.boot_clock,
    ) -> None:
        """Prepare a session; `clock` gives seconds that do not jump."""
        self._clock = clock
        self._mqtt = mqtt
        self._receiver = receiver
        self._commands = commands
        self._uplink = uplink
        self._presence = presence
        self._readings = readings
        self._poked_at = -POKES_MIN_S

    async def run(self) -> None:
        """Handle the events of the conversation, forever; one that fails is dropped, and does not end the agent."""
        async for event in self._mqtt.events():
            try:
                await self._handle(event)
            except Exception:
                # A broker can bring the same event again at each start: the agent must survive it.
                log.exception("dropped an event of the connection to the fleet")

    async def _handle(self, event: Event) -> None:
        match event:
            case Connected():
                await self._connected()
            case Disconnected(reason):
                log.info("the connection to the fleet ended: %s", reason)
                self._receiver.refresh_later(random.uniform(*RECONNECT_POLL_S))  # noqa: S311 - jitter, not a secret
            case Message(topic, payload):
                await self._message(topic, payload)

    async def _connected(self) -> None:
        log.info("connected to the %s", "broker" if self._mqtt.broker_connected else "server, over HTTPS")
        if self._readings is not None:
            self._readings.reconnected()
        self._presence.announce()
        await self._presence.hello(await self._receiver.new_nonce())
        self._uplink.reconnected()
        self._uplink.changed()

    async def _message(self, topic: str, payload: bytes) -> None:
        if topic == POKE:
            self._poke(payload)
            return
        try:
            channel = Topic.parse(topic).channel
        except BadTopicError:
            return
        match channel:
            case Down.DESIRED if payload:  # a broker sends an empty payload when a retained message is removed
                self._receiver.post(AssignmentArrived(payload))
            case Down.FRESH:
                self._receiver.post(FreshnessArrived(payload))
            case Down.COMMAND:
                self._commands.post(payload)
            case Down.ACK:
                await self._acknowledged(payload)
            case Down.READINGS if self._readings is not None:
                await self._readings.acknowledge(payload)
            case _:
                pass

    async def _acknowledged(self, payload: bytes) -> None:
        try:
            ack = wire.decode(Ack, payload)
        except wire.WireError as error:
            log.warning("dropped an acknowledgement: %s", error)
            return
        try:
            if ack.again:
                await self._uplink.again(ack.sequence)
            else:
                await self._uplink.acknowledge(ack.sequence)
        except StoreError as error:  # the server sends it again
            log.warning("dropped a message on down/%s: %s", Down.ACK, error)
        except Exception:
            # Messages may be unsigned and retained: one that ended the agent would end it again at each start.
            log.exception("dropped a message on down/%s", Down.ACK)

    def _poke(self, payload: bytes) -> None:
        """Poll soon, with jitter, and not often: a poke is not signed."""
        now = self._clock()
        if now - self._poked_at < POKES_MIN_S:
            return
        try:
            jitter_s = min(POKE_JITTER_MAX_S, wire.decode(Poke, payload).jitter_s)
        except wire.WireError as error:
            log.warning("dropped a poke: %s", error)
            return
        self._poked_at = now
        delay_s = random.uniform(0, jitter_s)  # noqa: S311 - jitter, not a secret
        self._receiver.refresh_later(delay_s)
        # A server pokes devices after a restart, and may have missed reports meanwhile.
        asyncio.get_running_loop().call_later(delay_s, self._uplink.reconnected)
        if self._readings is not None:
            asyncio.get_running_loop().call_later(delay_s, self._readings.resend)
