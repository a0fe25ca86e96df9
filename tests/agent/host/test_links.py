"""Full sockets between agent, host and its processes: no message is lost, and no sender waits forever."""

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path

import msgspec
import pytest
import support

from agent.host.ipc import framing, helper_api, host_api
from agent.host.ipc.packet_writer import PacketWriter
from agent.host.supervisor import helpers
from agent.host.supervisor.helpers import EgressHandle, RouterHandle
from agent.host.supervisor.worker_pool import ZygotePool
from agent.link import host_client
from agent.link.host_client import HostClient, HostRefusedError
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants

LONG = "x" * 150_000  # a few requests with it fill any socket
MANY = 24


@pytest.fixture
def own_host(tmp_path):
    """A host of this test's own, which may stop it."""
    host = support.Host(tmp_path)
    yield host
    host.process.send_signal(signal.SIGCONT)
    host.close()


def open_here():
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.asynccontextmanager
async def linked(host):
    """Yield a link to a host that reads nothing until `go_on()`, and that function."""
    link = HostClient(host.runtime / "host.sock")
    await link.connect()
    host.process.send_signal(signal.SIGSTOP)
    try:
        yield link, lambda: host.process.send_signal(signal.SIGCONT)
    finally:
        link.close()


async def begun(asks):
    """Tasks that have got as far as they get while nobody reads."""
    tasks = [asyncio.ensure_future(ask) for ask in asks]
    await asyncio.sleep(0)  # one step of each: it sends, or finds the socket full
    return tasks


@pytest.mark.asyncio
async def test_every_sender_that_waited_for_a_full_socket_is_answered(own_host):
    async with linked(own_host) as (link, go_on):
        tasks = await begun(
            link.ask(host_api.Stop, host_api.Done, instance=f"{LONG}{number}") for number in range(MANY)
        )
        tasks += await begun([link.ask(host_api.Status, host_api.HostStats)])
        go_on()
        answers = await asyncio.gather(*tasks)
        assert [type(answer) for answer in answers] == [host_api.Done] * MANY + [host_api.HostStats]
        assert len({answer.id for answer in answers}) == MANY + 1
        assert link.connected


@pytest.mark.asyncio
async def test_a_request_that_was_given_up_before_it_was_sent_is_never_sent(tmp_path):
    link = HostClient(tmp_path / "host.sock")
    with host_api.new_socket() as listener, (tmp_path / "image").open("wb") as image:
        listener.bind(str(tmp_path / "host.sock"))
        listener.listen()
        listener.setblocking(False)
        connecting = asyncio.ensure_future(link.connect())
        peer, _ = await asyncio.get_running_loop().sock_accept(listener)
        peer.setblocking(False)
        ((hello, _),) = await requests(peer, 1)
        host_api.send(peer, welcome(hello))
        await connecting

        waiting = await begun(link.ask(host_api.Stop, host_api.Done, instance=LONG) for _ in range(MANY))
        before = open_here()
        start = link.ask(host_api.Start, host_api.Started, fd=image.fileno(), run=support.a_run("web", 1))
        (given_up,) = await begun([start])
        waiting += await begun([link.ask(host_api.Restart, host_api.Done, instance="web")])
        given_up.cancel()
        await asyncio.wait([given_up])
        assert open_here() == before, "the copy of its descriptor is closed"

        for request, fd in await requests(peer, MANY + 1):
            assert (type(request), fd) in {(host_api.Stop, None), (host_api.Restart, None)}
            host_api.send(peer, host_api.Done(id=request.id))
        assert all(await asyncio.gather(*waiting))
        link.close()
        peer.close()


def welcome(hello):
    return host_api.Welcome(
        id=hello.id,
        session="s",
        version="1",
        engine="50",
        containment={},
        ingress="",
        running=(),
        protocol=host_api.PROTOCOL,
    )


async def requests(sock, count):
    """The next requests, with their descriptors."""
    found = []
    while len(found) < count:
        with contextlib.suppress(BlockingIOError):
            found.append(host_api.receive_request(sock))
            continue
        await readable(sock)
    return found


async def readable(sock):
    event = asyncio.Event()
    asyncio.get_running_loop().add_reader(sock, event.set)
    await event.wait()
    asyncio.get_running_loop().remove_reader(sock)


@pytest.mark.asyncio
async def test_a_descriptor_is_sent_as_it_was_given_however_long_it_waits():
    """Who gave it may close it, and its number may be another file's by then."""

    ours, theirs = framing.socket_pair()
    ours.setblocking(False)
    theirs.setblocking(False)
    writer = PacketWriter(ours, lambda error: pytest.fail(str(error)))
    while not len(writer):
        writer.send(b"x" * 100_000)
    read, write = os.pipe()
    writer.send(b"with a descriptor", write)
    os.close(write)
    other = os.dup(read)  # takes the number
    for _ in range(MANY):
        data, fds = await received(theirs)
        if fds:
            break
    assert data == b"with a descriptor"
    os.write(fds[0], b"it is the pipe")
    assert os.read(read, 100) == b"it is the pipe"
    for fd in (read, other, *fds):
        os.close(fd)
    writer.close()
    ours.close()
    theirs.close()


