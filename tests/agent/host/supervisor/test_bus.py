"""Queues of the device's bus: bounded, in order, handed over until handled; and what senders meet."""

import asyncio

import msgspec
import pytest
import pytest_asyncio

from agent.host.ipc import framing, host_api
from agent.host.ipc.message_api import BLOCKED_S, LOCAL_MESSAGES_A_MINUTE, Publish, Published
from agent.host.supervisor import bus as bus_module
from agent.host.supervisor.bus import ATTEMPTS, Bus, BusMessage
from agent.host.supervisor.messages import MessageGate
from fleet.protocol.manifest import Grants, Http, Limits, Manifest, OnMessage

SENDS = Grants(interfaces=("wasi:messaging",), publish_local=("a/#",))


def a_run(instance="log", topics=("a/#",), granted=("#",), full="refuse", **limits):
    manifest = Manifest(name=instance, version="1.0.0", trigger=OnMessage(topics=topics, full=full))
    grants, most = Grants(subscribe=granted), Limits(**limits)
    return host_api.Run(instance=instance, generation=1, target="t", manifest=manifest, grants=grants, limits=most)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def bus(clock):
    return Bus(clock)


@pytest.fixture
def notes():
    return []


def message(topic="a/x", data=b"1", sender="web"):
    return BusMessage(sender, topic, data)


async def all_of(queue, answer=lambda _message: None):
    """Hand over what is due, and return it."""
    found = []

    async def deliver(one):
        found.append(one.data)
        return answer(one)

    while queue.health().waiting:
        await queue.due()
        await queue.attempt(deliver)
    return found


@pytest.mark.asyncio
async def test_messages_are_handed_over_in_order_once_each(bus, notes):
    queue = bus.subscribe(a_run(), notes.append)
    for number in range(100):
        assert bus.put(message(data=b"%d" % number)) == ""
    assert await all_of(queue) == [b"%d" % number for number in range(100)]
    assert (queue.health().delivered, bus.bytes, notes) == (100, 0, [])


@pytest.mark.asyncio
async def test_only_what_is_subscribed_to_and_granted_comes_and_an_own_message_too(bus, notes):
    queue = bus.subscribe(a_run(topics=("a/+", "b"), granted=("a/x", "b", "c")), notes.append)
    for topic in ("a/x", "a/y", "b", "c", "a/x/y"):
        bus.put(message(topic, topic.encode(), sender="log"))
    assert await all_of(queue) == [b"a/x", b"b"]


@pytest.mark.asyncio
async def test_a_message_that_fails_comes_again_before_those_behind_it_until_it_is_a_dead_letter(
    bus, notes, monkeypatch
):
    monkeypatch.setattr(bus_module, "RETRY_FIRST_S", 0.0)
    queue = bus.subscribe(a_run(), notes.append)
    for data in (b"bad", b"good"):
        bus.put(message(data=data))
    found = await all_of(queue, lambda one: "it trapped\nat 0x1" if one.data == b"bad" else None)
    assert found == [b"bad"] * ATTEMPTS + [b"good"]
    figures = queue.health()
    assert (figures.dead_letters, figures.failed, figures.delivered, figures.dropped) == (1, ATTEMPTS, 1, 0)
    assert notes == [
        "host: a message on a/x from web is a dead letter: it was handed over 5 times, the last time: it trapped at 0x1"
    ]


@pytest.mark.asyncio
async def test_attempts_are_further_and_further_apart(bus, clock, notes):
    queue = bus.subscribe(a_run(), notes.append)
    bus.put(message())
    pauses = []
    for _ in range(ATTEMPTS):
        await queue.due()

        async def deliver(_one):
            return "no"

        await queue.attempt(deliver)
        begun, waited = clock.now, asyncio.ensure_future(queue.due())
        await asyncio.sleep(0)
        while not waited.done() and queue.health().waiting:
            clock.now += 0.125
            waited.cancel()
            waited = asyncio.ensure_future(queue.due())
            await asyncio.sleep(0)
        waited.cancel()
        pauses.append(clock.now - begun)
    assert pauses == [0.25, 0.5, 1.0, 2.0, 0.0]


@pytest.mark.asyncio
async def test_a_handler_goes_on_when_who_waits_for_it_is_stopped_and_the_next_waits_its_turn(bus, notes):
    queue = bus.subscribe(a_run(), notes.append)
    for data in (b"1", b"2"):
        bus.put(message(data=data))
    may_end, seen = asyncio.Event(), []

    async def slow(one):
        seen.append(("old", one.data))
        await may_end.wait()

    first = asyncio.ensure_future(queue.attempt(slow))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    bus.subscribe(a_run(), notes.append)  # of the next generation

    async def quick(one):
        seen.append(("new", one.data))

    async def go_on():
        while queue.health().waiting:
            await queue.due()
            await queue.attempt(quick)

    second = asyncio.ensure_future(go_on())
    await asyncio.sleep(0)
    assert seen == [("old", b"1")]
    may_end.set()
    async with asyncio.timeout(60):
        await second
    assert seen == [("old", b"1"), ("new", b"2")]
    assert queue.health().delivered == 2


