"""Embedded broker: amqtt behind a gate, in a process of its own. For development, on loopback.

amqtt alone does not bind a client to its certificate: it looks up a persistent session before it authenticates, accepts
any will, and keeps the old connection when a client id is taken over. Therefore the gate terminates TLS and requires a
certificate, reads the CONNECT packet before the broker sees it, and passes it on only when client id and will belong to
the certificate's CN; a plugin restricts each session to its own topics, and `FilteringBroker` retained messages too.
amqtt still accepts subscriptions to `$share` that it never serves, keeps nothing over a restart, and is slow: use
Mosquitto in production.

amqtt queues without bounds for a client that does not read, makes a task for each packet of one that does not take its
answers, and reads packets of a quarter of a gigabyte. Here messages that wait are bounded (`Allowance`), a client that
does not take what was sent is not read either, and its connection ends after `_STALLED_S`.

SIGHUP reloads the certificate and the lists of revoked and suspended devices.

    python -m fleet.server.broker.embedded HOST PORT
        CA CERTIFICATE KEY REVOKED SUSPENDED LISTS CLIENT_BYTES CLIENT_MESSAGES TOTAL_BYTES
"""

import asyncio
import contextlib
import logging
import signal
import ssl
import sys
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker
from amqtt.contexts import Action, BrokerConfig, ListenerConfig, ListenerType
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
from amqtt.session import Session

from fleet.ca import SERVER_CN
from fleet.protocol import bounds, topics
from fleet.protocol.topics import BadTopicError, Topic, Up
from fleet.server.broker.allowance import Allowance, Waiting
from fleet.server.broker.broker import MAX_PACKET_BYTES
from fleet.server.config import Address
from fleet.server.listener import abort

log = logging.getLogger(__name__)
_CONNECT_MAX_BYTES: Final = bounds.STATE_MAX_BYTES + 4 * bounds.KIB
_CONNECT_S: Final = 10.0
_TAKEOVER_S: Final = 5.0
_LENGTH_BYTES: Final = 4
_REQUEST_MAX_BYTES: Final = 4 * bounds.KIB
"""Size of any packet but PUBLISH: far above the subscriptions of a device."""

_PUBLISH: Final = 3
_STALLED_S: Final = 10.0
"""Longest wait for a client to take what was sent: on loopback a client that reads takes it at once."""

_UNHANDLED_MAX: Final = 64
"""Messages and subscriptions of one client that were read and not handled yet; beyond that it is not read."""

_UNSENT_MAX: Final = 1024
"""Messages of all clients that wait to be distributed; beyond that no client is read."""

_BREATH_S: Final = 0.01
"""Pause until it is looked again whether a client may be read: amqtt has no event for that."""

_LISTENER: Final = "default"
_HERE: Final = "fleet.server.broker.embedded"
"""Name of this module, also when it runs as a program; amqtt finds the plugins by it."""


class RefusedError(Exception):
    """The gate refuses a connection."""


@dataclass(frozen=True, slots=True)
class Connect:
    """Claims of a CONNECT packet (MQTT 3.1.1, section 3.1); `packet` is the whole packet."""

    client_id: str
    will_topic: str
    packet: bytes


async def read_connect(reader: asyncio.StreamReader) -> Connect:
    """Read the first packet.

    Raises:
        RefusedError: it is no CONNECT of MQTT 3.1.1, or too large.
        IncompleteReadError: the connection ended.
    """
    head = await reader.readexactly(1)
    if head != b"\x10":
        raise RefusedError("the first packet is no CONNECT")
    length = shift = 0
    for _ in range(_LENGTH_BYTES):
        byte = await reader.readexactly(1)
        head += byte
        length |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:  # noqa: PLR2004 - the last byte of a variable length
            break
    if length > _CONNECT_MAX_BYTES:
        raise RefusedError(f"a CONNECT of {length} bytes")
    rest = await reader.readexactly(length)
    return Connect(*_parse(rest), packet=head + rest)


