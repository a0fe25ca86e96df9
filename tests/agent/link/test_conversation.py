"""Conversation of a device: over MQTT, over HTTPS while there is no broker, and from one to the other."""

import asyncio
import threading

import pytest

from agent.link import conversation as module
from agent.link.conversation import Conversation, HttpsConversation
from agent.link.https import FetchError
from agent.link.mqtt import Connected, Disconnected, Message
from fleet.protocol import bounds, wire
from fleet.protocol.codes import RejectCode
from fleet.protocol.messages import Exchange, ExchangeReply, Packet
from fleet.protocol.topics import Down, Topic, Up

DEVICE = "crane-0a1b2c3d"


class Server:
    """Server as a device sees it: requests that wait are held until it says something."""

    def __init__(self):
        self.said, self.ended, self.failure = [], 0, None
        self.session, self.kept = "first", ()
        self.loop, self.changed = asyncio.get_running_loop(), asyncio.Event()
        self.news, self.closed, self.closing = threading.Event(), 0, threading.Event()

    def request(self, method, path, *, max_bytes, body=None, headers=None, within_s=None):
        assert (method, path) == ("POST", "/v1/exchange")
        said = wire.decode(Exchange, body)
        closed = self.closed
        if said.wait_s:
            self.news.wait(60)
            self.news.clear()
        if closed != self.closed and said.wait_s:
            raise FetchError(RejectCode.UNREACHABLE, "closed")
        self.loop.call_soon_threadsafe(self._note, said)
        if self.failure is not None:
            raise self.failure
        fresh = said.session != self.session
        down = () if fresh else tuple(each for each in self.kept if each.number > said.received)
        return wire.encode(ExchangeReply(session=self.session, down=down))

    def close(self):
        self.closed += 1
        self.closing.set()
        self.news.set()

    def _note(self, said):
        self.said.append(said)
        self.changed.set()

    def say(self, *payloads):
        self.kept += tuple(
            Packet(channel=Down.COMMAND, payload=payload, number=len(self.kept) + index)
            for index, payload in enumerate(payloads, 1)
        )
        self.news.set()

    @property
    def up(self):
        return [(each.channel, each.payload) for said in self.said for each in said.up]


class Broker:
    """Connection to a broker that a test makes and breaks."""

    def __init__(self):
        self.connected, self.queue, self.published, self.ran = False, asyncio.Queue(), [], asyncio.Event()

    async def run(self):
        self.ran.set()
        await asyncio.Event().wait()

    async def events(self):
        while True:
            yield await self.queue.get()

    def publish(self, channel, payload, *, retain=False):
        self.published.append((channel, payload))
        return self.connected

    def leave(self):
        pass

    def retry(self):
        pass

    def connect(self):
        self.connected = True
        self.queue.put_nowait(Connected())

    def lose(self):
        self.connected = False
        self.queue.put_nowait(Disconnected("gone"))


class Device:
    """Device in conversation; its events are recorded."""

    def __init__(self, server, broker, **more):
        self.told, self.changed = [], asyncio.Event()
        self.talk = Conversation(mqtt=broker, https=HttpsConversation(DEVICE, server), **more)
        self.tasks = [asyncio.ensure_future(each) for each in (self.talk.run(), self._read())]

    async def _read(self):
        async for event in self.talk.events():
            self.told.append(event)
            self.changed.set()

    async def until(self, condition, changed=None):
        changed = changed or self.changed
        async with asyncio.timeout(60):
            while not condition():
                changed.clear()
                await changed.wait()

    async def stop(self):
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(module, "GRACE_S", (0.0, 0.01))
    monkeypatch.setattr(module, "FIRST_GRACE_S", (0.0, 0.01))
    monkeypatch.setattr(module, "RETRY_FIRST_S", 0.01)


def messages(device):
    return [event.payload for event in device.told if isinstance(event, Message)]