@pytest.mark.asyncio
async def test_bounds_of_messages_and_bytes(bus, notes):
    few = bus.subscribe(a_run("few", queue_messages=2), notes.append)
    small = bus.subscribe(a_run("small", topics=("a/small",), queue_bytes=3000), notes.append)
    assert [bus.put(message()) for _ in range(3)] == ["", "", "few"]
    bus.unsubscribe("few")
    assert few.health().dropped == 2
    assert [bus.put(message("a/small", b"x" * 1000)) for _ in range(2)] == ["", "small"]
    assert bus.put(message("a/small", b"x" * 4000)) == "", "which never fits, and holds nobody up"
    assert (small.health().waiting, small.health().dropped) == (1, 1)


@pytest.mark.asyncio
async def test_drop_oldest_and_the_queue_of_an_instance_that_is_in_quarantine(bus, clock, notes):
    queue = bus.subscribe(a_run(full="drop-oldest", queue_messages=2), notes.append)
    for number in range(5):
        assert bus.put(message(data=b"%d" % number)) == ""
    assert (queue.health().waiting, queue.health().dropped) == (2, 3)
    assert len(notes) == 1, "said once a minute"
    stalled = bus.subscribe(a_run("stalled", queue_messages=1), notes.append)
    bus.put(message())
    assert bus.put(message()) == "stalled"
    bus.stall("stalled")
    assert bus.put(message(data=b"new")) == ""
    bus.subscribe(a_run("stalled", queue_messages=1), notes.append)
    assert await all_of(stalled) == [b"new"]
    assert await all_of(queue) == [b"1", b"new"]


@pytest.mark.asyncio
async def test_all_queues_together_have_a_bound(bus, monkeypatch, notes):
    monkeypatch.setattr(bus_module, "ALL_BYTES", 10_000)
    for name in ("one", "two"):
        bus.subscribe(a_run(name, topics=(f"a/{name}",)), notes.append)
    assert [bus.put(message("a/one", b"x" * 4000)) for _ in range(3)] == ["", "", "one"]
    assert bus.put(message("a/two", b"x" * 4000)) == "two"
    bus.unsubscribe("one")
    assert bus.put(message("a/two", b"x" * 4000)) == ""


@pytest.mark.asyncio
async def test_narrower_topics_are_followed_without_comparing_messages_with_each_other(bus, notes, monkeypatch):
    queue = bus.subscribe(a_run(topics=("a/#",)), notes.append)
    for number in range(100):
        assert bus.put(message(f"a/{'xy'[number % 2]}", b"%d" % number)) == ""
    compared = []
    monkeypatch.setattr(BusMessage, "__eq__", lambda *pair: bool(compared.append(pair)))
    bus.subscribe(a_run(topics=("a/x",)), notes.append)
    assert (queue.health().waiting, queue.health().dropped, compared) == (50, 50, [])


@pytest.mark.asyncio
async def test_a_generation_with_other_topics_does_not_get_what_it_may_not_have(bus, notes):
    queue = bus.subscribe(a_run(), notes.append)
    for topic in ("a/x", "a/y"):
        bus.put(message(topic, topic.encode()))
    bus.subscribe(a_run(granted=("a/y",)), notes.append)
    assert await all_of(queue) == [b"a/y"]
    http = msgspec.structs.replace(a_run(), manifest=Manifest(name="log", version="2.0.0", trigger=Http()))
    bus.put(message("a/y"))
    assert bus.subscribe(http, notes.append) is None
    assert (bus.bytes, bus.health("log")) == (0, None)


# The senders' side.


class Sender:
    """A worker's end of its socket."""

    def __init__(self, gate, instance="web", grants=SENDS):
        self.killed = asyncio.Queue()
        self.number, self.sock = gate.admit(instance, grants, self.killed.put_nowait)
        self.sock.setblocking(False)

    def publish(self, number, topic="a/x", data=b"1"):
        self.sock.send(msgspec.json.encode(Publish(number=number, topic=topic, data=data)))

    async def hear(self):
        loop, there = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.sock, there.set)
        async with asyncio.timeout(60):
            await there.wait()
        loop.remove_reader(self.sock)
        data, _ = framing.receive_packet(self.sock)
        return msgspec.json.decode(data, type=Published)


@pytest_asyncio.fixture
async def gate(clock):
    gate = MessageGate(clock)
    yield gate
    gate.close()


