"""MQTT client with a small simulated broker, over plain TCP on loopback."""

import asyncio
import os
import signal
import ssl
import sys
from datetime import UTC, datetime, timedelta

import pytest

from agent import happy_eyeballs
from agent.clock import ReferenceClock
from agent.link import https
from agent.link import mqtt as bus_module
from agent.link.https import FixedTls
from agent.link.mqtt import BrokerAddressError, Connected, Disconnected, Message, MqttClient
from agent.service import Links, build
from agent.update.store import Database, Store
from fleet.ca import CertificateAuthority
from fleet.protocol import wire
from fleet.protocol.messages import Ack, Report
from fleet.protocol.topics import POKE, Down, Topic, Up, device_subscriptions
from signing import dsse
from tests.agent.enrolled_device import DEVICE, enrolled
from tests.agent.silent_address import silent
from tests.agent.small_broker import Broker, WebSocketBroker
from tests.agent.tunnel_proxy import TunnelProxy
from tests.eventually import eventually_async


class Device:
    def __init__(self, *addresses, tls=None, proxy=""):
        self.heard, self.told, self.event = [], [], asyncio.Event()
        self.bus = MqttClient(
            device=DEVICE,
            addresses=addresses,
            tls=tls,
            will=b"gone",
            keepalive_s=60,
            proxy=proxy,
        )
        self.task = asyncio.gather(self.bus.run(), self._read())

    async def _read(self):
        async for event in self.bus.events():
            match event:
                case Connected():
                    self._note("connected")
                case Disconnected():
                    self._note("disconnected")
                case Message(topic, payload):
                    self._note((topic, payload))

    def _note(self, what):
        self.told.append(what)
        self.event.set()

    async def until(self, condition):
        async with asyncio.timeout(60):
            while not condition():
                self.event.clear()
                await self.event.wait()

    async def stop(self):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr(bus_module, "RETRY_FIRST_S", 0.01)


@pytest.mark.asyncio
async def test_the_client_has_a_persistent_session_and_a_will(free_port):
    broker = Broker()
    await broker.start()
    device = Device(f"mqtt://127.0.0.1:{broker.port}")
    await device.until(lambda: "connected" in device.told)
    (connect,) = broker.connects
    assert connect.startswith(b"\x00\x04MQTT\x04"), "MQTT 3.1.1"
    flags = connect[7]
    assert not flags & 2, "the session is kept"
    assert flags & 4, "there is a will"
    assert flags & 32, "which is retained"
    assert str(Topic(DEVICE, Up.STATE)).encode() in connect
    assert b"gone" in connect
    await broker.until(lambda: broker.subscribed)
    assert all(topic.encode() in broker.subscribed[0] for topic in device_subscriptions(DEVICE))
    await device.stop()
    await broker.stop()


@pytest.mark.asyncio
async def test_messages_go_both_ways():
    broker = Broker()
    await broker.start()
    device = Device(f"mqtt://127.0.0.1:{broker.port}")
    assert not device.bus.publish(Up.HEALTH, b"too early")
    await device.until(lambda: "connected" in device.told)
    assert device.bus.publish(Up.REPORT, b"a report")
    await broker.until(lambda: broker.published)
    assert broker.published == [(str(Topic(DEVICE, Up.REPORT)), b"a report", False)]
    broker.say(Topic(DEVICE, Down.ACK), b"yes")
    broker.say(POKE, b"{}")
    await device.until(lambda: (POKE, b"{}") in device.told)
    assert (str(Topic(DEVICE, Down.ACK)), b"yes") in device.told
    await device.stop()
    await broker.stop()


@pytest.mark.asyncio
async def test_a_lost_connection_is_reestablished():
    broker = Broker()
    await broker.start()
    device = Device(f"mqtt://127.0.0.1:{broker.port}")
    await device.until(lambda: "connected" in device.told)
    broker.drop()
    await device.until(lambda: device.told.count("connected") == 2)
    assert device.told[:3] == ["connected", "disconnected", "connected"]
    await device.stop()
    await broker.stop()


@pytest.mark.asyncio
async def test_a_refusal_by_the_broker_is_not_a_connection(caplog):
    broker = Broker()
    broker.accept = 5  # not authorised
    await broker.start()
    device = Device(f"mqtt://127.0.0.1:{broker.port}")
    await broker.until(lambda: len(broker.connects) >= 2)
    assert device.told == []
    broker.accept = 0
    await device.until(lambda: "connected" in device.told)
    await device.stop()
    await broker.stop()