@pytest.mark.asyncio
async def test_without_a_broker_messages_go_both_ways_over_https():
    server = Server()
    device = Device(server, Broker())
    assert not device.talk.publish(Up.HEALTH, b"too early")
    await device.until(lambda: Connected() in device.told)
    assert device.talk.connected
    assert not device.talk.broker_connected
    assert device.talk.publish(Up.STATE, b"online", retain=True)
    assert device.talk.publish(Up.REPORT, b"a report")
    await device.until(lambda: len(server.up) == 2, server.changed)
    assert server.up == [("state", "online"), ("report", "a report")]
    server.say("one", "two")
    await device.until(lambda: len(messages(device)) == 2)
    assert device.told[1] == Message(str(Topic(DEVICE, Down.COMMAND)), b"one")
    server.say("three")
    await device.until(lambda: len(messages(device)) == 3)
    assert messages(device) == [b"one", b"two", b"three"], "each once"
    await device.stop()


@pytest.mark.asyncio
async def test_a_broker_takes_over_and_https_says_goodbye():
    server, broker = Server(), Broker()
    device = Device(server, broker)
    await device.until(lambda: Connected() in device.told)
    broker.connect()
    await device.until(lambda: any(said.ends for said in server.said), server.changed)
    assert device.talk.publish(Up.HEALTH, b"by the broker")
    assert broker.published == [(Up.HEALTH, b"by the broker")]
    assert device.told == [Connected(), Connected()]
    broker.lose()
    await device.until(lambda: device.told.count(Connected()) == 3)
    assert device.talk.connected
    await device.stop()


@pytest.mark.asyncio
async def test_a_message_that_https_brings_while_a_broker_takes_over_is_not_lost():
    """Such as a command: the server sends none again that the device has received."""
    server, broker = Server(), Broker()
    device = Device(server, broker)
    await device.until(lambda: Connected() in device.told)
    broker.connected = True
    server.say("a command")
    await device.until(lambda: messages(device) == [b"a command"])
    before, server.kept, server.session = len(server.said), (), "second"
    server.news.set()
    await device.until(lambda: len(server.said) > before, server.changed)
    server.say("another")  # behind the new session's event
    await device.until(lambda: messages(device) == [b"a command", b"another"])
    assert device.told.count(Connected()) == 1, "the broker's connection is told by the broker"
    await device.stop()


@pytest.mark.asyncio
async def test_a_server_that_forgot_the_session_is_greeted_again():
    server = Server()
    device = Device(server, Broker())
    await device.until(lambda: Connected() in device.told)
    server.session = "second"
    server.news.set()
    await device.until(lambda: device.told.count(Connected()) == 2)
    server.kept = (Packet(channel=Down.COMMAND, payload="again from one", number=1),)
    server.news.set()
    await device.until(lambda: messages(device) == [b"again from one"])
    await device.stop()


@pytest.mark.asyncio
async def test_a_lost_server_is_told_and_found_again():
    server = Server()
    device = Device(server, Broker())
    await device.until(lambda: Connected() in device.told)
    server.failure = FetchError(RejectCode.UNREACHABLE, "no route")
    server.news.set()
    await device.until(lambda: Disconnected("no route") in device.told)
    assert not device.talk.publish(Up.HEALTH, b"nowhere")
    server.failure = None
    await device.until(lambda: device.told[-1] == Connected())
    await device.stop()


@pytest.mark.asyncio
async def test_an_earlier_server_without_this_way_is_left_alone_for_long(monkeypatch):
    server, asked = Server(), []
    monkeypatch.setattr(module, "spread", lambda *seconds: asked.append(seconds) or 0.01)
    server.failure = FetchError(RejectCode.NOT_FOUND, "/v1/exchange: the server does not have it", status=404)
    device = Device(server, Broker())
    await device.until(lambda: asked and server.said, server.changed)
    assert asked[0] == (module.OUTDATED_S, 0.0)
    assert device.told == []
    await device.stop()


