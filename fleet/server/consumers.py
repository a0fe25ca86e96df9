"""Consumers: systems of the operator that read components' messages from the broker, with certificates of their own.

A consumer may read the topics that it was granted of one group, and write none. The server passes on what it has
stored, in order, on `fleet/v1/messages/<group>/<device>/<instance>/<topic>`, and only where a consumer may read it; how
far it came is remembered, so that an outage of the broker or of the server costs nothing but repetitions.
"""

import asyncio
import contextlib
import logging
import secrets
import ssl
import struct
import tempfile
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.requests import Request
from starlette.responses import Response

from fleet import ca
from fleet.ca import BadRequestError, CertificateAuthority, Pair
from fleet.protocol import message_topics, names, topics
from fleet.protocol.files import create_exclusive
from fleet.protocol.operator_api import Refusal
from fleet.protocol.trust_api import ConsumerReply, ConsumerRequest, Consumers, ConsumerView
from fleet.server.api.http import answer, body, param
from fleet.server.api.messages import view
from fleet.server.broker.broker import Reader
from fleet.server.config import Address
from fleet.server.mqtt import MqttClient
from fleet.server.unknown import unknown_group
from fleet.store.consumers import ConsumerRow
from fleet.store.readings import ReadingRow
from fleet.store.sqlite import utc
from fleet.store.store import AuditLog, ChangeSignal, Store

log = logging.getLogger(__name__)
CONSUMERS_MAX: Final = 100
LIFE: Final = timedelta(days=365)
"""Life of a certificate; a consumer with another one takes its place."""

_BATCH: Final = 200
_ACKNOWLEDGED_S: Final = 10.0
_LOOK_S: Final = 60.0
_RETRY_S: Final = 1.0
_KICK_S: Final = 5.0
_KICK_LIFE: Final = timedelta(minutes=5)


class ReadersBroker(NamedTuple):
    """Broker as consumers meet it.

    Attributes:
        name: `mosquitto` where it can hold consumers to their topics.
        urls: where clients connect.
        changed: has it read again who may read what.
        kick: ends a consumer's connection.
    """

    name: str
    urls: tuple[str, ...]
    changed: Callable[[], None]
    kick: "Kick"


class ConsumerHandlers:
    """Handlers of `/v1/consumers`."""

    def __init__(
        self,
        *,
        store: Store,
        ca: CertificateAuthority,
        broker: ReadersBroker,
        audit: AuditLog,
        clock: Callable[[], datetime],
    ) -> None:
        self._store, self._ca, self._broker, self._audit, self._clock = store, ca, broker, audit, clock

    async def list(self, _request: Request, _by: str) -> Response:
        """GET /v1/consumers."""
        return answer(self._views())

    async def add(self, request: Request, by: str) -> Response:
        """POST /v1/consumers."""
        wanted = await body(request, ConsumerRequest)
        name = names.check_label(wanted.name, "consumer")
        if self._broker.name != "mosquitto":
            raise Refusal(
                409,
                "no-mosquitto",
                f"the {self._broker.name} broker cannot hold a consumer to its topics",
                action="run the server with Mosquitto, or follow GET /v1/messages",
            )
        try:
            key = ca.read_request(wanted.request)
            filters = tuple(dict.fromkeys(map(message_topics.check_filter, wanted.topics)))
        except (BadRequestError, message_topics.BadMessageTopicError) as error:
            raise Refusal(400, "bad-request", str(error)) from error
        if any(each.endswith(" ") for each in filters):
            raise Refusal(400, "bad-request", "the broker's access list has no topic that ends with a space")
        if not filters or len(filters) > message_topics.FILTERS_MAX:
            most = message_topics.FILTERS_MAX
            raise Refusal(400, "bad-request", f"a consumer has 1 to {most} topics")
        if self._store.devices.group(wanted.group) is None:
            raise unknown_group(self._store, wanted.group, action="fleet groups lists them")
        now = self._clock()
        if self._store.consumers.named(name) is not None:
            raise Refusal(
                409, "conflict", f"there is a consumer {name}", action=f"revoke it first: fleet consumers revoke {name}"
            )
        if len(self._store.consumers.all(now=now.timestamp())) >= CONSUMERS_MAX:
            raise Refusal(409, "too-many", f"there are {CONSUMERS_MAX} consumers, with those that were revoked")
        user = topics.consumer_user(name, secrets.token_hex(4))
        issued = self._ca.consumer(key, user, now=now, life=LIFE)
        row = ConsumerRow(
            user=user,
            name=name,
            group=wanted.group,
            topics=filters,
            created_at=now.timestamp(),
            ends_at=issued.not_after.timestamp(),
            revoked=False,
        )
        with self._store.atomic():
            if not self._store.consumers.granted(now=now.timestamp()):
                self._store.consumers.set_passed_on(self._store.readings.newest())  # messages from before are not sent
            self._store.consumers.add(row)
            self._audit.record(by, "add-consumer", name, f"{wanted.group}: {', '.join(filters)}")
        self._broker.changed()
        reply = ConsumerReply(
            name=name,
            user=user,
            group=wanted.group,
            subscriptions=topics.consumer_topics(wanted.group, filters),
            brokers=self._broker.urls,
            certificate=issued.pem,
            ca=self._ca.pem,
            ends=utc(row.ends_at),
        )
        return answer(reply, 201)

    async def revoke(self, request: Request, by: str) -> Response:
        """POST /v1/consumers/{name}/revoke."""
        name = param(request, "name")
        row = self._store.consumers.named(name)
        if row is None:
            raise Refusal(404, "unknown-consumer", f"there is no consumer {name}", action="fleet consumers list")
        with self._store.atomic():
            self._store.consumers.revoke(row.user)
            self._audit.record(by, "revoke-consumer", name)
        self._broker.changed()
        await self._broker.kick(row.user)
        return answer(self._views())

    def _views(self) -> Consumers:
        rows = self._store.consumers.all(now=self._clock().timestamp())
        return Consumers(
            consumers=tuple(
                ConsumerView(
                    name=row.name,
                    group=row.group,
                    topics=row.topics,
                    created_at=utc(row.created_at),
                    ends=utc(row.ends_at),
                )
                for row in rows
                if not row.revoked
            )
        )


