"""Conversation of the device with its fleet: over MQTT, and over HTTPS while no broker can be reached.

Readers and senders of messages do not notice which way they take. Over HTTPS, messages are posted as they come, and a
request that the server holds brings those to the device (`fleet.protocol.messages.Exchange`).
"""

import asyncio
import contextlib
import http.client
import itertools
import logging
import random
from collections import deque
from collections.abc import AsyncIterator
from typing import Final, Protocol

from agent.link.https import FetchError, Poster, spread
from agent.link.mqtt import Connected, Disconnected, Event, Message
from fleet.protocol import bounds, wire
from fleet.protocol.codes import RejectCode
from fleet.protocol.messages import Exchange, ExchangeReply, Packet
from fleet.protocol.topics import Down, Topic, Up

log = logging.getLogger("agent.link.conversation")

WAITING_MAX: Final = 256
"""Maximum number of messages that wait to be posted; further ones are refused, as without a connection."""

GRACE_S: Final = (20.0, 60.0)
"""Time without a broker after which HTTPS is used: random, as a broker that restarts loses all devices at once."""

FIRST_GRACE_S: Final = (5.0, 15.0)
"""The same at the start of the agent."""

RETRY_FIRST_S: Final = 1.0
RETRY_MAX_S: Final = 300.0
STABLE_S: Final = 10.0
"""Time after which a conversation that ends has worked: shorter than anything on the way lets a request wait."""

OUTDATED_S: Final = 3600.0
"""Delay before the next attempt at a server that is too old to talk over HTTPS."""

POST_S: Final = 30.0
GOODBYE_S: Final = 5.0
_NEWS_S: Final = 0.05
"""Delay before messages are posted, so that those that are made together travel together."""


class Closable(Poster, Protocol):
    """Client that posts, and whose requests end when it is closed (`agent.link.https.HttpsClient`)."""

    def close(self) -> None:
        """End all requests under way."""


class Broker(Protocol):
    """Connection to the broker (`agent.link.mqtt.MqttClient`)."""

    @property
    def connected(self) -> bool:
        """True while messages can be published."""

    def publish(self, channel: Up, payload: bytes, *, retain: bool = False) -> bool:
        """Hand over a message; return false without a connection."""

    def leave(self) -> None:
        """Disconnect cleanly when the connection is closed."""

    def retry(self) -> None:
        """Reconnect now if there is no connection."""

    def events(self) -> AsyncIterator[Event]:
        """Yield the events of the connection, in order, forever."""

    async def run(self) -> None:
        """Connect, serve the connection, and reconnect, forever."""


