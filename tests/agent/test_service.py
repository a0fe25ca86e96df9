"""Whole agent, composed as in production, with a simulated broker, server and host."""

import asyncio
import contextlib
import sqlite3
from types import SimpleNamespace

import pytest

from agent import session as session_module
from agent.clock import ReferenceClock
from agent.host.ipc import host_api
from agent.link.host_client import HostClient
from agent.link.https import FetchError
from agent.link.mqtt import Connected, Disconnected, Message
from agent.service import Links, build
from agent.session import FleetSession
from agent.update.machine import State
from agent.update.state import Change, Transition
from agent.update.store import Database, Store
from fleet.protocol import wire
from fleet.protocol.assignment import Item
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.messages import Ack, Hello, Poke, Report
from fleet.protocol.messages import State as Online
from fleet.protocol.topics import POKE, Down, Topic, Up
from signing import dsse
from tests.agent.enrolled_device import DEVICE, enrolled
from tests.eventually import eventually_async


class Broker:
    """Connection to a broker that records published messages and delivers the test's messages."""

    name, broker_after_s = "mqtt", 0.0

    def __init__(self):
        self.connected, self.published, self.changed = False, [], asyncio.Event()
        self.queue, self.fault = asyncio.Queue(), asyncio.Event()
        self.left = self.cancelled = False

    @property
    def broker_connected(self):
        return self.connected

    async def run(self):
        try:
            await self.fault.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        raise RuntimeError("a bug in this part")

    async def events(self):
        while True:
            event = await self.queue.get()
            self.connected = not isinstance(event, Disconnected) and (self.connected or isinstance(event, Connected))
            yield event
            self.queue.task_done()

    def publish(self, channel, payload, *, retain=False):
        if self.connected:
            self.published.append((channel, payload, retain))
            self.changed.set()
        return self.connected

    def leave(self):
        self.left = True

    def retry(self):
        pass

    def connect(self):
        self.queue.put_nowait(Connected())

    def say(self, channel, payload):
        self.queue.put_nowait(Message(str(Topic(DEVICE, channel)), payload))

    def bodies(self, channel):
        return [payload for each, payload, _ in self.published if each is channel]

    async def until(self, condition):
        async with asyncio.timeout(60):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


class Server:
    """Unreachable server that counts requests."""

    def __init__(self):
        self.asked = 0

    def request(self, method, path, *, max_bytes, body=None, headers=None):
        self.asked += 1
        raise FetchError(RejectCode.UNREACHABLE, "no route")


class Agent:
    def __init__(self, directory):
        self.device, store = enrolled(directory)
        self.db = Database(store)
        self.broker, self.server = Broker(), Server()
        self.host = HostClient(self.device.places.host_socket)
        links = Links(https=self.server, archives=self.server, conversation=self.broker, host=self.host)
        self.service = build(self.device, self.db, ReferenceClock(self.device.identity.floor), links)

    async def is_closed(self):
        """Return whether the store and its thread are closed."""
        with pytest.raises(RuntimeError, match="after shutdown"):
            await self.db(Store.counter, "accepted")
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            self.db.store.counter("accepted")
        return True


@pytest.fixture
def agent(tmp_path):
    return Agent(tmp_path)


@pytest.fixture
def host(agent):
    """Socket of a host that does not answer yet."""
    with contextlib.closing(host_api.new_socket()) as listener:
        listener.bind(str(agent.device.places.host_socket))
        listener.listen()
        listener.setblocking(False)
        yield listener


@contextlib.asynccontextmanager
async def running(agent):
    others = asyncio.all_tasks()
    task = asyncio.ensure_future(agent.service.run())
    yield task
    agent.service.stop()
    await task
    assert asyncio.all_tasks() == others, "no part is left behind"


def sequences(bodies):
    return [wire.decode(Report, dsse.parse(body).payload).sequence for body in bodies]


@pytest.mark.asyncio
async def test_a_stop_says_goodbye_cancels_every_part_and_closes_the_database(agent):
    async with running(agent) as task:
        agent.broker.connect()
        await agent.broker.until(lambda: agent.broker.bodies(Up.HELLO))
        agent.service.stop()
        assert await task == 0
        assert agent.broker.cancelled
        assert agent.broker.left, "in good order: the broker need not publish the will"
        _, payload, retain = [each for each in agent.broker.published if each[0] is Up.STATE][-1]
        assert (wire.decode(Online, payload).online, retain) == (False, True)
        assert await agent.is_closed()


@pytest.mark.asyncio
async def test_an_exception_in_a_part_ends_the_agent_with_1_and_closes_the_database(agent, caplog):
    async with running(agent) as task:
        agent.broker.connect()
        await agent.broker.until(lambda: agent.broker.bodies(Up.HELLO))
        agent.broker.fault.set()
        assert await task == 1
        assert not agent.broker.left, "the will tells that it is gone"
        assert "a bug in this part" in caplog.text
        assert await agent.is_closed()


