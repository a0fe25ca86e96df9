"""Connections of the router's clients, before an instance that answers at once."""

import asyncio
import contextlib
import mmap
import socket
from dataclasses import dataclass, field
from functools import partial

import pytest
from router_board import board
from whole_calls import WholeCalls

from agent.host.http import parser, proxy, router
from agent.host.http.routing import RouteTable
from agent.host.ipc import framing, helper_api
from agent.host.ipc.frames import Kind

GET = b"GET /web/a HTTP/1.1\r\nhost: board\r\n\r\n"


@contextlib.asynccontextmanager
async def story(client=proxy.ClientConnection):
    """Yield `calls, routes, instances, ask`, where `ask(request)` is one exchange on the same connection."""
    routes, instances = RouteTable(), proxy.Instances()
    calls = instances.calls["web"] = WholeCalls()
    routes.up["web"] = True
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(30):
        server = await loop.create_server(lambda: client(routes, instances, proxy.Clients()), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())

        async def ask(request):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            return head.split()[1], await reader.readexactly(length)

        yield calls, routes, instances, ask
        writer.close()
        server.close()


@dataclass
class Seen:
    received: int = 0
    waiting: int = 0
    most_waiting: int = 0
    stopped: asyncio.Event = field(default_factory=asyncio.Event)


class Watched(proxy.ClientConnection):
    """A client's connection that tells what it reads."""

    def __init__(self, seen, *rest):
        super().__init__(*rest)
        self.seen = seen

    def connection_made(self, transport):
        super().connection_made(transport)
        pause = transport.pause_reading
        transport.pause_reading = lambda: (pause(), self.seen.stopped.set())

    def data_received(self, data):
        self.seen.received += len(data)
        super().data_received(data)

    def head(self, head):
        super().head(head)
        self.seen.waiting += 1
        self.seen.most_waiting = max(self.seen.most_waiting, self.seen.waiting)

    def answered(self, exchange):
        self.seen.waiting -= 1
        super().answered(exchange)


@pytest.mark.asyncio
async def test_a_body_is_read_no_faster_than_the_guest_reads_it_and_to_its_end(tmp_path, monkeypatch):
    length, seen = 4 << 20, Seen()
    monkeypatch.setattr(router, "ClientConnection", lambda *rest, **named: partial(Watched, seen)(*rest))
    async with board(tmp_path) as the_board:
        worker, client = await the_board.worker(), await the_board.client()
        request = b"POST / HTTP/1.1\r\nhost: board\r\ncontent-length: %d\r\n\r\n" % length
        client.ask(request + bytes(length))
        call = (await worker.next(Kind.REQUEST)).call
        await seen.stopped.wait()
        assert seen.received < length // 4
        assert len(await worker.body()) == length
        worker.answer(call)
        assert (await client.answer())[0] == 200
        assert seen.received == len(request) + length


@pytest.mark.asyncio
async def test_of_requests_sent_ahead_no_more_are_read_before_those_are_answered_that_were():
    request = GET[:-2] + b"x-long: %b\r\n\r\n" % (b"x" * 4096)
    number, seen = 400, Seen()
    async with story(partial(Watched, seen)) as (_calls, _routes, _instances, ask):
        assert await ask(request * number) == (b"200", b"hi")
        for _ in range(number - 1):
            assert await ask(b"") == (b"200", b"hi")
        assert seen.received == number * len(request)
        assert seen.most_waiting <= 2


@pytest.mark.asyncio
async def test_a_thousand_requests_sent_at_once_are_answered():
    async with story() as (_calls, _routes, _instances, ask):
        requests = b"GET / HTTP/1.1\r\nhost: b\r\n\r\n" * 1000
        assert (await ask(requests))[0] == b"404"
        for _ in range(999):
            assert (await ask(b""))[0] == b"404"


@pytest.mark.asyncio
async def test_what_comes_again_is_not_read_again_and_means_the_same(monkeypatch):
    read = []
    feed = parser.RequestParser.feed
    monkeypatch.setattr(parser.RequestParser, "feed", lambda self, data: (read.append(data), feed(self, data))[1])
    async with story() as (calls, _routes, _instances, ask):
        post = b"POST /web/b HTTP/1.1\r\nhost: board\r\ncontent-length: 3\r\n\r\n"
        for request in (GET, GET, post + b"abc", GET, GET.replace(b"board", b"other"), GET):
            assert (await ask(request))[0] == b"200"
        assert read == [GET, post, b"abc", GET.replace(b"board", b"other")]
        same = b"GET /a http %b\r\nhost: %b\r\nx-forwarded-prefix: /web\r\n"
        heads = [asked.head for asked in calls.asked if not asked.body]
        assert heads == [same % (b"board", b"board")] * 3 + [same % (b"other", b"other"), same % (b"board", b"board")]


@pytest.mark.asyncio
async def test_a_client_from_outside_does_not_say_how_many_neighbours_it_came_through():
    """Else it could make a component's own requests to its neighbours fail."""
    async with story() as (calls, _routes, _instances, ask):
        for _ in range(2):  # read, and known
            assert (await ask(GET[:-2] + b"X-Wasmfleet-Hops: 4\r\nx-mine: 1\r\n\r\n"))[0] == b"200"
        assert [b"x-mine: 1\r\n" in asked.head for asked in calls.asked] == [True, True]
        assert not [asked for asked in calls.asked if b"hops" in asked.head.lower()]


@pytest.mark.asyncio
async def test_what_is_known_is_forgotten_when_an_instance_goes():
    async with story() as (_calls, routes, instances, ask):
        assert (await ask(GET))[0] == b"200"
        assert instances.known
        the_router = router.Router(None, None, router.SharedClients(mmap.mmap(-1, 4096)))
        the_router._routes, the_router._instances = routes, instances
        the_router._heed(helper_api.RouteRemove("web"))
        assert (await ask(GET))[0] == b"404"
        the_router._heed(helper_api.RouteUpdate("web", up=False))
        assert (await ask(GET))[0] == b"503"
        the_router._heed(helper_api.RouteUpdate("web", up=True))
        assert (await ask(GET))[0] == b"200"


@pytest.mark.asyncio
async def test_an_instance_whose_workers_are_not_there_yet_is_not_answering():
    async with story() as (_calls, _routes, instances, ask):
        calls = instances.calls.pop("web")
        status, body = await ask(GET)
        assert (status, b"not answering" in body) == (b"503", True)
        instances.calls["web"] = calls
        assert (await ask(GET))[0] == b"200"


@pytest.mark.asyncio
async def test_clients_beyond_what_the_router_takes_wait_until_one_has_gone(monkeypatch):
    monkeypatch.setattr(router, "_CLIENTS_MAX", 2)
    async with asyncio.timeout(30):
        listener = socket.create_server(("127.0.0.1", 0))
        ours, theirs = framing.socket_pair()
        page = mmap.mmap(-1, 4096)
        the_router = router.Router(listener, theirs, router.SharedClients(page))
        the_router._routes.up["web"] = True
        the_router._instances.calls["web"] = WholeCalls()
        running = asyncio.ensure_future(the_router.run())
        clients = [await asyncio.open_connection(*listener.getsockname()) for _ in range(4)]
        for _, writer in clients:
            writer.write(GET)
        for reader, writer in clients:
            assert (await reader.readuntil(b"\r\n\r\nhi")).startswith(b"HTTP/1.1 200")
            assert len(the_router._clients) <= router.clients_of(page) <= 2
            writer.close()
        ours.close()
        await running
