"""A device that does not read cannot make the broker grow without bound, and others are served meanwhile."""

import asyncio
import contextlib
import socket
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from amqtt.contexts import BrokerConfig, ListenerConfig, ListenerType

from fleet.protocol import bounds, wire
from fleet.protocol.messages import Ack, Report
from fleet.protocol.topics import Down, Topic, Up, device_subscriptions
from fleet.server.broker.allowance import MESSAGE_BYTES, Allowance, Waiting
from fleet.server.broker.embedded import _UNSENT_MAX, Connect, FilteringBroker, _Reader
from fleet.server.config import Address
from tests.eventually import eventually_async

LIMITS = "[limits]\nbroker_client_bytes = 1048576\nbroker_memory_bytes = 67108864\n"
SPARE_MIB = 24
"""Growth that is none of the messages: packets on their way, the allocator."""

SUBACK, UNSUBACK, PINGRESP = 0x90, 0xB0, 0xD0
PING = b"\xc0\0"


def memory_mib(fleet):
    """Return what the broker holds in memory now."""
    status = Path(f"/proc/{fleet.server.broker_pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


def packet(kind, body):
    head, length = bytes([kind]), len(body)
    while True:
        length, low = divmod(length, 128)
        head += bytes([low | (0x80 if length else 0)])
        if not length:
            return head + body


def text(value):
    return len(value).to_bytes(2, "big") + value.encode()


@contextlib.asynccontextmanager
async def joined(device, *, clean=True, narrow=False):
    """Connect and subscribe as a device does; yield reader and writer.

    Of a `narrow` connection the kernel's buffers are small at both ends, so that what nobody reads fills them soon.
    """
    where = Address.parse(device.enrolled.mqtt[0].removeprefix("mqtts://"), "the broker")
    family, kind, _, _, address = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind)
    sock.setblocking(False)
    if narrow:  # before it connects: the broker's end grows with the window and the segments that are agreed on then
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    await asyncio.get_running_loop().sock_connect(sock, address)
    reader, writer = await asyncio.open_connection(sock=sock, ssl=device.context(), server_hostname=where.host)
    writer.write(packet(0x10, text("MQTT") + b"\x04" + (b"\x02" if clean else b"\x00") + b"\0\0" + text(device.id)))
    assert (await reader.readexactly(4))[3] == 0
    topics = device_subscriptions(device.id)
    writer.write(packet(0x82, b"\0\1" + b"".join(text(topic) + b"\1" for topic in topics)))
    answer = await reader.readexactly(4 + len(topics))
    assert answer[0] == 0x90
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def deaf(device, *, clean=True, narrow=False):
    """Connect and subscribe as a device does, and read nothing from then on; yield the writer."""
    async with joined(device, clean=clean, narrow=narrow) as (_, writer):
        writer.transport.pause_reading()
        yield writer