@pytest.mark.asyncio
async def test_a_refused_device_reconnects_at_once_with_a_renewed_certificate(monkeypatch):
    """Not minutes later, when the delay between attempts has grown."""
    monkeypatch.setattr(bus_module, "RETRY_FIRST_S", 100_000.0)
    monkeypatch.setattr(bus_module, "RETRY_MAX_S", 100_000.0)

    broker = Broker()
    broker.accept = 5  # not authorised
    await broker.start()
    device = Device(f"mqtt://127.0.0.1:{broker.port}")
    await broker.until(lambda: broker.connects)
    broker.accept = 0
    device.bus.retry()
    await device.until(lambda: "connected" in device.told)
    await device.stop()
    await broker.stop()


@pytest.mark.asyncio
async def test_addresses_are_tried_in_turn(free_port):
    broker = Broker()
    await broker.start()
    device = Device(f"mqtt://127.0.0.1:{free_port}", f"mqtt://127.0.0.1:{broker.port}")
    await device.until(lambda: "connected" in device.told)
    await device.stop()
    await broker.stop()


@pytest.mark.asyncio
async def test_a_message_with_an_undecodable_topic_is_dropped():
    broker = Broker()
    await broker.start()
    device = Device(f"mqtt://127.0.0.1:{broker.port}")
    await device.until(lambda: "connected" in device.told)
    broker.writers[-1].write(broker.packet("fleet/X", b"1").replace(b"X", b"\xff"))
    broker.say(POKE, b"2")
    await device.until(lambda: (POKE, b"2") in device.told)
    assert device.told == ["connected", (POKE, b"2")]
    await device.stop()
    await broker.stop()


@pytest.mark.asyncio
async def test_unread_messages_are_bounded_and_the_disconnect_is_delivered(monkeypatch):
    monkeypatch.setattr(bus_module, "MESSAGES_MAX", 3)
    broker = Broker()
    await broker.start()
    client = MqttClient(
        device=DEVICE, addresses=(f"mqtt://127.0.0.1:{broker.port}",), tls=None, will=b"gone", keepalive_s=60
    )
    task = asyncio.ensure_future(client.run())
    events = client.events()
    assert await anext(events) == Connected()
    broker.writers[-1].write(b"".join(broker.packet(POKE, b"%d" % number) for number in range(10)))
    await broker.until(lambda: broker.acknowledged == 10)
    broker.drop()
    await broker.until(lambda: len(broker.connects) == 2)
    told = [await anext(events) for _ in range(4)]
    assert told[:3] == [Message(POKE, b"%d" % number) for number in range(3)]
    assert isinstance(told[3], Disconnected)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await broker.stop()


@pytest.mark.parametrize("addresses", [(), ("http://a:1",), ("mqtts://",)])
@pytest.mark.asyncio
async def test_an_unsupported_broker_address_is_refused(addresses):
    with pytest.raises(BrokerAddressError, match="mqtts://host:port"):
        Device(*addresses)


async def tls_broker(directory, host="127.0.0.1", kind=Broker):
    """Start a broker with TLS under the name `host`; return it with the CA."""
    ca = CertificateAuthority.create(directory, fleet="f", now=datetime.now(UTC))
    pair = ca.server([host], now=datetime.now(UTC))
    (directory / "both.pem").write_bytes(pair.certificate_pem + pair.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "both.pem")
    broker = kind()
    await broker.start(ssl=context)
    return broker, ca


@pytest.mark.asyncio
async def test_a_broker_over_websocket_is_talked_to_through_the_proxy(tmp_path):
    broker, ca = await tls_broker(tmp_path, "broker.invalid", WebSocketBroker)
    proxy = TunnelProxy()
    device = Device(
        f"wss://broker.invalid:{broker.port}/fleet/mqtt",
        tls=FixedTls(https.context(ca.pem)),
        proxy=f"http://127.0.0.1:{proxy.port}",
    )
    await device.until(lambda: "connected" in device.told)
    assert broker.heads[0].startswith("GET /fleet/mqtt HTTP/1.1\r\n")
    assert device.bus.publish(Up.REPORT, b"a report")
    await broker.until(lambda: broker.published)
    broker.say(POKE, b"{}")
    await device.until(lambda: (POKE, b"{}") in device.told)
    assert len(proxy.asked) == 1
    await device.stop()
    await broker.stop()
    proxy.close()


