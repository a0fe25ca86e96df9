"""Readings that devices bring: stored once, in order, within bounds, and shown to operators."""

import asyncio
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from msgspec.structs import replace

from fleet.protocol import bounds, operator_api, wire
from fleet.protocol.codes import AlertKind
from fleet.protocol.messages import Hello, Reading, Readings, ReadingsAck
from fleet.protocol.topics import Topic, Up
from tests.eventually import eventually_async

NOW = datetime(2025, 6, 1, tzinfo=UTC)


def readings(device, *positions, epoch="e", instance="meter", topic="plant/a", size=2):
    return Readings(
        device=device.id,
        epoch=epoch,
        readings=tuple(
            Reading(
                position=each, instance=instance, sequence=each, at=NOW, topic=topic, data=b"%02d" % each * (size // 2)
            )
            for each in positions
        ),
    )


def bring(fleet, device, batch):
    fleet.server._ingest.on_message(str(Topic(device.id, Up.READINGS)), wire.encode(batch))
    fleet.server._ingest.flush()


async def listed(fleet, **query):
    return await fleet.operator.get(operator_api.Messages, "/v1/messages", **query)


def numbers(found):
    return [(each.device.partition("-")[0], each.sequence) for each in found.messages]


@pytest.fixture
def acks(monkeypatch):
    """What each device was told of its readings."""
    told = []
    from fleet.server.director import Director

    plain = Director.acknowledge_readings

    def note(self, device, ack):
        told.append((device, ack))
        return plain(self, device, ack)

    monkeypatch.setattr(Director, "acknowledge_readings", note)
    return told


@pytest.mark.asyncio
async def test_readings_are_stored_once_and_acknowledged_when_they_are(new_fleet, acks):
    async with new_fleet() as fleet:
        meter = await fleet.device("meter")
        bring(fleet, meter, readings(meter, 1, 2, 3))
        bring(fleet, meter, readings(meter, 1, 2, 3))  # the acknowledgement was lost
        bring(fleet, meter, readings(meter, 3, 4))
        assert acks == [(meter.id, ReadingsAck(epoch="e", position=each)) for each in (3, 3, 4)]
        assert numbers(await listed(fleet)) == [("meter", each) for each in (1, 2, 3, 4)]
        # after the device has lost what it kept, it begins anew
        bring(fleet, meter, readings(meter, 1, epoch="f"))
        assert acks[-1] == (meter.id, ReadingsAck(epoch="f", position=1))
        assert [(each.epoch, each.sequence) for each in (await listed(fleet)).messages][-1] == ("f", 1)


@pytest.mark.asyncio
async def test_they_come_through_the_broker_and_a_hello_is_told_how_far_they_are(new_fleet, acks):
    async with new_fleet() as fleet:
        meter = await fleet.device("meter")
        meter.publish(Up.READINGS, readings(meter, 1, 2))
        await eventually_async(lambda: acks == [(meter.id, ReadingsAck(epoch="e", position=2))], "an acknowledgement")
        meter.publish(Up.HELLO, Hello(device=meter.id, nonce="1" * 16, boot_id="b", readings="e"))
        await eventually_async(lambda: len(acks) == 2, "how far they are")
        assert acks[1] == acks[0]
        meter.publish(Up.HELLO, Hello(device=meter.id, nonce="2" * 16, boot_id="b"))  # an agent without readings
        meter.publish(Up.READINGS, readings(meter, 3))
        await eventually_async(lambda: len(acks) == 3, "another acknowledgement")
        assert acks[2][1].position == 3


@pytest.mark.asyncio
async def test_operators_choose_by_group_device_instance_topic_and_time(new_fleet):
    async with new_fleet() as fleet:
        a, b = await fleet.device("a"), await fleet.device("b", group="other")
        bring(fleet, a, readings(a, 1, topic="plant/x/t"))
        bring(fleet, b, readings(b, 1, 2, topic="plant/y/t"))
        bring(fleet, a, readings(a, 2, instance="pump", topic="plant/x/p"))
        assert numbers(await listed(fleet)) == [("a", 1), ("b", 1), ("b", 2), ("a", 2)]
        assert numbers(await listed(fleet, group="other")) == [("b", 1), ("b", 2)]
        assert numbers(await listed(fleet, device=a.id)) == [("a", 1), ("a", 2)]
        assert numbers(await listed(fleet, instance="pump")) == [("a", 2)]
        assert numbers(await listed(fleet, topic="plant/+/t")) == [("a", 1), ("b", 1), ("b", 2)]
        assert numbers(await listed(fleet, topic="plant/x/#", after=0, limit=1)) == [("a", 1)]
        assert numbers(await listed(fleet, limit=1)) == [("a", 2)]
        later = int(datetime.now(UTC).timestamp()) + 3600
        assert numbers(await listed(fleet, since=later)) == []
        for query, word in (("group=none", "group"), ("topic=a%2F%23%2Fb", "filter"), ("after=-1", "after")):
            found = await fleet.operator.problem("GET", f"/v1/messages?{query}")
            assert word in found.title


@pytest.mark.asyncio
async def test_a_follower_is_woken_by_the_next_message(new_fleet):
    async with new_fleet() as fleet:
        meter = await fleet.device("meter")
        bring(fleet, meter, readings(meter, 1))
        first = await listed(fleet)
        waiting = asyncio.create_task(listed(fleet, after=first.next, wait=20))
        await eventually_async(lambda: len(fleet.server._changes._event._waiters) > 0, "the follower waits")
        bring(fleet, meter, readings(meter, 2))
        found = await waiting
        assert numbers(found) == [("meter", 2)]
        assert numbers(await listed(fleet, after=found.next)) == []


@pytest.mark.asyncio
async def test_what_is_kept_has_bounds_and_no_device_pushes_out_another(new_fleet):
    async with new_fleet() as fleet:
        loud, quiet = await fleet.device("loud"), await fleet.device("quiet")
        store = fleet.server._store.readings
        bring(fleet, quiet, readings(quiet, 1))
        for first in range(1, 2001, 250):
            bring(fleet, loud, readings(loud, *range(first, first + 250), size=20))
        for _ in store.trimming(device_bytes=200_000, all_bytes=1 << 30):
            pass
        found = [each for each in (await listed(fleet, limit=1000)).messages if each.device == loud.id]
        assert [each.sequence for each in found][-1] == 2000
        assert sum(256 + 2 + len(each.data) for each in found) <= 200_000
        assert numbers(await listed(fleet, device=quiet.id)) == [("quiet", 1)]
        for _ in store.trimming(device_bytes=1 << 30, all_bytes=300):
            pass
        assert numbers(await listed(fleet)) == [("quiet", 1)]
        far = (datetime.now(UTC) + timedelta(days=1)).timestamp()
        assert sum(store.forgetting(before=far)) == 1
        assert store.position(loud.id, "e") == 2000, "no reading comes again because it was deleted"


@pytest.mark.asyncio
async def test_words_beside_the_content_count_as_kept(new_fleet):
    async with new_fleet() as fleet:
        wordy = await fleet.device("wordy")
        words = {"content_type": chr(0x1F600) * 128, "metadata": ((chr(0x20AC) * 600, ""),)}
        for number in range(1, 51):
            batch = readings(wordy, number, topic="t" * 256)
            bring(fleet, wordy, replace(batch, readings=(replace(batch.readings[0], **words),)))
        for _ in fleet.server._store.readings.trimming(device_bytes=50_000, all_bytes=1 << 30):
            pass
        assert len((await listed(fleet)).messages) * (256 + 4 * 128 + 3 * 600) <= 50_000


@pytest.mark.asyncio
async def test_an_answer_has_a_bound_whatever_stands_beside_the_content(new_fleet):
    async with new_fleet() as fleet:
        wordy = await fleet.device("wordy")
        words = tuple(("\u0001" * 320, "\u0001" * 320) for _ in range(bounds.MESSAGE_METADATA_MAX))
        for number in range(1, 101):
            batch = readings(wordy, number)
            bring(fleet, wordy, replace(batch, readings=(replace(batch.readings[0], metadata=words),)))
        found = await listed(fleet, limit=1000, after=0)
        assert (found.more, len(msgspec.json.encode(found)) < 4_500_000) == (True, True)
        assert numbers(found) == [("wordy", each) for each in range(1, len(found.messages) + 1)]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "at", ["9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59-05:00", "0001-01-01T00:00:00+05:00"]
)
async def test_a_time_that_no_calendar_has_hides_no_other_message(new_fleet, at):
    async with new_fleet() as fleet:
        bad, good = await fleet.device("bad"), await fleet.device("good")
        batch = wire.encode(readings(bad, 1)).replace(b"2025-06-01T00:00:00Z", at.encode())
        fleet.server._ingest.on_message(str(Topic(bad.id, Up.READINGS)), batch)
        bring(fleet, good, readings(good, 1))
        assert numbers(await listed(fleet)) == [("bad", 1), ("good", 1)]


