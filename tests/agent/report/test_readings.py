"""Readings between host and server: kept before anybody hears that they are, and sent one batch at a time."""

import asyncio
import contextlib
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from agent.clock import ReferenceClock
from agent.host.ipc import host_api
from agent.link.host_client import HostGoneError
from agent.report import readings as module
from agent.report.readings import ReadingsUplink
from agent.report.spool import Bounds, Draft, Spool
from fleet.protocol import wire
from fleet.protocol.messages import Readings, ReadingsAck

NOW = datetime(2026, 5, 1, tzinfo=UTC)
DEVICE = "b-01234567"


class Host:
    """Host that has messages, of a protocol's version."""

    def __init__(self, protocol=host_api.PROTOCOL):
        self.protocol = protocol
        self.asked, self.answers = [], asyncio.Queue()
        self.news = asyncio.Event()

    async def connection(self):
        return SimpleNamespace(protocol=self.protocol)

    async def lost(self):
        self.asked.append("lost")
        self.news.set()
        await asyncio.Event().wait()

    async def ask(self, kind, _answer, **fields):
        assert kind is host_api.TakeMessages
        self.asked.append((fields["session"], fields["done"], fields["refused"]))
        self.news.set()
        answer = await self.answers.get()
        if answer is None:
            raise HostGoneError("gone")
        return answer

    def has(self, *numbers, session="s", size=4):
        messages = tuple(
            host_api.Message(number=each, instance="meter", topic="a", data=b"%04d" % each * (size // 4))
            for each in numbers
        )
        self.answers.put_nowait(host_api.Messages(id=1, session=session, messages=messages))


class Line:
    """Connection to the fleet."""

    def __init__(self):
        self.connected = True
        self.sent, self.news = [], asyncio.Event()

    def publish(self, _channel, payload):
        self.sent.append([each.position for each in wire.decode(Readings, payload).readings])
        self.news.set()
        return self.connected


async def until(thing, condition):
    async with asyncio.timeout(60):
        while not condition():
            thing.news.clear()
            await thing.news.wait()


@pytest.fixture
def agent(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GAP_S", 0.0)
    monkeypatch.setattr(module, "PACE_BYTES_S", float("inf"))
    monkeypatch.setattr(module, "RETRY_S", 0.0)

    @contextlib.asynccontextmanager
    async def run(host=None, **limits):
        spool = Spool.open(tmp_path / "readings", Bounds(**limits))
        problems = {}
        uplink = ReadingsUplink(
            device=DEVICE,
            spool=spool,
            host=host or Host(protocol=1),
            mqtt=(line := Line()),
            problems=SimpleNamespace(set=problems.__setitem__, clear=lambda key: problems.pop(key, None)),
            clock=ReferenceClock(NOW),
        )
        task = asyncio.ensure_future(uplink.run())
        try:
            yield SimpleNamespace(uplink=uplink, spool=spool, line=line, problems=problems)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    return run


def ack(agent, position, epoch=None):
    return agent.uplink.acknowledge(wire.encode(ReadingsAck(epoch=epoch or agent.spool.epoch, position=position)))


@pytest.mark.asyncio
async def test_the_host_hears_that_a_message_is_kept_once_it_is_on_the_disk(agent, tmp_path):
    host = Host()
    async with agent(host):
        host.has(1, 2)
        await until(host, lambda: len(host.asked) == 2)
        assert host.asked == [("", 0, {}), ("s", 2, {})]
        assert Spool.open(tmp_path / "readings", Bounds()).waiting == 2
        host.has(session="t")  # the host was started again, and counts anew
        host.has(1, session="t")
        await until(host, lambda: len(host.asked) == 4)
        assert host.asked[2:] == [("t", 0, {}), ("t", 1, {})]
    again = Host()
    async with agent(again) as second:
        await until(again, lambda: again.asked)
        assert again.asked == [("t", 1, {})], "an agent that was started again says what it has kept"
        again.answers.put_nowait(None)
        again.has(1, 2, session="t")
        await until(again, lambda: len(again.asked) == 3)
        assert second.spool.waiting == 4


@pytest.mark.asyncio
async def test_what_is_not_kept_is_refused_with_the_reason(agent):
    host = Host()
    async with agent(host, max_bytes=10_000, full="refuse") as device:
        host.has(1, 2, 3, size=4000)
        await until(host, lambda: len(host.asked) == 2)
        assert host.asked[1] == ("s", 3, {3: "the device keeps at most 9 KiB of messages"})
        assert "refused" in device.problems["readings"]
        assert device.uplink.health().refused == 1


@pytest.mark.asyncio
async def test_a_disk_that_cannot_be_written_refuses_and_the_agent_goes_on(agent, monkeypatch):
    host = Host()
    async with agent(host) as device:

        def broken(_drafts, *, now):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(Spool, "append", lambda self, drafts, *, now: broken(drafts, now=now))
        host.has(1)
        await until(host, lambda: len(host.asked) == 2)
        assert host.asked[1] == ("s", 1, {1: "the device cannot write its disk: Input/output error"})
        monkeypatch.undo()
        host.has(2)
        await until(host, lambda: len(host.asked) == 3)
        assert device.spool.waiting == 1


@pytest.mark.asyncio
async def test_a_host_of_before_is_not_asked(agent):
    host = Host(protocol=host_api.TAKES_MESSAGES - 1)
    async with agent(host):
        await until(host, lambda: host.asked)
        assert host.asked == ["lost"]


def fill(spool, count, size=20_000):
    for number in range(1, count + 1):
        spool.append([Draft(instance="meter", topic="a", data=b"x" * size, session="s", number=number)], now=NOW)


@pytest.mark.asyncio
async def test_a_batch_goes_once_the_one_before_is_acknowledged_and_none_before_the_server_says_that_it_takes_any(
    agent, monkeypatch
):
    monkeypatch.setattr("fleet.protocol.bounds.MESSAGE_MAX_BYTES", 1 << 20)
    async with agent() as device:
        fill(device.spool, 5, size=14_000)
        await ack(device, 9, epoch="of another spool")
        assert device.line.sent == []
        await ack(device, 0)
        await until(device.line, lambda: device.line.sent)
        assert device.line.sent == [[1, 2, 3]]
        device.uplink.resend()  # the server was started again
        await until(device.line, lambda: len(device.line.sent) == 2)
        assert device.line.sent[1] == [1, 2, 3]
        await ack(device, 3)
        await until(device.line, lambda: len(device.line.sent) == 3)
        assert device.line.sent[2] == [4, 5]
        # another connection, to a server that says nothing: one of before
        device.uplink.reconnected()
        device.uplink.resend()
        await ack(device, 5)
        assert device.spool.waiting == 0
        assert device.uplink.health().waiting == 0
        assert len(device.line.sent) == 3


@pytest.mark.asyncio
async def test_without_an_answer_a_batch_comes_again_later_and_later(agent, monkeypatch):
    monkeypatch.setattr(module, "RESEND_FIRST_S", 0.01)
    async with agent() as device:
        fill(device.spool, 1, size=10)
        await ack(device, 0)
        await until(device.line, lambda: len(device.line.sent) == 4)
        assert device.line.sent == [[1]] * 4


@pytest.mark.asyncio
async def test_what_damage_made_unreadable_keeps_nothing_else_from_the_server(agent, tmp_path):
    async with agent() as device:
        fill(device.spool, 1, size=10)
        (segment,) = (tmp_path / "readings").iterdir()
        segment.write_bytes(segment.read_bytes()[:-4])
        await ack(device, 0)
        device.spool._open = False  # a start of the agent later
        device.spool.append([Draft(instance="meter", topic="a", session="s", number=2)], now=NOW)
        await ack(device, 0)
        await until(device.line, lambda: device.line.sent)
        assert device.line.sent == [[2]]


@pytest.mark.asyncio
async def test_a_message_that_comes_while_damaged_ones_are_read_is_not_dropped_with_them(agent, monkeypatch):
    plain, came = Spool.read, []

    def read(spool, after, **bounds):
        if not came:  # nothing can be read, and meanwhile another message comes
            came.append(spool.append([Draft(instance="meter", topic="a", session="t", number=1)], now=NOW))
            return ()
        return plain(spool, after, **bounds)

    monkeypatch.setattr(Spool, "read", read)
    host = Host()
    async with agent(host) as it:
        await ack(it, 0)
        host.has(1)
        await until(it.line, lambda: it.line.sent)
        assert (came, it.line.sent) == ([(1, "")], [[2]])
