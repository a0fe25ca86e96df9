"""Socket for the agent: order of events and replies, limits of a connection, internal errors."""

import asyncio
import socket

import pytest
import pytest_asyncio

from agent.host.ipc import host_api
from agent.host.supervisor import agent_server
from agent.host.supervisor.agent_server import AgentServer
from fleet.protocol.codes import InstanceState


class Handler:
    """Reports two changes before each reply; fails for an instance called bad."""

    def __init__(self, events):
        self.events = events
        self.gone = asyncio.Event()

    async def handle(self, request, fd):
        for state in (InstanceState.BACKOFF, InstanceState.RUNNING):
            self.events.put_nowait(host_api.Changed(instance="web", generation=request.id, state=state))
        if request.instance == "bad":
            raise ZeroDivisionError("a bug")
        return host_api.Done(id=request.id)

    def agent_gone(self):
        self.gone.set()


@pytest_asyncio.fixture
async def served(tmp_path):
    """A server, its handler, and a function that connects to it."""
    events = asyncio.Queue()
    handler = Handler(events)
    server = AgentServer(agent_server.open_listener(tmp_path, None), handler, events, agent_group=None)
    server.start()
    sockets = []

    def connect():
        sock = host_api.new_socket()
        sock.connect(str(tmp_path / agent_server.SOCKET_NAME))
        sock.settimeout(30)
        sockets.append(sock)
        return sock

    yield handler, connect
    server.stop_accepting()
    server.close()
    for sock in sockets:
        sock.close()


def send_many(sock, count):
    for number in range(count):
        host_api.send(sock, host_api.Stop(id=number, instance="slow"))


async def received(sock, count):
    return [await asyncio.to_thread(host_api.receive_from_host, sock) for _ in range(count)]


@pytest.mark.asyncio
async def test_events_come_before_the_reply_that_they_precede_and_to_every_connection(served):
    _handler, connect = served
    asks, listens = connect(), connect()
    host_api.send(listens, host_api.Stop(id=1, instance="web"))
    await asyncio.gather(received(listens, 3), received(asks, 2))  # both are connected
    for number in (2, 3, 4):
        host_api.send(asks, host_api.Stop(id=number, instance="web"))
        *events, reply = await received(asks, 3)
        assert [event.state for event in events] == ["backoff", "running"]
        assert [event.generation for event in events] == [number, number]
        assert reply == host_api.Done(id=number)
        assert await received(listens, 2) == events


@pytest.mark.asyncio
async def test_an_internal_error_is_reported_and_serving_continues(served, capsys):
    _handler, connect = served
    sock = connect()
    host_api.send(sock, host_api.Restart(id=7, instance="bad"))
    *_, failed = await received(sock, 3)
    assert (failed.id, failed.code) == (7, "internal")
    assert "the host failed" in failed.message
    host_api.send(sock, host_api.Restart(id=8, instance="web"))
    assert (await received(sock, 3))[-1] == host_api.Done(id=8)
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.asyncio
async def test_the_handler_learns_of_the_end_of_the_last_connection(served):
    handler, connect = served
    first, second = connect(), connect()
    for sock in (first, second):
        host_api.send(sock, host_api.Stop(id=1, instance="web"))
        await received(sock, 3)
    first.shutdown(socket.SHUT_RDWR)
    host_api.send(second, host_api.Stop(id=2, instance="web"))
    await received(second, 3)
    assert not handler.gone.is_set()
    second.shutdown(socket.SHUT_RDWR)
    await handler.gone.wait()


@pytest.mark.asyncio
async def test_a_connection_has_so_many_requests_served_at_once_and_the_others_wait(served):
    handler, connect = served
    most, more = agent_server._SERVED_MAX, 20
    begun, all_begun, go_on = [], asyncio.Event(), asyncio.Event()

    async def handle(request, _fd):
        if request.instance == "slow":
            begun.append(request.id)
            if len(begun) == most:
                all_begun.set()
            await go_on.wait()
        return host_api.Done(id=request.id)

    handler.handle = handle
    asks, other = connect(), connect()
    sending = asyncio.ensure_future(asyncio.to_thread(send_many, asks, most + more))
    await all_begun.wait()
    for number in (1, 2):  # another connection is served, and the loop has had its turns
        host_api.send(other, host_api.Stop(id=number, instance="web"))
        assert await received(other, 1) == [host_api.Done(id=number)]
    assert len(begun) == most
    go_on.set()
    await sending
    assert sorted(reply.id for reply in await received(asks, most + more)) == list(range(most + more))


@pytest.mark.asyncio
async def test_a_connection_that_ends_while_many_requests_are_served_is_noticed(served):
    handler, connect = served
    all_begun, go_on, begun = asyncio.Event(), asyncio.Event(), []

    async def handle(request, _fd):
        begun.append(request.id)
        if len(begun) == agent_server._SERVED_MAX:
            all_begun.set()
        await go_on.wait()
        return host_api.Done(id=request.id)

    handler.handle = handle
    sock = connect()
    await asyncio.gather(all_begun.wait(), asyncio.to_thread(send_many, sock, agent_server._SERVED_MAX))
    sock.shutdown(socket.SHUT_RDWR)
    go_on.set()
    await handler.gone.wait()
