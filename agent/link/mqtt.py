"""The board's connection to its broker: paho on the asyncio loop, without a thread and without polling.

paho tells by callbacks which socket it has and when it wants to write; the loop does the waiting. MQTT 3.1.1, QoS 1, a
session that the broker keeps (`clean_session=False`), and a will on `up/state`. paho's own queue is not relied on: a
new client is made for each connection, and what must not be lost waits in the outbox. Addresses are tried in turn;
between attempts the delay doubles, with full jitter.
"""

import asyncio
import contextlib
import logging
import random
import socket
import ssl
import urllib.parse
from collections.abc import Callable
from typing import Any, Final

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from agent.link.https import ConnectionTls, Tls, why
from fleet.protocol.topics import Topic, Up, board_subscriptions

log = logging.getLogger("agent.link.mqtt")

RETRY_FIRST_S: Final = 1.0

RETRY_MAX_S: Final = 300.0

CONNECT_S: Final = 20.0

STABLE_S: Final = 60.0

PORTS: Final = {"mqtt": 1883, "mqtts": 8883, "wss": 443}

QOS: Final = 1


class BusError(Exception):
    """An address that this program cannot use."""


class MqttClient:
    """One board on its broker."""

    def __init__(
        self,
        *,
        device: str,
        addresses: tuple[str, ...],
        tls: Tls,
        will: bytes,
        keepalive_s: int,
        on_connected: Callable[[], None],
        on_disconnected: Callable[[str], None],
        on_message: Callable[[str, bytes], None],
    ) -> None:
        """A bus; `run` connects and stays connected.

        Args:
            device: id of this board, also the client id.
            addresses: `mqtts://host:8883`, `wss://host:443/mqtt`, or `mqtt://127.0.0.1:1883`; tried in this order.
            tls: where contexts come from.
            will: what the broker says on `up/state` when the connection is lost.
            keepalive_s: seconds of silence after which a ping is sent.
            on_connected: called on the loop, like the others.
            on_disconnected: told why.
            on_message: told topic and payload.
        """
        self._device = device
        self._addresses = [urllib.parse.urlsplit(address) for address in addresses]
        if not self._addresses or any(each.scheme not in PORTS or not each.hostname for each in self._addresses):
            raise BusError(
                f"broker addresses {', '.join(addresses) or '(none)'}: mqtts://host:port is what is understood"
            )
        self._tls = tls
        self._will = will
        self._keepalive_s = keepalive_s
        self._on_connected = on_connected
        self._on_disconnected = on_disconnected
        self._on_message = on_message
        self._client: mqtt.Client | None = None
        self._again = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether messages can be published now."""
        return self._client is not None

    def publish(self, channel: Up, payload: bytes, *, retain: bool = False) -> bool:
        """Hand a message to the broker with QoS 1; false when there is no connection."""
        if self._client is None:
            return False
        info = self._client.publish(str(Topic(self._device, channel)), payload, qos=QOS, retain=retain)
        return info.rc == mqtt.MQTT_ERR_SUCCESS

    def retry(self) -> None:
        """Try again now where there is no connection: what it was refused for may have passed."""
        self._again.set()

    async def run(self) -> None:
        """Connect, stay, and connect again; until cancelled, and then say goodbye."""
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
                self._on_disconnected(reason)
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

    def __init__(self, bus: MqttClient, address: urllib.parse.SplitResult, loop: asyncio.AbstractEventLoop) -> None:
        self._bus = bus
        self._address = address
        self._loop = loop
        self._over: asyncio.Future[str] = loop.create_future()
        self._misc: asyncio.TimerHandle | None = None
        self._sock: Any = None
        self._tls: ConnectionTls | None = None
        self.established = False
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=bus._device,  # noqa: SLF001 - one class in two parts
            clean_session=False,
            protocol=mqtt.MQTTv311,
            transport="websockets" if address.scheme == "wss" else "tcp",
            reconnect_on_failure=False,
        )
        self._client.suppress_exceptions = False
        if address.scheme == "wss":
            self._client.ws_set_options(path=address.path or "/mqtt")

    async def live(self) -> str:
        """Connect and serve until it ends; returns why it ended."""
        bus, client = self._bus, self._client
        client.username_pw_set(bus._device)  # noqa: SLF001
        client.will_set(str(Topic(bus._device, Up.STATE)), bus._will, qos=QOS, retain=True)  # noqa: SLF001
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_message = self._message
        client.on_socket_close = self._socket_close
        client.on_socket_register_write = self._want_write
        client.on_socket_unregister_write = self._no_write
        try:
            if self._address.scheme != "mqtt":
                self._tls = bus._tls.for_connection()  # noqa: SLF001
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
        self._client.connect(self._address.hostname or "", port, self._bus._keepalive_s)  # noqa: SLF001
        sock = self._client.socket()
        if isinstance(sock, ssl.SSLSocket) and self._tls is not None:
            self._tls.check(sock)

    def close(self) -> None:
        """Say goodbye where there is somebody to hear it, and let go of the socket."""
        if self._misc is not None:
            self._misc.cancel()
        with contextlib.suppress(OSError, ValueError):
            if self.established and not self._over.done():
                self._client.disconnect()
                self._client.loop_write()
        self._client.on_socket_close = None
        self._client.on_socket_unregister_write = None
        self._detach()
        sock = self._client.socket()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.close()

    # What paho asks of the loop. While `connect` runs on a thread nothing is registered; later all is on the loop.

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
        """Before paho closes the socket: a number that is reused must not be ours any more."""
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
            log.exception("the bus stopped by a fault of the agent's own")
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
            self._misc = self._loop.call_later(max(1.0, self._bus._keepalive_s / 4), self._tick)  # noqa: SLF001

    # What paho tells.

    def _connected(
        self, client: mqtt.Client, _data: object, _flags: object, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._end(f"the broker refused: {reason}")
            return
        client.subscribe([(topic, QOS) for topic in board_subscriptions(self._bus._device)])  # noqa: SLF001
        self.established = True
        self._bus._client = client  # noqa: SLF001
        self._bus._on_connected()  # noqa: SLF001

    def _disconnected(
        self, _client: mqtt.Client, _data: object, _flags: object, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        self._end(str(reason))

    def _message(self, _client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
        try:
            self._bus._on_message(message.topic, bytes(message.payload))  # noqa: SLF001
        except Exception:
            log.exception("a message was not handled")  # its topic may be what cannot be read

    def _end(self, reason: str) -> None:
        if not self._over.done():
            self._over.set_result(reason)
