"""Conversation over HTTPS, against a real server: a device without MQTT says and hears the same as with it."""

import asyncio
import contextlib
from datetime import UTC, datetime

import pytest

from fleet.protocol import bounds, operator_api, wire
from fleet.protocol.assignment import Assignment, CheckIn
from fleet.protocol.messages import Ack, Exchange, ExchangeReply, Hello, Packet, Report, State
from fleet.protocol.operator_api import Refusal
from fleet.protocol.topics import Down, Topic, Up
from fleet.server.exchange import NEXT_S, SILENCE_S, Exchanges
from signing import dsse

DEVICE = "crane-0a1b2c3d"


class Server:
    """Exchanges with a clock of their own; what devices say is recorded."""

    def __init__(self, most_held=10):
        self.now, self.taken = 0.0, []
        self.exchanges = Exchanges(
            take=lambda topic, payload: self.taken.append((topic, payload)),
            clock=lambda: self.now,
            most_held=most_held,
        )

    async def opened(self, device=DEVICE):
        return (await self.exchanges.answer(device, Exchange())).session

    def say(self, channel, payload, device=DEVICE):
        return self.exchanges.put(Topic(device, channel), payload)

    async def listen(self, session, **more):
        return await self.exchanges.answer(DEVICE, Exchange(session=session, **more))


def state(*, online):
    return wire.encode(State(device=DEVICE, online=online))


@pytest.mark.asyncio
async def test_a_message_is_kept_until_it_is_received():
    server = Server()
    assert not server.say(Down.COMMAND, b"early"), "nobody talks over HTTPS"
    session = await server.opened()
    assert server.say(Down.COMMAND, b"one")
    for _ in range(2):  # the first reply was lost
        (packet,) = (await server.listen(session)).down
        assert (packet.channel, packet.payload) == ("command", "one")
    assert (await server.listen(session, received=packet.number)).down == ()


@pytest.mark.asyncio
async def test_of_assignments_and_acknowledgements_the_newest_is_kept():
    server = Server()
    session = await server.opened()
    for number in range(3):
        for channel in (Down.DESIRED, Down.ACK, Down.FRESH, Down.COMMAND):
            server.say(channel, b"%d" % number)
    down = (await server.listen(session)).down
    assert sorted((each.channel, each.payload) for each in down) == [
        ("ack", "2"),
        ("command", "0"),
        ("command", "1"),
        ("command", "2"),
        ("desired", "2"),
        ("fresh", "2"),
    ]


@pytest.mark.asyncio
async def test_messages_are_bounded_in_number_and_a_reply_in_size():
    server = Server()
    session = await server.opened()
    for number in range(3 * bounds.EXCHANGE_MESSAGES_MAX):
        server.say(Down.COMMAND, b"%d" % number)
    down = (await server.listen(session)).down
    assert len(down) == bounds.EXCHANGE_MESSAGES_MAX
    assert down[-1].payload == str(3 * bounds.EXCHANGE_MESSAGES_MAX - 1)
    last = down[-1].number
    for _ in range(5):
        server.say(Down.COMMAND, b"x" * 200_000)
    received, seen = last, 0
    while down := (await server.listen(session, received=received)).down:
        assert sum(len(each.payload) for each in down) <= bounds.EXCHANGE_MAX_BYTES
        received, seen = down[-1].number, seen + len(down)
    assert seen == 5


@pytest.mark.asyncio
async def test_a_request_is_held_until_there_is_a_message():
    server = Server()
    session = await server.opened()
    asking = asyncio.ensure_future(server.listen(session, wait_s=bounds.EXCHANGE_WAIT_MAX_S))
    await asyncio.sleep(0)
    assert not asking.done()
    server.say(Down.COMMAND, b"now")
    assert [each.payload for each in (await asking).down] == ["now"]


@pytest.mark.asyncio
async def test_a_newer_request_ends_an_older_one_that_waits():
    server = Server()
    session = await server.opened()
    older = asyncio.ensure_future(server.listen(session, wait_s=50))
    await asyncio.sleep(0)
    newer = asyncio.ensure_future(server.listen(session, wait_s=50))
    assert (await older).down == ()
    server.say(Down.COMMAND, b"now")
    assert len((await newer).down) == 1


@pytest.mark.asyncio
async def test_requests_beyond_the_bound_are_not_held_but_put_off():
    server = Server(most_held=1)
    first, second = await server.opened(), await server.opened("b-01234567")
    held = asyncio.ensure_future(server.listen(first, wait_s=50))
    await asyncio.sleep(0)
    reply = await server.exchanges.answer("b-01234567", Exchange(session=second, wait_s=50))
    assert reply.next_s == NEXT_S
    server.now = 2 * NEXT_S  # devices spread over twice the time
    server.exchanges.end_silent()
    assert server.exchanges.has("b-01234567")
    server.exchanges.close()
    assert (await held).next_s == 0


@pytest.mark.asyncio
async def test_a_session_that_is_not_known_is_answered_at_once_with_another():
    server = Server()
    reply = await server.listen("from-before-a-restart", wait_s=50, received=7)
    assert reply.session != "from-before-a-restart"
    server.say(Down.COMMAND, b"one")
    assert [each.number for each in (await server.listen(reply.session)).down] == [1]


@pytest.mark.asyncio
async def test_a_silent_device_goes_offline_once_and_not_before_its_time():
    server = Server()
    session = await server.opened()
    server.now = SILENCE_S
    server.exchanges.end_silent()
    await server.listen(session)
    server.now = 2 * SILENCE_S + 1
    server.exchanges.end_silent()
    server.exchanges.end_silent()
    assert server.taken == [(str(Topic(DEVICE, Up.STATE)), state(online=False))]
    assert not server.exchanges.has(DEVICE)