@pytest.mark.asyncio
async def test_the_servers_window_is_kept(monkeypatch):
    server, asked = Server(), []
    monkeypatch.setattr(module, "spread", lambda *seconds: asked.append(seconds) or 0.01)
    server.failure = FetchError(RejectCode.UNREACHABLE, "busy", status=503, retry_after_s=120.0)
    device = Device(server, Broker())
    await device.until(lambda: len(server.said) >= 2, server.changed)
    assert asked[0][1] == 120.0
    await device.stop()


@pytest.mark.asyncio
@pytest.mark.parametrize(("stable_s", "grows"), [(module.STABLE_S, True), (0.0, False)])
async def test_a_way_that_opens_and_fails_at_once_is_tried_less_and_less(monkeypatch, stable_s, grows):
    """As through a proxy that refuses requests that are held."""
    server, windows = Server(), []
    monkeypatch.setattr(module, "STABLE_S", stable_s)
    monkeypatch.setattr(module, "spread", lambda window_s, _=0.0: windows.append(window_s) or 0.001)
    whole = server.request

    def request(*arguments, body=None, **more):
        if wire.decode(Exchange, body).wait_s:
            raise FetchError(RejectCode.UNREACHABLE, "502", status=502)
        return whole(*arguments, body=body, **more)

    server.request = request
    device = Device(server, Broker())
    await device.until(lambda: len(windows) >= 4)
    assert (windows[:4] == sorted(set(windows[:4]))) is grows
    await device.stop()


@pytest.mark.asyncio
async def test_a_stop_does_not_wait_for_the_request_that_is_held():
    server = Server()
    device = Device(server, Broker())
    await device.until(lambda: Connected() in device.told)
    device.talk.publish(Up.STATE, b"offline")
    await device.stop()  # the test's own limit of time is shorter than the server's
    assert server.up == [("state", "offline")]
    assert server.said[-1].ends


@pytest.mark.asyncio
async def test_a_message_under_way_at_a_stop_goes_with_the_goodbye():
    server = Server()
    device = Device(server, Broker())
    await device.until(lambda: Connected() in device.told)
    cut, began = server.request, asyncio.Event()

    def request(*arguments, body=None, **more):
        if wire.decode(Exchange, body).up and not began.is_set():
            server.loop.call_soon_threadsafe(began.set)
            server.closing.wait(60)
            raise FetchError(RejectCode.UNREACHABLE, "closed")
        return cut(*arguments, body=body, **more)

    server.request = request
    device.talk.publish(Up.STATE, b"offline")
    await began.wait()
    await device.stop()
    assert server.up == [("state", "offline")]


@pytest.mark.asyncio
async def test_waiting_messages_are_bounded_and_go_in_requests_of_bounded_size():
    server = Server()
    device = Device(server, Broker())
    await device.until(lambda: Connected() in device.told)
    sent = [device.talk.publish(Up.REPORT, b"x" * 30_000) for _ in range(2 * module.WAITING_MAX)]
    assert sent.count(True) == module.WAITING_MAX
    await device.until(lambda: len(server.up) == module.WAITING_MAX, server.changed)
    for said in server.said:
        assert len(said.up) <= bounds.EXCHANGE_MESSAGES_MAX
        assert len(wire.encode(said)) <= Exchange.MAX_BYTES
    await device.stop()


@pytest.mark.asyncio
async def test_a_broker_that_is_left_alone_at_first_is_used_later():
    server, broker = Server(), Broker()
    device = Device(server, broker, broker_after_s=0.3)
    await device.until(lambda: Connected() in device.told)
    assert not broker.ran.is_set()
    async with asyncio.timeout(60):
        await device.talk.broker_used.wait()
        await broker.ran.wait()
    await device.stop()


@pytest.mark.asyncio
async def test_a_fleet_without_a_broker_is_talked_to_over_https():
    server = Server()
    device = Device(server, None)
    await device.until(lambda: Connected() in device.told)
    device.talk.retry()
    device.talk.leave()
    await device.stop()