@pytest.mark.parametrize("scheme", ["mqtts", "wss"])
@pytest.mark.asyncio
async def test_without_a_clock_a_brokers_certificate_is_checked_against_the_floor(tmp_path, caplog, scheme):
    """OpenSSL does not look at dates then."""
    caplog.set_level("INFO")
    broker, ca = await tls_broker(tmp_path, kind=WebSocketBroker if scheme == "wss" else Broker)
    floor = datetime.now(UTC) + timedelta(days=400)
    device = Device(
        f"{scheme}://127.0.0.1:{broker.port}", tls=FixedTls(https.context(ca.pem, clock_behind=True), floor)
    )
    await eventually_async(lambda: "the server's certificate expired on" in caplog.text, "it is refused")
    assert not broker.connects
    assert device.told == []
    await device.stop()
    await broker.stop()


HANDSHAKES = {
    "a login page": b"HTTP/1.1 302 Found\r\nLocation: http://login.example/\r\n\r\n",
    "no upgrade": b"HTTP/1.1 101 x\r\nConnection: close\r\n\r\n",
    "another key": b"HTTP/1.1 101 x\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: eA==\r\n\r\n",
    "a key without a value": b"HTTP/1.1 101 x\r\nConnection: Upgrade\r\nSec-WebSocket-Accept\r\n\r\n",
    "no text": b"HTTP/1.1 101 x\r\nSec-WebSocket-Accept: \xff\xfe\r\n\r\n",
    "nothing": b"\r\n",
}


@pytest.mark.parametrize("answer", HANDSHAKES.values(), ids=HANDSHAKES)
@pytest.mark.asyncio
async def test_no_handshake_of_a_broker_ends_the_client(tmp_path, answer):
    broker, ca = await tls_broker(tmp_path, kind=WebSocketBroker)
    broker.answer = answer
    device = Device(f"wss://127.0.0.1:{broker.port}/mqtt", tls=FixedTls(https.context(ca.pem)))
    await broker.until(lambda: broker.heads)
    broker.answer = b""
    await device.until(lambda: "connected" in device.told or device.task.done())
    assert device.told == ["connected"]
    await device.stop()
    await broker.stop()


@pytest.mark.asyncio
async def test_a_broker_behind_a_proxy_is_reached_where_it_cannot_be_directly(tmp_path):
    broker, ca = await tls_broker(tmp_path, "broker.invalid")
    proxy = TunnelProxy(credentials=("jo", "hush"))
    device = Device(
        f"mqtts://broker.invalid:{broker.port}",
        tls=FixedTls(https.context(ca.pem)),
        proxy=f"http://jo:hush@127.0.0.1:{proxy.port}",
    )
    await device.until(lambda: "connected" in device.told)
    assert proxy.asked == [f"broker.invalid:{broker.port}"]
    await device.stop()
    await broker.stop()
    proxy.close()


@pytest.mark.asyncio
async def test_a_proxy_is_not_asked_for_a_broker_that_answers_directly(tmp_path):
    broker, ca = await tls_broker(tmp_path)
    proxy = TunnelProxy()
    device = Device(
        f"mqtts://127.0.0.1:{broker.port}",
        tls=FixedTls(https.context(ca.pem)),
        proxy=f"http://127.0.0.1:{proxy.port}",
    )
    await device.until(lambda: "connected" in device.told)
    assert proxy.asked == []
    await device.stop()
    await broker.stop()
    proxy.close()


@pytest.mark.asyncio
async def test_a_broker_of_which_one_address_is_dead_is_reached_by_the_other(monkeypatch):
    monkeypatch.setattr(bus_module, "CONNECT_S", 10_000.0)  # never waited for
    broker = Broker()
    await broker.start()
    monkeypatch.setattr(happy_eyeballs, "resolve", lambda *_: ["::1", "127.0.0.1"])
    with silent("::1", broker.port):
        device = Device(f"mqtt://broker.invalid:{broker.port}")
        await device.until(lambda: "connected" in device.told)
        await device.stop()
    await broker.stop()


@pytest.mark.asyncio
async def test_all_messages_in_a_tls_record_are_received(tmp_path):
    """The socket becomes readable once; messages left in the TLS layer must not wait for the next ping."""
    broker, ca = await tls_broker(tmp_path)
    device = Device(f"mqtts://127.0.0.1:{broker.port}", tls=FixedTls(https.context(ca.pem)))
    await device.until(lambda: "connected" in device.told)
    broker.writers[-1].write(b"".join(broker.packet(POKE, b"%d" % number) for number in range(50)))
    await device.until(lambda: (POKE, b"49") in device.told)
    assert [payload for _, payload in device.told[1:]] == [b"%d" % number for number in range(50)]
    await device.stop()
    await broker.stop()


