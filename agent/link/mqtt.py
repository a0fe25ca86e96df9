"""MQTT client of the device: paho on the asyncio loop, without a thread and without polling.

Callers read `MqttClient.events()`; paho's callbacks do not leave this module. The client uses MQTT 3.1.1, QoS 1, a
persistent session (`clean_session=False`) and a will on `up/state`. It does not rely on paho's own queue: each
connection gets a new paho client, and messages that must not be lost wait in the store. Addresses are tried in turn;
between attempts the delay doubles, with full jitter.
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

from agent.link.dialer import BROKER_PORTS, connect_broker
from agent.link.https import ConnectionTls, Tls, why
from fleet.protocol.topics import Topic, Up, device_subscriptions

log = logging.getLogger("agent.link.mqtt")

RETRY_FIRST_S: Final = 1.0
RETRY_MAX_S: Final = 300.0
CONNECT_S: Final = 20.0
STABLE_S: Final = 60.0
QOS: Final = 1


MESSAGES_MAX: Final = 256
"""Maximum number of messages that wait for the reader. A broker may send faster than messages can be verified; further
messages are dropped, and polled later over HTTPS."""


class BrokerAddressError(Exception):
    """The address of the broker is not of a supported form."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted the connection; messages can be published."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection ended, for `reason`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Message:
    """Message from the broker, not verified."""

    topic: str
    payload: bytes


Event = Connected | Disconnected | Message


class MqttClient:
    """MQTT client of a device."""

    name = "mqtt"

    def __init__(
        self,
        *,
        device: str,
        addresses: tuple[str, ...],
        tls: Tls,
        will: bytes,
        keepalive_s: int,
        proxy: str = "",
    ) -> None:
        """Prepare a client; `run` connects and stays connected.

        Args:
            device: id of this device, used as the client id.
            addresses: `mqtts://host:8883`, `wss://host:443/mqtt`, or `mqtt://127.0.0.1:1883`; tried in this order.
            tls: source of TLS settings.
            will: published by the broker on `up/state` when the connection is lost.
            keepalive_s: seconds of silence after which a ping is sent.
            proxy: see `agent.link.https.HttpsClient`.

        Raises:
            BrokerAddressError: an address has another form, or there is no address.
        """
        self._device = device
        self._addresses = [urllib.parse.urlsplit(address) for address in addresses]
        if not self._addresses or any(each.scheme not in BROKER_PORTS or not each.hostname for each in self._addresses):
            raise BrokerAddressError(
                f"bad broker addresses {', '.join(addresses) or '(none)'}: they must be like mqtts://host:port"
            )
        self._tls = tls
        self._will = will
        self._keepalive_s = keepalive_s
        self._proxy = proxy
        self._client: mqtt.Client | None = None
        self._again = asyncio.Event()
        self._leaving = False
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events of the connection, in order, forever. Only for a single reader."""
        while True:
            yield await self._events.get()

    def _happened(self, event: Event) -> None:
        if isinstance(event, Message) and self._events.qsize() >= MESSAGES_MAX:
            log.warning("dropped a message on %s: %d are already waiting", event.topic, MESSAGES_MAX)
            return
        self._events.put_nowait(event)

    @property
    def connected(self) -> bool:
        """True while messages can be published."""
        return self._client is not None

    def publish(self, channel: Up, payload: bytes, *, retain: bool = False) -> bool:
        """Send a message to the broker with QoS 1; return False without a connection."""
        if self._client is None:
            return False
        info = self._client.publish(str(Topic(self._device, channel)), payload, qos=QOS, retain=retain)
        return info.rc == mqtt.MQTT_ERR_SUCCESS

    def leave(self) -> None:
        """Disconnect cleanly when the connection is closed, so that the broker does not publish the will.

        Not called when a part of the agent has failed: the will then announces that the device is offline.
        """
        self._leaving = True

    def retry(self) -> None:
        """Reconnect now if there is no connection, as the reason for a refusal by the broker may have gone."""
        self._again.set()

    async def run(self) -> None:
        """Connect, serve the connection, and reconnect, forever; disconnect when cancelled."""
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


class _PahoClient(mqtt.Client):
    """Client of paho with connections of our own: to each address of a name, and through proxies."""

    def __init__(self, proxy: str, scheme: str, *arguments: Any, **more: Any) -> None:
        self._configured_proxy, self._scheme = proxy, scheme
        self.tls: ConnectionTls | None = None
        super().__init__(*arguments, **more)

    def _create_socket_connection(self) -> socket.socket:
        return connect_broker(
            self._scheme, self.host, self.port, timeout_s=self.connect_timeout, configured_proxy=self._configured_proxy
        )

    def _ssl_wrap_socket(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        """Make the handshake, and check what it does not, before anything is said: over WebSocket too."""
        secured: ssl.SSLSocket = super()._ssl_wrap_socket(tcp_sock)
        if self.tls is not None:
            self.tls.check(secured)
        return secured


class _Connection:
    """Connection to a broker, from its first packet to its end."""

    def __init__(self, owner: MqttClient, address: urllib.parse.SplitResult, loop: asyncio.AbstractEventLoop) -> None:
        self._owner = owner
        self._address = address
        self._loop = loop
        self._over: asyncio.Future[str] = loop.create_future()
        self._misc: asyncio.TimerHandle | None = None
        self._sock: Any = None
        self.established = False
        self._client = _PahoClient(
            owner._proxy,  # noqa: SLF001
            address.scheme,
            CallbackAPIVersion.VERSION2,
            client_id=owner._device,  # noqa: SLF001 - part of MqttClient
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
                client.tls = owner._tls.for_connection()  # noqa: SLF001
                client.tls_set_context(client.tls.context)
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
        except Exception as error:
            # Whatever a broker answers, it answers the same at each start: it must not end the agent.
            log.exception("the connection to the broker failed with an internal error")
            return f"{type(error).__name__}: {error}"

    def _connect(self) -> None:
        port = self._address.port or BROKER_PORTS[self._address.scheme]
        self._client.connect_timeout = CONNECT_S / 2  # the rest is for TLS
        self._client.connect(self._address.hostname or "", port, self._owner._keepalive_s)  # noqa: SLF001

    def close(self) -> None:
        """Close the socket, after an MQTT disconnect if the device leaves cleanly."""
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

    # Requests of paho to the event loop. Nothing is registered while `connect` runs on a thread; later, everything runs
    # on the loop.

    def _attach(self) -> None:
        sock: Any = self._client.socket()
        if sock is None:
            self._end("the connection ended immediately")
            return
        self._sock = sock
        self._loop.add_reader(sock, self._readable)
        if self._client.want_write():
            self._loop.add_writer(sock, self._writable)

    def _detach(self) -> None:
        """Stop watching the socket before paho closes it, as its number may be reused at once."""
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
            log.exception("the MQTT connection ended with an internal error")
            self._end(f"{type(error).__name__}: {error}")

    def _readable(self) -> None:
        self._guarded(self._read)

    def _read(self) -> None:
        """Read everything available: several packets in the same TLS record make the socket readable only once."""
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
        except UnicodeDecodeError as error:  # paho decodes the topic on access
            log.warning("dropped a message: its topic is not UTF-8: %s", error)

    def _end(self, reason: str) -> None:
        if not self._over.done():
            self._over.set_result(reason)
