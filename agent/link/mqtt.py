"""Connection of the device to its broker: paho on the asyncio loop, without a thread and without polling.

The caller pulls `MqttClient.events()`; paho's callbacks end here. MQTT 3.1.1, QoS 1, a session that the broker keeps
(`clean_session=False`), and a will on `up/state`. paho's own queue is not relied on: each connection gets a new client,
and what must not be lost waits in the outbox. Addresses are tried in turn; between attempts the delay doubles, with
full jitter.
"""

import asyncio
import contextlib
import logging
import random
import socket
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from agent.link.https import ConnectionTls, Tls, why
from fleet.protocol.topics import Topic, Up, device_subscriptions

log = logging.getLogger("agent.link.mqtt")

RETRY_FIRST_S: Final = 1.0
RETRY_MAX_S: Final = 300.0
CONNECT_S: Final = 20.0
STABLE_S: Final = 60.0
PORTS: Final = {"mqtt": 1883, "mqtts": 8883, "wss": 443}
QOS: Final = 1


MESSAGES_MAX: Final = 256
"""Messages that wait for their reader. A broker may send faster than anything can be verified; what it sends beyond
this is dropped, and asked for again over HTTPS."""


class BrokerAddressError(Exception):
    """A broker address that this program cannot use."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted the connection; messages can be published."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class Message:
    """A message from the broker, which nobody has verified yet."""

    topic: str
    payload: bytes


Event = Connected | Disconnected | Message


class MqttClient:
    """MQTT client of one device."""

    name = "mqtt"

    def __init__(
        self,
        *,
        device: str,
        addresses: tuple[str, ...],
        tls: Tls,
        will: bytes,
        keepalive_s: int,
    ) -> None:
        """Prepare a client; `run` connects and stays connected.

        Args:
            device: id of this device, also the client id.
            addresses: `mqtts://host:8883`, `wss://host:443/mqtt`, or `mqtt://127.0.0.1:1883`; tried in this order.
            tls: source of TLS settings.
            will: published by the broker on `up/state` when the connection is lost.
            keepalive_s: seconds of silence after which a ping is sent.

        Raises:
            BrokerAddressError: an address is not of these forms, or there is none.
        """
        self._device = device
        self._addresses = [urllib.parse.urlsplit(address) for address in addresses]
        if not self._addresses or any(each.scheme not in PORTS or not each.hostname for each in self._addresses):
            raise BrokerAddressError(
                f"broker addresses {', '.join(addresses) or '(none)'}: mqtts://host:port is what is understood"
            )
        self._tls = tls
        self._will = will
        self._keepalive_s = keepalive_s
        self._client: mqtt.Client | None = None
        self._again = asyncio.Event()
        self._leaving = False
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    async def events(self) -> AsyncIterator[Event]:
        """Yield what happens on the connection, in order, for ever. One reader."""
        while True:
            yield await self._events.get()

    def _happened(self, event: Event) -> None:
        if isinstance(event, Message) and self._events.qsize() >= MESSAGES_MAX:
            log.warning("dropped a message on %s: %d wait already", event.topic, MESSAGES_MAX)
            return
        self._events.put_nowait(event)

    @property
    def connected(self) -> bool:
        """Whether messages can be published now."""
        return self._client is not None

    def publish(self, channel: Up, payload: bytes, *, retain: bool = False) -> bool:
        """Hand a message to the broker with QoS 1; return false when there is no connection."""
        if self._client is None:
            return False
        info = self._client.publish(str(Topic(self._device, channel)), payload, qos=QOS, retain=retain)
        return info.rc == mqtt.MQTT_ERR_SUCCESS

    def leave(self) -> None:
        """Disconnect in good order when the connection is closed: the broker then does not publish the will.

        Without it, as when another part of the agent failed, the will tells that the device is gone.
        """
        self._leaving = True

    def retry(self) -> None:
        """Connect again now where there is no connection: the reason for the broker's refusal may have passed."""
        self._again.set()

    async def run(self) -> None:
        """Connect, stay connected, and connect again; when cancelled, disconnect."""
        loop = asyncio.get_running_loop()
        delay, turn = RETRY_FIRST_S, 0
        while True:
            address = self._addresses[turn % len(self._addresses)]
            connection = _Connection(self, address, loop)
            began = loop.time()
            self._again.clear()
            try:
                reason = await connection.live()
            finally:
                self._client = None
                connection.close()
            if connection.established:
                self._happened(Disconnected(reason))
                self._again.clear()
            else:
                log.info("no broker at %s: %s", address.netloc, reason)
                turn += 1
            if connection.established and loop.time() - began > STABLE_S:
                delay = RETRY_FIRST_S
            try:
                async with asyncio.timeout(random.uniform(0.05, 1) * delay):  # noqa: S311 - jitter, not a secret
                    await self._again.wait()
                delay = RETRY_FIRST_S
            except TimeoutError:
                delay = min(RETRY_MAX_S, delay * 2)


