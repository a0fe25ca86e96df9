"""Shares of the router: whatever the clients or the worker of one instance do, others get their turn."""

import asyncio
import contextlib
import fcntl
import socket
import struct
import subprocess
import sys
import termios

import pytest
from router_board import GET, HEAD, board

from agent.host.http import channel, router
from agent.host.ipc.frames import Frame, Kind
from agent.host.ipc.helper_api import AddListener

REFUSED = b"GET /nobody HTTP/1.1\r\nhost: x\r\n\r\n"
CONNECTIONS, REQUESTS = 40, 100
ANSWER_BYTES = 100  # of a refusal at least


def unread_bytes(sock):
    return struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, b"\0" * 4))[0]


@pytest.mark.asyncio
async def test_a_flood_of_requests_that_need_no_worker_leaves_a_neighbour_its_turn(tmp_path):
    """Four thousand requests are there at once; the router has the loop of this test, so nothing passes meanwhile."""
    async with board(tmp_path) as the_board:
        the_board.share("other", tmp_path)
        worker, neighbour = await the_board.worker(instance="other"), await the_board.client(shared=True)
        with contextlib.ExitStack() as stack:
            floods = [stack.enter_context(socket.create_connection(the_board.shared)) for _ in range(CONNECTIONS)]
            answers = 0
            for _ in range(3):
                for flood in floods:
                    flood.sendall(REFUSED * (REQUESTS if answers else 1))
                neighbour.ask(GET.replace(b"/a", b"/other/"))
                await worker.answer_to(neighbour)
                answers = sum(unread_bytes(flood) for flood in floods) // ANSWER_BYTES
                assert answers < CONNECTIONS * REQUESTS / 2, "one answer is worth a few hundred of these"


@pytest.mark.asyncio
async def test_a_worker_that_sends_its_answer_byte_by_byte_leaves_another_its_turn(tmp_path):
    async with board(tmp_path) as the_board:
        the_board.share("other", tmp_path)
        tiny = await the_board.worker()
        other = await the_board.worker(instance="other")
        first, second = await the_board.client(), await the_board.client(shared=True)
        first.ask()
        call = (await tiny.next(Kind.WHOLE_REQUEST)).call
        second.ask(GET.replace(b"/a", b"/other/"))
        theirs = (await other.next(Kind.WHOLE_REQUEST)).call
        pieces = [Frame(Kind.BODY, call, b"x")] * 6000
        tiny.say(Frame(Kind.RESPONSE, call, HEAD), *pieces, Frame(Kind.END, call, b"0 whole\r\n\r\n"))
        other.answer(theirs)
        answers = [asyncio.ensure_future(client.answer()) for client in (first, second)]
        done, _ = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
        assert done == {answers[1]}
        assert len((await answers[0])[2]) == 6000


@pytest.mark.asyncio
async def test_who_waits_for_one_instance_takes_no_more_of_the_shared_port_than_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(router, "_CLIENTS_MAX", 12)
    async with board(tmp_path) as the_board:
        the_board.share("flooded", tmp_path)
        the_board.share("other", tmp_path)
        stuck, other = await the_board.worker(instance="flooded"), await the_board.worker(instance="other")
        refused = []
        for _ in range(30):
            client = await the_board.client(shared=True)
            client.ask(GET.replace(b"/a", b"/flooded/"))
            await asyncio.sleep(0)
            refused.append(asyncio.ensure_future(client.answer()))
        await stuck.next()
        done, waiting = await asyncio.wait(refused, return_when=asyncio.FIRST_COMPLETED)
        assert {(await each)[:1] for each in done} == {(503,)}
        assert (await done.pop())[1][b"connection"] == b"close"
        neighbour = await the_board.client(shared=True)
        neighbour.ask(GET.replace(b"/a", b"/other/"))
        other.answer((await other.next(Kind.WHOLE_REQUEST)).call)
        assert (await neighbour.answer())[0] == 200
        for each in waiting:
            each.cancel()