class HttpsConversation:
    """Conversation over HTTPS; the same messages as over MQTT.

    Attributes:
        connected: true while messages can be published.
        events: of the connection, in order; for a single reader.
    """

    def __init__(self, device: str, https: Closable) -> None:
        """Prepare the conversation of `device`; nothing is sent before `run`. `https` is used by nobody else."""
        self._device = device
        self._https = https
        self._session = ""
        self._received = 0
        self._waiting: deque[Packet] = deque()
        self._due = asyncio.Event()
        self.connected = False
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    def publish(self, channel: Up, payload: bytes) -> bool:
        """Send a message to the server; return False without a connection."""
        if not self.connected or len(self._waiting) >= WAITING_MAX:
            return False
        self._waiting.append(Packet(channel=channel, payload=payload.decode()))
        self._due.set()
        return True

    async def run(self) -> None:
        """Talk to the server, forever; end the conversation when cancelled."""
        loop, delay = asyncio.get_running_loop(), RETRY_FIRST_S
        while True:
            wait_s, asked_s, began = OUTDATED_S, 0.0, loop.time()
            try:
                await self._talk()
            except FetchError as error:
                if error.code is RejectCode.NOT_FOUND or error.status == http.client.METHOD_NOT_ALLOWED:
                    log.info("the server cannot talk over HTTPS: it is of an earlier version")
                else:
                    log.info("cannot talk to the server over HTTPS: %s", error.message)
                    worked = self.connected and loop.time() - began >= STABLE_S
                    delay = RETRY_FIRST_S if worked else min(RETRY_MAX_S, delay * 2)
                    wait_s = delay
                    asked_s = error.retry_after_s
                if self.connected:
                    self.connected = False
                    self.events.put_nowait(Disconnected(error.message))
            finally:
                if self.connected:  # cancelled
                    self.connected = False
                    await self._end()
                self._session, self._received = "", 0
                self._waiting.clear()
            await asyncio.sleep(spread(wait_s, asked_s))

    async def _talk(self) -> None:
        """Open a session, then send and listen until that fails. Raises `FetchError`."""
        await self._exchange(Exchange())
        sending, listening = asyncio.ensure_future(self._send()), asyncio.ensure_future(self._listen())
        try:
            done, _ = await asyncio.wait({sending, listening}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._https.close()  # ends the requests of the cancelled tasks
            for task in (sending, listening):
                task.cancel()
            await asyncio.gather(sending, listening, return_exceptions=True)

    async def _send(self) -> None:
        while True:
            await self._due.wait()
            await asyncio.sleep(_NEWS_S)
            self._due.clear()
            while self._waiting:
                oldest = self._oldest()
                await self._exchange(self._said(oldest))
                for _ in oldest:  # only now: one that is cut off by the end of the agent goes with the goodbye
                    self._waiting.popleft()

    async def _listen(self) -> None:
        while True:
            next_s = await self._exchange(
                Exchange(session=self._session, received=self._received, wait_s=bounds.EXCHANGE_WAIT_MAX_S)
            )
            if next_s:
                await asyncio.sleep(spread(next_s, next_s))

    def _said(self, up: tuple[Packet, ...], *, ends: bool = False) -> Exchange:
        return Exchange(session=self._session, received=self._received, up=up, ends=ends)

    def _oldest(self) -> tuple[Packet, ...]:
        """Return the oldest waiting messages, as many as fit into one request."""
        found: list[Packet] = []
        size = 0
        for packet in itertools.islice(self._waiting, bounds.EXCHANGE_MESSAGES_MAX):
            size += len(packet.payload)
            if found and size > bounds.EXCHANGE_MAX_BYTES:
                break
            found.append(packet)
        return tuple(found)

    async def _exchange(self, said: Exchange) -> float:
        """Send a request and take in the reply; return when to ask again. Raises `FetchError`."""
        answer = await asyncio.to_thread(self._post, said, said.wait_s + POST_S)
        try:
            reply = wire.decode(ExchangeReply, answer)
        except wire.WireError as error:
            raise FetchError(RejectCode.UNREACHABLE, f"the server's reply cannot be read: {error}") from error
        if reply.session != self._session:
            self._session, self._received = reply.session, 0
            self.connected = True
            self.events.put_nowait(Connected())  # to a server that has lost the session, too
        for packet in reply.down:
            if packet.number > self._received:
                self._received = packet.number
                self._happened(packet)
        return reply.next_s

    def _happened(self, packet: Packet) -> None:
        try:
            topic = Topic(self._device, Down(packet.channel))
        except ValueError:
            log.warning("dropped a message on the unknown channel %r", packet.channel)
            return
        self.events.put_nowait(Message(str(topic), packet.payload.encode()))

    def _post(self, said: Exchange, within_s: float) -> bytes:
        return self._https.request(
            "POST",
            "/v1/exchange",
            max_bytes=ExchangeReply.MAX_BYTES,
            body=wire.encode(said),
            headers={"Content-Type": "application/json"},
            within_s=within_s,
        )

    async def _end(self) -> None:
        """Send what waits, and end the session, so that the server does not wait for this device."""
        with contextlib.suppress(FetchError):
            await asyncio.to_thread(self._post, self._said(self._oldest(), ends=True), GOODBYE_S)


class Conversation:
    """Conversation of the device with its fleet, over whatever way there is.

    Attributes:
        broker_after_s: time from the start for which the broker is left alone; 0 for none.
        broker_used: set once the broker is used.
    """

    name = "conversation"

    def __init__(self, *, mqtt: Broker | None, https: HttpsConversation, broker_after_s: float = 0.0) -> None:
        """Prepare a conversation; `run` begins it. `mqtt` is None for a fleet without a broker."""
        self._mqtt = mqtt
        self._https = https
        self.broker_after_s = broker_after_s
        self.broker_used = asyncio.Event()
        if not broker_after_s:
            self.broker_used.set()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._up, self._down = asyncio.Event(), asyncio.Event()
        self._down.set()

    @property
    def broker_connected(self) -> bool:
        """True while the broker is connected."""
        return self._mqtt is not None and self._mqtt.connected

    @property
    def connected(self) -> bool:
        """True while messages can be published."""
        return self.broker_connected or self._https.connected

    def publish(self, channel: Up, payload: bytes, *, retain: bool = False) -> bool:
        """Send a message; return False without a connection."""
        if self._mqtt is not None and self._mqtt.connected:
            return self._mqtt.publish(channel, payload, retain=retain)
        return self._https.publish(channel, payload)

    def leave(self) -> None:
        """Disconnect cleanly when the connection is closed."""
        if self._mqtt is not None:
            self._mqtt.leave()

    def retry(self) -> None:
        """Reconnect to the broker now if there is no connection."""
        if self._mqtt is not None:
            self._mqtt.retry()

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events of the conversation, in order, forever. Only for a single reader."""
        while True:
            yield await self._events.get()

    async def run(self) -> None:
        """Talk to the fleet, forever; say goodbye when cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._use_broker())
            tasks.create_task(self._use_https())
            tasks.create_task(self._forward_https())

    async def _use_broker(self) -> None:
        if self._mqtt is None:
            return
        await asyncio.sleep(self.broker_after_s)
        self.broker_used.set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._mqtt.run())
            tasks.create_task(self._forward_broker(self._mqtt))

    async def _forward_broker(self, mqtt: Broker) -> None:
        async for event in mqtt.events():
            match event:
                case Connected():
                    self._down.clear()
                    self._up.set()
                case Disconnected():
                    self._up.clear()
                    self._down.set()
                case Message():
                    pass
            self._events.put_nowait(event)

    async def _forward_https(self) -> None:
        while True:
            event = await self._https.events.get()
            if isinstance(event, Message) or not self.broker_connected:  # no server sends a received message again
                self._events.put_nowait(event)

    async def _use_https(self) -> None:
        """Talk over HTTPS whenever there is no broker for long."""
        usual = FIRST_GRACE_S
        while True:
            await self._down.wait()
            alone = self._mqtt is None or not self.broker_used.is_set()
            grace_s = 0.0 if alone else random.uniform(*usual)  # noqa: S311 - jitter, not a secret
            usual = GRACE_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._up.wait()
                    continue
            talk = asyncio.ensure_future(self._https.run())
            broker = asyncio.ensure_future(self._up.wait())
            try:
                await asyncio.wait({talk, broker}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                talk.cancel()
                broker.cancel()
                await asyncio.gather(talk, broker, return_exceptions=True)
            if not talk.cancelled() and (error := talk.exception()) is not None:
                log.error("the conversation over HTTPS ended with an internal error", exc_info=error)
                await asyncio.sleep(spread(RETRY_MAX_S))
