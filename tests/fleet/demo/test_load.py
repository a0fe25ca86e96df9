"""The load client must notice every lost request, or the demo's "0 lost" would mean nothing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from fleet.demo.load import Load, LoadResult, first_answer

OK = b"HTTP/1.1 200 OK\r\nX-Version: 1\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nx-version: 2\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
LAST = b"HTTP/1.1 200 OK\r\nx-version: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
BROKEN = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"
TORN = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nhel"


class Server:
    """Answers request number N (from 0) with `script(N)`; None closes the connection instead."""

    def __init__(self, script: Callable[[int], bytes | None]) -> None:
        self.script = script
        self.requests: list[str] = []
        self.connections = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(EOFError, OSError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = [line for line in head.lower().split("\r\n") if line.startswith("content-length")]
                body = await reader.readexactly(int(length[0].split(":")[1])) if length else b""
                answer = self.script(len(self.requests))
                self.requests.append(f"{head.split(' ')[0]} {len(body)}")
                if answer is None:
                    break
                writer.write(answer)
                await writer.drain()
                if answer in (TORN, LAST) or "connection: close" in head.lower():
                    break
        writer.close()


@contextlib.asynccontextmanager
async def serving(script: Callable[[int], bytes | None]) -> AsyncIterator[tuple[Server, int]]:
    handler = Server(script)
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        yield handler, server.sockets[0].getsockname()[1]


async def measure(
    script: Callable[[int], bytes | None], requests: int = 20, **how: object
) -> tuple[LoadResult, Server]:
    """Run a load against a script until it has sent some requests."""
    async with serving(script) as (handler, port), Load(port=port, pause_s=0, **how) as load:
        await load.sent(requests)
        return await load.stop(), handler


@pytest.mark.asyncio
@pytest.mark.parametrize("answer", [OK, CHUNKED, LAST])
async def test_whole_answers_are_answered_whatever_their_framing(answer):
    result, _ = await measure(lambda _: answer)
    assert result.lost == 0
    assert result.answered >= 20
    assert result.by_status == {200: result.answered}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "connection closed without an answer"),
        (TORN, "connection ended early"),
        (BROKEN, "status 500"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "a response without a length"),
    ],
)
async def test_each_way_to_lose_one_request_is_counted_once_and_named(answer, reason):
    # Only request 7 goes wrong; a client that retried would hide it.
    result, _ = await measure(lambda number: answer if number == 7 else OK)
    assert result.lost == 1
    assert result.reasons == {reason: 1}
    assert reason in result.losses[0]


@pytest.mark.asyncio
async def test_a_refused_connection_is_lost():
    async def go() -> LoadResult:
        async with serving(lambda _: OK) as (_, port):
            pass  # closed again: nothing listens there
        async with Load(port=port) as load:
            await load.sent(4)
            return await load.stop()

    assert (await go()).reasons.keys() == {"connection refused"}


@pytest.mark.asyncio
async def test_silence_is_lost():
    result, _ = await measure(lambda _: b"", requests=1, timeout_s=0.05, kept_alive=1, fresh=0)
    assert result.reasons.keys() == {"no answer in time"}


@pytest.mark.asyncio
async def test_one_request_in_ten_is_a_post_with_its_body():
    result, server = await measure(lambda _: OK, requests=100, kept_alive=1, fresh=1)
    posts = [request for request in server.requests if request == "POST 12"]
    assert len(posts) == result.posts
    assert set(server.requests) == {"GET 0", "POST 12"}
    assert 0.08 < result.posts / result.sent < 0.12


@pytest.mark.asyncio
async def test_half_of_the_clients_keep_their_connection():
    kept, server = await measure(lambda _: OK, requests=50, kept_alive=2, fresh=0)
    assert kept.connections == server.connections == 2
    fresh, server = await measure(lambda _: OK, requests=50, kept_alive=0, fresh=2)
    assert fresh.connections == server.connections == fresh.sent


@pytest.mark.asyncio
async def test_connection_close_is_obeyed_and_nothing_is_lost():
    result, _ = await measure(lambda number: LAST if number % 5 == 0 else OK, requests=50, kept_alive=2, fresh=0)
    assert result.lost == 0
    assert result.connections > 2


@pytest.mark.asyncio
async def test_the_difference_of_two_counts_is_what_happened_between_them():
    async def go() -> tuple[LoadResult, float | None]:
        state = {"now": OK}
        async with serving(lambda _: state["now"]) as (_, port), Load(port=port, pause_s=0) as load:
            await load.seen("1")
            before = load.count()
            state["now"] = CHUNKED
            await load.seen("2", times=5)
            await load.stop()
            return load.count() - before, load.first_answer("2")

    between, first = await go()
    assert between.by_version["2"] >= 5
    assert between.lost == 0
    assert first is not None


@pytest.mark.asyncio
async def test_the_first_answer_of_a_version_is_waited_for():
    async def go() -> int:
        async with serving(lambda number: OK if number < 3 else CHUNKED) as (handler, port):
            await asyncio.wait_for(first_answer(port=port, version="2", every_s=0), 10)
            return len(handler.requests)

    assert await go() == 4