@pytest.mark.asyncio
async def test_a_full_port_ends_the_connection_that_is_idle_for_longest(tmp_path, monkeypatch):
    monkeypatch.setattr(router, "_CLIENTS_MAX", 2)
    monkeypatch.setattr(router, "_IDLE_WHERE_FULL_S", 0)
    async with board(tmp_path) as the_board:
        the_board.share("web2", tmp_path)
        worker = await the_board.worker(instance="web2")
        clients = []
        for _ in range(3):
            clients.append(await the_board.client(shared=True))
            clients[-1].ask(GET.replace(b"/a", b"/web2/"))
            worker.answer((await worker.next(Kind.WHOLE_REQUEST)).call)
            assert (await clients[-1].answer())[0] == 200
        assert await clients[0].reader.read() == b""
        clients[1].ask(GET.replace(b"/a", b"/web2/"))
        worker.answer((await worker.next(Kind.WHOLE_REQUEST)).call)
        assert (await clients[1].answer())[0] == 200


@pytest.mark.asyncio
async def test_clients_of_a_listener_that_was_replaced_keep_their_places_until_they_are_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(router, "_ALL_OWN_CLIENTS_MAX", 1)
    async with board(tmp_path) as the_board:
        worker, first = await the_board.worker(), await the_board.client()
        first.ask()
        call = (await worker.next(Kind.WHOLE_REQUEST)).call
        listener = socket.create_server(("127.0.0.1", 0))
        the_board.address = listener.getsockname()
        the_board.tell(AddListener("web"), listener.detach())
        second = await the_board.client()
        second.ask()
        for _ in range(20):
            worker.say(Frame(Kind.NUDGE, 0))
            assert (await worker.next()).kind is Kind.NUDGE, "there is no place yet"
        worker.answer(call)
        assert (await first.answer())[0] == 200
        await worker.answer_to(second)


@pytest.mark.asyncio
async def test_large_bodies_that_are_kept_until_they_are_whole_take_turns(tmp_path, monkeypatch):
    size = 8 << 20
    monkeypatch.setattr(channel, "KEPT_BYTES", size)
    async with board(tmp_path) as the_board:
        worker = await the_board.worker(whole=True, request_bytes=size)
        head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
        first, second, small = [await the_board.client() for _ in range(3)]
        first.ask(head % 300_000 + b"1" * 200_000)
        small.ask(GET)
        await worker.answer_to(small)  # by now the router has what the first one sent
        second.ask(head % size + b"2" * size)
        first.ask(b"1" * 100_000)
        call = (await worker.next(Kind.REQUEST)).call
        assert second.writer.transport.get_write_buffer_size() > size // 4, "its body waits where it came from"
        assert await worker.body() == b"1" * 300_000
        worker.answer(call)
        call = (await worker.next(Kind.REQUEST)).call
        assert await worker.body() == b"2" * size
        worker.answer(call)
        assert [(await client.answer())[0] for client in (first, second)] == [200, 200]


NO_DESCRIPTORS = """
import asyncio, resource, socket
from agent.host.http import router

async def main():
    listener = socket.create_server(("127.0.0.1", 0))
    made = []
    welcome = lambda self, sock, peer=None: made.append(sock)
    router.Acceptor.welcome = welcome
    asked = []
    class Counted(socket.socket):
        def accept(self):
            asked.append(1)
            return super().accept()
    listener = Counted(fileno=listener.detach())
    clients = [socket.create_connection(listener.getsockname()) for _ in range(2)]
    lowest = resource.getrlimit(resource.RLIMIT_NOFILE)
    acceptor = router.Acceptor(listener, None, lambda: True)
    free = clients[-1].fileno() + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, lowest[1]))
    for _ in range(200):
        await asyncio.sleep(0)
    tried = len(asked)
    resource.setrlimit(resource.RLIMIT_NOFILE, lowest)
    while len(made) < 2:
        await asyncio.sleep(0.01)
    print(tried)

asyncio.run(main())
"""


def test_a_router_without_a_descriptor_left_does_not_ask_for_one_again_and_again():
    done = subprocess.run(
        [sys.executable, "-c", NO_DESCRIPTORS], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) == 1, done