@pytest.mark.asyncio
async def test_the_will_of_an_earlier_connection_does_not_put_the_device_offline():
    server = Server()
    topic = str(Topic(DEVICE, Up.STATE))
    assert not server.exchanges.overrides(topic, state(online=False)), "it uses the broker"
    await server.opened()
    assert server.exchanges.overrides(topic, state(online=False))
    assert server.exchanges.has(DEVICE)
    assert not server.exchanges.overrides(topic, state(online=True)), "it is back at the broker"
    assert not server.exchanges.has(DEVICE)


@pytest.mark.asyncio
async def test_a_goodbye_ends_the_session_and_what_came_with_it_is_taken():
    server = Server()
    session = await server.opened()
    packet = Packet(channel=Up.STATE, payload=state(online=False).decode())
    await server.listen(session, up=(packet,), ends=True)
    assert server.taken == [(str(Topic(DEVICE, Up.STATE)), state(online=False))]
    assert not server.exchanges.has(DEVICE)


@pytest.mark.parametrize("channel", ["desired", "../hello", "", "x" * 200])
@pytest.mark.asyncio
async def test_a_channel_that_is_no_devices_is_refused_and_nothing_is_taken(channel):
    server = Server()
    good = Packet(channel=Up.STATE, payload="{}")
    with pytest.raises(Refusal):
        await server.exchanges.answer(DEVICE, Exchange(up=(good, Packet(channel=channel, payload="{}"))))
    assert server.taken == []


# A whole server


async def post(device, said):
    def send():
        with device.http() as http:
            return http.post("/v1/exchange", content=wire.encode(said))

    return await asyncio.to_thread(send)


async def exchange(device, **said):
    reply = await post(device, Exchange(**said))
    assert reply.is_success, reply.text
    return wire.decode(ExchangeReply, reply.content)


@contextlib.asynccontextmanager
async def silent_device(fleet):
    """Yield a device that has no connection to the broker."""
    device = await fleet.device("a")
    await device.disconnect()
    yield device


@pytest.mark.asyncio
async def test_a_device_without_mqtt_is_heard_answered_and_commanded(new_fleet):
    async with new_fleet() as fleet, silent_device(fleet) as device:
        target = await fleet.operator.publish("1.0.0")
        hello = Hello(device=device.id, nonce="0" * 32, boot_id="boot")
        online = State(device=device.id, online=True, boot_id="boot")
        up = (
            Packet(channel=Up.STATE, payload=wire.encode(online).decode()),
            Packet(channel=Up.HELLO, payload=wire.encode(hello).decode()),
        )
        session = (await exchange(device, up=up)).session
        await fleet.operator.deploy(target)
        received, found = 0, {}
        while Down.DESIRED not in found:
            reply = await exchange(device, session=session, received=received, wait_s=50)
            found |= {each.channel: each.payload for each in reply.down}
            received = max([received, *(each.number for each in reply.down)])
        assignment = wire.decode(Assignment, dsse.parse(found[Down.DESIRED].encode()).payload)
        assert [item.target for item in assignment.items] == [target]

        (row,) = (await fleet.operator.get(operator_api.Devices, "/v1/devices")).devices
        assert row.online

        report = Report(device=device.id, boot_id="boot", sequence=1, at=datetime.now(UTC), assignment=1)
        signed = device.signer.sign(wire.encode(report)).decode()
        await exchange(device, session=session, up=(Packet(channel=Up.REPORT, payload=signed),), received=received)
        fleet.server._director.command(device.id, CheckIn())
        while not {Down.ACK, Down.COMMAND} <= found.keys():
            reply = await exchange(device, session=session, received=received, wait_s=50)
            found |= {each.channel: each.payload for each in reply.down}
            received = max([received, *(each.number for each in reply.down)])
        assert wire.decode(Ack, found[Down.ACK].encode()).sequence == 1


@pytest.mark.parametrize("body", [b"", b"{", b'{"v": 1, "up": 3}', b'{"v": 99}', b'{"v": 1, "wait_s": -1}'])
@pytest.mark.asyncio
async def test_what_is_no_exchange_is_refused_with_a_problem(new_fleet, body):
    async with new_fleet() as fleet, silent_device(fleet) as device:

        def send():
            with device.http() as http:
                return http.post("/v1/exchange", content=body)

        reply = await asyncio.to_thread(send)
        assert reply.status_code == 400
        assert reply.json()["type"] == "bad-request"


@pytest.mark.asyncio
async def test_a_suspended_device_still_receives_and_its_messages_are_not_read(new_fleet):
    async with new_fleet() as fleet, silent_device(fleet) as device:
        session = (await exchange(device)).session
        fleet.server._budget.suspended.add(device.id)
        for up in (Packet(channel=Up.REPORT, payload="x" * 100_000), Packet(channel="none", payload="x" * 10_000)):
            reply = await post(device, Exchange(session=session, up=(up,)))
            assert (reply.status_code, reply.json()["type"], reply.headers["retry-after"]) == (429, "suspended", "60")
        fleet.server._director.command(device.id, CheckIn())
        down = (await exchange(device, session=session, wait_s=50)).down
        assert [each.channel for each in down] == [Down.COMMAND]


@pytest.mark.asyncio
async def test_a_device_cannot_speak_for_another_over_https(new_fleet):
    async with new_fleet() as fleet, silent_device(fleet) as device:
        foreign = wire.encode(State(device="other-01234567", online=True)).decode()
        await exchange(device, up=(Packet(channel=Up.STATE, payload=foreign),))
        assert fleet.server._ingest.counts["foreign"] == 1