@pytest.mark.asyncio
async def test_a_stop_ends_a_change_under_way_and_the_connection_to_the_host(agent, host):
    item = Item(instance="web", target="components/main/web/1.0.0.wasm", length=1, sha256="0" * 64, manifest_sha256="")
    change = Change(instance="web", assignment=1, state=State(phase=Phase.FETCHING), item=item)
    agent.db.store.apply(Transition(change=change))
    async with running(agent) as task:
        peer, _ = await asyncio.get_running_loop().sock_accept(host)
        await asyncio.to_thread(_answer_hello, peer, 1)
        async with asyncio.timeout(60):
            await agent.host.ready.wait()
        agent.service.stop()
        assert await task == 0
        assert not agent.host.connected
        peer.close()


@pytest.mark.asyncio
async def test_an_unreadable_store_ends_the_agent_with_1(agent, monkeypatch):
    def damaged(store):
        raise sqlite3.DatabaseError("damaged")

    monkeypatch.setattr(Store, "changes", damaged)
    assert await agent.service.run() == 1
    assert await agent.is_closed()


@pytest.mark.asyncio
async def test_each_connection_announces_the_device_and_resends_reports(agent):
    async with running(agent):
        for turn in (1, 2):
            sent = len(agent.broker.bodies(Up.REPORT))
            agent.broker.connect()
            await agent.broker.until(lambda turn=turn: len(agent.broker.bodies(Up.HELLO)) == turn)
            await agent.broker.until(lambda sent=sent: len(agent.broker.bodies(Up.REPORT)) > sent)
            states = [wire.decode(Online, body) for body in agent.broker.bodies(Up.STATE)]
            assert [state.online for state in states] == [True] * turn
            assert len({wire.decode(Hello, body).nonce for body in agent.broker.bodies(Up.HELLO)}) == turn
            assert set(sequences(agent.broker.bodies(Up.REPORT))) == {1}
            agent.broker.queue.put_nowait(Disconnected("it was lost"))
        # Acknowledged reports are not sent again.
        agent.broker.say(Down.ACK, wire.encode(Ack(sequence=1)))
        await agent.broker.queue.join()
        sent, told = len(agent.broker.bodies(Up.REPORT)), len(agent.broker.bodies(Up.HEALTH))
        agent.broker.connect()
        await agent.broker.until(lambda: len(agent.broker.bodies(Up.HEALTH)) > told)
        assert len(agent.broker.bodies(Up.REPORT)) == sent


@pytest.mark.asyncio
async def test_a_restarted_host_is_ready_only_after_the_restoration(agent, host):
    async with running(agent):
        loop = asyncio.get_running_loop()
        for turn in (1, 2):
            peer, _ = await loop.sock_accept(host)
            peer.setblocking(False)
            await asyncio.to_thread(_answer_hello, peer, turn)
            async with asyncio.timeout(60):
                await agent.host.ready.wait()
            assert agent.host.welcome.session == str(turn)
            peer.close()
            await eventually_async(lambda: not agent.host.ready.is_set(), "the host is missed")


def _answer_hello(peer, turn):
    peer.setblocking(True)
    request, _ = host_api.receive_request(peer)
    assert isinstance(request, host_api.Hello)
    host_api.send(
        peer,
        host_api.Welcome(
            id=request.id,
            session=str(turn),
            version="1",
            engine="50",
            containment={},
            ingress="",
            running=(),
            protocol=host_api.OLDEST_PROTOCOL,
        ),
    )


class Wishes:
    """Recorder of a session's requests to receiver and uplink."""

    def __init__(self):
        self.polls, self.resent = [], []

    def session(self, broker, clock):
        return FleetSession(
            mqtt=broker,
            receiver=SimpleNamespace(refresh_later=self.polls.append),
            commands=None,
            uplink=SimpleNamespace(reconnected=lambda: self.resent.append(True)),
            presence=None,
            clock=clock,
        )


@pytest.mark.asyncio
async def test_pokes_are_rate_limited():
    broker, wishes, now = Broker(), Wishes(), [1000.0]
    task = asyncio.ensure_future(wishes.session(broker, lambda: now[0]).run())

    async def poke(payload):
        broker.queue.put_nowait(Message(POKE, payload))
        await broker.queue.join()

    good = wire.encode(Poke(jitter_s=0))
    await poke(b'{"jitter_s": -1}')
    assert wishes.polls == [], "one that cannot be read"
    await poke(good)
    await poke(good)
    assert wishes.polls == [0.0], "and it does not count for the limit"
    await eventually_async(lambda: wishes.resent == [True], "reports are sent again")
    now[0] += session_module.POKES_MIN_S - 1
    await poke(good)
    assert wishes.polls == [0.0]
    now[0] += 1
    await poke(good)
    assert wishes.polls == [0.0, 0.0]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