async def answers(reader, last):
    """Yield the kinds of packets that the broker sends, up to one of a kind or the end of the connection."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            kind = (await reader.readexactly(1))[0] & 0xF0
            yield kind
            if kind == last:
                return
            length = shift = 0
            while True:
                byte = (await reader.readexactly(1))[0]
                length |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            await reader.readexactly(length)


async def flood(fleet, device, witness, mib):
    """Publish to a device, and wait until the broker has handled all of it."""
    for _ in range(4 * mib):
        assert fleet.server._bus.publish(str(Topic(device.id, Down.COMMAND)), b"x" * 255 * bounds.KIB, retain=False)
    end = witness.acked + 1_000_000
    fleet.server._bus.publish(str(Topic(witness.id, Down.ACK)), wire.encode(Ack(sequence=end)), retain=False)
    await witness.until(lambda device: device.acked == end)


async def is_served(fleet, witness, sequence):
    """Have a report of a device taken."""
    now = datetime.now(UTC)
    witness.publish(Up.REPORT, Report(device=witness.id, boot_id="boot", sequence=sequence, at=now, assignment=0))
    reports = fleet.server._store.delivery.reports
    await eventually_async(lambda: bool(reports(witness.id, 1)), "the witness's report is taken")


@pytest.mark.asyncio
@pytest.mark.timeout(300)
async def test_messages_for_a_device_that_reads_nothing_are_bounded(new_fleet, broker):
    async with new_fleet(broker, settings=LIMITS) as fleet:
        device, witness = await fleet.enrol("deaf"), await fleet.device("witness")
        async with deaf(device):
            await flood(fleet, device, witness, 8)
            memory = memory_mib(fleet)
            await flood(fleet, device, witness, 80)
            assert memory_mib(fleet) <= memory + SPARE_MIB
            await is_served(fleet, witness, 1)


@pytest.mark.asyncio
@pytest.mark.timeout(300)
async def test_messages_for_a_device_that_is_away_are_bounded(new_fleet, broker):
    async with new_fleet(broker, settings=LIMITS) as fleet:
        device, witness = await fleet.enrol("away"), await fleet.device("witness")
        async with deaf(device, clean=False):
            pass
        await flood(fleet, device, witness, 8)
        memory = memory_mib(fleet)
        await flood(fleet, device, witness, 80)
        assert memory_mib(fleet) <= memory + SPARE_MIB
        await is_served(fleet, witness, 1)


@pytest.mark.asyncio
@pytest.mark.timeout(300)
async def test_messages_for_devices_that_are_away_give_way_to_those_for_present_ones(new_fleet):
    settings = "[limits]\nbroker_client_bytes = 67108864\nbroker_memory_bytes = 67108864\n"
    async with new_fleet("embedded", settings=settings) as fleet:
        device, witness = await fleet.enrol("away"), await fleet.device("witness")
        async with deaf(device, clean=False):
            pass
        memory = memory_mib(fleet)
        await flood(fleet, device, witness, 96)  # more than the broker may keep in all; the witness is served after it
        await is_served(fleet, witness, 1)
        await witness.until(lambda device: device.acked)
        assert memory_mib(fleet) <= memory + 64 + SPARE_MIB


@pytest.mark.asyncio
@pytest.mark.timeout(300)
async def test_a_device_that_asks_and_reads_no_answer_is_closed(new_fleet):
    async with new_fleet("embedded", settings=LIMITS) as fleet:
        device, witness = await fleet.enrol("deaf"), await fleet.device("witness")
        memory = memory_mib(fleet)

        async def ask(writer):
            while memory_mib(fleet) <= memory + SPARE_MIB:
                writer.write(PING * 1000)
                await writer.drain()

        async with deaf(device, narrow=True) as writer:
            with pytest.raises(ConnectionError):  # not before its answers fill every buffer on their way
                await ask(writer)
            assert memory_mib(fleet) <= memory + SPARE_MIB
            await is_served(fleet, witness, 1)


@pytest.mark.asyncio
async def test_a_packet_larger_than_any_message_is_not_read(new_fleet):
    async with new_fleet("embedded", settings=LIMITS) as fleet:
        device, witness = await fleet.enrol("large"), await fleet.device("witness")
        memory = memory_mib(fleet)
        async with deaf(device) as writer:
            with contextlib.suppress(ConnectionError):
                writer.write(packet(0x30, b"")[:1] + b"\xff\xff\xff\x7f" + text(str(Topic(device.id, Up.STATE))))
                for _ in range(100):
                    writer.write(b"x" * bounds.MIB)
                    await writer.drain()
            assert memory_mib(fleet) <= memory + SPARE_MIB
            await is_served(fleet, witness, 1)


@pytest.mark.asyncio
@pytest.mark.parametrize(("kind", "answer", "each"), [(0x82, SUBACK, b"\0\0\1"), (0xA2, UNSUBACK, b"\0\1x")])
async def test_more_topics_than_any_device_has_are_refused_by_the_length_of_their_packet(new_fleet, kind, answer, each):
    async with new_fleet("embedded", settings=LIMITS) as fleet:
        device, witness = await fleet.enrol("many"), await fleet.device("witness")
        async with joined(device) as (reader, writer):
            with contextlib.suppress(ConnectionError):
                writer.write(packet(kind, b"\0\2" + each * 5_000))
                await writer.drain()
            assert answer not in [kind async for kind in answers(reader, answer)]
        await is_served(fleet, witness, 1)


@pytest.mark.asyncio
async def test_a_packet_whose_payload_ends_before_its_topic_is_refused(new_fleet):
    async with new_fleet("embedded", settings=LIMITS) as fleet:
        device, witness = await fleet.enrol("short"), await fleet.device("witness")
        async with joined(device) as (reader, writer):
            topic = text(str(Topic(device.id, Up.STATE)))
            writer.write(bytes([0x30, len(topic) - 1]) + topic + PING)
            assert PINGRESP not in [kind async for kind in answers(reader, PINGRESP)]
        await is_served(fleet, witness, 1)


@pytest.mark.asyncio
@pytest.mark.parametrize("clean", [True, False])
async def test_a_device_that_does_not_release_its_messages_is_closed_and_may_come_back(new_fleet, clean):
    async with new_fleet("embedded", settings=LIMITS) as fleet:
        device = await fleet.enrol("holder")
        topic = text(str(Topic(device.id, Up.STATE)))
        async with joined(device, clean=clean) as (reader, writer):
            with contextlib.suppress(ConnectionError):
                for number in range(1, 201):
                    writer.write(packet(0x34, topic + number.to_bytes(2, "big") + b"x" * 4096))
                    await writer.drain()
                writer.write(PING)
            assert PINGRESP not in [kind async for kind in answers(reader, PINGRESP)]
        async with joined(device, clean=clean) as (reader, writer):
            writer.write(PING)
            assert PINGRESP in [kind async for kind in answers(reader, PINGRESP)]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("kind", "answer", "each", "count"), [(0x82, SUBACK, b"\0\1x\1", 3), (0xA2, UNSUBACK, b"\0\1x", 2)]
)
async def test_a_device_is_not_read_while_its_subscriptions_wait(new_fleet, kind, answer, each, count):
    async with new_fleet("embedded", settings=LIMITS) as fleet:
        device = await fleet.enrol("eager")
        assert fleet.server._bus.publish(str(Topic(device.id, Down.COMMAND)), b"x", retain=True)
        async with joined(device) as (reader, writer):
            # everything after the first waits until the message that is retained is acknowledged, or given up
            first = packet(0x82, b"\0\2" + text(device_subscriptions(device.id)[0]) + b"\1")
            writer.write(first + packet(kind, b"\0\3" + each))
            writer.write(packet(kind, b"\0\4" + each * 64) + packet(kind, b"\0\5" + each * 64) + PING)
            # the newest is being handled when the ping is read, and may be answered before or after it
            assert [kind async for kind in answers(reader, PINGRESP)].count(answer) in {count, count + 1}


@pytest.mark.asyncio
async def test_what_was_sent_is_let_go_although_the_first_message_still_waits():
    config = BrokerConfig(listeners={"default": ListenerConfig(type=ListenerType.EXTERNAL)}, plugins={})
    broker = FilteringBroker(config, Allowance(client_bytes=1, client_messages=1, total_bytes=1))
    waits = asyncio.create_task(asyncio.Event().wait())
    sent = [asyncio.create_task(asyncio.sleep(0)) for _ in range(2000)]
    await asyncio.wait(sent)
    tasks = deque([waits, *sent])
    await broker._broadcast_message(None, "a/topic", b"")
    await broker._run_broadcast(tasks)  # amqtt's own loop over it ends with the broker alone
    assert list(tasks) == [waits]
    waits.cancel()


def a_broker():
    config = BrokerConfig(listeners={"default": ListenerConfig(type=ListenerType.EXTERNAL)}, plugins={})
    largest = bounds.DESIRED_MAX_BYTES + MESSAGE_BYTES
    return FilteringBroker(config, Allowance(client_bytes=largest, client_messages=9, total_bytes=9 * largest))


async def others_run():
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_no_client_is_read_while_too_many_messages_wait_to_be_distributed():
    broker = a_broker()
    for _ in range(_UNSENT_MAX - 1):
        broker._broadcast_queue.put_nowait({})
    await broker.may_read("a")
    broker._broadcast_queue.put_nowait({})
    reading = asyncio.create_task(broker.may_read("a"))
    await others_run()
    assert not reading.done()
    broker._broadcast_queue.get_nowait()
    await reading


@pytest.mark.asyncio
async def test_a_client_that_does_not_take_its_answers_is_not_read():
    taken, stream = asyncio.Event(), asyncio.StreamReader()
    writer = SimpleNamespace(drain=taken.wait, abort=lambda: None)
    reader = _Reader(Connect("a", "", b"first"), stream, writer, a_broker())
    assert await reader.read(5) == b"first"
    stream.feed_data(PING)
    reading = asyncio.create_task(reader.read(1))
    await others_run()
    assert not reading.done()
    taken.set()
    assert await reading == PING[:1]


def test_clients_may_add_nothing_when_the_largest_message_would_find_no_room():
    largest = bounds.DESIRED_MAX_BYTES + MESSAGE_BYTES
    waiting = Waiting(Allowance(client_bytes=10 * largest, client_messages=10, total_bytes=2 * largest))
    assert waiting.take("a", bounds.DESIRED_MAX_BYTES)
    assert not waiting.full
    assert waiting.take("a", 0)
    assert waiting.full
    assert not waiting.take("b", bounds.DESIRED_MAX_BYTES)


def test_what_is_kept_for_clients_that_are_away_holds_up_nobody():
    largest = bounds.DESIRED_MAX_BYTES + MESSAGE_BYTES
    waiting = Waiting(Allowance(client_bytes=10 * largest, client_messages=10, total_bytes=2 * largest))
    assert all(waiting.take("a", bounds.DESIRED_MAX_BYTES, away=True) for _ in range(2))
    assert not waiting.full
    waiting.give("a", bounds.DESIRED_MAX_BYTES, away=True)
    assert waiting.take("b", bounds.DESIRED_MAX_BYTES)
    assert not waiting.full
    assert waiting.total == 2 * waiting.away == 2 * largest


def test_a_message_finds_no_room_for_what_is_kept_only_when_that_would_make_some():
    waiting = Waiting(Allowance(client_bytes=9 * MESSAGE_BYTES, client_messages=9, total_bytes=3 * MESSAGE_BYTES))
    assert waiting.take("away", 0, away=True)
    assert waiting.take("here", 0)
    assert not waiting.lacks_room(0)
    assert waiting.lacks_room(1)
    assert not waiting.lacks_room(MESSAGE_BYTES + 1), "it would be dropped anyway"
    waiting.give("away", 0, away=True)
    assert not waiting.lacks_room(2 * MESSAGE_BYTES)


def test_what_waits_is_counted_by_client_and_in_all():
    waiting = Waiting(Allowance(client_bytes=3 * MESSAGE_BYTES, client_messages=2, total_bytes=4 * MESSAGE_BYTES))
    assert not waiting.take("a", 2 * MESSAGE_BYTES + 1)
    assert [waiting.take("a", 0) for _ in range(3)] == [True, True, False]
    assert [waiting.take("b", 0) for _ in range(2)] == [True, True]
    assert waiting.full
    assert not waiting.take("c", 0)
    waiting.give("a", 0)
    assert waiting.take("c", 0)
    for client in ("a", "b", "b", "c"):
        waiting.give(client, 0)
    assert waiting.total == 0
