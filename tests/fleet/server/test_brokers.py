"""The two brokers as they are set up: a device speaks for itself alone, and only while it belongs to the fleet."""

import asyncio
import socket
import ssl
import sys
from dataclasses import replace
from datetime import UTC, datetime

import msgspec
import paho.mqtt.client as mqtt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion

from fleet.ca import SERVER_CN
from fleet.protocol import operator_api, wire
from fleet.protocol.messages import Health, Report
from fleet.protocol.topics import POKE, BadTopicError, Down, Topic, Up
from fleet.server.broker import broker, embedded
from fleet.server.broker.embedded import RefusedError
from fleet.server.config import Address, ServerConfig, ServerPaths
from fleet.server.service import ServeError, Server
from signing.errors import SigningError


async def knock(device, *, client_id, context=None, will=None):
    """Try to connect; the CONNACK's code, or None when the connection was just ended."""
    loop, answer = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def say(code):
        loop.call_soon_threadsafe(lambda: answer.done() or answer.set_result(code))

    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=client_id, reconnect_on_failure=False)
    client.tls_set_context(context or device.context())
    if will:
        client.will_set(will, b"x", retain=True)
    client.on_connect = lambda _c, _d, _f, reason, _p: say(reason.value)
    client.on_disconnect = lambda *_: say(None)
    host, _, port = device.enrolled.mqtt[0].removeprefix("mqtts://").rpartition(":")
    try:
        await asyncio.to_thread(client.connect, host, int(port), 30)
    except (OSError, ssl.SSLError):
        return None
    client.loop_start()
    try:
        return await asyncio.wait_for(answer, 60)
    finally:
        client.disconnect()
        await asyncio.to_thread(client.loop_stop)


@pytest.mark.asyncio
async def test_nobody_comes_in_without_a_certificate(new_fleet, broker):
    async with new_fleet(broker) as fleet:
        device = await fleet.enrol("a")
        assert await knock(device, client_id=device.id) == 0
        bare = ssl.create_default_context(cafile=str(device._files[1]))
        assert await knock(device, client_id=device.id, context=bare) is None


@pytest.mark.asyncio
async def test_a_device_cannot_take_another_devices_place_or_leave_a_will_for_it(new_fleet):
    async with new_fleet("embedded") as fleet:
        mine, other = await fleet.enrol("a"), await fleet.device("b")
        assert await knock(mine, client_id=other.id) is None
        assert await knock(mine, client_id=SERVER_CN) is None
        assert await knock(mine, client_id=mine.id, will=str(Topic(other.id, Up.STATE))) is None
        assert await knock(mine, client_id=mine.id, will=str(Topic(mine.id, Up.STATE))) == 0
        assert fleet.server._store.devices.get(other.id).online


@pytest.mark.skipif(broker.find() is None, reason="mosquitto is not installed")
@pytest.mark.asyncio
async def test_with_mosquitto_the_certificate_decides_the_client_id_whatever_is_asked(new_fleet):
    async with new_fleet("mosquitto") as fleet:
        mine, other = await fleet.enrol("a"), await fleet.device("b")
        # it is let in, as itself: the other one is not pushed off
        assert await knock(mine, client_id=other.id) == 0
        # one wave: `mine` is away, and a wave of it alone would wait for it
        view = await fleet.operator.deploy(await fleet.operator.publish("1.0.0"), waves="100%")
        await fleet.operator.decided(view)
        assert other.items


@pytest.mark.asyncio
async def test_a_device_neither_writes_nor_reads_another_devices_topics(new_fleet, broker):
    async with new_fleet(broker) as fleet:
        eve, victim = await fleet.device("eve", group="other"), await fleet.device("victim")
        heard = []
        loop = asyncio.get_running_loop()
        eve._client.on_message = lambda _c, _d, message: loop.call_soon_threadsafe(heard.append, message.topic)
        eve._client.subscribe([("#", 1), (str(Topic(victim.id, Down.DESIRED)), 1), (f"$share/x/{victim.id}/#", 1)])
        lie = Health(device=victim.id, boot_id="forged", at=datetime.now(UTC))
        eve.publish(Up.HEALTH, lie, device=victim.id)
        eve._client.publish(str(Topic(victim.id, Down.DESIRED)), b"forged", qos=1, retain=True)

        target = await fleet.operator.publish("1.0.0")
        await fleet.operator.decided(await fleet.operator.deploy(target))
        assert b"forged" not in victim.envelopes
        assert fleet.server._store.devices.get(victim.id).health is None
        assert not [topic for topic in heard if victim.id in topic]