def readers(store: Store, *, now: float) -> tuple[Reader, ...]:
    """Return what each consumer may read; one that was revoked nothing, as long as its certificate is not over."""
    return tuple(
        Reader(row.user, () if row.revoked else topics.consumer_topics(row.group, row.topics))
        for row in store.consumers.all(now=now)
    )


class Kick:
    """End of a consumer's live connection: the broker lets go of one whose client id connects again."""

    def __init__(self, *, issue: Callable[[str, timedelta], Pair], ca: Path, address: Callable[[], Address]) -> None:
        self._issue, self._ca, self._address = issue, ca, address

    async def __call__(self, user: str) -> None:
        """Connect once in the consumer's place, with a clean session; a broker that is away has no connection."""
        try:
            async with asyncio.timeout(_KICK_S):
                await self._connect(user)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            log.warning("the connection of %s was not ended: %s", user, error)

    async def _connect(self, user: str) -> None:
        pair, address = self._issue(user, _KICK_LIFE), self._address()
        context = ssl.create_default_context(cafile=str(self._ca))
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "client.pem"
            create_exclusive(path, (pair.certificate_pem + pair.key_pem).decode(), mode=0o600)
            context.load_cert_chain(path)
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context)
        try:
            identity = user.encode()
            rest = b"\0\4MQTT\4\2\0\12" + struct.pack(">H", len(identity)) + identity
            writer.write(bytes([0x10, len(rest)]) + rest)  # CONNECT of MQTT 3.1.1, with a clean session
            await reader.readexactly(4)  # CONNACK
            writer.write(b"\xe0\0")  # DISCONNECT
            await writer.drain()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def throwaway(authority: CertificateAuthority, user: str, *, now: datetime, life: timedelta) -> Pair:
    """Issue a certificate for a connection in a consumer's place, with a key of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    issued = authority.consumer(key.public_key(), user, now=now, life=life)
    return Pair(issued.pem.encode(), ca.private_pem(key))


class MessageRelay:
    """Passes stored messages on to the broker, for consumers."""

    def __init__(
        self, *, store: Store, bus: Callable[[], MqttClient], changes: ChangeSignal, clock: Callable[[], datetime]
    ) -> None:
        self._store, self._bus, self._changes, self._clock = store, bus, changes, clock

    async def run(self) -> None:
        """Pass messages on, forever."""
        while True:
            try:
                passed = await self._pass_on()
            except Exception:
                log.exception("messages are not passed on to consumers; it is tried again")
                passed = False
            await asyncio.sleep(0)  # many messages in a row may be for nobody
            if passed:
                await self._changes.until(self._has_more, timeout_s=_LOOK_S)
            else:
                await asyncio.sleep(_RETRY_S)

    def _has_more(self) -> bool | None:
        if self._store.readings.newest() <= self._store.consumers.passed_on():
            return None
        return True if self._store.consumers.granted(now=self._clock().timestamp()) else None

    async def _pass_on(self) -> bool:
        """Pass on the next messages; false where the broker does not take them now."""
        granted = self._store.consumers.granted(now=self._clock().timestamp())
        if not granted:
            return True
        rows = self._store.readings.after(
            self._store.consumers.passed_on(), devices=None, instance="", since=0.0, most=_BATCH
        )
        if not rows:
            return True
        bus = self._bus()
        for topic, row in self._addressed(rows, granted):
            if not bus.publish(topic, msgspec.json.encode(view(row))):
                return False
        await bus.acknowledged(_ACKNOWLEDGED_S)
        if not bus.connected:
            return False
        self._store.consumers.set_passed_on(rows[-1].id)
        return True

    def _addressed(
        self, rows: list[ReadingRow], granted: list[tuple[str, tuple[str, ...]]]
    ) -> list[tuple[str, ReadingRow]]:
        """Return the broker's topics of each message, one for each group in which a consumer may read it."""
        groups = {}
        for device in {row.device for row in rows}:
            found = self._store.devices.get(device)
            groups[device] = [] if found is None else [each.name for each in self._store.devices.groups_of(found)]
        wanted: dict[str, list[tuple[str, ...]]] = {}
        for group, filters in granted:
            wanted.setdefault(group, []).append(filters)
        return [
            (topics.consumed(group, row.device, row.instance, row.topic), row)
            for row in rows
            if _is_addressable(row)
            for group in groups[row.device]
            if any(message_topics.any_matches(filters, row.topic) for filters in wanted.get(group, ()))
        ]


def _is_addressable(row: ReadingRow) -> bool:
    """Tell whether the broker has a topic for a message: devices are not believed to send such alone."""
    try:
        names.check_label(row.instance, "instance")
        message_topics.check_topic(row.topic)
    except ValueError:
        return False
    return True
