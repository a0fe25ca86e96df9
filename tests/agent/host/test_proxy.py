"""The router's proxy, between a client and an instance that only counts: what it opens, and what it reads again."""

import asyncio
import socket

from agent.host import proxy, router
from agent.host.routes import Routes

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


class Narrow(proxy.Client):
    """A client's connection in which little fits."""

    def connection_made(self, transport):
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        transport.set_write_buffer_limits(high=1024)


def story(tmp_path, tell, client=proxy.Client):
    """Run `tell(instance, routes, pool, ask)`, where `ask(request)` is one exchange on the same connection."""

    async def main():
        instance, routes, pool = Instance(), Routes(), proxy.Pool(str(tmp_path))
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

        try:
            await tell(instance, routes, pool, ask)
        finally:
            writer.close()

    asyncio.run(main())


def test_each_exchange_has_a_connection_of_its_own_so_that_a_free_lane_takes_it(tmp_path):
    async def tell(instance, _routes, _pool, ask):
        for _ in range(10):
            assert await ask(GET) == (b"200", b"hi")
        assert instance.connections == 10

    story(tmp_path, tell)


def test_large_answers_arrive_where_little_fits(tmp_path, monkeypatch):
    large = b"x" * 40_000
    monkeypatch.setattr(Instance, "answer", b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(large), large))

    async def tell(instance, _routes, _pool, ask):
        for _ in range(4):
            assert await ask(GET) == (b"200", large)

    story(tmp_path, tell, Narrow)


def test_what_comes_again_is_not_read_again_and_means_the_same(tmp_path, monkeypatch):
    read = []
    feed = proxy.Reader.feed
    monkeypatch.setattr(proxy.Reader, "feed", lambda self, data: (read.append(data), feed(self, data))[1])

    async def tell(instance, _routes, _pool, ask):
        post = b"POST /web/b HTTP/1.1\r\nhost: board\r\ncontent-length: 3\r\n\r\n"
        for request in (GET, GET, post + b"abc", GET, GET.replace(b"board", b"other"), GET):
            assert (await ask(request))[0] == b"200"
            if request.startswith(b"POST"):
                instance.heads.pop()
        assert read == [GET, post + b"abc", GET.replace(b"board", b"other")]
        same = b"GET /a HTTP/1.1\r\nhost: %b\r\nx-forwarded-prefix: /web\r\n\r\n"
        assert [head.removeprefix(b"abc") for head in instance.heads] == [same % b"board"] * 3 + [
            same % b"other",
            same % b"board",
        ]

    story(tmp_path, tell)


def test_a_client_from_outside_does_not_say_how_many_neighbours_it_came_through(tmp_path):
    """Else it could make a component's own requests to its neighbours fail."""

    async def tell(instance, _routes, _pool, ask):
        for _ in range(2):  # read, and known
            assert (await ask(GET[:-2] + b"X-Wasmfleet-Hops: 4\r\nx-mine: 1\r\n\r\n"))[0] == b"200"
        assert [b"x-mine: 1\r\n" in head for head in instance.heads] == [True, True]
        assert not [head for head in instance.heads if b"hops" in head.lower()]

    story(tmp_path, tell)


def test_what_is_known_is_forgotten_when_an_instance_goes(tmp_path):
    async def tell(_instance, routes, pool, ask):
        assert (await ask(GET))[0] == b"200"
        assert pool.known
        the_router = router._Router(None, None, str(tmp_path))
        the_router._routes, the_router._pool = routes, pool
        the_router._heed(router.Unset("web"))
        assert (await ask(GET))[0] == b"404"
        the_router._heed(router.Set("web", up=False))
        assert (await ask(GET))[0] == b"503"
        the_router._heed(router.Set("web", up=True))
        assert (await ask(GET))[0] == b"200"

    story(tmp_path, tell)
