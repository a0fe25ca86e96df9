"""Minimum rate of clients at the router, by a clock that the test sets."""

import asyncio
import contextlib
import mmap
import socket

import pytest
from whole_calls import WholeCalls

from agent.host.http import pace, proxy, router
from agent.host.http.pace import MIN_BYTES_PER_S, WINDOW_S, Pace
from agent.host.http.routing import RouteTable
from tests.eventually import eventually_async

HEAD = b"POST /web/a HTTP/1.1\r\nhost: board\r\ncontent-length: 1000000\r\n\r\n"
HONEST_BYTES_PER_S = 64_000 // 8
STEP_S = router._SWEEP_S


def looked_at(*movements, step_s=STEP_S, turn=0):
    """Return for each look whether a client is slow of which so many bytes moved since the look before."""
    watched, moved, found = Pace(), 0, [Pace().is_slow(0.0, 0, turn)]
    watched.is_slow(0.0, 0, turn)
    for number, more in enumerate(movements, 1):
        moved += more
        found.append(watched.is_slow(number * step_s, moved, turn))
    return found[1:]


def test_a_byte_now_and_then_is_too_slow_and_64_kbit_s_is_not():
    assert looked_at(*[2] * 4) == [False, True, False, True]
    assert looked_at(*[HONEST_BYTES_PER_S * STEP_S] * 4) == [False] * 4
    assert looked_at(0, MIN_BYTES_PER_S * WINDOW_S) == [False, False], "silent for a moment"
    assert looked_at(0, MIN_BYTES_PER_S * WINDOW_S - 1) == [False, True]


def test_time_in_which_nothing_is_awaited_does_not_count():
    watched = Pace()
    for now_s, turn in ((0, 1), (29, 2), (58, None), (59, 2), (88, 2)):
        assert not watched.is_slow(now_s, 0, turn)
    assert watched.is_slow(89, 0, 2)


class Web:
    """Router with an instance that answers at once; its clients, looked at by the test's clock."""

    def __init__(self):
        self.now_s = 1000.0
        ours, theirs = socket.socketpair()
        self._kept = ours
        self.router = router.Router(None, theirs, router.SharedClients(mmap.mmap(-1, 4096)))
        self.routes = RouteTable()
        self.routes.up["web"] = True
        self.came = asyncio.Event()
        self.calls = self.router._instances.calls["web"] = WholeCalls(self.came)

    def client(self):
        made = proxy.ClientConnection(self.routes, self.router._instances, self.router._clients)
        made.last_s = self.now_s
        return made

    def monotonic(self):
        return self.now_s

    @property
    def only(self):
        (one,) = self.router._clients
        return one

    def pass_time(self, seconds=STEP_S):
        self.now_s += seconds
        self.router.mind_clients(self.now_s)


@contextlib.asynccontextmanager
async def web(monkeypatch):
    async with asyncio.timeout(30):
        board = Web()
        monkeypatch.setattr(proxy, "time", board)
        listening = await asyncio.get_running_loop().create_server(board.client, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
        yield board, reader, writer
        writer.close()
        listening.close()


async def until(condition):
    await eventually_async(condition, "the router's turn", within_s=30, pause_s=0.001)


async def received(board, count):
    """Wait until the router has read so many bytes from its client."""
    await until(lambda: board.router._clients and board.only._received >= count)


@pytest.mark.parametrize("begin", [b"GET /", HEAD + b"x"])
@pytest.mark.asyncio
async def test_the_router_ends_a_request_of_a_byte_every_eight_seconds(monkeypatch, begin):
    async with web(monkeypatch) as (board, reader, writer):
        sent = len(begin)
        writer.write(begin)
        await received(board, sent)
        board.pass_time(0)
        for _ in range(4):
            writer.write(b"x")
            sent += 1
            await received(board, sent)
            board.pass_time(8)
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 408 ")
        assert b"too slowly" in await reader.read()


@pytest.mark.parametrize("begin", [b"GET /web/a HTTP/1.1\r\nx: ", HEAD])
@pytest.mark.asyncio
async def test_the_router_waits_for_a_request_over_64_kbit_s(monkeypatch, begin):
    async with web(monkeypatch) as (board, _, writer):
        sent = len(begin)
        writer.write(begin)
        each = HONEST_BYTES_PER_S if begin is HEAD else MIN_BYTES_PER_S
        for _ in range(64_000 // STEP_S // each):
            data = b"x" * (each * STEP_S)
            writer.write(data)
            sent += len(data)
            await received(board, sent)
            board.pass_time()
        assert not board.only._transport.is_closing()


@pytest.mark.asyncio
async def test_empty_lines_between_requests_do_not_keep_a_connection(monkeypatch):
    async with web(monkeypatch) as (board, reader, writer):
        for number in range(1, router.IDLE_S // STEP_S + 2):
            writer.write(b"\r\n")
            await received(board, 2 * number)
            if number <= router.IDLE_S // STEP_S:
                assert board.router._clients
            board.pass_time()
        assert await reader.read() == b""


@pytest.mark.parametrize("requests", [1, 2])
@pytest.mark.parametrize("each", [1, HONEST_BYTES_PER_S * STEP_S])
@pytest.mark.asyncio
async def test_the_router_ends_an_answer_that_is_read_a_byte_now_and_then(monkeypatch, each, requests):
    async with web(monkeypatch) as (board, _, writer):
        taken = 0
        monkeypatch.setattr(proxy.ClientConnection, "_taken", lambda self: taken)
        board.calls.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 40000000\r\n\r\n" + b"x" * 40_000_000
        writer.transport.pause_reading()
        writer.write(b"GET /web/a HTTP/1.1\r\nhost: board\r\n\r\n" * requests)
        await until(lambda: board.router._clients and board.only._full)
        client = board.only
        board.pass_time(0)
        for _ in range(router.IDLE_S // STEP_S + 2):
            taken += each
            board.pass_time()
        assert client._transport.is_closing() == (each == 1)


@pytest.mark.asyncio
async def test_what_a_client_has_taken_grows_as_it_reads(monkeypatch):
    async with web(monkeypatch) as (board, reader, writer):
        writer.write(b"GET /web/a HTTP/1.1\r\nhost: board\r\n\r\n")
        assert (await reader.readuntil(b"hi")).endswith(b"hi")
        client = board.only
        await until(lambda: client._taken() >= 2 * len(board.calls.answer))  # left the process, and acknowledged
        assert client._transport.get_write_buffer_size() == 0


def test_the_kernel_knows_what_a_tcp_client_has_taken_and_of_others_nothing():
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as ours:
        before = pace.acknowledged(ours)
        ours.sendall(b"x" * 1000)
        client.recv(1000, socket.MSG_WAITALL)
        client.sendall(b"y")
        ours.recv(1)
        assert pace.acknowledged(ours) - before == 1000
    one, other = socket.socketpair()
    with one, other:
        assert pace.acknowledged(one) == 0
