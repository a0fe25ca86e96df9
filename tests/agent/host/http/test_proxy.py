"""Proxy of the router, between a client and a simulated instance: connections, pooling, and resent requests."""

import asyncio
import contextlib
import mmap
import socket
from dataclasses import dataclass, field
from functools import partial

import pytest

from agent.host.http import parser, proxy, router
from agent.host.http.routing import RouteTable
from agent.host.ipc import framing, helper_api

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\nhi"
GET = b"GET /web/a HTTP/1.1\r\nhost: board\r\n\r\n"


class Instance:
    """Answers every request, and keeps the heads and the number of connections."""

    def __init__(self):
        self.connections = 0
        self.heads = []

    answer = ANSWER

    async def serve(self, reader, writer):
        self.connections += 1
        while head := await reader.readuntil(b"\r\n\r\n"):
            self.heads.append(head)
            writer.write(self.answer)


class Narrow(proxy.ClientConnection):
    """A client's connection in which little fits."""

    def connection_made(self, transport):
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        transport.set_write_buffer_limits(high=1024)


@contextlib.asynccontextmanager
async def story(tmp_path, client=proxy.ClientConnection, instance=Instance):
    """Yield `instance, routes, pool, ask`, where `ask(request)` is one exchange on the same connection."""
    instance, routes, pool = instance(), RouteTable(), proxy.UpstreamPool(str(tmp_path))
    await asyncio.start_unix_server(instance.serve, tmp_path / "web")
    routes.up["web"] = True
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: client(routes, pool, set()), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())

    async def ask(request):
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return head.split(b" ")[1], await reader.readexactly(length)

    ask.address = server.sockets[0].getsockname()
    try:
        yield instance, routes, pool, ask
    finally:
        writer.close()


@pytest.mark.parametrize(("several_lanes", "connections"), [(False, 1), (True, 10)])
@pytest.mark.asyncio
async def test_a_connection_to_an_instance_is_kept_unless_it_could_wait_for_a_busy_worker(
    tmp_path, several_lanes, connections
):
    async with story(tmp_path) as (instance, _routes, pool, ask):
        if several_lanes:
            pool.spread.add("web")
        for _ in range(10):
            assert await ask(GET) == (b"200", b"hi")
        assert instance.connections == connections


POST = b"POST /web/a HTTP/1.1\r\nhost: board\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        POST,
        GET[:-2] + b"content-length: 2\r\n\r\nab",
        GET.replace(b"GET", b"PATCH"),
    ],
)
@pytest.mark.asyncio
async def test_what_could_not_be_sent_twice_goes_on_no_kept_connection(tmp_path, request_):
    async with story(tmp_path) as (instance, _routes, _pool, ask):
        assert await ask(GET) == (b"200", b"hi")
        for number in range(2, 5):
            assert await ask(request_) == (b"200", b"hi")
            assert instance.connections == number


class Fickle(Instance):
    """Hangs up when told to."""

    def __init__(self):
        super().__init__()
        self.fails = 0  # so many requests it hangs up on
        self.writers = []

    async def serve(self, reader, writer):
        self.connections += 1
        self.writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head)
                if self.fails:
                    self.fails -= 1
                    break
                writer.write(self.answer)
        writer.close()


@pytest.mark.parametrize("says", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil", b"x"])
@pytest.mark.asyncio
async def test_a_kept_connection_that_the_instance_ended_or_spoke_on_out_of_turn_is_not_used(tmp_path, says):
    async with story(tmp_path, instance=Fickle) as (instance, _routes, _pool, ask):
        assert await ask(GET) == (b"200", b"hi")
        if says:
            instance.writers[0].transport.write(says)
        else:
            instance.writers[0].transport.abort()
        # No turn of the loop between: what the kernel knows counts, not what the router was told.
        assert await ask(GET) == (b"200", b"hi")
        assert (instance.connections, len(instance.heads)) == (2, 2)


@pytest.mark.parametrize(("fails", "status", "asked"), [(1, b"200", 3), (2, b"502", 3)])
@pytest.mark.asyncio
async def test_a_request_on_a_kept_connection_that_ends_without_a_word_is_sent_again_once(
    tmp_path, fails, status, asked
):
    async with story(tmp_path, instance=Fickle) as (instance, _routes, _pool, ask):
        assert await ask(GET) == (b"200", b"hi")
        instance.fails = fails
        assert (await ask(GET))[0] == status
        assert (instance.connections, len(instance.heads)) == (2, asked)
        assert await ask(GET) == (b"200", b"hi")


@pytest.mark.asyncio
async def test_a_post_that_an_instance_hung_up_on_is_sent_once(tmp_path):
    async with story(tmp_path, instance=Fickle) as (instance, _routes, _pool, ask):
        assert await ask(GET) == (b"200", b"hi")
        instance.fails = 1
        assert (await ask(POST))[0] == b"502"
        assert [head.split()[0] for head in instance.heads] == [b"GET", b"POST"]


class Patient(Instance):
    """Answers when it is let."""

    def __init__(self):
        super().__init__()
        self.asked, self.let = asyncio.Event(), asyncio.Event()

    async def serve(self, reader, writer):
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head)
                self.asked.set()
                await self.let.wait()
                writer.write(self.answer)