@pytest.mark.asyncio
async def test_what_others_left_in_the_broker_is_not_given_to_a_device(new_fleet, broker):
    """Retained messages follow the rule of live ones: at the connect, and at a subscription."""

    async with new_fleet(broker) as fleet:
        victim = await fleet.device("victim")
        eve = await fleet.enrol("eve", group="other")
        heard = []
        hear = eve._received

        def listen(topic, payload):
            heard.append(topic)
            hear(topic, payload)

        eve._received = listen
        target = await fleet.operator.publish("1.0.0")
        await fleet.operator.decided(await fleet.operator.deploy(target))
        await eve.connect()
        everything = ["fleet/v1/+/+/up/+", "fleet/v1/+/+/down/+", "#", str(Topic(victim.id, Down.DESIRED))]
        eve._client.subscribe([(topic, 1) for topic in everything])
        await fleet.online(eve)
        await fleet.operator.decided(await fleet.operator.deploy(target, group="other"))
        await eve.until(lambda device: device.items)
        assert not [topic for topic in heard if victim.id in topic]


@pytest.mark.asyncio
async def test_a_device_leaves_nothing_in_the_broker_beyond_its_channels(new_fleet, broker):
    """Topics that nobody reads cannot fill the broker, in the device's own shard or another."""

    async with new_fleet(broker) as fleet:
        device, witness = await fleet.device("hostile"), await fleet.device("witness")
        own = str(Topic(device.id, Up.STATE)).removesuffix("state")
        for number in range(50):
            for topic in (f"{own}x{number}", f"{own}report/{number}", f"{own}state/", f"fleet/v1/{number}/x/up/state"):
                device._client.publish(topic, b"x" * 1000, qos=1, retain=True)
            device._client.publish(own.replace("/up/", f"{number}/up/") + "state", b"x", qos=1, retain=True)
            last = device._client.publish(f"fleet/v1/x{number}/{device.id}/up/state", b"x", qos=1, retain=True)
        await asyncio.to_thread(last.wait_for_publish, 60)
        witness.publish(
            Up.REPORT, Report(device=witness.id, boot_id="boot", sequence=1, at=datetime.now(UTC), assignment=0)
        )
        await witness.until(lambda device: device.acked == 1)
        kept = await retained(fleet)
        assert {topic for topic in kept if not _is_topic(topic)} == set()


def _is_topic(topic):
    try:
        return bool(Topic.parse(topic))
    except BadTopicError:
        return False


async def retained(fleet):
    """The topics that the broker keeps messages of, seen with the server's certificate in the server's place."""
    await fleet.server._bus.close()
    loop, seen, ended = asyncio.get_running_loop(), set(), asyncio.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=SERVER_CN, clean_session=True)
    context = ssl.create_default_context(cafile=str(fleet.home / "operator" / "ca.pem"))
    context.load_cert_chain(fleet.server._certificates.client)
    client.tls_set_context(context)

    def message(_client, _data, message):
        if message.topic == "fleet/v1/zz/end/down/ack":
            loop.call_soon_threadsafe(ended.set)
        elif message.retain:
            seen.add(message.topic)

    client.on_message = message
    client.on_connect = lambda client, *_: client.subscribe("fleet/v1/#", 1)
    client.on_subscribe = lambda client, *_: client.publish("fleet/v1/zz/end/down/ack", b"x", qos=1)
    address = fleet.server._broker.address
    await asyncio.to_thread(client.connect, address.host, address.port, 30)
    client.loop_start()
    try:
        await asyncio.wait_for(ended.wait(), 60)
    finally:
        client.disconnect()
        await asyncio.to_thread(client.loop_stop)
    return seen