def _parse(data: bytes) -> tuple[str, str]:
    def field(at: int) -> tuple[bytes, int]:
        size = int.from_bytes(data[at : at + 2], "big")
        if at + 2 + size > len(data):
            raise RefusedError("a CONNECT that ends too early")
        return data[at + 2 : at + 2 + size], at + 2 + size

    protocol, at = field(0)
    if protocol != b"MQTT" or data[at : at + 1] != b"\x04" or len(data) < at + 4:
        raise RefusedError("not MQTT 3.1.1")
    will = bool(data[at + 1] & 0x04)
    client_id, at = field(at + 4)
    will_topic, at = field(at) if will else (b"", at)
    return client_id.decode(errors="replace"), will_topic.decode(errors="replace")


def common_name(certificate: dict[str, Any] | None) -> str:
    """Return the CN of a certificate in the form of `ssl`; empty for none."""
    subject = () if certificate is None else certificate.get("subject", ())
    return next((str(value) for part in subject for key, value in part if key == "commonName"), "")


def may(client: str, topic: str, *, publish: bool) -> bool:
    """Tell whether a client may publish to a topic, or receive from it."""
    if client == SERVER_CN:
        return topic.startswith(f"{topics.PREFIX}/")
    if not publish and (topic == topics.POKE or topic in topics.device_subscriptions(client)):
        return True
    try:
        parsed = Topic.parse(topic)
    except BadTopicError:
        return False
    return parsed.device == client and isinstance(parsed.channel, Up) == publish


def check(name: str, connect: Connect, revoked: frozenset[str]) -> None:
    """Hold a CONNECT packet against the certificate's name. Raises `RefusedError`."""
    if name in revoked:
        raise RefusedError(f"{name} is revoked")
    if not name or connect.client_id != name:
        raise RefusedError(f"{name or 'nobody'} came as {connect.client_id!r}")
    if connect.will_topic and not may(name, connect.will_topic, publish=True):
        raise RefusedError(f"{name} has a will for {connect.will_topic!r}")


class Certificates(BaseAuthPlugin):  # type: ignore[misc]
    """Authentication plugin: every client of the broker has passed the gate."""

    async def authenticate(self, *, session: Session) -> bool | None:
        """Accept every client."""
        return bool(session.client_id)


class OwnTopics(BaseTopicPlugin):  # type: ignore[misc]
    """Topic plugin: restricts each client to its own topics."""

    async def topic_filtering(
        self, *, session: Session | None = None, topic: str | None = None, action: Action | None = None
    ) -> bool | None:
        """Tell whether a client may publish to a topic, or receive from it."""
        if session is None or not session.client_id or not topic:
            return False
        return may(session.client_id, topic, publish=action is Action.PUBLISH)


class _Counted:
    """Handler of a client's session, whose messages are counted while they wait for the client."""

    def __init__(self, handler: BrokerProtocolHandler, client: str, broker: "FilteringBroker") -> None:
        self._handler, self._client, self._broker, self._waiting = handler, client, broker, broker.waiting

    async def mqtt_publish(self, topic: str, data: bytes, qos: int | None, *, retain: bool) -> None:
        """Send a message, unless too many wait already; return when it is acknowledged, or no longer waited for."""
        size = len(data)
        self._broker.make_room(size)
        if not self._waiting.take(self._client, size):
            if self._waiting.dropped[self._client] == 1:
                log.warning("%s does not take its messages: those beyond its allowance are dropped", self._client)
            return
        try:
            with contextlib.suppress(TimeoutError):  # not acknowledged: the handler has said so
                await self._handler.mqtt_publish(topic, data, qos, retain=retain)
        finally:
            self._waiting.give(self._client, size)