async def received(sock):
    """The next packet."""
    while True:
        try:
            return framing.receive_packet(sock)
        except BlockingIOError:
            await readable(sock)


@pytest.mark.asyncio
async def test_a_request_too_large_for_a_packet_is_refused_and_the_others_go_on(own_host):
    async with linked(own_host) as (link, go_on):
        others = await begun(link.ask(host_api.Status, host_api.HostStats) for _ in range(3))
        with pytest.raises(HostRefusedError) as refused:
            await link.ask(host_api.Stop, host_api.Done, instance=2 * LONG)
        assert refused.value.failed.code is RejectCode.TOO_LARGE
        go_on()
        assert len(await asyncio.gather(*others)) == 3


@pytest.mark.asyncio
async def test_a_host_that_ends_while_senders_wait_tells_all_of_them(own_host):
    async with linked(own_host) as (link, _go_on):
        tasks = await begun(link.ask(host_api.Stop, host_api.Done, instance=LONG) for _ in range(MANY))
        own_host.process.kill()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(answer) for answer in answers} == {host_client.HostGoneError}
        assert not link.connected


def flood(path):
    """Ask and never read, until the host has had enough; the socket, which stays open."""
    sock = host_api.new_socket()
    sock.settimeout(60)
    sock.connect(str(path))
    with contextlib.suppress(host_api.IpcError):
        while True:
            host_api.send(sock, host_api.Hello(id=1))
    return sock


def test_peers_that_never_read_are_dropped_and_block_no_other(own_host):
    path = own_host.runtime / "host.sock"
    flooding = [flood(path) for _ in range(10)]  # more than may be connected at once
    with contextlib.closing(own_host.connect()) as sock:
        host_api.send(sock, host_api.Status(id=7))
        assert isinstance(host_api.receive_from_host(sock), host_api.HostStats)
    for each in flooding:
        each.close()


def status_of(port, instance):
    return support.http(port, f"GET /{instance}/ HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")[0]


@pytest.mark.asyncio
async def test_a_router_that_is_replaced_knows_every_instance_however_many():
    """More messages than its socket holds, since it reads none before it is confined."""
    names = [f"i{number}" for number in range(1000)]

    with socket.create_server(("127.0.0.1", 0)) as ingress:
        port = ingress.getsockname()[1]
        front = RouterHandle(ingress)
        try:
            for name in names:
                await front.update(name, up=False)
            fork, again = front._fork, asyncio.Event()
            front._fork = lambda: (fork(), again.set())  # nothing public tells of another router
            os.kill(front.pid, signal.SIGKILL)
            await again.wait()
            await front.update("last", up=False)
            found = await asyncio.to_thread(lambda: [status_of(port, name) for name in ("nobody", *names, "last")])
        finally:
            front.close()
    assert found[0] == 404
    assert set(found[1:]) == {503}


@pytest.mark.asyncio
async def test_a_zygote_that_is_slow_to_read_forks_every_worker_in_the_end():
    nursery = ZygotePool()
    try:
        await nursery.fork("main", "first", fuel=False)
        (zygote,) = nursery._zygotes.values()
        zygote._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least: a few packets, not hundreds
        zygote.process.send_signal(signal.SIGSTOP)
        asked = await begun(nursery.fork("main", f"l{n}", fuel=False) for n in range(MANY))
        zygote.process.send_signal(signal.SIGCONT)
        lanes = await asyncio.gather(*asked)
        assert list(nursery._zygotes.values()) == [zygote], "it was not taken for dead"
        assert len({lane.pid for lane in lanes}) == MANY
    finally:
        nursery.close()


@pytest.mark.asyncio
async def test_an_egress_that_is_replaced_knows_every_worker_however_many(tmp_path, monkeypatch):
    """More messages than its socket holds, since it reads none before it is confined."""
    fork = helpers.fork_egress

    def fork_with_little_room(directory):
        pid, sock = fork(directory)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least: a few packets, not hundreds of workers
        return pid, sock

    monkeypatch.setattr(helpers, "fork_egress", fork_with_little_room)

    outlet = EgressHandle(tmp_path)
    try:
        lanes = [outlet.admit("web", Grants(outbound=("http://127.0.0.1:1",))).worker_end for _ in range(MANY)]
        fork_again, again = outlet._fork, asyncio.Event()
        outlet._fork = lambda: (fork_again(), again.set())  # nothing public tells of another egress
        os.kill(outlet.pid, signal.SIGKILL)
        await again.wait()
        told = await asyncio.gather(*(asyncio.to_thread(refused, lane) for lane in lanes))
        assert set(told) == {"HTTP-request-denied"}
    finally:
        outlet.close()
        for lane in lanes:
            lane.close()


def refused(lane):
    """What the egress says to a connection that nobody granted."""
    lane.settimeout(30)
    lane.send(
        msgspec.json.encode(helper_api.ConnectRequest(id=1, scheme="http", authority="127.0.0.1:2", timeout_ms=1000))
    )
    reply = msgspec.json.decode(lane.recv(4096), type=helper_api.ConnectReply)
    if reply.id == helper_api.RESTARTED:  # from an egress that took the place of another
        reply = msgspec.json.decode(lane.recv(4096), type=helper_api.ConnectReply)
    return reply.error