@pytest.mark.asyncio
async def test_a_device_that_floods_is_dropped_unread_and_others_are_heard(new_fleet, acks):
    async with new_fleet(settings="[limits]\ndevice_readings_burst_bytes = 1048576\n") as fleet:
        loud, quiet = await fleet.device("loud"), await fleet.device("quiet")
        for number in range(1, 41):
            bring(fleet, loud, readings(loud, *range(3 * number, 3 * number + 3), size=14_000))
        taken = [ack.position for device, ack in acks if device == loud.id]
        assert 10 < len(taken) < 30
        assert fleet.server._ingest.counts["throttled"] == 40 - len(taken)
        detail = await fleet.operator.get(operator_api.DeviceDetail, f"/v1/devices/{loud.id}")
        assert {alert.kind for alert in detail.alerts} == {AlertKind.THROTTLED}
        bring(fleet, quiet, readings(quiet, 1))
        assert acks[-1] == (quiet.id, ReadingsAck(epoch="e", position=1))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "spoil",
    [
        lambda batch: batch.replace(b'"topic":"plant/a"', b'"topic":"' + b"x" * 300 + b'"'),
        lambda batch: batch.replace(b'"data":"MDE="', b'"data":"' + b"A" * 30_000 + b'"'),
        lambda batch: batch.replace(b'"position":1', b'"position":-1'),
        lambda batch: batch.replace(b'"sequence":1', b'"sequence":' + b"9" * 30),
        lambda batch: batch.replace(b'"at":"2025', b'"at":"x'),
        lambda batch: batch + b" " * 70_000,
    ],
)
async def test_what_is_no_reading_is_dropped_alone(new_fleet, acks, spoil):
    async with new_fleet() as fleet:
        bad, good = await fleet.device("bad"), await fleet.device("good")
        batch = spoil(wire.encode(readings(bad, 1)))
        fleet.server._ingest.on_message(str(Topic(bad.id, Up.READINGS)), batch)
        foreign = wire.encode(readings(good, 7))
        fleet.server._ingest.on_message(str(Topic(bad.id, Up.READINGS)), foreign)
        bring(fleet, good, readings(good, 1))
        assert acks == [(good.id, ReadingsAck(epoch="e", position=1))]
        assert fleet.server._ingest.bad[bad.id] == 2