class _Connection:
    """One connection from its first packet to its end."""

    def __init__(self, owner: MqttClient, address: urllib.parse.SplitResult, loop: asyncio.AbstractEventLoop) -> None:
        self._owner = owner
        self._address = address
        self._loop = loop
        self._over: asyncio.Future[str] = loop.create_future()
        self._misc: asyncio.TimerHandle | None = None
        self._sock: Any = None
        self._tls: ConnectionTls | None = None
        self.established = False
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=owner._device,  # noqa: SLF001 - one class in two parts
            clean_session=False,
            protocol=mqtt.MQTTv311,
            transport="websockets" if address.scheme == "wss" else "tcp",
            reconnect_on_failure=False,
        )
        self._client.suppress_exceptions = False
        if address.scheme == "wss":
            self._client.ws_set_options(path=address.path or "/mqtt")

    async def live(self) -> str:
        """Connect and serve until the connection ends; return the reason."""
        owner, client = self._owner, self._client
        client.username_pw_set(owner._device)  # noqa: SLF001
        client.will_set(str(Topic(owner._device, Up.STATE)), owner._will, qos=QOS, retain=True)  # noqa: SLF001
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_message = self._message
        client.on_socket_close = self._socket_close
        client.on_socket_register_write = self._want_write
        client.on_socket_unregister_write = self._no_write
        try:
            if self._address.scheme != "mqtt":
                self._tls = owner._tls.for_connection()  # noqa: SLF001
                client.tls_set_context(self._tls.context)
            async with asyncio.timeout(CONNECT_S):
                await self._loop.run_in_executor(None, self._connect)
            self._attach()
            self._tick()
            return await self._over
        except TimeoutError:
            return "no answer in time"
        except ssl.SSLError as error:
            return f"TLS: {why(error)}"
        except OSError as error:
            return error.strerror or str(error)

    def _connect(self) -> None:
        port = self._address.port or PORTS[self._address.scheme]
        self._client.connect_timeout = CONNECT_S / 2
        self._client.connect(self._address.hostname or "", port, self._owner._keepalive_s)  # noqa: SLF001
        sock = self._client.socket()
        if isinstance(sock, ssl.SSLSocket) and self._tls is not None:
            self._tls.check(sock)

    def close(self) -> None:
        """Close the socket, after a disconnect where the device leaves in good order."""
        if self._misc is not None:
            self._misc.cancel()
        with contextlib.suppress(OSError, ValueError):
            if self.established and not self._over.done() and self._owner._leaving:  # noqa: SLF001
                self._client.disconnect()
                self._client.loop_write()
        self._client.on_socket_close = None
        self._client.on_socket_unregister_write = None
        self._detach()
        sock = self._client.socket()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.close()

    # Requests of paho to the loop. While `connect` runs on a thread nothing is registered; later all is on the loop.

    def _attach(self) -> None:
        sock: Any = self._client.socket()
        if sock is None:
            self._end("the connection ended at once")
            return
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._loop.add_reader(sock, self._readable)
        if self._client.want_write():
            self._loop.add_writer(sock, self._writable)

    def _detach(self) -> None:
        """Stop watching the socket before paho closes it: its number may be reused at once."""
        sock, self._sock = self._sock, None
        if sock is not None and sock.fileno() >= 0:
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)

    def _socket_close(self, _client: mqtt.Client, _data: object, _sock: Any) -> None:
        self._detach()

    def _want_write(self, _client: mqtt.Client, _data: object, sock: Any) -> None:
        if self._sock is not None:
            self._loop.add_writer(sock, self._writable)

    def _no_write(self, _client: mqtt.Client, _data: object, sock: Any) -> None:
        if self._sock is not None:
            self._loop.remove_writer(sock)

    def _guarded(self, step: Callable[[], object]) -> None:
        try:
            step()
        except OSError as error:
            self._end(error.strerror or str(error))
        except Exception as error:
            log.exception("the MQTT connection ended by a fault of the agent's own")
            self._end(f"{type(error).__name__}: {error}")

    def _readable(self) -> None:
        self._guarded(self._read)

    def _read(self) -> None:
        """Read all there is: several packets in one TLS record make the socket readable once only."""
        while True:
            self._client.loop_read()
            if self._sock is None or not getattr(self._sock, "pending", int)():
                return

    def _writable(self) -> None:
        self._guarded(self._client.loop_write)

    def _tick(self) -> None:
        self._guarded(self._client.loop_misc)
        if not self._over.done():
            self._misc = self._loop.call_later(max(1.0, self._owner._keepalive_s / 4), self._tick)  # noqa: SLF001

    # Callbacks of paho.

    def _connected(
        self, client: mqtt.Client, _data: object, _flags: object, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._end(f"the broker refused: {reason}")
            return
        client.subscribe([(topic, QOS) for topic in device_subscriptions(self._owner._device)])  # noqa: SLF001
        self.established = True
        self._owner._client = client  # noqa: SLF001
        self._owner._happened(Connected())  # noqa: SLF001

    def _disconnected(
        self, _client: mqtt.Client, _data: object, _flags: object, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        self._end(str(reason))

    def _message(self, _client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
        try:
            self._owner._happened(Message(message.topic, bytes(message.payload)))  # noqa: SLF001
        except UnicodeDecodeError as error:  # paho decodes the topic when it is read
            log.warning("dropped a message: its topic is not UTF-8: %s", error)

    def _end(self, reason: str) -> None:
        if not self._over.done():
            self._over.set_result(reason)
