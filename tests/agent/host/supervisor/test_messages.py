"""Messages of workers that say whatever they like: judged by their instance's grants, bounded, and ended."""

import asyncio
import socket

import msgspec
import pytest

from agent.host.ipc import framing, host_api
from agent.host.ipc.message_api import Publish, Published
from agent.host.supervisor.messages import MessageGate, may_publish
from fleet.protocol import bounds
from fleet.protocol.manifest import Grants

GRANTS = Grants(interfaces=("wasi:messaging",), publish=("plant/#",))


class Worker:
    """A worker's end of its socket."""

    def __init__(self, gate, grants=GRANTS, instance="web"):
        self.killed = asyncio.Queue()
        self.number, self.sock = gate.admit(instance, grants, self.killed.put_nowait)
        self.sock.setblocking(False)

    def say(self, data):
        self.sock.send(data)

    def publish(self, number=1, topic="plant/a", data=b"1"):
        self.say(msgspec.json.encode(Publish(number=number, topic=topic, data=data)))

    async def hear(self):
        loop, there = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.sock, there.set)
        async with asyncio.timeout(60):
            await there.wait()
        loop.remove_reader(self.sock)
        data, _ = framing.receive_packet(self.sock)
        return msgspec.json.decode(data, type=Published)

    async def killed_because(self):
        async with asyncio.timeout(60):
            return await self.killed.get()


def asked(done=0, session="s", wait_s=30, **more):
    return host_api.TakeMessages(id=1, session=session, done=done, wait_s=wait_s, **more)


@pytest.fixture
def gate():
    return MessageGate()


@pytest.mark.asyncio
async def test_a_worker_that_lies_about_its_topic_is_refused_by_its_grants(gate):
    worker = Worker(gate)
    worker.publish(topic="other/a")
    assert (await worker.hear()).error == "no topic of grants.publish matches 'other/a'"
    worker.publish(2, topic="plant/\0")
    assert "control characters" in (await worker.hear()).error
    assert (await gate.take(asked(wait_s=0), "s")).messages == ()


@pytest.mark.asyncio
async def test_metadata_that_no_batch_to_the_server_would_hold_is_refused(gate):
    """Each word has as many characters as it may, and the message is larger than all that is sent at once."""
    worker = Worker(gate)
    words = tuple((chr(0x20AC) * 1024, chr(0x20AC) * 600) for _ in range(bounds.MESSAGE_METADATA_MAX))
    worker.say(msgspec.json.encode(Publish(number=1, topic="plant/a", metadata=words)))
    assert (await worker.hear()).error == "its metadata has 16 entries of 77952 bytes, at most 16 of 4096 are taken"
    assert (await gate.take(asked(wait_s=0), "s")).messages == ()


@pytest.mark.asyncio
@pytest.mark.parametrize("said", [b"no JSON", b"{}", b'{"number":-1,"topic":"plant/a"}', b"[" * 5000, b"\xff"])
async def test_a_worker_that_speaks_nonsense_is_ended(gate, said):
    worker, other = Worker(gate), Worker(gate, instance="other")
    worker.say(said)
    assert await worker.killed_because() == "it sent a message that its host cannot read"
    other.publish()
    assert [each.instance for each in (await gate.take(asked(), "s")).messages] == ["other"]


@pytest.mark.asyncio
async def test_a_worker_that_does_not_wait_for_replies_is_ended(gate):
    worker = Worker(gate)
    for number in range(1, 20):
        worker.publish(number)
    assert await worker.killed_because() == "it sent messages without waiting for the replies"
    assert len((await gate.take(asked(), "s")).messages) <= 8


@pytest.mark.asyncio
async def test_a_message_outlives_its_worker_until_the_agent_has_it(gate):
    worker = Worker(gate)
    worker.publish()
    found = await gate.take(asked(), "s")
    gate.release(worker.number)
    worker.sock.close()
    assert (await gate.take(asked(wait_s=0), "s")).messages == found.messages
    assert (await gate.take(asked(done=found.messages[0].number, wait_s=0), "s")).messages == ()


@pytest.mark.asyncio
async def test_a_worker_that_reads_no_reply_holds_up_nobody(gate):
    worker, other = Worker(gate), Worker(gate, instance="other")
    worker.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    done = 0
    for number in range(1, 600):
        worker.publish(number)
        found = await gate.take(asked(done=done), "s")
        done = found.messages[-1].number
    other.publish()
    found = await gate.take(asked(done=done), "s")
    await gate.take(asked(done=found.messages[-1].number, wait_s=0), "s")
    assert (await other.hear()) == Published(number=1)


@pytest.mark.asyncio
async def test_what_nobody_takes_in_time_is_late():
    now = [0.0]
    gate = MessageGate(clock=lambda: now[0])
    worker = Worker(gate)
    worker.publish()
    await gate.take(asked(), "s")
    now[0] = 100.0
    gate.expire()
    assert await worker.hear() == Published(number=1, late=True)


@pytest.mark.asyncio
async def test_what_an_agent_says_of_another_session_of_the_host_settles_nothing(gate):
    worker = Worker(gate)
    worker.publish()
    found = await gate.take(asked(done=1000, session="of before"), "s")
    assert len(found.messages) == 1


@pytest.mark.parametrize(
    ("grants", "may"),
    [
        (GRANTS, True),
        (Grants(interfaces=("wasi:messaging/producer",), publish=("a",)), True),
        (Grants(interfaces=("wasi:messaging",)), False),
        (Grants(publish=("a",)), False),
    ],
)
def test_who_may_publish(grants, may):
    assert may_publish(grants) is may