@pytest.mark.asyncio
async def test_a_client_that_hung_up_takes_no_connection_with_it_that_others_use(tmp_path):
    """Its kernel refuses the answer between two words of the router's; that is the client's end, not the instance's.

    Else the connection would be ended after it was kept, and whoever took it meanwhile would be lost with it.
    """

    async with story(tmp_path, instance=Patient) as (instance, _routes, pool, ask):
        reader, stranger = await asyncio.open_connection(*ask.address)
        stranger.write(b"GET /web/a HTTP/1.0\r\n\r\n\x16\x03\x01 no request")
        await instance.asked.wait()
        stranger.close()
        await stranger.wait_closed()
        del reader
        given, give = asyncio.Event(), pool.give
        pool.give = lambda upstream: (give(upstream), given.set())
        instance.let.set()
        await given.wait()
        for _ in range(3):
            assert await ask(GET) == (b"200", b"hi")
        assert (instance.connections, len(instance.heads)) == (1, 4)


@pytest.mark.asyncio
async def test_a_connection_that_the_loop_has_begun_to_end_is_not_taken(tmp_path, monkeypatch):
    """Whatever goes wrong at a client's end: the transport is closing at once, the protocol is told a turn later."""

    async with story(tmp_path) as (_instance, _routes, pool, ask):
        taken = asyncio.get_running_loop().create_future()
        answered = proxy.ClientConnection.answered

        def fail(self, exchange):
            answered(self, exchange)
            again = proxy.Exchange(exchange.request)
            again.instance, again.complete = "web", True
            assert again.light
            asyncio.get_running_loop().call_soon(lambda: taken.set_result(pool.take(again)))
            raise OSError("something went wrong at the client's end")

        monkeypatch.setattr(proxy.ClientConnection, "answered", fail)
        assert await ask(GET) == (b"200", b"hi")
        assert await taken is None


@dataclass
class Seen:
    """What a client's connection in the router has read, and that it reads no further."""

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


class Slow(Instance):
    """Reads the body of a request when it is let."""

    def __init__(self):
        super().__init__()
        self.let = asyncio.Event()

    async def serve(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        await self.let.wait()
        await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        writer.write(self.answer)


@pytest.mark.asyncio
async def test_a_body_is_read_no_faster_than_the_instance_reads_it_and_to_its_end(tmp_path):
    length, seen = 16 << 20, Seen()

    async with story(tmp_path, partial(Watched, seen), Slow) as (instance, _routes, _pool, ask):
        request = b"POST /web/a HTTP/1.1\r\nhost: board\r\ncontent-length: %d\r\n\r\n" % length
        answer = asyncio.ensure_future(ask(request + bytes(length)))
        await seen.stopped.wait()
        # What the router holds, and what the kernel took of it on the way to the instance.
        assert seen.received < length // 4
        instance.let.set()
        assert await answer == (b"200", b"hi")
        assert seen.received == len(request) + length


@pytest.mark.asyncio
async def test_of_requests_sent_ahead_no_more_are_read_before_those_are_answered_that_were(tmp_path):
    request = GET[:-2] + b"x-long: %b\r\n\r\n" % (b"x" * 4096)
    number, seen = 400, Seen()

    async with story(tmp_path, partial(Watched, seen)) as (_instance, _routes, _pool, ask):
        assert await ask(request * number) == (b"200", b"hi")
        for _ in range(number - 1):
            assert await ask(b"") == (b"200", b"hi")
        assert seen.received == number * len(request)
        # As many as come in one piece, beside the one that is being answered and the one whose end is still to come.
        assert seen.most_waiting <= proxy.READ_BYTES // len(request) + 3


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.asyncio
async def test_what_follows_an_answer_is_never_taken_for_the_next_ones(tmp_path, monkeypatch, method):
    """An instance whose guest broke out could else answer in another's name, to a client who asks both."""
    within = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(ANSWER)
    monkeypatch.setattr(Instance, "answer", (within if method == b"HEAD" else ANSWER) + ANSWER)

    async with story(tmp_path) as (instance, _routes, _pool, ask):
        with pytest.raises(asyncio.IncompleteReadError) as ended:
            await ask(GET.replace(b"GET", method) + GET.replace(b"/web/", b"/other/"))
        assert ended.value.partial == b""
        assert instance.connections == 1


@pytest.mark.asyncio
async def test_a_thousand_requests_sent_at_once_are_answered(tmp_path):
    async with story(tmp_path) as (_instance, _routes, _pool, ask):
        requests = b"GET / HTTP/1.1\r\nhost: b\r\n\r\n" * 1000
        assert (await ask(requests))[0] == b"404"
        for _ in range(999):
            assert (await ask(b""))[0] == b"404"


@pytest.mark.asyncio
async def test_few_connections_are_kept_and_none_for_ever(tmp_path, monkeypatch):
    async with story(tmp_path, instance=Patient) as (instance, _routes, pool, ask):
        others = [await asyncio.open_connection(*ask.address) for _ in range(10)]
        for _, writer in others:
            writer.write(GET)
        await instance.asked.wait()
        instance.let.set()
        for reader, _ in others:
            await reader.readuntil(b"\r\n\r\nhi")
        assert len(pool._kept["web"]) == proxy.KEPT_MAX < instance.connections
        pool.sweep()
        assert pool._count == proxy.KEPT_MAX
        monkeypatch.setattr(proxy, "KEPT_S", -1)
        pool.sweep()
        assert (pool._count, pool._kept) == (0, {})
        for _, writer in others:
            writer.close()


@pytest.mark.asyncio
async def test_a_kept_connection_that_was_paused_at_the_end_of_a_large_answer_reads_on(tmp_path, monkeypatch):
    large = b"x" * 40_000
    monkeypatch.setattr(Instance, "answer", b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(large), large))

    async with story(tmp_path, Narrow) as (instance, _routes, _pool, ask):
        for _ in range(4):
            assert await ask(GET) == (b"200", large)
        assert instance.connections == 1