# Whole agent with a hostile broker

BAD = [
    (Topic(DEVICE, Down.ACK), b'{"sequence": 9223372036854775808}'),
    (Topic(DEVICE, Down.ACK), b'{"sequence": 9223372036854775808, "again": true}'),
    (Topic(DEVICE, Down.ACK), b'{"sequence": -9223372036854775809}'),
    (Topic(DEVICE, Down.ACK), b'{"sequence": 1' + b"0" * 40 + b"}"),
    (Topic(DEVICE, Down.ACK), b'{"v": 9223372036854775808, "sequence": 1}'),
    (Topic(DEVICE, Down.ACK), b"\xff"),
    (Topic(DEVICE, Down.DESIRED), b"{"),
    (Topic(DEVICE, Down.FRESH), b"[" * 20),
    (Topic(DEVICE, Down.COMMAND), b"\x00"),
    (POKE, b'{"jitter_s": 9223372036854775808}'),
    (POKE, b'{"jitter_s": -1}'),
]


def reported(broker):
    """Return the sequences of all sent reports, in the order of sending."""
    bodies = [body for topic, body, _ in broker.published if topic == str(Topic(DEVICE, Up.REPORT))]
    return [wire.decode(Report, dsse.parse(body).payload).sequence for body in bodies]


async def still_obeys(broker):
    """Check that the device still follows its broker: a report that is asked for again comes again."""
    await broker.until(lambda: reported(broker))
    broker.say(Topic(DEVICE, Down.ACK), wire.encode(Ack(sequence=1)))
    broker.say(Topic(DEVICE, Down.ACK), wire.encode(Ack(sequence=0, again=True)))
    await broker.until(lambda: len(reported(broker)) >= 2)


@pytest.mark.asyncio
async def test_no_message_of_the_broker_ends_the_agent(tmp_path):
    """In a process of its own, as on a device."""

    broker = Broker()
    await broker.start()
    _, store = enrolled(tmp_path, broker=broker.port)
    store.close()
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "import sys; from agent.cli import main; sys.exit(main())"),
        *("run", "--state", tmp_path / "state", "--runtime", tmp_path / "run"),
    )
    ended = asyncio.ensure_future(agent.wait())
    try:
        for turn in (1, 2):  # retained messages come at each connection
            await broker.until(lambda turn=turn: len(broker.subscribed) == turn)
            for topic, payload in BAD:
                broker.say(topic, payload)
            talk = asyncio.ensure_future(still_obeys(broker))
            await asyncio.wait({ended, talk}, return_when=asyncio.FIRST_COMPLETED)
            assert not ended.done(), "the agent ended by what it was told"
            await talk
            if turn == 1:
                broker.published.clear()
                broker.drop()
    finally:
        if not ended.done():
            agent.terminate()
        assert await ended == 0
        await broker.stop()


@pytest.mark.parametrize("handler", ["acknowledge", "unacknowledge", "facts"])
@pytest.mark.asyncio
async def test_an_exception_while_handling_a_message_drops_only_that_message(tmp_path, monkeypatch, caplog, handler):
    broker = Broker()
    await broker.start()
    device, store = enrolled(tmp_path, broker=broker.port)
    reference = ReferenceClock(device.identity.floor)
    daemon = build(device, Database(store), reference, Links.of(device, reference))
    running = asyncio.ensure_future(daemon.run())
    await broker.until(lambda: reported(broker))
    sound, failed = getattr(Store, handler), asyncio.Event()
    loop = asyncio.get_running_loop()

    def broken(*arguments):
        if not failed.is_set():
            loop.call_soon_threadsafe(failed.set)
            raise ValueError("a fault of our own")
        return sound(*arguments)

    monkeypatch.setattr(Store, handler, broken)
    broker.say(Topic(DEVICE, Down.ACK), wire.encode(Ack(sequence=1)))
    broker.say(Topic(DEVICE, Down.ACK), wire.encode(Ack(sequence=0, again=True)))
    broker.say(Topic(DEVICE, Down.FRESH), b"{}")
    await failed.wait()
    broker.drop()  # the request to send again is followed once per connection
    await broker.until(lambda: running.done() or len(broker.subscribed) == 2)
    talk = asyncio.ensure_future(still_obeys(broker))
    await asyncio.wait({running, talk}, return_when=asyncio.FIRST_COMPLETED)
    assert not running.done()
    await talk
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    await broker.stop()
    assert "dropped a message on down/" in caplog.text