class FilteringBroker(Broker):  # type: ignore[misc]
    """amqtt, with retained messages under the rule of live ones, and bounds on what waits for a client.

    amqtt 0.12 sends a client that connects whatever is retained under any client's subscription, and asks no plugin.

    Attributes:
        suspended: devices that may not write now.
        waiting: messages that wait for clients.
    """

    suspended: frozenset[str] = frozenset()

    def __init__(self, config: BrokerConfig, allowance: Allowance) -> None:
        super().__init__(config)
        self.waiting = Waiting(allowance)
        self._held: dict[str, list[int]] = {}
        self._letting_go_at = _UNSENT_MAX

    async def may_read(self, client: str) -> None:
        """Wait until more may be read from a client.

        Raises:
            RefusedError: it began too many messages of QoS 2 and did not release them.
        """
        while True:
            session, handler = self._sessions.get(client, (None, None))
            unhandled = 0 if session is None else session.delivered_message_queue.qsize()
            if handler is not None:
                queues = (handler._pending_subscriptions, handler._pending_unsubscriptions)  # noqa: SLF001
                waits = [each for queue in queues for each in queue._queue]  # noqa: SLF001 - amqtt does not tell
                unhandled += sum(max(1, len(each.topics)) for each in waits)
            if session is not None and len(session.inflight_in) > _UNHANDLED_MAX:
                session.inflight_in.clear()  # kept with the session otherwise, and each later connection ended for them
                raise RefusedError(f"{client} does not release its messages of QoS 2")
            # the server is read also when nothing more may wait: it acknowledges what does
            full = self.waiting.full and client != SERVER_CN
            if unhandled < _UNHANDLED_MAX and self._broadcast_queue.qsize() < _UNSENT_MAX and not full:
                return
            await asyncio.sleep(_BREATH_S)

    def _get_handler(self, session: Session) -> _Counted | None:
        handler = super()._get_handler(session)
        return None if handler is None else _Counted(handler, session.client_id, self)

    def make_room(self, payload: int) -> None:
        """Let messages that are kept for clients that are away give way to one for a present client.

        The oldest one goes of the client for which most is kept. Devices lose nothing by it (`Allowance`).
        """
        while self.waiting.lacks_room(payload):
            client = max(self._held, key=lambda each: (sum(self._held[each]), each))
            session, _ = self._sessions.get(client, (None, None))
            if session is not None and not session.retained_messages.empty():
                session.retained_messages.get_nowait()
            held = self._held[client]
            self.waiting.give(client, held.pop(0), away=True)
            if not held:
                del self._held[client]

    async def _run_broadcast(self, running_tasks: "deque[asyncio.Task[Any]]") -> None:
        await super()._run_broadcast(running_tasks)
        if len(running_tasks) < self._letting_go_at:
            return
        # amqtt lets go of finished tasks, and their messages, only up to the first that waits
        waits = [task for task in running_tasks if not task.done()]
        for task in running_tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                log.info("a message was not delivered: %s", task.exception())
        running_tasks.clear()
        running_tasks.extend(waits)
        self._letting_go_at = max(_UNSENT_MAX, 2 * len(waits))

    async def _retain_broadcast_message(self, broadcast: dict[str, Any], qos: int, target_session: Session) -> None:
        """Keep a message for a client that is away."""
        client, size = target_session.client_id, len(broadcast["data"])
        if self.waiting.take(client, size, away=True):
            self._held.setdefault(client, []).append(size)
            await super()._retain_broadcast_message(broadcast, qos, target_session)

    async def _publish_session_retained_messages(self, session: Session) -> None:
        self._release(session.client_id)
        await super()._publish_session_retained_messages(session)

    async def _delete_session(self, client_id: str) -> None:
        self._release(client_id)
        await super()._delete_session(client_id)

    def _release(self, client: str) -> None:
        """Count no more what was kept for a client that is back."""
        for size in self._held.pop(client, ()):
            self.waiting.give(client, size, away=True)

    async def _topic_filtering(self, session: Session, topic: str, action: Action) -> bool:
        if action is Action.PUBLISH and session.client_id in self.suspended:
            return False
        return bool(await super()._topic_filtering(session, topic, action))

    async def _publish_retained_messages_for_subscription(
        self, subscription: tuple[str, int], session: Session
    ) -> None:
        topic_filter, qos = subscription
        handler = self._get_handler(session)
        if handler is None or not await self._topic_filtering(session, topic_filter, Action.SUBSCRIBE):
            return
        sending = [
            asyncio.create_task(handler.mqtt_publish(topic, kept.data, min(qos, kept.qos or qos), retain=True))
            for topic, kept in list(self._retained_messages.items())
            if self._matches(topic, topic_filter) and await self._topic_filtering(session, topic, Action.RECEIVE)
        ]
        if sending:
            await asyncio.wait(sending)