@pytest.mark.asyncio
async def test_what_comes_again_is_not_read_again_and_means_the_same(tmp_path, monkeypatch):
    read = []
    feed = parser.RequestParser.feed
    monkeypatch.setattr(parser.RequestParser, "feed", lambda self, data: (read.append(data), feed(self, data))[1])

    async with story(tmp_path) as (instance, _routes, _pool, ask):
        post = b"POST /web/b HTTP/1.1\r\nhost: board\r\ncontent-length: 3\r\n\r\n"
        for request in (GET, GET, post + b"abc", GET, GET.replace(b"board", b"other"), GET):
            assert (await ask(request))[0] == b"200"
            if request.startswith(b"POST"):
                instance.heads.pop()
        assert read == [GET, post, b"abc", GET.replace(b"board", b"other")]
        same = b"GET /a HTTP/1.1\r\nhost: %b\r\nx-forwarded-prefix: /web\r\n\r\n"
        assert [head.removeprefix(b"abc") for head in instance.heads] == [same % b"board"] * 3 + [
            same % b"other",
            same % b"board",
        ]


@pytest.mark.asyncio
async def test_a_client_from_outside_does_not_say_how_many_neighbours_it_came_through(tmp_path):
    """Else it could make a component's own requests to its neighbours fail."""

    async with story(tmp_path) as (instance, _routes, _pool, ask):
        for _ in range(2):  # read, and known
            assert (await ask(GET[:-2] + b"X-Wasmfleet-Hops: 4\r\nx-mine: 1\r\n\r\n"))[0] == b"200"
        assert [b"x-mine: 1\r\n" in head for head in instance.heads] == [True, True]
        assert not [head for head in instance.heads if b"hops" in head.lower()]


@pytest.mark.asyncio
async def test_what_is_known_is_forgotten_when_an_instance_goes(tmp_path):
    async with story(tmp_path) as (_instance, routes, pool, ask):
        assert (await ask(GET))[0] == b"200"
        assert pool.known
        the_router = router.Router(None, None, str(tmp_path), router.SharedClients(mmap.mmap(-1, 4096)))
        the_router._routes, the_router._pool = routes, pool
        the_router._heed(helper_api.RouteRemove("web"))
        assert (await ask(GET))[0] == b"404"
        the_router._heed(helper_api.RouteUpdate("web", up=False))
        assert (await ask(GET))[0] == b"503"
        the_router._heed(helper_api.RouteUpdate("web", up=True))
        assert (await ask(GET))[0] == b"200"


@pytest.mark.asyncio
async def test_clients_beyond_what_the_router_takes_wait_until_one_has_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(router, "_CLIENTS_MAX", 2)
    async with asyncio.timeout(30):
        instance, listener = Instance(), socket.create_server(("127.0.0.1", 0))
        await asyncio.start_unix_server(instance.serve, tmp_path / "web")
        ours, theirs = framing.socket_pair()
        page = mmap.mmap(-1, 4096)
        the_router = router.Router(listener, theirs, str(tmp_path), router.SharedClients(page))
        the_router._routes.up["web"] = True
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