@pytest.mark.asyncio
async def test_a_device_that_was_shut_out_can_neither_stay_nor_come_back(new_fleet, broker):
    async with new_fleet(broker) as fleet:
        device, witness = await fleet.device("a"), await fleet.device("b")
        await fleet.operator.send(operator_api.DeviceDetail, "POST", f"/v1/devices/{device.id}/revoke")
        # the broker has read it when another device's word, sent after it, has come through
        before = fleet.server._store.delivery.reports(device.id, 10)
        for sequence in (1, 2, 3):
            report = Report(device="", boot_id="boot", sequence=sequence, at=datetime.now(UTC), assignment=0)
            device.publish(Up.REPORT, msgspec.structs.replace(report, device=device.id))
            witness.publish(Up.REPORT, msgspec.structs.replace(report, device=witness.id))
        await witness.until(lambda device: device.acked == 3)
        assert fleet.server._store.delivery.reports(device.id, 10) == before
        if broker == "embedded":
            assert await knock(device, client_id=device.id) is None


@pytest.mark.asyncio
async def test_a_device_is_shut_out_although_its_last_command_cannot_be_signed(new_fleet, monkeypatch):
    async with new_fleet("embedded") as fleet:
        device = await fleet.device("a")

        def refuse(*_):
            raise SigningError("root names another key for the director")

        monkeypatch.setattr("fleet.server.director.director.sign_command", refuse)
        await fleet.operator.send(operator_api.DeviceDetail, "POST", f"/v1/devices/{device.id}/revoke")
        assert await knock(device, client_id=device.id) is None


@pytest.mark.asyncio
async def test_a_message_that_speaks_for_another_device_is_dropped_and_counted(new_fleet):
    async with new_fleet() as fleet:
        device, other = await fleet.device("a"), await fleet.device("b")
        ingest = fleet.server._ingest
        report = Report(device=other.id, boot_id="boot", sequence=1, at=datetime.now(UTC), assignment=1)
        ingest.on_message(str(Topic(device.id, Up.REPORT)), wire.encode(report))
        ingest.on_message(str(Topic(device.id, Up.REPORT)), b"not json")
        ingest.on_message(str(Topic(device.id, Up.HEALTH)), b"x" * 70_000)
        ingest.on_message("fleet/v1/zz/nobody/up/report", b"{}")
        ingest.on_message(str(Topic(device.id, Down.ACK)), b"{}")
        ingest.flush()
        assert (ingest.counts["foreign"], ingest.counts["malformed"]) == (1, 4)
        assert fleet.server._store.delivery.reports(other.id, 10) == []


# The gate before the embedded broker


def connect_packet(client_id, *, will=None, protocol=b"MQTT", level=4):
    def field(data):
        return len(data).to_bytes(2, "big") + data

    body = field(protocol) + bytes([level, 0x04 if will else 0, 0, 30]) + field(client_id.encode())
    if will:
        body += field(will.encode()) + field(b"gone")
    return b"\x10" + bytes([len(body)]) + body


async def read(data):
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return await embedded.read_connect(reader)


@pytest.mark.asyncio
async def test_the_gate_reads_who_comes_and_what_it_leaves_behind():
    connect = await read(connect_packet("a-00000001", will="fleet/v1/x") + b"more")
    assert (connect.client_id, connect.will_topic) == ("a-00000001", "fleet/v1/x")
    assert connect.packet == connect_packet("a-00000001", will="fleet/v1/x")


@pytest.mark.asyncio
@given(st.binary(max_size=64))
async def test_the_gate_refuses_anything_else_and_never_breaks(data):
    with pytest.raises((RefusedError, asyncio.IncompleteReadError)):
        await read(data if data[:1] != b"\x10" else b"\x10\x02" + data)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "packet", [connect_packet("a", protocol=b"MQIsdp", level=3), connect_packet("a", level=5), b"\x10\xff\xff\xff\x7f"]
)
async def test_the_gate_refuses_other_versions_and_sizes(packet):
    with pytest.raises(RefusedError):
        await read(packet)