class _Writer(StreamWriterAdapter):  # type: ignore[misc]
    """Writer that waits for a client `_STALLED_S` and no longer."""

    async def drain(self) -> None:
        await self._patiently(super().drain())

    async def close(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._patiently(super().close())

    def abort(self) -> None:
        """End the connection at once."""
        abort(self._writer.transport)

    async def _patiently(self, taken: Coroutine[Any, Any, None]) -> None:
        try:
            async with asyncio.timeout(_STALLED_S):
                await taken
        except TimeoutError:
            self.abort()
            raise ConnectionResetError("the client takes nothing") from None


class _Reader(StreamReaderAdapter):  # type: ignore[misc]
    """Reader that returns the CONNECT packet again, and reads no faster than the client takes its answers.

    Args:
        connect: the packet that was read already.
        reader, writer: of the connection.
        broker: asked whether the client may be read.
    """

    def __init__(
        self, connect: Connect, reader: asyncio.StreamReader, writer: _Writer, broker: FilteringBroker
    ) -> None:
        super().__init__(reader)
        self._first, self._client = connect.packet, connect.client_id
        self._writer, self._broker = writer, broker
        self._head, self._left, self._ended = b"", 0, False

    async def read(self, n: int = -1) -> bytes:
        try:
            return await self._read(n)
        except RefusedError as error:
            if not self._ended:
                log.warning("refused: %s", error)
            self._ended = True
            self._writer.abort()  # a goodbye of TLS would wait until the client has sent all of it
            raise ConnectionResetError(str(error)) from None

    async def _read(self, n: int) -> bytes:
        if self._ended:
            raise RefusedError("it was refused before")
        if self._first:
            return self._read_first(n)
        if not n:
            return b""
        # amqtt reads the head of a packet byte by byte
        if not 0 < n <= (self._left or 1):
            raise RefusedError(f"{self._client} sends a packet that is longer than it says")
        await self._writer.drain()
        if not self._left and not self._head:
            await asyncio.sleep(0)  # the handling of the packet before begins, and is counted
        await self._broker.may_read(self._client)
        data = bytes(await super().read(n))
        self._follow(data)
        return data

    def _read_first(self, n: int) -> bytes:
        size = len(self._first) if n < 0 else n
        if size > len(self._first):
            raise RefusedError(f"the CONNECT of {self._client} ends too early")
        taken, self._first = self._first[:size], self._first[size:]
        return taken

    def _follow(self, data: bytes) -> None:
        """Note where in a packet the connection is. Raises `RefusedError` when its head says that it is too large."""
        if self._left:
            self._left -= len(data)
            return
        self._head += data
        if len(self._head) < 2 or self._head[-1] >= 0x80:  # noqa: PLR2004 - the last byte of a variable length
            return
        self._left = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(self._head[1:]))
        publishes = self._head[0] >> 4 == _PUBLISH
        self._head = b""
        if self._left > (MAX_PACKET_BYTES if publishes else _REQUEST_MAX_BYTES):
            raise RefusedError(f"{self._client} sends a packet of {self._left} bytes")