@pytest.mark.asyncio
async def test_a_sender_waits_for_room_and_the_order_of_its_messages_holds(gate, notes):
    queue = gate.bus.subscribe(a_run(queue_bytes=3000), notes.append)
    web, other = Sender(gate), Sender(gate, "other")
    for number, data in ((1, b"x" * 1500), (2, b"y" * 1500), (3, b"z")):
        web.publish(number, data=data)  # of which the last would fit before the one in front of it
    assert await web.hear() == Published(number=1)
    other.publish(1, data=b"w")
    assert await other.hear() == Published(number=1)
    found = await all_of(queue)
    assert [each[:1] for each in found] == [b"x", b"w", b"y", b"z"]
    assert [await web.hear(), await web.hear()] == [Published(number=2), Published(number=3)]


@pytest.mark.asyncio
async def test_a_sender_is_refused_once_there_was_no_room_for_some_time(gate, clock, notes):
    gate.bus.subscribe(a_run(queue_messages=1), notes.append)
    web = Sender(gate)
    web.publish(1)
    assert await web.hear() == Published(number=1)
    web.publish(2)
    own = Sender(gate, "log")
    own.publish(1)
    assert (await own.hear()).error == "its own queue of messages is full"
    clock.now += BLOCKED_S
    gate.expire()
    assert (await web.hear()).error == "the queue of log, which gets this message, is full"
    assert gate.bus.health("log").waiting == 1


@pytest.mark.asyncio
async def test_a_message_whose_sender_ended_while_it_waited_is_nobodys(gate, notes):
    queue = gate.bus.subscribe(a_run(queue_messages=1), notes.append)
    web, other = Sender(gate), Sender(gate, "other")
    web.publish(1)
    assert await web.hear() == Published(number=1)
    web.publish(2, data=b"of a dead sender")
    other.publish(1, data=b"of a live one")
    own = Sender(gate, "log")  # whose answer comes once both are there
    own.publish(1)
    await own.hear()
    gate.release(web.number)
    assert await all_of(queue) == [b"1", b"of a live one"]
    assert await other.hear() == Published(number=1)


@pytest.mark.asyncio
async def test_a_worker_with_more_than_its_share_of_waiting_messages_is_ended(gate, notes):
    gate.bus.subscribe(a_run(queue_messages=1), notes.append)
    web = Sender(gate)
    for number in range(1, 20):
        web.publish(number)
    async with asyncio.timeout(60):
        assert await web.killed.get() == "it sent messages without waiting for the replies"


@pytest.mark.asyncio
async def test_messages_within_the_device_have_a_rate_of_their_own(gate, clock, notes):
    web = Sender(gate, grants=Grants(interfaces=("wasi:messaging",), publish=("up",), publish_local=("a/#",)))
    for number in range(1, LOCAL_MESSAGES_A_MINUTE + 1):
        web.publish(number)
        assert (await web.hear()).error == ""
    refused = ""
    while not refused:  # the budget grows with the time of the test
        web.publish(1)
        refused = (await web.hear()).error
    assert refused == "6000 messages a minute are allowed"
    web.publish(2, "up")
    found = await gate.take(host_api.TakeMessages(id=1, session="", done=0, wait_s=30), "s")
    assert [each.topic for each in found.messages] == ["up"]


@pytest.mark.asyncio
@pytest.mark.parametrize("topic", ["a/#", "#", "+", "a/+", "a/x#", "$share/log/a/x", "a//x", "a/x\u0085", "/a/x", "a/"])
async def test_topics_with_wildcards_and_other_tricks_are_refused(gate, notes, topic):
    gate.bus.subscribe(a_run(topics=("#",)), notes.append)
    web = Sender(gate, grants=Grants(interfaces=("wasi:messaging",), publish_local=("#",)))
    web.publish(1, topic)
    assert (await web.hear()).error
    assert gate.bus.bytes == 0


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "said",
    [
        b'{"number":1,"topic":"' + b"x" * 65_536 + b'"}',
        b'{"number":1,"topic":"a/\xff\xfe"}',
        b'{"number":1,"topic":"a/\\ud800"}',
        b'{"number":1,"topic":"a/x","data":"' + b"A" * 40_000 + b'"}',
    ],
    ids=["a topic of 64 KiB", "invalid UTF-8", "half a pair of surrogates", "too much content"],
)
async def test_what_no_intact_worker_says_ends_it(gate, notes, said):
    gate.bus.subscribe(a_run(topics=("#",)), notes.append)
    web = Sender(gate, grants=Grants(interfaces=("wasi:messaging",), publish_local=("#",)))
    web.sock.send(said)
    async with asyncio.timeout(60):
        assert await web.killed.get() == "it sent a message that its host cannot read"
    assert gate.bus.bytes == 0