def test_who_may_say_what():
    mine, other = "a-00000001", "b-00000002"
    rows = [
        (mine, Topic(mine, Up.REPORT), True, True),
        (mine, Topic(mine, Up.REPORT), False, False),
        (mine, Topic(mine, Down.DESIRED), False, True),
        (mine, Topic(mine, Down.DESIRED), True, False),
        (mine, Topic(other, Up.REPORT), True, False),
        (mine, Topic(other, Down.DESIRED), False, False),
        (mine, POKE, False, True),
        (mine, POKE, True, False),
        (mine, "#", False, False),
        (mine, "$share/x/#", False, False),
        (SERVER_CN, Topic(mine, Down.DESIRED), True, True),
        (SERVER_CN, "fleet/v1/+/+/up/+", False, True),
        (SERVER_CN, "$SYS/#", False, False),
    ]
    for client, topic, publish, allowed in rows:
        assert embedded.may(client, str(topic), publish=publish) is allowed, (client, topic, publish)


# What a server refuses to start with


async def refusal(home, **more):
    server = Server(home, **more)
    with pytest.raises(ServeError) as error:
        await server.start()
    return str(error.value)


@pytest.mark.asyncio
async def test_a_fleet_for_more_than_development_wants_a_real_broker(new_home, monkeypatch):
    assert "install mosquitto" in await refusal(new_home(broker="embedded", size="solo"))
    home = new_home(broker="embedded")
    config = ServerConfig.load(ServerPaths(home).config)
    ServerPaths(home).config.write_text(replace(config, mqtt="0.0.0.0:1").dump())
    assert "install mosquitto" in await refusal(home)
    monkeypatch.setattr(broker, "find", lambda: None)
    assert "apt install mosquitto" in await refusal(home, broker="mosquitto")


@pytest.mark.asyncio
@pytest.mark.parametrize("which", ["operators", "devices", "mqtt"])
async def test_a_port_in_use_is_said_at_once_in_one_line(new_home, which):
    home = new_home()
    host, _, port = getattr(ServerConfig.load(ServerPaths(home).config), which).rpartition(":")
    with socket.create_server((host, int(port))):
        words = await refusal(home)
    assert f"{host}:{port}" in words
    assert "in use" in words
    assert "\n" not in words


@pytest.mark.asyncio
async def test_two_servers_on_one_home_are_one_too_many(new_fleet):
    async with new_fleet() as fleet:
        with pytest.raises(ServeError, match="another server runs"):
            await Server(fleet.home).start()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda home: ServerPaths(home).config.unlink(), "fleet init"),
        (lambda home: ServerPaths(home).config.write_text("format = 2"), "upgrade"),
        (lambda home: ServerPaths(home).config.write_text("fleet = ["), "cannot read"),
        (lambda home: ServerPaths(home).config.write_text("size = " + "9" * 5000), "cannot read"),
        (lambda home: ServerPaths(home).config.write_text('colour = "red"'), "unknown key 'colour'"),
        (lambda home: (ServerPaths(home).ca / "ca.key").write_text("nonsense"), "damaged"),
        (lambda home: (ServerPaths(home).keys / "director.pem").unlink(), "cannot read the key"),
        (lambda home: (ServerPaths(home).keys / "director.pem").chmod(0o644), "chmod 600"),
        (lambda home: ServerPaths(home).database.write_bytes(b"nonsense" * 1000), "restore it"),
    ],
)  # fmt: skip
async def test_a_home_that_cannot_be_used_is_said_in_one_line(new_home, damage, said):
    home = new_home()
    damage(home)
    words = await refusal(home)
    assert said in words
    assert "\n" not in words


TALKATIVE = """
import socket, sys, time
sys.stdout.write("x" * 300_000 + chr(10))
for _ in range(10_000):
    print("a line of thirty-two characters.")
sys.stdout.flush()
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
time.sleep(600)
"""


@pytest.mark.asyncio
async def test_a_line_longer_than_any_buffer_leaves_the_broker_running(monkeypatch):
    monkeypatch.setattr(broker, "_READY_S", 10.0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    child = broker.Child("talkative", [sys.executable, "-c", TALKATIVE, str(port)], Address("127.0.0.1", port))
    await child.start()  # after the line it still writes more than a pipe holds: nobody reads, and it never listens
    await child.stop()
