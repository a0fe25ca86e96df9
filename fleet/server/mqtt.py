"""MQTT client of the server; no other module of the server uses paho.

paho runs on the server's event loop through its external-loop callbacks; there is no paho thread. Connecting (DNS,
TCP, TLS) blocks in paho, and therefore happens in a thread. Messages are not queued without a connection:
`on_connected` is called on each connect, and publishes again what devices may have missed.
"""

import asyncio
import contextlib
import logging
import random
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from fleet.ca import SERVER_CN
from fleet.protocol import topics
from fleet.server.config import Address

log = logging.getLogger(__name__)
KEEPALIVE_S: Final = 30
_BACKOFF_MIN_S: Final = 0.2
_BACKOFF_MAX_S: Final = 10.0
_IN_FLIGHT: Final = 1000

Handler = Callable[[str, bytes], None]


class MqttClient:
    """Connection to the broker, restored until `close`.

    Args:
        address: of the broker.
        ca: PEM of the fleet's CA.
        certificate: PEM with the server's client certificate and key.
        on_message: called with topic and payload, on the loop; must not block and must not raise.
        on_connected: called after each connect, once subscribed.
        remembered: whether the broker queues messages for the server while it is disconnected. Reports do not need it.
    """

    def __init__(
        self,
        *,
        address: Address,
        ca: Path,
        certificate: Path,
        on_message: Handler,
        on_connected: Callable[[], None],
        remembered: bool,
    ) -> None:
        self._address = address
        self._remembered = remembered
        self._on_message = on_message
        self._on_connected = on_connected
        self._loop = asyncio.get_running_loop()
        self._down = asyncio.Event()
        self._up = asyncio.Event()
        self._closing = False
        self._passed_on = asyncio.Event()
        self._newest: mqtt.MQTTMessageInfo | None = None
        self._ca, self._certificate = ca, certificate
        self._client = self._make_client()
        self._task = asyncio.create_task(self._keep_connected(), name="bus")

    @property
    def connected(self) -> bool:
        """Tell whether messages can be sent now."""
        return self._up.is_set()

    async def wait_connected(self) -> None:
        """Wait until the client is connected."""
        await self._up.wait()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Send a message with QoS 1; return False, and drop it, without a connection."""
        if not self.connected:
            return False
        self._newest = self._client.publish(topic, payload, qos=1, retain=retain)
        return self._newest.rc == mqtt.MQTT_ERR_SUCCESS

    async def acknowledged(self, within_s: float) -> None:
        """Wait until the broker has passed on the newest message, for at most `within_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._newest is not None and self.connected and not self._newest.is_published():
                    self._passed_on.clear()
                    await self._passed_on.wait()

    async def close(self) -> None:
        """Disconnect and stop; messages that come from now on stay with the broker."""
        self._closing = True
        self._stop_reading()
        if self.connected:
            self._client.disconnect()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._down.wait()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._forget_sockets()

    def _stop_reading(self) -> None:
        sock: Any = self._client.socket()
        if sock is not None and sock.fileno() >= 0:
            self._loop.remove_reader(sock)

    def _make_client(self) -> mqtt.Client:
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=SERVER_CN, clean_session=not self._remembered)
        context = ssl.create_default_context(cafile=self._ca)
        context.load_cert_chain(self._certificate)
        client.tls_set_context(context)
        client.max_inflight_messages_set(_IN_FLIGHT)
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_disconnect = self._disconnected
        client.on_message = self._received
        client.on_publish = self._published
        client.on_socket_open = self._socket_open
        client.on_socket_close = self._socket_close
        client.on_socket_register_write = self._want_write
        client.on_socket_unregister_write = self._no_write
        return client

    async def _keep_connected(self) -> None:
        backoff = _BACKOFF_MIN_S
        while not self._closing:
            self._down.clear()
            try:
                await asyncio.to_thread(self._client.connect, self._address.host, self._address.port, KEEPALIVE_S)
            except (OSError, ValueError) as error:
                log.info("no broker at %s yet: %s", self._address, error)
            else:
                housekeeping = asyncio.create_task(self._housekeeping())
                try:
                    await self._down.wait()
                finally:
                    housekeeping.cancel()
                if self._up.is_set():
                    backoff = _BACKOFF_MIN_S
                self._up.clear()
                # a new client for each connection, so that no partial message is left over
                self._forget_sockets()
                self._client = self._make_client()
            await asyncio.sleep(random.uniform(_BACKOFF_MIN_S / 2, backoff))  # noqa: S311 - jitter
            backoff = min(backoff * 2, _BACKOFF_MAX_S)

    async def _housekeeping(self) -> None:
        """Let paho send pings and detect a silent peer."""
        while True:
            await asyncio.sleep(KEEPALIVE_S / 6)
            if self._client.loop_misc() != mqtt.MQTT_ERR_SUCCESS:
                self._down.set()

    # paho's callbacks; those of the socket may come from the connecting thread

    def _socket_open(self, _client: mqtt.Client, _data: Any, sock: Any) -> None:
        self._loop.call_soon_threadsafe(self._watch, sock)

    def _watch(self, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.add_reader(sock, self._readable, sock)

    def _readable(self, sock: Any) -> None:
        if self._closing:
            return
        self._client.loop_read(_IN_FLIGHT)
        # TLS may hold decrypted bytes that no longer make the socket readable. Others have their turn in between:
        # a broker that always has more would else keep the loop from everything, also from the end.
        if self._current(sock) and sock.pending():
            self._loop.call_soon(self._readable, sock)

    def _current(self, sock: object) -> bool:
        mine: Any = self._client.socket()
        return mine is sock and sock.fileno() >= 0

    def _socket_close(self, _client: mqtt.Client, _data: Any, sock: Any) -> None:
        if self._loop.is_closed():
            return  # a client that is garbage-collected after the loop has ended
        if sock.fileno() >= 0:
            handle = sock.fileno()
            self._loop.remove_reader(handle)
            self._loop.remove_writer(handle)
        self._loop.call_soon_threadsafe(self._down.set)

    def _want_write(self, _client: mqtt.Client, _data: Any, sock: Any) -> None:
        self._loop.call_soon_threadsafe(self._watch_write, sock)

    def _watch_write(self, sock: Any) -> None:
        if self._current(sock):
            self._loop.add_writer(sock, self._client.loop_write)

    def _no_write(self, _client: mqtt.Client, _data: Any, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.call_soon_threadsafe(self._loop.remove_writer, sock.fileno())

    def _forget_sockets(self) -> None:
        sock: Any = self._client.socket()
        if sock is not None and sock.fileno() >= 0:
            self._loop.remove_reader(sock)
            self._loop.remove_writer(sock)
            sock.close()

    def _connected(self, client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            log.warning("the broker refused the server: %s", reason)
            self._down.set()
            return
        client.subscribe([(topic, 1) for topic in topics.server_subscriptions()])

    def _subscribed(self, _client: mqtt.Client, _data: Any, _mid: int, reasons: Any, _properties: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            log.error("the broker does not let the server subscribe: %s", reasons)
            self._down.set()
            return
        self._up.set()
        log.info("connected to the broker at %s", self._address)
        self._on_connected()

    def _disconnected(self, _client: mqtt.Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if not self._closing:
            log.warning("the broker is gone (%s)", reason)
        self._down.set()

    def _published(self, _client: mqtt.Client, _data: Any, _mid: int, _reason: Any, _properties: Any) -> None:
        self._passed_on.set()

    def _received(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        try:
            self._on_message(message.topic, bytes(message.payload))
        except Exception:
            # paho would lose its position in the stream, and every later message
            log.exception("a message was not handled")