class Gate:
    """Accept TLS connections, and pass those that are allowed on to the broker."""

    def __init__(self, broker: FilteringBroker, revoked: Path, suspended: Path) -> None:
        self._broker = broker
        self._file, self._suspended = revoked, suspended
        self._revoked: frozenset[str] = frozenset()
        self._live: dict[str, tuple[asyncio.StreamWriter, asyncio.Task[None]]] = {}

    def reload(self) -> None:
        """Read the lists of revoked and suspended devices, and end the connections of the revoked."""
        with contextlib.suppress(FileNotFoundError):
            self._revoked = frozenset(self._file.read_text(encoding="utf-8").split())
            self._broker.suspended = frozenset(self._suspended.read_text(encoding="utf-8").split())
        for name in self._revoked & self._live.keys():
            self._live[name][0].close()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        tls = writer.get_extra_info("ssl_object")
        name = common_name(tls.getpeercert() if tls is not None else None)
        try:
            async with asyncio.timeout(_CONNECT_S):
                connect = await read_connect(reader)
            check(name, connect, self._revoked)
            await self._take_over(name)
        except (RefusedError, TimeoutError, asyncio.IncompleteReadError, ConnectionError, ssl.SSLError) as error:
            if isinstance(error, RefusedError):
                log.warning("refused: %s", error)
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        self._live[name] = (writer, task)
        try:
            answers = _Writer(writer)
            await self._broker.external_connected(_Reader(connect, reader, answers, self._broker), answers, _LISTENER)
        except (OSError, asyncio.IncompleteReadError) as error:
            log.info("%s is gone: %s", name, error)
        finally:
            if self._live.get(name, (None, None))[1] is task:
                del self._live[name]
            writer.close()

    async def _take_over(self, name: str) -> None:
        """End the client's older connection first, so that its will is sent before messages of the new one."""
        old = self._live.pop(name, None)
        if old is not None:
            writer, task = old
            writer.close()
            await asyncio.wait([task], timeout=_TAKEOVER_S)


class Files(NamedTuple):
    """Files that the broker reads. `lists`: revocation lists of the accepted issuers; empty for any below the root."""

    ca: Path
    certificate: Path
    key: Path
    revoked: Path
    suspended: Path
    lists: Path


async def serve(host: str, port: int, files: Files, allowance: Allowance) -> None:
    """Serve until SIGTERM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.certificate, files.key)
    context.load_verify_locations(files.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    _accept_only(context, files.lists)
    broker = FilteringBroker(
        BrokerConfig(
            listeners={_LISTENER: ListenerConfig(type=ListenerType.EXTERNAL, bind=str(Address(host, port)))},
            plugins={f"{_HERE}.{plugin.__name__}": {} for plugin in (Certificates, OwnTopics)},
        ),
        allowance,
    )
    await broker.start()
    gate = Gate(broker, files.revoked, files.suspended)
    gate.reload()
    server = await asyncio.start_server(gate.connected, host, port, ssl=context)
    stop = asyncio.Event()

    def reload() -> None:
        context.load_cert_chain(files.certificate, files.key)
        gate.reload()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    async with server:
        await stop.wait()
    with contextlib.suppress(Exception):
        async with asyncio.timeout(2):
            await broker.shutdown()


def _accept_only(context: ssl.SSLContext, lists: Path) -> None:
    """Accept clients of the issuers with these revocation lists; without any, of every issuer below the root."""
    if lists.exists() and lists.stat().st_size:
        context.load_verify_locations(lists)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def main(arguments: list[str]) -> None:
    """Run as a program, with the arguments that the module names."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    host, port = arguments[:2]
    files, numbers = arguments[2 : 2 + len(Files._fields)], arguments[2 + len(Files._fields) :]
    asyncio.run(serve(host, int(port), Files(*map(Path, files)), Allowance(*map(int, numbers))))


if __name__ == "__main__":
    main(sys.argv[1:])
